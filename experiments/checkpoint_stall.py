"""Seconds that drafter training waits for a checkpoint, in three modes.

    python -m experiments.checkpoint_stall --scale=cpu

`blocking` writes the drafter with the embedding and the head that it uses, and its
optimizer, while the caller waits; `async` writes the same in the background;
`selective` writes the trained leaves and the optimizer, in the background (what a run
uses). After each save one real drafter step is taken, which shows what the writing in
the background costs it; `none` is the step without a checkpoint. Drafters have the
sizes of those of the targets named, and random weights. Files are left to the page
cache: no mode waits for the disk itself.

The paper's figures for a 7B target on H100s: 893, 280 and 97 ms.
"""

import argparse
import functools
import pathlib
import tempfile
import time

import numpy as np

from experiments.lab import claims, experiment, paired, plotting, random_drafter, tables
from tlt_jax.runtime import train_state
from tlt_jax.specdec.training import unroll
from tlt_jax.workdir import drafter_checkpoint

NONE = "none"
SYSTEMS = (NONE, *drafter_checkpoint.MODES)
METRICS = {"stall_ms": "lower", "stall_and_step_ms": "lower", "complete_ms": "lower"}

_ROW_TOKENS, _ROW_BASES = 64, 32


def one_row(vocab: int, width: int) -> unroll.Batch:
    """Makes a small batch of noise: one text in one row."""
    rng = np.random.default_rng(0)

    def noise(num_columns):
        shape = (1, _ROW_TOKENS, num_columns)
        return rng.standard_normal(shape, np.float32)

    columns = np.arange(_ROW_TOKENS, dtype=np.int32)[None]
    return unroll.Batch(
        tokens=columns % vocab,
        positions=columns,
        segment=np.zeros_like(columns),
        features=noise(3 * width),
        hidden=noise(width),
        bases=columns[:, :_ROW_BASES],
        valid=np.ones((1, _ROW_BASES), bool),
        keys=np.zeros((1, _ROW_BASES, 2), np.uint32),
    )


class Saving:
    """A drafter in training, and a checkpointer for each mode."""

    def __init__(self, name: str, draft_vocab: int, directory: pathlib.Path):
        """Makes a drafter of random weights for the target `name`."""
        self._training = random_drafter.Training(
            name, draft_vocab, head_chunk=_ROW_BASES
        )
        self._batch = one_row(*random_drafter.SHAPES[name][:2])
        self._num_saved = 0
        self._directory = directory
        self._checkpointers = {
            mode: drafter_checkpoint.DrafterCheckpointer(directory / mode, mode, keep=1)
            for mode in drafter_checkpoint.MODES
        }

    def train(self) -> float:
        """Takes one step; returns the milliseconds it took."""
        started = time.perf_counter()
        self._training.step(self._batch)
        return 1e3 * (time.perf_counter() - started)

    def measure(self, mode: str) -> tables.Row:
        """Saves, trains a step, and waits for the rest of the writing."""
        if mode == NONE:
            names = ("stall_ms", "stall_and_step_ms", "complete_ms", "megabytes")
            return dict.fromkeys(names) | {"stall_and_step_ms": self.train()}
        checkpointer = self._checkpointers[mode]
        self._num_saved += 1
        started = time.perf_counter()
        made = self._training
        waited_s = checkpointer.save(
            self._num_saved, train_state.Snapshot(made.state), made.cfg, made.target
        )
        step_ms = self.train()
        checkpointer.wait()
        complete_ms = 1e3 * (time.perf_counter() - started)
        files = [p for p in (self._directory / mode).rglob("*") if p.is_file()]
        return {
            "stall_ms": 1e3 * waited_s,
            "stall_and_step_ms": 1e3 * waited_s + step_ms,
            "complete_ms": complete_ms,
            "megabytes": sum(path.stat().st_size for path in files) / 1e6,
        }

    def close(self) -> None:
        """Ends the writing."""
        for checkpointer in self._checkpointers.values():
            checkpointer.close()


def measure(options: argparse.Namespace, cell: tables.Cell) -> list[tables.Row]:
    """Saves one target's drafter in all modes, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        saving = Saving(cell["target"], options.draft_vocab, pathlib.Path(folder))
        rows = paired.run_paired(
            SYSTEMS,
            [cell.overrides],
            lambda name, case, number: saving.measure(name),
            rounds=options.rounds,
            warmups=2,
        )
        saving.close()
    return rows


def plot(summary: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws the stalls, a panel for each target."""
    targets = tables.values(summary, "target")
    fig, panels = plotting.panels(
        "Drafter training waits for a checkpoint",
        targets,
        stamp,
        ylabel="stall, ms (median and range)",
    )
    modes = drafter_checkpoint.MODES
    for axes, target in zip(panels, targets, strict=True):
        rows = [claims.only(summary, target=target, system=mode) for mode in modes]
        plotting.bars(axes, modes, rows, "stall_ms", "%.0f ms")
    return fig


def _stalls_fall(rows: claims.Rows) -> claims.Finding:
    found = [
        [
            claims.only(rows, target=target, system=system)["stall_ms/median"]
            for system in ("blocking", "async", "selective")
        ]
        for target in tables.values(rows, "target")
    ]
    told = "; ".join(", ".join(f"{ms:.0f}" for ms in stalls) for stalls in found)
    return all(a > b > c for a, b, c in found), f"ms: {told}"


EXPERIMENT = experiment.Experiment(
    slug="checkpoint_stall",
    text=__doc__,
    title="checkpoint stall in three modes",
    published="893, 280, 97 ms",
    larger=experiment.both("--targets=qwen2.5-1.5b --draft-vocab=32000"),
    options=(
        experiment.Option(
            "targets",
            "smollm2-135m,qwen2.5-1.5b",
            f"of {', '.join(random_drafter.SHAPES)}; separated by commas",
        ),
        *experiment.plain(draft_vocab=8192, rounds=7),
    ),
    check=lambda options: random_drafter.check(options.targets.split(","), "targets"),
    settings=lambda options: {
        "targets": {t: random_drafter.SHAPES[t] for t in options.targets.split(",")},
    },
    cells=lambda targets: [tables.Cell({"target": name}, None) for name in targets],
    measure=measure,
    summary=functools.partial(
        paired.summarise,
        case_keys=["target"],
        metrics=METRICS,
        reference="selective",
    ),
    plot=plot,
    claims={
        "paper: stalls fall from blocking to async to selective": _stalls_fall,
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
