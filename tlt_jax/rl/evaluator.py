"""Evaluation during a run: completions of held-out prompts, judged."""

from collections.abc import Callable

import numpy as np

from tlt_jax import config
from tlt_jax.models import params as model_params
from tlt_jax.rl import evaluation, prompts, reward_pool, rollout

# Evaluation noise never coincides with a rollout's: seeds of runs are below this.
_SEED_OFFSET = 2**63
# A reward of 1 counts as right for pass@k.
_RIGHT = 1.0 - 1e-6


class Evaluator:
    """Held-out prompts with the engine that answers them."""

    def __init__(
        self,
        run: config.RunConfig,
        prompt_set: prompts.PromptSet,
        engine: rollout.Engine,
        rewards: reward_pool.RewardPool,
        decode_text: Callable[[np.ndarray], str],
    ):
        """Take the parts; `engine` samples by the law of evaluation."""
        self._run = run
        self._prompts = prompt_set
        self.engine = engine
        self._rewards = rewards
        self._decode_text = decode_text

    def evaluate(self, params: model_params.Params, version: int) -> dict[str, float]:
        """Judge the policy.

        The noise is the same at every evaluation, so that two policies differ by what
        they say and not by luck.

        Args:
          params: on the engine's mesh.
          version: of the policy.

        Returns:
          `eval/avg@n`, the mean reward over n samples per prompt, and `eval/pass@k`.
        """
        samples = self._run.eval.samples
        examples = [prompt.example for prompt in self._prompts.prompts]
        requests = prompts.requests_of(
            self._prompts.prompts, samples, self._run.rollout.max_new_tokens, 0
        )
        self.engine.set_params(params, version)
        completions, _ = self.engine.run(requests, _SEED_OFFSET + self._run.seed)
        self.engine.release_cache()
        scores = self._rewards.score(
            (examples[i // samples], self._decode_text(completion.tokens))
            for i, completion in enumerate(completions)
        )
        rewards = scores.rewards.reshape(-1, samples)
        return self._row(rewards)

    def _row(self, rewards: np.ndarray) -> dict[str, float]:
        samples = rewards.shape[1]
        row = {f"eval/avg@{samples}": evaluation.avg_at_k(rewards, samples)}
        for k in self._run.eval.k:
            row[f"eval/pass@{k}"] = evaluation.pass_at_k(rewards >= _RIGHT, k)
        return row
