"""Every figure and table of the paper, and of ours beyond it, with what makes it.

`experiments/results/<scale>/<table>` is the result of record, and
`experiments/results/mine/<scale>/` what users measure. Scale `cpu` runs on two cores,
`one_gpu` needs one accelerator, `paper` what the paper used; the larger two were never
run and are listed with the commands that would. What is simulated or only compiled is
the same on every machine: it has the scale `cpu` alone.
"""

import importlib
import pathlib

from experiments.lab import experiment as experiment_lib
from experiments.lab import provenance, tables

# Where it stands in the paper: by number where one is known, else by what it shows.
PAPER = {
    "end_to_end": "evaluation, end to end by model",
    "trainer_makespan": "spot trainer, no figure of its own",
    "cluster_size": "table by cluster size",
    "cluster_sensitivity": "table by cluster size",
    "reward_curves": "figure of reward curves",
    "length_tail": "figures 1 and 2",
    "speculation_speed": "table by batch and tokens verified",
    "accept_length": "table by depth and tokens verified",
    "active_batch": "case study of running requests",
    "tuner_regret": "tuner BEG-MAB, no figure of its own",
    "program_pool": "table of graph memory",
    "drafter_adaptation": "table of adaptation, on RL data",
    "drafter_cadence": "adaptive drafter, no figure of its own",
    "transfer": "table of adaptation, downstream",
    "objectives": "table of training objectives",
    "ngram_start": "evaluation, TLT-Base",
    "checkpoint_stall": "figure of checkpoints and packing",
    "packing": "figure of checkpoints and packing",
    "devices": "table by GPU type",
}
OURS = (
    *("losslessness", "decode_speed", "decode_bandwidth", "grpo_step_speed"),
    *("peers_side_by_side", "ahead_of_time", "kernel_ahead_of_time", "tuner_trace"),
    *("step_ahead_of_time", "simulator_check", "planner", "lag", "route_flips"),
    *("drafters", "drafters_smollm2", "drafter_variants", "drafter_limits"),
    *("cluster_placement", "first_contact"),
)
# What compilers make of devices that are not there: experiments and flags, in order.
COMPILED = (
    ("ahead_of_time",),
    ("kernel_ahead_of_time",),
    ("step_ahead_of_time", "--compiled=1,64"),
    ("step_ahead_of_time", "--model=qwen3-30b-a3b", "--batches=1,32,64"),
)
# Of tools that are no matter of seconds on any machine.
_TOOLS = {"first_contact": "one accelerator, seven minutes; never run"}
# Minutes of whole tables of which the record tells the last part alone.
_MINUTES = {"end_to_end": 35.0, "peers_side_by_side": 20.0}
_MACHINES = {
    "one_gpu": "one accelerator; never run, minutes unknown",
    "paper": "8 to 64 H100; never run, minutes unknown",
}


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
            "mine": item.status_in(experiment_lib.own_folder(scale)),
            "of": "paper" if item.slug in PAPER else "ours",
            "what": item.title,
            "paper": PAPER.get(item.slug, ""),
            "published": item.published,
            "takes": takes(item, scale),
            "before": "" if item.larger and scale != "cpu" else "\n".join(item.before),
            "command": item.command(scale),
        }
        for item in every()
    ]


def takes(item: experiment_lib.Experiment, scale: str) -> str:
    """Says what machine and how many minutes a result takes."""
    if item.is_tool:
        return _TOOLS.get(item.slug, "any machine, seconds")
    if scale in _MACHINES and item.larger:
        return _MACHINES[scale]
    record = provenance.read(experiment_lib.record_folder("cpu"), item.slug)
    if not record:
        return "never run"
    minutes = _MINUTES.get(item.slug, provenance.wall_minutes(record))
    told = f"{minutes:.0f} min" if minutes >= 1 else "less than a minute"
    told += f" on {record['num_cpus']} cores ({record['cpu_model']})"
    first = sum(item.before.values())
    return told + (f", and {first} min for what comes first" if first else "")


def check(folder: pathlib.Path) -> list[tables.Row]:
    """Decides every claim by the tables of a folder."""
    return [row for item in every() for row in item.check_claims(folder)]
