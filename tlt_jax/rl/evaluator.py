"""Evaluation: completions of prompts, judged, and what their rewards say.

`answer` and `rewards_row` are all evaluations: that of a run, step after step, and that
of the command `tlt_jax.evaluate`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from tlt_jax import types
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import stats as rollout_stats
from tlt_jax.rl.tasks import prompts, reward_pool
from tlt_jax.rl.workers import distant, separate
from tlt_jax.rl.workers import workers as workers_lib
from tlt_jax.settings import sections

# Evaluation noise never coincides with a rollout's: seeds of runs are below this.
_SEED_OFFSET = 2**63
# A reward of 1 counts as right for pass@k.
_RIGHT = 1.0 - 1e-6
_NUM_RESAMPLES = 10_000
_RESAMPLES_AT_ONCE = 500


@dataclasses.dataclass(frozen=True)
class Answers:
    """What an evaluation's engines said, in the order of the requests.

    Attributes:
      completions, texts: as tokens and decoded.
      scores: one of each.
      stats: of the engines.
    """

    completions: list[types.Completion]
    texts: list[str]
    scores: reward_pool.Scores
    stats: rollout_stats.RolloutStats


def answer(
    engines: Sequence[engine_lib.Engine],
    examples: Sequence[types.Example],
    requests: Sequence[types.Request],
    seed: int,
    rewards: reward_pool.Pool,
    decode_text: Callable[[np.ndarray], str],
    on_call: Callable[[int, int], None] | None = None,
) -> Answers:
    """Answer requests and judge the answers.

    The noise is the same at every evaluation, so that two policies differ by what they
    say and not by luck, and it is never a rollout's.

    Args:
      engines: with the policy's weights; they work side by side.
      examples: of each request the one that it asks.
      requests: at least one; see `engine.answer`.
      seed: of the run, in [0, 2**63).
      rewards: judge.
      decode_text: token ids to text.
      on_call: see `engine.answer`.
    """
    completions, stats = engine_lib.answer(
        engines, requests, _SEED_OFFSET + seed, on_call=on_call
    )
    texts = [decode_text(completion.tokens) for completion in completions]
    scores = rewards.score(zip(examples, texts, strict=True))
    return Answers(completions, texts, scores, stats)


def rewards_row(rewards: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """Return `avg@n`, the mean of rewards `[P, n]`, and `pass@k` for each k."""
    row = {f"avg@{rewards.shape[1]}": float(rewards.astype(np.float64).mean())}
    return row | {f"pass@{k}": pass_at_k(rewards >= _RIGHT, k) for k in ks}


def intervals(rewards: np.ndarray, ks: Sequence[int]) -> dict[str, tuple[float, float]]:
    """Return 95 % intervals of what `rewards_row` says, by the same names.

    They are over prompts: how far the means would move had others been drawn of the
    same kind. The samples of a prompt stay together.
    """
    values = {f"avg@{rewards.shape[1]}": rewards.astype(np.float64).mean(axis=1)}
    values |= {f"pass@{k}": pass_at_k_by_prompt(rewards >= _RIGHT, k) for k in ks}
    return {name: bootstrap(value) for name, value in values.items()}


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of `values [P]`.

    P values are drawn with replacement, 10,000 times over; the interval holds the
    middle 95 % of the means. A pure function of its argument, the same on every
    platform and NumPy release.

    Reference: Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979.
    """
    count, means = len(values), []
    # Raw output of a counter-based generator: distributions may change, this does not.
    generator = np.random.Philox(key=np.array([0, 0], np.uint64))
    for _ in range(_NUM_RESAMPLES // _RESAMPLES_AT_ONCE):
        raw = generator.random_raw(_RESAMPLES_AT_ONCE * count)
        drawn = (raw % np.uint64(count)).reshape(_RESAMPLES_AT_ONCE, count)
        means.append(values[drawn.astype(np.int64)].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


class Evaluator:
    """Held-out prompts with the engines that answer them."""

    def __init__(
        self,
        cfg: sections.Eval,
        max_new_tokens: int,
        seed: int,
        prompt_set: prompts.PromptSet,
        workers: workers_lib.Workers,
        engines: Sequence[engine_lib.Engine],
        rewards: reward_pool.Pool,
        decode_text: Callable[[np.ndarray], str],
    ):
        """Take the parts.

        `workers` have the policy's weights; those that are lost have no part. Of the
        processes that they are of, each evaluates a part of the prompts. `engines`
        sample by the law of evaluation, side by side: the workers' own, or one beside
        each.
        """
        self._cfg, self._max_new_tokens = cfg, max_new_tokens
        self._seed = seed
        self._prompts, self._workers = prompt_set, workers
        self._engines = tuple(engines)
        self._rewards, self._decode_text = rewards, decode_text

    def evaluate(
        self, on_call: Callable[[int, int], None] | None = None
    ) -> dict[str, float]:
        """Judge the policy that the workers have.

        `on_call` hears of each decode call: completions done in this process, and
        tokens.

        Returns:
          `eval/avg@n`, the mean reward over n samples per prompt, and `eval/pass@k`.
        """
        samples = self._cfg.samples
        examples = [prompt.example for prompt in self._prompts.prompts]
        requests = prompts.requests_of(
            self._prompts.prompts, samples, self._max_new_tokens, 0
        )
        group, count = self._workers.group, len(requests)
        if isinstance(self._workers, separate.Team):
            rewards = self._judged_elsewhere(examples, requests)
            row = rewards_row(rewards.reshape(-1, samples), self._cfg.k)
            return {f"eval/{name}": value for name, value in row.items()}
        engines = self._at_work()
        # A process whose workers are all lost has no part either.
        able = group.exchange("evaluators", bool(engines))
        places = [place for place, is_able in enumerate(able) if is_able]
        own = [
            i for i in range(count) if places[i // samples % len(places)] == group.index
        ]
        judged = np.zeros(0)
        if own:
            with contextlib.ExitStack() as aside:
                for engine in engines:
                    aside.enter_context(engine.aside())
                judged = answer(
                    engines,
                    [examples[i // samples] for i in own],
                    [requests[i] for i in own],
                    self._seed,
                    self._rewards,
                    self._decode_text,
                    on_call,
                ).scores.rewards
            for engine in engines:
                engine.release_cache()
        rewards = np.empty(count)
        for indices, found in group.gather("evaluation", (own, judged)):
            rewards[indices] = found
        row = rewards_row(rewards.reshape(-1, samples), self._cfg.k)
        return {f"eval/{name}": value for name, value in row.items()}

    def _judged_elsewhere(
        self, examples: Sequence[types.Example], requests: Sequence[types.Request]
    ) -> np.ndarray:
        """Let separate workers answer, and the first process judge; `[n]`."""
        team, samples = self._workers, self._cfg.samples
        completions, _ = team.run(
            requests, _SEED_OFFSET + self._seed, law=distant.EVALUATION
        )
        # Of rollouts' time it is no part.
        team.take_intervals()

        def judge():
            texts = [self._decode_text(one.tokens) for one in completions]
            asked = [examples[i // samples] for i in range(len(requests))]
            return self._rewards.score(zip(asked, texts, strict=True)).rewards

        return team.group.first_large("evaluation", judge)

    def _at_work(self) -> list[engine_lib.Engine]:
        """Give the engines beside workers that are not lost their weights."""
        workers = self._workers
        # Only the first process knows of all that are lost.
        lost = workers.group.first("lost workers", lambda: frozenset(workers.lost))
        engines = []
        beside = zip(self._engines, workers.engines, strict=True)
        for number, (engine, policy) in enumerate(beside, workers.first):
            if number not in lost:
                engine.set_params(policy.params, policy.version)
                engines.append(engine)
        return engines


def pass_at_k(correct: np.ndarray, k: int) -> float:
    """Estimates the chance that at least one of k samples is right, without bias.

    With c of n samples right, `1 - C(n - c, k) / C(n, k)`: the chance that a subset of
    k of the samples at hand holds a right one, averaged over problems. Computed as a
    product of k factors below one, so it neither overflows nor cancels. `correct` is
    `[P, n]` bool, n >= k >= 1 samples of each of P >= 1 problems.

    Reference: Chen et al., "Evaluating Large Language Models Trained on Code", section
    2.1.
    """
    return float(np.mean(pass_at_k_by_prompt(correct, k)))


def pass_at_k_by_prompt(correct: np.ndarray, k: int) -> np.ndarray:
    """Estimates it for each problem, `[P] float64`; see `pass_at_k`."""
    num_samples = correct.shape[1]
    num_wrong = num_samples - correct.sum(axis=1)
    drawn = np.arange(k)
    # The i-th of k draws without replacement is wrong with (n - c - i) / (n - i).
    all_wrong = np.maximum(num_wrong[:, None] - drawn, 0) / (num_samples - drawn)
    return 1.0 - all_wrong.prod(axis=1)
