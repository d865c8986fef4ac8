"""Takes GRPO steps with TRL's `GRPOTrainer` on the CPU, fp32, no KL term.

The trainer keeps its own loop. A callback waits for the harness before each step and
answers after it, so that a step is timed from its first prompt to its new weights.
"""

import tempfile
import time
import traceback

import datasets
import protocol
import torch
import transformers
import trl


def reward(completions: list, **unused) -> list[float]:
    """Scores conversational completions."""
    return [protocol.digit_fraction(turns[0]["content"]) for turns in completions]


class StepGate(transformers.TrainerCallback):
    """Lets one step through for each `run` request."""

    def __init__(self, conversation: protocol.Conversation, requests):
        self.clock = protocol.StepClock(conversation)
        self.requests = requests
        self.trainer = None

    def watch(self, trainer: trl.GRPOTrainer) -> None:
        """Times the trainer's generation and notes the completion lengths."""
        self.trainer = trainer
        trainer._generate_single_turn = self.clock.timed(
            trainer._generate_single_turn, lambda result: result[0]
        )

    def on_step_begin(self, args, state, control, **kwargs):
        request = next(self.requests, None)
        if request is None:
            raise SystemExit(0)
        torch.manual_seed(request["seed"])
        fixed = request["fixed_length"]
        limit = self.trainer.max_completion_length
        self.trainer.generation_config.min_new_tokens = limit if fixed else None
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.clock.answer(time.perf_counter() - self.start)


def make_trainer(request: dict, gate: StepGate) -> trl.GRPOTrainer:
    """Builds the trainer of a `load` request."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["model"])
    turns = [[{"role": "user", "content": text}] for text in request["prompts"]]
    rows = len(turns) * request["num_samples"]
    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,  # faster where memory is no concern
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        num_generations=request["num_samples"],
        max_completion_length=request["max_new_tokens"],
        shuffle_dataset=False,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        learning_rate=request["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=request["max_steps"],
        report_to="none",
        save_strategy="no",
        logging_steps=10_000,
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=datasets.Dataset.from_dict(
            {"prompt": turns * request["max_steps"]}
        ),
        processing_class=tokenizer,
        callbacks=[gate],
    )
    gate.watch(trainer)
    return trainer


def main() -> None:
    conversation = protocol.Conversation()
    requests = conversation.requests()
    try:
        load = next(requests)
        trainer = make_trainer(load, StepGate(conversation, requests))
        versions = protocol.versions("torch", "transformers", "trl")
        threads = torch.get_num_threads()
        conversation.reply({"versions": versions, "threads": threads})
        trainer.train()
    except Exception:  # whatever the peer raises is its answer, not our crash
        conversation.reply({"error": traceback.format_exc()})
        raise


if __name__ == "__main__":
    main()
