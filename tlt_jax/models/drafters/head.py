"""The head that a drafter's features are multiplied by: its target's, or its own."""

from tlt_jax.models import kernels as kernels_lib
from tlt_jax.models import layers, transformer
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.types import Array


def head_rows(target: model_params.Params, draft_ids: Array | None) -> Array:
    """Take the rows `[Vd, D]` of the head that `draft_ids [Vd]` name; None: all."""
    return target.head if draft_ids is None else target.head[draft_ids]


def head_of(params: drafter.DrafterParams, head: Array) -> Array:
    """Return the drafter's own head, or that of its target where it has none."""
    return head if params.head is None else params.head


def for_head(
    params: drafter.DrafterParams, cfg: drafter.DrafterConfig, hidden: Array
) -> Array:
    """Turn the drafter's features `[D, ...]` into what its head multiplies."""
    if cfg.architecture != "eagle3":
        return hidden
    return layers.rms_norm(hidden, params.norm, cfg.layer.rms_norm_eps)


def logits(
    params: drafter.DrafterParams,
    cfg: drafter.DrafterConfig,
    head: Array,
    hidden: Array,
    kernels: kernels_lib.Kernels = kernels_lib.PORTABLE,
) -> Array:
    """Multiply the drafter's features `[D, B, T]` by the frozen head.

    The head is `[Vd, D]`, see `head_rows` and `head_of`; the logits are
    `[B, T, Vd] float32`, and entry i is token `draft_ids[i]`.
    """
    return transformer.head_logits(head, for_head(params, cfg, hidden), kernels)
