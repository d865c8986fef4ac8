"""Evaluation during a run: completions of held-out prompts, judged."""

import contextlib
from collections.abc import Callable, Sequence

import numpy as np

from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.tasks import prompts, reward_pool
from tlt_jax.rl.workers import workers as workers_lib
from tlt_jax.settings import sections

# Evaluation noise never coincides with a rollout's: seeds of runs are below this.
_SEED_OFFSET = 2**63
# A reward of 1 counts as right for pass@k.
_RIGHT = 1.0 - 1e-6


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
        rewards: reward_pool.RewardPool,
        decode_text: Callable[[np.ndarray], str],
    ):
        """Take the parts.

        `workers` have the policy's weights; those that are lost have no part. Of the
        processes that they are of, each evaluates a part of the prompts. `engines`
        sample by the law of evaluation, side by side: the workers' own, or one beside
        each.
        """
        self._cfg, self._max_new_tokens = cfg, max_new_tokens
        self._seed = _SEED_OFFSET + seed
        self._prompts, self._workers = prompt_set, workers
        self._engines = tuple(engines)
        self._rewards, self._decode_text = rewards, decode_text

    def evaluate(
        self, on_call: Callable[[int, int], None] | None = None
    ) -> dict[str, float]:
        """Judge the policy that the workers have.

        The noise is the same at every evaluation, so that two policies differ by what
        they say and not by luck. `on_call` hears of each decode call: completions done
        in this process, and tokens.

        Returns:
          `eval/avg@n`, the mean reward over n samples per prompt, and `eval/pass@k`.
        """
        samples = self._cfg.samples
        examples = [prompt.example for prompt in self._prompts.prompts]
        requests = prompts.requests_of(
            self._prompts.prompts, samples, self._max_new_tokens, 0
        )
        engines = self._at_work()
        group, count = self._workers.group, len(requests)
        # A process whose workers are all lost has no part either.
        able = group.exchange("evaluators", bool(engines))
        places = [place for place, is_able in enumerate(able) if is_able]
        own = [
            i for i in range(count) if places[i // samples % len(places)] == group.index
        ]
        completions = []
        if own:
            asked = [requests[i] for i in own]
            with contextlib.ExitStack() as aside:
                for engine in engines:
                    aside.enter_context(engine.aside())
                completions, _ = engine_lib.answer(
                    engines, asked, self._seed, on_call=on_call
                )
            for engine in engines:
                engine.release_cache()
        scores = self._rewards.score(
            (examples[i // samples], self._decode_text(completion.tokens))
            for i, completion in zip(own, completions, strict=True)
        )
        rewards = np.empty(count, np.float32)
        for indices, found in group.exchange("evaluation", (own, scores.rewards)):
            rewards[indices] = found
        rewards = rewards.reshape(-1, samples)
        row = {f"eval/avg@{samples}": float(rewards.astype(np.float64).mean())}
        for k in self._cfg.k:
            row[f"eval/pass@{k}"] = pass_at_k(rewards >= _RIGHT, k)
        return row

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
    num_samples = correct.shape[1]
    num_wrong = num_samples - correct.sum(axis=1)
    drawn = np.arange(k)
    # The i-th of k draws without replacement is wrong with (n - c - i) / (n - i).
    all_wrong = np.maximum(num_wrong[:, None] - drawn, 0) / (num_samples - drawn)
    return float(np.mean(1.0 - all_wrong.prod(axis=1)))
