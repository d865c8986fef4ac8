"""One text decoded speculatively, a step at a time, with all that each step saw.

For pictures and for looking at a drafter: the steps are those of the engine's programs,
which take many of them on the device without a word.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax import policy, speculation
from tlt_jax.models import kv_cache
from tlt_jax.models.drafters import drafter
from tlt_jax.specdec import decode, noise, protocols, sampling, speculate, tree
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.proposers import build as proposers
from tlt_jax.specdec.proposers import learned

_PAGE_SIZE = 16


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of one row.

    Attributes:
      text: `[n] int32`, the row's tokens before the step; the last is the tree's root.
      tokens: `[W] int32`, of the tree's nodes; the root first.
      parents: `[W] int32`, of each node; the root is its own.
      depths: `[W] int32`, 0 for the root.
      valid: `[W] bool`, nodes that there are.
      sees: `[W, W] bool`, which nodes each node attends to, beside the text.
      logprobs: `[W, V] float32`, the target's law behind each node.
      noise: `[A, V] float32`, Gumbel noise of the tokens behind depths 0 to A - 1.
      drawn: `[W] int32`, the target's draw at each node.
      path: `[A'] int32`, nodes accepted, the root first.
      emitted: `[A'] int32`, tokens that the step adds to the text.
    """

    text: np.ndarray
    tokens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    valid: np.ndarray
    sees: np.ndarray
    logprobs: np.ndarray
    noise: np.ndarray
    drawn: np.ndarray
    path: np.ndarray
    emitted: np.ndarray

    @property
    def num_accepted(self) -> int:
        """Drafted tokens that were accepted; the last one emitted is not among them."""
        return len(self.path) - 1


class Tracer:
    """Decodes texts of one target with one drafter; its programs are compiled once."""

    def __init__(
        self,
        asked: policy.Policy,
        drafting: speculation.Speculation,
        strategy: strategy_lib.Strategy,
        *,
        max_length: int,
        sampling_cfg: sampling.SamplingConfig | None = None,
        ranking: str = "coupled",
    ):
        """Make caches for one row.

        `asked` is the target; `drafting` has a learned drafter, whose own strategies
        are not looked at: `strategy` is that of every step. `max_length` counts prompt
        and completion. Without `sampling_cfg` the temperature is 1; for `ranking` see
        `proposers.learned`.

        Raises:
          ValueError: there is no learned drafter, the strategy or the law has no trees
            to show, or the ranking does not exist.
        """
        law = sampling_cfg or sampling.SamplingConfig()
        if drafting.params is None or strategy.matches:
            raise ValueError(
                f"strategy {strategy} without a learned drafter: give a drafter's "
                "directory to speculation.load, and a strategy like D3K2V6."
            )
        if law.temperature == 0:
            raise ValueError(
                "temperature=0 draws nothing, so there is no noise to show: use a "
                "temperature above 0."
            )
        if ranking not in learned.RANKINGS:
            raise ValueError(
                f"ranking={ranking!r}: use one of {', '.join(learned.RANKINGS)}."
            )
        self._asked, self._strategy, self._max_length = asked, strategy, max_length
        cfg, drafter_cfg = asked.config, drafting.speculator_cfg.drafter_cfg
        dtype = jnp.dtype(asked.precision)
        num_pages = -(-(max_length + strategy.max_accept_length) // _PAGE_SIZE)
        self._width = num_pages * _PAGE_SIZE
        self._table = np.arange(1, num_pages + 1, dtype=np.int32)[None]
        size = (num_pages + 1, _PAGE_SIZE, dtype)
        self._caches = protocols.Caches(
            target=kv_cache.create(cfg, *size, drafter_cfg.num_read),
            drafter=kv_cache.create(drafter_cfg.layer, *size),
        )
        self._sharpness, self._tau = drafter.measured(drafting.params)
        if drafting.speculator_cfg.tau is not None:
            self._tau = np.float32(drafting.speculator_cfg.tau)
        params = drafting.params.replace(sharpness=None, tau=None)
        self._weights = learned.weights_of(params, asked.params)
        settings = decode.Settings(
            cfg=cfg,
            sampling_cfg=law,
            eos_ids=asked.eos_ids,
            max_tokens=strategy.max_accept_length,
            feature_layers=drafter_cfg.feature_layers,
            dtype=asked.precision,
        )
        proposer = proposers.build(strategy, settings, drafter_cfg, ranking)
        take, partial = speculate.run_step, functools.partial
        self._step = jax.jit(partial(take, proposer=proposer, settings=settings))
        self._prefill = jax.jit(partial(decode.prefill, settings=settings))
        self._fill = jax.jit(partial(learned.fill, cfg=drafter_cfg, dtype=dtype))

    def steps(
        self,
        prompt: Sequence[int] | np.ndarray,
        *,
        max_new_tokens: int,
        seed: int = 0,
        request_id: int = 0,
    ) -> list[Step]:
        """Decode a completion, and show every step of it.

        The prompt is `[n] int32`, at least one token; `max_new_tokens` counts EOS;
        `seed` and `request_id` are of the noise, with which plain decoding has the same
        tokens.

        Raises:
          ValueError: the prompt is empty, or the text may not fit.
        """
        limit = len(prompt) + max_new_tokens
        if not len(prompt) or limit > self._max_length:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and max_new_tokens={max_new_tokens} "
                f"need 1 to {self._max_length} tokens: give some text, or a larger "
                "max_length."
            )
        text, keys = (
            np.asarray(prompt, np.int32),
            noise.request_keys(seed, [request_id]),
        )
        drafted, steps, ended = self._begin(text), [], False
        while len(text) < limit and not ended:
            step, drafted, ended = self._advance(text, drafted, limit, keys)
            steps.append(step)
            text = np.concatenate([text, step.emitted])
        return steps

    def first_steps(
        self,
        prompt: Sequence[int] | np.ndarray,
        *,
        max_new_tokens: int,
        seed: int = 0,
        request_id: int = 0,
    ) -> list[Step]:
        """Decode a completion; show the step that begins at each of its tokens.

        Where `steps` goes on behind what was accepted, here every position is drafted
        from, so that different ways of drafting can be compared on one text. See
        `steps` for the arguments.
        """
        passes = self.steps(
            prompt, max_new_tokens=max_new_tokens, seed=seed, request_id=request_id
        )
        limit = len(prompt) + max_new_tokens
        text = np.concatenate([prompt, *(step.emitted for step in passes)])
        text = text.astype(np.int32)
        keys = noise.request_keys(seed, [request_id])
        found = []
        for length in range(len(prompt), len(text)):
            drafted = self._begin(text[:length])
            found.append(self._advance(text[:length], drafted, limit, keys)[0])
        return found

    def _begin(self, text) -> int:
        """Cache all but the last token, and what the drafter makes of so many."""
        zero, drafted = np.zeros((1,), np.int32), max(len(text) - 2, 0)
        target = self._prefill(
            self._asked.params,
            self._caches.target,
            self._padded(text[:-1]),
            np.array([len(text) - 1], np.int32),
            self._table,
            zero,
        )
        draft_cache = self._fill(
            self._weights,
            target,
            self._caches.drafter,
            self._padded(text[1 : drafted + 1]),
            np.array([drafted], np.int32),
            self._table,
            zero,
        )
        self._caches = protocols.Caches(target, draft_cache)
        return drafted

    def _advance(self, text, drafted, limit, keys) -> tuple[Step, int, bool]:
        rest = text[drafted + 1 :]
        tokens = np.zeros((1, self._strategy.max_accept_length), np.int32)
        tokens[0, : len(rest)] = rest
        cached = np.array([drafted], np.int32)
        draft = learned.Draft(self._weights, self._tau, self._sharpness, cached, tokens)
        rows = decode.Rows(
            page_table=self._table,
            lengths=np.array([len(text) - 1], np.int32),
            pending=text[-1:],
            keys=keys,
            remaining=np.array([limit - len(text)], np.int32),
        )
        self._caches, made = self._step(self._asked.params, self._caches, rows, draft)
        words = tree.ancestor_words(made.tree, self._strategy.draft_depth)
        sees = tree.unpack_words(words, self._strategy.tokens_to_verify)
        made, sees = jax.device_get((made, sees))
        result, nodes, walk = made.result, made.tree, made.walk
        depths = nodes.depths[0]
        step = Step(
            text=text,
            tokens=nodes.tokens[0],
            parents=nodes.parents[0],
            depths=depths,
            valid=nodes.valid[0],
            sees=sees[0],
            logprobs=made.logprobs[0],
            noise=made.noise[0],
            drawn=np.argmax(made.logprobs[0] + made.noise[0][depths], axis=-1),
            path=walk.path[0, : walk.num_accepted[0] + 1],
            emitted=result.emitted.tokens[0, : result.emitted.counts[0]],
        )
        return step, int(result.progress[0][0]), bool(result.emitted.ended[0])

    def _padded(self, tokens: np.ndarray) -> np.ndarray:
        """Fill up to the longest text, `[1, T]`: every text has the same programs."""
        return np.pad(tokens, (0, self._width - len(tokens)))[None]
