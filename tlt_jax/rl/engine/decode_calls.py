"""Decode calls of an engine's run, the next one enqueued before the last is read.

While the host reads a call and hands its tokens on, the device decodes. What the next
call begins with the last one leaves on the device; where a row finished, the host has
rows to retire and admit first, and what was enqueued takes no step and is thrown away.
So tokens, steps and their order are those of one call after the other.
"""

import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np

from tlt_jax import types
from tlt_jax.models import params as model_params
from tlt_jax.rl.engine import programs as engine_programs
from tlt_jax.rl.engine import scheduler, speculator
from tlt_jax.rl.engine import stats as rollout_stats
from tlt_jax.runtime import programs
from tlt_jax.specdec import decode, noise, protocols, speculate
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.tuners import tuner as tuner_lib


@dataclasses.dataclass(frozen=True)
class Underway:
    """A decode call that is enqueued and not yet read.

    Attributes:
      rows: that it decodes; they are as they were before it.
      bucket: rows of its program.
      strategy: None: plain decoding.
      keys: `[B, 2] uint32`, of the rows.
      result: what it does, still of the device.
      following: see `decode.Emitted`.
      enqueued_s: when that was, by `time.perf_counter`.
    """

    rows: list[scheduler.Row]
    bucket: int
    strategy: strategy_lib.Strategy | None
    keys: np.ndarray
    result: speculate.Speculated | decode.Emitted
    following: decode.Following | None
    enqueued_s: float


class DecodeCalls:
    """Enqueues and reads the decode calls of one run; caches come in and go out."""

    def __init__(
        self,
        pool: programs.ProgramPool,
        made: engine_programs.EnginePrograms,
        engine_cfg: engine_programs.EngineConfig,
        speculates: speculator.Speculator,
        keys: "Keys",
    ):
        """Take the engine's parts, and the noise keys of the run's requests."""
        self._pool, self._programs, self._cfg = pool, made, engine_cfg
        self._speculator, self._keys = speculates, keys
        self._ahead: Underway | None = None
        self._last_read_s = 0.0

    @property
    def has_ahead(self) -> bool:
        """Whether the next call is enqueued: until it is read, rows stay."""
        return self._ahead is not None

    def take_ahead(self, stats: rollout_stats.RolloutStats) -> Underway | None:
        """Return the call that was enqueued ahead, if any: the next to be read."""
        call, self._ahead = self._ahead, None
        if call is not None:
            # It could be no other; the tuner is asked at its turn all the same.
            self._speculator.choose(len(call.rows))
            stats.num_ahead += 1
        return call

    def enqueue(
        self,
        caches: protocols.Caches,
        params: model_params.Params,
        plan: scheduler.Scheduler,
        strategy: strategy_lib.Strategy | None,
    ) -> tuple[protocols.Caches, Underway]:
        """Enqueue a call of the plan's rows. `caches` are donated."""
        rows = list(plan.rows)
        batch = tuner_lib.bucket_of(len(rows), self._cfg.max_rows)
        arrays = decode.Rows(
            page_table=plan.page_table(rows, batch, self._cfg.max_pages),
            lengths=padded([row.length for row in rows], batch),
            pending=padded([row.pending for row in rows], batch),
            keys=padded(self._keys.of(rows), batch, np.uint32),
            remaining=padded([row.remaining for row in rows], batch),
        )
        inputs = self._speculator.inputs(rows, batch, strategy)
        limit = np.int32(self._cfg.steps_per_call)
        return self._enqueue(caches, params, plan, strategy, arrays, inputs, limit)

    def enqueue_ahead(
        self,
        caches: protocols.Caches,
        params: model_params.Params,
        plan: scheduler.Scheduler,
        last: Underway,
    ) -> protocols.Caches:
        """Enqueue the call behind the `last`, if it may be. `caches` are donated then.

        It may where the host has nothing to decide before it: no row is sure to finish,
        no request waits for a slot that is free, decoding is plain whatever becomes of
        the last call, no stop string can end a text, and there are pages for two calls.
        """
        cfg, rows, begin = self._cfg, last.rows, last.following
        steps = cfg.steps_per_call
        if (
            begin is None
            or cfg.stop
            or min(row.remaining for row in rows) <= steps
            or (len(rows) < cfg.max_rows and plan.num_waiting)
            or self._speculator.choices(len(rows)) != (None,)
            or not plan.reserve_ahead(2 * steps)
        ):
            return caches
        arrays = decode.Rows(
            page_table=plan.page_table(rows, last.bucket, cfg.max_pages),
            lengths=begin.lengths,
            pending=begin.pending,
            keys=last.keys,
            remaining=begin.remaining,
        )
        caches, self._ahead = self._enqueue(
            caches, params, plan, None, arrays, (), begin.step_limit
        )
        return caches

    def _enqueue(
        self, caches, params, plan, strategy, arrays, inputs, limit
    ) -> tuple[protocols.Caches, Underway]:
        rows, batch = list(plan.rows), arrays.keys.shape[0]
        quota = scheduler.finish_quota(len(rows), plan.num_waiting, self._cfg.max_rows)
        program = self._pool.get(self._programs.decoding(params, batch, strategy))
        started, following = time.perf_counter(), None
        if strategy is None:
            target, result = program(
                params, caches.target, arrays, limit, np.int32(quota)
            )
            caches = caches.replace(target=target)
            # It is the next call's, not the host's.
            following, result = result.following, result.replace(following=None)
        else:
            caches, result = program(
                params, caches, arrays, inputs, limit, np.int32(quota)
            )
        return caches, Underway(
            rows, batch, strategy, arrays.keys, result, following, started
        )

    def read(
        self, call: Underway, stats: rollout_stats.RolloutStats
    ) -> speculate.Speculated:
        """Wait for a call, count it, and tell the speculator of it."""
        result = jax.device_get(call.result)
        now = time.perf_counter()
        elapsed = now - max(call.enqueued_s, self._last_read_s)
        self._last_read_s = now
        if call.strategy is None:
            result = speculate.plain(result)
        emitted = result.emitted
        told = tuner_lib.Call(
            num_rows=len(call.rows),
            bucket=call.bucket,
            strategy=call.strategy,
            elapsed_s=elapsed,
            num_steps=int(emitted.num_steps),
            num_tokens=int(emitted.counts.sum()),
            num_accepted=tuple(result.num_accepted.tolist()),
            accepted_by_room=tuple(map(tuple, result.accepted_by_room.tolist())),
        )
        stats.add(told, result.reliability)
        self._speculator.took(call.rows, told, result.progress)
        return result

    def throw_away(
        self,
        finished: Sequence[tuple[scheduler.Row, types.FinishReason]],
        stats: rollout_stats.RolloutStats,
    ) -> None:
        """Forget the call that was enqueued ahead, if rows finished in the last one."""
        if finished and self._ahead is not None:
            self._ahead = None
            stats.num_thrown_away += 1


class Keys:
    """Noise keys of requests, made when they are first asked for."""

    def __init__(self, seed: int):
        self._seed = seed
        self._known: dict[int, np.ndarray] = {}

    def of(self, rows: Sequence[scheduler.Row]) -> list[np.ndarray]:
        """Return a key of each row, `[2] uint32`."""
        ids = [row.request.request_id for row in rows]
        missing = [i for i in ids if i not in self._known]
        if missing:
            made = noise.request_keys(self._seed, missing)
            self._known.update(zip(missing, made, strict=True))
        return [self._known[i] for i in ids]


def padded(values: list, batch: int, dtype=np.int32) -> np.ndarray:
    """Stack one value per row and fill up with zeros, `[batch, ...]`."""
    array = np.asarray(values, dtype)
    padding = [(0, batch - len(values))] + [(0, 0)] * (array.ndim - 1)
    return np.pad(array, padding)
