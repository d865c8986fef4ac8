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
import itertools
import statistics
import time
from collections.abc import Callable, Mapping

import matplotlib.lines

from experiments import drafter_students as students
from experiments.lab import claims, experiment, plotting, recipes, tables
from tlt_jax.specdec.training import rules

RECIPE = next(iter(students.STUDIES))
FROZEN, ADAPTED, ON_TOP = "frozen", "adapted", "on top"
# Shares of the updates before RL, and along it.
SCHEDULES = {FROZEN: (1.0, 0.0), ADAPTED: (0.5, 0.5), ON_TOP: (1.0, 0.5)}
# A drafter learns from the texts of so many newest rollouts.
KEPT_ROLLOUTS = 2
_MOVED = "policy_distance"


def parts_of(total: int, count: int) -> list[int]:
    """Divides a number into `count` whole ones that differ by one at most."""
    ends = [total * k // count for k in range(count + 1)]
    return [end - begin for begin, end in itertools.pairwise(ends)]


def measure(
    options: argparse.Namespace, context: students.Runs, cell: tables.Cell
) -> list[tables.Row]:
    """Trains a drafter by every schedule on a run's texts; measures it at each step."""
    run = context.of(cell["drift"], cell.seed)
    student = context.student(cell["drafter"], run.model)
    measured_by = context.student(next(iter(students.DRAFTERS)), run.model)
    cost = student.cost
    total = round(options.updates * measured_by.cost / cost)
    first = run.steps[0].policy
    student.begin(run, cell.seed)
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
        recent: collections.deque[students.Texts] = collections.deque(
            maxlen=KEPT_ROLLOUTS
        )
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
            texts = students.Texts(itertools.chain.from_iterable(recent))
            student.learn(step.policy, texts, num, cell.seed)
            seconds += time.perf_counter() - started
    return rows


def summary_of(rows: list[tables.Row]) -> list[tables.Row]:
    """Takes means over the last quarter of the steps; compares with the frozen one."""
    last = max(row["step"] for row in rows)
    tail = [row for row in rows if row["step"] > last - max(last // 4, 1)]

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
            _MOVED: statistics.mean(tables.column(its, _MOVED)),
            "num_updates": max(tables.column(its, "num_updates")),
            "gflop": max(tables.column(its, "gflop")),
        }
        for rule in rules.RULES:
            found, base = by_seed(its, rule), by_seed(frozen, rule)
            entry |= tables.spread(rule, list(found.values()))
            ratios = [found[seed] / base[seed] for seed in found]
            entry |= tables.spread(f"of_frozen/{rule}", ratios)
        for name in (*rules.SHARPENED, "overlap"):
            entry[name] = statistics.mean(tables.column(its, name))
        summary.append(entry)
    return summary


def plot(rows: list[tables.Row], stamp: str, config: str) -> plotting.Figure:
    """Draws accept lengths over RL steps, a panel for each drafter and drift."""
    last = max(row["step"] for row in rows)
    found = tables.groups(rows, "drafter", "drift")
    wanted = [
        key
        for key in itertools.product(students.DRAFTERS, students.DRIFTS)
        if key in found
    ]
    names = []
    for name, drift in wanted:
        ends = tables.column(tables.where(found[name, drift], step=last), _MOVED)
        moved = f"weights moved {statistics.mean(ends):.1%}"
        names.append(f"{name}, {drift} drift ({moved})")
    fig, panels = plotting.panels(
        "A drafter learns while the policy moves, or before RL and no more",
        names,
        stamp,
        xlabel="RL step",
        ylabel="accept length",
        columns=len(tables.values(rows, "drift")),
        height=2.5,
    )
    looks = [
        {"linestyle": style, "color": color, "label": f"{schedule}, {rule}"}
        for schedule, color in zip(SCHEDULES, plotting.COLORS, strict=False)
        for rule, style in (("block", "-"), ("keyed", ":"))
    ]
    for axes, key in zip(panels, wanted, strict=True):
        for look in looks:
            schedule, rule = look["label"].split(", ")
            drawn = tables.where(found[key], schedule=schedule)
            style, color = look["linestyle"], look["color"]
            plotting.line(axes, drawn, "step", rule, style, color=color)
        axes.set_ylim(1, students.study_of(config).depth + 1)
        axes.xaxis.get_major_locator().set_params(integer=True)
    lines = [matplotlib.lines.Line2D([], [], **look) for look in looks]
    panels[0].legend(
        handles=lines, frameon=False, fontsize=7, ncols=3, loc="lower left"
    )
    return fig


def _ratios(rows: claims.Rows, drift: str, schedule: str) -> dict[str, float]:
    """Reads the ratios to the frozen drafter, by drafter and rule."""
    return {
        f"{name} {rule}": claims.only(
            rows, drift=drift, drafter=name, schedule=schedule
        )[f"of_frozen/{rule}"]
        for name in students.DRAFTERS
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
        rule: statistics.mean(found[f"{name} {rule}"] for name in students.DRAFTERS)
        for rule in rules.RULES
    }
    forgiven = max(gains["rejection"], gains["block"]) < gains["keyed"]
    return forgiven, f"adapted by frozen, mean of the drafters: {_told(gains)}"


def _block_keeps_up(rows: claims.Rows) -> claims.Finding:
    found = {}
    for drift in students.DRIFTS:
        for schedule in SCHEDULES:
            place = {"drift": drift, "schedule": schedule}
            ours, theirs = (
                claims.only(rows, drafter=name, **place)["keyed"]
                for name in ("block", "EAGLE-3")
            )
            found[f"{drift} {schedule}"] = ours / theirs
    return min(found.values()) >= 0.95, f"block by EAGLE-3, keyed: {_told(found)}"


def _sharpening_pays(rows: claims.Rows) -> claims.Finding:
    found = {
        f"{row['drift']} {row['drafter']}": row["block_sharpened"] / row["block"]
        for row in tables.where(rows, schedule=FROZEN)
    }
    return min(found.values()) >= 1.05, f"frozen, block verification: {_told(found)}"


def _whole(drift: str, *, online_wins: bool) -> Callable[[claims.Rows], claims.Finding]:
    """Compares TLT's whole, adapted and keyed, with Bebop's, frozen and by block."""

    def decide(rows):
        found = {}
        for name in students.DRAFTERS:
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
    larger=experiment.both("--config=configs/smollm2_tlt.py:products --updates=2000"),
    options=(
        experiment.Option("config", RECIPE),
        experiment.Option("steps", 16, "RL steps of a run"),
        experiment.Option("rollouts", 4, "of the policy before RL, to learn from"),
        experiment.Option("updates", 200, "of EAGLE-3; others have as many as cost it"),
        experiment.seeds(3),
    ),
    constants={
        "drafters": students.DRAFTERS,
        "schedules": SCHEDULES,
        "drifts": students.DRIFTS,
    },
    settings=lambda options: {
        "study": dataclasses.asdict(students.study_of(options.config))
    },
    context=students.Runs,
    cells={"drift": students.DRIFTS, "drafter": students.DRAFTERS},
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
        "sampled drafts of a sharpened law are accepted 5 % longer": _sharpening_pays,
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
