"""Blocks against a slow form that has no caches, and a law for every path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.specdec import hosts, tiny_drafter
from tlt_jax.models import attention, kv_cache
from tlt_jax.models.drafters import block as block_lib
from tlt_jax.models.drafters import drafter
from tlt_jax.specdec import decode, sampling
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.proposers import block, build, learned

NUM, MOST, PAGE, SIZE = 2, 16, 4, 4  # rows, longest text, page size, K
CFG = drafter.of_target(
    hosts.CFG,
    feature_layers=(0, 1),
    draft_vocab_size=30,
    architecture="block",
    block_size=SIZE,
)
LENGTHS = (7, 3)  # cached positions of the target
COUNTS = (3, 1)  # of which the drafter has still to take in
TAU, SHARPNESS = 0.6, 1.5


@functools.cache
def weights():
    ids = np.sort(np.random.default_rng(0).permutation(hosts.CFG.vocab_size)[:30])
    params = tiny_drafter.followed(drafter.init(CFG, jax.random.key(2)))
    params = params.replace(draft_ids=jnp.asarray(ids, jnp.int32))
    return learned.weights_of(params, hosts.weights())


def texts_and_features():
    rng = np.random.default_rng(1)
    tokens = rng.integers(hosts.CFG.vocab_size, size=(NUM, MOST)).astype(np.int32)
    shape = (CFG.num_features * hosts.CFG.d_model, NUM, MOST)
    return tokens, rng.normal(size=shape).astype(np.float32)


@functools.cache
def slow_marginals(row):
    """What the head multiplies at each place, `[D, K]`, in one forward of all."""
    tokens, raw = texts_and_features()
    length, params = LENGTHS[row], weights().params
    num = length + SIZE - 1
    root = length - 1
    columns = [*range(length), *[root] * (SIZE - 1)]
    seen = np.zeros((1, num, num), bool)
    for query in range(num):
        for key in range(num):
            both = query >= length and key >= length
            seen[0, query, key] = both or (key < length and key <= query)
    added = np.zeros((hosts.CFG.d_model, 1, num), np.float32)
    added[:, 0, length:] = np.asarray(params.block.masks).T
    out = drafter.forward(
        params,
        CFG,
        weights().embedded(tokens[row, 1:][columns][None], jnp.float32),
        drafter.fuse(params, CFG, raw[:, row, columns][:, None]),
        np.arange(num)[None],
        visibility=attention.Visibility(ancestors=jnp.asarray(seen)),
        added=jnp.asarray(added),
    )
    return np.asarray(out.hidden, np.float64)[:, 0, root:]


def slow_logits(row, place, before):
    """Logits `[Vd]` of a place behind the token before it, in float64."""
    params = weights().params.block
    embedded = np.asarray(weights().embed, np.float64)[before]
    unit = embedded / np.sqrt(np.mean(embedded**2) + CFG.layer.rms_norm_eps)
    inward, outward = (
        np.asarray(x, np.float64) for x in (params.markov_in, params.markov_out)
    )
    hidden = slow_marginals(row)[:, place] + outward @ (inward @ unit)
    return np.asarray(weights().head, np.float64) @ hidden


def slow_draft(row, noise, scale, strategy, temperature):
    """Children of each expanded path: `{path: [(token, score), ...]}`, and its law."""
    pending = texts_and_features()[0][row, LENGTHS[row]]
    ids = np.asarray(weights().params.draft_ids)
    found, laws = {}, {}

    def children(path):
        logits = slow_logits(row, len(path), [pending, *path][-1])
        scores = logits / (temperature or 1)
        laws[path] = np.exp(scores) / np.exp(scores).sum()
        if noise is not None:
            chance = np.asarray(noise)[row, len(path)][ids]
            scores = (scores * scale[0] + chance) / scale[1]
        scores = scores - np.log(np.exp(scores).sum())
        best = np.argsort(-scores)[: strategy.topk]
        return [(int(ids[i]), scores[i]) for i in best]

    live = [((), 0.0)]
    for _ in range(strategy.draft_depth):
        level = []
        for path, score in live:
            found[path] = children(path)
            level += [((*path, t), score + gain) for t, gain in found[path]]
        live = sorted(level, key=lambda one: -one[1])[: strategy.topk]
    return found, laws


def proposed(strategy, ranking, temperature, noise):
    """A proposal for both rows, from pages that hold nothing else but NaN."""
    tokens, raw = texts_and_features()
    num_pages = 1 + NUM * MOST // PAGE
    table = 1 + np.arange(num_pages - 1, dtype=np.int32).reshape(NUM, -1)
    nan = functools.partial(jax.tree.map, lambda x: jnp.full_like(x, jnp.nan))
    target = kv_cache.create(hosts.CFG, num_pages, PAGE, jnp.float32, raw.shape[0])
    columns = jnp.zeros((2, 2, 6, NUM, MOST))
    target = jax.jit(kv_cache.append_pages)(
        *(nan(target), columns, columns, table),
        *(np.zeros(NUM, np.int32), np.full(NUM, MOST, np.int32)),
        features=raw,
    )
    lengths, counts = np.array(LENGTHS, np.int32), np.array(COUNTS, np.int32)
    start = lengths - counts
    cache = jax.jit(functools.partial(learned.fill, cfg=CFG))(
        *(weights(), target),
        nan(kv_cache.create(CFG.layer, num_pages, PAGE, jnp.float32)),
        *(np.roll(tokens, -1, axis=1)[:, : 2 * PAGE], start, table),
        np.zeros(NUM, np.int32),
    )
    settings = decode.Settings(hosts.CFG, sampling.SamplingConfig(temperature))
    proposer = build.build(strategy, settings, CFG, ranking)
    assert isinstance(proposer, block.Block)
    width = strategy.max_accept_length
    at = start[:, None] + np.arange(width)
    state = learned.State(
        pages=cache,
        tokens=np.take_along_axis(tokens, at + 1, axis=1),
        features=np.take_along_axis(raw, at[None], axis=2),
        start=start,
        counts=counts,
    )
    rows = decode.Rows(
        page_table=table,
        lengths=lengths,
        pending=tokens[np.arange(NUM), lengths],
        keys=np.zeros((NUM, 2), np.uint32),
        remaining=np.ones(NUM, np.int32),
    )
    nothing = np.zeros((NUM, width), np.int32)
    draft = learned.Draft(
        weights(), jnp.float32(TAU), jnp.float32(SHARPNESS), start, nothing
    )
    return jax.jit(proposer.propose)(draft, state, rows, noise)


@pytest.mark.parametrize(
    "text,ranking,temperature",
    [
        ("D4K2V8", "coupled", 1.0),
        # Less deep than the block, whose masks see one another all the same.
        ("D3K3V9", "deterministic", 0.0),
        # Rows that share: 5 columns of 10.
        ("D4K1V5N5", "coupled", 0.7),
        ("D4K1V5", learned.SAMPLED, 0.7),
    ],
    ids="tree deterministic shared sampled".split(),
)
def test_proposals_are_those_of_a_slow_twin(text, ranking, temperature):
    strategy = strategy_lib.parse(text)
    noise = jax.random.gumbel(jax.random.key(3), (NUM, 5, hosts.CFG.vocab_size))
    made = proposed(strategy, ranking, temperature, noise)
    found = jax.device_get(made.candidates)
    assert made.extra[0].shape == (2, 6, NUM, strategy.max_accept_length)
    num_found = []
    for row in range(NUM):
        chance = None if ranking == "deterministic" else noise
        scale = (1.0, 1.0) if ranking == learned.SAMPLED else (SHARPNESS, TAU)
        wanted, laws = slow_draft(row, chance, scale, strategy, temperature)
        paths, children = {-1: ((), 0.0)}, {}
        for i in np.flatnonzero(found.present()[row]):
            path, score = paths[int(found.parents[row, i])]
            token, own = int(found.tokens[row, i]), float(found.scores[row, i])
            assert found.depths[row, i] == len(path) + 1
            children.setdefault(path, []).append((token, own - score))
            paths[int(i)] = ((*path, token), own)
        num_found.append(len(paths) - 1)
        assert children.keys() <= wanted.keys()
        for path, pairs in children.items():
            tokens, scores = zip(*wanted[path], strict=True)
            assert [t for t, _ in pairs] == list(tokens)
            np.testing.assert_allclose([s for _, s in pairs], scores, atol=2e-5)
        if ranking == learned.SAMPLED:
            ids = np.asarray(weights().params.draft_ids)
            for path, law in laws.items():
                # Of a chain in order.
                given = np.asarray(made.laws.probs)[row, len(path)]
                np.testing.assert_allclose(given, law, atol=1e-6)
                assert np.array_equal(made.laws.draft_ids, ids)
    # Where rows share, no level is drafted that nobody has room for.
    assert num_found == ([3, 3] if strategy.budget else [strategy.num_drafted] * NUM)


def test_masks_see_the_root_and_one_another():
    seen = block_lib.seen(3).astype(int).tolist()
    assert seen == [[1, 0, 0], [1, 1, 1], [1, 1, 1]]
