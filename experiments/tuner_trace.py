r"""Trace of a real engine and drafter, against which tuners are replayed.

    python -m experiments.tuner_trace --scale=cpu --drafter=workdirs/counting_drafter

Two things are measured. The seconds of a step of every arm at every batch bucket: an
engine answers held-out prompts and takes the arm with the fewest calls so far at each
call. And what drafted chains would have had accepted at every position of the held-out
texts: for the drafter as trained, and for drafters between its initial weights and
these, linear in the weights, which stand for the course of its training.
`experiments.tuner_regret` replays it. The drafter of record is that of
`configs/smollm2_drafter.py:counting`, trained by

    python -m tlt_jax.train_drafter --config=configs/smollm2_drafter.py:counting \
        --workdir=workdirs/counting_drafter
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Mapping

import jax
import numpy as np

from experiments.lab import experiment, provenance, recipes, speculation_setting
from experiments.simulation import trace_file
from tlt_jax import speculation, types
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import head as drafter_head
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import scheduler
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.texts import layout, shards
from tlt_jax.specdec.training import acceptance, unroll
from tlt_jax.specdec.tuners import tuner as tuner_lib

ARMS = "1:D3K1V4,D7K1V8,D11K1V12,D15K1V16 8:D3K1V4,D7K1V8,D11K1V12"
BLENDS = "0,0.3,0.45,1"
# As many rows as the cache of `experiments.speculation_speed` has room for: programs
# that it compiled are found again.
CACHE_ROWS = 64
_ROWS_OF_TEXTS = 4
OPTIONS = (
    experiment.Option("arms", ARMS, "entries, by spaces"),
    *experiment.plain(max_rows=8, steps_per_call=64, max_levels=15),
    experiment.Option("calls", 5, "fewest calls of every arm and bucket"),
    experiment.Option("blends", BLENDS, "shares of the trained weights, by commas"),
)


class RoundRobin(tuner_lib.Tuner):
    """Tries every arm of a bucket equally often, and keeps the calls."""

    def __init__(self, arms: strategy_lib.Arms, max_rows: int):
        """Begins with no call."""
        self._arms, self._max_rows = arms, max_rows
        self.calls: list[tuner_lib.Call] = []
        self.tried: collections.Counter = collections.Counter()

    def strategies(self, num_rows: int) -> tuple[strategy_lib.Strategy | None, ...]:
        """Lists the candidates, and plain decoding."""
        return *self._arms.of(num_rows), None

    def choose(self, num_rows: int) -> strategy_lib.Strategy | None:
        """Chooses the arm with the fewest calls."""
        bucket = tuner_lib.bucket_of(num_rows, self._max_rows)
        arms = self.strategies(num_rows)
        return min(arms, key=lambda arm: self.tried[bucket, arm])

    def record(self, call: tuner_lib.Call) -> None:
        """Keeps the call."""
        self.calls.append(call)
        self.tried[call.bucket, call.strategy] += 1

    def fewest(self, bucket: int) -> int:
        """Says how often the least tried arm of a bucket was tried."""
        return min(self.tried[bucket, arm] for arm in self.strategies(bucket))


def tuned_engine(
    setting: speculation_setting.Setting, tuner: RoundRobin, arms: strategy_lib.Arms
) -> engine_lib.Engine:
    """Makes an engine that `tuner` guides."""
    options = setting.options
    entries = ((limit, (s,)) for limit, s in enumerate(arms.strategies(), start=1))
    speculator_cfg = dataclasses.replace(
        setting.drafter.speculator_cfg, table=strategy_lib.Arms(tuple(entries))
    )
    return setting.policy.engine(
        max_rows=options.max_rows,
        max_length=setting.max_length,
        speculation=speculation.Speculation(
            speculator_cfg, setting.drafter.params, tuner
        ),
        num_pages=setting.num_pages(max(options.max_rows, CACHE_ROWS)),
        page_size=speculation_setting.PAGE_SIZE,
        steps_per_call=options.steps_per_call,
    )


def requests_of(
    texts: shards.Shards, count: int, new_tokens: int
) -> list[types.Request]:
    """Asks the prompts with the longest answers again."""
    lengths = texts.lengths - texts.response_starts
    longest = sorted(speculation_setting.held_out(texts), key=lambda i: -lengths[i])
    records = [texts.read(i) for i in longest[:count]]
    return [
        types.Request(r.text_id, r.text_id, 0, r.tokens[: r.response_start], new_tokens)
        for r in records
    ]


def record_steps(
    engine: engine_lib.Engine,
    tuner: RoundRobin,
    texts: shards.Shards,
    options: argparse.Namespace,
) -> None:
    """Answers prompts until every arm of every bucket has its calls."""
    for bucket in reversed(scheduler.buckets(options.max_rows)):
        number = 0
        while tuner.fewest(bucket) <= options.calls:
            requests = requests_of(texts, bucket, options.new_tokens)
            started = time.perf_counter()
            engine.run(requests, 1000 + number)
            took = time.perf_counter() - started
            print(f"bucket {bucket}, run {number}: {took:.1f} s", flush=True)
            number += 1


def step_seconds(
    calls: list[tuner_lib.Call],
) -> dict[tuple[int, strategy_lib.Strategy | None], tuple[float, ...]]:
    """Collects seconds per step by kind; the first call of each is warm-up."""
    found = collections.defaultdict(list)
    for call in calls:
        if call.num_steps:
            kind = call.bucket, call.strategy
            found[kind].append(call.elapsed_s / call.num_steps)
    return {kind: tuple(seconds[1:]) for kind, seconds in found.items()}


def measure_lifetimes(
    versions: Mapping[str, drafter.DrafterParams],
    cfg: drafter.DrafterConfig,
    target: unroll.Target,
    texts: shards.Shards,
    indices: list[int],
    max_levels: int,
) -> dict[str, list[np.ndarray]]:
    """Counts accepted drafts at every position of some texts; see `arm_replay.Text`."""
    lengths = texts.lengths - texts.response_starts
    sizes = {
        "row_tokens": int(max(texts.lengths[indices])),
        "row_bases": int(max(lengths[indices])),
    }
    how = {"num_steps": max_levels, "cfg": unroll.ForwardConfig(cfg, head_chunk=128)}
    measure = jax.jit(functools.partial(acceptance.lifetimes, **how))
    found: dict[str, dict] = {name: {} for name in versions}
    plan = layout.plan(texts, indices, num_rows=_ROWS_OF_TEXTS, seed=None, **sizes)
    for rows in plan:
        batch = layout.lay_out(texts, rows, **sizes)
        for name, params in versions.items():
            counts = np.asarray(measure(params, batch, target))
            for row, spans in enumerate(rows):
                first = 0
                for span in spans:
                    here = counts[row, first : first + span.num_bases]
                    # A prompt of one token has no base for the first step.
                    missing = int(lengths[span.index]) - len(here)
                    found[name][span.index] = np.pad(here, (missing, 0))
                    first += span.num_bases
    return {name: [by[i] for i in indices if i in by] for name, by in found.items()}


def blended(
    setting: speculation_setting.Setting, share: float, seed: int
) -> drafter.DrafterParams:
    """Makes a drafter between the initial weights (share 0) and the trained (1)."""
    trained = setting.drafter.params
    cfg = setting.drafter.speculator_cfg.drafter_cfg
    initial = drafter.init(cfg, jax.random.key(seed))
    if initial.norm is not None:
        initial = initial.replace(norm=setting.policy.params.final_norm)
    mixed = jax.tree.map(
        lambda a, b: (1 - share) * a + share * b,
        initial.replace(draft_ids=None),
        trained.replace(draft_ids=None, sharpness=None, tau=None),
    )
    return mixed.replace(
        draft_ids=trained.draft_ids, sharpness=trained.sharpness, tau=trained.tau
    )


def record_trace(
    options: argparse.Namespace,
    context: speculation_setting.Setting,
    folder: pathlib.Path,
    record: provenance.Provenance,
) -> trace_file.Trace:
    """Records a trace; returns what it also writes."""
    texts = speculation_setting.texts_of(pathlib.Path(options.drafter))
    arms = strategy_lib.parse_arms(options.arms.split())
    params = context.policy.params
    draft_ids = context.drafter.params.draft_ids
    started = time.perf_counter()
    found = measure_lifetimes(
        {
            share: blended(context, float(share), seed=0)
            for share in options.blends.split(",")
        },
        context.drafter.speculator_cfg.drafter_cfg,
        unroll.Target(
            embed=params.embed,
            head=drafter_head.head_rows(params, draft_ids),
            draft_ids=draft_ids,
        ),
        texts,
        speculation_setting.held_out(texts),
        options.max_levels,
    )
    means = {share: np.concatenate(of).mean() for share, of in found.items()}
    print(
        "accepted by share of the trained weights:",
        ", ".join(f"{share}: {mean:.2f}" for share, mean in means.items()),
        f"({time.perf_counter() - started:.0f} s)",
        flush=True,
    )
    tuner = RoundRobin(arms, options.max_rows)
    engine = tuned_engine(context, tuner, arms)
    with contextlib.closing(engine.pool):
        record_steps(engine, tuner, texts, options)
    trace = trace_file.Trace(step_seconds(tuner.calls), found, options.max_levels)
    trace_file.write(trace, folder / "tuner_trace.jsonl")
    record.write(folder / "tuner_trace.json")
    return trace


def check(options: argparse.Namespace) -> None:
    """Refuses lists that cannot be read, and a drafter that is not there."""
    strategy_lib.parse_arms(options.arms.split())
    experiment.numbers(options.blends, "blends", float)
    speculation_setting.check_drafter(options.drafter, options.scale)


EXPERIMENT = experiment.Experiment(
    slug="tuner_trace",
    text=__doc__,
    title="trace for the tuners' replay",
    needs=f"--drafter={recipes.COUNTING_DRAFTER}",
    before={recipes.TRAIN_COUNTING: 15},
    larger=experiment.models("--max-rows=32"),
    options=(*speculation_setting.OPTIONS, *OPTIONS),
    check=check,
    context=lambda options: speculation_setting.Setting(options),
    settings=lambda context: context.about(),
    run=record_trace,
    table="tuner_trace.jsonl",
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
