"""What a drafter learned from the texts of one task is worth on those of others.

    python -m experiments.transfer --scale=cpu

A small target, made on the spot, knows three tasks: counting up, counting down, and
the alphabet. A first drafter learns a little from texts of all three (`start`); then it
goes on with the same number of updates on texts of one task each, or of all three. Each
is measured by the engine on held-out prompts of every task, at temperature 1 and with
one fixed strategy: so on the task it was trained on, on the others, and against the
start. Tokens are the same whichever drafts them.

Reproduces: the paper's accept length on downstream tasks, 3.76 -> 5.15 by a drafter
that was adapted to another task's RL, in kind.
"""

import argparse
import contextlib
import functools
import json
import operator
import pathlib
import random
import shutil
import statistics
import tempfile
from collections.abc import Callable

import numpy as np

from experiments.lab import (
    experiment,
    plotting,
    provenance,
    recipes,
    speculation_setting,
    tables,
)
from tlt_jax import config, policy, speculation, train_drafter, types
from tlt_jax.rl.tasks import generated, scratch_model
from tlt_jax.runtime import compile_cache
from tlt_jax.settings import drafter_run
from tlt_jax.specdec import sampling

RECIPE = "configs/tiny_drafter.py"
STRATEGY = "D6K1V7"
START, ALL = "start", "all"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MAX_PROMPT_TOKENS, MAX_NEW_TOKENS = 8, 40
MAX_ROWS = 16
# Of the questions: those that drafters are measured on.
HELD_OUT_FRAC = 0.2
# Of the target: a fifth of what it is taught is another question's answer, so that it
# is less than certain.
TEACHING = {"pretrain.steps": 600, "pretrain.num_rows": 16, "pretrain.noise_frac": 0.2}


def up(rng: random.Random) -> tuple[str, str]:
    """Returns a question and its answer: so many numbers from one on."""
    first, count = rng.randint(0, 60), rng.randint(3, 10)
    numbers = range(first, first + count)
    return f"u{first},{count}:", " ".join(map(str, numbers))


def down(rng: random.Random) -> tuple[str, str]:
    """Returns a question and its answer: so many numbers from one on, downwards."""
    first, count = rng.randint(10, 70), rng.randint(3, 10)
    numbers = range(first, first - count, -1)
    return f"d{first},{count}:", " ".join(map(str, numbers))


def letters(rng: random.Random) -> tuple[str, str]:
    """Returns a question and its answer: so many letters from one on."""
    first, count = rng.randint(0, 10), rng.randint(3, 15)
    return f"l{LETTERS[first]},{count}:", " ".join(LETTERS[first : first + count])


TASKS = {"up": up, "down": down, "letters": letters}
TRAINED_ON = (START, *TASKS, ALL)


class Mixture:
    """All tasks in turns, for the target to learn."""

    alphabet = f"0123456789 ,:{LETTERS}"
    name = "mixture"

    def __init__(self, size: int, seed: int):
        """Draws the questions."""
        rng = random.Random(seed)
        makers = [*TASKS.values()]
        self._pairs = [makers[i % len(makers)](rng) for i in range(size)]

    def examples(self, split: str) -> list[types.Example]:
        """Returns them, whatever the split."""
        return [
            types.Example(f"{split}/{i}", question, answer)
            for i, (question, answer) in enumerate(self._pairs)
        ]

    def supervised_text(self, num: int) -> list[tuple[str, str]]:
        """Returns questions with their answers."""
        return self._pairs[:num]


class World:
    """A target with its tasks and its first drafter, in a folder; made when needed."""

    def __init__(self, options: argparse.Namespace, folder: pathlib.Path, seed: int):
        """Makes the target and writes the tasks' questions."""
        self.options, self.folder, self.seed = options, folder, seed
        folder.mkdir(parents=True)
        self.files = {}
        for number, (name, make) in enumerate(TASKS.items()):
            rng = random.Random(1000 * seed + number)
            pairs = dict(make(rng) for _ in range(8 * options.texts))
            lines = [
                json.dumps({"prompt": question, "answer": answer}) + "\n"
                for question, answer in pairs.items()
                if not generated.held_out(question, HELD_OUT_FRAC)
            ]
            self.files[name] = folder / f"{name}.jsonl"
            self.files[name].write_text("".join(lines), "utf-8")
        settings = config.default()
        settings.update_from_flattened_dict(
            {
                "seed": seed,
                "model.spec": "scratch",
                "task.name": Mixture.name,
                "task.max_prompt_tokens": MAX_PROMPT_TOKENS,
                "rollout.max_new_tokens": MAX_NEW_TOKENS,
                **TEACHING,
            }
        )
        target = folder / "target"
        run = config.load(settings)
        about = scratch_model.Settings(
            run.seed, run.pretrain, run.task, run.rollout.max_new_tokens
        )
        scratch_model.make(about, Mixture(2048, seed), target)
        self.policy = policy.load(str(target))
        self.train(START)

    def train(self, trained_on: str) -> pathlib.Path:
        """Trains a drafter, unless it is there; returns its workdir."""
        workdir = self.folder / trained_on
        started = self.options.start_updates
        names = [trained_on] if trained_on in TASKS else [*TASKS]
        updates = started
        if (workdir / "drafter").exists():
            return workdir
        if trained_on != START:
            updates += self.options.updates
            # What resuming reads: the drafter and its optimizer.
            kept = pathlib.Path("checkpoints")
            shutil.copytree(self.folder / START / kept, workdir / kept)
        recipe = recipes.recipe_of(self.options.config)
        recipe.update_from_flattened_dict(
            {
                "seed": self.seed,
                "num_steps": updates,
                "model.spec": str(self.folder / "target"),
                "texts.tasks": tuple(str(self.files[name]) for name in names),
                "texts.num": self.options.texts,
                "texts.max_prompt_tokens": MAX_PROMPT_TOKENS,
                "texts.max_new_tokens": MAX_NEW_TOKENS,
                "optimizer.schedule": "constant",
                "checkpoint.every": 0,
                "eval.every": 0,
                "log.progress": "off",
            }
        )
        train_drafter.train(drafter_run.load(recipe.to_dict()), workdir)
        return workdir

    def requests(self, name: str) -> list[types.Request]:
        """Returns questions of a task that no drafter has seen, as often as needed."""
        rng = random.Random(f"{self.seed} {name}")
        drawn = dict(TASKS[name](rng) for _ in range(20 * self.options.prompts))
        held_out = [q for q in drawn if generated.held_out(q, HELD_OUT_FRAC)]
        prompts = [self.policy.tokenizer.encode_prompt(q) for q in held_out]
        return speculation_setting.requests_of(
            prompts, self.options.prompts, MAX_NEW_TOKENS
        )

    def measure(self, trained_on: str) -> list[tables.Row]:
        """Answers every task's held-out questions with a drafter."""
        loaded = speculation.load(
            str(self.train(trained_on)), self.policy.config, [f"{MAX_ROWS}:{STRATEGY}"]
        )
        engine = self.policy.engine(
            max_rows=MAX_ROWS,
            max_length=MAX_PROMPT_TOKENS + MAX_NEW_TOKENS,
            speculation=loaded,
            page_size=16,
            steps_per_call=16,
            sampling_cfg=sampling.SamplingConfig(1.0),
        )
        rows = []
        with contextlib.closing(engine.pool):
            for name in TASKS:
                completions, stats = engine.run(self.requests(name), self.seed)
                drawn = [completion.tokens.tolist() for completion in completions]
                rows.append(
                    {
                        "trained_on": trained_on,
                        "seed": self.seed,
                        "measured_on": name,
                        "prompts": len(drawn),
                        "tokens": stats.num_tokens,
                        "accept_length": stats.accept_length,
                        "tokens_digest": provenance.digest(repr(drawn)),
                    }
                )
        return rows


def worlds(
    options: argparse.Namespace, closing: contextlib.ExitStack
) -> Callable[[int], World]:
    """Returns what makes a seed's world, once."""
    compile_cache.enable()
    folder = pathlib.Path(closing.enter_context(tempfile.TemporaryDirectory()))
    return functools.cache(lambda seed: World(options, folder / str(seed), seed))


def summary_of(rows: list[tables.Row]) -> list[tables.Row]:
    """Takes means over seeds; tells how much of the own task's gain another brings."""
    found = {
        (r["trained_on"], r["measured_on"], r["seed"]): r["accept_length"] for r in rows
    }
    first = tables.where(rows, trained_on=START)
    summary = []
    grouped = tables.groups(rows, "trained_on", "measured_on")
    for (trained_on, measured_on), its in grouped.items():
        seeds, lengths = (tables.column(its, n) for n in ("seed", "accept_length"))
        starts = [found[START, measured_on, seed] for seed in seeds]
        own = [found[measured_on, measured_on, seed] for seed in seeds]
        ratios = list(map(operator.truediv, lengths, starts))
        summary.append(
            {
                "trained_on": trained_on,
                "measured_on": measured_on,
                "seeds": len(seeds),
                **tables.spread("accept_length", lengths),
                "of_start": statistics.mean(ratios),
                "of_start/min": min(ratios),
                "of_own": statistics.mean(map(operator.truediv, lengths, own)),
                "differing": tables.differing(its, first, ("measured_on", "seed")),
            }
        )
    return summary


def plot(summary: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws accept lengths by task, drafter beside drafter."""
    fig, axes = plotting.figure(
        "A drafter on other tasks than it was trained on",
        "held-out texts of",
        f"accept length (at most 7, {STRATEGY})",
        stamp,
    )
    names = tables.values(summary, "measured_on")
    kinds = tables.values(summary, "trained_on")
    width = 0.8 / len(kinds)
    for number, (kind, color) in enumerate(zip(kinds, plotting.COLORS, strict=False)):
        its = tables.where(summary, trained_on=kind)
        places = np.arange(len(names)) + (number - (len(kinds) - 1) / 2) * width
        values, low, high = (
            np.array(tables.column(its, f"accept_length{end}"))
            for end in ("", "/min", "/max")
        )
        spread = [values - low, high - values]
        label = kind if kind == START else f"then on {kind}"
        axes.bar(places, values, 0.9 * width, yerr=spread, color=color, label=label)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(bottom=1)
    axes.margins(y=0.25)
    return fig


def _adapted_to(own: bool, least: float):
    """Decides by drafters adapted to one task, on that task or on the others."""

    def decide(rows):
        tasks = tables.values(rows, "measured_on")
        found = {
            f"{r['trained_on']} on {r['measured_on']}": r["of_start"]
            for r in rows
            if r["trained_on"] in tasks and (r["trained_on"] == r["measured_on"]) == own
        }
        told = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
        return min(found.values()) >= least, f"times the start's: {told}"

    return decide


EXPERIMENT = experiment.Experiment(
    slug="transfer",
    text=__doc__,
    title="the drafter on other tasks",
    published="3.76 -> 5.15 downstream",
    larger=experiment.both(
        "--start-updates=300 --updates=1000 --texts=1024 --prompts=256"
    ),
    options=(
        experiment.Option("config", RECIPE),
        experiment.Option("start-updates", 30, "of the first drafter"),
        experiment.Option("updates", 90, "that each of the others takes further"),
        experiment.Option("texts", 96, "to train on"),
        experiment.Option("prompts", 48, "of a task, held out"),
        experiment.seeds(2),
    ),
    constants={"teaching": TEACHING},
    context=worlds,
    cells={"trained_on": TRAINED_ON},
    measure=lambda context, cell: context(cell.seed).measure(cell["trained_on"]),
    summary=summary_of,
    plot=plot,
    claims={
        "paper: adapting to a task brings 1.42 times the accept length "
        "on it": _adapted_to(True, 1.42),
        "paper: it brings more on other tasks, too": _adapted_to(False, 1.0),
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
