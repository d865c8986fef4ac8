"""The rollout engine: continuous batching over compiled decode programs.

Rows are admitted into free slots, decoded many steps a call, retired when they end, and
packed into the next smaller batch bucket as the batch drains. Each decode call may
speculate or not. Tokens do not depend on any of this: noise is keyed by request and
position. (With a chain rule, `DraftingConfig.rule`, they do, and their law does not.)
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from tlt_jax import types
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.rl.engine import (
    answering,
    cache_writer,
    capture,
    request_queue,
    scheduler,
    speculator,
    stopping,
)
from tlt_jax.rl.engine import programs as engine_programs
from tlt_jax.rl.engine import requests as requests_lib
from tlt_jax.rl.engine import stats as rollout_stats
from tlt_jax.runtime import programs, sharding
from tlt_jax.specdec import decode, noise, speculate
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.texts import layout
from tlt_jax.specdec.tuners import tuner as tuner_lib


class Engine:
    """Generates completions with one copy of the target on one mesh."""

    def __init__(
        self,
        cfg: model_config.ModelConfig,
        engine_cfg: engine_programs.EngineConfig,
        *,
        drafting_cfg: speculator.DraftingConfig | None = None,
        tuner: tuner_lib.Tuner | None = None,
        early_tuner: tuner_lib.Tuner | None = None,
        decode_text: Callable[[Sequence[int]], str] | None = None,
        mesh: jax.sharding.Mesh | None = None,
        rules: sharding.ShardingRules | None = None,
    ):
        """Make an engine without weights; `set_params` gives it some.

        Args:
          cfg: the target.
          engine_cfg: sizes and law.
          drafting_cfg: how to speculate, once `set_drafter` gave weights; None: never.
          tuner, early_tuner: choose strategies, see `speculator.Drafting`.
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
            self._drafting = speculator.Drafting(
                drafting_cfg, engine_cfg.page_size, tuner, early_tuner
            )
        self.programs = engine_programs.EnginePrograms(
            cfg,
            engine_cfg,
            drafting_cfg,
            self.mesh,
            rules or sharding.ShardingRules(),
        )
        self._writer = cache_writer.CacheWriter(self.pool, self.programs, engine_cfg)
        self._caches = None
        self._params = None
        self._offer_lock = threading.Lock()
        self._offered: tuple[drafter.DrafterParams, int] | None = None

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
        self.offer_drafter(params, version)
        self._swap_drafter()

    def offer_drafter(self, params: drafter.DrafterParams, version: int) -> None:
        """Speculate with these weights from the next decode call on.

        Safe to call from another thread while `serve` runs; nothing is compiled anew.
        See `set_drafter`.
        """
        if self._drafting is None:
            raise ValueError("the engine was made without drafting_cfg: give one.")
        placed = jax.device_put(params, sharding.replicated(self.mesh))
        with self._offer_lock:
            self._offered = placed, version

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
        for rows in cache_writer.BUCKETS:
            self.pool.prepare(*made.prefill(self._params, rows))
        self.pool.prepare(*made.copy())
        chosen = {}
        for num_rows in range(max_rows, 0, -1):
            bucket = scheduler.bucket_of(num_rows, max_rows)
            chosen |= dict.fromkeys((bucket, s) for s in self._choices(num_rows))
        for bucket, strategy in chosen:
            if strategy is None:
                self.pool.prepare(*made.plain_decode(self._params, bucket))
            else:
                program = made.speculative_decode(self._params, bucket, strategy)
                self.pool.prepare(*program)
        if any(strategy and strategy.drafts for _, strategy in chosen):
            for rows in cache_writer.BUCKETS:
                self.pool.prepare(*made.fill(self._params, rows))
        if self._drafting is not None and self._drafting.cfg.capture:
            self.pool.prepare(*made.read_features())
        if wait:
            self.pool.wait()

    def _choices(self, num_rows: int) -> tuple[strategy_lib.Strategy | None, ...]:
        """All that may ever be chosen for so many rows."""
        return self._drafting.choices(num_rows) if self._drafting else (None,)

    def run(
        self,
        requests: Sequence[types.Request],
        seed: int,
        *,
        expected_lengths: Mapping[int, float] | None = None,
        on_completion: Callable[[types.Completion], None] | None = None,
        on_call: Callable[[int, int], None] | None = None,
    ) -> tuple[list[types.Completion], rollout_stats.RolloutStats]:
        """Generate a completion for every request; see `answering.answer`."""
        return answering.answer(
            [self],
            requests,
            seed,
            expected_lengths=expected_lengths,
            on_completion=on_completion,
            on_call=on_call,
        )

    def check(self, requests: Sequence[types.Request]) -> None:
        """Refuse requests that this engine cannot serve; see `run`."""
        cfg = self.engine_cfg
        requests_lib.check(requests, self.cfg.vocab_size, cfg.max_length)
        for request in requests:
            scheduler.check_fits(
                request, num_pages=cfg.total_pages, page_size=cfg.page_size
            )

    def serve(
        self,
        source: request_queue.RequestSource,
        seed: int,
        *,
        on_completion: Callable[[types.Completion], None],
        on_call: Callable[[int], None] | None = None,
        on_text: Callable[[layout.Record], None] | None = None,
        capture_frac: float = 1.0,
    ) -> rollout_stats.RolloutStats:
        """Generate completions for requests from a queue until it gives no more.

        Args:
          source: of requests that passed `check`.
          seed: of the noise.
          on_completion: called with each completion as soon as it is there.
          on_call: called after each decode call with the tokens drawn so far.
          on_text: called with a finished text and the target's features of it, which
            its pages keep: no forward is spent on them. Needs `DraftingConfig.capture`.
          capture_frac: part of the texts that `on_text` gets, chosen by request id.

        Returns:
          What was done.
        """
        self._require_params()
        engine_cfg = self.engine_cfg
        stats = rollout_stats.RolloutStats()
        if self._drafting is not None:
            stats.rule = self._drafting.cfg.rule
        waited_before = self.pool.stats.waited_s
        plan = scheduler.Scheduler(
            source,
            num_pages=engine_cfg.total_pages,
            page_size=engine_cfg.page_size,
            max_rows=engine_cfg.max_rows,
        )
        keys = _Keys(seed)
        if self._caches is None:
            self._caches = self.pool.get(*self.programs.empty_caches())()
        if self._drafting is not None:
            self._drafting.begin()
        while True:
            admission = plan.admit(engine_cfg.steps_per_call)
            self._caches = self._writer.admit(
                self._caches, self._params, admission, stats
            )
            if self._drafting is not None:
                self._drafting.written((*admission.prompts, *admission.returns))
            if not plan.rows:
                break
            self._swap_drafter(plan.rows)
            for row, reason in self._decode_call(plan, keys, stats):
                completion = types.Completion(
                    row.request.request_id,
                    np.asarray(row.tokens, np.int32),
                    np.asarray(row.logprobs, np.float32),
                    reason,
                    np.asarray(row.was_drafted, bool),
                )
                text = None
                if on_text and capture.is_chosen(completion.request_id, capture_frac):
                    started = time.perf_counter()
                    text = self._captured(row, keys)
                    stats.capture_s += time.perf_counter() - started
                if not plan.finish(row):
                    # Given up for lost, this worker's requests are others' by now.
                    continue
                if self._drafting is not None:
                    self._drafting.finished(row.request, completion.tokens)
                stats.num_tokens += len(completion.tokens)
                on_completion(completion)
                if text is not None:
                    on_text(text)
            if on_call:
                alive = sum(len(row.tokens) for row in plan.rows)
                on_call(stats.num_tokens + alive)
        stats.num_preempted = plan.num_preempted
        stats.compile_s = self.pool.stats.waited_s - waited_before
        return stats

    def _captured(self, row: scheduler.Row, keys: "_Keys") -> layout.Record:
        """Read what the row's pages keep of its text."""
        drafter_cfg = self._drafting.cfg.drafter_cfg
        ids = np.zeros((self.engine_cfg.max_pages,), np.int32)
        ids[: len(row.pages)] = row.pages
        read = self.pool.get(*self.programs.read_features())
        columns = jax.device_get(read(self._caches.target, ids))
        record = capture.record(
            row,
            columns,
            num_fused=len(drafter_cfg.feature_layers) * self.cfg.d_model,
            key=keys.of([row])[0],
            version=self.version,
        )
        return record

    def _swap_drafter(self, rows: Sequence[scheduler.Row] = ()) -> None:
        """Take up an offered drafter; what `rows` have in its cache is stale."""
        with self._offer_lock:
            offer, self._offered = self._offered, None
        if offer is not None:
            params, version = offer
            self._drafting.set_params(params, self._params, version)
            for row in rows:
                row.drafted = 0

    def _decode_call(
        self, plan: scheduler.Scheduler, keys: "_Keys", stats
    ) -> list[tuple[scheduler.Row, types.FinishReason]]:
        """Decode once for all rows; return those that finished, and why."""
        cfg = self.engine_cfg
        rows = list(plan.rows)
        batch = scheduler.bucket_of(len(rows), cfg.max_rows)
        strategy = self._drafting.choose(len(rows)) if self._drafting else None
        if strategy is not None and strategy.drafts:
            self._caches = self._writer.fill(
                self._caches,
                self._params,
                self._drafting.weights,
                self._drafting.missing(rows, strategy),
                stats,
            )
        inputs = decode.Rows(
            page_table=plan.page_table(rows, batch, cfg.max_pages),
            lengths=_padded([row.length for row in rows], batch),
            pending=_padded([row.pending for row in rows], batch),
            keys=_padded(keys.of(rows), batch, np.uint32),
            remaining=_padded([row.remaining for row in rows], batch),
        )
        quota = scheduler.finish_quota(len(rows), plan.num_waiting, cfg.max_rows)
        limits = np.int32(cfg.steps_per_call), np.int32(quota)
        if strategy is None:
            emitted, elapsed = self._plain(inputs, batch, limits)
            accepted, was_drafted = (), np.zeros(emitted.tokens.shape, bool)
        else:
            result, elapsed = self._speculate(rows, inputs, batch, limits, strategy)
            emitted, was_drafted = result.emitted, result.was_drafted
            accepted = tuple(result.num_accepted.tolist())
        call = tuner_lib.Call(
            num_rows=len(rows),
            bucket=batch,
            strategy=strategy,
            elapsed_s=elapsed,
            num_steps=int(emitted.num_steps),
            num_tokens=int(emitted.counts.sum()),
            num_accepted=accepted,
        )
        stats.add(call)
        if self._drafting is not None:
            self._drafting.record(call)

        finished = []
        for i, row in enumerate(rows):
            count = int(emitted.counts[i])
            row.tokens.extend(emitted.tokens[i, :count].tolist())
            row.logprobs.extend(emitted.logprobs[i, :count].tolist())
            row.was_drafted.extend(was_drafted[i, :count].tolist())
            row.length += count
            reason = stopping.finish(
                row,
                count,
                bool(emitted.ended[i]),
                stop=cfg.stop,
                decode_text=self._decode_text,
            )
            if reason:
                finished.append((row, reason))
        return finished

    def _plain(self, inputs, batch, limits) -> tuple[decode.Emitted, float]:
        program = self.pool.get(*self.programs.plain_decode(self._params, batch))
        started = time.perf_counter()
        target, emitted = program(self._params, self._caches.target, inputs, *limits)
        self._caches = self._caches.replace(target=target)
        emitted = jax.device_get(emitted)
        return emitted, time.perf_counter() - started

    def _speculate(
        self, rows, inputs, batch, limits, strategy
    ) -> tuple[speculate.Speculated, float]:
        state, max_length = self._drafting, self.engine_cfg.max_length
        program = self.pool.get(
            *self.programs.speculative_decode(self._params, batch, strategy)
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
        return result, elapsed

    def _require_params(self) -> None:
        if self._params is None:
            raise ValueError("the engine has no weights: call set_params first.")


class _Keys:
    """Noise keys of requests, made when they are first asked for."""

    def __init__(self, seed: int):
        self._seed = seed
        self._known: dict[int, np.ndarray] = {}

    def of(self, rows: Sequence[scheduler.Row]) -> list[np.ndarray]:
        ids = [row.request.request_id for row in rows]
        missing = [i for i in ids if i not in self._known]
        if missing:
            made = noise.request_keys(self._seed, missing)
            self._known.update(zip(missing, made, strict=True))
        return [self._known[i] for i in ids]


def _padded(values: list, batch: int, dtype=np.int32) -> np.ndarray:
    """Stack one value per row and fill up with zeros, `[batch, ...]`."""
    array = np.asarray(values, dtype)
    padding = [(0, batch - len(values))] + [(0, 0)] * (array.ndim - 1)
    return np.pad(array, padding)
