"""Which columns of the CSVs stand in tables of pages, and how entries are written."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

from experiments.lab import tables

Rows = list[tables.Row]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a page, of a file under results/cpu.

    A heading has a column's name, or what makes an entry of a row; `prepare` is what is
    made of all rows before `keep` chooses.
    """

    file: str
    columns: Mapping[str, str | Callable[[tables.Row], object]]
    keep: Callable[[tables.Row], bool] = lambda row: True
    prepare: Callable[[Rows], Rows] = lambda rows: rows


def _times(name: str) -> Callable[[tables.Row], str]:
    return lambda row: f"{row[name]:.2f}x" if row.get(name) else "-"


def _percent(name: str) -> Callable[[tables.Row], str]:
    return lambda row: f"{row[name]:.0%}" if row[name] is not None else "-"


def _fixed(name: str, digits: int) -> Callable[[tables.Row], str]:
    return lambda row: "-" if row[name] is None else f"{row[name]:.{digits}f}"


def _range(name: str, digits: int) -> Callable[[tables.Row], str]:
    """What rounds or seeds have in the middle, and what they lie between."""

    def entry(row):
        median = row[f"{name}/median"] if f"{name}/median" in row else row[name]
        if median is None:
            return "-"
        low, high = row[f"{name}/min"], row[f"{name}/max"]
        return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    return entry


def _with_error(name: str, digits: int) -> Callable[[tables.Row], str]:
    """A figure and its standard error, where it has one."""

    def entry(row):
        told, error = f"{row[name]:.{digits}f}", row[f"{name}_error"]
        return f"{told} ± {error:.{digits}f}" if error else told

    return entry


def _gib(row: tables.Row, name: str) -> str:
    """Bytes of a program; what was not compiled has none."""
    return "-" if row[name] is None else f"{row[name] / 2**30:.1f} GiB"


def _by_recipe(rows: Rows) -> Rows:
    """Puts what a recipe's programs take of a device into one row, in GiB.

    Of the drafter's training it is the largest program's.
    """
    most: dict[tuple[str, str], tables.Row] = {}
    for row in rows:
        kind = re.sub(r"_\d+$|(?<=drafter)_\w+$", "", str(row["program"]))
        key = str(row["model"]), kind
        most[key] = max(
            most.get(key, row), row, key=lambda one: one["total_bytes"] or 0
        )
    found: dict[str, tables.Row] = {}
    for (model, kind), row in most.items():
        chip, _, shape = str(row["slice"]).partition(":")
        count = math.prod(map(int, shape.split("x")))
        empty = {"devices": f"{count} {chip}"} | dict.fromkeys(_PROGRAMS)
        found.setdefault(model, row | empty)[kind] = _gib(row, "total_bytes")
    return list(found.values())


_PROGRAMS = ("accumulate", "apply", "sync", "prefill", "decode")
_PROGRAMS += ("tlt_decode", "tlt_speculate", "drafter")
_SYSTEMS = {
    "off": "everything off",
    "ngram": "matches alone",
    "frozen": "a frozen drafter",
    "tlt": "everything on",
    "threshold": "paper's rule",
    "cost_model": "our tuner",
}
_GIVEN = {"lengths": "lengths", "drafts": "and drafts", "speed": "and speed"}
_PEERS = {
    "tlt_jax": "ours",
    "transformers": "transformers",
    "llamacpp": "llama.cpp, f32",
    "vllm": "vLLM CPU",
    "trl": "TRL",
    "tunix": "Tunix",
}


def _clusters(rows: Rows) -> Rows:
    """Puts what other systems had into each row of a cluster."""
    found = {(r["model"], r["devices"], r["system"]): r for r in rows}
    for (*key, _), row in found.items():
        row["ours"] = found[*key, "cost_model"]["times_faster"]
        row["off_rollout_frac"] = found[*key, "off"]["rollout_frac"]
    return rows


def _by_batch(rows: Rows) -> Rows:
    """Puts a system's batch sizes into one row, greedy decoding only."""

    def told(row):
        times = row["tokens_per_s/times"]
        more = f" (ours {times:.2f}x)" if times else ""
        return f"{row['tokens_per_s/median']:.0f}{more}"

    by_system = tables.groups(tables.where(rows, temperature=0), "system")
    return [
        {"system": system, **{f"batch {row['batch']}": told(row) for row in its}}
        for (system,), its in by_system.items()
    ]


def _drafters(rows: Rows) -> Rows:
    """Puts the tasks that a drafter was measured on into one row."""

    def told(row):
        more = "" if row["trained_on"] == "start" else f" ({row['of_start']:.2f}x)"
        return f"{row['accept_length']:.2f}{more}"

    return [
        {
            "drafter": name if name == "start" else f"then on {name}",
            **{row["measured_on"]: told(row) for row in its},
        }
        for (name,), its in tables.groups(rows, "trained_on").items()
    ]


def _sum_of_known(rows: Rows, name: str) -> int | None:
    """Adds up what was compared; nothing was: None."""
    known = [row[name] for row in rows if row[name] is not None]
    return sum(known) if known else None


def _flips(rows: Rows) -> Rows:
    """Puts meshes into one row, short runs only."""

    def told(row):
        if not row["flips/max"]:
            return "0"
        return f"{row['flips']:.2%} ({row['flips/max']:.1%})"

    short = tables.where(rows, steps=min(tables.column(rows, "steps")))
    names = ("precision", "routes", "speculation")
    return [
        dict(zip(names, key, strict=True))
        | {row["mesh"]: told(row) for row in its}
        | {
            "mismatch": max(tables.column(its, "mismatch/max")),
            "accept_length": its[0]["accept_length"],
            # Plain decoding is no check of itself.
            "steps_differing": (
                None if key[-1] == "off" else _sum_of_known(its, "steps_differing")
            ),
        }
        for key, its in tables.groups(short, *names).items()
    ]


def _is_main_job(row: tables.Row) -> bool:
    return row.get("model") == "smollm2" and row.get("processes") == 2


_STEP: Mapping[str, str | Callable[[tables.Row], object]] = {
    "chips": lambda row: f"{row['num_chips']} x {row['chip']}",
    "rows": "batch",
    "step": "program",
    "columns": "columns",
    "operations": lambda row: f"{row['flops'] / 1e12:.2f}e12",
    "of plain": _times("flops_of_plain"),
    "bytes": lambda row: f"{row['bytes'] / 1e9:.1f} GB",
    "of plain's": _times("bytes_of_plain"),
    "at the least, in plain steps": _times("bound_of_plain"),
    "temporaries of a chip": lambda row: _gib(row, "temp_bytes"),
    "all of a chip": lambda row: _gib(row, "total_bytes"),
}

TABLES = {
    # Of the README: the main job alone.
    "end_to_end_short": Table(
        "end_to_end_summary.csv",
        {
            "SmolLM2-135M, 20 RL steps": lambda row: _SYSTEMS[row["system"]],
            "rollout, drafter, update, sync": lambda row: f"{row['seconds']:.0f} s",
            "times as fast": _times("times_faster"),
            "rollout alone": _times("rollout_times_faster"),
            "accept length": _fixed("accept_length", 1),
        },
        keep=_is_main_job,
    ),
    "end_to_end": Table(
        "end_to_end_summary.csv",
        {
            # Tables from before there were several models are of the first.
            "model": lambda row: row.get("model", "smollm2"),
            "processes": lambda row: row.get("processes", 1),
            "": lambda row: _SYSTEMS[row["system"]],
            "RL steps": "steps",
            "rollout, drafter, update, sync": lambda row: f"{row['seconds']:.0f} s",
            "times as fast": _times("times_faster"),
            "worst step": _times("times_faster/worst_step"),
            "rollout alone": _times("rollout_times_faster"),
            "accept length": _fixed("accept_length", 1),
            "workers idle": _percent("idle_frac"),
            "of it trained": _percent("trained_of_idle"),
        },
    ),
    "speculation_speed": Table(
        "speculation_speed_summary.csv",
        {
            "batch": "batch",
            "strategy": "system",
            "accept length": _fixed("accept_length", 1),
            "a step costs, in plain steps": _fixed("step_cost", 2),
            "times plain": _times("speedup"),
            "noise, of a step": lambda row: f"{row['noise_ms'] / row['step_ms']:.1%}",
        },
        keep=lambda row: row["system"] != "plain",
    ),
    "accept_length": Table(
        "accept_length.csv",
        {
            "text": "texts",
            "temperature": "temperature",
            "nats a token": _fixed("nats_per_token", 2),
            "strategy": "strategy",
            "ranking or rule": "ranking",
            "accept length": _fixed("accept_length", 2),
            "of deterministic": _times("times_deterministic"),
            "of keyed chains as deep": _times("times_keyed_chain"),
        },
    ),
    "step_ahead_of_time": Table(
        "step_ahead_of_time.csv",
        _STEP,
        keep=lambda row: not row.get("model"),
    ),
    "mixture_step": Table(
        "step_ahead_of_time.csv",
        _STEP,
        keep=lambda row: row.get("model") == "qwen3-30b-a3b",
    ),
    "recipes": Table(
        "ahead_of_time.csv",
        {
            "`--config=configs/grpo.py:`": lambda row: f"`{row['model']}`",
            "devices": "devices",
            "rows of an engine": "max_batch",
            **{f"`{kind}`": kind for kind in _PROGRAMS},
            "a device has": lambda row: _gib(row, "hbm_bytes"),
        },
        prepare=_by_recipe,
    ),
    "route_flips": Table(
        "route_flips_summary.csv",
        {
            "precision": "precision",
            "`learner.routes`": "routes",
            "speculation": "speculation",
            "flips, 1 device": lambda row: row.get("1 device"),
            "2 fsdp x 2 experts": lambda row: row.get("2 fsdp x 2 experts"),
            "log-prob mismatch, nats": lambda row: f"{row['mismatch']:.2g}",
            "accept length": _fixed("accept_length", 2),
            "steps with other tokens": "steps_differing",
        },
        prepare=_flips,
    ),
    "trainer_makespan": Table(
        "trainer_makespan_summary.csv",
        {
            "processes": "processes",
            "": "system",
            "rollouts of a round, s": _range("rollout_s", 1),
            "times as long": _with_error("times_as_long", 3),
            "decode step, ms": _fixed("step_ms", 1),
            "idle time trained": _percent("trained_of_idle"),
        },
    ),
    "drafter_adaptation": Table(
        "drafter_adaptation_summary.csv",
        {
            "drafter": "system",
            "updates": "num_updates",
            "accept length, steps in which they differ": _fixed("accept_length", 2),
            "last quarter of them": _fixed("accept_length/last_quarter", 2),
        },
    ),
    "drafter_cadence": Table(
        "drafter_cadence_summary.csv",
        {
            "drift": lambda row: (
                f"{row['drift']} (weights moved {row['policy_distance']:.1%})"
            ),
            "updates": "system",
            "accept length after the warm-up": _fixed("accept_length/after_warm_up", 2),
            "last quarter": _fixed("accept_length/last_quarter", 2),
            "of one warm-up's": _times("of_warm_up/last_quarter"),
        },
    ),
    "drafters": Table(
        "drafters_summary.csv",
        {
            "drift": lambda row: f"{row['drift']} ({row['policy_distance']:.1%})",
            **{name: name for name in ("drafter", "schedule", "seeds")},
            "updates": "num_updates",
            "GFLOP": _fixed("gflop", 0),
            **{name: _fixed(name, 2) for name in ("keyed", "rejection", "block")},
            "keyed, of frozen": _times("of_frozen/keyed"),
            "block, of frozen": _times("of_frozen/block"),
            "block, drafts sharpened": _fixed("block_sharpened", 2),
        },
    ),
    "transfer": Table(
        "transfer_summary.csv",
        {
            "drafter": "drafter",
            "counting up": "up",
            "counting down": "down",
            "alphabet": "letters",
        },
        prepare=_drafters,
    ),
    "objectives": Table(
        "objectives_summary.csv",
        {
            "objective": "case",
            "seeds": "seeds",
            "updates": "updates",
            "unrolled steps": "unrolled",
            "accept length, coupled": _range("accept_length/coupled", 2),
            "deterministic": _range("accept_length/deterministic", 2),
        },
    ),
    "ngram_start": Table(
        "ngram_start_summary.csv",
        {
            "": "system",
            "RL steps": "steps",
            "tokens per row and step": _range("tokens_per_row_step", 2),
            "before the drafter is ready": _range("early_tokens_per_row_step", 2),
        },
    ),
    "tuner_regret": Table(
        "tuner_regret_summary.csv",
        {
            "trace": "world",
            "tuner": "tuner",
            "regret": lambda row: f"{row['regret_s']:.1f} s",
            "of BEG-MAB's": _fixed("of_beg_mab", 2),
            "worst seed": _fixed("of_beg_mab_max", 2),
            "time, of the oracle's": _times("times_oracle"),
        },
        keep=lambda row: str(row["world"]).startswith("recorded"),
    ),
    "checkpoint_stall": Table(
        "checkpoint_stall_summary.csv",
        {
            "drafter of": "target",
            "mode": "system",
            "stall, ms": _range("stall_ms", 0),
            "stall and the next step, ms": _range("stall_and_step_ms", 0),
        },
    ),
    "packing": Table(
        "packing_summary.csv",
        {
            "layout": "system",
            "texts per second": _range("texts_per_s", 1),
            "columns that hold a token": _percent("fill_frac/median"),
            "packed is": _times("texts_per_s/times"),
        },
    ),
    "decode_speed": Table(
        "decode_speed_summary.csv",
        {
            "": lambda row: _PEERS.get(row["system"], row["system"]),
            "batch 1": lambda row: row.get("batch 1"),
            "batch 8": lambda row: row.get("batch 8"),
            "batch 32": lambda row: row.get("batch 32"),
        },
        prepare=_by_batch,
    ),
    "decode_bandwidth": Table(
        "decode_bandwidth_summary.csv",
        {
            "cached": "context",
            "temperature": "temperature",
            "tokens per second": _fixed("tokens_per_s/median", 1),
            "least bytes a token": lambda row: f"{row['minimal_bytes'] / 1e6:.0f} MB",
            "bandwidth limit": lambda row: f"{row['limit_gb_per_s/median']:.1f} GB/s",
            "share of it": _percent("bandwidth_frac/median"),
        },
    ),
    "grpo_step_speed": Table(
        "grpo_step_speed_summary.csv",
        {
            "lengths": "lengths",
            "": lambda row: _PEERS.get(row["system"], row["system"]),
            "a step, s": _range("steady_step_s", 1),
            "generation, s": _fixed("generate_s/median", 1),
            "update, s": _fixed("update_s/median", 1),
            "ours is": _times("steady_step_s/times"),
            "worst round": _times("steady_step_s/times_min"),
        },
    ),
    "cluster_size": Table(
        "cluster_size.csv",
        {
            "model": "model",
            "H100": "devices",
            "paper": _times("published"),
            "paper's rule, simulated": _times("times_faster"),
            "our tuner, simulated": _times("ours"),
            "rollout, of a step with everything off": _percent("off_rollout_frac"),
        },
        keep=lambda row: row["system"] == "threshold",
        prepare=_clusters,
    ),
    "cluster_placement": Table(
        "cluster_placement.csv",
        {
            "model": "model",
            "H100": "devices",
            "rollout workers": "placement",
            "lag": "lag",
            "learner's own": lambda row: row["learner_devices"] or "-",
            "a step, s": _fixed("step_s", 0),
            "of colocated": _times("of_colocated"),
            "of everything off": _times("times_faster"),
            "weights, s": lambda row: f"{row['send_s']:.1f}" if row["send_s"] else "-",
            "learner waits": lambda row: (
                f"{row['learner_idle_frac']:.0%}" if row["learner_devices"] else "-"
            ),
        },
    ),
    "devices": Table(
        "devices.csv",
        {
            "device": "device",
            "predicted": _times("times_faster"),
            "paper": _times("published"),
        },
    ),
    "simulator_check": Table(
        "simulator_check_summary.csv",
        {
            "run": lambda row: _SYSTEMS[row["system"]],
            "given": lambda row: _GIVEN[row["given"]],
            "recorded s": "rollout_s/run",
            "simulated s": "rollout_s",
            "ratio": _fixed("ratio", 2),
            "a single RL step is off by": _percent("median_step_error"),
            "the worst": _percent("worst_step_error"),
            "within 10 %": lambda row: (
                f"{row['steps_within_tolerance']} of {row['steps']}"
            ),
        },
    ),
}
