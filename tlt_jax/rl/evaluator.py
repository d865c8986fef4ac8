"""Evaluation during a run: completions of held-out prompts, judged."""

import concurrent.futures
from collections.abc import Callable, Sequence

import numpy as np

from tlt_jax import config, types
from tlt_jax.models import params as model_params
from tlt_jax.rl import evaluation
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import request_queue
from tlt_jax.rl.tasks import prompts, reward_pool
from tlt_jax.runtime import distributed

# Evaluation noise never coincides with a rollout's: seeds of runs are below this.
_SEED_OFFSET = 2**63
# A reward of 1 counts as right for pass@k.
_RIGHT = 1.0 - 1e-6


class Evaluator:
    """Held-out prompts with the engines that answer them."""

    def __init__(
        self,
        run: config.RunConfig,
        prompt_set: prompts.PromptSet,
        engines: Sequence[engine_lib.Engine],
        rewards: reward_pool.RewardPool,
        decode_text: Callable[[np.ndarray], str],
        group: distributed.Group | None = None,
    ):
        """Take the parts.

        Args:
          run: sections rollout and eval, and the seed, are read.
          prompt_set: of the held-out split.
          engines: sample by the law of evaluation, side by side.
          rewards: judges completions.
          decode_text: token ids to the text that is judged.
          group: the processes that evaluate together, a part of the prompts each; None:
            this one is alone.
        """
        self._group = group or distributed.alone()
        self._run = run
        self._prompts = prompt_set
        self.engines = tuple(engines)
        self._rewards = rewards
        self._decode_text = decode_text

    def evaluate(
        self, params: Sequence[model_params.Params | None], version: int
    ) -> dict[str, float]:
        """Judge the policy.

        The noise is the same at every evaluation, so that two policies differ by what
        they say and not by luck.

        Args:
          params: on each engine's mesh; None: that engine has no part in it.
          version: of the policy.

        Returns:
          `eval/avg@n`, the mean reward over n samples per prompt, and `eval/pass@k`.
        """
        samples = self._run.eval.samples
        examples = [prompt.example for prompt in self._prompts.prompts]
        requests = prompts.requests_of(
            self._prompts.prompts, samples, self._run.rollout.max_new_tokens, 0
        )
        engines = []
        for engine, own in zip(self.engines, params, strict=True):
            if own is not None:
                engine.set_params(own, version)
                engines.append(engine)
        group, count = self._group, len(requests)
        # A process whose workers are all lost has no part either.
        able = group.exchange("evaluators", bool(engines))
        places = [place for place, is_able in enumerate(able) if is_able]
        own = [
            i for i in range(count) if places[i // samples % len(places)] == group.index
        ]
        completions = self._answers(engines, [requests[i] for i in own])
        scores = self._rewards.score(
            (examples[i // samples], self._decode_text(completion.tokens))
            for i, completion in zip(own, completions, strict=True)
        )
        rewards = np.empty(count, np.float32)
        for indices, found in group.exchange("evaluation", (own, scores.rewards)):
            rewards[indices] = found
        return self._row(rewards.reshape(-1, samples))

    def _answers(
        self, engines: Sequence[engine_lib.Engine], requests: Sequence[types.Request]
    ) -> list[types.Completion]:
        """Let the engines share the requests; completions in the requests' order."""
        if not requests:
            return []
        engines[0].check(requests)
        queue = request_queue.RequestQueue(requests, num_workers=len(engines))
        done: dict[int, types.Completion] = {}

        def keep(completion):
            done[completion.request_id] = completion

        def serve(worker):
            seed = _SEED_OFFSET + self._run.seed
            engines[worker].serve(queue.share(worker), seed, on_completion=keep)
            engines[worker].release_cache()

        with concurrent.futures.ThreadPoolExecutor(len(engines), "evaluate") as pool:
            list(pool.map(serve, range(len(engines))))
        return [done[request.request_id] for request in requests]

    def _row(self, rewards: np.ndarray) -> dict[str, float]:
        samples = rewards.shape[1]
        row = {f"eval/avg@{samples}": evaluation.avg_at_k(rewards, samples)}
        for k in self._run.eval.k:
            row[f"eval/pass@{k}"] = evaluation.pass_at_k(rewards >= _RIGHT, k)
        return row
