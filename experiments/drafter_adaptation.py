"""Accept length over RL steps: a drafter that goes on learning, and one that stopped.

    python -m experiments.drafter_adaptation --scale=cpu

Two runs of one small recipe (`configs/tiny.py:count`). In both the drafter learns from
random weights for `--warm-steps` RL steps, the same number of updates after each
rollout; then one of them learns no more. Tokens and policies are the same in both,
since speculation changes none, so what differs between the curves is the drafter alone:
how far the policy has moved away from the one that it knew. Accept lengths are the
engine's own, of one fixed strategy. `experiments.drafter_cadence` compares at equal
cost.

Reproduces: the paper's accept length 4.59 -> 6.53 by adaptation (Qwen2.5-7B, H100), in
kind and not in size.
"""

import argparse
import importlib.metadata
import pathlib
import statistics

from experiments.lab import cells, drafter_runs, harness, plotting

SLUG = "drafter_adaptation"
RECIPE = "configs/tiny.py:count"
ADAPTED, FROZEN = "adapted", "frozen"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=RECIPE)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm-steps", type=int, default=12)
    parser.add_argument(
        "--updates", type=int, default=12, help="of the drafter, after a rollout"
    )
    parser.add_argument("--seeds", type=int, default=2)
    cells.add_options(parser)
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, cell: cells.Cell) -> list[harness.Row]:
    """Runs the recipe with one of the drafters."""
    system = cell.overrides["system"]
    settings = drafter_runs.settings_of(
        options.config,
        {"num_steps": options.steps, "seed": cell.seed},
        options.updates,
    )

    def trains(number):
        return system == ADAPTED or number < options.warm_steps

    return [
        {
            "system": system,
            "seed": cell.seed,
            "step": row["step"],
            "accept_length": row["specdec/accept_length"],
            "num_updates": row["drafter/num_updates"],
            "reward": row["reward/mean"],
            "rollout_tokens": row["rollout/tokens"],
            "tokens_digest": row["rollout/tokens_digest"],
            "policy_loss": row["policy/loss"],
        }
        for row in drafter_runs.run(settings, trains)
    ]


def summary_of(rows: list[harness.Row], warm_steps: int) -> list[harness.Row]:
    """Takes means over the steps in which the drafters differ, and over seeds."""
    last = max(row["step"] for row in rows)
    adapted = {(r["seed"], r["step"]): r for r in rows if r["system"] == ADAPTED}
    summary = []
    for system in dict.fromkeys(row["system"] for row in rows):
        its = [row for row in rows if row["system"] == system]
        after = [row for row in its if row["step"] > warm_steps]
        tail = [row for row in after if row["step"] > last - (last - warm_steps) // 4]
        summary.append(
            {
                "system": system,
                "seeds": len({row["seed"] for row in its}),
                "steps": len(after),
                "accept_length": statistics.mean(r["accept_length"] for r in after),
                "accept_length/last_quarter": statistics.mean(
                    row["accept_length"] for row in tail
                ),
                "num_updates": max(row["num_updates"] for row in its),
                "reward_first": statistics.mean(
                    row["reward"] for row in its if row["step"] == 1
                ),
                "reward_last": statistics.mean(
                    row["reward"] for row in its if row["step"] == last
                ),
                "steps_differing": sum(
                    row[name] != adapted[row["seed"], row["step"]][name]
                    for row in its
                    for name in ("tokens_digest", "policy_loss")
                ),
            }
        )
    return summary


def plot(
    rows: list[harness.Row], warm_steps: int, path: pathlib.Path, stamp: str
) -> None:
    """Draws both accept lengths, and the reward that moves the policy."""
    fig, (left, right) = plotting.panels(
        "A drafter that goes on learning, and one that stopped", 2, stamp
    )
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    for seed, color in zip(seeds, plotting.COLORS, strict=False):
        for system, style in ((ADAPTED, "-"), (FROZEN, "--")):
            its = [r for r in rows if (r["system"], r["seed"]) == (system, seed)]
            steps = [row["step"] for row in its]
            lengths = [row["accept_length"] for row in its]
            label = f"{system}, seed {seed}"
            left.plot(steps, lengths, style, color=color, label=label)
        rewards = [row["reward"] for row in its]
        right.plot(steps, rewards, color=color, label=f"seed {seed}")
    left.axvline(warm_steps + 0.5, color=plotting.GREY, linewidth=0.8)
    left.set_xlabel("RL step (at the line the frozen one stops)")
    left.set_ylabel("accept length")
    left.set_ylim(bottom=1)
    right.set_xlabel("RL step")
    right.set_ylabel("mean reward, the same with both")
    right.set_ylim(0, 1)
    plotting.save(fig, path)


def main(arguments: list[str] | None = None) -> list[harness.Row]:
    """Runs the experiment; returns the summary that it also writes."""
    options = parse_arguments(arguments)
    settings = {
        "config": options.config,
        "steps": options.steps,
        "warm_steps": options.warm_steps,
        "updates": options.updates,
    }
    versions = {"jax": importlib.metadata.version("jax")}
    provenance = harness.Provenance(SLUG, settings, versions)
    wanted = [
        cells.Cell({"system": system}, seed)
        for seed in range(options.seeds)
        for system in (ADAPTED, FROZEN)
    ]
    rows = cells.run(
        options, SLUG, provenance, wanted, lambda cell: measure(options, cell)
    )
    summary = summary_of(rows, options.warm_steps)
    harness.write_summary(options, SLUG, summary)
    path = harness.folder_of(options) / f"{SLUG}.png"
    plot(rows, options.warm_steps, path, plotting.stamp(provenance.record))
    return summary


if __name__ == "__main__":
    main()
