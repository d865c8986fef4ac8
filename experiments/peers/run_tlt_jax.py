"""Decodes with this package's rollout engine, fp32, on the first device."""

import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import numpy as np
import protocol

from tlt_jax import types
from tlt_jax.models import params as model_params
from tlt_jax.models.formats import source
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import programs as engine_programs
from tlt_jax.specdec import sampling


class Peer:
    """One model, and an engine for each temperature asked for."""

    def load(self, request: dict) -> dict:
        """Loads `model`, any spec of `models.formats.source`, in float32."""
        self.settings = request
        self.source = source.resolve(request["model"])
        # On CPUs a loop over layers that is written out is the faster one.
        self.params = model_params.unstack(self.source.load())
        self.tokenizer = self.source.tokenizer()
        self.engines = {}
        return {
            "versions": protocol.versions("jax", "jaxlib"),
            "device": jax.devices()[0].device_kind,
            "model": self.source.identity,
        }

    def encode(self, request: dict) -> dict:
        """Returns the token ids of chats, as every peer is given them."""
        chats = request["messages"]
        return {"ids": [self.tokenizer.encode_prompt(c).tolist() for c in chats]}

    def run(self, request: dict) -> dict:
        """Generates exactly `new_tokens` after each of `prompts` (token ids).

        Rows of equal `prompt_ids` have equal prompts: a group.
        """
        engine = self._engine(request["temperature"])
        requests = [
            types.Request(
                request_id=row,
                prompt_id=prompt_id,
                sample=0,
                prompt=np.asarray(ids, np.int32),
                max_new_tokens=request["new_tokens"],
            )
            for row, (ids, prompt_id) in enumerate(
                zip(request["prompts"], request["prompt_ids"], strict=True)
            )
        ]
        start = time.perf_counter()
        completions, stats = engine.run(requests, seed=request["seed"])
        total_s = time.perf_counter() - start
        return {
            "total_s": total_s,
            "tokens": [completion.tokens.tolist() for completion in completions],
            "engine_prefill_s": stats.prefill_s,
            "engine_decode_s": stats.decode_s,
            "compile_s": stats.compile_s,
        }

    def _engine(self, temperature: float) -> engine_lib.Engine:
        if temperature not in self.engines:
            engine = engine_lib.Engine(
                self.source.config,
                engine_programs.EngineConfig(
                    max_rows=self.settings["max_batch"],
                    max_length=self.settings["max_length"],
                    prefill_chunk=64,  # chat prompts are short: less padding
                    sampling_cfg=sampling.SamplingConfig(temperature=temperature),
                    eos_ids=(),  # every row does the same work
                ),
            )
            engine.set_params(self.params, version=0)
            self.engines[temperature] = engine
        return self.engines[temperature]


if __name__ == "__main__":
    peer = Peer()
    protocol.serve({"load": peer.load, "encode": peer.encode, "run": peer.run})
