"""Pictures of speculation: draft trees, what their nodes see, how they are verified.

They show what `trace.Tracer` gives. Everywhere a drafted token that the
target accepted is green, one that it refused grey, and what the target drew by itself
orange.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib import axes as axes_lib
from matplotlib import colors, figure, patches

from tlt_jax.models.formats import tokenizer as model_tokenizer
from tlt_jax.viz import style, trace

Step = trace.Step
Name = Callable[[int], str]

_ACCEPTED, _REFUSED, _TARGET = style.GREEN, style.PALE, style.ORANGE
_ROOT = style.SKY
_TAIL = 8
_CENTRED = dict(ha="center", va="center")


def names_of(tokenizer: model_tokenizer.Tokenizer) -> Name:
    """Make a function that names a token for a label: blanks and ends are visible."""

    def name(token: int) -> str:
        text = tokenizer.token_bytes(token).decode("utf-8", "replace")
        return text.replace(" ", "␣").replace("\n", "↵")

    return name


def tree(step: Step, name: Name) -> figure.Figure:
    """Draw a step's tree, the path that the target took, and what it drew behind it."""
    places = _places(step)
    wide = max(x for x, _ in places.values()) + 1
    deep = max(y for _, y in places.values()) + 2
    fig, axes = style.panels(max(7.5, 3.4 + 0.75 * wide), 0.8 + 0.72 * deep)
    _draw_tree(axes, step, name, places)
    told = f"A pass of the target reads {int(step.valid.sum())} nodes, accepts "
    told += f"{step.num_accepted}, and adds {len(step.emitted)} to the text"
    fig.suptitle(told, fontsize=10)
    looks = (
        (_ROOT, "root: the text's last token"),
        (_ACCEPTED, "drafted, accepted"),
        (_REFUSED, "drafted, refused"),
        (_TARGET, "drawn by the target behind them"),
    )
    style.key(axes, looks)
    return fig


def mask(step: Step, name: Name) -> figure.Figure:
    """Draw what each node of the tree attends to: the text, its ancestors, itself."""
    text, nodes = step.text[:-1][-_TAIL:], np.flatnonzero(step.valid)
    num = len(nodes)
    fig, axes = style.panels(2.2 + 0.34 * (len(text) + num), 1.6 + 0.34 * num)
    seen = np.where(step.sees[np.ix_(nodes, nodes)], 2, 0)
    shades = np.concatenate([np.ones((num, len(text)), int), seen], axis=1)
    on_path = np.isin(nodes, step.path)
    shades[on_path] += (shades[on_path] == 2).astype(int)
    palette = colors.ListedColormap(["#FFFFFF", "#CFE5F2", style.BLUE, style.GREEN])
    look = dict(vmin=0, vmax=3, edgecolors="#EEEEEE", linewidth=0.8)
    axes.pcolormesh(shades, cmap=palette, **look)
    axes.axvline(len(text), color="black", lw=1.2)
    labels = [name(int(t)) for t in (*text, *step.tokens[nodes])]
    axes.set_xticks(np.arange(len(labels)) + 0.5, labels, fontsize=8)
    pairs = zip(labels[len(text) :], step.depths[nodes], strict=True)
    rows = [f"{label}  depth {depth}" for label, depth in pairs]
    axes.set_yticks(np.arange(num) + 0.5, rows, fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.tick_top()
    style.no_frame(axes)
    more = "…, " if len(step.text) - 1 > _TAIL else ""
    axes.set_xlabel(f"{more}cached text | nodes of the tree", fontsize=9)
    axes.set_ylabel("node that attends", fontsize=9)
    looks = (
        ("#CFE5F2", "cached text: every node sees it"),
        (style.BLUE, "ancestor or itself"),
        (style.GREEN, "the same, on the accepted path"),
    )
    style.key(axes, looks)
    return fig


def draw_at(step: Step, node: int, name: Name, *, num_shown: int = 12) -> figure.Figure:
    """Draw how the target draws at a node: its law, then law and noise together.

    Up to `num_shown` tokens are shown, the likeliest of the law and those of the node's
    children, which are marked: they are the draft's guesses.
    """
    logprobs, children = step.logprobs[node], _children(step, node)
    guesses = {int(step.tokens[child]) for child in children}
    scores = logprobs + step.noise[step.depths[node]]
    drawn = int(step.drawn[node])
    order = np.argsort(-logprobs)
    wanted = [*guesses, drawn]
    rest = [int(t) for t in order if int(t) not in wanted]
    shown = set(wanted) | set(rest[: max(num_shown - len(set(wanted)), 0)])
    tokens = [int(t) for t in order if int(t) in shown]
    fig, (law_axes, score_axes) = style.panels(7.5, 4.4, 2, 1, sharex=True)
    at = np.arange(len(tokens))
    # By whether a token was drawn, and whether it was drafted.
    paints = ((_REFUSED, style.GREY), (_TARGET, _ACCEPTED))
    paint = [paints[token == drawn][token in guesses] for token in tokens]
    law_axes.bar(at, np.exp(logprobs[tokens]), color=paint)
    law_axes.set_ylabel("probability")
    law_axes.set_title("the target's law", loc="left", fontsize=10)
    finite = np.maximum(scores[tokens], np.min(scores[tokens][scores[tokens] > -50]))
    low = min(finite.min(), 0.0) - 0.5
    score_axes.bar(at, finite - low, bottom=low, color=paint)
    score_axes.set_ylabel("log-prob + noise")
    told = f"with this position's noise: the largest is drawn, {name(drawn)!r}"
    score_axes.set_title(told, loc="left", fontsize=10)
    score_axes.set_xticks(at, [name(token) for token in tokens])
    for axes in (law_axes, score_axes):
        style.open_frame(axes)
    looks = (
        (_ACCEPTED, "drawn, and drafted: accepted"),
        (_TARGET, "drawn, and not drafted"),
        (style.GREY, "drafted, not drawn"),
        (_REFUSED, "neither"),
    )
    style.key(law_axes, looks)
    return fig


def text(steps: Sequence[Step], name: Name) -> figure.Figure:
    """Draw a completion step by step: a row for each pass of the target."""
    longest = max(len(step.emitted) for step in steps)
    fig, axes = style.panels(max(7.0, 2.6 + 0.75 * longest), 0.9 + 0.32 * len(steps))
    for row, step in enumerate(steps):
        for column, token in enumerate(step.emitted):
            color = _ACCEPTED if column < step.num_accepted else _TARGET
            _box(axes, column, row, 0.94, 0.8, color, name(int(token)))
    axes.set_xlim(-0.6, longest - 0.4)
    axes.set_ylim(len(steps) - 0.4, -0.6)
    passes = [f"pass {i + 1}" for i in range(len(steps))]
    axes.set_yticks(range(len(steps)), passes, fontsize=8)
    axes.set_xticks([])
    style.no_frame(axes)
    num_tokens = sum(len(step.emitted) for step in steps)
    told = f"{num_tokens} tokens in {len(steps)} passes of the target, "
    told += f"{num_tokens / len(steps):.2f} a pass"
    axes.set_title(told, loc="left", fontsize=10)
    style.key(axes, ((_ACCEPTED, "drafted, accepted"), (_TARGET, "the target's")))
    return fig


def acceptance(by_ranking: Mapping[str, Sequence[Step]], name: Name) -> figure.Figure:
    """Draw, position by position of one text, how far different drafts came.

    Above stands how certain the target is, below how many tokens each draft got
    accepted; `by_ranking` has for each a step at every position of the same text.
    """
    first = next(iter(by_ranking.values()))
    at, height = np.arange(len(first)), 0.45 * len(by_ranking)
    size, ratios = (1.8 + 0.3 * len(first), 2.2 + height), (1.4, height)
    fig, grid = style.panels(*size, 2, 1, sharex=True, height_ratios=ratios)
    law_axes, axes = grid
    probs = [float(np.exp(s.logprobs[0, int(s.drawn[0])])) for s in first]
    law_axes.bar(at, probs, color=style.SKY)
    law_axes.set_ylim(0, 1)
    law_axes.set_ylabel("probability\nof what is drawn", fontsize=8)
    style.open_frame(law_axes)
    counts = [[s.num_accepted for s in steps] for steps in by_ranking.values()]
    counts = np.array(counts)
    most = max(int(counts.max()), 1)
    axes.imshow(counts, cmap="Greens", vmin=0, vmax=most, aspect="auto")
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if count > 0.6 * counts.max() else "black"
        axes.text(column, row, count, size=8, color=color, **_CENTRED)
    pairs = zip(by_ranking, counts, strict=True)
    means = [f"{label}: {row.mean() + 1:.2f} a pass" for label, row in pairs]
    axes.set_yticks(range(len(means)), means, fontsize=9)
    axes.set_xticks(at, [name(int(s.drawn[0])) for s in first], fontsize=8)
    axes.set_xlabel("the text; below it, drafted tokens accepted from here on")
    style.no_frame(axes)
    return fig


def rates(by_label: Mapping[str, Sequence[float]]) -> figure.Figure:
    """Draw how often a draft was accepted at each depth, its parent being accepted."""
    fig, axes = style.panels(7.5, 3.2)
    width = 0.8 / len(by_label)
    paints = (_ACCEPTED, "#9ED9C5", style.GREY, _REFUSED, _ROOT, _TARGET)
    for i, (label, values) in enumerate(by_label.items()):
        at = np.arange(len(values)) + (i - (len(by_label) - 1) / 2) * width
        axes.bar(at, values, 0.92 * width, color=paints[i % len(paints)], label=label)
    deepest = max(len(values) for values in by_label.values())
    axes.set_xticks(range(deepest), [f"depth {i + 1}" for i in range(deepest)])
    axes.set(ylim=(0, 1), ylabel="accepted, of those tried")
    style.open_frame(axes)
    style.legend(axes, 8)
    return fig


def _draw_tree(axes: axes_lib.Axes, step: Step, name: Name, places) -> None:
    on_path = set(step.path.tolist())
    for node in np.flatnonzero(step.valid):
        x, y = places[node]
        accepted = int(node) in on_path
        if node:
            color, width = (_ACCEPTED, 3) if accepted else (style.GREY, 1)
            branch = zip(places[step.parents[node]], (x, y), strict=True)
            axes.plot(*branch, color=color, lw=width, zorder=1)
        color = _ROOT if not node else _ACCEPTED if accepted else _REFUSED
        _box(axes, x, y, 0.8, 0.52, color, name(int(step.tokens[node])))
        drawn = f"draws {name(int(step.drawn[node]))}"
        axes.text(x, y + 0.36, drawn, size=6, color="#666666", **_CENTRED)
    last = int(step.path[-1])
    (x, y), token = places[last], int(step.drawn[last])
    beside = [p[0] for p in places.values() if p[1] == y + 1]
    if beside:
        # Behind everything that stands at this depth already.
        x = max(beside) + 1
    behind = [[places[last][0], x], [y, y + 1]]
    axes.plot(*behind, color=_TARGET, lw=3, ls=(0, (2, 1)), zorder=0)
    _box(axes, x, y + 1, 0.8, 0.52, _TARGET, name(token))
    axes.set_ylim(max(y + 1, *(p[1] for p in places.values())) + 0.6, -0.5)
    depths = range(int(step.depths.max()) + 1)
    axes.set_yticks(list(depths), [f"depth {d}" if d else "text's end" for d in depths])
    axes.set_xticks([])
    style.no_frame(axes)
    axes.margins(x=0.08)


def _box(axes, x, y, width, height, color, text) -> None:
    axes.text(x, y, text, size=9, **_CENTRED)
    corner, look = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.1"
    paint = dict(facecolor=color, edgecolor="none", zorder=2)
    axes.add_patch(patches.FancyBboxPatch(corner, width, height, look, **paint))


def _children(step: Step, node: int) -> list[int]:
    index = np.arange(len(step.tokens))
    found = step.valid & (step.parents == node) & (index > 0)
    return np.flatnonzero(found).tolist()


def _places(step: Step) -> dict[int, tuple[float, float]]:
    """Leaves stand side by side, a node above the middle of its children."""
    places: dict[int, tuple[float, float]] = {}
    leaves = 0

    def place(node: int) -> float:
        nonlocal leaves
        below = [place(child) for child in _children(step, node)]
        if below:
            x = (below[0] + below[-1]) / 2
        else:
            x, leaves = float(leaves), leaves + 1
        places[node] = (x, float(step.depths[node]))
        return x

    place(0)
    return places
