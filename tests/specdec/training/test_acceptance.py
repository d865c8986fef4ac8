"""Accepted drafts against a slow count, and against what the engine would draw."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tests.specdec import tiny_drafter
from tlt_jax.specdec import noise
from tlt_jax.specdec.texts import layout
from tlt_jax.specdec.training import acceptance
from tlt_jax.specdec.training import unroll as unroll_lib

CFG = tiny_drafter.drafter_config()
FORWARD = unroll_lib.ForwardConfig(CFG, head_chunk=8)
NUM_STEPS = 3


def test_counts_are_those_of_a_slow_twin(tmp_path):
    records = [tiny_drafter.record(1, 9, 4), tiny_drafter.record(2, 7, 3)]
    buffer = tiny_drafter.buffer_of(tmp_path, records)
    sizes = {"row_tokens": 16, "row_bases": 10}
    (rows,) = layout.plan(buffer, [0, 1], num_rows=1, seed=None, **sizes)
    batch = layout.lay_out(buffer, rows, **sizes)
    params, target = tiny_drafter.params_of(CFG), tiny_drafter.target_of(CFG)
    unroll = jax.jit(
        functools.partial(unroll_lib.unroll, cfg=FORWARD, num_steps=NUM_STEPS)
    )
    vocab = tiny_drafter.TARGET.vocab_size
    ids = np.asarray(tiny_drafter.DRAFT_IDS)

    def scores_of(steps, m, k):
        logits = np.asarray(target.head @ steps[k][:, 0, m])
        position = batch.positions[0, batch.bases[0, m]] + k + 2
        gumbel = noise.gumbel(batch.keys[:, m], position[None], vocab)
        gumbel = np.asarray(gumbel)[0, ids]
        by_sharpness = {
            ("coupled", i): logits * x + gumbel
            for i, x in enumerate(acceptance.SHARPNESSES)
        }
        return {"deterministic": logits, **by_sharpness}

    # Texts are random and seldom guessed: let some tokens be what is drafted.
    for m, k, name in (
        (0, 0, ("coupled", 0)),
        (0, 1, ("coupled", 0)),
        (3, 0, "deterministic"),
        (6, 0, ("coupled", 4)),
    ):
        scores = scores_of(unroll(params, batch, target), m, k)[name]
        batch.tokens[0, batch.bases[0, m] + k + 2] = ids[np.argmax(scores)]
    steps = unroll(params, batch, target)
    num = len(acceptance.SHARPNESSES)
    expected = {"count": np.zeros(NUM_STEPS)}
    for end in ("", "_chain"):
        expected["deterministic" + end] = np.zeros(NUM_STEPS)
        expected["coupled" + end] = np.zeros((NUM_STEPS, num))
    expected["coupled_error"] = np.zeros((NUM_STEPS, num, len(acceptance.TAUS)))
    ends = {0: 9, 1: 16}
    lifetimes = np.zeros(batch.bases.shape, int)
    for m in np.flatnonzero(batch.valid[0]):
        base = int(batch.bases[0, m])
        alive = collections.defaultdict(lambda: True)
        for k in range(NUM_STEPS):
            if base + k + 2 >= ends[int(batch.segment[0, base])]:
                break
            expected["count"][k] += 1
            drawn = batch.tokens[0, base + k + 2]
            for key, scores in scores_of(steps, m, k).items():
                hit = ids[np.argmax(scores)] == drawn
                for j, tau in enumerate(acceptance.TAUS):
                    chance = scipy.special.softmax(scores / tau).max()
                    if key != "deterministic":
                        place = (k, key[1], j)
                        expected["coupled_error"][place] += (chance - hit) ** 2
                alive[key] &= hit
                name, *rest = (key,) if key == "deterministic" else key
                place = (k, *rest)
                expected[name][place] += hit
                expected[f"{name}_chain"][place] += alive[key]
            lifetimes[0, m] += alive["coupled", 1]
    measure = jax.jit(
        functools.partial(acceptance.measure, num_steps=NUM_STEPS, cfg=FORWARD)
    )
    sums = measure(params, batch, target)
    assert sums.keys() == expected.keys() == acceptance.nothing(NUM_STEPS).keys()
    for name, value in expected.items():
        rtol = 1e-4 if name == "coupled_error" else 0
        np.testing.assert_allclose(sums[name], value, rtol=rtol, err_msg=name)
    assert expected["count"].tolist() == [9, 7, 5]
    found = jax.jit(
        functools.partial(acceptance.lifetimes, num_steps=NUM_STEPS, cfg=FORWARD)
    )(params.replace(sharpness=np.float32(1.25)), batch, target)
    np.testing.assert_array_equal(found, lifetimes)
    assert lifetimes.max() > 1
    assert expected["coupled"][0, 0] >= 2 and expected["deterministic"][0] >= 1
    assert len({tuple(x) for x in expected["coupled"].T}) > 1


def test_summary():
    sums = {
        "count": np.array([4.0, 2.0]),
        "deterministic": np.array([2.0, 1.0]),
        "deterministic_chain": np.array([2.0, 0.0]),
        # At depths 1 and 2, by sharpness: the second does best.
        "coupled": np.array([[4.0, 3.0, 3.0, 2.0, 2.0], [1.0, 2.0, 2.0, 0.0, 0.0]]),
        "coupled_chain": np.array(
            [[4.0, 3.0, 3.0, 2.0, 2.0], [0.0, 2.0, 2.0, 0.0, 0.0]]
        ),
    }
    # By tau at the second sharpness: a parabola about 2 ** 0.125; at the others not.
    place = np.arange(-5, 8) / 2 - 0.125
    errors = np.stack([1 + (place + i - 1) ** 2 for i in range(5)])
    sums["coupled_error"] = np.stack([errors, 3 * errors])
    found = acceptance.summarise(sums)
    assert found.pop("tau") == pytest.approx(2**0.125)
    assert found == {
        "sharpness": acceptance.SHARPNESSES[1],
        "deterministic/rate_by_depth": [0.5, 0.5],
        "deterministic/accept_length": 1.5,
        "coupled/rate_by_depth": [0.75, 1.0],
        "coupled/accept_length": 2.25,
    }


@pytest.mark.parametrize(
    ("accepted", "used", "chosen"),
    [
        ((90, 102, 100, 90, 90), 1.5, 1.5),
        ((90, 100, 104, 90, 90), 1.25, 1.5),
        ((104, 100, 90, 90, 90), 1.25, 1.0),
        # One that was never tried is no match for any.
        ((90, 100, 101, 90, 90), 7.0, 1.5),
    ],
)
def test_chance_changes_no_sharpness(accepted, used, chosen):
    chains = np.array([accepted], np.float64)
    plain = np.array([50.0])
    sums = {
        "count": np.array([120.0]),
        "deterministic": plain,
        "deterministic_chain": plain,
        "coupled": chains,
        "coupled_chain": chains,
        "coupled_error": np.zeros((1, 5, len(acceptance.TAUS))),
    }
    found = acceptance.summarise(sums, used)
    assert found["sharpness"] == chosen
    # No text, no error: as if it had not been measured.
    assert found["tau"] == 0.5
    hits = accepted[acceptance.SHARPNESSES.index(chosen)]
    assert found["coupled/accept_length"] == pytest.approx(1 + hits / 120)


@pytest.mark.parametrize(
    ("sharpness", "tau"), [(2.0, 0.7), (1.0, 1.0), (3.0, 2.8), (2.0, 0.0)], ids=str
)
def test_a_drafter_of_known_errors_is_found_out(sharpness, tau):
    """One that knows all but the scale is never in doubt."""
    _, _, found = measured(sharpness, tau, np.arange(31))
    assert found["sharpness"] == sharpness
    assert found["tau"] == pytest.approx(max(tau, acceptance.TAUS[0]), rel=0.1)


def test_tokens_that_cannot_be_drafted_count_against_drafts():
    ids = np.arange(5, 28)
    scores, drawn, found = measured(2.0, 0.7, ids)
    chances = scipy.special.softmax(scores / found["tau"], axis=1).max(axis=1)
    hits = ids[np.argmax(scores, axis=1)] == drawn
    assert np.mean(chances) == pytest.approx(np.mean(hits), abs=0.02)
    assert np.mean(hits) < 0.6 and found["tau"] > 0.9


def measured(sharpness, tau, ids):
    """Scores of a drafter, what was drawn, and what `summarise` makes of it."""
    num, vocab = 3000, 31
    rng = np.random.default_rng(3)
    keys = rng.integers(0, 2**32, (num, 2), dtype=np.uint32)
    positions = np.arange(num, dtype=np.int32)
    logits = rng.normal(size=(num, vocab)).astype(np.float32)
    noise_QV = np.asarray(noise.gumbel(keys, positions, vocab))
    unknown = tau * rng.gumbel(size=logits.shape)
    drawn = np.argmax(sharpness * logits + unknown + noise_QV, axis=1)
    part = unroll_lib.Predictions(
        hidden=jnp.asarray(logits[:, ids].T[None]),
        exists=jnp.ones((1, num)),
        laws=(drawn, positions, keys),
    )
    head, embed = jnp.eye(len(ids)), np.zeros((vocab, 1))
    target = unroll_lib.Target(embed, head, jnp.asarray(ids))
    sums = acceptance.count(part, tiny_drafter.params_of(CFG), target)
    found = acceptance.summarise(jax.device_get(sums))
    return (found["sharpness"] * logits + noise_QV)[:, ids], drawn, found
