"""The engine with the accelerators' attention kernels, interpreted: the same tokens."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.rl import engines
from tlt_jax import types
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import programs as engine_programs
from tlt_jax.rl.engine import scheduler, speculator
from tlt_jax.specdec import strategy

# As small as kernels take it.
CFG = model_config.ModelConfig(
    family="qwen3",
    vocab_size=24,
    num_layers=2,
    d_model=16,
    d_ff=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    tie_embeddings=True,
    qk_norm=True,
    sliding_window=9,
    windowed_layers=(False, True),
    eos_ids=(2,),
)
DRAFTER = drafter.of_target(CFG)
SIZES = engine_programs.EngineConfig(
    max_rows=1,
    max_length=40,
    page_size=16,
    steps_per_call=8,
    prefill_chunk=16,
    eos_ids=CFG.eos_ids,
)


def weights():
    params = model_params.init(CFG, jax.random.key(0))
    # Scanned: the interpreted kernel is compiled once for all layers.
    return jax.tree.map(lambda x: 2 * x, params)


def requests():
    rng = np.random.default_rng(0)
    for i, (length, limit) in enumerate(((19, 8), (6, 20))):
        prompt = rng.integers(3, CFG.vocab_size, length).astype(np.int32)
        yield types.Request(7 * i, i, 0, prompt, limit)


def run(attention, table=None):
    """Completions by request, with the rows of `table` speculating."""
    chosen = None
    if table is not None:
        chosen = speculator.SpeculatorConfig(strategy.parse_arms(table), DRAFTER)
    sizes = dataclasses.replace(SIZES, attention=attention)
    engine = engine_lib.Engine(CFG, sizes, speculator_cfg=chosen)
    engine.set_params(weights(), version=0)
    if chosen is not None:
        engine.set_drafter(drafter.init(DRAFTER, jax.random.key(1)), version=0)
    completions, stats = engine.run(list(requests()), engines.SEED)
    engine.pool.close()
    return completions, stats


@pytest.fixture(scope="module")
def expected():
    return run("portable")[0]


@pytest.mark.parametrize(
    ("attention", "table"),
    [("mosaic_tpu_interpreted", ("1:D2K2V4",)), ("triton_gpu_interpreted", None)],
)
def test_an_engine_with_kernels_draws_the_same_tokens(expected, attention, table):
    completions, stats = run(attention, table)
    for completion, wanted in zip(completions, expected, strict=True):
        assert completion.tokens.tolist() == wanted.tokens.tolist()
        np.testing.assert_allclose(completion.logprobs, wanted.logprobs, atol=1e-5)
    assert (stats.accept_length > 1) == (table is not None)
    # Long enough to leave the window and the first page.
    assert max(19 + len(completions[0].tokens), len(completions[1].tokens)) > 24


@pytest.mark.parametrize("attention", ["mosaic_tpu", "triton_gpu", "flash"])
def test_a_kernel_that_cannot_be_had_is_refused(attention):
    sizes = dataclasses.replace(SIZES, attention=attention)
    with pytest.raises(ValueError, match=f"attention='{attention}'.*portable"):
        engine_lib.Engine(CFG, sizes)


# Which of them says it depends on how jax called the program.
STOPPED = (jax.errors.JaxRuntimeError, ValueError)


def test_a_broken_page_table_ends_the_rollout_by_its_name(monkeypatch):
    made = scheduler.Scheduler.page_table

    def broken(self, *given):
        table = made(self, *given)
        table[0, 1] = 77
        return table

    monkeypatch.setattr(scheduler.Scheduler, "page_table", broken)
    engine = engine_lib.Engine(CFG, dataclasses.replace(SIZES, check_kernels=True))
    engine.set_params(weights(), version=0)
    with pytest.raises(STOPPED, match=r"page_table\[0, 1\]=77 is"):
        engine.run(list(requests()), engines.SEED)
    engine.pool.close()


def test_nothing_is_checked_where_nobody_asks():
    texts = []
    for check in (False, True):
        sizes = dataclasses.replace(SIZES, check_kernels=check)
        engine = engine_lib.Engine(CFG, sizes)
        program = engine.programs.decoding(weights(), 1, None)
        texts.append(program.lower().as_text())
        engine.pool.close()
    assert ["callback" in text for text in texts] == [False, True]
