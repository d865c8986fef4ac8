"""Accept length over RL steps: a drafter that goes on learning, and one that stopped.

    python -m experiments.drafter_adaptation --scale=cpu

Two runs of one recipe take their steps in turns in this process. In both the drafter
learns from random weights for `--warm-steps` RL steps; then one of them gets no more
texts. Tokens and policies are the same in both, since speculation changes none, so what
differs between the curves is the drafter alone: how far the policy has moved away from
the one that it knew. Accept lengths are the engine's own, of one fixed strategy.

Reproduces: the paper's accept length 4.59 -> 6.53 by adaptation (Qwen2.5-7B, H100), in
kind and not in size.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import pathlib
import runpy
import statistics
import tempfile

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments import harness
from tlt_jax import compile_cache, config, progress, train
from tlt_jax.rl import drafter_budget

SLUG = "drafter_adaptation"
ADAPTED, FROZEN = "adapted", "frozen"
# One worker: the drafter trains between rollout and update, as long as the rollout
# took at most.
SETTINGS = {
    "specdec.mode": "tlt",
    "specdec.tuner": "static",
    "specdec.strategies": ("32:D4K1V5",),
    "specdec.ngram_strategies": (),
    "drafter.features": "last",
    "adaptation.num_steps": 4,
    "adaptation.row_tokens": 128,
    "adaptation.row_bases": 96,
    "adaptation.num_rows": 4,
    "adaptation.max_frac": 1.0,
    "learner.old_logprobs": "recompute",
    "checkpoint.every": 0,
    "log.progress": "off",
    "log.tensorboard": False,
}


@dataclasses.dataclass(frozen=True)
class Always(drafter_budget.Budget):
    """Trains as long as it may, whether that pays or not: here nobody is in a hurry."""

    def seconds(self, rollout_s: float, max_frac: float) -> float:
        """Returns the limit."""
        return max_frac * rollout_s

    def trained(self, seconds: float, before: float, after: float) -> "Always":
        """Learns nothing."""
        del seconds, before, after
        return self


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_options(parser)
    parser.add_argument("--config", default="configs/tiny.py:count")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm-steps", type=int, default=12)
    return parser.parse_args(arguments)


def run_of(options: argparse.Namespace) -> config.RunConfig:
    """Returns the recipe of both runs."""
    path, _, argument = options.config.partition(":")
    recipe = runpy.run_path(path)["get_config"](argument)
    recipe.update_from_flattened_dict(SETTINGS | {"num_steps": options.steps})
    return config.load(recipe)


def take_step(trainer: train.Trainer, frozen: bool) -> harness.Row:
    """Takes a step; a frozen drafter gets no text and forgets those it had."""
    if frozen:
        trainer.workers.capture_frac = 0.0
        trainer.adaptation.buffer.drop_older_than(trainer.run.num_steps + 2)
    row = trainer.take_step()
    return {
        "accept_length": row["specdec/accept_length"],
        "ready": row["drafter/ready"],
        "num_updates": row["drafter/num_updates"],
        "reward": row["reward/mean"],
        "rollout_tokens": row["rollout/tokens"],
        "tokens_digest": row["rollout/tokens_digest"],
        "policy_loss": row["policy/loss"],
    }


def summary_of(rows: list[harness.Row], warm_steps: int) -> list[harness.Row]:
    """Averages the steps after the warm-up, and their last quarter."""
    summary = []
    for system in (ADAPTED, FROZEN):
        its = [row for row in rows if row["system"] == system]
        after = [row["accept_length"] for row in its if row["round"] >= warm_steps]
        tail = after[-max(len(after) // 4, 1) :]
        summary.append(
            {
                "system": system,
                "steps": len(after),
                "accept_length": statistics.mean(after),
                "accept_length/last_quarter": statistics.mean(tail),
                "num_updates": its[-1]["num_updates"],
                "reward_first": its[0]["reward"],
                "reward_last": its[-1]["reward"],
            }
        )
    pairs: dict[int, set] = {}
    for row in rows:
        same = row["tokens_digest"], row["policy_loss"]
        pairs.setdefault(row["round"], set()).add(same)
    differing = sum(len(found) > 1 for found in pairs.values())
    for entry in summary:
        entry["steps_differing"] = differing
    return summary


def plot(rows: list[harness.Row], warm_steps: int, path: pathlib.Path) -> None:
    """Draws both accept lengths, and the reward that moves the policy."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for system, style in ((ADAPTED, "-"), (FROZEN, "--")):
        its = [row for row in rows if row["system"] == system]
        steps = [row["round"] + 1 for row in its]
        axes.plot(steps, [row["accept_length"] for row in its], style, label=system)
    axes.axvline(warm_steps + 0.5, color="grey", linewidth=0.8)
    axes.set_xlabel("RL step (the frozen drafter stops learning at the line)")
    axes.set_ylabel("accept length")
    axes.set_ylim(bottom=1)
    rewards = axes.twinx()
    its = [row for row in rows if row["system"] == ADAPTED]
    values = [row["reward"] for row in its]
    rewards.plot(steps, values, ":", color="grey", label="reward (same in both)")
    rewards.set_ylabel("mean reward")
    rewards.set_ylim(0, 1)
    figure.legend(loc="outside upper center", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[harness.Row]:
    """Runs the experiment; returns the summary that it also writes."""
    options = parse_arguments(arguments)
    compile_cache.enable()
    run = run_of(options)
    settings = {
        "config": config.to_dict(run),
        "warm_steps": options.warm_steps,
    }
    versions = {"jax": importlib.metadata.version("jax")}
    provenance = harness.Provenance(SLUG, settings, versions)
    with contextlib.ExitStack() as closing:
        folder = pathlib.Path(closing.enter_context(tempfile.TemporaryDirectory()))
        trainers = {}
        for name in (ADAPTED, FROZEN):
            (folder / name).mkdir()
            display = progress.Progress(run.num_steps, mode="off")
            made = train.Trainer(run, folder / name, display)
            trainers[name] = closing.enter_context(made)
            made.adaptation.budget = Always()
            made.begin()

        def measure(name, case, number):
            del case
            frozen = name == FROZEN and number >= options.warm_steps
            return take_step(trainers[name], frozen)

        rows = harness.run_paired(
            [ADAPTED, FROZEN], [{}], measure, rounds=options.steps, warmups=0
        )
    summary = summary_of(rows, options.warm_steps)
    harness.write_results(options, SLUG, rows, summary, provenance)
    out = harness.folder_of(options)
    plot(rows, options.warm_steps, out / f"{SLUG}.png")
    return summary


if __name__ == "__main__":
    main()
