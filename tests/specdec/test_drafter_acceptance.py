"""Accepted drafts against a slow count, and against what the engine would draw."""

import functools

import jax
import numpy as np

from tests.specdec import tiny_drafter
from tlt_jax.specdec import (
    drafter_acceptance,
    drafter_unroll,
    hidden_buffer,
    noise,
)

CFG = tiny_drafter.drafter_config()
FORWARD = drafter_unroll.ForwardConfig(CFG, head_chunk=8)
NUM_STEPS = 3


def test_counts_are_those_of_a_slow_twin(tmp_path):
    records = [tiny_drafter.record(1, 9, 4), tiny_drafter.record(2, 7, 3)]
    buffer = tiny_drafter.buffer_of(tmp_path, records)
    sizes = {"row_tokens": 16, "row_bases": 10}
    (rows,) = hidden_buffer.plan(buffer, [0, 1], num_rows=1, seed=None, **sizes)
    batch = hidden_buffer.lay_out(buffer, rows, **sizes)
    params, target = tiny_drafter.params_of(CFG), tiny_drafter.target_of(CFG)
    unroll = jax.jit(
        functools.partial(drafter_unroll.unroll, cfg=FORWARD, num_steps=NUM_STEPS)
    )
    vocab = tiny_drafter.TARGET.vocab_size
    ids = np.asarray(tiny_drafter.DRAFT_IDS)

    def scores_of(steps, m, k):
        logits = np.asarray(target.head @ steps[k][:, 0, m])
        position = batch.positions[0, batch.bases[0, m]] + k + 2
        gumbel = noise.gumbel(batch.keys[:, m], position[None], vocab)
        gumbel = np.asarray(gumbel)[0, ids]
        return {"deterministic": logits, "coupled": logits + gumbel}

    # Texts are random and seldom guessed: let some tokens be what is drafted.
    for m, k, name in (
        (0, 0, "coupled"),
        (0, 1, "coupled"),
        (3, 0, "deterministic"),
        (6, 0, "coupled"),
    ):
        scores = scores_of(unroll(params, batch, target), m, k)[name]
        batch.tokens[0, batch.bases[0, m] + k + 2] = ids[np.argmax(scores)]
    steps = unroll(params, batch, target)
    names = [x + y for x in ("deterministic", "coupled") for y in ("", "_chain")]
    expected = {name: np.zeros(NUM_STEPS) for name in ("count", *names)}
    ends = {0: 9, 1: 16}
    lifetimes = np.zeros(batch.bases.shape, int)
    for m in np.flatnonzero(batch.valid[0]):
        base = int(batch.bases[0, m])
        alive = {"deterministic": True, "coupled": True}
        for k in range(NUM_STEPS):
            if base + k + 2 >= ends[int(batch.segment[0, base])]:
                break
            expected["count"][k] += 1
            for name, scores in scores_of(steps, m, k).items():
                hit = ids[np.argmax(scores)] == batch.tokens[0, base + k + 2]
                alive[name] &= hit
                expected[name][k] += hit
                expected[f"{name}_chain"][k] += alive[name]
            lifetimes[0, m] += alive["coupled"]
    measure = jax.jit(
        functools.partial(drafter_acceptance.measure, num_steps=NUM_STEPS, cfg=FORWARD)
    )
    sums = measure(params, batch, target)
    for name, value in expected.items():
        np.testing.assert_array_equal(sums[name], value, err_msg=name)
    assert expected["count"].tolist() == [9, 7, 5]
    found = jax.jit(
        functools.partial(
            drafter_acceptance.lifetimes, num_steps=NUM_STEPS, cfg=FORWARD
        )
    )(params, batch, target)
    np.testing.assert_array_equal(found, lifetimes)
    assert lifetimes.max() > 1
    assert expected["coupled"][0] >= 3 and expected["deterministic"][0] >= 1


def test_summary():
    sums = {
        "count": np.array([4.0, 2.0]),
        "deterministic": np.array([2.0, 1.0]),
        "deterministic_chain": np.array([2.0, 0.0]),
        "coupled": np.array([3.0, 2.0]),
        "coupled_chain": np.array([3.0, 2.0]),
    }
    found = drafter_acceptance.summarise(sums)
    assert found == {
        "deterministic/rate_by_depth": [0.5, 0.5],
        "deterministic/accept_length": 1.5,
        "coupled/rate_by_depth": [0.75, 1.0],
        "coupled/accept_length": 2.25,
    }
