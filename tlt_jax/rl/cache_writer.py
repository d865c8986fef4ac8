"""What is written into an engine's caches outside decode calls.

Prompts of admitted rows go into the target's pages, chunk by chunk and several rows at
once; what the drafter lacks goes into its own, from the features that the target's
pages keep.
"""

import time
from collections.abc import Sequence

import jax
import numpy as np

from tlt_jax.models import params as model_params
from tlt_jax.rl import drafting, engine_programs, rollout_stats, scheduler
from tlt_jax.specdec import programs, propose, speculate

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
        caches: speculate.Caches,
        params: model_params.Params,
        admission: scheduler.Admission,
        stats: rollout_stats.RolloutStats,
    ) -> speculate.Caches:
        """Do what an admission asks for.

        Args:
          caches: donated.
          params: the target.
          admission: prompts, returning rows and copies of pages, in this order.
          stats: seconds and positions are added.

        Returns:
          The caches, complete.
        """
        if not admission.any():
            return caches
        started, waited = time.perf_counter(), self._pool.stats.waited_s
        for jobs in (admission.prompts, admission.returns):
            for first in range(0, len(jobs), _MOST_ROWS):
                chosen = jobs[first : first + _MOST_ROWS]
                caches = self._prefill(caches, params, chosen, stats)
        width = self._cfg.max_rows
        pairs = np.zeros((width, 2), np.int32)
        pairs[: len(admission.copies)] = np.reshape(admission.copies, (-1, 2))
        copy = self._pool.get(*self._programs.copy())
        target = copy(caches.target, pairs[:, 0], pairs[:, 1])
        # Else the next decode call would count what is still being computed.
        jax.block_until_ready(target)
        waited = self._pool.stats.waited_s - waited
        stats.prefill_s += time.perf_counter() - started - waited
        return caches.replace(target=target)

    def fill(
        self,
        caches: speculate.Caches,
        params: model_params.Params,
        weights: propose.DrafterWeights,
        rounds: Sequence[Sequence[drafting.Fill]],
        stats: rollout_stats.RolloutStats,
    ) -> speculate.Caches:
        """Bring the drafter to where a speculative call may begin.

        Args:
          caches: donated.
          params: the target.
          weights: the drafter.
          rounds: of independent jobs, one after the other.
          stats: seconds and positions are added.

        Returns:
          The caches, complete.
        """
        if not rounds:
            return caches
        started, waited = time.perf_counter(), self._pool.stats.waited_s
        for jobs in rounds:
            for first in range(0, len(jobs), _MOST_ROWS):
                chosen = jobs[first : first + _MOST_ROWS]
                caches = self._fill(caches, params, weights, chosen, stats)
        jax.block_until_ready(caches.drafter)
        waited = self._pool.stats.waited_s - waited
        stats.fill_s += time.perf_counter() - started - waited
        return caches

    def _prefill(self, caches, params, jobs, stats) -> speculate.Caches:
        chunk, batch, table = self._cfg.chunk, *self._table(jobs)
        program = self._pool.get(*self._programs.prefill(params, batch))
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
            target = program(params, caches.target, tokens, counts, table, lengths)
            caches = caches.replace(target=target)
            stats.num_prefill_tokens += int(counts.sum())
        return caches

    def _fill(self, caches, params, weights, jobs, stats) -> speculate.Caches:
        chunk, batch, table = self._cfg.chunk, *self._table(jobs)
        program = self._pool.get(*self._programs.fill(params, batch))
        for offset in range(0, max(j.stop - j.start for j in jobs), chunk):
            tokens = np.zeros((batch, chunk), np.int32)
            counts = np.zeros((batch,), np.int32)
            starts = np.zeros((batch,), np.int32)
            for i, job in enumerate(jobs):
                first = job.start + offset
                count = max(min(chunk, job.stop - first), 0)
                tokens[i, :count] = job.text[first + 1 : first + 1 + count]
                counts[i], starts[i] = count, first if count else 0
            filled = program(
                weights, caches.target, caches.drafter, tokens, counts, table, starts
            )
            caches = caches.replace(drafter=filled)
            stats.num_fill_tokens += int(counts.sum())
        return caches

    def _table(self, jobs) -> tuple[int, np.ndarray]:
        """The batch bucket of some jobs, and their pages."""
        batch = scheduler.bucket_of(len(jobs), _MOST_ROWS)
        table = np.zeros((batch, self._cfg.max_pages), np.int32)
        for i, job in enumerate(jobs):
            table[i, : len(job.pages)] = job.pages
        return batch, table
