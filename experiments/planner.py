"""What adaptive speculation would bring on your cluster: simulated, before you rent it.

    python -m experiments.planner --device=h100 --devices=64 --model=qwen2.5-7b \
        --tensor=2
    python -m experiments.planner --device=v5p --devices=128 --model=HF_DIR --tensor=4 \
        --lengths=WORKDIR --accept-length=4.5 --max-tokens=16384
    python -m experiments.planner --recipe=qwen2.5-7b@8xh200

Simulates RL steps with everything off, with the paper's rule and with our tuner, by the
system's own queue, scheduler, coordinator and tuners (`experiments.simulation`), and
prints seconds, idle share and speedup. The model is one of those listed by `--help`, or
a Hugging Face directory with `config.json`. Lengths are log-normal, or those of a run's
workdir (`rollouts/`). `--accept-length` is what your drafter reaches when it drafts
`--accept-depth` levels; other depths follow from a constant chance per level. Where
step times were measured, `--step-times=FILE` replaces the computed ones: a CSV with
columns `rows,strategy,seconds`, strategy `plain` or such as D7K1V8.

`--recipe` takes model, devices, prompts and rows from a variant of configs/grpo.py, and
says first what each of its programs takes of a device's memory, as compiled.

A drafter that must keep up: `--stale-accept-length` is what it reaches when it was left
behind, `--lost` how much of what it learned an update of the target takes, `--learned`
how much of the way back a training step of one worker covers; so the table shows
whether the workers' idle time is enough (`drafter_quality`, 1: adapted).

`--learner-devices=16` gives rollout workers devices of their own
(`workers.placement=separate`): of the cluster's so many learn and the others roll out,
compared with all of them doing both by turns. Weights go to the workers each step, by
`--weights-gb-s`; the learner's devices wait for rollouts, unless `--lag=1` lets those
go on beside updates (`rollout.lag`).

All is a prediction; `--assumptions` prints what it rests on.
"""

import argparse
import csv
import dataclasses
import json
import math
import pathlib
from collections.abc import Collection, Mapping

import numpy as np

from configs import grpo
from experiments import ahead_of_time, cluster_size
from experiments.lab import experiment, tables
from experiments.simulation import cluster_records, costs, published, rl_step, workload
from tlt_jax import config as config_lib
from tlt_jax.rl.engine import scheduler
from tlt_jax.specdec import strategy as strategy_lib

ASSUMPTIONS = """\
- a forward takes the larger of reading weights and cache at 75 % of the data sheet's
  bandwidth and of computing at the share that fits the paper's published speedups; each
  layer 20 us on top; a drafted level the drafter's own forward and a fitted constant;
- accept lengths hold for all rows, lengths and RL steps; unless --stale-accept-length
  says otherwise the drafter stays adapted (the table has the steps it could take);
- after a rollout: five forwards' operations at 35 % of the data sheet, and 5 s; with a
  learner of its own weights go to the workers instead of those 5 s, and it has no other
  use for its devices;
- no failures, stragglers, slow rewards or checkpoints; all workers alike;
- checked against recorded runs of two workers on a CPU only (simulator_check).
"""


OPTIONS = (
    experiment.Option("recipe", "", "of configs/grpo.py, such as qwen2.5-7b@8xh200"),
    experiment.Option("device", "h100", ", ".join(costs.DEVICES)),
    experiment.Option("devices", 64, "of the whole cluster"),
    experiment.Option("lag", 0, "RL steps by which weights that roll out are older"),
    experiment.Option("learner-devices", 0, "of the cluster; 0: all do both"),
    experiment.Option(
        "weights-gb-s",
        cluster_size.WEIGHTS_BYTES_S / 1e9,
        "at which weights go to workers of their own",
    ),
    experiment.Option("tensor", 1, "devices of a worker"),
    experiment.Option("per-host", 8, "devices of a host"),
    experiment.Option(
        "model",
        "qwen2.5-7b",
        f"{', '.join(costs.MODELS)}, or a directory with config.json",
    ),
    experiment.Option("num-prompts", 128, "of an RL step"),
    experiment.Option("group-size", 8, "responses of a prompt"),
    *experiment.plain(prompt_tokens=512, seed=0),
    experiment.Option("max-tokens", 32768, "limit of a response"),
    experiment.Option("median", 2000.0, "tokens, of log-normal lengths"),
    experiment.Option("sigma", 1.2, "of their logarithms"),
    experiment.Option("lengths", "", "workdir whose rollouts' lengths are drawn"),
    experiment.Option("accept-length", 0.0, "default: as published"),
    experiment.Option("accept-depth", 8, "levels at which it is reached"),
    experiment.Option("stale-accept-length", 0.0, "0: it stays adapted"),
    experiment.Option("learned", 0.01, "0 to 1, of a drafter step"),
    experiment.Option("lost", 0.2, "0 to 1, of an update of the target"),
    experiment.Option("strategies", "", "ROWS:S,S;ROWS:S, for example 4:D7K1V8,D3K1V4"),
    experiment.Option("step-times", "", "CSV of measured seconds"),
    experiment.Option("max-rows", 256, "of a worker"),
    experiment.Option("steps", 2, "RL steps simulated"),
    experiment.Option("assumptions", False, "print what it rests on"),
    experiment.Option("out", None, "a CSV of the table", pathlib.Path),
)


def model_of(name: str) -> costs.Model:
    """Returns a model's sizes, by name or from a Hugging Face configuration.

    Raises:
      ValueError: there is no such model, or the configuration lacks a size.
    """
    if name in costs.MODELS:
        return costs.MODELS[name]
    path = pathlib.Path(name) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"--model={name} is neither one of {', '.join(costs.MODELS)} nor a "
            "directory with a config.json."
        )
    try:
        read = json.loads(path.read_text("utf-8"))
        heads = read["num_attention_heads"]
        width, layers = read["hidden_size"], read["num_hidden_layers"]
        inner, vocabulary = read["intermediate_size"], read["vocab_size"]
        count = read.get("num_experts") or read.get("num_local_experts") or 0
        mixture = None
        if count:
            # Where no block is dense, the one width is that of an expert.
            expert = 3 * width * (read.get("moe_intermediate_size") or inner)
            mixture = costs.Mixture(
                *(count, read["num_experts_per_tok"], layers * count * expert, inner)
            )
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"--model={name}: config.json does not describe a decoder "
            f"({type(error).__name__}: {error})."
        ) from None
    kv_heads = read.get("num_key_value_heads") or heads
    head_dim = read.get("head_dim") or width // heads
    attention = width * head_dim * (2 * heads + 2 * kv_heads)
    embeddings = 1 if read.get("tie_word_embeddings") else 2
    blocks = mixture.params if mixture else layers * 3 * width * inner
    params = layers * attention + blocks + embeddings * vocabulary * width
    return costs.Model(params, layers, width, kv_heads, head_dim, vocabulary, mixture)


@dataclasses.dataclass(frozen=True)
class MeasuredCosts(costs.RooflineCosts):
    """Measured seconds of steps, by batch bucket and strategy; the rest computed.

    They hold for any cache length.
    """

    steps: Mapping[costs.Kind, float] = dataclasses.field(default_factory=dict)

    def step_s(self, bucket, strategy, context) -> float:
        """See `TableCosts.step_s`."""
        return costs.TableCosts(self.steps).step_s(bucket, strategy, context)


def read_step_times(path: str) -> dict[costs.Kind, float]:
    """Reads measured seconds.

    Raises:
      ValueError: the file is missing, lacks a column, or a line cannot be read.
    """
    try:
        with pathlib.Path(path).open(newline="", encoding="utf-8") as opened:
            lines = list(csv.DictReader(opened))
    except OSError as error:
        raise ValueError(f"--step-times={path} cannot be read: {error}.") from None
    wanted = {"rows", "strategy", "seconds"}
    if not lines or not wanted <= lines[0].keys():
        raise ValueError(
            f"--step-times={path}: the columns rows,strategy,seconds are needed, and "
            f"a line below them; found {', '.join(lines[0]) if lines else 'nothing'}."
        )
    found = {}
    for number, line in enumerate(lines, 2):
        try:
            name = line["strategy"]
            strategy = None if name == "plain" else strategy_lib.parse(name)
            seconds = float(line["seconds"])
            found[int(line["rows"]), strategy] = seconds
        except ValueError as error:
            raise ValueError(f"--step-times={path}, line {number}: {error}") from None
        if not 0 < seconds < float("inf"):
            raise ValueError(
                f"--step-times={path}, line {number}: seconds={seconds} of a step; "
                "give more than 0."
            )
    return found


def follow_recipe(options: argparse.Namespace) -> list[tables.Row]:
    """Sets what a recipe says; returns what its programs take of a device's memory.

    Raises:
      ValueError: there is no such recipe, or a flag says what it says already.
    """
    name = options.recipe
    if name not in grpo.VARIANTS:
        raise ValueError(
            f"--recipe={name} is no variant of configs/grpo.py: use one of "
            f"{', '.join(grpo.VARIANTS)}."
        )
    run = config_lib.load(grpo.get_config(name))
    chip, _, shape = ahead_of_time.SLICES[name].partition(":")
    tensor = run.rollout.tensor or run.mesh.tensor
    told = {
        "device": chip,
        "devices": math.prod(map(int, shape.split("x"))),
        "tensor": tensor,
        "per_host": tensor * run.workers.num,
        "model": name.partition("@")[0],
        "num_prompts": run.rollout.prompts_per_step,
        "group_size": run.rollout.group_size,
        "max_rows": run.rollout.max_batch,
    }
    for option in OPTIONS:
        if option.key in told and getattr(options, option.key) != option.default:
            raise ValueError(
                f"--recipe={name} says --{option.name}={told[option.key]}: leave "
                f"--{option.name} out, or --recipe."
            )
    vars(options).update(told)
    table = tables.path_of(experiment.record_folder("cpu"), "ahead_of_time")
    return [
        {
            "program": row["program"],
            "GiB of a device": row["total_bytes"] / ahead_of_time.GIB,
            "it has": row["hbm_bytes"] / ahead_of_time.GIB,
        }
        for row in tables.read(table)
        if row["model"] == name
    ]


def check(options: argparse.Namespace) -> None:
    """Refuses, by a `ValueError`, numbers that describe no cluster."""
    for name in (
        *("devices", "tensor", "per_host", "num_prompts", "group_size"),
        *("prompt_tokens", "max_tokens", "max_rows", "steps", "accept_depth"),
    ):
        if (value := getattr(options, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value}: at least 1.")
    if options.device not in costs.DEVICES:
        raise ValueError(
            f"--device={options.device} is not known: use one of "
            f"{', '.join(costs.DEVICES)}."
        )
    if options.devices % options.tensor:
        raise ValueError(
            f"--devices={options.devices} cannot be divided into workers of "
            f"--tensor={options.tensor}: choose a divisor."
        )
    learners = options.learner_devices
    for name in ("lag", "learner_devices"):
        if (value := getattr(options, name)) < 0:
            raise ValueError(f"--{name.replace('_', '-')}={value}: at least 0.")
    if options.lag and not learners:
        raise ValueError(
            f"--lag={options.lag} --learner-devices=0: rollouts go on beside updates "
            "where the learner has devices of its own; give it some."
        )
    if not 0 < options.weights_gb_s < math.inf:
        raise ValueError(f"--weights-gb-s={options.weights_gb_s:g}: more than 0.")
    rolling = options.devices - learners
    if learners and (rolling < options.tensor or rolling % options.tensor):
        raise ValueError(
            f"--learner-devices={learners} leaves {rolling} of --devices="
            f"{options.devices}, which are no workers of --tensor={options.tensor}: "
            "choose another number."
        )
    for name in ("learned", "lost"):
        if not 0 <= (value := getattr(options, name)) <= 1:
            raise ValueError(f"--{name}={value:g}: 0 to 1.")
    if options.median <= 0 or options.sigma < 0:
        raise ValueError(
            f"--median={options.median:g} --sigma={options.sigma:g}: a median above 0 "
            "and a sigma of at least 0."
        )


def acceptance_of(
    options: argparse.Namespace, every: Collection[strategy_lib.Strategy]
) -> workload.Acceptance:
    """Returns how drafts fare: as the user says, or as published."""
    adapted = options.accept_length or published.ADAPTED
    stale = options.stale_accept_length or adapted
    if stale > adapted:
        raise ValueError(
            f"--stale-accept-length={stale:g} is more than that of the adapted "
            f"drafter, {adapted:g}: lower it."
        )
    if not options.accept_length:
        scale = cluster_size.SCALE_7B
        return published.acceptance(every, scale, scale * (stale - 1) / (adapted - 1))
    return workload.Acceptance(
        *(
            {None: (workload.hazard_of(length, options.accept_depth),)}
            for length in (adapted, stale)
        )
    )


def strategies_of(
    options: argparse.Namespace,
) -> tuple[strategy_lib.Arms, strategy_lib.Arms]:
    """Returns the candidates of our tuner, and the paper's rule's table."""
    if not options.strategies:
        arms = strategy_lib.parse_arms(cluster_size.ARMS)
        return arms, strategy_lib.parse_arms(cluster_size.TABLE)
    arms = strategy_lib.parse_arms(options.strategies.split(";"))
    firsts = tuple((limit, found[:1]) for limit, found in arms.entries)
    return arms, strategy_lib.Arms(firsts)


def scenario_of(options: argparse.Namespace) -> rl_step.Scenario:
    """Builds what is simulated.

    Raises:
      ValueError: an option cannot be; the message names it.
    """
    check(options)
    machine = published.machine(
        costs.DEVICES[options.device], model_of(options.model), options.tensor
    )
    arms, table = strategies_of(options)
    if options.step_times:
        steps = read_step_times(options.step_times)
        lacking = [
            f"{bucket}:{strategy or 'plain'}"
            for bucket in scheduler.buckets(options.max_rows)
            for strategy in (None, *arms.of(bucket), *table.of(bucket))
            if (bucket, strategy) not in steps
        ]
        if lacking:
            raise ValueError(
                f"--step-times={options.step_times} lacks {', '.join(lacking[:6])}"
                f"{' and others' if len(lacking) > 6 else ''}: measure them, lower "
                f"--max-rows={options.max_rows}, or name fewer --strategies."
            )
        machine = MeasuredCosts(**vars(machine), steps=steps)
    lengths = None
    if options.lengths:
        found = workload.read_lengths(pathlib.Path(options.lengths))
        lengths = np.concatenate([np.asarray(n) for n in found.values()])
        if lengths.max() > options.max_tokens:
            raise ValueError(
                f"--lengths={options.lengths} has a response of {lengths.max()} "
                f"tokens, more than --max-tokens={options.max_tokens}: raise that."
            )
    count = options.num_prompts * options.group_size

    def responses(step):
        if lengths is not None:
            rng = np.random.default_rng((options.seed, step))
            drawn = rng.choice(lengths, size=count)
        else:
            law = (options.median, options.sigma, options.max_tokens)
            drawn = cluster_size.lengths_of(step, count, options.seed, *law)
        return workload.grouped(drawn, options.group_size, options.prompt_tokens)

    learners = options.learner_devices
    by_turns = rl_step.Scenario(
        cfg=cluster_size.config_of(
            machine,
            options.devices - learners,
            per_host=options.per_host,
            max_rows=options.max_rows,
            max_new_tokens=options.max_tokens,
        ),
        costs=machine,
        acceptance=acceptance_of(options, {*arms.strategies(), *table.strategies()}),
        arms=arms,
        table=table,
        threshold=cluster_size.THRESHOLD,
        responses=responses,
        rest_s=cluster_size.rest_of(machine, options.devices),
        drafter=cluster_records.Drafter(learned=options.learned, lost=options.lost)
        if options.stale_accept_length
        else cluster_records.Drafter(),
    )
    if not learners:
        return by_turns
    return cluster_size.with_learner(
        by_turns, by_turns.cfg, learners, options.lag, options.weights_gb_s * 1e9
    )


def verdict(summary: list[tables.Row]) -> str:
    """Says it in a sentence."""
    off, best = summary[0], max(summary, key=lambda row: row["times_faster"])
    bound = off["step_s"] / (off["step_s"] - off["rollout_s"])
    what = "speculation"
    if off["system"] != rl_step.OFF:
        what += " and a learner with devices of its own"
    if best["times_faster"] < 1.05:
        gain = f"{what} brings less than 5 % here: leave it off"
    else:
        gain = (
            f"{what} makes an RL step {best['times_faster']:.2f} times as fast "
            f"(rollout {best['rollout_times_faster']:.2f} times)"
        )
    return (
        f"Predicted: {gain}. With everything off the rollout takes "
        f"{off['rollout_frac']:.0%} of a step, so without any rollout time it would be "
        f"{bound:.1f} times; workers wait {off['idle_frac']:.0%} of the rollout."
    )


def plan_and_tell(options: argparse.Namespace) -> list[tables.Row]:
    """Simulates every system; prints and returns a row for each."""
    if options.recipe:
        memory = follow_recipe(options)
        print(tables.shown(memory))
        print(
            f"configs/grpo.py:{options.recipe}, compiled for {options.devices} x "
            f"{options.device}, longest rows.\n"
        )
    scenario, summary, reference = scenario_of(options), [], None
    if options.learner_devices:
        by_turns = argparse.Namespace(
            **vars(options) | {"lag": 0, "learner_devices": 0}
        )
        reference = rl_step.run(
            scenario_of(by_turns), rl_step.OFF, options.steps, options.seed
        )
        summary += [{"system": "turns"} | rl_step.totals(reference, reference)]
    found = rl_step.compare(scenario, options.steps, options.seed, reference)
    summary += [{"system": system, **totals} for system, totals in found]
    print(tables.shown(summary))
    print(verdict(summary))
    if options.assumptions:
        print(f"\nIt rests on this:\n{ASSUMPTIONS}")
    if options.out:
        tables.write(options.out, summary)
    return summary


EXPERIMENT = experiment.Experiment(
    slug="planner",
    text=__doc__,
    title="what speculation would bring on your cluster",
    needs="--device=h100 --devices=64 --model=qwen2.5-7b --tensor=2",
    options=OPTIONS,
    run=plan_and_tell,
    is_tool=True,
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
