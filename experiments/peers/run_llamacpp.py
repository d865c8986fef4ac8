"""Decodes with llama.cpp (the `xllamacpp` build) in its server form, fp32 weights.

Keys and values stay in llama.cpp's default precision (float16): the faster choice.
"""

import time

import protocol
import xllamacpp


class Peer:
    """One server, loaded once."""

    def load(self, request: dict) -> dict:
        """Loads `gguf` with a slot of `max_length` tokens for each of `max_batch`."""
        params = xllamacpp.CommonParams()
        params.model.path = request["gguf"]
        params.n_parallel = request["max_batch"]
        params.n_ctx = request["max_batch"] * request["max_length"]
        params.cpuparams.n_threads = request["threads"]
        params.cpuparams_batch.n_threads = request["threads"]
        params.cache_prompt = False  # a prompt costs what it costs the first time
        params.cache_ram_mib = 0
        params.fit_params = False
        params.warmup = True
        self.server = xllamacpp.Server(params)
        return {
            "versions": protocol.versions("xllamacpp"),
            "threads": request["threads"],
            "build": str(xllamacpp.BUILD_INFO),
        }

    def run(self, request: dict) -> dict:
        """Generates exactly `new_tokens` after each of `prompts` (token ids)."""
        body = {
            "prompt": request["prompts"],
            "n_predict": request["new_tokens"],
            "temperature": request["temperature"],
            "samplers": ["temperature"],  # no top-k, top-p or min-p
            "seed": request["seed"],
            "ignore_eos": True,
            "cache_prompt": False,
        }
        start = time.perf_counter()
        answer = self.server.handle_completions(body)
        total_s = time.perf_counter() - start
        if "error" in answer:
            raise RuntimeError(f"llama.cpp refused the request: {answer['error']}")
        if answer["timings"]["predicted_n"] != request["new_tokens"]:
            raise RuntimeError(f"llama.cpp stopped early: {answer['timings']}")
        # This interface answers text alone; token ids would cost probabilities.
        rows = sorted(answer["choices"], key=lambda row: row["index"])
        return {"total_s": total_s, "texts": [row["text"] for row in rows]}


if __name__ == "__main__":
    peer = Peer()
    protocol.serve({"load": peer.load, "run": peer.run})
