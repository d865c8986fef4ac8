"""The rollout engine: continuous batching over compiled decode programs.

Rows are admitted into free slots, decoded many steps a call, retired when they end, and
packed into the next smaller batch bucket as the batch drains. Each decode call may
speculate or not. Tokens do not depend on any of this: noise is keyed by request and
position. (With a chain rule, `DraftingConfig.rule`, they do, and their law does not.)
"""

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from tlt_jax import sharding, types
from tlt_jax.models import config as model_config
from tlt_jax.models import drafter
from tlt_jax.models import params as model_params
from tlt_jax.rl import asked, drafting, engine_programs, scheduler
from tlt_jax.specdec import chain, decode, noise, programs
from tlt_jax.specdec import strategy as strategy_lib

# Prompts prefilled by one call, at most; buckets are the powers of two up to it.
_PREFILL_ROWS = 4


@dataclasses.dataclass
class RolloutStats:
    """What a run of the engine did.

    Attributes:
      num_tokens: drawn and kept.
      num_steps: target forwards of decode calls.
      num_row_steps: the same times the batch bucket.
      num_calls: decode calls.
      num_prefill_tokens: prompt positions computed.
      num_fill_tokens: positions taken into the drafter's cache outside decode calls.
      num_preempted: rows put back for want of pages.
      num_accepted: over rows and speculative steps, how often at least d drafted tokens
        were accepted; entry 0 counts the row-steps.
      strategies: decode calls by strategy; `none` is plain decoding.
      rule: by which drafted tokens were accepted, see `drafting.DraftingConfig`.
      prefill_s, fill_s, decode_s: seconds on the host's clock, waiting for the device;
        no compilation.
      compile_s: seconds for which programs were waited for.
      active_rows: rows alive at the start of each decode call.
      call_s: seconds of each decode call.
    """

    num_tokens: int = 0
    num_steps: int = 0
    num_row_steps: int = 0
    num_calls: int = 0
    num_prefill_tokens: int = 0
    num_fill_tokens: int = 0
    num_preempted: int = 0
    num_accepted: list[int] = dataclasses.field(default_factory=list)
    strategies: collections.Counter = dataclasses.field(
        default_factory=collections.Counter
    )
    rule: str = chain.KEYED
    prefill_s: float = 0.0
    fill_s: float = 0.0
    decode_s: float = 0.0
    compile_s: float = 0.0
    active_rows: list[int] = dataclasses.field(default_factory=list)
    call_s: list[float] = dataclasses.field(default_factory=list)

    @property
    def accept_length(self) -> float:
        """Tokens per row and speculative step, before limits cut them; 1 without."""
        return accept_length(self.num_accepted)

    def accept_rates(self) -> list[float]:
        """Chance of acceptance at each depth, given that its parent was accepted."""
        return accept_rates(self.num_accepted)

    def add_accepted(self, counts: Sequence[int]) -> None:
        """Add a call's `num_accepted`."""
        width = max(len(counts), len(self.num_accepted))
        both = (list(x) + [0] * (width - len(x)) for x in (counts, self.num_accepted))
        self.num_accepted = [int(a + b) for a, b in zip(*both, strict=True)]


def accept_length(num_accepted: Sequence[int]) -> float:
    """Tokens per row and step, of counts as `RolloutStats` has them; 1 without."""
    return sum(num_accepted) / num_accepted[0] if num_accepted else 1.0


def accept_rates(num_accepted: Sequence[int]) -> list[float]:
    """Chance of acceptance at each depth, given that its parent was accepted."""
    return [b / a if a else 0.0 for a, b in itertools.pairwise(num_accepted)]


class Engine:
    """Generates completions with one copy of the target on one mesh."""

    def __init__(
        self,
        cfg: model_config.ModelConfig,
        engine_cfg: engine_programs.EngineConfig,
        *,
        drafting_cfg: drafting.DraftingConfig | None = None,
        decode_text: Callable[[Sequence[int]], str] | None = None,
        mesh: jax.sharding.Mesh | None = None,
        rules: sharding.ShardingRules | None = None,
    ):
        """Make an engine without weights; `set_params` gives it some.

        Args:
          cfg: the target.
          engine_cfg: sizes and law.
          drafting_cfg: how to speculate, once `set_drafter` gave weights; None: never.
          decode_text: token ids to text; needed for stop strings.
          mesh: devices of this engine; None: the first device.
          rules: how the cache is split over the mesh.

        Raises:
          ValueError: stop strings without `decode_text`, or `drafting_cfg` does not fit
            the target, the sizes or the law.
        """
        if engine_cfg.stop and decode_text is None:
            raise ValueError(
                f"stop={engine_cfg.stop} needs decode_text, the tokenizer's decode."
            )
        self.cfg = cfg
        self.engine_cfg = engine_cfg
        self.pool = programs.ProgramPool()
        self.version = -1
        self._decode_text = decode_text
        self.mesh = mesh or sharding.make_mesh(1, 1, 1, jax.devices()[:1])
        self._drafting = None
        if drafting_cfg is not None:
            drafting_cfg.check(cfg, engine_cfg.max_length, engine_cfg.sampling_cfg)
            self._drafting = drafting.Drafting(drafting_cfg, engine_cfg.page_size)
        self.programs = engine_programs.EnginePrograms(
            cfg,
            engine_cfg,
            drafting_cfg,
            self.mesh,
            rules or sharding.ShardingRules(),
        )
        self._caches = None
        self._params = None

    @property
    def params(self) -> model_params.Params | None:
        """The weights in use."""
        return self._params

    def release_cache(self) -> None:
        """Free the cache's memory until the next run."""
        self._caches = None

    def set_params(self, params: model_params.Params, version: int) -> None:
        """Use these weights from the next run on.

        Args:
          params: on the engine's mesh; a tuple of layers decodes fastest on CPUs.
          version: counts the policy's updates.
        """
        self._params = params
        self.version = version
        if self._drafting is not None:
            self._drafting.set_target(params)

    def set_drafter(self, params: drafter.DrafterParams, version: int) -> None:
        """Speculate with these weights from the next run on.

        Args:
          params: of any devices; every one of the engine's gets them all.
          version: counts the drafter's updates.

        Raises:
          ValueError: the engine was made without `drafting_cfg`.
        """
        if self._drafting is None:
            raise ValueError("the engine was made without drafting_cfg: give one.")
        params = jax.device_put(params, sharding.replicated(self.mesh))
        self._drafting.set_params(params, self._params, version)

    @property
    def drafter_version(self) -> int:
        """Version of the drafter in use; -1: none."""
        return -1 if self._drafting is None else self._drafting.version

    def warm_up(self, wait: bool = True) -> None:
        """Compile every program that any run may need, those needed first, first.

        Args:
          wait: return when all are ready; else they are compiled in the background.
        """
        self._require_params()
        made, max_rows = self.programs, self.engine_cfg.max_rows
        self.pool.prepare(*made.empty_caches())
        for rows in scheduler.buckets(_PREFILL_ROWS):
            self.pool.prepare(*made.prefill(self._params, rows))
        self.pool.prepare(*made.copy())
        weights = self._drafting.weights if self._drafting else None
        chosen = {}
        for num_rows in range(max_rows, 0, -1):
            bucket = scheduler.bucket_of(num_rows, max_rows)
            chosen[bucket, self._choose(num_rows)] = None
        for bucket, strategy in chosen:
            if strategy is None:
                self.pool.prepare(*made.plain_decode(self._params, bucket))
            else:
                program = made.speculative_decode(
                    self._params, weights, bucket, strategy
                )
                self.pool.prepare(*program)
        if any(strategy and strategy.drafts for _, strategy in chosen):
            for rows in scheduler.buckets(_PREFILL_ROWS):
                self.pool.prepare(*made.fill(weights, rows))
        if wait:
            self.pool.wait()

    def _choose(self, num_rows: int) -> strategy_lib.Strategy | None:
        return self._drafting.choose(num_rows) if self._drafting else None

    def run(
        self,
        requests: Sequence[types.Request],
        seed: int,
        *,
        expected_lengths: Mapping[int, float] | None = None,
        on_completion: Callable[[types.Completion], None] | None = None,
        on_call: Callable[[int, int], None] | None = None,
    ) -> tuple[list[types.Completion], RolloutStats]:
        """Generate a completion for every request.

        Args:
          requests: ids distinct; prompts of equal `prompt_id` equal.
          seed: of the noise.
          expected_lengths: tokens by `prompt_id`; the longest are started first.
          on_completion: called with each completion as soon as it is there.
          on_call: called after each decode call with completions done, and tokens.

        Returns:
          Completions in the order of the requests, and what was done.

        Raises:
          ValueError: a request is empty, does not fit, its id is not unique, or its
            prompt is not that of its `prompt_id` or not of the vocabulary.
        """
        self._require_params()
        asked.check(requests, self.cfg.vocab_size, self.engine_cfg.max_length)
        engine_cfg = self.engine_cfg
        stats = RolloutStats()
        if self._drafting is not None:
            stats.rule = self._drafting.cfg.rule
        waited_before = self.pool.stats.waited_s
        plan = scheduler.Scheduler(
            requests,
            num_pages=engine_cfg.total_pages,
            page_size=engine_cfg.page_size,
            max_rows=engine_cfg.max_rows,
            expected_lengths=expected_lengths,
        )
        keys = dict(
            zip(
                (r.request_id for r in requests),
                noise.request_keys(seed, [r.request_id for r in requests]),
                strict=True,
            )
        )
        done: dict[int, types.Completion] = {}
        if self._caches is None:
            self._caches = self.pool.get(*self.programs.empty_caches())()
        if self._drafting is not None:
            self._drafting.begin()
        while plan.waiting or plan.rows:
            self._admit(plan, stats)
            for completion in self._decode_call(plan, keys, stats):
                done[completion.request_id] = completion
                stats.num_tokens += len(completion.tokens)
                if on_completion:
                    on_completion(completion)
            if on_call:
                alive = sum(len(row.tokens) for row in plan.rows)
                on_call(len(done), stats.num_tokens + alive)
        stats.num_preempted = plan.num_preempted
        stats.compile_s = self.pool.stats.waited_s - waited_before
        return [done[request.request_id] for request in requests], stats

    def _admit(self, plan: scheduler.Scheduler, stats: RolloutStats) -> None:
        """Admit waiting rows; cache their prompts."""
        admission = plan.admit(self.engine_cfg.steps_per_call)
        if not admission.any():
            return
        started, waited = time.perf_counter(), self.pool.stats.waited_s
        for jobs in (admission.prompts, admission.returns):
            for first in range(0, len(jobs), _PREFILL_ROWS):
                self._prefill(jobs[first : first + _PREFILL_ROWS], stats)
            if self._drafting is not None:
                self._drafting.written(jobs)
        width = self.engine_cfg.max_rows
        pairs = np.zeros((width, 2), np.int32)
        pairs[: len(admission.copies)] = np.reshape(admission.copies, (-1, 2))
        copy = self.pool.get(*self.programs.copy())
        target = copy(self._caches.target, pairs[:, 0], pairs[:, 1])
        self._caches = self._caches.replace(target=target)
        # Else the next decode call would count what is still being computed.
        jax.block_until_ready(target)
        waited = self.pool.stats.waited_s - waited
        stats.prefill_s += time.perf_counter() - started - waited

    def _prefill(self, jobs: list[scheduler.Prefill], stats: RolloutStats) -> None:
        chunk = self.engine_cfg.chunk
        batch = scheduler.bucket_of(len(jobs), _PREFILL_ROWS)
        program = self.pool.get(*self.programs.prefill(self._params, batch))
        table = np.zeros((batch, self.engine_cfg.max_pages), np.int32)
        for i, job in enumerate(jobs):
            table[i, : len(job.pages)] = job.pages
        for offset in range(0, max(len(j.text) - j.start for j in jobs), chunk):
            tokens = np.zeros((batch, chunk), np.int32)
            counts = np.zeros((batch,), np.int32)
            lengths = np.zeros((batch,), np.int32)
            for i, job in enumerate(jobs):
                part = job.text[job.start + offset :][:chunk]
                tokens[i, : len(part)] = part
                counts[i] = len(part)
                # A row that is through reads nothing and writes to the scratch page.
                lengths[i] = job.start + offset if len(part) else 0
            target = program(
                self._params, self._caches.target, tokens, counts, table, lengths
            )
            self._caches = self._caches.replace(target=target)
            stats.num_prefill_tokens += int(counts.sum())

    def _fill(self, jobs: Sequence[drafting.Fill], stats: RolloutStats) -> None:
        """Take independent stretches of text into the drafter's cache."""
        chunk, made = self.engine_cfg.chunk, self.programs
        batch = scheduler.bucket_of(len(jobs), _PREFILL_ROWS)
        program = self.pool.get(*made.fill(self._drafting.weights, batch))
        table = np.zeros((batch, self.engine_cfg.max_pages), np.int32)
        for i, job in enumerate(jobs):
            table[i, : len(job.pages)] = job.pages
        for offset in range(0, max(j.stop - j.start for j in jobs), chunk):
            tokens = np.zeros((batch, chunk), np.int32)
            counts = np.zeros((batch,), np.int32)
            starts = np.zeros((batch,), np.int32)
            for i, job in enumerate(jobs):
                first = job.start + offset
                count = max(min(chunk, job.stop - first), 0)
                tokens[i, :count] = job.text[first + 1 : first + 1 + count]
                counts[i], starts[i] = count, first if count else 0
            caches = self._caches
            filled = program(
                self._drafting.weights,
                caches.target,
                caches.drafter,
                tokens,
                counts,
                table,
                starts,
            )
            self._caches = caches.replace(drafter=filled)
            stats.num_fill_tokens += int(counts.sum())

    def _bring_up(
        self,
        rows: Sequence[scheduler.Row],
        strategy: strategy_lib.Strategy,
        stats: RolloutStats,
    ) -> None:
        """Bring the drafter to where a speculative call may begin."""
        started, waited = time.perf_counter(), self.pool.stats.waited_s
        rounds = self._drafting.missing(rows, strategy)
        for jobs in rounds:
            for first in range(0, len(jobs), _PREFILL_ROWS):
                self._fill(jobs[first : first + _PREFILL_ROWS], stats)
        if rounds:
            jax.block_until_ready(self._caches.drafter)
            waited = self.pool.stats.waited_s - waited
            stats.fill_s += time.perf_counter() - started - waited

    def _decode_call(
        self, plan: scheduler.Scheduler, keys: Mapping[int, np.ndarray], stats
    ) -> list[types.Completion]:
        """Decode once for all rows; return the completions that ended."""
        cfg = self.engine_cfg
        rows = list(plan.rows)
        batch = scheduler.bucket_of(len(rows), cfg.max_rows)
        strategy = self._choose(len(rows))
        if strategy is not None and strategy.drafts:
            self._bring_up(rows, strategy, stats)
        inputs = decode.Rows(
            page_table=plan.page_table(rows, batch, cfg.max_pages),
            lengths=_padded([row.length for row in rows], batch),
            pending=_padded([row.pending for row in rows], batch),
            keys=_padded([keys[r.request.request_id] for r in rows], batch, np.uint32),
            remaining=_padded([row.remaining for row in rows], batch),
        )
        quota = scheduler.finish_quota(len(rows), len(plan.waiting), cfg.max_rows)
        limits = np.int32(cfg.steps_per_call), np.int32(quota)
        if strategy is None:
            emitted, elapsed = self._plain(inputs, batch, limits)
        else:
            emitted, elapsed = self._speculate(
                rows, inputs, batch, limits, strategy, stats
            )
        stats.decode_s += elapsed
        stats.call_s.append(elapsed)
        stats.active_rows.append(len(rows))
        stats.strategies["none" if strategy is None else str(strategy)] += 1
        stats.num_calls += 1
        stats.num_steps += int(emitted.num_steps)
        stats.num_row_steps += int(emitted.num_steps) * batch

        completions = []
        for i, row in enumerate(rows):
            count = int(emitted.counts[i])
            row.tokens.extend(emitted.tokens[i, :count].tolist())
            row.logprobs.extend(emitted.logprobs[i, :count].tolist())
            row.length += count
            reason = self._finish_reason(row, count, bool(emitted.ended[i]))
            if reason:
                plan.finish(row)
                if self._drafting is not None:
                    tokens = np.asarray(row.tokens, np.int32)
                    self._drafting.finished(row.request, tokens)
                completions.append(
                    types.Completion(
                        row.request.request_id,
                        np.asarray(row.tokens, np.int32),
                        np.asarray(row.logprobs, np.float32),
                        reason,
                    )
                )
        return completions

    def _plain(self, inputs, batch, limits) -> tuple[decode.Emitted, float]:
        program = self.pool.get(*self.programs.plain_decode(self._params, batch))
        started = time.perf_counter()
        target, emitted = program(self._params, self._caches.target, inputs, *limits)
        self._caches = self._caches.replace(target=target)
        emitted = jax.device_get(emitted)
        return emitted, time.perf_counter() - started

    def _speculate(
        self, rows, inputs, batch, limits, strategy, stats
    ) -> tuple[decode.Emitted, float]:
        state, max_length = self._drafting, self.engine_cfg.max_length
        program = self.pool.get(
            *self.programs.speculative_decode(
                self._params, state.weights, batch, strategy
            )
        )
        draft = state.draft(rows, batch, strategy)
        matching = state.matching(rows, batch, strategy, max_length)
        started = time.perf_counter()
        self._caches, result = program(
            self._params, self._caches, inputs, draft, matching, *limits
        )
        result = jax.device_get(result)
        elapsed = time.perf_counter() - started
        state.took(rows, result)
        stats.add_accepted(result.num_accepted)
        return result.emitted, elapsed

    def _finish_reason(
        self, row: scheduler.Row, num_new: int, ended: bool
    ) -> types.FinishReason | None:
        """Say why a row is finished, if it is; cut it behind a stop string."""
        length = self._stop_length(row.tokens, num_new)
        if length is not None and not (ended and length == len(row.tokens)):
            del row.tokens[length:], row.logprobs[length:]
            return "stop"
        if ended:
            return "eos"
        return None if row.remaining else "length"

    def _stop_length(self, tokens: list[int], num_new: int) -> int | None:
        """Return after how many tokens a stop string first stands in the text."""
        stop = self.engine_cfg.stop
        if not stop or not any(s in self._decode_text(tokens) for s in stop):
            return None
        for length in range(len(tokens) - num_new + 1, len(tokens) + 1):
            if any(s in self._decode_text(tokens[:length]) for s in stop):
                return length
        return len(tokens)

    def _require_params(self) -> None:
        if self._params is None:
            raise ValueError("the engine has no weights: call set_params first.")


def _padded(values: list, batch: int, dtype=np.int32) -> np.ndarray:
    """Stack one value per row and fill up with zeros, `[batch, ...]`."""
    array = np.asarray(values, dtype)
    padding = [(0, batch - len(values))] + [(0, 0)] * (array.ndim - 1)
    return np.pad(array, padding)
