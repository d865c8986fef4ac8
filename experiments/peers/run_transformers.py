"""Decodes with `transformers` `generate`: static batch, fp32, default attention."""

import time

import protocol
import torch
import transformers


class Peer:
    """One model, loaded once."""

    def load(self, request: dict) -> dict:
        """Loads `model` (a Hugging Face directory) in float32."""
        transformers.utils.logging.set_verbosity_error()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            request["model"], dtype=torch.float32
        ).eval()
        self.pad_id = self.model.generation_config.pad_token_id or 0
        return {
            "versions": protocol.versions("torch", "transformers"),
            "threads": torch.get_num_threads(),
        }

    def run(self, request: dict) -> dict:
        """Generates exactly `new_tokens` after each of `prompts` (token ids)."""
        torch.manual_seed(request["seed"])
        prompts = request["prompts"]
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        sampled = request["temperature"] > 0
        law = {"temperature": request["temperature"], "top_k": 0, "top_p": 1.0}
        config = transformers.GenerationConfig(
            max_new_tokens=request["new_tokens"],
            do_sample=sampled,
            eos_token_id=None,  # every row does the same work
            pad_token_id=self.pad_id,
            **(law if sampled else {}),
        )
        # What the model's directory says about sampling must not be merged in.
        self.model.generation_config = config
        start = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(input_ids=ids, attention_mask=mask)
        total_s = time.perf_counter() - start
        return {"total_s": total_s, "tokens": out[:, width:].tolist()}


if __name__ == "__main__":
    peer = Peer()
    protocol.serve({"load": peer.load, "run": peer.run})
