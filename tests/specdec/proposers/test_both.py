"""Two proposers in one: to each its own inputs, state, extra and progress."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from tlt_jax.specdec import candidates as candidates_lib
from tlt_jax.specdec import protocols
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.proposers import both

SHAPE = strategy_lib.parse("D2K2V4-both")


@dataclasses.dataclass(frozen=True)
class Told(protocols.Proposer):
    """Says what it was given, under its name."""

    name: str
    tokens: tuple[int, ...]
    strategy: strategy_lib.Strategy = SHAPE

    def init(self, inputs, caches, rows):
        return (self.name, "begun", inputs, caches, rows)

    def propose(self, inputs, state, rows, noise):
        num = len(self.tokens)
        return protocols.Proposal(
            candidates_lib.Candidates(
                tokens=jnp.array([self.tokens]),
                parents=jnp.full((1, num), -1),
                depths=jnp.ones((1, num), jnp.int32),
                scores=-jnp.arange(1.0, 1.0 + num)[None],
            ),
            extra=(self.name, inputs, state, rows, noise),
        )

    def advance(self, inputs, state, rows, proposal, taken):
        return (self.name, "advanced", inputs, state, rows, proposal.extra, taken)

    def finish(self, state, caches):
        return [*caches, self.name], (self.name, state)


PAIR = both.Both(Told("first", (5, 6)), Told("second", (6, 8)))


def test_each_gets_its_own():
    assert PAIR.strategy == SHAPE
    assert PAIR.init(("i1", "i2"), "caches", "rows") == (
        ("first", "begun", "i1", "caches", "rows"),
        ("second", "begun", "i2", "caches", "rows"),
    )
    proposal = PAIR.propose(("i1", "i2"), ("s1", "s2"), "rows", "noise")
    first, second = proposal.extra
    assert first.extra == ("first", "i1", "s1", "rows", "noise")
    assert second.extra == ("second", "i2", "s2", "rows", "noise")
    assert PAIR.advance(("i1", "i2"), ("s1", "s2"), "rows", proposal, "taken") == (
        ("first", "advanced", "i1", "s1", "rows", first.extra, "taken"),
        ("second", "advanced", "i2", "s2", "rows", second.extra, "taken"),
    )
    # The pages that the one has changed go on to the other.
    caches, progress = PAIR.finish(("s1", "s2"), ["caches"])
    assert caches == ["caches", "first", "second"]
    assert progress == (("first", "s1"), ("second", "s2"))


def test_what_both_guess_stands_there_once_with_the_better_score():
    made = PAIR.propose((0, 0), (0, 0), None, None).candidates
    assert made.tokens.tolist() == [[5, 6, 0, 8]]
    assert made.parents.tolist() == [[-1, -1, -1, -1]]
    assert made.depths.tolist() == [[1, 1, 0, 1]]
    assert made.scores.tolist() == [[-1.0, -1.0, -np.inf, -2.0]]
