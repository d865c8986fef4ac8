"""Routes of a mixture of experts that trainer and rollout choose differently.

    python -m experiments.route_flips --scale=cpu

A mixture made on the spot (`configs/tiny.py:experts`) is trained in float32: without
speculation, with chains, and with trees under a budget that all rows share; on one
device and with experts over two by two simulated ones. In bfloat16 the simplest and the
fullest of these, with the trainer's own routes and with those of the rollout replayed.
Counted is `moe/route_flips` of every RL step, the share of tokens x
layers, prompts included, that went through other experts in the trainer than in the
rollout. All runs begin with the same weights. Three more are whole runs of the recipe,
whose rewards are drawn.

Ours alone. In other stacks about a tenth of the routes flip, see docs/mixtures.md.
"""

import argparse
import contextlib
import os
import pathlib
import statistics
import tempfile

import jax

from experiments.lab import claims, experiment, plotting, recipes, tables
from tlt_jax import train

RECIPE = "configs/tiny.py:experts"
OFF = "off"
SPECULATION: dict[str, dict[str, object]] = {
    OFF: {},
    "chains": {"specdec.strategies": ("8:D2K1V3",)},
    "trees, budget": {"specdec.strategies": ("8:D2K2V5N16",)},
}
# Devices along `fsdp` and `expert`.
MESHES = {"1 device": (1, 1), "2 fsdp x 2 experts": (2, 2)}
# Precision, routes, mesh, speculation.
_OWN = ("float32", "own")
SHORT = (
    *((*_OWN, "1 device", speculation) for speculation in SPECULATION),
    *((*_OWN, "2 fsdp x 2 experts", which) for which in (OFF, "trees, budget")),
    *(
        ("bfloat16", routes, *where)
        for where in (("1 device", OFF), ("2 fsdp x 2 experts", "trees, budget"))
        for routes in ("own", "replay")
    ),
)
NUM_DEVICES = 4
# Of the drafter, after every rollout.
_UPDATES = 2
_SETTINGS = {
    # Few sizes of batch, since each is compiled.
    "rollout.max_batch": 8,
    "adaptation.num_steps": 1,
    "adaptation.row_tokens": 32,
    "adaptation.row_bases": 16,
    "mesh.data": 1,
}
_BY = ("precision", "routes", "mesh", "speculation")


def check(options: argparse.Namespace) -> None:
    """Refuses what cannot be told apart; simulates devices, before there are any."""
    if options.steps == options.whole_steps:
        raise ValueError(
            f"--steps={options.steps} is --whole-steps as well: give two numbers, by "
            "which the short runs and the whole ones are told apart."
        )
    # Those that the user asks for stay.
    flag = "xla_force_host_platform_device_count"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", NUM_DEVICES)


def cells(options: argparse.Namespace) -> list[tables.Cell]:
    """Lists short runs of the combinations, and whole runs of some seeds."""
    short = [
        tables.Cell(dict(zip(_BY, values, strict=True)) | {"steps": options.steps})
        for values in SHORT
    ]
    plain = dict(zip(_BY, ("float32", "own", "1 device", OFF), strict=True))
    whole = [
        tables.Cell(plain | {"steps": options.whole_steps}, seed)
        for seed in range(options.seeds)
    ]
    return [*short[:1], *whole, *short[1:]]


def model_of(options: argparse.Namespace, closing: contextlib.ExitStack) -> str:
    """Makes the model that all short runs begin with."""
    folder = pathlib.Path(closing.enter_context(tempfile.TemporaryDirectory()))
    settings = recipes.settings_of(options.config, {"num_steps": 1, "mesh.fsdp": 1})
    train.train(settings, folder)
    return str(folder / "initial_model")


def measure(
    options: argparse.Namespace, context: str, cell: tables.Cell
) -> list[tables.Row]:
    """Runs the recipe in one of the ways."""
    fsdp, expert = MESHES[cell["mesh"]]
    overrides = {
        **_SETTINGS,
        "num_steps": cell["steps"],
        "precision": cell["precision"],
        "learner.routes": cell["routes"],
        "mesh.fsdp": fsdp,
        "mesh.expert": expert,
    }
    if cell["steps"] == options.whole_steps:
        overrides["seed"] = cell.seed
    else:
        overrides["model.spec"] = context
    if cell["speculation"] == OFF:
        rows = recipes.run(options.config, overrides | {"specdec.mode": "off"})
    else:
        overrides |= SPECULATION[cell["speculation"]]
        planned = recipes.planned_settings(options.config, overrides, _UPDATES)
        rows = recipes.run_planned(planned, lambda step: True)
    own = {name: cell[name] for name in (*_BY, "steps")} | {"seed": cell.seed}
    names = ("step", "reward", "tokens", "tokens_digest", "accept_length", "mismatch")
    return [
        own | recipes.columns(row, *names) | {"flips": row.get("moe/route_flips")}
        for row in rows
    ]


def summary_of(rows: list[tables.Row]) -> list[tables.Row]:
    """Counts flips, and steps whose tokens are not those of plain decoding."""
    summary = []
    for key, its in tables.groups(rows, *_BY, "steps", "seed").items():
        entry = dict(zip((*_BY, "steps", "seed"), key, strict=True))
        plain = tables.where(rows, **entry | {"speculation": OFF})
        # A step in which no group carries signal has no update.
        flips = [row["flips"] for row in its if row["flips"] is not None]
        summary.append(
            entry
            | {
                "tokens": sum(row["tokens"] for row in its),
                "flips": statistics.mean(flips),
                "flips/max": max(flips),
                "mismatch/max": max(row["mismatch"] for row in its),
                "accept_length": statistics.mean(r["accept_length"] for r in its),
                "steps_differing": (
                    tables.differing(its, plain, ("step",)) if plain else None
                ),
                "reward/first": statistics.mean(r["reward"] for r in its[:2]),
                "reward/last": statistics.mean(r["reward"] for r in its[-10:]),
            }
        )
    return summary


def plot(rows: list[tables.Row], whole_steps: int, stamp: str) -> plotting.Figure:
    """Draws rewards of the whole runs, and flips of the short ones by RL step."""
    fig, (rewards, flips) = plotting.panels(
        "A mixture of eight experts learns, and its routes",
        ("mean reward, three seeds", "routes flipped, %, one device"),
        stamp,
        xlabel="RL step",
    )
    whole = tables.where(rows, steps=whole_steps)
    for seed, color in zip(tables.values(whole, "seed"), plotting.COLORS, strict=False):
        its = tables.where(whole, seed=seed)
        plotting.line(rewards, its, "step", "reward", color=color, label=f"seed {seed}")
    rewards.set_ylim(0, 1)
    short = [
        row | {"percent": 100 * row["flips"]}
        for row in tables.where(rows, mesh="1 device", speculation=OFF)
        if row["steps"] != whole_steps and row["flips"] is not None
    ]
    for number, (key, its) in enumerate(
        tables.groups(short, "precision", "routes").items()
    ):
        look = {"color": plotting.COLORS[number], "label": " ".join(key)}
        plotting.line(
            flips, its, "step", "percent", "-" if number < 2 else "--", **look
        )
    return fig


def _none(what: str, **wanted: object):
    def decide(rows: claims.Rows) -> claims.Finding:
        its = tables.where(rows, **wanted)
        most = max(row["flips/max"] for row in its)
        tokens = sum(row["tokens"] for row in its)
        return most == 0, f"{len(its)} runs {what}, {tokens} tokens: at most {most:.2g}"

    return decide


def _equal(rows: claims.Rows) -> claims.Finding:
    its = tables.where(rows, precision="float32")
    differing = sum(row["steps_differing"] for row in its)
    return not differing, f"{len(its)} runs in float32: {differing} steps differ"


EXPERIMENT = experiment.Experiment(
    slug="route_flips",
    text=__doc__,
    title="routes that flip, by precision, speculation and mesh",
    options=(
        *experiment.plain(config=RECIPE, steps=20),
        experiment.Option("whole-steps", 60, "RL steps of the runs that are drawn"),
        experiment.seeds(3),
    ),
    constants={"speculation": SPECULATION, "meshes": MESHES},
    check=check,
    context=model_of,
    cells=cells,
    measure=measure,
    summary=summary_of,
    plot=plot,
    claims={
        "no route of a mixture flips in float32, whatever guesses and wherever "
        "experts are": _none("in float32", precision="float32"),
        "no route flips where those of the rollout are replayed": _none(
            "of replayed routes", routes="replay"
        ),
        "a mixture's tokens are those of plain decoding, in float32": _equal,
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
