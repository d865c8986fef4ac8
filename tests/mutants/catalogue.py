"""All mutants: errors that would cost a run of weeks, and what sees each of them."""

from tests.mutants import (
    of_checkpoints,
    of_drafting,
    of_models,
    of_rollouts,
    of_updates,
)
from tests.mutants.runner import Mutant

_LISTS = (
    of_checkpoints.EDITS,
    of_drafting.EDITS,
    of_models.EDITS,
    of_rollouts.EDITS,
    of_updates.EDITS,
)
# An edit is (old, new) or (old, new, tests) where other tests see it than its file's.
MUTANTS: tuple[Mutant, ...] = tuple(
    Mutant(file, old, new, own[0] if own else tests)
    for edits in _LISTS
    for (file, tests), pairs in edits.items()
    for old, new, *own in pairs
)
