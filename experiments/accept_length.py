"""Accept length of a drafter: coupled against deterministic, over depth and budget.

    python -m experiments.accept_length --scale=cpu --drafter=WORKDIR[,WORKDIR]

Held-out prompts of each drafter's own texts are answered at temperatures 0 and 1 under
each strategy. How uncertain the texts are is told by `nats_per_token`, the mean of
-log p of the tokens drawn. The tokens are the same under all strategies, so that accept
lengths compare; not so under the standard chain rules (`rejection`, `block`), whose
tokens are other samples of the same law.
Accept length: tokens per target forward and row, recovered or bonus token included.
What it is worth in time is `experiments.speculation_speed`.

Target: coupled drafting at temperature 1 has at least 1.4 times the accept length of
deterministic top-k at equal drafter and budget. Where the text is nearly certain both
guess nearly all of it, so this is a matter of the text.
"""

import argparse
import pathlib
import statistics

from matplotlib import axes as axes_lib

from experiments.lab import harness, plotting, speculation_harness
from tlt_jax.specdec import chain
from tlt_jax.specdec import strategy as strategy_lib

SLUG = "accept_length"
GREEDY = "deterministic"
CHAIN_RULES = ("rejection", "block")
STRATEGIES = "D2K1V3,D4K1V5,D8K1V9,D4K2V8,D8K2V16,D8K4V16,D8K4V32"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = speculation_harness.argument_parser(__doc__)
    parser.add_argument("--strategies", default=STRATEGIES)
    parser.add_argument("--temperatures", default="1,0")
    parser.add_argument("--batch", type=int, default=4)
    return parser.parse_args(arguments)


def measure(
    setting: speculation_harness.Setting,
    temperature: float,
    ranking: str,
    strategy: strategy_lib.Strategy,
    tokens: dict[tuple[str, float], list],
) -> harness.Row:
    """Answers the prompts under one strategy; returns what was accepted."""
    rule = ranking if ranking in CHAIN_RULES else chain.KEYED
    ranking_of = "coupled" if ranking in CHAIN_RULES else ranking
    engine = setting.engine(
        setting.options.batch, temperature, strategy, ranking_of, rule
    )
    completions, stats = engine.run(setting.requests(setting.options.num_prompts), 0)
    engine.pool.close()
    drawn = [completion.tokens.tolist() for completion in completions]
    first = tokens.setdefault((setting.texts, temperature), drawn)
    rates = {
        f"accepted/{depth}": round(rate, 4)
        for depth, rate in enumerate(stats.accept_rates(), start=1)
    }
    surprise = [-x for completion in completions for x in completion.logprobs.tolist()]
    return {
        "texts": setting.texts,
        "temperature": temperature,
        "nats_per_token": round(statistics.mean(surprise), 3),
        "ranking": ranking,
        "strategy": str(strategy),
        "draft_depth": strategy.draft_depth,
        "topk": strategy.topk,
        "tokens_to_verify": strategy.tokens_to_verify,
        "accept_length": round(stats.accept_length, 4),
        "num_steps": stats.num_accepted[0],
        "num_tokens": stats.num_tokens,
        "rows_as_first": sum(a == b for a, b in zip(drawn, first, strict=True)),
        **rates,
    }


def compare(rows: list[harness.Row]) -> list[harness.Row]:
    """Adds to coupled rows how many times longer they accept than deterministic."""
    case = ("texts", "temperature", "strategy")
    lengths = {
        (*(row[key] for key in case), row["ranking"]): row["accept_length"]
        for row in rows
    }
    for row in rows:
        other = (*(row[key] for key in case), "deterministic")
        if row["ranking"] == "coupled" and other in lengths:
            row["times_deterministic"] = row["accept_length"] / lengths[other]
    return rows


def plot(rows: list[harness.Row], path: pathlib.Path, stamp: str) -> None:
    """Draws accept length by strategy, a panel for each kind of text."""
    kinds_of_text = list(dict.fromkeys(row["texts"] for row in rows))
    strategies = len({row["strategy"] for row in rows})
    fig, panels = plotting.panels(
        "Tokens per target forward, by strategy and ranking",
        len(kinds_of_text),
        stamp,
        width=max(5.0, 1.3 * strategies),
        height=4.4,
    )
    for axes, texts in zip(panels, kinds_of_text, strict=True):
        _plot_panel(axes, [row for row in rows if row["texts"] == texts])
        axes.set_title(texts, loc="left", fontsize=10)
        axes.set_xlabel("draft_depth D, topk K, tokens_to_verify V")
    panels[0].set_ylabel("accept length")
    plotting.save(fig, path)


def _plot_panel(axes: axes_lib.Axes, rows: list[harness.Row]) -> None:
    strategies = list(dict.fromkeys(row["strategy"] for row in rows))
    kinds = list(dict.fromkeys((r["temperature"], r["ranking"]) for r in rows))
    width = 0.8 / len(kinds)
    for i, (kind, color) in enumerate(zip(kinds, plotting.COLORS, strict=False)):
        shift = (i - len(kinds) / 2 + 0.5) * width
        its = [row for row in rows if (row["temperature"], row["ranking"]) == kind]
        places = [strategies.index(row["strategy"]) + shift for row in its]
        label = f"T={kind[0]:g}, {kind[1]}" if kind[0] else "T=0"
        lengths = [row["accept_length"] for row in its]
        bars = axes.bar(places, lengths, width, color=color, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=6, padding=1)
    axes.set_xticks(range(len(strategies)), strategies, fontsize=8)
    axes.axhline(1, color=plotting.GREY, linewidth=0.8)
    axes.margins(y=0.2)


def main(arguments: list[str] | None = None) -> list[harness.Row]:
    """Runs the experiment; returns the rows that it also writes."""
    options = parse_arguments(arguments)
    strategies = [strategy_lib.parse(s) for s in options.strategies.split(",")]
    temperatures = [float(t) for t in options.temperatures.split(",")]
    settings = [
        speculation_harness.Setting(
            argparse.Namespace(**vars(options) | {"drafter": directory})
        )
        for directory in options.drafter.split(",")
    ]
    provenance = harness.Provenance(
        SLUG,
        {
            "drafters": [setting.about() for setting in settings],
            "strategies": options.strategies,
            "temperatures": temperatures,
        },
        speculation_harness.versions(),
    )
    rows, tokens = [], {}
    for setting in settings:
        for temperature in temperatures:
            for strategy in strategies:
                # Greedily there is no noise to couple by.
                rankings = ["coupled", "deterministic"] if temperature else [GREEDY]
                if temperature and strategy.topk == 1:
                    rankings += CHAIN_RULES
                for ranking in rankings:
                    row = measure(setting, temperature, ranking, strategy, tokens)
                    rows.append(row)
                    print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
    compare(rows)
    out = harness.folder_of(options)
    harness.write_csv(out / f"{SLUG}.csv", rows)
    provenance.write(out / f"{SLUG}.json")
    plot(rows, out / f"{SLUG}.png", plotting.stamp(provenance.record))
    print(harness.format_table(rows))
    return rows


if __name__ == "__main__":
    main()
