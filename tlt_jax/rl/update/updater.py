"""The update of an RL step: from judged groups to new weights and their record."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tlt_jax import config
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.rl.update import algorithms, experience, learner, packing
from tlt_jax.runtime import clock, programs, sharding, train_state

_MAX_SKIPPED = 3


class Updater:
    """The learner of a run with its state.

    Attributes:
      state: what training changes.
      reference: the initial policy, where the algorithm compares with it.
      skips: updates in a row that were not finite.
      learner, pool, algorithm: its parts.
    """

    state: train_state.TrainState

    def __init__(
        self,
        run: config.RunConfig,
        model: model_config.ModelConfig,
        stage: Callable[[str], None],
        note: Callable[[str], None],
    ):
        """Make the learner; `state` and `reference` are given by the caller.

        Args:
          run: what to do.
          model: the policy.
          stage: told what is being done.
          note: told of updates that were skipped.
        """
        self.algorithm = algorithms.build(
            algorithms.preset(run.algorithm.name) | run.algorithm.overrides()
        )
        mesh = sharding.make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
        self.pool = programs.ProgramPool()
        self.learner = learner.Learner(model, run, mesh=mesh, pool=self.pool)
        self.reference: model_params.Params | None = None
        self.skips = train_state.Skips(_MAX_SKIPPED)
        self._run, self._stage, self._note = run, stage, note
        self._layout = experience.Layout(
            run.learner.row_tokens, self.learner.rows_per_micro_batch
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the algorithm compares with the initial policy."""
        return self.algorithm.loss.kl_coef > 0

    def warm_up(self, *, wait: bool) -> None:
        """Compile every program of the updates to come, in the background."""
        run = self._run
        num_prompts = run.rollout.prompts_per_step // run.learner.minibatches
        for width in self._layout.widths:
            blank = experience.filling(width, num_prompts, run.rollout.group_size)
            given = blank.logprobs
            has_old = run.learner.old_logprobs == "rollout" or self._recomputes
            _, (micro, *_) = experience.micro_batches(
                blank,
                self._layout,
                self.algorithm,
                np.zeros(len(given), np.float32),
                max_new_tokens=run.rollout.max_new_tokens,
                old_logprobs=given if has_old else None,
                ref_logprobs=given if self.needs_reference else None,
            )
            passes = self.needs_reference or self._recomputes
            self.learner.prepare(micro, self.algorithm.loss, with_logprobs=passes)
        if wait:
            self.pool.wait()

    def update(self, batch: experience.Experience, timer: clock.Clock) -> dict:
        """Train on the groups of a step.

        Args:
          batch: groups with rewards.
          timer: stages `inference` and `update` are added to it.

        Returns:
          `policy/` and `mismatch/` values.

        Raises:
          failures.TrainingError: several updates in a row were not finite.
        """
        run = self._run
        self._stage("inference")
        old_logprobs = reference = None
        if self.reference is not None:
            reference = timer.time("inference", self._logprobs, self.reference, batch)
        if self._recomputes:
            old_logprobs = timer.time(
                "inference", self._logprobs, self.state.params, batch
            )
        elif run.learner.old_logprobs == "rollout":
            old_logprobs = batch.logprobs
        advantages_n = experience.advantages_of(
            batch, self.algorithm, run.rollout.max_new_tokens, reference
        )
        self._stage("update")
        records, mismatch = [], None
        num_groups = len(batch.prompts)
        parts = np.array_split(
            np.arange(num_groups), min(run.learner.minibatches, num_groups)
        )
        for _ in range(run.learner.epochs):
            for chosen in parts:
                rows = _rows_of(chosen, batch.group_size)
                part = batch.select(chosen.tolist())
                packed, micro = experience.micro_batches(
                    part,
                    self._layout,
                    self.algorithm,
                    advantages_n[rows],
                    max_new_tokens=run.rollout.max_new_tokens,
                    old_logprobs=_take(old_logprobs, rows),
                    ref_logprobs=_take(reference, rows),
                )
                self.state, record, trained = timer.time(
                    "update",
                    self.learner.update,
                    self.state,
                    micro,
                    self.algorithm.loss,
                )
                if mismatch is None:
                    mismatch = experience.max_mismatch(part, packed, trained)
                records.append(record)
                self._check_skipped(record)
        row: dict[str, Any] = {
            name: float(np.mean([record[name] for record in records]))
            for name in records[0]
        }
        digest = timer.time("update", self.learner.digest, self.state.params)
        return row | {
            "mismatch/logprob_max_abs": mismatch,
            "policy/weights_digest": digest,
        }

    @property
    def _recomputes(self) -> bool:
        """Whether old log-probabilities take a pass: with one update none is due."""
        cfg = self._run.learner
        return cfg.old_logprobs == "recompute" and cfg.epochs * cfg.minibatches > 1

    def _logprobs(
        self, params: model_params.Params, batch: experience.Experience
    ) -> list[np.ndarray]:
        """Log-probabilities of a batch's completions by the trainer's own forward."""
        parts = self._layout.pack(batch)
        return packing.scatter(parts, self.learner.logprobs(params, parts))

    def _check_skipped(self, record: dict[str, float]) -> None:
        self.skips.count(record["policy/update_skipped"])
        if self.skips.in_a_row:
            self._note(
                "loss or gradient is not finite; update skipped "
                f"({self.skips.in_a_row} in a row)."
            )
        self.skips.check()


def _rows_of(groups: np.ndarray, group_size: int) -> np.ndarray:
    """Indices of the completions of `groups`."""
    return (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)


def _take(values: Sequence[np.ndarray] | None, indices: np.ndarray):
    return None if values is None else [values[i] for i in indices]
