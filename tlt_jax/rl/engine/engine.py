"""The rollout engine: continuous batching over compiled decode programs.

Rows are admitted into free slots, decoded many steps a call, retired when they end, and
packed into the next smaller batch bucket as the batch drains. Each decode call may
speculate or not. Tokens do not depend on any of this: noise is keyed by request and
position. (By a chain rule, `SpeculatorConfig.rule`, they do, and their law does not.)
"""

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tlt_jax import types
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.rl.engine import (
    cache_writer,
    capture,
    decode_calls,
    request_queue,
    scheduler,
    speculator,
)
from tlt_jax.rl.engine import programs as engine_programs
from tlt_jax.rl.engine import requests as requests_lib
from tlt_jax.rl.engine import stats as rollout_stats
from tlt_jax.runtime import programs, sharding
from tlt_jax.specdec import calibration as calibration_lib
from tlt_jax.specdec import speculate
from tlt_jax.specdec.texts import layout
from tlt_jax.specdec.tuners import tuner as tuner_lib


class Engine:
    """Generates completions with one copy of the target on one mesh.

    Attributes:
      params: the weights in use; None: none yet.
    """

    def __init__(
        self,
        cfg: model_config.ModelConfig,
        engine_cfg: engine_programs.EngineConfig,
        *,
        speculator_cfg: speculator.SpeculatorConfig | None = None,
        tuner: tuner_lib.Tuner | None = None,
        early_tuner: tuner_lib.Tuner | None = None,
        calibration: calibration_lib.Calibration | None = None,
        decode_text: Callable[[Sequence[int]], str] | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """Make an engine without weights; `set_params` gives it some.

        It speculates once `set_drafter` gave weights, by strategies that the tuners
        choose and scores that the calibration, its own, lets follow what comes of them,
        see `speculator.Speculator`; without `speculator_cfg` never. Stop
        strings need `decode_text`, and without a mesh the engine has the first device.

        Raises:
          ValueError: stop strings without `decode_text`, or `speculator_cfg` does not
            fit the target, the sizes or the law.
        """
        if engine_cfg.stop and decode_text is None:
            raise ValueError(
                f"stop={engine_cfg.stop} needs decode_text, the tokenizer's decode."
            )
        self.cfg = cfg
        self.engine_cfg = engine_cfg
        self.version = -1
        self._decode_text = decode_text
        self.mesh = mesh or sharding.make_mesh(1, 1, 1, jax.devices()[:1])
        self._speculates = speculator_cfg is not None
        if speculator_cfg is not None:
            speculator_cfg.check(cfg, engine_cfg.max_length, engine_cfg.sampling_cfg)
        self._speculator = speculator.Speculator(
            speculator_cfg or speculator.NEVER,
            page_size=engine_cfg.page_size,
            max_length=engine_cfg.max_length,
            tuner=tuner,
            early_tuner=early_tuner,
            calibration=calibration,
        )
        self.programs = engine_programs.EnginePrograms(
            cfg, engine_cfg, speculator_cfg, self.mesh
        )
        # Those of engines on other devices are the same but for these.
        kind = cfg, engine_cfg, speculator_cfg, self.mesh.devices.shape
        self.pool = programs.ProgramPool(kind)
        self._writer = cache_writer.CacheWriter(self.pool, self.programs, engine_cfg)
        self._caches = None
        self.params: model_params.Params | None = None

    def release_cache(self) -> None:
        """Free the cache's memory until the next run."""
        self._caches = None

    def set_params(self, params: model_params.Params, version: int) -> None:
        """Use these weights, on the engine's mesh, from the next run on.

        A tuple of layers decodes fastest on CPUs. `version` counts updates.
        """
        self.params = params
        self.version = version
        self._speculator.set_target(params)

    def set_drafter(self, params: drafter.DrafterParams, version: int) -> None:
        """Speculate with these weights, of any devices, from the next run on.

        `version` counts the drafter's updates.

        Raises:
          ValueError: the engine was made without `speculator_cfg`.
        """
        self.offer_drafter(params, version)
        self._speculator.take_up((), self.params)

    def offer_drafter(self, params: drafter.DrafterParams, version: int) -> None:
        """Speculate with these weights from the next decode call on.

        Safe to call from another thread while `serve` runs; nothing is compiled anew.
        See `set_drafter`.
        """
        if not self._speculates:
            raise ValueError("the engine was made without speculator_cfg: give one.")
        placed = jax.device_put(params, sharding.replicated(self.mesh))
        self._speculator.offer(placed, version)

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Decode meanwhile without learning from it; see `Speculator.aside`."""
        return self._speculator.aside()

    @property
    def drafter_version(self) -> int:
        """Version of the drafter in use; -1: none."""
        return self._speculator.version

    def warm_up(self, wait: bool = True) -> None:
        """Compile every program that any run may need, those needed first, first.

        They are compiled in the background; `wait`: return when all are ready.
        """
        self._require_params()
        made, params, max_rows = self.programs, self.params, self.engine_cfg.max_rows
        chosen = dict.fromkeys(
            (tuner_lib.bucket_of(num_rows, max_rows), strategy)
            for num_rows in range(max_rows, 0, -1)
            for strategy in self._speculator.choices(num_rows)
        )
        wanted = [made.empty_caches()]
        wanted += [made.prefill(params, rows) for rows in cache_writer.BUCKETS]
        wanted.append(made.copy())
        wanted += [made.decoding(params, *one) for one in chosen]
        if any(strategy and strategy.drafts for _, strategy in chosen):
            wanted += [made.fill(params, rows) for rows in cache_writer.BUCKETS]
        if made.captures:
            wanted.append(made.read_features())
        if self.engine_cfg.keep_routes:
            wanted.append(made.read_routes())
        for program in wanted:
            self.pool.prepare(program)
        if wait:
            self.pool.wait()

    def run(
        self, requests: Sequence[types.Request], seed: int, **options: Any
    ) -> tuple[list[types.Completion], rollout_stats.RolloutStats]:
        """Generate a completion for every request; see `answer` for the arguments."""
        return answer([self], requests, seed, **options)

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
        on_tokens: Callable[[int, list[int]], None] | None = None,
        on_text: Callable[[layout.Record], None] | None = None,
        capture_frac: float = 1.0,
    ) -> rollout_stats.RolloutStats:
        """Generate completions for requests from a queue until it gives no more.

        They have passed `check`. `on_call` is called after each decode call with the
        tokens drawn so far, `on_tokens` before a row's completion with the request's id
        and what the call drew for it and is kept: put together they are the completion.
        Raising an error is how either ends the run; the engine may serve again.
        `on_text` gets the part `capture_frac` of the finished texts, chosen by request
        id, with the target's features, which its pages keep: no forward is spent on
        them. It needs `SpeculatorConfig.capture`.
        """
        self._require_params()
        engine_cfg = self.engine_cfg
        rule = self._speculator.rule if self._speculates else ""
        stats = rollout_stats.RolloutStats(rule=rule)
        waited_before = self.pool.stats.waited_s
        plan = scheduler.Scheduler(
            source,
            num_pages=engine_cfg.total_pages,
            page_size=engine_cfg.page_size,
            max_rows=engine_cfg.max_rows,
        )
        keys = decode_calls.Keys(seed)
        calls = decode_calls.DecodeCalls(
            self.pool, self.programs, engine_cfg, self._speculator, keys
        )
        if self._caches is None:
            self._caches = self.pool.get(self.programs.empty_caches())()
        self._speculator.begin()
        with capture.Delivery(on_text) as delivery:
            while True:
                if not calls.has_ahead:
                    self._admit(plan, stats)
                if not plan.rows:
                    break
                self._speculator.take_up(plan.rows, self.params)
                before = [(r, len(r.tokens)) for r in plan.rows] if on_tokens else ()
                finished = self._decode_call(plan, calls, stats)
                for row, count in before:
                    on_tokens(row.request.request_id, row.tokens[count:])
                for row, reason in finished:
                    completion = self._completion(row, reason)
                    text = None
                    if on_text and capture.is_chosen(
                        completion.request_id, capture_frac
                    ):
                        text = self._captured(row, keys, stats)
                    if not plan.finish(row):
                        # Given up for lost, this worker's requests are others' by now.
                        continue
                    if self._speculates:
                        self._speculator.finished(row.request, completion.tokens)
                    stats.num_tokens += len(completion.tokens)
                    on_completion(completion)
                    if text is not None:
                        stats.capture_s += delivery.add(*text)
                if on_call:
                    alive = sum(len(row.tokens) for row in plan.rows)
                    on_call(stats.num_tokens + alive)
        if self._speculator.score is not None:
            tau, sharpness = self._speculator.score
            stats.taus.append(tau)
            stats.sharpnesses.append(sharpness)
        stats.num_preempted = plan.num_preempted
        stats.compile_s = self.pool.stats.waited_s - waited_before
        return stats

    def _completion(
        self, row: scheduler.Row, reason: types.FinishReason
    ) -> types.Completion:
        """Make a finished row's completion; it still holds its pages."""
        routes = None
        if self.engine_cfg.keep_routes:
            # Which experts its text passed.
            pages = self._read_pages(row, self.programs.read_routes())
            routes = capture.routes(row, jax.device_get(pages), self.cfg)
        return types.Completion(
            row.request.request_id,
            np.asarray(row.tokens, np.int32),
            np.asarray(row.logprobs, np.float32),
            reason,
            np.asarray(row.was_drafted, bool),
            routes,
        )

    def _captured(
        self,
        row: scheduler.Row,
        keys: decode_calls.Keys,
        stats: rollout_stats.RolloutStats,
    ) -> tuple[capture.Finished, list[jax.Array]]:
        """Begin to read what the row's pages keep of its text."""
        started = time.perf_counter()
        text = capture.Finished.of(
            row,
            num_fused=len(self.programs.settings.feature_layers) * self.cfg.d_model,
            key=keys.of([row])[0],
            version=self.version,
        )
        pages = self._read_pages(row, self.programs.read_features())
        stats.capture_s += time.perf_counter() - started
        return text, pages

    def _read_pages(
        self, row: scheduler.Row, program: programs.Program
    ) -> list[jax.Array]:
        """Enqueue the reading of those of a row's pages that hold its text."""
        known = capture.known_pages(row, self.engine_cfg.page_size)
        read, found = self.pool.get(program), []
        num = engine_programs.READ_PAGES
        for start in range(0, len(known), num):
            some = known[start : start + num]
            found += read(self._caches.target, decode_calls.padded(some, num))[
                : len(some)
            ]
        return found

    def _admit(
        self, plan: scheduler.Scheduler, stats: rollout_stats.RolloutStats
    ) -> None:
        """Give rows their pages, and waiting ones a slot, and write what they need."""
        admission = plan.admit(self.engine_cfg.steps_per_call)
        self._caches = self._writer.admit(self._caches, self.params, admission, stats)
        self._speculator.written((*admission.prompts, *admission.returns))

    def _decode_call(
        self,
        plan: scheduler.Scheduler,
        calls: decode_calls.DecodeCalls,
        stats: rollout_stats.RolloutStats,
    ) -> list[tuple[scheduler.Row, types.FinishReason]]:
        """Decode once for all rows; return those that finished, and why."""
        call = calls.take_ahead(stats)
        if call is None:
            strategy = self._speculator.choose(len(plan.rows))
            lacking = self._speculator.missing(plan.rows, strategy)
            self._caches = self._writer.fill(
                self._caches, self.params, self._speculator.weights, lacking, stats
            )
            self._caches, call = calls.enqueue(
                self._caches, self.params, plan, strategy
            )
        self._caches = calls.enqueue_ahead(self._caches, self.params, plan, call)
        finished = self._kept(call.rows, calls.read(call, stats))
        calls.throw_away(finished, stats)
        return finished

    def _kept(
        self, rows: Sequence[scheduler.Row], result: speculate.Speculated
    ) -> list[tuple[scheduler.Row, types.FinishReason]]:
        """Give every row what it drew; return those that finished, and why."""
        emitted, finished = result.emitted, []
        for i, row in enumerate(rows):
            count = int(emitted.counts[i])
            row.tokens.extend(emitted.tokens[i, :count].tolist())
            row.logprobs.extend(emitted.logprobs[i, :count].tolist())
            row.was_drafted.extend(result.was_drafted[i, :count].tolist())
            row.length += count
            reason = requests_lib.finish(
                row,
                count,
                bool(emitted.ended[i]),
                stop=self.engine_cfg.stop,
                decode_text=self._decode_text,
            )
            if reason:
                finished.append((row, reason))
        return finished

    def _require_params(self) -> None:
        if self.params is None:
            raise ValueError("the engine has no weights: call set_params first.")


def answer(
    engines: Sequence[Engine],
    requests: Sequence[types.Request],
    seed: int,
    *,
    expected_lengths: Mapping[int, float] | None = None,
    on_completion: Callable[[types.Completion], None] | None = None,
    on_call: Callable[[int, int], None] | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
) -> tuple[list[types.Completion], rollout_stats.RolloutStats]:
    """Generate a completion for every request.

    Which engine does changes no token, if drafts are accepted by the keyed rule. For
    engines of this process that are not expected to fail: `workers.Workers` does it for
    those that are, and for several processes.

    Args:
      engines: of equal sizes and weights; at least one. They run side by side.
      requests: ids distinct; prompts of equal `prompt_id` equal.
      seed: of the noise.
      expected_lengths: tokens by `prompt_id`; the longest are started first.
      on_completion: called with each completion as soon as it is there, by one thread
        at a time.
      on_call: called after each decode call with completions done, and tokens.
      on_tokens: called after each decode call, before `on_completion`, with a request's
        id and its new tokens, for every request at work; by several threads where
        there are several engines.

    Returns:
      Completions in the order of the requests, and what was done; seconds are summed
      over engines.

    Raises:
      ValueError: see `requests.check` and `scheduler.check_fits`.
    """
    engines[0].check(requests)
    queue = request_queue.RequestQueue(
        requests, num_workers=len(engines), expected_lengths=expected_lengths
    )
    lock, tokens = threading.Lock(), [0] * len(engines)
    done: dict[int, types.Completion] = {}

    def serve(number):
        def keep(completion):
            with lock:
                done[completion.request_id] = completion
                if on_completion:
                    on_completion(completion)

        def report(num_tokens):
            with lock:
                tokens[number] = num_tokens
                if on_call:
                    on_call(len(done), sum(tokens))

        source = queue.share(number)
        return engines[number].serve(
            source, seed, on_completion=keep, on_call=report, on_tokens=on_tokens
        )

    if len(engines) == 1:
        stats = serve(0)
    else:
        stats = rollout_stats.RolloutStats()
        with concurrent.futures.ThreadPoolExecutor(len(engines), "answer") as pool:
            for own in pool.map(serve, range(len(engines))):
                stats = stats.join(own)
    return [done[request.request_id] for request in requests], stats
