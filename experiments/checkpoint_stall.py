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
import importlib.metadata
import pathlib
import tempfile
import time

import numpy as np

from experiments.lab import harness, plotting, random_drafter
from tlt_jax.runtime import train_state
from tlt_jax.specdec.training import unroll
from tlt_jax.workdir import drafter_checkpoint

SLUG = "checkpoint_stall"
NONE = "none"
SYSTEMS = (NONE, *drafter_checkpoint.MODES)
METRICS = {"stall_ms": "lower", "stall_and_step_ms": "lower", "complete_ms": "lower"}

_ROW_TOKENS, _ROW_BASES = 64, 32


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_options(parser)
    parser.add_argument(
        "--targets",
        default="smollm2-135m,qwen2.5-1.5b",
        help=f"of {', '.join(random_drafter.SHAPES)}; separated by commas",
    )
    parser.add_argument("--draft-vocab", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args(arguments)


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

    def measure(self, mode: str) -> harness.Row:
        """Saves, trains a step, and waits for the rest of the writing."""
        if mode == NONE:
            step_ms = self.train()
            return {
                "stall_ms": None,
                "stall_and_step_ms": step_ms,
                "complete_ms": None,
                "megabytes": None,
            }
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


def plot(summary: list[harness.Row], path: pathlib.Path, stamp: str) -> None:
    """Draws the stalls, a panel for each target."""
    targets = list(dict.fromkeys(row["target"] for row in summary))
    fig, panels = plotting.panels(
        "Drafter training waits for a checkpoint", len(targets), stamp
    )
    for axes, target in zip(panels, targets, strict=True):
        rows = {row["system"]: row for row in summary if row["target"] == target}
        modes = drafter_checkpoint.MODES
        plotting.bars(axes, modes, [rows[m] for m in modes], "stall_ms", "%.0f ms")
        axes.set_title(target, loc="left", fontsize=10)
    panels[0].set_ylabel("stall, ms (median and range)")
    plotting.save(fig, path)


def main(arguments: list[str] | None = None) -> list[harness.Row]:
    """Runs the experiment; returns the summary that it also writes."""
    options = parse_arguments(arguments)
    targets = options.targets.split(",")
    random_drafter.check(targets, "targets")
    names = ("jax", "orbax-checkpoint", "tensorstore")
    provenance = harness.Provenance(
        SLUG,
        {
            "targets": {name: random_drafter.SHAPES[name] for name in targets},
            "draft_vocab": options.draft_vocab,
            "rounds": options.rounds,
        },
        {name: importlib.metadata.version(name) for name in names},
    )
    rows = []
    for target in targets:
        with tempfile.TemporaryDirectory() as folder:
            training = Saving(target, options.draft_vocab, pathlib.Path(folder))
            rows += harness.run_paired(
                SYSTEMS,
                [{"target": target}],
                lambda name, case, number, training=training: training.measure(name),
                rounds=options.rounds,
                warmups=2,
            )
            training.close()
    summary = harness.summarise(
        rows, case_keys=["target"], metrics=METRICS, reference="selective"
    )
    harness.write_results(options, SLUG, rows, summary, provenance)
    out = harness.folder_of(options)
    plot(summary, out / f"{SLUG}.png", plotting.stamp(provenance.record))
    return summary


if __name__ == "__main__":
    main()
