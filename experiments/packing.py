"""Drafter training, packed against padded: texts per second.

    python -m experiments.packing --scale=cpu

`packed` lays texts side by side in rows of `--row-tokens`, as training does; `padded`
gives every text a row of its own of that length; `longest` a row as long as the longest
text of its batch, rounded up to `--round-to` (a program for each length). All three
train on the same texts, whose responses are long-tailed (lognormal), and on the same
predictions, which the table counts. The drafter has random weights and the sizes of
the target named. Compilation is left out.

The paper's figures: 13.3 and 29.6 samples a second, 2.2 times.
"""

import argparse
import functools
import time
from collections.abc import Iterator

import numpy as np

from experiments.lab import claims, experiment, paired, plotting, random_drafter, tables
from tlt_jax.specdec.texts import buffer as text_buffer
from tlt_jax.specdec.texts import layout as text_layout
from tlt_jax.specdec.training import unroll

SYSTEMS = ("packed", "longest", "padded")
OPTIONS = experiment.plain(
    target="smollm2-135m",
    draft_vocab=8192,
    num_texts=48,
    median_response=64,
    row_tokens=512,
    num_rows=4,
    round_to=128,
    unroll=2,
    rounds=5,
)


def make_texts(
    options: argparse.Namespace, vocab: int, width: int
) -> text_buffer.TextBuffer:
    """Fills a buffer with texts of noise, of long-tailed lengths."""
    rng = np.random.default_rng(0)
    buffer = text_buffer.TextBuffer(1 << 33, "float32")
    for number in range(options.num_texts):
        prompt = int(rng.integers(16, 49))
        response = options.median_response * rng.lognormal(0.0, 0.8)
        length = min(prompt + max(int(response), 2), options.row_tokens)
        buffer.append(
            text_layout.Record(
                text_id=number,
                tokens=rng.integers(vocab, size=length),
                response_start=min(prompt, length - 1),
                hidden=rng.standard_normal((length, width), np.float32),
                features=rng.standard_normal((length, 3 * width), np.float32),
                key=np.array([0, number], np.uint32),
            )
        )
    return buffer


class Epochs:
    """One drafter that learns from the same texts in three layouts."""

    def __init__(self, options: argparse.Namespace):
        """Makes drafter and texts."""
        self._options = options
        vocab, width = random_drafter.SHAPES[options.target][:2]
        self.texts = make_texts(options, vocab, width).view()
        self._training = random_drafter.Training(
            options.target, options.draft_vocab, num_steps=options.unroll
        )

    def batches(self, layout: str) -> Iterator[unroll.Batch]:
        """Yields an epoch's batches."""
        options = self._options
        if layout == "packed":
            sizes = self._sizes(options.row_tokens)
            plan = text_layout.plan(
                self.texts,
                range(len(self.texts)),
                num_rows=options.num_rows,
                seed=(0,),
                **sizes,
            )
            for rows in plan:
                yield text_layout.lay_out(self.texts, rows, **sizes)
            return
        order = np.random.default_rng(0).permutation(len(self.texts))
        for first in range(0, len(order), options.num_rows):
            some = order[first : first + options.num_rows]
            longest = options.row_tokens
            if layout == "longest":
                chunks = -(-int(self.texts.lengths[some].max()) // options.round_to)
                longest = min(chunks * options.round_to, longest)
            sizes = self._sizes(longest)
            rows = [[self._whole(index, sizes)] for index in some.tolist()]
            rows += [[]] * (options.num_rows - len(rows))
            yield text_layout.lay_out(self.texts, rows, **sizes)

    def measure(self, layout: str) -> tables.Row:
        """Trains one epoch."""
        columns = full = 0
        predictions = 0.0
        started, cpu_started = time.perf_counter(), time.process_time()
        for batch in self.batches(layout):
            outcome = self._training.step(batch)
            predictions += float(outcome["count"].sum())
            columns += batch.segment.size
            full += int((batch.segment >= 0).sum())
        taken_s = time.perf_counter() - started
        # Seconds of all threads: what a busy machine leaves unchanged, nearly.
        cpu_s = time.process_time() - cpu_started
        return {
            "texts_per_s": len(self.texts) / taken_s,
            "texts_per_cpu_s": len(self.texts) / cpu_s,
            "tokens_per_s": full / taken_s,
            "epoch_s": taken_s,
            "num_columns": columns,
            "fill_frac": full / columns,
            "num_predictions": int(predictions),
        }

    def _sizes(self, row_tokens: int) -> dict[str, int]:
        # Every text fits with all of its bases.
        return {"row_tokens": row_tokens, "row_bases": row_tokens}

    def _whole(self, index: int, sizes: dict[str, int]) -> text_layout.Span:
        view = self.texts
        span = text_layout.span_of(
            index, view.lengths[index], view.response_starts[index], rng=None, **sizes
        )
        assert span is not None, "every response has two tokens or more"
        return span


def plot(summary: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws texts per second."""
    fig, axes = plotting.figure(
        "Drafter training, packed against padded",
        "rows of texts",
        "texts per second (median and range)",
        stamp,
    )
    rows = {row["system"]: row for row in summary}
    names = [name for name in SYSTEMS if name in rows]
    plotting.bars(axes, names, [rows[n] for n in names], "texts_per_s", "%.1f")
    return fig


EXPERIMENT = experiment.Experiment(
    slug="packing",
    text=__doc__,
    title="packing",
    published="13.3 -> 29.6 samples/s",
    larger=experiment.both(
        "--target=qwen2.5-1.5b --draft-vocab=32000 --row-tokens=4096"
    ),
    options=OPTIONS,
    check=lambda options: random_drafter.check([options.target], "target"),
    settings=lambda options, context: {
        "shape": random_drafter.SHAPES[options.target],
        "text_tokens_p50_p95_max": np.quantile(
            context.texts.lengths, (0.5, 0.95, 1.0)
        ).tolist(),
    },
    context=lambda options: Epochs(options),
    cells=lambda target: [tables.Cell({"target": target}, None)],
    measure=lambda options, context, cell: paired.run_paired(
        SYSTEMS,
        [cell.overrides],
        lambda name, case, number: context.measure(name),
        rounds=options.rounds,
        warmups=1,
    ),
    summary=functools.partial(
        paired.summarise,
        case_keys=["target"],
        metrics=dict.fromkeys(
            ("texts_per_s", "texts_per_cpu_s", "fill_frac"), "higher"
        ),
        reference="packed",
    ),
    plot=plot,
    claims={
        "paper: packing trains at least 2 times the texts per second": claims.at_least(
            "texts_per_s/times", 2.0, system="longest"
        ),
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
