"""Claims about the results, each decided by reading its table.

A claim is of the paper (does what it says hold here, at this scale?) or of ours. What
does not hold is as much a result as what does, and stays in the list.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from experiments.lab import cells, harness

HOLDS, FAILS, NO_DATA = "holds", "fails", "no data"
Rows = Sequence[harness.Row]
# Whether it holds, and what was found.
Finding = tuple[bool, str]


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something that a table can refute.

    Attributes:
      slug: of the experiment.
      text: what is claimed.
      decide: reads the table.
      table: file; empty: `<slug>_summary.csv`.
    """

    slug: str
    text: str
    decide: Callable[[Rows], Finding]
    table: str = ""

    @property
    def file(self) -> str:
        """Name of the table."""
        return self.table or f"{self.slug}_summary.csv"


def only(rows: Rows, **wanted: object) -> harness.Row:
    """Returns the row with these entries.

    Raises:
      LookupError: there is none.
    """
    for row in rows:
        if all(row.get(name) == value for name, value in wanted.items()):
            return row
    raise LookupError(f"no row with {wanted}")


def at_least(column: str, least: float, **wanted: object) -> Callable[[Rows], Finding]:
    """Decides whether an entry is large enough."""

    def decide(rows):
        value = only(rows, **wanted)[column]
        return value >= least, f"{column} {value:.3g}, claimed at least {least:g}"

    return decide


def at_most(column: str, most: float, **wanted: object) -> Callable[[Rows], Finding]:
    """Decides whether an entry is small enough."""

    def decide(rows):
        value = only(rows, **wanted)[column]
        return value <= most, f"{column} {value:.3g}, claimed at most {most:g}"

    return decide


def _all_equal(rows: Rows) -> Finding:
    differing = sum(row["steps_differing"] for row in rows)
    return differing == 0, f"steps that differ: {differing}"


def _no_row_differs(rows: Rows) -> Finding:
    differing = sum(row["rows_differing"] or 0 for row in rows)
    return differing == 0, f"rows that differ: {differing}"


def _falls_with_batch(rows: Rows) -> Finding:
    chosen = [r for r in rows if r["system"] == "D7K1V8"]
    found = {r["batch"]: r["speedup"] for r in chosen}
    first, last = found[min(found)], found[max(found)]
    return (
        first > last,
        f"D7K1V8: {first:.2f} at {min(found)}, {last:.2f} at {max(found)}",
    )


def _noise_is_cheap(rows: Rows) -> Finding:
    shares = [row["noise_ms"] / row["step_ms"] for row in rows]
    return max(shares) < 0.1, f"at most {max(shares):.1%}"


def _adapted_is_ahead(rows: Rows) -> Finding:
    name = "accept_length/last_quarter"
    adapted = only(rows, system="adapted")[name]
    frozen = only(rows, system="frozen")[name]
    return adapted > frozen, f"last quarter: {adapted:.2f} against {frozen:.2f}"


def _stalls_fall(rows: Rows) -> Finding:
    found = [
        [only(rows, target=t, system=s)["stall_ms/median"] for s in order]
        for t in dict.fromkeys(row["target"] for row in rows)
        for order in [("blocking", "async", "selective")]
    ]
    told = "; ".join(", ".join(f"{ms:.0f}" for ms in stalls) for stalls in found)
    return all(a > b > c for a, b, c in found), f"ms: {told}"


def _clusters_gain(rows: Rows) -> Finding:
    pairs = [r for r in rows if r["published"]]
    errors = [abs(r["times_faster"] / r["published"] - 1) for r in pairs]
    told = ", ".join(
        f"{r['model'].split('-')[-1]} x{r['devices']}: {r['times_faster']:.2f} "
        f"({r['published']:g})"
        for r in pairs
    )
    return max(errors) <= 0.10, f"simulated (published): {told}"


def _grows_with_devices(rows: Rows) -> Finding:
    ok, told = True, []
    for model in dict.fromkeys(row["model"] for row in rows):
        its = [r for r in rows if r["model"] == model and r["system"] == "threshold"]
        values = [r["times_faster"] for r in sorted(its, key=lambda r: r["devices"])]
        ok &= all(b >= 0.98 * a for a, b in zip(values, values[1:], strict=False))
        told.append(f"{model} {values[0]:.2f} to {values[-1]:.2f}")
    return ok, "; ".join(told)


def _within_tolerance(rows: Rows) -> Finding:
    told = "; ".join(
        f"{r['system']}, given {r['given']}: {r['ratio']:.2f} "
        f"({r['steps_within_tolerance']} of {r['steps']} single RL steps, too)"
        for r in rows
    )
    return all(r["within_tolerance"] for r in rows), told


def _coincide(rows: Rows) -> Finding:
    gap = max(row["reward_gap_max"] for row in rows)
    differing = sum(row["steps_differing"] for row in rows)
    steps = sum(row["steps"] for row in rows)
    return not differing, f"{differing} of {steps} steps differ; largest gap {gap:g}"


def _arms_equal(rows: Rows) -> Finding:
    differing = sum(row["steps_differing"] for row in rows)
    tokens = sum(row["tokens"] for row in rows)
    return not differing, (
        f"{len(rows)} arms, {tokens} tokens: {differing} steps differ"
    )


def _in_order(column: str, key: str, names: Sequence[str]) -> Callable[[Rows], Finding]:
    """Decides whether an entry rises along the named rows."""

    def decide(rows):
        values = [only(rows, **{key: name})[column] for name in names]
        told = ", ".join(f"{n} {v:.3g}" for n, v in zip(names, values, strict=True))
        return values == sorted(values), told

    return decide


def _devices(rows: Rows) -> Finding:
    errors = {r["device"]: r["times_faster"] / r["published"] - 1 for r in rows}
    worst = max(errors, key=lambda name: abs(errors[name]))
    return abs(errors[worst]) <= 0.1, f"worst: {worst}, off by {errors[worst]:+.0%}"


def _adapted_to(own: bool, least: float) -> Callable[[Rows], Finding]:
    """Decides by drafters adapted to one task, on that task or on the others."""

    def decide(rows):
        tasks = {row["measured_on"] for row in rows}
        found = {
            f"{r['trained_on']} on {r['measured_on']}": r["of_start"]
            for r in rows
            if r["trained_on"] in tasks and (r["trained_on"] == r["measured_on"]) == own
        }
        told = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
        return min(found.values()) >= least, f"times the start's: {told}"

    return decide


def _of_warm_up(drifts: Sequence[str], least: float, most: float = float("inf")):
    """Decides whether updates after every rollout end where claimed."""

    def decide(rows):
        values = {
            drift: only(rows, drift=drift, system="every step")[
                "of_warm_up/last_quarter"
            ]
            for drift in drifts
        }
        told = ", ".join(f"{drift} {value:.3f}" for drift, value in values.items())
        ok = all(least <= value <= most for value in values.values())
        return ok, f"of one warm-up's accept length in the last quarter: {told}"

    return decide


def _reaches_the_bandwidth(rows: Rows) -> Finding:
    """Decides by the temperature of rollouts, whose draws take noise."""
    found = [row for row in rows if row["temperature"] == 1]
    shares = {row["context"]: row["bandwidth_frac/median"] for row in found}
    told = ", ".join(f"{share:.0%} at {n} cached" for n, share in shares.items())
    model, dtype, device = (found[0][name] for name in ("model", "dtype", "device"))
    return min(shares.values()) >= 0.85, f"{model}, {dtype}, {device}: {told}"


def _timeline_case(rows: Rows) -> Finding:
    value = only(rows, world="timeline", threshold=32)["times_faster"]
    return abs(value / 2.44 - 1) <= 0.1, f"simulated {value:.2f}, published 2.44"


def _ahead_of_peers(peer: str, batch: int, least: float) -> Callable[[Rows], Finding]:
    return at_least(
        "tokens_per_s/times", least, batch=batch, system=peer, temperature=0
    )


CLAIMS = (
    Claim(
        "end_to_end",
        "tokens, rewards, losses and gradient norms are equal in all steps",
        _all_equal,
    ),
    Claim(
        "end_to_end",
        "everything on is at least 1.5 times everything off on a CPU",
        at_least("times_faster", 1.5, system="tlt"),
    ),
    Claim(
        "end_to_end",
        "at least 80 % of the workers' idle time is used for training",
        at_least("trained_of_idle", 0.8, system="tlt"),
    ),
    Claim(
        "end_to_end",
        "paper: whole steps 1.7 times as fast",
        at_least("times_faster", 1.7, system="tlt"),
    ),
    Claim(
        "trainer_makespan",
        "rollouts last at most 2 % longer beside a drafter in training",
        at_most("times_as_long", 1.02, system="with trainer", processes=2),
    ),
    Claim(
        "reward_curves",
        "paper: reward curves lie on each other; ours coincide exactly",
        _coincide,
    ),
    Claim("losslessness", "every arm draws the tokens of plain decoding", _arms_equal),
    Claim(
        "active_batch",
        "the simulated timeline case is within 10 % of the paper's 2.44",
        _timeline_case,
    ),
    Claim(
        "devices",
        "predicted speedups by device are within 10 % of the paper's",
        _devices,
        "devices.csv",
    ),
    Claim(
        "objectives",
        "paper: EAGLE-3 ahead of HASS ahead of EAGLE (here at equal cost)",
        _in_order("accept_length/coupled", "case", ("eagle", "hass", "eagle3")),
    ),
    Claim(
        "ngram_start",
        "before the drafter is ready suffix matches give more tokens a step than none",
        _in_order(
            "early_tokens_per_row_step", "system", ("drafter", "matches, then drafter")
        ),
    ),
    Claim(
        "program_pool",
        "paper: bucketed strategies cost less than all at all batches (in programs: a "
        "compiler for CPUs does not tell the size of its code)",
        _in_order(
            "programs",
            "case",
            ("one strategy", "four, bucketed", "four, at all batches"),
        ),
        "program_pool.csv",
    ),
    Claim("speculation_speed", "no row's tokens differ from plain's", _no_row_differs),
    Claim(
        "speculation_speed",
        "at least 2 times plain decoding at batch 1 on a CPU",
        at_least("speedup", 2.0, batch=1, system="D11K1V12"),
    ),
    Claim(
        "speculation_speed",
        "noise takes less than a tenth of a step, at every batch",
        _noise_is_cheap,
    ),
    Claim(
        "speculation_speed", "paper: the gain falls with the batch", _falls_with_batch
    ),
    Claim(
        "drafter_adaptation",
        "paper: an adapted drafter has more accepted than a frozen one",
        _adapted_is_ahead,
    ),
    Claim(
        "drafter_cadence",
        "where the target moves, updates along the way end ahead of one warm-up of "
        "equal cost (5 % or more)",
        _of_warm_up(("the recipe's", "large"), 1.05),
    ),
    Claim(
        "drafter_cadence",
        "where it hardly moves, one warm-up does as well (within 2 %)",
        _of_warm_up(("small",), 0.98, 1.02),
    ),
    Claim(
        "transfer",
        "paper: adapting to a task brings 1.42 times the accept length on it",
        _adapted_to(True, 1.42),
    ),
    Claim(
        "transfer",
        "paper: it brings more on other tasks, too",
        _adapted_to(False, 1.0),
    ),
    Claim(
        "tuner_regret",
        "less than half of BEG-MAB's regret on the recorded trace",
        at_most("of_beg_mab", 0.5, world="recorded", tuner="cost_model"),
    ),
    Claim(
        "tuner_regret",
        "the same where nothing drifts",
        at_most(
            "of_beg_mab", 0.5, world="recorded, drafter as trained", tuner="cost_model"
        ),
    ),
    Claim(
        "checkpoint_stall",
        "paper: stalls fall from blocking to async to selective",
        _stalls_fall,
    ),
    Claim(
        "packing",
        "paper: packing trains at least 2 times the texts per second",
        at_least("texts_per_s/times", 2.0, system="longest"),
    ),
    *(
        Claim(
            "decode_speed",
            f"{least:g} times {peer}'s tokens per second at batch {batch}",
            _ahead_of_peers(peer, batch, least),
        )
        for peer, batch, least in (
            *(("transformers", batch, 1.5) for batch in (1, 8, 32)),
            ("llamacpp", 1, 1.0),
            ("vllm", 8, 1.0),
            ("vllm", 32, 1.0),
        )
    ),
    Claim(
        "decode_bandwidth",
        "plain decoding at batch 1 reaches 85 % of the memory's bandwidth (the target "
        "is of one H200, 7B in bf16)",
        _reaches_the_bandwidth,
    ),
    Claim(
        "grpo_step_speed",
        "3 times TRL's GRPO step, compilation apart",
        at_least("steady_step_s/times", 3.0, system="trl"),
    ),
    Claim(
        "simulator_check",
        "simulated makespans are within 10 % of the recorded runs'",
        _within_tolerance,
    ),
    Claim(
        "cluster_size",
        "the simulation is within 10 % of the paper's table by cluster size",
        _clusters_gain,
        "cluster_size.csv",
    ),
    Claim(
        "cluster_size",
        "paper: the gain does not fall with the number of devices",
        _grows_with_devices,
        "cluster_size.csv",
    ),
)


def check(folder: pathlib.Path) -> list[harness.Row]:
    """Decides every claim by the tables of a folder."""
    found = []
    for claim in CLAIMS:
        verdict, told = NO_DATA, f"{claim.file} is not there"
        path = folder / claim.file
        if path.exists():
            try:
                holds, told = claim.decide(cells.read(path))
                verdict = HOLDS if holds else FAILS
            except (LookupError, TypeError, ValueError) as error:
                told = f"{claim.file} does not tell: {error}"
        found.append(
            {
                "experiment": claim.slug,
                "claim": claim.text,
                "verdict": verdict,
                "found": told,
            }
        )
    return found
