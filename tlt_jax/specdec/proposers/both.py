"""One tree of two proposers' guesses."""

import dataclasses
from typing import Any

from tlt_jax.specdec import candidates as candidates_lib
from tlt_jax.specdec import decode, protocols
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Both(protocols.Proposer):
    """Unites the candidates of two; inputs, state, extra and progress are pairs.

    Each learns what became of all its candidates, wherever the tree had room for them.

    Attributes:
      first, second: of one strategy; the smaller and flatter set second, see
        `candidates.combine`.
    """

    first: protocols.Proposer
    second: protocols.Proposer

    @property
    def strategy(self) -> strategy_lib.Strategy:
        return self.first.strategy

    def init(
        self, inputs: Any, caches: protocols.Caches, rows: decode.Rows
    ) -> tuple[Any, Any]:
        first, second = inputs
        first = self.first.init(first, caches, rows)
        return first, self.second.init(second, caches, rows)

    def propose(
        self, inputs: Any, state: Any, rows: decode.Rows, noise: Array
    ) -> protocols.Proposal:
        first = self.first.propose(inputs[0], state[0], rows, noise)
        second = self.second.propose(inputs[1], state[1], rows, noise)
        united = candidates_lib.combine(first.candidates, second.candidates)
        return protocols.Proposal(united, extra=(first, second))

    def advance(
        self,
        inputs: Any,
        state: Any,
        rows: decode.Rows,
        proposal: protocols.Proposal,
        taken: protocols.Taken,
    ) -> tuple[Any, Any]:
        first, second = proposal.extra
        first = self.first.advance(inputs[0], state[0], rows, first, taken)
        return first, self.second.advance(inputs[1], state[1], rows, second, taken)

    def finish(
        self, state: Any, caches: protocols.Caches
    ) -> tuple[protocols.Caches, tuple[Any, Any]]:
        caches, first = self.first.finish(state[0], caches)
        caches, second = self.second.finish(state[1], caches)
        return caches, (first, second)
