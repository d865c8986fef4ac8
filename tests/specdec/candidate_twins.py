"""Slow forms of candidate sets for tests: tries as dicts from path to node."""

import numpy as np


def trie(found, row):
    """Nodes of a row by path, `{path: (index, score)}`, in their order.

    Checks what every proposer promises: parents before children, depths that count
    them, no path twice, and no child above its parent's score.
    """
    tokens, parents, depths, scores = (
        np.asarray(x)[row].tolist()
        for x in (found.tokens, found.parents, found.depths, found.scores)
    )
    paths, nodes = {}, {}
    for index, score in enumerate(scores):
        if score == -np.inf:
            assert (tokens[index], parents[index], depths[index]) == (0, -1, 0)
            continue
        parent = parents[index]
        assert -1 <= parent < index
        before = paths[parent] if parent >= 0 else ()
        path = (*before, tokens[index])
        assert path not in nodes and depths[index] == len(path)
        assert score <= (scores[parent] if parent >= 0 else 0)
        paths[index] = path
        nodes[path] = (index, score)
    return nodes
