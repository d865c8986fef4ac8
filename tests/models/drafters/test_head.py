"""Whose head a drafter's features are multiplied by, and what is multiplied."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from tests.models import published_drafters
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter, head

TARGET = published_drafters.TARGET
HIDDEN = np.random.default_rng(0).normal(size=(16, 2, 3)).astype(np.float32)
NORM = np.linspace(0.5, 2, 16, dtype=np.float32)


def params_of(**leaves):
    return drafter.DrafterParams(join=None, layer=None, **leaves)


def test_rows_are_those_of_the_tokens_that_can_be_proposed():
    table = jnp.arange(24 * 16.0).reshape(24, 16)
    tied = model_params.Params(embed=table, layers=(), final_norm=NORM)
    np.testing.assert_array_equal(head.head_rows(tied, None), table)
    own = tied.replace(lm_head=-table)
    rows = head.head_rows(own, jnp.array([2, 5]))
    np.testing.assert_array_equal(rows, -table[jnp.array([2, 5])])
    assert head.head_of(params_of(), rows) is rows
    assert head.head_of(params_of(head=table), rows) is table


def test_eagle3_alone_norms_for_the_head():
    rows = np.random.default_rng(1).normal(size=(5, 16)).astype(np.float32)
    params = params_of(norm=NORM)
    tlt = drafter.of_target(TARGET)
    eagle3 = drafter.of_target(
        TARGET, architecture="eagle3", feature_layers=(1, 3, 4), draft_vocab_size=5
    )
    plain = np.einsum("vd,dbt->btv", rows, HIDDEN)
    np.testing.assert_allclose(
        head.logits(params, tlt, rows, jnp.asarray(HIDDEN)), plain, atol=1e-5
    )
    eps = 0.25
    layer = dataclasses.replace(eagle3.layer, rms_norm_eps=eps)
    eagle3 = dataclasses.replace(eagle3, layer=layer)
    size = np.sqrt((HIDDEN**2).mean(axis=0) + eps)
    normed = HIDDEN / size * NORM[:, None, None]
    np.testing.assert_allclose(
        head.logits(params, eagle3, rows, jnp.asarray(HIDDEN)),
        np.einsum("vd,dbt->btv", rows, normed),
        atol=1e-5,
    )
