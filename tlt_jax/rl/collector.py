"""Collects the experience of a step: prompts, rollout, rewards, resampling."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from tlt_jax import config
from tlt_jax.rl.engine import stats as rollout_stats
from tlt_jax.rl.tasks import prompts, reward_pool
from tlt_jax.rl.update import advantages, experience
from tlt_jax.rl.workers import workers
from tlt_jax.runtime import clock, distributed

# Batches drawn at most for one step under dynamic sampling.
_MAX_ROUNDS = 4


class Collector:
    """Where experience comes from, and how far the prompts are drawn.

    Attributes:
      position: prompts drawn so far, in the endless line of `PromptSet.draw`.
      expected_lengths: mean completion length last seen, in tokens, by `prompt_id`.
    """

    def __init__(
        self,
        run: config.RunConfig,
        prompt_set: prompts.PromptSet,
        engine: workers.Workers,
        rewards: reward_pool.RewardPool,
        decode_text: Callable[[np.ndarray], str],
        *,
        dynamic_sampling: bool,
        show: Callable[[str, int, int, str], None],
        between: Callable[[], None] | None = None,
        group: distributed.Group | None = None,
    ):
        """Take the parts; nothing is drawn yet.

        Args:
          run: sections rollout, and the seed, are read.
          prompt_set: of the training split.
          engine: with weights by the time of `collect`.
          rewards: judges completions.
          decode_text: token ids to the text that is judged.
          dynamic_sampling: sample until every group carries signal.
          show: called with stage, completions done, completions in all, and a detail.
          between: called between two rollouts of a step, its seconds the drafter's.
          group: the processes among which `engine` divides a rollout; each judges what
            it has generated. None: this one is alone.
        """
        self._group = group or distributed.alone()
        self.position = 0
        self.expected_lengths: dict[int, float] = {}
        self._run = run
        self._prompts = prompt_set
        self._engine = engine
        self._rewards = rewards
        self._decode_text = decode_text
        self._dynamic_sampling = dynamic_sampling
        self._show = show
        self._between = between

    def collect(
        self, step: int, timer: clock.Clock
    ) -> tuple[experience.Experience, experience.Experience | None, dict[str, Any]]:
        """Collect the experience of one step.

        With dynamic sampling, groups whose rewards are all equal are replaced by those
        of further prompts, for at most four batches in all.

        Args:
          step: RL steps done; it keys the requests.
          timer: stages `rollout` and `reward` are added to it, and `drafter` for what
            is called between rollouts.

        Returns:
          All that was sampled; the groups to train on, or None if none carries signal;
          and the record.
        """
        wanted = self._run.rollout.prompts_per_step
        everything, row = self._roll_out(step, 0, timer)
        kept, num_rounds = everything, 1
        if self._dynamic_sampling:
            kept = _useful(everything)
            while len(kept.prompts) < wanted and num_rounds < _MAX_ROUNDS:
                if self._between is not None:
                    timer.time("drafter", self._between)
                batch, more = self._roll_out(step, num_rounds, timer)
                everything, kept = everything.join(batch), kept.join(_useful(batch))
                row, num_rounds = _merge(row, more), num_rounds + 1
            kept = kept.select(range(min(wanted, len(kept.prompts))))
        row |= experience.reward_and_length_row(
            everything.rewards, everything.completions
        )
        row["rollout/rounds"] = num_rounds
        row["rollout/prompts_skipped"] = self._prompts.num_skipped
        return everything, (kept if kept.prompts else None), row

    def _roll_out(
        self, step: int, round_index: int, timer: clock.Clock
    ) -> tuple[experience.Experience, dict[str, Any]]:
        """Sample the next prompts' groups, judging while others still decode."""
        run = self._run
        count, size = run.rollout.prompts_per_step, run.rollout.group_size
        drawn = self._prompts.draw(self.position, count, run.seed)
        self.position += count
        first_id = (step << 32) + round_index * count * size
        requests = prompts.requests_of(
            drawn, size, run.rollout.max_new_tokens, first_id
        )
        judged: list[int] = []

        def judge(completion):
            index = completion.request_id - first_id
            text = self._decode_text(completion.tokens)
            self._rewards.submit(drawn[index // size].example, text)
            judged.append(index)

        def show(num_done, num_tokens):
            self._show("rollout", num_done, len(requests), f"{num_tokens} tokens")

        completions, stats = timer.time(
            "rollout",
            self._engine.run,
            requests,
            run.seed,
            expected_lengths=self.expected_lengths,
            on_completion=judge,
            on_call=show,
        )
        scores = timer.time("reward", self._rewards.gather)
        parts = timer.time("reward", self._group.exchange, "rewards", (judged, scores))
        judged = [index for indices, _ in parts for index in indices]
        scores = reward_pool.joined([part for _, part in parts])
        row = scores.metrics()
        # The timer has it, for all rounds.
        del row["time/reward_s"]
        if row["reward/num_failed"]:
            row["reward/first_failure"] = scores.first_failure()
        rewards = np.empty(len(requests))
        rewards[judged] = scores.rewards
        batch = experience.Experience(drawn, completions, rewards.reshape(count, size))
        self._remember_lengths(batch)
        row |= {
            "rollout/decode_steps": stats.num_steps,
            "rollout/row_steps": stats.num_row_steps,
            "rollout/prefill_tokens": stats.num_prefill_tokens,
            "rollout/preempted": stats.num_preempted,
            "rollout/prefill_s": stats.prefill_s,
            "rollout/decode_s": stats.decode_s,
        }
        if stats.num_accepted:
            row["specdec/num_accepted"] = stats.num_accepted
            row["specdec/num_tried"] = stats.num_tried
            row["specdec/strategy"] = _most_used(stats)
        return batch, row

    def _remember_lengths(self, batch: experience.Experience) -> None:
        means = batch.lengths.reshape(batch.rewards.shape).mean(axis=1)
        for prompt, mean in zip(batch.prompts, means, strict=True):
            self.expected_lengths[prompt.prompt_id] = float(mean)


def _most_used(stats: rollout_stats.RolloutStats) -> str:
    """The strategy of most decode calls, plain ones aside."""
    calls = {name: num for name, num in stats.strategies.items() if name != "none"}
    return max(calls, key=calls.get)


def _useful(batch: experience.Experience) -> experience.Experience:
    """Keep the groups that carry signal."""
    return batch.select(
        np.flatnonzero(advantages.carries_signal(batch.rewards)).tolist()
    )


def _merge(row: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Join the records of two rounds: maxima by maximum, the rest by addition."""
    merged = dict(more) | row
    for name in row.keys() & more.keys():
        if isinstance(row[name], list):
            pairs = itertools.zip_longest(row[name], more[name], fillvalue=0)
            merged[name] = [a + b for a, b in pairs]
        elif not isinstance(row[name], str):
            larger = max(row[name], more[name])
            merged[name] = larger if "max" in name else row[name] + more[name]
    return merged
