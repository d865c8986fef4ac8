"""From what a strategy says to the proposer that does it."""

import importlib

from tlt_jax.models.drafters import drafter
from tlt_jax.specdec import decode, protocols
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.proposers import both, learned, ngram


def build(
    strategy: strategy_lib.Strategy,
    settings: decode.Settings,
    drafter_cfg: drafter.DrafterConfig | None = None,
    ranking: str = "coupled",
) -> protocols.Proposer:
    """Build the proposer that a strategy names.

    Args:
      strategy: its shape; a name `package.module:Name` stands for a class of one's own,
        which is given strategy and settings, and no inputs of the host.
      settings: of the target.
      drafter_cfg: the learned drafter, where it is asked.
      ranking: of the learned drafter, see `learned.Learned`.

    Raises:
      ValueError: a class of one's own is not to be had.
    """
    if strategy.is_external:
        return load(strategy.proposer)(strategy, settings)
    if not strategy.drafts:
        return ngram.NGram(strategy)
    drafted = learned.Learned(strategy, settings, drafter_cfg, ranking)
    return both.Both(drafted, ngram.NGram(strategy)) if strategy.matches else drafted


def load(name: str) -> type[protocols.Proposer]:
    """Import the class that `package.module:Name` names.

    Raises:
      ValueError: there is no such module or class.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"proposer={name!r} cannot be imported ({error}): write package.module:"
            "Name of a class like protocols.Proposer that Python finds."
        ) from error
