"""A run's report: one HTML file that needs no server and loads nothing.

`python -m tlt_jax.report --workdir=DIR [--out=FILE]` writes it at any time, while the
run goes on too: reward, lengths, time split, accept length, what the workers did, and
sample answers in which the tokens that a draft had guessed are coloured.
"""

import codecs
import json
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tlt_jax.models.formats import json_file
from tlt_jax.models.formats import tokenizer as model_tokenizer
from tlt_jax.specdec import chain
from tlt_jax.viz import page as page_lib
from tlt_jax.viz import plots, readable, style
from tlt_jax.workdir import metrics, progress

FILE = "report.html"
_CAPTIONS = {
    "reward": "Mean reward of a step's completions, and its spread.",
    "lengths": "Tokens of a step's completions; the longest decide when it ends.",
    "time_split": "Where a step's seconds go. Compilation stands apart.",
    "accept_length": "Tokens that a pass of the target yields per row, on average.",
    "policy": "Entropy, gradient norm, and how far the rollout's log-probabilities "
    "are from the trainer's own.",
    "drafter_training": "How good the drafter becomes that is trained in the run.",
    "timeline": "What every worker did: all steps as shares, some of them in full.",
}
# Title, name and format; and what stands there where a run has none of it.
_COLUMNS = (
    ("step", "step", ".0f"),
    ("reward", "reward/mean", ".3f"),
    ("length", "length/mean", ".0f"),
    ("95 %", "length/p95", ".0f"),
    ("longest", "length/max", ".0f"),
    ("accept", "specdec/accept_length", ".2f", 1.0),
    ("strategy", "specdec/strategy", "s", "none"),
    ("rule", "specdec/rule", "s", chain.KEYED),
    ("drafter", "drafter/version", ".0f"),
    ("idle", "workers/idle_frac", ".0%", 0.0),
    ("rollout s", "time/rollout_s", ".2f"),
    ("update s", "time/update_s", ".2f"),
    ("compile s", "time/compile_s", ".2f"),
    ("step s", "time/step_s", ".2f"),
    ("tokens/s", "rollout/tokens_per_s", ",.0f"),
    ("mismatch", "mismatch/logprob_max_abs", ".1e"),
)
_SHOWN_ROWS = 100
# What a completion must have to be shown.
_NEEDED = {"example_id", "reward", "num_tokens", "finish_reason", "answer", "text"}
_DRAFTED = (
    "Green: tokens that a draft had guessed and the target accepted. The others the "
    "target drew itself."
)
_SAME = "Without drafts the text would be the same."
_OTHER = "Without drafts the text would be another one of the same law."


def write(
    workdir: str | pathlib.Path,
    out: str | pathlib.Path | None = None,
    num_answers: int = 8,
) -> pathlib.Path:
    """Write the report of a run with at least one recorded step.

    `out` is replaced whole; None: `report.html` in the workdir. `num_answers` are
    sample answers of the newest step whose completions were kept.

    Raises:
      metrics.MetricsError: there is no record, or it is damaged.
      OSError: the file cannot be written.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / FILE if out is None else pathlib.Path(out)
    part = path.with_name(path.name + ".part")
    part.write_text(page(workdir, num_answers), encoding="utf-8")
    os.replace(part, path)
    return path


def page(workdir: pathlib.Path, num_answers: int) -> str:
    """Make the report's HTML; see `write`."""
    rows = readable.rows(metrics.read(workdir))
    if not rows:
        raise metrics.MetricsError(
            f"{workdir / metrics.FILE} has no step yet: wait for the first one."
        )
    rule = _chain_rule(rows)
    path = workdir / "config.json"
    config = json_file.read(path, "restore it") if path.is_file() else {}
    pictures = [
        (name, style.picture(drawn, dpi=110).png, _CAPTIONS[name])
        for name, drawn in plots.figures(workdir).items()
    ]
    parts = [
        page_lib.tiles(summary(rows)),
        page_lib.section("Plots", page_lib.plots(pictures)),
    ]
    step, answers, num_unread = sample_answers(workdir, num_answers)
    if answers or num_unread:
        shown = "".join(map(page_lib.answer, answers))
        drafted = any(flag for one in answers for _, flag in one.pieces)
        notes = [f"{_DRAFTED} {_OTHER if rule else _SAME}"] if drafted else []
        if num_unread:
            notes.append(f"Lines of rollouts/ that cannot be read: {num_unread}.")
        title = f"Answers of step {step}"
        parts.append(page_lib.section(title, shown, " ".join(notes)))
    names, cells = _table(rows)
    left_out = len(rows) - len(cells)
    told = f"The last {len(cells)} of {len(rows)} records." if left_out else ""
    parts.append(page_lib.section("Steps", page_lib.table(names, cells), told))
    if config:
        parts.append(page_lib.folded("Settings", json.dumps(config, indent=2)))
    return page_lib.page(
        f"tlt_jax: {workdir.resolve().name}", _subtitle(rows, config), parts
    )


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Say the run's most telling numbers, by what they are."""

    def total(name: str) -> float:
        return sum(readable.number(row, name) or 0 for row in steps)

    steps = [row for row in rows if readable.number(row, "time/step_s") is not None]
    told: dict[str, str] = {}
    means = [readable.number(row, "reward/mean") for row in rows]
    rewards = [mean for mean in means if mean is not None]
    if rewards:
        few = rewards[-min(10, max(len(rewards) // 5, 1)) :]
        told["reward, first step"] = f"{rewards[0]:.3f}"
        told[f"reward, last {len(few)}"] = f"{statistics.fmean(few):.3f}"
    tokens = total("rollout/tokens")
    if tokens:
        told["tokens drawn"] = f"{tokens:,}"
    if steps:
        compiling = [readable.number(row, "time/compile_s") or 0 for row in steps]
        pairs = zip(steps, compiling, strict=True)
        median_s = statistics.median(row["time/step_s"] - spent for row, spent in pairs)
        told["a step, median, without compiling"] = progress.duration(median_s)
        told["compiling"] = progress.duration(sum(compiling))
    counts = [readable.numbers(row, "specdec/num_accepted") for row in steps]
    passes = sum(one[0] for one in counts if one)
    if passes:
        yielded = sum(map(sum, counts))
        rule = _chain_rule(rows)
        name = f"accept length, by the rule {rule}" if rule else "accept length"
        told[name] = f"{yielded / passes:.2f}"
    idle_s, trained_s = total("workers/idle_s"), total("workers/trained_s")
    has_drafter = any(row.get("drafter/version") is not None for row in steps)
    if idle_s and (trained_s or has_drafter):
        told["of the workers' idle time, trained"] = f"{trained_s / idle_s:.0%}"
    return told


def sample_answers(
    workdir: str | pathlib.Path, num: int
) -> tuple[int, list[page_lib.Answer], int]:
    """Choose up to `num` completions of the newest step whose completions were kept.

    Returns:
      The step; the answers: the longest, then best to worst in even steps; none where
      no completions were kept; and how many lines could not be read on the way.
    """
    found = sorted(pathlib.Path(workdir).glob("rollouts/step_*.jsonl"), reverse=True)
    files = [path for path in found if path.stem.removeprefix("step_").isdecimal()]
    records: list[Mapping[str, Any]] = []
    step = num_unread = 0
    for path in files if num > 0 else ():
        records, num_bad = readable.completions(path)
        # A file without a line was cut off before the first.
        num_unread += max(num_bad, int(not records))
        if records:
            step = int(path.stem.removeprefix("step_"))
            break
    if not records:
        return step, [], num_unread
    tokenizer = model_tokenizer.from_directory(pathlib.Path(workdir) / "tokenizer")
    longest = max(range(len(records)), key=lambda i: records[i]["num_tokens"])
    ranked = sorted(
        (i for i in range(len(records)) if i != longest),
        key=lambda i: (-records[i]["reward"], i),
    )
    few = min(num - 1, len(ranked))
    even = [ranked[i * (len(ranked) - 1) // max(few - 1, 1)] for i in range(few)]
    chosen = [longest, *dict.fromkeys(even)]
    answers = [_answer(records[i], tokenizer, i == longest) for i in chosen]
    return step, answers, num_unread


def pieces(
    record: Mapping[str, Any], tokenizer: model_tokenizer.Tokenizer
) -> list[tuple[str, bool]]:
    """Cut a kept completion where tokens that were drafted begin and end.

    A character whose bytes lie on both sides of a cut goes to the right.
    """
    tokens, drafted = record.get("tokens"), record.get("drafted")
    if not tokens or drafted is None:
        return [(record["text"], False)]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    cut: list[tuple[str, bool]] = []
    at = 0
    for first, end in [*drafted, (len(tokens), len(tokens))]:
        for part, flag in ((tokens[at:first], False), (tokens[first:end], True)):
            data = b"".join(tokenizer.token_bytes(token) for token in part)
            if text := decoder.decode(data):
                cut.append((text, flag))
        at = end
    if rest := decoder.decode(b"", final=True):
        cut.append((rest, False))
    return cut


def _chain_rule(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rule of drafts if it does not keep the tokens; else nothing."""
    rules = [row.get("specdec/rule", chain.KEYED) for row in rows]
    return next((str(rule) for rule in rules if rule != chain.KEYED), "")


def _answer(record, tokenizer, is_longest) -> page_lib.Answer:
    drafted = record.get("drafted")
    about = [f"{record['num_tokens']} tokens", f"ended by {record['finish_reason']}"]
    if is_longest:
        about.insert(0, "the longest")
    if drafted is not None:
        about.append(f"{sum(end - first for first, end in drafted)} drafted")
    prompt = record["prompt"] if "prompt" in record else record["example_id"]
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    cut = pieces(record, tokenizer)
    told = ", ".join(about)
    return page_lib.Answer(told, record["reward"], prompt, record.get("answer"), cut)


def _table(rows) -> tuple[list[str], list[list[str]]]:
    def cell(row, name, spec):
        value = row.get(name) if spec == "s" else readable.number(row, name)
        return "" if value is None else format(value, spec)

    columns = [
        (title, name, spec)
        for title, name, spec, *none in _COLUMNS
        if any(cell(row, name, spec) and row[name] not in none for row in rows)
    ]
    cells = [[cell(row, *c[1:]) for c in columns] for row in rows[-_SHOWN_ROWS:]]
    return [title for title, _, _ in columns], cells


def _subtitle(rows, config: Mapping[str, Any]) -> str:
    told = [f"step {rows[-1]['step']} of {config.get('num_steps', '?')}"]
    for name, section, key in (
        ("model", "model", "spec"),
        ("task", "task", "name"),
        ("algorithm", "algorithm", "name"),
        ("speculation", "specdec", "mode"),
        ("workers", "workers", "num"),
    ):
        settings = config.get(section)
        if isinstance(settings, Mapping) and key in settings:
            told.append(f"{name} {settings[key]}")
    if "seed" in config:
        told.append(f"seed {config['seed']}")
    return " · ".join(told)
