"""Takes GRPO steps with this package's own trainer, fp32, speculation off.

A step is what `tlt_jax.main` does in one: rollout, rewards, advantages, update, weight
sync, the record written to disk.
"""

import dataclasses
import json
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import protocol

from tlt_jax import config, train
from tlt_jax.models.formats import source
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.runtime import host_memory
from tlt_jax.workdir import progress


class FixedLengthTrainer(train.Trainer):
    """A trainer in whose rollouts no token ends a text."""

    def begin(self) -> None:
        """Begins with other engines in the workers' place."""
        team = self.parts.workers
        endless = dataclasses.replace(team.engines[0].engine_cfg, eos_ids=())
        team.engines = tuple(
            engine_lib.Engine(self.parts.model, endless, mesh=engine.mesh)
            for engine in team.engines
        )
        super().begin()


class Peer:
    """One policy in training; a new one where completions begin to end otherwise."""

    def load(self, request: dict) -> dict:
        """Writes the prompts as a task's file and settles the configuration."""
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.trainer = None
        turns = [[{"role": "user", "content": text}] for text in request["prompts"]]
        task = self.folder / "prompts.jsonl"
        task.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in turns))
        found = source.resolve(request["model"])
        tokenizer = found.tokenizer()
        longest = max(len(tokenizer.encode_prompt(t)) for t in turns)
        samples, new_tokens = request["num_samples"], request["max_new_tokens"]
        self.run_cfg = config.load(
            {
                "num_steps": request["max_steps"],
                # With freed memory kept, computing nothing twice is the faster way.
                "model": {"spec": request["model"], "remat": "none"},
                "task": {
                    "name": str(task),
                    "options": {"holdout_frac": 0.0},
                    "max_prompt_tokens": longest,
                },
                "rollout": {
                    "prompts_per_step": len(turns),
                    "group_size": samples,
                    "max_new_tokens": new_tokens,
                    "max_batch": len(turns) * samples,
                },
                "algorithm": {"kl_coef": 0.0},
                "optimizer": {"learning_rate": request["learning_rate"]},
                # A row holds the longest possible group and no more.
                "learner": {"row_tokens": longest + samples * new_tokens},
                "reward": {"functions": ("protocol:judge",), "workers": 0},
                "log": {
                    "tensorboard": False,
                    "plots_every": 0,
                    "rollouts_every": 0,
                    "progress": "off",
                },
                "checkpoint": {"every": 0},
            }
        )
        return {
            "versions": protocol.versions("jax", "jaxlib"),
            "device": jax.devices()[0].device_kind,
            "model": found.identity,
        }

    def run(self, request: dict) -> dict:
        """Takes one step, from the first prompt to weights in the engine."""
        self._prepare(FixedLengthTrainer if request["fixed_length"] else train.Trainer)
        start = time.perf_counter()
        row = self.trainer.take_step()
        step_s = time.perf_counter() - start
        return {
            "step_s": step_s,
            "generate_s": row["time/rollout_s"],
            "update_s": step_s - row["time/rollout_s"],
            "compile_s": row["time/compile_s"],
            "completion_tokens": row["rollout/tokens"],
            "length_max": row["length/max"],
            "split": {k: row[k] for k in row if k.startswith("time/")},
        }

    def _prepare(self, kind: type[train.Trainer]) -> None:
        """Makes a trainer of this kind with its programs compiled, if need be."""
        if type(self.trainer) is kind:
            return
        if self.trainer is not None:
            self.trainer.__exit__()
            self.trainer = None
        folder = self.folder / kind.__name__
        folder.mkdir()
        display = progress.Progress(self.run_cfg.num_steps, mode="off")
        self.trainer = kind(self.run_cfg, folder, display)
        self.trainer.begin()
        self.trainer.warm_up()


if __name__ == "__main__":
    host_memory.keep_freed()
    peer = Peer()
    protocol.serve({"load": peer.load, "run": peer.run})
