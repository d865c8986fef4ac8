"""A step in pieces is the step."""

import functools

import jax
import numpy as np
import optax
import pytest

from tests.specdec import tiny_drafter
from tlt_jax.runtime import train_state
from tlt_jax.specdec.texts import layout
from tlt_jax.specdec.training import objectives, unroll
from tlt_jax.specdec.training import step as step_lib

SIZES = {"row_tokens": 16, "row_bases": 10}
# Longer than a piece, and no multiple of it.
PIECE = 4
OPTIMIZER = optax.adam(1e-2)


def batch_of(tmp_path, layers):
    """Two texts in a row, and one of them in another."""
    records = [
        tiny_drafter.record(*numbers, layers=layers)
        for numbers in ((1, 9, 4), (2, 7, 3))
    ]
    buffer = tiny_drafter.buffer_of(tmp_path, records)
    (rows,) = layout.plan(buffer, [0, 1], num_rows=1, seed=None, **SIZES)
    return layout.lay_out(buffer, [*rows, rows[0][1:]], **SIZES)


@pytest.mark.parametrize(
    ("layers", "objective"),
    [
        ((0, 2), objectives.Objective(3, decay=0.7, token_loss="lk_hybrid")),
        ((), objectives.preset("hass")),
    ],
    ids=["eagle3", "hass"],
)
def test_pieces_take_the_step(tmp_path, layers, objective):
    cfg = tiny_drafter.drafter_config(feature_layers=layers, output_norm=bool(layers))
    params, target = tiny_drafter.params_of(cfg), tiny_drafter.target_of(cfg)
    batch = batch_of(tmp_path, layers)
    how = {
        "cfg": unroll.ForwardConfig(cfg, head_chunk=8),
        "objective": objective,
    }
    state = train_state.begin(params, OPTIMIZER)
    compute = jax.value_and_grad(
        functools.partial(tiny_drafter.loss, **how), has_aux=True
    )
    (loss, wanted), slopes = jax.jit(compute)(params, batch, target)
    expected, norm, _ = train_state.step(state, slopes, loss, OPTIMIZER)
    wanted |= {"loss": loss, "grad_norm": norm, "skipped": 0}

    under_way = jax.jit(functools.partial(step_lib.begin, **how))(params, batch, target)
    add = jax.jit(functools.partial(step_lib.add, size=PIECE, **how))
    for start in step_lib.starts(SIZES["row_bases"], PIECE):
        under_way = add(under_way, params, batch, target, np.int32(start))
    assert add._cache_size() == 1
    grads = step_lib.close(
        under_way.grads, under_way.seen_grads, params, batch, target, cfg=how["cfg"]
    )
    found, outcome = step_lib.update(
        state, grads, under_way.sums, batch, objective=objective, optimizer=OPTIMIZER
    )
    assert int(found.num_updates) == 1 and set(outcome) == set(wanted)
    compare = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-4)
    jax.tree.map(compare, outcome, wanted)
    # Adam's first step is all sign: the moments tell the gradient's size.
    jax.tree.map(compare, found.opt_state[0].mu, expected.opt_state[0].mu)
    assert float(wanted["grad_norm"]) > 1e-2
