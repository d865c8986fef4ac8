"""Takes GRPO steps with Tunix on the CPU, fp32, no KL term.

The learner keeps its own loop. The data set waits for the harness before it yields a
step's prompts and answers when the learner comes back for more, which is after the
step's last array is computed.

What is set so that Tunix does the same work as the others:
- its Llama ignores the configured rotary base (always 1e6), so the base is bound here;
- padding is not the end-of-sequence token, else both are masked;
- the sampling key is given anew at every step, else every step draws the same noise.
"""

import functools
import json
import pathlib
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import protocol
import transformers
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

NO_TOKEN = -1  # an end of sequence that is never drawn


def reward(prompts: list[str], completions: list[str], **unused) -> list[float]:
    """Scores completion texts."""
    return [protocol.digit_fraction(text) for text in completions]


def load_model(folder: str, mesh: jax.sharding.Mesh) -> llama.Llama3:
    """Loads a Hugging Face Llama directory in float32."""
    hf = json.loads((pathlib.Path(folder) / "config.json").read_text())
    theta = hf.get("rope_theta") or hf["rope_parameters"]["rope_theta"]
    llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=theta)
    config = llama.ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf["head_dim"],
        num_kv_heads=hf["num_key_value_heads"],
        rope_theta=theta,
        norm_eps=hf["rms_norm_eps"],
        weight_tying=hf["tie_word_embeddings"],
    )
    return llama_params.create_model_from_safe_tensors(
        folder, config, mesh, dtype=jnp.float32
    )


class StepGate:
    """The data set: one batch of prompts for each `run` request."""

    def __init__(self, conversation, requests, texts, config, eos_id):
        self.clock = protocol.StepClock(conversation)
        self.requests = requests
        self.texts = texts
        self.config = config
        self.eos_id = eos_id
        self.cluster = None

    def watch(self, cluster: rl_cluster.RLCluster) -> None:
        """Times the cluster's generation and notes the completion lengths."""
        self.cluster = cluster
        cluster.generate = self.clock.timed(
            cluster.generate, lambda result: result.tokens
        )

    def __iter__(self):
        for request in self.requests:
            self.config.seed = jax.random.PRNGKey(request["seed"])
            fixed = request["fixed_length"]
            self.config.eos_tokens = [NO_TOKEN] if fixed else [self.eos_id]
            start = time.perf_counter()
            yield {"prompts": np.array(self.texts)}
            jax.block_until_ready(nnx.state(self.cluster.actor_trainer.model))
            self.clock.answer(time.perf_counter() - start)


def make_learner(request: dict, conversation, requests):
    """Builds the learner and the data set of a `load` request."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["model"])
    eos_id = tokenizer.eos_token_id
    if tokenizer.pad_token_id in (None, eos_id):
        tokenizer.pad_token = tokenizer.unk_token
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for text in request["prompts"]
    ]
    # One more: Tunix puts a BOS before a text that does not begin with one.
    longest = 1 + max(len(tokenizer.encode(text)) for text in texts)
    model = load_model(request["model"], mesh)
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=request["max_new_tokens"],
        max_prompt_length=longest,
        temperature=1.0,
        top_p=1.0,
        kv_cache_size=longest + request["max_new_tokens"],
    )
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(request["learning_rate"])
        ),
        eval_every_n_steps=10 * request["max_steps"],
        max_steps=request["max_steps"],
        mini_batch_size=len(texts),
        # All prompts at once take 14 GB instead of 10.
        train_micro_batch_size=1,
        rollout_micro_batch_size=len(texts),
        compute_logps_micro_batch_size=len(texts),
    )
    cluster = rl_cluster.RLCluster(
        actor=model,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(rl_cluster.Role, mesh),
            training_config=training,
            rollout_config=rollout,
        ),
    )
    gate = StepGate(conversation, requests, texts, rollout, eos_id)
    gate.watch(cluster)
    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        algo_config=grpo_learner.GRPOConfig(
            num_generations=request["num_samples"], num_iterations=1, beta=0.0
        ),
        reward_fns=reward,
    )
    return learner, gate


def main() -> None:
    conversation = protocol.Conversation()
    requests = conversation.requests()
    try:
        learner, gate = make_learner(next(requests), conversation, requests)
        versions = protocol.versions("jax", "flax", "google-tunix")
        conversation.reply({"versions": versions})
        learner.train(gate)
    except Exception:  # whatever the peer raises is its answer, not our crash
        conversation.reply({"error": traceback.format_exc()})
        raise


if __name__ == "__main__":
    main()
