"""The first minutes with an accelerator: is everything right, and how fast is it?

    python -m experiments.first_contact --budget-s=420
    python -m experiments.first_contact --rehearse

Measures, the most important first: what copies reach (`copy`); whether the attention
kernel is right on this device, by the arguments of the tests (`kernels`); its time
beside jax's own (`bench`); plain decoding at 8K, batch 1 and 32, with a table of its
kernels (`decode`); verifying and drafting chains of 4, 8 and 16 nodes, end to end with
random weights (`speculation`); a run that makes a tiny model, off and with an adaptive
drafter (`tiny_run`); whether speculation changes tokens, in float32 and bfloat16
(`equality`).

Each item runs under a limit of its own in another process: one that hangs or fails
costs that, and a line. All is written after every row, so that a machine that is taken
away leaves what was measured: `first_contact.csv` (a last row of every item says how it
`ended`), `first_contact_kernels.csv`, `first_contact.json` (machine, versions, commit)
and `first_contact.log`, each below 16 MB. No network, no weights and no recipe is
needed, and of the packages neither ml-collections nor gguf.

XLA takes three quarters of a GPU's memory when a process begins. Here it is nine tenths
unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise: less where others use that GPU.

`--rehearse` does the same at toy sizes, on any machine.
"""

import argparse
import os
import pathlib
import sys

from experiments import deadlines
from experiments.lab import command_line, experiment, provenance, tables

SLUG = "first_contact"
# Seconds that an item may take at most, the most important first.
LIMITS = {
    "copy": 30.0,
    "kernels": 75.0,
    "bench": 75.0,
    "decode": 100.0,
    "speculation": 120.0,
    "tiny_run": 100.0,
    "equality": 60.0,
}
# How much longer an item may take in a rehearsal: two cores compile slowly.
_REHEARSED = 8
_KERNELS = "kernels"
_MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_MOST_BYTES = 8 * 2**20


def environment(given: dict[str, str]) -> dict[str, str]:
    """Returns what children find: memory for 7B, a CPU beside the accelerator."""
    made = {_MEMORY: "0.9", "HF_HUB_OFFLINE": "1", **given}
    platforms = made.get("JAX_PLATFORMS", "")
    # The reference that kernels are compared with is computed there.
    if platforms and "cpu" not in platforms.split(","):
        made["JAX_PLATFORMS"] = f"{platforms},cpu"
    return made


def check(options: argparse.Namespace) -> None:
    """Reads the names; refuses a budget in which nothing can be done."""
    options.items = experiment.known(options.items, LIMITS, "items") or list(LIMITS)
    if not options.budget_s > 0:
        raise ValueError(
            f"--budget-s={options.budget_s:g}: seconds for everything, above 0."
        )
    if options.out is None:
        scale = "rehearsal" if options.rehearse else "one_gpu"
        options.out = experiment.own_folder(scale)


def measure(options: argparse.Namespace) -> list[tables.Row]:
    """Measures and writes; returns the rows, those of kernels apart."""
    folder, rows, kernels = options.out, [], []
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"items": options.items, "budget_s": options.budget_s}
    record = provenance.Provenance(SLUG, settings | {"is_toy": options.rehearse})
    log = folder / f"{SLUG}.log"
    log.unlink(missing_ok=True)
    # What an earlier call left is not of this one.
    tables.path_of(folder, SLUG, _KERNELS).unlink(missing_ok=True)
    command = [sys.executable, "-m", "experiments.device_items"]
    command += ["--toy"] if options.rehearse else []
    times = _REHEARSED if options.rehearse else 1
    limits = [deadlines.Limit(name, times * LIMITS[name]) for name in options.items]
    told = deadlines.run(
        command, limits, options.budget_s, log, environment(dict(os.environ))
    )
    for row in told:
        if row.pop("table", "") == _KERNELS:
            kernels.append(row)
            tables.write(tables.path_of(folder, SLUG, _KERNELS), kernels)
            continue
        rows.append(row)
        tables.write(tables.path_of(folder, SLUG), rows)
        record.write(folder / f"{SLUG}.json")
        _shorten(log)
        print(_line(row), flush=True)
    print(f"In {command_line.shown(folder)}: {SLUG}.csv and others.")
    return rows


def _line(row: tables.Row) -> str:
    values = [f"{name}={tables.short(v)}" for name, v in row.items() if name != "item"]
    return f"{row['item']}: {', '.join(values)}"


def _shorten(log: pathlib.Path) -> None:
    """Keeps the end of a log that grew too long to be carried away."""
    if log.exists() and log.stat().st_size > _MOST_BYTES:
        with log.open("rb") as file:
            file.seek(-_MOST_BYTES // 2, os.SEEK_END)
            end = file.read()
        log.write_bytes(end)


EXPERIMENT = experiment.Experiment(
    slug=SLUG,
    text=__doc__,
    title="the first minutes with an accelerator",
    needs="--budget-s=420",
    options=(
        experiment.Option("budget-s", 420.0, "seconds for everything"),
        experiment.Option("items", "", f"of {','.join(LIMITS)}; default all"),
        experiment.Option("rehearse", False, "at toy sizes, on any machine"),
        experiment.Option(
            "out",
            None,
            "folder of the results; default experiments/results/mine/one_gpu, which "
            "git ignores",
            pathlib.Path,
        ),
    ),
    check=check,
    run=measure,
    table=f"{SLUG}.csv",
    is_tool=True,
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
