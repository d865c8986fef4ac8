"""What a speculative step asks of its parts: who guesses, and by what rule it is kept.

`speculate` knows these two interfaces and no part that has them. Parts are frozen,
hashable records of what is compiled in; what changes from step to step is a pytree that
the step carries for them.
"""

from typing import Any, Protocol

import jax.numpy as jnp
from flax import struct

from tlt_jax.models import kv_cache, ragged
from tlt_jax.specdec import candidates as candidates_lib
from tlt_jax.specdec import decode, sampling, verify
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec import tree as tree_lib
from tlt_jax.types import Array


@struct.dataclass
class Caches:
    """The pages of target and drafter, under one page table.

    Attributes:
      target: keys and values, and features where there is a drafter.
      drafter: the one layer's keys and values, or None.
    """

    target: kv_cache.PagedCache
    drafter: kv_cache.PagedCache | None


@struct.dataclass
class Laws:
    """What candidates were sampled from: children of a node one after the other.

    Each child is a sample of the node's law without the children before it.

    Attributes:
      probs: `[B, X, Vd]`, laws of the token behind a row's text, the first, and behind
        candidates that were expanded.
      behind: `[B, C] int32`, which of them is the one behind a candidate; 0: none, it
        has no children.
      draft_ids: `[Vd] int32`, tokens that the laws are over; None: all in order.
    """

    probs: Array
    behind: Array
    draft_ids: Array | None

    def of_all_tokens(self, probs: Array, vocab_size: int) -> Array:
        """Spread some of the laws, `[..., Vd]`, over all tokens, `[..., V]`.

        Tokens that cannot be drafted have 0; and all have where the drafter has broken:
        then nothing that it drafted passes a test.
        """
        probs = jnp.where(jnp.isnan(probs), 0.0, probs)
        if self.draft_ids is None:
            return probs
        whole = jnp.zeros((*probs.shape[:-1], vocab_size), probs.dtype)
        return whole.at[..., self.draft_ids].add(probs)


@struct.dataclass
class Proposal:
    """What a proposer guesses in a step.

    Attributes:
      candidates: at least `tokens_to_verify - 1` a row; absent ones count.
      laws: that they were sampled from; None: they were not sampled.
      extra: whatever the proposer wants to have when it advances.
    """

    candidates: candidates_lib.Candidates
    laws: Laws | None = None
    extra: Any = ()


@struct.dataclass
class Taken:
    """What the target took in a step.

    Attributes:
      walk: the accepted path.
      counts: `[B] int32`, tokens of it that are kept; 0: the row rode along.
      alive: `[B] bool`, rows that took part.
      features: `[F, B, A]`, the target's at the nodes of the path, or None.
    """

    walk: verify.Walk
    counts: Array
    alive: Array
    features: Array | None


class Proposer(Protocol):
    """Guesses how texts go on. What it guesses decides about speed, never about tokens.

    The methods are traced. `inputs` is what the host gives for a call and no step
    changes; `rows` are as the step finds them: `rows.pending` is the last token of each
    text, `rows.lengths` its position, and `rows.remaining` 0 where the text has ended.

    Attributes:
      strategy: the shape of what it proposes.
    """

    strategy: strategy_lib.Strategy

    def init(self, inputs: Any, caches: Caches, rows: decode.Rows) -> Any:
        """Make the state that the steps of a call carry, any pytree."""
        del inputs, caches, rows
        return ()

    def propose(
        self, inputs: Any, state: Any, rows: decode.Rows, noise: Array
    ) -> Proposal:
        """Guess the next tokens of every row.

        Args:
          inputs: of the call.
          state: from `init` or `advance`.
          rows: as the step finds them.
          noise: `[B, >= A - 1, V]`, Gumbel noise of the tokens behind each row's text,
            by which candidates may be drawn or ranked; one column at temperature 0.
        """

    def advance(
        self,
        inputs: Any,
        state: Any,
        rows: decode.Rows,
        proposal: Proposal,
        taken: Taken,
    ) -> Any:
        """Make the next step's state of what became of the proposal."""
        del inputs, rows, proposal, taken
        return state

    def finish(self, state: Any, caches: Caches) -> tuple[Caches, Any]:
        """End a call after its last step.

        `caches` have the target's pages as they are now, and those of the drafter as
        `init` had them. Returns the caches for the next call, and what the host is to
        know.
        """
        del state
        return caches, ()


class Rule(Protocol):
    """Decides from the target's laws how much of a tree is kept, and what follows."""

    def chance(
        self, keys: Array, lengths: Array, num: int, settings: decode.Settings
    ) -> verify.Chance:
        """Make the randomness of a step.

        Keys of requests are `[B, 2] uint32`, lengths `[B] int32` cached positions when
        it begins; `num` is A, the tokens that it yields at most.
        """

    def judge(
        self,
        law: sampling.Law,
        tree: tree_lib.DraftTree,
        proposal: Proposal,
        chance: verify.Chance,
        settings: decode.Settings,
        rows: ragged.Ragged | None,
    ) -> tuple[verify.Walk, Array]:
        """Walk each tree, selected from the proposal, as far as the rule accepts.

        The law is the target's, of the tokens behind each node, `[B, W, V]`, or
        `[1, N, V]` where `rows` say which are whose; the chance is the step's. Returns
        the walk, and `[B, A] float32`, log-probabilities of its tokens under the law.
        """
