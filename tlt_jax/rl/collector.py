"""The experience of an RL step: prompts drawn, completions sampled, rewards gathered.

Rewards are judged while the rollout still runs. With dynamic sampling the step draws
further prompts until enough groups carry signal. What is drawn depends on the seed and
on how many prompts were drawn before, nothing else.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from tlt_jax.rl.engine import stats as rollout_stats
from tlt_jax.rl.tasks import prompts, reward_pool
from tlt_jax.rl.update import advantages, experience
from tlt_jax.rl.workers import workers as workers_lib
from tlt_jax.runtime import distributed
from tlt_jax.runtime import watch as watch_lib
from tlt_jax.settings import sections

# Batches drawn at most for one step under dynamic sampling.
_MAX_ROUNDS = 4


@dataclasses.dataclass(frozen=True)
class Collected:
    """What the rollouts of one step brought.

    Attributes:
      everything: all that was sampled and judged.
      useful: the groups to train on; None: none carries signal.
      stats: of the engines, all rollouts together.
      scores: of all completions, as they were gathered.
      num_rounds: rollouts that it took.
      num_skipped: prompts of the data that are too long to be asked.
    """

    everything: experience.Experience
    useful: experience.Experience | None
    stats: rollout_stats.RolloutStats
    scores: reward_pool.Scores
    num_rounds: int
    num_skipped: int

    def row(self) -> dict[str, Any]:
        """Return the step's values by metric name."""
        row = self.scores.metrics()
        # The watch has it, for all rounds.
        del row["time/reward_s"]
        if row["reward/num_failed"]:
            row["reward/first_failure"] = self.scores.first_failure()
        stats = self.stats
        row |= {
            "rollout/decode_steps": stats.num_steps,
            "rollout/row_steps": stats.num_row_steps,
            "rollout/prefill_tokens": stats.num_prefill_tokens,
            "rollout/preempted": stats.num_preempted,
            "rollout/prefill_s": stats.prefill_s,
            "rollout/decode_s": stats.decode_s,
            "rollout/rounds": self.num_rounds,
            "rollout/prompts_skipped": self.num_skipped,
        }
        if stats.num_accepted:
            row["specdec/num_accepted"] = stats.num_accepted
            row["specdec/num_tried"] = stats.num_tried
            row["specdec/strategy"] = stats.most_used
        return row | experience.reward_and_length_row(
            self.everything.rewards, self.everything.completions
        )


class Collector:
    """Where experience comes from, and how far the prompts are drawn.

    Attributes:
      position: prompts drawn so far, in the endless line of `PromptSet.draw`.
      expected_lengths: mean completion length last seen, in tokens, by `prompt_id`.
    """

    def __init__(
        self,
        cfg: sections.Rollout,
        seed: int,
        prompt_set: prompts.PromptSet,
        workers: workers_lib.Workers,
        rewards: reward_pool.RewardPool,
        decode_text: Callable[[np.ndarray], str],
        *,
        dynamic_sampling: bool,
        between: Callable[[watch_lib.Watch], None],
        group: distributed.Group | None = None,
    ):
        """Take the parts; nothing is drawn yet.

        Args:
          cfg: how many prompts, how many completions of each, and how long.
          seed: of the order of prompts, and of the noise.
          prompt_set: of the training split.
          workers: with weights by the time of `collect`.
          rewards: judges completions.
          decode_text: token ids to the text that is judged.
          dynamic_sampling: sample until every group carries signal.
          between: called between two rollouts of a step.
          group: the processes among which `workers` divide a rollout; each judges what
            it has generated. None: this one is alone.
        """
        self._group = group or distributed.alone()
        self.position = 0
        self.expected_lengths: dict[int, float] = {}
        self._cfg, self._seed = cfg, seed
        self._prompts, self._workers, self._rewards = prompt_set, workers, rewards
        self._decode_text = decode_text
        self._dynamic_sampling, self._between = dynamic_sampling, between

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, fit for JSON."""
        return {"position": self.position, "expected_lengths": self.expected_lengths}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`; JSON has made text of the lengths' keys."""
        self.position = state["position"]
        self.expected_lengths = {
            int(key): value for key, value in state["expected_lengths"].items()
        }

    def collect(self, step: int, watch: watch_lib.Watch) -> Collected:
        """Collect the experience of one step.

        With dynamic sampling, groups whose rewards are all equal are replaced by those
        of further prompts, for at most four batches in all.

        Args:
          step: RL steps done; it keys the requests.
          watch: gets the stages `rollout` and `reward`.
        """
        wanted = self._cfg.prompts_per_step
        everything, stats, scores = self._roll_out(step, 0, watch)
        kept, parts, num_rounds = everything, [scores], 1
        if self._dynamic_sampling:
            kept = _useful(everything)
            while len(kept.prompts) < wanted and num_rounds < _MAX_ROUNDS:
                self._between(watch)
                batch, more, scores = self._roll_out(step, num_rounds, watch)
                everything, kept = everything.join(batch), kept.join(_useful(batch))
                stats, num_rounds = stats.join(more), num_rounds + 1
                parts.append(scores)
            kept = kept.select(range(min(wanted, len(kept.prompts))))
        return Collected(
            everything,
            kept if kept.prompts else None,
            stats,
            reward_pool.joined(parts),
            num_rounds,
            self._prompts.num_skipped,
        )

    def _roll_out(
        self, step: int, round_index: int, watch: watch_lib.Watch
    ) -> tuple[experience.Experience, rollout_stats.RolloutStats, reward_pool.Scores]:
        """Sample the next prompts' groups, judging while others still decode."""
        count, size = self._cfg.prompts_per_step, self._cfg.group_size
        drawn = self._prompts.draw(self.position, count, self._seed)
        self.position += count
        first_id = (step << 32) + round_index * count * size
        requests = prompts.requests_of(drawn, size, self._cfg.max_new_tokens, first_id)
        judged: list[int] = []

        def judge(completion):
            index = completion.request_id - first_id
            text = self._decode_text(completion.tokens)
            self._rewards.submit(drawn[index // size].example, text)
            judged.append(index)

        def show(num_done, num_tokens):
            watch.within(num_done, len(requests), f"{num_tokens} tokens")

        with watch.stage("rollout"):
            completions, stats = self._workers.run(
                requests,
                self._seed,
                expected_lengths=self.expected_lengths,
                on_completion=judge,
                on_call=show,
            )
        with watch.stage("reward"):
            scores = self._rewards.gather()
            parts = self._group.exchange("rewards", (judged, scores))
        judged = [index for indices, _ in parts for index in indices]
        scores = reward_pool.joined([part for _, part in parts])
        rewards = np.empty(len(requests))
        rewards[judged] = scores.rewards
        batch = experience.Experience(drawn, completions, rewards.reshape(count, size))
        means = batch.lengths.reshape(batch.rewards.shape).mean(axis=1)
        for prompt, mean in zip(batch.prompts, means, strict=True):
            self.expected_lengths[prompt.prompt_id] = float(mean)
        return batch, stats, scores


def _useful(batch: experience.Experience) -> experience.Experience:
    """Keep the groups that carry signal."""
    return batch.select(
        np.flatnonzero(advantages.carries_signal(batch.rewards)).tolist()
    )
