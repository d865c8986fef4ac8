"""From what a strategy says to the proposer that does it."""

from tlt_jax.models.drafters import drafter
from tlt_jax.runtime import external
from tlt_jax.specdec import decode, protocols
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.proposers import block, both, learned, ngram


def build(
    strategy: strategy_lib.Strategy,
    settings: decode.Settings,
    drafter_cfg: drafter.DrafterConfig | None = None,
    ranking: str = "coupled",
) -> protocols.Proposer:
    """Build the proposer that a strategy names.

    A name `package.module:Name` stands for a class of one's own, which is given
    strategy and settings, and no inputs of the host. `drafter_cfg` is needed where the
    learned drafter is asked; for its `ranking` see `learned.Learned`.

    Raises:
      ValueError: a class of one's own is not to be had.
    """
    if strategy.is_external:
        return external.load("proposer", strategy.proposer)(strategy, settings)
    if not strategy.drafts:
        return ngram.NGram(strategy)
    drafter_of = block.Block if drafter_cfg.block_size else learned.Learned
    drafted = drafter_of(strategy, settings, drafter_cfg, ranking)
    return both.Both(drafted, ngram.NGram(strategy)) if strategy.matches else drafted
