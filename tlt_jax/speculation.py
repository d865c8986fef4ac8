"""What a command needs to speculate: a drafter from its directory, a strategy table."""

import dataclasses
import os
from collections.abc import Sequence

import jax.numpy as jnp

from tlt_jax.models import config as model_config
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import io as drafter_io
from tlt_jax.rl.engine import speculator
from tlt_jax.specdec import chain
from tlt_jax.specdec import strategy as strategy_lib

NGRAM = "ngram"
# Chains, shorter the more rows there are: on two CPU cores these were the fastest.
DEFAULT_TABLE = ("1:D7K1V8", "4:D5K1V6", "16:D3K1V4")


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How to speculate, and with which weights.

    Attributes:
      drafting_cfg: for the engine.
      params: the learned drafter's weights; None: suffix matches alone.
    """

    drafting_cfg: speculator.DraftingConfig
    params: drafter.DrafterParams | None

    @property
    def max_length(self) -> int:
        """Positions that the drafter was trained for; 0: any."""
        cfg = self.drafting_cfg.drafter_cfg
        return cfg.max_length if cfg else 0


def load(
    spec: str,
    target: model_config.ModelConfig,
    table: Sequence[str] = (),
    *,
    ranking: str = "coupled",
    tau: float = 0.5,
    rule: str = chain.KEYED,
    dtype=jnp.float32,
) -> Speculation:
    """Load the drafter that `spec` names.

    Args:
      spec: a drafter's directory, ours or in a published layout, or `ngram` for suffix
        matches alone.
      target: the model that verifies.
      table: entries as of `strategy.parse_arms`; empty: the default.
      ranking, tau: see `propose`.
      rule: of acceptance, see `speculator.DraftingConfig`.
      dtype: of the drafter's weights.

    Raises:
      ValueError: the directory holds no drafter of this target, or an entry cannot be
        built.
    """
    entries = tuple(table) or DEFAULT_TABLE
    cfg = params = None
    if spec != NGRAM:
        cfg, params = drafter_io.load(folder(spec), target, dtype)
    elif not table:
        entries = tuple(f"{entry}-{NGRAM}" for entry in entries)
    made = speculator.DraftingConfig(
        strategy_lib.parse_arms(entries), cfg, ranking=ranking, tau=tau, rule=rule
    )
    return Speculation(made, params)


def folder(spec: str) -> str:
    """Return the drafter's own directory; the workdir of a training holds it."""
    directory = os.path.expanduser(spec)
    inside = os.path.join(directory, "drafter")
    return inside if os.path.isdir(inside) else directory
