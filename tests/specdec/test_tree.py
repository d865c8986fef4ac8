"""Trees and walks against slow forms with lists and dictionaries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax.models import attention, transformer
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.specdec import candidates as candidates_lib
from tlt_jax.specdec import tree as tree_lib
from tlt_jax.specdec import verify

BATCH, NUM, DEPTH, VOCAB = 12, 20, 4, 5


def random_candidates(seed):
    """Random trees; parents before children, scores falling, ties, some absent."""
    rng = np.random.default_rng(seed)
    shape = BATCH, NUM
    made = {name: np.zeros(shape, np.int32) for name in ("tokens", "parents", "depths")}
    scores = np.full(shape, -np.inf, np.float32)
    for row in range(BATCH):
        taken = set()
        for i in range(NUM):
            parent = int(rng.integers(-1, i)) if i else -1
            depth = 1 if parent < 0 else made["depths"][row, parent] + 1
            above = 0.0 if parent < 0 else scores[row, parent]
            token = int(rng.integers(VOCAB))
            absent = depth > DEPTH or (parent, token) in taken or rng.random() < 0.2
            made["parents"][row, i] = parent
            made["depths"][row, i] = min(depth, DEPTH)
            made["tokens"][row, i] = token
            if not absent and np.isfinite(above):
                taken.add((parent, token))
                scores[row, i] = above - rng.choice([0.0, 0.5, 1.0])
    return candidates_lib.Candidates(scores=scores, **made)


def slow_select(candidates, row, root, num_nodes):
    """Nodes in order as (token, parent, depth)."""
    scores = candidates.scores[row]
    order = sorted(range(NUM), key=lambda i: (-scores[i], i))
    kept = sorted(i for i in order[: num_nodes - 1] if np.isfinite(scores[i]))
    place = {-1: 0} | {i: 1 + n for n, i in enumerate(kept)}
    parents, depths = candidates.parents[row], candidates.depths[row]
    nodes = [(root, 0, 0)]
    for i in kept:
        nodes.append((candidates.tokens[row][i], place[parents[i]], depths[i]))
    return nodes


@pytest.mark.parametrize("num_nodes", [2, 7, 21])
def test_select_keeps_the_best(num_nodes):
    select = jax.jit(tree_lib.select, static_argnums=2)
    for seed in range(4):
        candidates = random_candidates(seed)
        root = np.arange(BATCH, dtype=np.int32)
        tree = jax.device_get(select(candidates, root, num_nodes))
        for row in range(BATCH):
            wanted = slow_select(candidates, row, row, num_nodes)
            valid = tree.valid[row]
            assert not np.any(np.diff(valid.astype(int)) > 0)
            found = list(
                zip(
                    tree.tokens[row][valid],
                    tree.parents[row][valid],
                    tree.depths[row][valid],
                    strict=True,
                )
            )
            assert found == wanted
            # A path's chance is the product of its nodes'.
            path = np.ones(num_nodes)
            for node in range(1, num_nodes):
                path[node] = path[tree.parents[row][node]] * tree.chances[row][node]
            scores = np.sort(candidates.scores[row])[::-1][: num_nodes - 1]
            scores = np.exp(scores[np.isfinite(scores)])
            np.testing.assert_allclose(np.sort(path[1:][valid[1:]])[::-1], scores, 1e-5)
            assert not tree.tokens[row][~valid].any()
            sources = tree.sources[row]
            kept = candidates.tokens[row][sources[1:][valid[1:]]]
            assert kept.tolist() == tree.tokens[row][1:][valid[1:]].tolist()
            assert sources[0] == -1 and np.all(sources[~valid] == -1)


@pytest.mark.parametrize("num_nodes,budget", [(7, 25), (3, 14), (21, 60), (7, 12)])
def test_rows_that_share_keep_the_best_of_all(num_nodes, budget):
    share = jax.jit(tree_lib.share, static_argnums=(2, 3))
    select = jax.jit(tree_lib.select, static_argnums=2)
    root, widths = np.zeros(BATCH, np.int32), set()
    for seed in range(4):
        candidates = random_candidates(seed)
        alive = np.random.default_rng(seed).random(BATCH) < 0.7
        kept = share(candidates, alive, num_nodes, budget)
        # The best of each row, then the best of those: parents stand before children.
        order = [
            (-candidates.scores[row, i], row, rank, i)
            for row in np.flatnonzero(alive)
            for rank, i in enumerate(
                sorted(range(NUM), key=lambda i: (-candidates.scores[row, i], i))
            )
            if rank < num_nodes - 1 and np.isfinite(candidates.scores[row, i])
        ]
        room = budget - int(alive.sum())
        wanted = {(int(row), i) for _, row, _, i in sorted(order)[:room]}
        found = set(zip(*np.nonzero(np.isfinite(kept.scores)), strict=True))
        assert {(int(row), int(i)) for row, i in found} == wanted
        for row, i in wanted:
            assert kept.scores[row, i] == candidates.scores[row, i]
            above = int(candidates.parents[row, i])
            assert above < 0 or (row, above) in wanted
        tree = select(kept, root, num_nodes)
        counts = np.where(alive, np.sum(tree.valid, axis=1), 0)
        assert counts.sum() == min(budget, alive.sum() + len(order))
        widths |= set(counts.tolist())
    assert 0 in widths and len(widths) > 2


def ancestors(tree, row, node):
    found = {node}
    while node:
        node = int(tree.parents[row][node])
        found.add(node)
    return found


@pytest.mark.parametrize("num_nodes", [6, 21])
def test_ancestor_words(num_nodes):
    candidates = random_candidates(9)
    root = np.zeros(BATCH, np.int32)
    tree = jax.device_get(tree_lib.select(candidates, root, num_nodes))
    words = tree_lib.ancestor_words(tree, DEPTH)
    assert words.dtype == jnp.uint32 and words.shape == (BATCH, num_nodes, 1)
    mask = np.asarray(tree_lib.unpack_words(words, num_nodes))
    for row in range(BATCH):
        for node in range(num_nodes):
            seen = set(np.flatnonzero(mask[row, node]).tolist())
            assert seen == ancestors(tree, row, node)


def test_words_of_more_than_32_nodes():
    num_nodes = 40
    chain = tree_lib.DraftTree(
        tokens=np.zeros((1, num_nodes), np.int32),
        parents=np.maximum(np.arange(num_nodes) - 1, 0)[None].astype(np.int32),
        depths=np.arange(num_nodes)[None].astype(np.int32),
        valid=np.ones((1, num_nodes), bool),
        chances=np.ones((1, num_nodes), np.float32),
        sources=np.arange(-1, num_nodes - 1)[None].astype(np.int32),
    )
    words = tree_lib.ancestor_words(chain, num_nodes - 1)
    assert words.shape == (1, num_nodes, 2)
    mask = tree_lib.unpack_words(words, num_nodes)
    np.testing.assert_array_equal(mask[0], np.tril(np.ones((num_nodes, num_nodes))))


@pytest.mark.parametrize("num_nodes", [2, 9, 21])
def test_walk_follows_the_drawn_tokens(num_nodes):
    rng = np.random.default_rng(num_nodes)
    walk_jit = jax.jit(verify.walk, static_argnums=2)
    depths_seen = set()
    for seed in range(6):
        candidates = random_candidates(seed)
        root = np.zeros(BATCH, np.int32)
        tree = jax.device_get(tree_lib.select(candidates, root, num_nodes))
        # Mostly a token that some child has, so that walks go deep; absent nodes hold
        # token 0 and must never be accepted.
        drawn = rng.integers(VOCAB, size=(BATCH, num_nodes)).astype(np.int32)
        for row in range(BATCH):
            for node in range(1, num_nodes):
                if rng.random() < 0.6:
                    drawn[row, tree.parents[row][node]] = tree.tokens[row][node]
        walk = jax.device_get(walk_jit(tree, drawn, DEPTH + 1))
        for row in range(BATCH):
            path = [0]
            while True:
                children = [
                    n
                    for n in range(1, num_nodes)
                    if tree.valid[row][n]
                    and tree.parents[row][n] == path[-1]
                    and tree.tokens[row][n] == drawn[row, path[-1]]
                ]
                if not children:
                    break
                path.append(children[0])
            length = walk.num_accepted[row] + 1
            assert walk.path[row][:length].tolist() == path
            assert walk.tokens[row][:length].tolist() == drawn[row][path].tolist()
            assert set(walk.path[row][length:].tolist()) <= {path[-1]}
            depths_seen.add(len(path) - 1)
    assert 0 in depths_seen and max(depths_seen) >= min(num_nodes - 1, 3)


def test_a_node_depends_on_its_ancestors_alone():
    cfg = model_config.ModelConfig(
        family="llama",
        vocab_size=VOCAB,
        num_layers=2,
        d_model=8,
        d_ff=12,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        tie_embeddings=False,
    )
    params = model_params.init(cfg, jax.random.key(0))
    num_nodes = 9
    tree = tree_lib.select(random_candidates(3), np.zeros(BATCH, np.int32), num_nodes)
    mask = tree_lib.unpack_words(tree_lib.ancestor_words(tree, DEPTH), num_nodes)

    def hidden(embed, node):
        """A feature of one node as a function of what every node reads."""
        # Every position of the batch has an embedding of its own.
        own = params.replace(embed=embed.reshape(BATCH * num_nodes, -1))
        tokens = jnp.arange(BATCH * num_nodes).reshape(BATCH, num_nodes)
        out = transformer.forward(
            own,
            cfg,
            tokens,
            5 + tree.depths,
            attention.Visibility(ancestors=mask),
        )
        return jnp.sum(out.hidden[0, :, node])

    embed = jax.random.normal(jax.random.key(1), (BATCH, num_nodes, cfg.d_model))
    slope = jax.jit(jax.grad(hidden))
    for node in range(num_nodes):
        depends = np.any(np.asarray(slope(embed, node)) != 0, axis=-1)
        np.testing.assert_array_equal(depends, mask[:, node])
