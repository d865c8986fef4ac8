r"""Accept length of a drafter: coupled against deterministic, over depth and budget.

    python -m experiments.accept_length --scale=cpu \
        --drafter=workdirs/random_numbers_drafter,workdirs/counting_drafter

Held-out prompts of each drafter's own texts are answered at temperatures 0 and 1 under
each strategy. How uncertain the texts are is told by `nats_per_token`, the mean of
-log p of the tokens drawn. The tokens are the same under all strategies, so that accept
lengths compare; not so under the standard rules for sampled drafts (`rejection`, for
chains `block`), whose tokens are other samples of the same law.
Accept length: tokens per target forward and row, recovered or bonus token included.
What it is worth in time is `experiments.speculation_speed`. That of a general drafter
(`:general`), on text of which it is not certain:

    python -m experiments.accept_length --scale=cpu --texts=chats,reasoning \
        --drafter=workdirs/general_drafter --temperatures=1,0.6,0

The drafters of record are
those of `configs/smollm2_drafter.py`, `:random_numbers` and `:counting`, by

    python -m tlt_jax.train_drafter --workdir=workdirs/random_numbers_drafter \
        --config=configs/smollm2_drafter.py:random_numbers
    python -m tlt_jax.train_drafter --config=configs/smollm2_drafter.py:counting \
        --workdir=workdirs/counting_drafter

Targets, on random numbers at temperature 1: coupled drafting has at least 1.4 times the
accept length of deterministic top-k at equal drafter and budget; chains judged by
`block` have at least 1.4 times that of coupled ones, whose rule is `keyed`; coupled
trees of 16 nodes have at least 0.9 of what `block` has. Where the text is nearly
certain all guess nearly all of it, so this is a matter of the text.
"""

import argparse
import statistics
from collections.abc import Callable

from matplotlib import axes as axes_lib

from experiments.lab import (
    claims,
    experiment,
    plotting,
    recipes,
    speculation_setting,
    tables,
)
from tlt_jax.specdec import chain
from tlt_jax.specdec import strategy as strategy_lib

GREEDY = "deterministic"
# The first judges trees, too.
SAMPLED_RULES = ("rejection", "block")
STRATEGIES = "D2K1V3,D4K1V5,D8K1V9,D4K2V8,D8K2V16,D8K4V16,D8K4V32"
# What the rules are compared by: a chain, and trees of so many nodes.
CHAIN, TREE_NODES = "D8K1V9", 16


def answer(
    setting: speculation_setting.Setting,
    temperature: float,
    ranking: str,
    strategy: strategy_lib.Strategy,
    first: list[list[int]],
) -> tables.Row:
    """Answers the prompts under one strategy; returns what was accepted.

    `first` takes up the tokens where it is empty, and is compared with them.
    """
    rule = ranking if ranking in SAMPLED_RULES else chain.KEYED
    ranking_of = "coupled" if ranking in SAMPLED_RULES else ranking
    engine = setting.engine(
        setting.options.batch, temperature, strategy, ranking_of, rule
    )
    completions, stats = engine.run(setting.requests(setting.options.num_prompts), 0)
    engine.pool.close()
    drawn = [completion.tokens.tolist() for completion in completions]
    first.extend([] if first else drawn)
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


def compare(rows: list[tables.Row]) -> list[tables.Row]:
    """Adds how many times longer rows accept than deterministic, and keyed, ones.

    The first is told of coupled rows, by the deterministic one of their strategy; the
    second of all but these, and of coupled trees, by the coupled chain of their depth.
    """
    for its in tables.groups(rows, "texts", "temperature").values():
        lengths = {(r["ranking"], r["strategy"]): r["accept_length"] for r in its}
        chains = tables.where(its, ranking="coupled", topk=1)
        keyed = {row["draft_depth"]: row["accept_length"] for row in chains}
        for row in tables.where(its, ranking="coupled"):
            if other := lengths.get((GREEDY, row["strategy"])):
                row["times_deterministic"] = row["accept_length"] / other
        for row in its:
            is_keyed_chain = row["ranking"] == "coupled" and row["topk"] == 1
            if row["draft_depth"] in keyed and not is_keyed_chain:
                other = keyed[row["draft_depth"]]
                row["times_keyed_chain"] = row["accept_length"] / other
    return rows


def temperatures_of(options: argparse.Namespace) -> list[float]:
    """Reads the temperatures."""
    return experiment.numbers(options.temperatures, "temperatures", float)


def check(options: argparse.Namespace) -> None:
    """Refuses lists that cannot be read, and drafters that are not there."""
    temperatures_of(options)
    for text in options.strategies.split(","):
        strategy_lib.parse(text)
    for directory in options.drafter.split(","):
        speculation_setting.check_drafter(directory, options.scale)
    if options.texts:
        experiment.known(options.texts, speculation_setting.TEXTS, "texts")


def measure(
    options: argparse.Namespace,
    context: list[speculation_setting.Setting],
    cell: tables.Cell,
) -> list[tables.Row]:
    """Answers the prompts of one drafter at one temperature in all ways."""
    setting, temperature = context[cell["drafter"]], cell["temperature"]
    rows, first = [], []
    for strategy in map(strategy_lib.parse, options.strategies.split(",")):
        # Greedily there is no noise to couple by.
        rankings = ["coupled", GREEDY] if temperature else [GREEDY]
        if temperature and not strategy.budget:
            rankings += SAMPLED_RULES[: 1 if strategy.topk > 1 else 2]
        for ranking in rankings:
            row = answer(setting, temperature, ranking, strategy, first)
            rows.append(row)
            print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
    return compare(rows)


def plot(rows: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws accept length by strategy, a panel for each kind of text."""
    kinds_of_text = tables.values(rows, "texts")
    fig, panels = plotting.panels(
        "Tokens per target forward, by strategy and ranking",
        kinds_of_text,
        stamp,
        xlabel="draft_depth D, topk K, tokens_to_verify V",
        ylabel="accept length",
        columns=1,
        height=3.4,
    )
    for axes, texts in zip(panels, kinds_of_text, strict=True):
        _plot_panel(axes, tables.where(rows, texts=texts))
    return fig


def _plot_panel(axes: axes_lib.Axes, rows: list[tables.Row]) -> None:
    strategies = tables.values(rows, "strategy")
    kinds = tables.groups(rows, "temperature", "ranking")
    width = 0.8 / len(kinds)
    for i, ((temperature, ranking), its) in enumerate(kinds.items()):
        color = plotting.COLORS[i]
        shift = (i - len(kinds) / 2 + 0.5) * width
        places = [strategies.index(row["strategy"]) + shift for row in its]
        label = f"T={temperature:g}, {ranking}" if temperature else "T=0"
        lengths = tables.column(its, "accept_length")
        bars = axes.bar(places, lengths, width, color=color, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=6, padding=1)
    axes.set_xticks(range(len(strategies)), strategies, fontsize=8)
    axes.axhline(1, color=plotting.GREY, linewidth=0.8)
    # Above the bars, beside one another: no place among them is free.
    axes.margins(y=0.25)
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=len(kinds))


def load(options: argparse.Namespace) -> list[speculation_setting.Setting]:
    """Loads every drafter with its texts, or with each kind that is named."""
    return [
        speculation_setting.Setting(
            argparse.Namespace(**vars(options) | {"drafter": directory}), texts
        )
        for directory in options.drafter.split(",")
        for texts in options.texts.split(",")
    ]


def _of_rules(rows: claims.Rows) -> dict[str, float]:
    """Reads the accept lengths of random numbers by rule, and the best tree's."""
    rows = tables.where(rows, texts="random_numbers", temperature=1)
    chains = {row["ranking"]: row for row in tables.where(rows, strategy=CHAIN)}
    found = {
        name: chains[name]["accept_length"] for name in ("coupled", *SAMPLED_RULES)
    }
    nodes = {"ranking": "coupled", "tokens_to_verify": TREE_NODES}
    trees = [row["accept_length"] for row in tables.where(rows, **nodes)]
    if not trees:
        raise LookupError(f"no tree of {TREE_NODES} nodes")
    return found | {"tree": max(trees)}


def _ratio_at_least(
    first: str, second: str, least: float
) -> Callable[[claims.Rows], claims.Finding]:
    def decide(rows):
        found = _of_rules(rows)
        ratio = found[first] / found[second]
        told = f"{found[first]:.2f} against {found[second]:.2f}, {ratio:.2f} times"
        return ratio >= least, f"{told}, claimed at least {least:g}"

    return decide


EXPERIMENT = experiment.Experiment(
    slug="accept_length",
    text=__doc__,
    title="depth by tokens verified, children; rankings and rules over temperature",
    published="d4: 4.63 to 4.82, d16: 7.25 to 9.78 (V16 to V128)",
    needs=f"--drafter={recipes.NUMBERS_DRAFTER},{recipes.COUNTING_DRAFTER}",
    before={recipes.TRAIN_NUMBERS: 32, recipes.TRAIN_COUNTING: 15},
    larger=experiment.models(
        "--strategies=D4K1V5,D16K1V17,D4K8V16,D4K8V128,D16K8V16,D16K8V128 "
        "--temperatures=1,0.6,0"
    ),
    options=(
        *speculation_setting.OPTIONS,
        *experiment.plain(strategies=STRATEGIES, temperatures="1,0"),
        experiment.Option("batch", 4, recorded=False),
        experiment.Option(
            "texts",
            "",
            f"held-out prompts of {','.join(speculation_setting.TEXTS)}; default: of "
            "each drafter's own texts",
            recorded=False,
        ),
    ),
    check=check,
    context=load,
    settings=lambda options, context: {
        "drafters": [setting.about() for setting in context],
        "temperatures": temperatures_of(options),
    },
    cells=lambda options, context: [
        tables.Cell(
            {"drafter": number, "texts": setting.texts, "temperature": temperature},
            None,
        )
        for number, setting in enumerate(context)
        for temperature in temperatures_of(options)
    ],
    measure=measure,
    plot=plot,
    claims={
        "random numbers: block accepts at least 1.4 times what keyed chains of 8 do": (
            _ratio_at_least("block", "coupled", 1.4)
        ),
        "random numbers: keyed trees of 16 nodes, at least 0.9 of what block does": (
            _ratio_at_least("tree", "block", 0.9)
        ),
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
