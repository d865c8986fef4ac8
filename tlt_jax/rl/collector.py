"""The experience of an RL step: prompts drawn, completions sampled, rewards gathered.

Rewards are judged while the rollout still runs. With dynamic sampling the step draws
further prompts until enough groups carry signal. What is drawn depends on the seed and
on how many prompts were drawn before, nothing else.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tlt_jax import types
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
      scores: of all completions, in the order of `everything`.
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
        if stats.rule:
            row["specdec/rule"] = stats.rule
        if stats.num_accepted:
            row["specdec/num_accepted"] = stats.num_accepted
            row["specdec/num_tried"] = stats.num_tried
            row["specdec/strategy"] = stats.most_used
        tried, chance, true = stats.reliability
        if any(tried):
            row["specdec/chance_tried"] = [int(n) for n in tried]
            row["specdec/chance_sum"] = chance
            row["specdec/chance_true"] = [int(n) for n in true]
            if stats.taus:
                row["specdec/tau"] = statistics.mean(stats.taus)
                row["specdec/sharpness"] = statistics.mean(stats.sharpnesses)
        verified, accepted = stats.by_rank
        if any(verified):
            row["specdec/rank_verified"] = verified
            row["specdec/rank_accepted"] = accepted
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
        rewards: reward_pool.Pool,
        decode_text: Callable[[np.ndarray], str],
        *,
        dynamic_sampling: bool,
        between: Callable[[watch_lib.Watch], None],
    ):
        """Take the parts; nothing is drawn yet.

        `workers` have weights by the time of `collect`; of the processes among which
        they divide a rollout, each judges what it has generated. The seed is of the
        order of prompts, and of the noise; `between` is called between two rollouts of
        a step.
        """
        self.position = 0
        self.expected_lengths: dict[int, float] = {}
        self._cfg, self._seed = cfg, seed
        self._prompts, self._workers, self._rewards = prompt_set, workers, rewards
        self._decode_text = decode_text
        self._dynamic_sampling, self._between = dynamic_sampling, between

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, fit for JSON."""
        lengths = dict(self.expected_lengths)
        return {"position": self.position, "expected_lengths": lengths}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`; JSON has made text of the lengths' keys."""
        self.position = state["position"]
        self.expected_lengths = {
            int(key): value for key, value in state["expected_lengths"].items()
        }

    def prompts_of(self, ids: Sequence[int]) -> list[prompts.Prompt]:
        """Find prompts by their ids."""
        known = {prompt.prompt_id: prompt for prompt in self._prompts.prompts}
        return [known[number] for number in ids]

    def collect(self, step: int, watch: watch_lib.Watch) -> Collected:
        """Collect the experience of one step.

        With dynamic sampling, groups whose rewards are all equal are replaced by those
        of further prompts, for at most four batches in all. `step`, RL steps done, keys
        the requests; `watch` gets the stages `rollout` and `reward`.
        """
        wanted, everything, kept = self._cfg.prompts_per_step, None, None
        stats, scores = rollout_stats.RolloutStats(), []

        def show(num_done, num_tokens):
            total = self._cfg.prompts_per_step * self._cfg.group_size
            watch.within(num_done, total, f"{num_tokens} tokens")

        while len(scores) < (_MAX_ROUNDS if self._dynamic_sampling else 1):
            if scores:
                self._between(watch)
            asked = self._ask(step, len(scores))
            with watch.stage("rollout"):
                completions, spent = self._workers.run(
                    asked.requests,
                    self._seed,
                    expected_lengths=self.expected_lengths,
                    on_completion=asked.judge,
                    on_call=show,
                )
            stats = stats.join(spent)
            with watch.stage("reward"):
                rewards, judged = asked.rewards(self._workers.group)
            scores.append(judged)
            batch = experience.Experience(asked.prompts, completions, rewards)
            means = batch.lengths.reshape(batch.rewards.shape).mean(axis=1)
            for prompt, mean in zip(batch.prompts, means, strict=True):
                self.expected_lengths[prompt.prompt_id] = float(mean)
            everything = batch if everything is None else everything.join(batch)
            useful = batch
            if self._dynamic_sampling:
                signal = advantages.carries_signal(batch.rewards)
                useful = batch.select(np.flatnonzero(signal).tolist())
            kept = useful if kept is None else kept.join(useful)
            if len(kept.prompts) >= wanted:
                break
        if self._dynamic_sampling:
            kept = kept.select(range(min(wanted, len(kept.prompts))))
        judgements = reward_pool.joined(scores)
        if judgements.num_failed:
            watch.note(
                f"{judgements.num_failed} rewards failed, the first: "
                f"{judgements.first_failure()}"
            )
        return Collected(
            everything,
            kept if kept.prompts else None,
            stats,
            judgements,
            len(scores),
            self._prompts.num_skipped,
        )

    def _ask(self, step: int, round_index: int) -> "_Asked":
        """Draw the next prompts; requests of a run never have an id twice."""
        count, size = self._cfg.prompts_per_step, self._cfg.group_size
        drawn = self._prompts.draw(self.position, count, self._seed)
        self.position += count
        first_id = (step << 32) + round_index * count * size
        requests = prompts.requests_of(drawn, size, self._cfg.max_new_tokens, first_id)
        return _Asked(drawn, requests, self._rewards, self._decode_text)


@dataclasses.dataclass
class _Asked:
    """One round's requests, judged as they are answered."""

    prompts: list[prompts.Prompt]
    requests: list[types.Request]
    pool: reward_pool.Pool
    decode_text: Callable[[np.ndarray], str]
    judged: list[int] = dataclasses.field(default_factory=list)

    def judge(self, completion: types.Completion) -> None:
        """Let a completion be judged while others are still decoded."""
        index = completion.request_id - self.requests[0].request_id
        prompt = self.prompts[index * len(self.prompts) // len(self.requests)]
        self.pool.submit(prompt.example, self.decode_text(completion.tokens))
        self.judged.append(index)

    def rewards(
        self, group: distributed.Group
    ) -> tuple[np.ndarray, reward_pool.Scores]:
        """Gather what all processes have judged: `[P, R]`, and how it went."""
        parts = group.gather("rewards", (self.judged, self.pool.gather()))
        scores = reward_pool.joined([part for _, part in parts])
        # Judged in the order in which they ended; from here on in that of requests.
        judged = [index for indices, _ in parts for index in indices]
        items = tuple(scores.items[i] for i in np.argsort(judged))
        scores = dataclasses.replace(scores, items=items)
        return scores.rewards.reshape(len(self.prompts), -1), scores
