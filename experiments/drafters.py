"""Learn while the policy moves, or before RL and no more: drafter, rule and drift.

    python -m experiments.drafters --scale=cpu

TLT trains its drafter on all along the run; Bebop trains one well before RL, verifies
sampled drafts by the standard rules and finds that enough. Here three drafters meet
both on the texts of small RL runs (`configs/tiny.py:count`), under every rule:

- EAGLE-3's objective and HASS, token by token, and a block drafter, with the same input
  and the same layer. Equal cost is counted: multiplications and additions of the
  products of all updates, so many as `--updates` of EAGLE-3's have.
- `frozen`: all of it before RL, on texts of the policy that RL begins with. `adapted`:
  half before, half along the run, after each rollout, on its texts and those of the one
  before. `on top`: all before, and half as much again along the run, as idle workers
  have time for it.
- Keyed chains, chains judged by rejection, and by block verification.
- Policies that hardly move and that move far, by their learning rate.

The policy and its texts hang on no drafter, so that each run is made once and all
drafters learn from it. They are measured on the texts of each rollout before they learn
of them: what of chains of seven would be accepted from every position on, by all rules
on the same texts (`specdec.training.rules`). No clock has a say but in `seconds`.
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
import optax

from experiments.lab import claims, experiment, plotting, recipes, tables
from tlt_jax import speculation
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.rl.adaptation import learner as drafter_learner
from tlt_jax.runtime import compile_cache, train_state
from tlt_jax.settings import speculation as speculation_settings
from tlt_jax.specdec.texts import layout
from tlt_jax.specdec.training import objectives, rules, unroll

RECIPE = "configs/tiny.py:count"
# The policy's learning rates; the recipe's is 5e-4.
DRIFTS = {"small": 1e-4, "large": 2e-3}
# Architecture, objective, and the loss that laws are compared by; None: as published.
DRAFTERS = {
    "EAGLE-3": ("tlt", "eagle3", "lk_hybrid"),
    "HASS": ("tlt", "hass", None),
    "block": ("block", "eagle3", "lk_hybrid"),
}
FROZEN, ADAPTED, ON_TOP = "frozen", "adapted", "on top"
# Shares of the updates before RL, and along it.
SCHEDULES = {FROZEN: (1.0, 0.0), ADAPTED: (0.5, 0.5), ON_TOP: (1.0, 0.5)}
DEPTH = 7
LAYERS = (0, 1)
ROWS = {"num_rows": 4, "row_tokens": 128, "row_bases": 112}
LEARNING_RATE, AVERAGE, WARM_UP = 2e-3, 0.95, 10
# Of the run that makes the texts: no drafter is used, and its programs shall be small.
CAPTURING = {
    **recipes.DRAFTER,
    "drafter.features": "layers",
    "drafter.feature_layers": LAYERS,
    "adaptation.max_frac": 0.0,
    "adaptation.name": "eagle",
    "adaptation.num_steps": 1,
    "adaptation.row_tokens": 32,
    "adaptation.row_bases": 16,
}
# What is kept of a text is not younger than the rollout before.
KEPT_ROLLOUTS = 2


class Texts(list):
    """Records as `layout` reads them."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each."""
        return np.array([len(record.tokens) for record in self], np.int64)

    @property
    def response_starts(self) -> np.ndarray:
        """Where each one's response starts."""
        return np.array([record.response_start for record in self], np.int64)

    def read(self, index: int) -> layout.Record:
        """Returns the record at an index."""
        return self[index]

    def batches(self, seed: tuple[int, ...] | None = None) -> Iterator[unroll.Batch]:
        """Lays each text out once, in an order of the seed; None: as they stand."""
        sizes = {name: ROWS[name] for name in ("row_tokens", "row_bases")}
        given = {"num_rows": ROWS["num_rows"], "seed": seed, **sizes}
        for rows in layout.plan(self, range(len(self)), **given):
            yield layout.lay_out(self, rows, **sizes)


@dataclasses.dataclass(frozen=True)
class Step:
    """An RL step: the policy that wrote its texts, and what became of it."""

    policy: model_params.Params
    texts: Texts
    row: tables.Row


@dataclasses.dataclass(frozen=True)
class Run:
    """A run: texts of the policy that RL begins with, and the steps."""

    model: model_config.ModelConfig
    before: Texts
    steps: Sequence[Step]


class Runs:
    """What cells share: the newest RL runs, and drafters with their programs."""

    def __init__(self, options: argparse.Namespace):
        self._options = options
        compile_cache.enable()
        self.of = functools.lru_cache(len(DRIFTS))(self._make)
        self.student = functools.cache(Student)

    def _make(self, drift: str, seed: int) -> Run:
        options = self._options
        overrides = {**CAPTURING, "num_steps": options.steps, "seed": seed}
        overrides["optimizer.learning_rate"] = DRIFTS[drift]
        settings = recipes.settings_of(options.config, overrides)
        found: list[layout.Record] = []

        def taken() -> Texts:
            texts = Texts(sorted(found, key=lambda record: record.text_id))
            found.clear()
            return texts

        with recipes.begun(settings) as trainer:
            parts, steps = trainer.parts, []
            parts.workers.on_text = found.append
            for number in range(options.rollouts):
                # Of no step of the run: requests have numbers of their own.
                trainer.rollouts.take(options.steps + number, trainer.watch())
                parts.workers.release_caches()
            before, first = taken(), recipes.weights(trainer)
            for _ in range(options.steps):
                (placed,) = trainer.rollouts.newest.placed
                policy = jax.device_get(placed)
                moved = np.linalg.norm(recipes.weights(trainer) - first)
                row = trainer.take_step()
                row["policy_distance"] = float(moved / np.linalg.norm(first))
                steps.append(Step(policy, taken(), row))
        return Run(parts.model, before, steps)


class Student:
    """A drafter of one kind; it learns from any run's texts, and is measured on them.

    Its state is the learner's; `kept` and `go_on` keep one and take it up.
    """

    def __init__(self, name: str, model: model_config.ModelConfig):
        architecture, objective, loss = DRAFTERS[name]
        named = objective, {"token_loss": loss} if loss else {}
        shape = speculation_settings.DrafterShape(architecture, "layers", LAYERS)
        chosen = objectives.choose(*named)
        length = ROWS["row_tokens"]
        self.cfg = speculation.drafter_of(shape, chosen, model, length, DEPTH)
        self.objective = objectives.choose(*named, self.cfg.block_size)
        num_bases = ROWS["num_rows"] * (ROWS["row_bases"] + DEPTH - 1)
        rates = optax.linear_schedule(LEARNING_RATE / WARM_UP, LEARNING_RATE, WARM_UP)
        adam = optax.adamw(rates, 0.9, 0.95, weight_decay=0.0)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam)
        d_model, features = model.d_model, len(LAYERS)
        self._learner = drafter_learner.DrafterLearner(
            self.cfg,
            self.objective,
            train_state.averaged(optimizer, AVERAGE),
            batch=layout.described(
                **ROWS, d_model=d_model, num_features=features, dtype="float32"
            ),
            head_chunk=num_bases,
            piece_bases=0,
            depth=DEPTH,
            dtype="float32",
        )
        forward = unroll.ForwardConfig(self.cfg, head_chunk=num_bases)
        given = functools.partial(rules.measure, num_steps=DEPTH, cfg=forward)
        self._measure = jax.jit(given)

    @property
    def num_updates(self) -> int:
        """Updates taken."""
        return self._learner.num_updates

    def begin(self, policy: model_params.Params, seed: int) -> None:
        """Begins with random weights."""
        self._learner.sharpness = None
        self._learner.state = self._learner.init_state(None, policy.final_norm, seed)

    def kept(self) -> tuple:
        """Returns its state."""
        return self._learner.state, self._learner.sharpness

    def go_on(self, kept: tuple) -> None:
        """Goes on from a state."""
        self._learner.state, self._learner.sharpness = kept

    def learn(
        self, policy: model_params.Params, texts: Texts, num: int, seed: int
    ) -> None:
        """Takes `num` updates, each text once an epoch; finds the best sharpness."""
        if not num:
            return
        learner, begun = self._learner, self.num_updates
        learner.begin(tuple(jax.devices()[:1]), policy)
        epochs = (texts.batches((seed, begun, epoch)) for epoch in itertools.count())
        batches = itertools.chain.from_iterable(epochs)
        for batch in itertools.islice(batches, num):
            drafter_learner.run_through(learner.step(batch))
        drafter_learner.run_through(learner.measure(texts.batches()))
        learner.end()

    def accepted(self, policy: model_params.Params, texts: Texts) -> dict[str, float]:
        """Measures accept lengths by rule, and the overlap of first guesses."""
        weights = self._learner.weights("float32")
        target = unroll.Target(policy.embed, policy.head)
        parts = [
            self._measure(weights, batch, target, policy.head)
            for batch in texts.batches()
        ]
        sums = jax.tree.map(lambda *x: np.sum(x, axis=0), *jax.device_get(parts))
        found = {rule: float(x) for rule, x in rules.accept_lengths(sums).items()}
        return found | {"overlap": float(sums["overlap"][0] / sums["count"][0])}


def operations(student: Student) -> int:
    """Counts multiplications and additions of an update's products.

    A backward pass takes two products for each of the forward one's; of heads, which do
    not learn, one, and of the target's laws none.
    """
    cfg, steps = student.cfg, student.objective.num_steps
    layer, described = cfg.layer, drafter.describe(cfg)
    columns = ROWS["num_rows"] * ROWS["row_tokens"]
    bases = ROWS["num_rows"] * ROWS["row_bases"]

    def weights(part) -> int:
        sizes = (math.prod(weight.shape) for weight in jax.tree.leaves(part))
        return 2 * sum(sizes)

    kv = 2 * 2 * layer.num_kv_heads * layer.head_dim * layer.d_model
    context = weights((described.fuse, described.join)) + kv
    attention = 4 * layer.num_heads * layer.head_dim * ROWS["row_tokens"]
    guess = weights((described.join, described.layer)) + attention
    if described.block is not None:
        guess += weights((described.block.markov_in, described.block.markov_out))
    head = 2 * layer.d_model * layer.vocab_size
    learned = columns * context + steps * bases * guess
    return 3 * learned + (2 * steps + 1) * bases * head


def parts_of(total: int, count: int) -> list[int]:
    """Divides a number into `count` whole ones that differ by one at most."""
    ends = [total * k // count for k in range(count + 1)]
    return [end - begin for begin, end in itertools.pairwise(ends)]


def measure(
    options: argparse.Namespace, context: Runs, cell: tables.Cell
) -> list[tables.Row]:
    """Trains a drafter by every schedule on a run's texts; measures it at each step."""
    run = context.of(cell["drift"], cell.seed)
    student = context.student(cell["drafter"], run.model)
    measured_by = context.student(next(iter(DRAFTERS)), run.model)
    cost = operations(student)
    total = round(options.updates * operations(measured_by) / cost)
    first = run.steps[0].policy
    student.begin(first, cell.seed)
    states, started = {}, time.perf_counter()
    for share in sorted({share for share, _ in SCHEDULES.values()}):
        wanted = round(share * total) - student.num_updates
        student.learn(first, run.before, wanted, cell.seed)
        states[share] = student.kept(), time.perf_counter() - started
    rows = []
    for schedule, (before, along) in SCHEDULES.items():
        kept, seconds = states[before]
        student.go_on(kept)
        each = parts_of(round(along * total), len(run.steps))
        recent: collections.deque[Texts] = collections.deque(maxlen=KEPT_ROLLOUTS)
        for step, num in zip(run.steps, each, strict=True):
            found = student.accepted(step.policy, step.texts)
            rows.append(
                {
                    **cell.overrides,
                    "schedule": schedule,
                    "seed": cell.seed,
                    **recipes.columns(step.row, "step", "tokens", "tokens_digest"),
                    **recipes.columns(step.row, "reward", "policy_distance"),
                    "num_updates": student.num_updates,
                    "gflop": student.num_updates * cost / 1e9,
                    **found,
                    "seconds": seconds,
                }
            )
            recent.append(step.texts)
            started = time.perf_counter()
            texts = Texts(itertools.chain.from_iterable(recent))
            student.learn(step.policy, texts, num, cell.seed)
            seconds += time.perf_counter() - started
    return rows


def summary_of(rows: list[tables.Row]) -> list[tables.Row]:
    """Takes means over the last quarter of the steps; compares with the frozen one."""
    last = max(row["step"] for row in rows)
    tail = [row for row in rows if row["step"] > last - last // 4]

    def by_seed(its, rule):
        return {
            seed: statistics.mean(tables.column(part, rule))
            for (seed,), part in tables.groups(its, "seed").items()
        }

    summary = []
    for key, its in tables.groups(tail, "drift", "drafter", "schedule").items():
        drift, name, schedule = key
        frozen = tables.where(tail, drift=drift, drafter=name, schedule=FROZEN)
        entry: tables.Row = {
            "drift": drift,
            "drafter": name,
            "schedule": schedule,
            "seeds": len(tables.values(its, "seed")),
            "policy_distance": statistics.mean(tables.column(its, "policy_distance")),
            "num_updates": max(tables.column(its, "num_updates")),
            "gflop": max(tables.column(its, "gflop")),
        }
        for rule in rules.RULES:
            found, base = by_seed(its, rule), by_seed(frozen, rule)
            entry |= tables.spread(rule, list(found.values()))
            ratios = [found[seed] / base[seed] for seed in found]
            entry |= tables.spread(f"of_frozen/{rule}", ratios)
        entry["overlap"] = statistics.mean(tables.column(its, "overlap"))
        summary.append(entry)
    return summary


def plot(rows: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws accept lengths over RL steps, a panel for each drafter and drift."""
    last = max(row["step"] for row in rows)
    panels_of, names = [], []
    for (name, drift), its in tables.groups(rows, "drafter", "drift").items():
        ends = tables.column(tables.where(its, step=last), "policy_distance")
        panels_of.append((list(DRAFTERS).index(name), list(DRIFTS).index(drift), its))
        names.append(f"{name}, drift {drift} (weights {statistics.mean(ends):.1%})")
    order = sorted(range(len(names)), key=lambda i: panels_of[i][:2])
    fig, panels = plotting.panels(
        "A drafter learns while the policy moves, or before RL and no more",
        [names[i] for i in order],
        stamp,
        xlabel="RL step",
        ylabel="accept length",
        columns=len(tables.values(rows, "drift")),
        height=2.7,
    )
    low = min(row["keyed"] for row in rows)
    high = max(row["block"] for row in rows)
    for axes, i in zip(panels, order, strict=True):
        for schedule, color in zip(SCHEDULES, plotting.COLORS, strict=False):
            drawn = tables.where(panels_of[i][2], schedule=schedule)
            for rule, style in (("block", "-"), ("keyed", ":")):
                look = {"color": color, "label": f"{schedule}, {rule}"}
                plotting.line(axes, drawn, "step", rule, style, **look)
        axes.set_ylim(math.floor(2 * low) / 2, math.ceil(2 * high) / 2)
        if axes is not panels[0]:
            axes.legend().remove()
    panels[0].legend(frameon=False, fontsize=7, ncols=len(SCHEDULES))
    return fig


def _ratios(rows: claims.Rows, drift: str, schedule: str) -> dict[str, float]:
    """Reads the ratios to the frozen drafter, by drafter and rule."""
    return {
        f"{name} {rule}": claims.only(
            rows, drift=drift, drafter=name, schedule=schedule
        )[f"of_frozen/{rule}"]
        for name in DRAFTERS
        for rule in rules.RULES
    }


def _told(found: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items())


def _online_pays(rows: claims.Rows) -> claims.Finding:
    found = _ratios(rows, "large", ADAPTED)
    return min(found.values()) >= 1.1, f"adapted by frozen: {_told(found)}"


def _before_is_enough(rows: claims.Rows) -> claims.Finding:
    found = _ratios(rows, "small", ON_TOP)
    return max(found.values()) <= 1.02, f"on top by frozen: {_told(found)}"


def _sampled_rules_forgive(rows: claims.Rows) -> claims.Finding:
    found = _ratios(rows, "large", ADAPTED)
    gains = {
        rule: statistics.mean(found[f"{name} {rule}"] for name in DRAFTERS)
        for rule in rules.RULES
    }
    forgiven = max(gains["rejection"], gains["block"]) < gains["keyed"]
    return forgiven, f"adapted by frozen, mean of the drafters: {_told(gains)}"


def _block_keeps_up(rows: claims.Rows) -> claims.Finding:
    found = {}
    for drift in DRIFTS:
        for schedule in SCHEDULES:
            place = {"drift": drift, "schedule": schedule}
            ours, theirs = (
                claims.only(rows, drafter=name, **place)["keyed"]
                for name in ("block", "EAGLE-3")
            )
            found[f"{drift} {schedule}"] = ours / theirs
    return min(found.values()) >= 0.95, f"block by EAGLE-3, keyed: {_told(found)}"


def _whole(drift: str, *, online_wins: bool) -> Callable[[claims.Rows], claims.Finding]:
    """Compares TLT's whole, adapted and keyed, with Bebop's, frozen and by block."""

    def decide(rows):
        found = {}
        for name in DRAFTERS:
            place = {"drift": drift, "drafter": name}
            online = claims.only(rows, schedule=ADAPTED, **place)["keyed"]
            before = claims.only(rows, schedule=FROZEN, **place)["block"]
            found[name] = online / before
        values = found.values()
        holds = min(values) > 1 if online_wins else max(values) < 1
        return holds, f"adapted and keyed by frozen and block: {_told(found)}"

    return decide


EXPERIMENT = experiment.Experiment(
    slug="drafters",
    text=__doc__,
    title="drafter, rule and drift: learning online, or well before RL",
    larger=experiment.recipes("--updates=6000"),
    options=(
        experiment.Option("config", RECIPE),
        experiment.Option("steps", 24, "RL steps of a run"),
        experiment.Option("rollouts", 6, "of the policy before RL, to learn from"),
        experiment.Option("updates", 240, "of EAGLE-3; others have as many as cost it"),
        experiment.seeds(3),
    ),
    constants={
        "drafters": DRAFTERS,
        "schedules": SCHEDULES,
        "drifts": DRIFTS,
        "depth": DEPTH,
    },
    context=Runs,
    cells={"drift": DRIFTS, "drafter": DRAFTERS},
    measure=measure,
    summary=summary_of,
    plot=plot,
    claims={
        "TLT: where the policy moves far, half of the training along the run ends 10 % "
        "or more ahead of all of it before, by every drafter and rule": _online_pays,
        "Bebop: where it hardly moves, training along the run, on top of all before, "
        "brings at most 2 %": _before_is_enough,
        "Bebop: rules for sampled drafts lose less to a moving policy than the keyed "
        "one": _sampled_rules_forgive,
        "where the policy hardly moves, a frozen drafter and block verification have "
        "more accepted than an adapted and keyed one": _whole(
            "small", online_wins=False
        ),
        "where it moves far, an adapted and keyed drafter has more accepted than a "
        "frozen one and block verification": _whole("large", online_wins=True),
        "the block drafter has 95 % of EAGLE-3's accept length at equal cost of "
        "training": _block_keeps_up,
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
