"""Every figure and table of the paper, and of ours beyond it, with what makes it.

`experiments/results/<scale>/<table>` is the result. Scale `cpu` runs on two cores,
`one_gpu` needs one accelerator, `paper` what the paper used; the larger two were never
run and are listed with the commands that would. What is simulated or only compiled is
the same on every machine: it has the scale `cpu` alone.
"""

import importlib
import pathlib

from experiments.lab import experiment as experiment_lib
from experiments.lab import tables

PAPER = (
    *("end_to_end", "trainer_makespan", "cluster_size", "cluster_sensitivity"),
    *("reward_curves", "length_tail", "speculation_speed", "accept_length"),
    *("active_batch", "tuner_regret", "program_pool", "drafter_adaptation"),
    *("drafter_cadence", "transfer", "objectives", "ngram_start", "checkpoint_stall"),
    *("packing", "devices"),
)
OURS = (
    *("losslessness", "decode_speed", "decode_bandwidth", "grpo_step_speed"),
    *("peers_side_by_side", "ahead_of_time", "kernel_ahead_of_time", "tuner_trace"),
    *("simulator_check", "planner"),
)


def declared(slug: str) -> experiment_lib.Experiment:
    """Returns an experiment's declaration."""
    return importlib.import_module(f"experiments.{slug}").EXPERIMENT


def every() -> list[experiment_lib.Experiment]:
    """Returns all of them, the paper's first."""
    return [declared(slug) for slug in (*PAPER, *OURS)]


def listing(scale: str) -> list[tables.Row]:
    """Returns a row for each experiment."""
    return [
        {
            "experiment": item.slug,
            "status": item.status(scale),
            "of": "paper" if item.slug in PAPER else "ours",
            "what": item.title,
            "published": item.published,
            "command": item.command(scale),
        }
        for item in every()
    ]


def check(folder: pathlib.Path) -> list[tables.Row]:
    """Decides every claim by the tables of a folder."""
    return [row for item in every() for row in item.check_claims(folder)]
