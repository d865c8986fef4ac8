"""Transfer of the policy from the learner's mesh to a rollout engine's, versioned."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tlt_jax import sharding as sharding_lib
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.specdec import programs


def engine_meshes(
    mesh: jax.sharding.Mesh, num_workers: int = 1
) -> list[jax.sharding.Mesh]:
    """Return the meshes of rollout engines beside a learner on `mesh`.

    Each has the devices of one place along `data` and `fsdp`, split by `tensor` as the
    learner is, so that heads and vocabulary stay where they are.

    Raises:
      ValueError: there are not as many places.
    """
    groups = mesh.devices.reshape(-1, mesh.devices.shape[-1])
    if num_workers > len(groups):
        raise ValueError(
            f"workers.num={num_workers} needs as many places along mesh.data and "
            f"mesh.fsdp, but {mesh.devices.size} devices with mesh.tensor="
            f"{groups.shape[1]} have {len(groups)}: use fewer workers or more devices."
        )
    stride = len(groups) // num_workers
    return [
        sharding_lib.make_mesh(1, 1, groups.shape[1], devices=list(group))
        for group in groups[: stride * num_workers : stride]
    ]


class WeightSync:
    """Casts, reshards and unstacks the learner's weights for rollout engines.

    The result never shares a buffer with the learner, whose next update may thus give
    its own up. One program is compiled, on the learner's mesh; where an engine has
    fewer devices its output is copied leaf by leaf, each given up as soon as all have
    it: the peak beyond the engines' weights is one copy in their dtype, split over the
    learner's mesh.
    """

    def __init__(
        self,
        model: model_config.ModelConfig,
        *,
        source: jax.sharding.Mesh,
        targets: Sequence[jax.sharding.Mesh],
        pool: programs.ProgramPool,
        dtype: Any = jnp.float32,
        rules: sharding_lib.ShardingRules | None = None,
    ):
        """Prepare the shardings; nothing is compiled yet.

        Args:
          model: the policy.
          source: the learner's mesh.
          targets: the engines' meshes.
          pool: of compiled programs.
          dtype: of the engine's weights.
          rules: logical to mesh axes, on both meshes; None: the default ones.

        Raises:
          ValueError: a weight does not divide over a mesh.
        """
        rules = rules or sharding_lib.ShardingRules()
        self._pool = pool
        self._dtype = jnp.dtype(dtype)
        self._key = ("weight_sync", model, source, *targets, rules, self._dtype)
        self._version = 0
        self._source = _shardings(model, source, rules)
        self._abstract = model_params.abstract(model)
        self._targets = [_unstacked(model, target, rules) for target in targets]
        same = [list(source.devices.flat) == list(t.devices.flat) for t in targets]
        self._same_devices = same == [True]
        self._middle = (
            self._targets[0] if self._same_devices else _unstacked(model, source, rules)
        )

    @property
    def version(self) -> int:
        """Transfers made so far; the version of the newest weights."""
        return self._version

    def restore_version(self, version: int) -> None:
        """Go on counting from `version`, after a restart."""
        if version < 0:
            raise ValueError(f"version={version} is negative: versions count from 0.")
        self._version = version

    def sync(
        self, params: model_params.Params
    ) -> tuple[list[model_params.Params], int]:
        """Give the engines the learner's present weights.

        Args:
          params: as in `learner.TrainState`; kept as they are.

        Returns:
          Each engine's params (a tuple of layers, on its mesh, in its dtype), complete
          when returned, and their version, counted from 1.
        """
        program = self._pool.get(self._key, self._lower)
        leaves, treedef = jax.tree.flatten(program(params))
        if self._same_devices:
            copies = [leaves]
        else:
            wanted = [jax.tree.leaves(target) for target in self._targets]
            copies = [[] for _ in wanted]
            for i in range(len(leaves)):
                for copy, shardings in zip(copies, wanted, strict=True):
                    copy.append(jax.device_put(leaves[i], shardings[i]))
                # All have it.
                leaves[i] = None
        placed = [jax.tree.unflatten(treedef, copy) for copy in copies]
        jax.block_until_ready(placed)
        self._version += 1
        return placed, self._version

    def _lower(self) -> jax.stages.Lowered:
        params = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            ),
            self._abstract,
            self._source,
        )
        convert = functools.partial(_convert, dtype=self._dtype)
        return jax.jit(convert, out_shardings=self._middle).lower(params)


def _convert(params: model_params.Params, *, dtype: Any) -> model_params.Params:
    """Cast and unstack into fresh buffers."""
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return model_params.unstack(cast)


def _axes(model: model_config.ModelConfig) -> model_params.Params:
    """Logical axes of unstacked params."""
    axes = model_params.logical_axes(model)
    one_layer = jax.tree.map(
        lambda names: names[1:], axes.layers, is_leaf=sharding_lib.is_axes
    )
    return axes.replace(layers=(one_layer,) * model.num_layers)


def _shardings(model, mesh, rules) -> model_params.Params:
    return sharding_lib.tree_shardings(
        mesh, rules, model_params.logical_axes(model), model_params.abstract(model)
    )


def _unstacked(model, mesh, rules) -> model_params.Params:
    _shardings(model, mesh, rules)  # checks divisibility, naming the leaf
    return sharding_lib.tree_shardings(mesh, rules, _axes(model))
