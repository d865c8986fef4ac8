"""What rules accept, by texts of the target, against their own tests and counts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tests.specdec import tiny_drafter
from tlt_jax.specdec import chain
from tlt_jax.specdec.texts import layout
from tlt_jax.specdec.training import acceptance, objectives, rules, unroll

DEPTH, VOCAB = 3, 3


def _laws(seed):
    """A law behind each prefix of up to three tokens."""
    rng = np.random.default_rng(seed)
    prefixes = itertools.chain.from_iterable(
        itertools.product(range(VOCAB), repeat=n) for n in range(DEPTH + 1)
    )
    return {prefix: rng.dirichlet(np.full(VOCAB, 0.7)) for prefix in prefixes}


def test_means_over_texts_are_those_over_drafted_chains():
    target, draft = _laws(0), _laws(1)
    # One token can never be proposed.
    draft[()] = np.array([0.25, 0.75, 0.0])
    by_texts = {name: np.zeros(DEPTH) for name in ("rejection", "block")}
    by_chains = {name: np.zeros(DEPTH) for name in by_texts}
    for tokens in itertools.product(range(VOCAB), repeat=DEPTH):
        prefixes = [tokens[:n] for n in range(DEPTH + 1)]
        p, q = (np.stack([law[x] for x in prefixes]) for law in (target, draft))
        p_drawn, q_drawn = (x[np.arange(DEPTH), tokens] for x in (p, q))
        with np.errstate(divide="ignore"):
            weights = rules.kept(jnp.asarray(np.log(q_drawn / p_drawn), jnp.float32))
        for name, value in weights.items():
            by_texts[name] += np.prod(p_drawn) * np.asarray(value, np.float64)
        if not np.prod(q_drawn):
            continue
        passed = np.minimum(1, p_drawn / q_drawn)
        by_chains["rejection"] += np.prod(q_drawn) * np.cumprod(passed)
        decision = chain.block_rule(p, q[:DEPTH], np.array(tokens, np.int32))
        # The last test that passes counts: k are kept unless all from k on fail.
        failed = np.cumprod(1 - np.asarray(decision.thresholds)[::-1])[::-1]
        by_chains["block"] += np.prod(q_drawn) * (1 - failed)
    for name, value in by_texts.items():
        np.testing.assert_allclose(value, by_chains[name], atol=1e-6, err_msg=name)
    assert by_texts["block"].sum() > by_texts["rejection"].sum() + 0.05


@pytest.mark.parametrize("draft_vocab_size", [0, len(tiny_drafter.DRAFT_IDS)])
def test_sums_are_those_of_the_trainings_own_measures(tmp_path, draft_vocab_size):
    cfg = tiny_drafter.drafter_config(draft_vocab_size=draft_vocab_size)
    forward = unroll.ForwardConfig(cfg, head_chunk=8)
    records = [tiny_drafter.record(1, 9, 4), tiny_drafter.record(2, 7, 3)]
    buffer = tiny_drafter.buffer_of(tmp_path, records)
    sizes = {"row_tokens": 16, "row_bases": 10}
    (rows,) = layout.plan(buffer, [0, 1], num_rows=1, seed=None, **sizes)
    batch = layout.lay_out(buffer, rows, **sizes)
    params, target = tiny_drafter.params_of(cfg), tiny_drafter.target_of(cfg)
    head = tiny_drafter.target_params().head
    given = functools.partial(rules.measure, num_steps=DEPTH, cfg=forward)
    found = jax.jit(given)(
        params.replace(sharpness=np.float32(1.5)), batch, target, head
    )
    counted = functools.partial(acceptance.measure, num_steps=DEPTH, cfg=forward)
    expected = jax.jit(counted)(params, batch, target)
    used = acceptance.SHARPNESSES.index(1.5)
    np.testing.assert_array_equal(found["count"], expected["count"])
    np.testing.assert_array_equal(found["keyed"], expected["coupled_chain"][:, used])
    assert np.all(np.diff(found["block"]) <= 0)
    assert np.all(found["block"] >= found["rejection"])
    (hidden,) = unroll.unroll(params, batch, target, 1, cfg=forward)
    first = 0.0
    ids = np.arange(tiny_drafter.TARGET.vocab_size)
    ids = ids if target.draft_ids is None else np.asarray(target.draft_ids)
    for m in np.flatnonzero(batch.valid[0]):
        base = batch.bases[0, m]
        drawn = batch.tokens[0, base + 2]
        law = scipy.special.softmax(np.asarray(head @ batch.hidden[0, base + 1]))
        draft = scipy.special.softmax(np.asarray(target.head @ hidden[:, 0, m]))
        first += min(1.0, draft[ids == drawn].sum() / law[drawn])
    np.testing.assert_allclose(found["rejection"][0], first, rtol=1e-5)
    np.testing.assert_allclose(found["block"][0], first, rtol=1e-5)
    sums = jax.jit(
        functools.partial(
            objectives.sums_of,
            size=10,
            cfg=forward,
            objective=objectives.Objective(DEPTH),
        )
    )(params, unroll.see(params, batch, target, cfg=forward), batch, target, 0)
    if draft_vocab_size:
        # Here what cannot be proposed is counted as missing, there it is left out.
        assert np.all(found["overlap"] < sums["overlap"])
    else:
        np.testing.assert_allclose(found["overlap"], sums["overlap"], rtol=1e-5)
    once = jax.jit(given)(params, batch, target, head)
    np.testing.assert_array_equal(once["block"], found["block"])
    np.testing.assert_allclose(once["block_sharpened"], once["block"], rtol=1e-5)
    assert np.all(found["block_sharpened"][:2] != found["block"][:2])
    lengths = rules.accept_lengths(found)
    assert lengths["block"] == pytest.approx(
        1 + float(found["block"].sum() / found["count"][0])
    )
