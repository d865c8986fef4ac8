"""Whole RL runs with everything off, with matches, a frozen drafter, everything on.

    python -m experiments.end_to_end --scale=cpu --processes=2
    python -m experiments.end_to_end --scale=cpu --systems=off,ngram,frozen,tlt \
        --models=smollm2=configs/smollm2_tlt.py,tiny=configs/tiny.py:count \
        --set=smollm2:drafter.directory=DIR,tiny:drafter.directory=DIR

A recipe is run once with each system, one after the other, each as a user would run it:
its workers as threads of one process or divided among `--processes`. Digests of tokens,
rewards and the policy's losses must agree, step by step. The ratio is that of rollout,
the drafter's training between rollout and update (with one worker), update and sync;
judging answers and compiling stand apart.
The tail says what was there to be won: lengths at 50 and 95 percent and the longest,
and the share of time in which workers wait.

Systems: `off`; `ngram`, matches of earlier text alone (the paper's TLT-Base); `frozen`,
a drafter trained before (`drafter.directory`) that learns no more; `tlt`, everything.

Target: at least 1.5 times on CPU, on a long-tailed workload.
"""

import argparse
import dataclasses
import importlib.metadata
import pathlib
import shutil
import statistics
import tempfile

from experiments.lab import cells, harness, plotting, recipe_commands
from tlt_jax.workdir import metrics

SLUG = "end_to_end"
OFF = "off"
SYSTEMS = {
    OFF: {"specdec.mode": "off"},
    "ngram": {"specdec.mode": "ngram"},
    "frozen": {"specdec.mode": "tlt", "adaptation.enabled": "false"},
    "tlt": {"specdec.mode": "tlt"},
}
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
    """A recipe that is run with every system.

    Attributes:
      name: as it stands in the tables.
      config: the recipe, `FILE.py` or `FILE.py:variant`.
      overrides: settings by dotted key.
    """

    name: str
    config: str
    overrides: dict[str, str]

    def settings(self, system: str) -> dict[str, str]:
        """Returns a system's settings by dotted key.

        Raises:
          ValueError: it needs a drafter and none is named.
        """
        recipe = recipe_commands.recipe_of(self.config)
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


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        default="smollm2=configs/smollm2_tlt.py",
        help="NAME=RECIPE, separated by commas",
    )
    parser.add_argument(
        "--set",
        default="",
        help="settings, separated by commas: KEY=VALUE of all runs, NAME:KEY=VALUE of "
        "a model's",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="among how many each run's workers are divided",
    )
    parser.add_argument("--systems", default="tlt,off", help=f"of {','.join(SYSTEMS)}")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--warm-steps",
        type=int,
        default=2,
        help="first steps, in which a drafter begins, that do not count",
    )
    parser.add_argument(
        "--workdirs",
        type=pathlib.Path,
        help="folder of the runs' workdirs, kept and resumed; default: a temporary one",
    )
    cells.add_options(parser)
    return parser.parse_args(arguments)


def models_of(options: argparse.Namespace) -> dict[str, Model]:
    """Reads the models and their settings.

    Raises:
      ValueError: settings are of a model that is not there.
    """
    recipes = harness.parse_pairs(options.models, "models")
    found: dict[str, dict[str, str]] = {name: {} for name in recipes}
    for key, value in harness.parse_pairs(options.set, "set").items():
        name, sign, rest = key.partition(":")
        if sign and name not in found:
            raise ValueError(
                f"--set names the model {name!r}; --models has {', '.join(found)}."
            )
        for each in [name] if sign else found:
            found[each][rest if sign else key] = value
    return {name: Model(name, recipes[name], found[name]) for name in recipes}


def systems_of(text: str) -> list[str]:
    """Reads `--systems`.

    Raises:
      ValueError: one is not known.
    """
    names = text.split(",")
    if unknown := [name for name in names if name not in SYSTEMS]:
        raise ValueError(
            f"--systems names {', '.join(unknown)}; known are {', '.join(SYSTEMS)}."
        )
    return names


def command_of(
    options: argparse.Namespace,
    model: Model,
    system: str,
    seed: int,
    workdir: pathlib.Path,
) -> list[str]:
    """Returns the command of one run."""
    changes = {
        "num_steps": str(options.steps),
        "checkpoint.every": "0",
        "seed": str(seed),
        **model.settings(system),
    }
    return recipe_commands.command_of(
        "tlt_jax.main", options.processes, model.config, changes, workdir
    )


def rows_of(workdir: pathlib.Path, steps: int) -> list[harness.Row]:
    """Reads what is compared of a run's first steps."""
    rows = (row for row in metrics.read(workdir) if 0 < row["step"] <= steps)
    return [{"round": number} | columns(row) for number, row in enumerate(rows)]


def columns(row: dict) -> harness.Row:
    """Reduces a step's record to what is compared."""
    seconds = {f"{name}_s": row.get(f"time/{name}_s", 0.0) for name in STAGES}
    same = {name.replace("/", "_"): row[name] for name in SAME}
    kept = {name.replace("/", "_"): row.get(name) for name in KEPT}
    return {
        "seconds": sum(seconds.values()),
        **seconds,
        "reward_s": row["time/reward_s"],
        "compile_s": row["time/compile_s"],
        **kept,
        **same,
    }


def summary_of(rows: list[harness.Row], first: int) -> list[harness.Row]:
    """Sums the steps that count, and says how many times as long `off` takes.

    Args:
      rows: of the table.
      first: steps of a run before it do not count.
    """
    groups: dict[tuple, dict[tuple, harness.Row]] = {}
    for row in rows:
        steps = groups.setdefault((row["model"], row["system"]), {})
        steps[row["seed"], row["round"]] = row
    summary = []
    for (model, system), all_steps in groups.items():
        others = groups.get((model, OFF), all_steps)
        both = [key for key in all_steps if key in others]
        pairs = [(others[key], all_steps[key]) for key in both if key[1] >= first]
        if pairs:
            entry: harness.Row = {"model": model, "system": system}
            entry["processes"] = pairs[0][1]["processes"]
            entry |= _compared(pairs)
            entry["steps_differing"] = sum(
                any(
                    others[key][name] != all_steps[key][name]
                    for name in (s.replace("/", "_") for s in SAME)
                )
                for key in both
            )
            summary.append(entry)
    return summary


def _compared(pairs: list[tuple[harness.Row, harness.Row]]) -> harness.Row:
    """Compares a system's steps with those of `off`."""
    off, its = zip(*pairs, strict=True)

    def total(rows, name):
        return sum(row[name] for row in rows)

    names = ("seconds", *(f"{stage}_s" for stage in STAGES), "rollout_tokens")
    entry: harness.Row = {"steps": len(its)}
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


def plot(rows: list[harness.Row], warm_steps: int, path: pathlib.Path, stamp: str):
    """Draws where the seconds of a step go, system beside system, model by model."""
    counted = [row for row in rows if row["round"] >= warm_steps]
    models = list(dict.fromkeys(row.get("model") for row in counted))
    fig, panels = plotting.panels(
        "An RL step, everything off to everything on", len(models), stamp, width=5.6
    )
    for axes, model in zip(panels, models, strict=True):
        its = [row for row in counted if row.get("model") == model]
        present = {row["system"] for row in its}
        systems = [name for name in SYSTEMS if name in present]
        floor = [0.0] * len(systems)
        for stage in STAGES:
            heights = [
                statistics.mean(r[f"{stage}_s"] for r in its if r["system"] == name)
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
        axes.set_title(model or "", loc="left", fontsize=10)
        axes.set_ylabel("seconds of an RL step, mean")
        axes.margins(y=0.18)
    plotting.save(fig, path)


def main(arguments: list[str] | None = None) -> list[harness.Row]:
    """Runs the experiment; returns the summary that it also writes."""
    options = parse_arguments(arguments)
    models, systems = models_of(options), systems_of(options.systems)
    for model in models.values():
        recipe_commands.check_processes(
            options.processes, model.config, model.overrides, "--processes"
        )
    told = {
        (model.name, system): {
            key: harness.without_paths(value)
            for key, value in model.settings(system).items()
        }
        for model in models.values()
        for system in systems
    }
    settings = {
        "steps": options.steps,
        "warm_steps": options.warm_steps,
        "environment": recipe_commands.ENVIRONMENT,
    }
    versions = {name: importlib.metadata.version(name) for name in ("jax", "llvmlite")}
    provenance = harness.Provenance(SLUG, settings, versions)
    out = harness.folder_of(options)

    def measure(cell):
        model, system = models[cell.overrides["model"]], cell.overrides["system"]
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.workdirs or pathlib.Path(temporary)
            workdir = folder / f"{model.name}_{system}_{cell.seed}"
            command = command_of(options, model, system, cell.seed, workdir)
            recipe_commands.start(command)
            drawn = workdir / "plots" / "timeline.png"
            if drawn.exists() and model.name == next(iter(models)):
                out.mkdir(parents=True, exist_ok=True)
                shutil.copy(drawn, out / f"{SLUG}_timeline_{system}.png")
            about = {
                "model": model.name,
                "system": system,
                "processes": options.processes,
                "seed": cell.seed,
            }
            return [about | row for row in rows_of(workdir, options.steps)]

    wanted = [
        cells.Cell(
            {
                "model": model.name,
                "system": system,
                "config": model.config,
                "processes": options.processes,
                **told[model.name, system],
            },
            seed,
        )
        for seed in range(options.seeds)
        for model in models.values()
        for system in systems
    ]
    rows = cells.run(options, SLUG, provenance, wanted, measure)
    summary = summary_of(rows, options.warm_steps)
    harness.write_summary(options, SLUG, summary)
    stamp = plotting.stamp(provenance.record)
    plot(rows, options.warm_steps, out / f"{SLUG}.png", stamp)
    return summary


if __name__ == "__main__":
    main()
