"""The plain form that `packing.pack` must agree with."""

from tlt_jax.rl.update import packing, row_filling


def pad(groups, *, row_tokens, rows_multiple=1, rounding="power_of_two"):
    """Lays out one row per response, each with its own copy of the prompt.

    Takes what `packing.pack` takes, at the cost R x (prompt + response). Rows stand in
    the order of completions, empty ones left out.
    """
    rows = [
        [row_filling.Tree(tree.prompt, (response,))]
        for tree in packing._trees(groups, row_tokens)
        for response in tree.responses
    ]
    longest = max(tree.size for (tree,) in rows)
    width = min(row_filling.round_up(longest, rounding), row_tokens)
    return packing._lay_out(rows, groups, width, rows_multiple, rounding, uniform=False)
