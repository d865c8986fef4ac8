"""Pictures of an RL step's records: completions, advantages, packed rows, update."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib import colors, figure

from tlt_jax.rl.update import experience, packing
from tlt_jax.viz import style

_MAX_GROUPS = 10


def completions(
    batch: experience.Experience,
    decode_text: Callable[[Sequence[int]], str],
    values: np.ndarray | None = None,
    title: str = "Completions, by reward",
) -> figure.Figure:
    """Draw a step's groups: a row for each prompt, a cell for each completion.

    The first ten groups are shown; `values`, `[P, R]`, colour the cells, where they are
    None the rewards.
    """
    shown = min(len(batch.prompts), _MAX_GROUPS)
    size = batch.group_size
    values = batch.rewards if values is None else np.asarray(values)
    texts = [decode_text(c.tokens) for c in batch.completions[: shown * size]]
    longest = max(map(len, texts))
    width = 2 + size * min(max(0.09 * longest, 0.7), 1.5)
    fig, axes = style.panels(width, 1.2 + 0.32 * shown)
    most = max(float(np.abs(values).max()), 1e-6)
    from_colors = colors.LinearSegmentedColormap.from_list
    palette = from_colors("signed", [style.RED, "#FFFFFF", style.GREEN])
    look = dict(cmap=palette, vmin=-most, vmax=most, aspect="auto", alpha=0.7)
    image = axes.imshow(values[:shown], **look)
    for i, text in enumerate(texts):
        told = text if len(text) <= 16 else text[:6] + "…" + text[-9:]
        axes.text(i % size, i // size, told, ha="center", va="center", fontsize=7)
    asked = [decode_text(prompt.tokens) for prompt in batch.prompts[:shown]]
    axes.set_yticks(range(shown), asked, fontsize=8)
    axes.set_xticks(range(size), [f"sample {i}" for i in range(size)], fontsize=8)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    style.no_frame(axes)
    fig.colorbar(image, ax=axes, shrink=0.8)
    return fig


def packed(part: packing.Packed) -> figure.Figure:
    """Draw packed rows, and what the columns of the first one see.

    A prompt is computed once; its responses are branches behind it that do not see
    each other.
    """
    fig, (row_axes, mask_axes) = style.panels(10, 4.6, 1, 2)
    is_prompt = (part.segment == part.prefix) & (part.segment >= 0)
    shades = np.where(part.segment < 0, np.nan, 2.0 + part.segment % 4)
    shades[is_prompt] = 0.0
    response_colors = (style.BLUE, style.SKY, style.GREEN, "#9ED9C5")
    palette = colors.ListedColormap([style.ORANGE, style.ORANGE, *response_colors])
    look = dict(vmin=0, vmax=5, aspect="auto", interpolation="nearest")
    row_axes.imshow(shades, cmap=palette, **look)
    told = "packed rows: prompts orange, responses in turn"
    row_axes.set_title(told, loc="left", fontsize=9)
    row_axes.set(xlabel="column", ylabel="row")
    row_axes.set_yticks(range(len(part.tokens)))
    # A single row need not fill the panel.
    row_axes.set_ylim(max(len(part.tokens), 4) - 0.5, -0.5)
    used = int((part.segment[0] >= 0).sum())
    width = min(used, 96)
    seen = packing.visible(part)[0][:width, :width]
    shades = np.where(seen, np.where(is_prompt[0][None, :width], 1.0, 2.0), 0.0)
    palette = colors.ListedColormap(["#FFFFFF", style.ORANGE, style.BLUE])
    look = dict(vmin=0, vmax=2, interpolation="nearest")
    mask_axes.imshow(shades, cmap=palette, **look)
    told = "" if width == used else f", its first {width} columns"
    mask_axes.set_title(f"what row 0 sees{told}", loc="left", fontsize=9)
    mask_axes.set(xlabel="column seen", ylabel="column that attends")
    return fig


def change(
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
    advantages: np.ndarray,
) -> figure.Figure:
    """Draw how an update moved the completions that it was made of.

    Log-probabilities are n arrays, of each completion's tokens; advantages `[n]`.
    """
    pairs = zip(before, after, strict=True)
    moved = np.array([new.sum() - old.sum() for old, new in pairs])
    fig, axes = style.panels(6.4, 4.2)
    up = np.where(np.asarray(advantages) >= 0, style.GREEN, style.RED)
    axes.scatter(advantages, moved, c=up, s=18, alpha=0.7, linewidths=0)
    axes.axhline(0, color=style.GREY, lw=0.8)
    axes.axvline(0, color=style.GREY, lw=0.8)
    axes.set_title("What one update did", loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("advantage of the completion")
    axes.set_ylabel("change of its log-probability, nats")
    style.open_frame(axes)
    return fig
