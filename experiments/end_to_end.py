r"""Whole RL runs with everything off, with matches, a frozen drafter, everything on.

    python -m experiments.end_to_end --scale=cpu --processes=2
    python -m experiments.end_to_end --scale=cpu --systems=off,ngram,frozen,tlt \
        --processes=2 --set=drafter.directory=workdirs/counting_drafter
    python -m experiments.end_to_end --scale=cpu --systems=off,ngram,tlt \
        --models=tiny=configs/tiny.py:count --set=drafter.features=last

A recipe is run once with each system, one after the other, each as a user would run it:
its workers as threads of one process or divided among `--processes`. Digests of tokens,
rewards and the policy's losses must agree, step by step. The ratio is that of rollout,
the drafter's training between rollout and update (with one worker), update and sync;
judging answers and compiling stand apart.
The tail says what was there to be won: lengths at 50 and 95 percent and the longest,
and the share of time in which workers wait.

Systems: `off`; `ngram`, matches of earlier text alone (the paper's TLT-Base); `frozen`,
a drafter trained before (`drafter.directory`) that learns no more; `tlt`, everything.
Each recipe has a drafter of its own: SmolLM2's of this task is trained by

    python -m tlt_jax.train_drafter --config=configs/smollm2_drafter.py:counting \
        --workdir=workdirs/counting_drafter

Target: at least 1.5 times on CPU, on a long-tailed workload.
"""

import argparse
import dataclasses
import pathlib
import shutil
import statistics
import tempfile

from experiments.lab import claims, experiment, plotting, provenance, recipes, tables
from tlt_jax.workdir import metrics

OFF = "off"
SYSTEMS = {
    OFF: {"specdec.mode": "off"},
    "ngram": {"specdec.mode": "ngram"},
    "frozen": {"specdec.mode": "tlt", "adaptation.enabled": "false"},
    "tlt": {"specdec.mode": "tlt"},
}
_ALL_SYSTEMS = f"--systems={','.join(SYSTEMS)}"
# Of `ngram`, for as many rows as an engine has, where a recipe names none.
MATCHES = "D6K1V7-ngram"
# What a user waits for, less what the comparison is not about.
STAGES = ("rollout", "drafter", "inference", "update", "sync")
SAME = (
    *("rollout/tokens_digest", "reward/mean", "policy/loss", "policy/grad_norm"),
    "policy/weights_digest",
)
KEPT = (
    *("rollout/tokens", "length/p50", "length/p95", "length/max", "reward/mean"),
    *("specdec/accept_length", "workers/idle_s", "workers/trained_s"),
    *("workers/idle_frac", "drafter/num_steps", "drafter/version"),
    *("drafter/fresh_accept_length_coupled", "drafter/top1_acc"),
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A recipe, `FILE.py` or `FILE.py:variant`, and its settings by dotted key."""

    name: str
    config: str
    overrides: dict[str, str]

    def settings(self, system: str) -> dict[str, str]:
        """Returns a system's settings by dotted key.

        Raises:
          ValueError: it needs a drafter and none is named.
        """
        recipe = recipes.recipe_of(self.config)
        chosen = {**self.overrides, **SYSTEMS[system]}
        if system == "frozen" and not (
            chosen.get("drafter.directory") or recipe.drafter.directory
        ):
            raise ValueError(
                f"--systems names frozen, and {self.name} has no drafter to begin "
                f"with: name one, --set={self.name}:drafter.directory=DIR, or leave "
                "frozen out."
            )
        named = "specdec.ngram_strategies"
        if system == "ngram" and not recipe.specdec.ngram_strategies:
            rows = chosen.get("rollout.max_batch", recipe.rollout.max_batch)
            chosen.setdefault(named, f"{rows}:{MATCHES}")
        return chosen


def check(options: argparse.Namespace) -> None:
    """Reads models and systems, and whether workers can be divided so."""
    options.systems = experiment.known(options.systems, SYSTEMS, "systems")
    options.models = models_of(options)
    for model in options.models.values():
        recipes.check_processes(
            options.processes, model.config, model.overrides, "--processes"
        )
        recipes.print_other_task_of(model.config, model.overrides)


def models_of(options: argparse.Namespace) -> dict[str, Model]:
    """Reads the models and their settings.

    Raises:
      ValueError: settings are of a model that is not there.
    """
    recipes = experiment.parse_pairs(options.models, "models")
    found: dict[str, dict[str, str]] = {name: {} for name in recipes}
    for key, value in experiment.parse_pairs(options.set, "set").items():
        name, sign, rest = key.partition(":")
        if sign and name not in found:
            raise ValueError(
                f"--set names the model {name!r}; --models has {', '.join(found)}."
            )
        for each in [name] if sign else found:
            found[each][rest if sign else key] = value
    return {name: Model(name, recipes[name], found[name]) for name in recipes}


def cells_of(options: argparse.Namespace) -> list[tables.Cell]:
    """Lists the runs."""
    told = [
        {
            "model": model.name,
            "system": system,
            "config": model.config,
            "processes": options.processes,
            **provenance.settings_without_paths(model.settings(system)),
        }
        for model in options.models.values()
        for system in options.systems
    ]
    return [tables.Cell(cell, seed) for seed in range(options.seeds) for cell in told]


def measure(
    options: argparse.Namespace, folder: pathlib.Path, cell: tables.Cell
) -> list[tables.Row]:
    """Runs a recipe with one system; reads what is compared of its first steps."""
    model, system = options.models[cell["model"]], cell["system"]
    changes = {
        "num_steps": str(options.steps),
        "checkpoint.every": "0",
        "seed": str(cell.seed),
        **model.settings(system),
    }
    with tempfile.TemporaryDirectory() as temporary:
        parent = options.workdirs or pathlib.Path(temporary)
        workdir = parent / f"{model.name}_{system}_{cell.seed}"
        recipes.start(
            recipes.command_of(
                "tlt_jax.main", options.processes, model.config, changes, workdir
            )
        )
        drawn = workdir / "plots" / "timeline.png"
        if drawn.exists() and model.name == next(iter(options.models)):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(drawn, folder / f"end_to_end_timeline_{system}.png")
        about = {"model": model.name, "system": system}
        about |= {"processes": options.processes, "seed": cell.seed}
        steps = [r for r in metrics.read(workdir) if 0 < r["step"] <= options.steps]
        return [
            about | {"round": number} | columns(row) for number, row in enumerate(steps)
        ]


def columns(row: dict) -> tables.Row:
    """Reduces a step's record to what is compared."""
    seconds = {f"{name}_s": row.get(f"time/{name}_s", 0.0) for name in STAGES}
    return {
        "seconds": sum(seconds.values()),
        **seconds,
        "reward_s": row["time/reward_s"],
        "compile_s": row["time/compile_s"],
        **{_column(name): row.get(name) for name in KEPT},
        **{_column(name): row[name] for name in SAME},
    }


def _column(name: str) -> str:
    return name.replace("/", "_")


def summary_of(rows: list[tables.Row], warm_steps: int) -> list[tables.Row]:
    """Sums the steps behind the first, warm ones, beside those of `off`."""
    groups = {
        key: {(row["seed"], row["round"]): row for row in its}
        for key, its in tables.groups(rows, "model", "system").items()
    }
    summary = []
    for (model, system), all_steps in groups.items():
        others = groups.get((model, OFF), all_steps)
        both = [key for key in all_steps if key in others]
        counted = [key for key in both if key[1] >= warm_steps]
        pairs = [(others[key], all_steps[key]) for key in counted]
        if pairs:
            entry: tables.Row = {"model": model, "system": system}
            entry["processes"] = pairs[0][1]["processes"]
            entry |= _compared(pairs)
            entry["steps_differing"] = tables.differing(
                [all_steps[key] for key in both],
                others.values(),
                ("seed", "round"),
                list(map(_column, SAME)),
            )
            summary.append(entry)
    return summary


def _compared(pairs: list[tuple[tables.Row, tables.Row]]) -> tables.Row:
    """Compares a system's steps with those of `off`."""
    off, its = zip(*pairs, strict=True)

    def total(rows, name):
        return sum(row[name] for row in rows)

    names = ("seconds", *(f"{stage}_s" for stage in STAGES), "rollout_tokens")
    entry: tables.Row = {"steps": len(its)}
    entry |= {name: total(its, name) for name in names}
    for name, column in (("", "seconds"), ("rollout_", "rollout_s")):
        entry[f"{name}times_faster"] = total(off, column) / total(its, column)
    ratios = [a["seconds"] / b["seconds"] for a, b in pairs]
    entry["times_faster/median_step"] = statistics.median(ratios)
    entry["times_faster/worst_step"] = min(ratios)
    for name in ("length_p50", "length_p95"):
        entry[name] = statistics.median(row[name] for row in its)
    entry["length_max"] = max(row["length_max"] for row in its)
    entry["idle_frac"] = statistics.mean(row["workers_idle_frac"] for row in its)
    idle_s, trained_s = total(its, "workers_idle_s"), total(its, "workers_trained_s")
    entry["trained_of_idle"] = trained_s / idle_s if idle_s else None
    lengths = [row["specdec_accept_length"] for row in its]
    entry["accept_length"] = statistics.mean(lengths)
    return entry


def plot(rows: list[tables.Row], warm_steps: int, stamp: str) -> plotting.Figure:
    """Draws where the seconds of a step go, system beside system, model by model."""
    counted = [row for row in rows if row["round"] >= warm_steps]
    models = tables.values(counted, "model")
    fig, panels = plotting.panels(
        "An RL step, everything off to everything on",
        models,
        stamp,
        ylabel="seconds of an RL step, mean",
    )
    for axes, model in zip(panels, models, strict=True):
        by_system = tables.groups(tables.where(counted, model=model), "system")
        systems = [name for name in SYSTEMS if (name,) in by_system]
        floor = [0.0] * len(systems)
        for stage in STAGES:
            heights = [
                statistics.mean(tables.column(by_system[name,], f"{stage}_s"))
                for name in systems
            ]
            if sum(heights) > 1e-3:  # seconds that can be seen
                color = plotting.STAGE_COLORS[stage]
                axes.bar(systems, heights, 0.6, floor, color=color, label=stage)
            floor = [a + b for a, b in zip(floor, heights, strict=True)]
        off = dict(zip(systems, floor, strict=True)).get(OFF)
        for place, height in enumerate(floor):
            told = f"{height:.3g} s" + (f"\n{off / height:.2f}x" if off else "")
            axes.annotate(told, (place, height), ha="center", va="bottom", fontsize=8)
        axes.margins(y=0.18)
    return fig


EXPERIMENT = experiment.Experiment(
    slug="end_to_end",
    text=__doc__,
    title="end to end by model",
    published="1.71 to 2.12 times; TLT-Base 1.31 to 1.54",
    needs=f"--processes=2 {_ALL_SYSTEMS} "
    f"--set=drafter.directory={recipes.COUNTING_DRAFTER},drafter.max_length=704",
    before={recipes.TRAIN_COUNTING: 15},
    larger=experiment.both(
        f"{_ALL_SYSTEMS} --set=drafter.directory=DIR,workers.num=1,mesh.data=1,"
        "rollout.max_batch=32",
        f"{_ALL_SYSTEMS} --models=7b=configs/grpo.py:qwen2.5-7b,"
        "32b=configs/grpo.py:qwen2.5-32b "
        "--set=7b:drafter.directory=DIR,32b:drafter.directory=DIR",
    ),
    options=(
        experiment.Option(
            "models",
            "smollm2=configs/smollm2_tlt.py",
            "NAME=RECIPE, separated by commas",
            recorded=False,
        ),
        experiment.Option(
            "set",
            "",
            "settings, separated by commas: KEY=VALUE of all runs, NAME:KEY=VALUE of a "
            "model's",
            recorded=False,
        ),
        experiment.Option(
            "processes",
            1,
            "among how many each run's workers are divided",
            recorded=False,
        ),
        experiment.Option(
            "systems", "tlt,off", f"of {','.join(SYSTEMS)}", recorded=False
        ),
        experiment.Option("steps", 8),
        experiment.seeds(1),
        experiment.Option(
            "warm-steps",
            2,
            "first steps, in which a drafter begins, that do not count",
        ),
        experiment.Option(
            "workdirs",
            None,
            "folder of the runs' workdirs, kept and resumed; default: a temporary one",
            pathlib.Path,
            recorded=False,
        ),
    ),
    constants={"environment": recipes.ENVIRONMENT},
    check=check,
    cells=cells_of,
    measure=measure,
    summary=summary_of,
    plot=plot,
    claims={
        "tokens, rewards, losses and gradient norms are equal in all "
        "steps": claims.all_zero("steps_differing", "steps that differ"),
        "everything on is at least 1.5 times everything off on a CPU": claims.at_least(
            "times_faster", 1.5, system="tlt"
        ),
        "at least 80 % of the workers' idle time is used for training": claims.at_least(
            "trained_of_idle", 0.8, system="tlt"
        ),
        "paper: whole steps 1.7 times as fast": claims.at_least(
            "times_faster", 1.7, system="tlt"
        ),
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
