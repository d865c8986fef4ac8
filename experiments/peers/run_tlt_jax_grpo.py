"""Takes GRPO steps with this package's engine and learner, fp32, speculation off.

The pieces are those of a training run: rollout, packing of groups as trees, exact
accumulation over micro-batches, one AdamW step, weights handed back to the engine.
"""

import importlib.metadata
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import numpy as np
import protocol

from tlt_jax import config, sharding, types
from tlt_jax.models import params as model_params
from tlt_jax.models import source
from tlt_jax.rl import algorithms, experience, learner, prompts, rollout
from tlt_jax.specdec import programs

ALGORITHM = algorithms.preset("grpo") | {"kl_coef": 0.0}


class Peer:
    """One policy in training, with an engine for each way that completions end."""

    def load(self, request: dict) -> dict:
        """Loads `model` and makes engines and learner for the given sizes."""
        self.group_size = request["num_samples"]
        self.max_new_tokens = request["max_new_tokens"]
        found = source.resolve(request["model"])
        self.tokenizer = found.tokenizer()
        examples = [
            types.Example(str(i), ({"role": "user", "content": text},), None)
            for i, text in enumerate(request["prompts"])
        ]
        self.prompts = prompts.PromptSet(
            examples,
            lambda example: self.tokenizer.encode_prompt(example.prompt),
            max_tokens=found.config.max_positions,
            long_prompts="refuse",
        ).prompts
        longest = max(len(prompt.tokens) for prompt in self.prompts)
        # A row holds the longest possible group and no more.
        row_tokens = longest + self.group_size * self.max_new_tokens
        run = config.load(
            {
                "num_steps": request["max_steps"],
                "model": {"spec": request["model"], "remat": "full"},
                "task": {"name": "none", "max_prompt_tokens": longest},
                "rollout": {
                    "prompts_per_step": len(self.prompts),
                    "group_size": self.group_size,
                    "max_new_tokens": self.max_new_tokens,
                },
                "optimizer": {"learning_rate": request["learning_rate"]},
                "update": {"row_tokens": row_tokens, "rows_per_micro_batch": 1},
            }
        )
        self.algorithm = algorithms.build(ALGORITHM)
        self.layout = experience.Layout(row_tokens, 1)
        self.pool = programs.ProgramPool()
        self.learner = learner.Learner(
            found.config,
            run,
            mesh=sharding.make_mesh(1, 1, 1, jax.devices()[:1]),
            pool=self.pool,
        )
        self.state = self.learner.init_state(found.load())
        self.unstack = jax.jit(model_params.unstack)
        self.engines = {
            fixed: rollout.Engine(
                found.config,
                rollout.EngineConfig(
                    max_rows=len(self.prompts) * self.group_size,
                    max_length=longest + self.max_new_tokens,
                    eos_ids=() if fixed else found.config.eos_ids,
                ),
            )
            for fixed in (True, False)
        }
        self.version = 0
        self._sync()
        for engine in self.engines.values():
            engine.warm_up()
        names = ("jax", "jaxlib")
        return {
            "versions": {n: importlib.metadata.version(n) for n in names},
            "device": jax.devices()[0].device_kind,
            "model": found.identity,
        }

    def run(self, request: dict) -> dict:
        """Takes one step, from the first prompt to weights in the engine."""
        engine = self.engines[request["fixed_length"]]
        waited_s = self.learner_waited_s
        requests = prompts.requests_of(
            self.prompts, self.group_size, self.max_new_tokens, first_id=0
        )
        start = time.perf_counter()
        completions, stats = engine.run(requests, seed=request["seed"])
        generate_s = time.perf_counter() - start
        texts = [self.tokenizer.decode(c.tokens) for c in completions]
        scores = np.array([protocol.digit_fraction(text) for text in texts])
        batch = experience.Experience(
            self.prompts, completions, scores.reshape(-1, self.group_size)
        )
        advantages = experience.advantages_of(
            batch, self.algorithm, self.max_new_tokens, None
        )
        _, micro_batches = experience.micro_batches(
            batch,
            self.layout,
            self.algorithm,
            advantages,
            max_new_tokens=self.max_new_tokens,
            old_logprobs=None,
            ref_logprobs=None,
        )
        self.state, record, _ = self.learner.update(
            self.state, micro_batches, self.algorithm.loss
        )
        self.version += 1
        self._sync()
        step_s = time.perf_counter() - start
        return {
            "step_s": step_s,
            "generate_s": generate_s,
            "update_s": step_s - generate_s,
            "compile_s": stats.compile_s + self.learner_waited_s - waited_s,
            "lengths": batch.lengths.tolist(),
            "grad_norm": record["policy/grad_norm"],
        }

    @property
    def learner_waited_s(self) -> float:
        """Seconds waited so far for programs of the learner."""
        return self.pool.stats.waited_s

    def _sync(self) -> None:
        """Hands the weights to the engines; on CPUs they decode layer by layer."""
        params = jax.block_until_ready(self.unstack(self.state.params))
        for engine in self.engines.values():
            engine.set_params(params, self.version)


if __name__ == "__main__":
    peer = Peer()
    protocol.serve({"load": peer.load, "run": peer.run})
