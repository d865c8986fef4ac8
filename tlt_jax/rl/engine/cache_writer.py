"""What is written into an engine's caches outside decode calls.

Prompts of admitted rows go into the target's pages, chunk by chunk and several rows at
once; what the drafter lacks goes into its own, from the features that the target's
pages keep.
"""

import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from tlt_jax.models import params as model_params
from tlt_jax.rl.engine import programs as engine_programs
from tlt_jax.rl.engine import scheduler
from tlt_jax.rl.engine import stats as rollout_stats
from tlt_jax.runtime import programs
from tlt_jax.specdec import protocols
from tlt_jax.specdec.proposers import learned
from tlt_jax.specdec.tuners import tuner

# Rows of one call, at most; the call's buckets are the powers of two up to it.
_MOST_ROWS = 4
BUCKETS = tuple(scheduler.buckets(_MOST_ROWS))


class CacheWriter:
    """Prefills and fills; caches come in and go out."""

    def __init__(
        self,
        pool: programs.ProgramPool,
        made: engine_programs.EnginePrograms,
        engine_cfg: engine_programs.EngineConfig,
    ):
        """Take the engine's parts."""
        self._pool, self._programs, self._cfg = pool, made, engine_cfg

    def admit(
        self,
        caches: protocols.Caches,
        params: model_params.Params,
        admission: scheduler.Admission,
        stats: rollout_stats.RolloutStats,
    ) -> protocols.Caches:
        """Do what an admission asks for: prompts, returning rows, then copies of pages.

        `caches` are donated; seconds and positions are added to `stats`.
        """
        if not admission.any():
            return caches
        started, waited = time.perf_counter(), self._pool.stats.waited_s
        for jobs in (admission.prompts, admission.returns):
            caches = self._prefill(caches, params, jobs, stats)
        width = self._cfg.max_rows
        pairs = np.zeros((width, 2), np.int32)
        pairs[: len(admission.copies)] = np.reshape(admission.copies, (-1, 2))
        copy = self._pool.get(self._programs.copy())
        target = copy(caches.target, pairs[:, 0], pairs[:, 1])
        # Else the next decode call would count what is still being computed.
        jax.block_until_ready(target)
        waited = self._pool.stats.waited_s - waited
        stats.prefill_s += time.perf_counter() - started - waited
        return caches.replace(target=target)

    def fill(
        self,
        caches: protocols.Caches,
        params: model_params.Params,
        weights: learned.DrafterWeights,
        rounds: Sequence[Sequence[scheduler.Part]],
        stats: rollout_stats.RolloutStats,
    ) -> protocols.Caches:
        """Bring the drafter to where a speculative call may begin.

        `rounds` of independent jobs come one after the other. `caches` are donated;
        seconds and positions are added to `stats`.
        """
        if not rounds:
            return caches
        started, waited = time.perf_counter(), self._pool.stats.waited_s
        for jobs in rounds:
            caches = self._fill(caches, params, weights, jobs, stats)
        jax.block_until_ready(caches.drafter)
        waited = self._pool.stats.waited_s - waited
        stats.fill_s += time.perf_counter() - started - waited
        return caches

    def _prefill(self, caches, params, jobs, stats) -> protocols.Caches:
        for batch, chunks in self._chunks(jobs, 0):
            program = self._pool.get(self._programs.prefill(params, batch))
            caches = caches.replace(target=program(params, caches.target, *chunks))
            stats.num_prefill_tokens += int(chunks[1].sum())
        return caches

    def _fill(self, caches, params, weights, jobs, stats) -> protocols.Caches:
        for batch, chunks in self._chunks(jobs, 1):
            program = self._pool.get(self._programs.fill(params, batch))
            filled = program(weights, caches.target, caches.drafter, *chunks)
            caches = caches.replace(drafter=filled)
            stats.num_fill_tokens += int(chunks[1].sum())
        return caches

    def _chunks(self, jobs, ahead: int) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
        """Yield each call's batch bucket, and its tokens, counts, pages and starts.

        A position's token is that which stands `ahead` of it in the text.
        """
        chunk = self._cfg.chunk
        for call in _calls([job.stop - job.start for job in jobs], chunk):
            batch = tuner.bucket_of(len(call), _MOST_ROWS)
            tokens = np.zeros((batch, chunk), np.int32)
            counts = np.zeros((batch,), np.int32)
            table = np.zeros((batch, self._cfg.max_pages), np.int32)
            starts = np.zeros((batch,), np.int32)
            for row, (i, offset) in enumerate(call):
                job, first = jobs[i], jobs[i].start + offset
                count = min(chunk, job.stop - first)
                tokens[row, :count] = job.text[first + ahead :][:count]
                table[row, : len(job.pages)] = job.pages
                counts[row], starts[row] = count, first
            yield batch, (tokens, counts, table, starts)


def _calls(lengths: Sequence[int], chunk: int) -> Iterator[list[tuple[int, int]]]:
    """Yield each call's (job, offset of its part): what is left most goes first.

    Every call computes whole chunks, so a job that is through takes no part any more.
    """
    done = [0] * len(lengths)
    while left := [i for i, length in enumerate(lengths) if done[i] < length]:
        left.sort(key=lambda i: done[i] - lengths[i])
        call = [(i, done[i]) for i in left[:_MOST_ROWS]]
        yield call
        for i, offset in call:
            done[i] = offset + chunk
