"""The update of an RL step: from judged groups to new weights and their record."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tlt_jax.models import config as model_config
from tlt_jax.models import flash_attention
from tlt_jax.models import params as model_params
from tlt_jax.rl.update import algorithms, experience, packing
from tlt_jax.rl.update import learner as learner_lib
from tlt_jax.runtime import programs, sharding
from tlt_jax.runtime import train_state as train_state_lib
from tlt_jax.runtime import watch as watch_lib
from tlt_jax.settings import sections
from tlt_jax.specdec import sampling

_MAX_SKIPPED = 3


class Updater:
    """The learner of a run with its state.

    Attributes:
      train_state: what training changes.
      reference: the initial policy, where the algorithm compares with it.
      skips: updates in a row that were not finite.
      learner, pool, algorithm: its parts.
    """

    train_state: train_state_lib.TrainState

    def __init__(
        self,
        model: model_config.ModelConfig,
        *,
        algorithm: sections.Algorithm,
        rollout: sections.Rollout,
        learner: sections.Learner,
        optimizer: sections.Optimizer,
        mesh: sections.Mesh,
        law: sampling.SamplingConfig,
        num_steps: int,
        precision: str,
        remat: str,
        max_prompt_tokens: int,
    ):
        """Make the learner; `train_state` and `reference` are given by the caller.

        See `learner.Learner` for the arguments that are no sections of the settings.

        Raises:
          ValueError: the algorithm contradicts itself, or the mesh or the learner's
            attention is not to be had.
        """
        lagging = algorithms.LAGGING if rollout.lag else {}
        self.algorithm = algorithms.build(
            algorithms.preset(algorithm.name) | lagging | algorithm.overrides()
        )
        self.pool = programs.ProgramPool()
        placed = sharding.make_mesh(
            mesh.data, mesh.fsdp, mesh.tensor, expert=mesh.expert
        )
        flash = flash_attention.choose(
            *(learner.attention, model, precision, placed),
            sharding.ShardingRules(),
            flash_attention.Lengths(
                prompt=max_prompt_tokens,
                answer=rollout.max_new_tokens,
                group_size=rollout.group_size,
                row=learner.row_tokens,
            ),
        )
        self.learner = learner_lib.Learner(
            model,
            law,
            learner,
            optimizer,
            num_steps=num_steps,
            precision=precision,
            remat=remat,
            mesh=placed,
            pool=self.pool,
            flash=flash,
        )
        self.reference: model_params.Params | None = None
        self.skips = train_state_lib.Skips(_MAX_SKIPPED)
        self._model, self._rollout, self._cfg = model, rollout, learner
        self._layout = experience.Layout(
            learner.row_tokens,
            self.learner.rows_per_micro_batch,
            flash and flash_attention.MOST_SEQUENCES,
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the algorithm compares with the initial policy."""
        return self.algorithm.loss.kl_coef > 0

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs besides `train_state`, fit for JSON."""
        return {"num_skipped": self.skips.in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.skips.in_a_row = state["num_skipped"]

    def warm_up(self, *, wait: bool) -> None:
        """Compile every program of the updates to come, in the background."""
        num_prompts = self._rollout.prompts_per_step // self._cfg.minibatches
        for width in self._layout.widths:
            blank = experience.filling(
                width, num_prompts, self._rollout.group_size, self._model
            )
            given = blank.logprobs
            has_old = self._cfg.old_logprobs == "rollout" or self._recomputes
            _, (micro, *_) = experience.micro_batches(
                blank,
                self._layout,
                self.algorithm,
                np.zeros(len(given), np.float32),
                max_new_tokens=self._rollout.max_new_tokens,
                old_logprobs=given if has_old else None,
                ref_logprobs=given if self.needs_reference else None,
                num_experts=self._num_experts,
            )
            passes = self.needs_reference or self._recomputes
            passes |= self._lags and self._cfg.old_logprobs == "recompute"
            self.learner.prepare(micro, self.algorithm.loss, with_logprobs=passes)
        if wait:
            self.pool.wait()

    def behaviour(
        self,
        policy: model_params.Params,
        batch: experience.Experience,
        watch: watch_lib.Watch,
    ) -> tuple[experience.Experience, float | None]:
        """Give a batch the trainer's own log-probabilities in the recorded ones' place.

        Those of `policy`, which rolled out and may be older than what is trained: what
        importance weights compare with, and weights then hang on no recorded one. Where
        `old_logprobs` are the rollout's the batch stays as it is.

        Returns:
          The batch, and how far the recorded ones are from these, see `max_mismatch`.
        """
        if self._cfg.old_logprobs == "rollout":
            return batch, None
        routes = batch.routes if self._cfg.routes == "replay" else None
        with watch.stage("inference"):
            own = self._logprobs(policy, batch, routes)
        return batch.with_logprobs(own), experience.max_mismatch(batch, own)

    def update(
        self, batch: experience.Experience, watch: watch_lib.Watch
    ) -> dict[str, Any]:
        """Train on the groups of a step; return `policy/` and `mismatch/` values.

        Of a run with `rollout.lag` the batch is one of `behaviour`.

        `watch` gets the stages `inference` and `update`, and notes of skipped updates.

        Raises:
          failures.NotFiniteError: several updates in a row were not finite.
        """
        old_logprobs = batch.logprobs if self._cfg.old_logprobs == "rollout" else None
        reference = mismatch = None
        with watch.stage("inference"):
            if self.reference is not None:
                reference = self._logprobs(self.reference, batch)
            if self._recomputes:
                own = batch.routes if self._cfg.routes == "replay" else None
                old_logprobs = self._logprobs(self.train_state.params, batch, own)
                # Of all minibatches: an update sees those after the first with weights
                # that have not rolled out.
                mismatch = experience.max_mismatch(batch, old_logprobs)
        advantages_n = experience.advantages_of(
            batch, self.algorithm, self._rollout.max_new_tokens, reference
        )
        records = []
        num_groups = len(batch.prompts)
        parts = np.array_split(
            np.arange(num_groups), min(self._cfg.minibatches, num_groups)
        )
        for _ in range(self._cfg.epochs):
            for chosen in parts:
                rows = _rows_of(chosen, batch.group_size)
                part = batch.select(chosen.tolist())
                packed, micro = experience.micro_batches(
                    part,
                    self._layout,
                    self.algorithm,
                    advantages_n[rows],
                    max_new_tokens=self._rollout.max_new_tokens,
                    old_logprobs=_take(old_logprobs, rows),
                    ref_logprobs=_take(reference, rows),
                    num_experts=self._num_experts,
                )
                with watch.stage("update"):
                    self.train_state, record, trained = self.learner.update(
                        self.train_state, micro, self.algorithm.loss
                    )
                if mismatch is None:
                    own = packing.scatter(packed, trained)
                    mismatch = experience.max_mismatch(part, own)
                records.append(record)
                self._check_skipped(record, watch)
        row: dict[str, Any] = {
            name: float(np.mean([record[name] for record in records]))
            for name in records[0]
        }
        # As above: the weights of later updates have not rolled out.
        if (flips := records[0].get("moe/route_flips")) is not None:
            row["moe/route_flips"] = flips
        with watch.stage("update"):
            digest = self.learner.digest(self.train_state.params)
        if not self._lags:
            # Else the weights may be newer: see `behaviour`.
            row["mismatch/logprob_max_abs"] = mismatch
        return row | {"policy/weights_digest": digest}

    @property
    def _recomputes(self) -> bool:
        """Whether old log-probabilities take a pass: with one update none is due."""
        cfg = self._cfg
        return cfg.old_logprobs == "recompute" and cfg.epochs * cfg.minibatches > 1

    @property
    def _lags(self) -> bool:
        return self._rollout.lag > 0

    @property
    def _num_experts(self) -> int:
        return 0 if self._model.experts is None else self._model.experts.num

    def _logprobs(
        self,
        params: model_params.Params,
        batch: experience.Experience,
        routes: list[np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        """Log-probabilities of a batch's completions by the trainer's own forward.

        `routes` are replayed; those of a reference's other weights are its own.
        """
        parts = self._layout.pack(batch)
        return packing.scatter(parts, self.learner.logprobs(params, parts, routes))

    def _check_skipped(self, record: dict[str, float], watch: watch_lib.Watch) -> None:
        self.skips.count(record["policy/update_skipped"])
        if self.skips.in_a_row:
            watch.note(
                "loss or gradient is not finite; update skipped "
                f"({self.skips.in_a_row} in a row)."
            )
        self.skips.check()


def _rows_of(groups: np.ndarray, group_size: int) -> np.ndarray:
    """Indices of the completions of `groups`."""
    return (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)


def _take(values: Sequence[np.ndarray] | None, indices: np.ndarray):
    return None if values is None else [values[i] for i in indices]
