"""Routes that the engine keeps are the forward's, whatever guesses, in any batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rl import engines
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models import transformer
from tlt_jax.models.drafters import drafter
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import speculator
from tlt_jax.specdec import strategy

CFG = dataclasses.replace(
    engines.CFG,
    family="qwen3_moe",
    qk_norm=True,
    experts=model_config.Experts(num=6, per_token=2, d_ff=12),
)
PARAMS = model_params.unstack(model_params.init(CFG, jax.random.key(0)))
DRAFTER = drafter.of_target(CFG, feature_layers=(0, 1))
REQUESTS = engines.requests_of({1: (12,), 5: (17, 1), 9: (9, 16, 16)})
FORMS = {
    "plain": ((), {}),
    "one row": ((), engines.ONE_ROW),
    "preempting": ((), engines.SMALL | dict(num_pages=18)),
    "shared ngram": (("4:D3K2V5N8-ngram",), engines.SMALL),
    "learned": (("2:D3K2V5",), {}),
}


def complete(table, changes):
    made = None
    if table:
        arms = strategy.parse_arms(table)
        made = speculator.SpeculatorConfig(
            table=arms, drafter_cfg=None if "ngram" in table[0] else DRAFTER
        )
    engine = engine_lib.Engine(
        CFG,
        dataclasses.replace(engines.BASE, keep_routes=True, **changes),
        speculator_cfg=made,
    )
    engine.set_params(PARAMS, version=0)
    if made and made.drafter_cfg:
        engine.set_drafter(drafter.init(DRAFTER, jax.random.key(1)), version=0)
    completions, stats = engine.run(REQUESTS, engines.SEED)
    engine.pool.close()
    return completions, stats


@pytest.fixture(scope="module")
def expected():
    return complete(*FORMS["one row"])[0]


@jax.jit
def forward_routes(text):
    positions = jnp.arange(len(text))[None]
    out = transformer.forward(PARAMS, CFG, text[None], positions)
    return out.routing.routes[:, :, 0].transpose(2, 0, 1)


@pytest.mark.parametrize("form", FORMS)
def test_tokens_and_routes_are_those_of_one_forward(form, expected):
    completions, stats = complete(*FORMS[form])
    if form == "preempting":
        assert stats.num_preempted
    if FORMS[form][0]:
        assert sum(stats.num_accepted[1:]) > 0
    for request, found, wanted in zip(REQUESTS, completions, expected, strict=True):
        assert found.tokens.tolist() == wanted.tokens.tolist()
        text = np.concatenate([request.prompt, found.tokens])
        assert found.routes.dtype == np.uint8
        assert found.routes.shape == (len(text) - 1, 2, 2)
        whole = np.asarray(forward_routes(engines.padded(text)))[: len(text) - 1]
        np.testing.assert_array_equal(
            np.sort(found.routes, axis=-1), np.sort(whole, axis=-1)
        )


def test_routes_of_dense_blocks_are_refused():
    with pytest.raises(ValueError, match="keep_routes=True, but the model has no exp"):
        engine_lib.Engine(
            engines.CFG, dataclasses.replace(engines.BASE, keep_routes=True)
        )
