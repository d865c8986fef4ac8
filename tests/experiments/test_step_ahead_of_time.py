"""Steps on chips that are not there: what is counted, and that programs compile."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl

from configs import grpo
from experiments import ahead_of_time, step_ahead_of_time, step_costs
from experiments.lab import experiment, launches, provenance, tables
from tlt_jax import config
from tlt_jax.models import attention as attention_lib
from tlt_jax.models import config as model_config
from tlt_jax.models import flash_attention, kernels
from tlt_jax.pallas_kernels.verify_attention import arguments, tpu_plan
from tlt_jax.runtime import sharding

TABLE = experiment.RESULTS_DIR / "cpu" / "step_ahead_of_time.csv"
MODEL = dataclasses.replace(
    ahead_of_time.ARCHITECTURES["qwen2.5-7b"],
    num_layers=8,
    vocab_size=4096,
    eos_ids=(1,),
    d_model=256,
    d_ff=512,
    num_heads=8,
    num_kv_heads=4,
)
BATCH, LENGTH = 16, 256
# Heads of queries, keys and values, back again, and the gated layer; then the head.
NUM_WEIGHTS = 8 * (256 * 128 * (8 + 4 + 4) + 8 * 128 * 256 + 3 * 256 * 512) + 4096 * 256


def looping(body):
    """A program whose outer loop does something, traced."""
    weights, state = jnp.zeros((8, 4)), jnp.zeros((4, 2))

    def program(x):
        x = jnp.sin(weights.T @ (weights @ x))
        return lax.while_loop(lambda x: x[0, 0] < 1, body(weights), x)

    return jax.make_jaxpr(program)(state)


def double(x_ref, out_ref):
    out_ref[...] = 2 * x_ref[...]


kernel = pl.pallas_call(
    double,
    out_shape=jax.ShapeDtypeStruct((4, 2), jnp.float32),
    interpret=True,
    cost_estimate=pl.CostEstimate(flops=7, transcendentals=0, bytes_accessed=5),
)
# 2 x 8 x 4 x 2 operations; 32 weights, 8 numbers given and 16 that come of it.
PRODUCT = step_costs.Cost(128, 4 * (32 + 8 + 16))
# Back: the same operations, 16 numbers given, 8 that come of it.
BACK = step_costs.Cost(128, 4 * (32 + 16 + 8))


def once(w):
    return lambda x: jnp.sin(w.T @ (w @ x))


def often(w):
    return lambda x: lax.fori_loop(0, 3, lambda _, x: once(w)(x), x)


def as_asked(w):
    return lambda x: lax.while_loop(lambda x: x[0, 0] < 2, once(w), x)


def by_kernel(w):
    return lambda x: kernel(x)


def by_platform(w):
    return lambda x: lax.platform_dependent(
        x, tpu=lambda x: x, cuda=often(w), default=once(w)
    )


def by_index(w):
    # Two of four rows are read; then two numbers are written in a place.
    return lambda x: x[jnp.array([0, 3])].sum() + x.at[1, :].set(3.0)


@pytest.mark.parametrize(
    ("body", "platform", "wanted"),
    [
        (once, "tpu", PRODUCT + BACK),
        (often, "tpu", (PRODUCT + BACK).times(3)),
        (as_asked, "tpu", (PRODUCT + BACK).times(5)),
        (by_kernel, "tpu", step_costs.Cost(7, 5)),
        (by_platform, "tpu", step_costs.Cost()),
        (by_platform, "cuda", (PRODUCT + BACK).times(3)),
        (by_platform, "cpu", PRODUCT + BACK),
    ],
)
def test_a_step_is_what_the_outer_loop_does(body, platform, wanted):
    assert step_costs.of_step(looping(body), platform, 5) == wanted


def test_what_is_read_and_written_by_index_counts_alone():
    cost = step_costs.of_step(looping(by_index), "tpu", 0)
    gathered, summed, written = 2 * 16 + 2 * 4, 16 + 4, 2 * 8
    assert cost == step_costs.Cost(0, gathered + summed + written)


def test_a_program_with_two_outer_loops_is_refused():
    def twice(x):
        for _ in range(2):
            x = lax.while_loop(lambda x: x < 1, lambda x: x + 1, x)
        return x

    with pytest.raises(ValueError, match="2 outer loops, not one"):
        step_costs.of_step(jax.make_jaxpr(twice)(0.0), "tpu", 0)


@pytest.mark.parametrize(("name", "products"), [("splash", 9), ("cudnn", 7)])
def test_kernels_of_training_attention_count_as_causal_products(name, products):
    """Two forward; backward splash makes the scores again in both of its kernels."""
    length, flash = 1024, kernels.Flash(name)
    query, keys = jnp.zeros((1, 2, 2, length, 128)), jnp.zeros((1, 2, 128, length))
    ids = jnp.zeros((1, length), jnp.int32)

    def loss(query, keys, values):
        within = flash_attention.sequences(attention_lib.Visibility(ids, ids))
        given = (x.astype(jnp.bfloat16) for x in (query, keys, values))
        part = flash_attention.attend(*given, within, scale=0.1, flash=flash)
        return jnp.sum(attention_lib.finish(part))

    with ahead_of_time.cudnn_of_described():
        traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(query, keys, keys)
    cost = step_costs.of_program(traced, "tpu", trips=0, columns=length)
    # Splash sums slopes times results outside of its kernels.
    assert 0 <= cost.flops - products * query.size * length <= 2 * query.size
    # Queries, keys and values, in and out, some times each, and no score.
    assert cost.num_bytes < 100 * query.size


@functools.cache
def cost(text, platform="cuda"):
    strategy = step_ahead_of_time.strategy_of(text, BATCH)
    asked = step_ahead_of_time.Decoding(MODEL, BATCH, LENGTH, strategy, None)
    return step_ahead_of_time.counted(asked, platform)


def attention(num_tokens):
    sizes = arguments.Sizes((BATCH, 4, 2, num_tokens, 128), "bfloat16", 128, 2)
    return tpu_plan.cost(sizes, None)


def test_a_plain_step_multiplies_every_weight_once():
    flops = cost("plain").flops
    assert flops == 2 * BATCH * NUM_WEIGHTS + 8 * attention(1).flops
    # Weights in two bytes, and what is cached: activations are some percent of it.
    least = 2 * NUM_WEIGHTS + 8 * attention(1).bytes_accessed
    assert least < cost("plain").num_bytes < 1.2 * least


def test_a_mixtures_step_reads_the_experts_that_its_columns_touch():
    each = 3 * 256 * 128
    model = dataclasses.replace(
        MODEL, experts=model_config.Experts(num=32, per_token=2, d_ff=128)
    )
    attending = 8 * (256 * 128 * (8 + 4 + 4) + 8 * 128 * 256 + 32 * 256) + 4096 * 256

    def step(text):
        strategy = step_ahead_of_time.strategy_of(text, BATCH)
        asked = step_ahead_of_time.Decoding(model, BATCH, LENGTH, strategy, None)
        return step_ahead_of_time.counted(asked, "cuda")

    plain = step("plain")
    # Of a token two experts, and the sum of their shares.
    column = attending + 8 * 2 * (each + 256)
    assert plain.flops == 2 * BATCH * column + 8 * attention(1).flops
    touched = 1 - (1 - 2 / 32) ** BATCH
    least = 2 * (attending + 8 * 32 * touched * each) + 8 * attention(1).bytes_accessed
    assert least < plain.num_bytes < 1.25 * least
    # Four columns a row touch nearly all: more bytes than attention's alone.
    more = step("D3K1V4")
    extra = 2 * 8 * 32 * each * ((1 - 2 / 32) ** BATCH - (1 - 2 / 32) ** (4 * BATCH))
    assert more.num_bytes - plain.num_bytes > extra


def test_a_step_costs_by_its_budget_and_not_by_its_trees():
    shared, more = cost("D5K2V11N2B"), cost("D5K2V11N3B")
    whole = cost("D5K2V11")
    column = 2 * NUM_WEIGHTS
    # Attention is the same. What is taken in is packed as well, and so are the nodes
    # that a level expands: at most 21 of 32 with the smaller budget, or all of them.
    assert more.flops - shared.flops >= BATCH * column
    assert more.flops - shared.flops < 2 * BATCH * column
    assert whole.flops - more.flops > 8 * BATCH * column
    assert cost("plain").num_bytes < shared.num_bytes < more.num_bytes < whole.num_bytes


def test_a_budget_is_named_by_the_row():
    read = step_ahead_of_time.strategy_of
    assert read("D7K1V8N2B", 64).budget == 128
    assert read("D7K1V8N40", 64).budget == 40
    assert read("plain", 64) is None
    with pytest.raises(ValueError, match="is not of the form"):
        read("D7K1V8Nx", 64)


def run_of_recipe():
    return config.load(grpo.get_config())


def test_the_table_has_every_step_and_no_program_was_refused():
    every = tables.read(TABLE)
    # Those of other models are added one by one.
    rows = [row for row in every if not row.get("model")]
    strategies = ["plain", *step_ahead_of_time.STRATEGIES.split(",")]
    wanted = {
        (chip, batch, strategy)
        for chip in step_ahead_of_time.CHIPS
        for batch in (1, 32, 64, 128)
        for strategy in strategies
    }
    found = {(r["chip"], r["batch"], r["strategy"]) for r in rows}
    # A record that says that cells are lacking goes on by the same command.
    cells = provenance.read(TABLE.parent, TABLE.stem)["cells"]
    assert found <= wanted and len(every) == cells["done"]
    assert cells["wanted"] == len(wanted) + len(every) - len(rows)
    assert {("h200", 64, strategy) for strategy in strategies} <= found
    # One row, with the draft vocabulary of the large recipes.
    size = run_of_recipe().drafter.draft_vocab_size
    (alone,) = [
        row
        for row in rows
        if (row["chip"], row["batch"], row["strategy"]) == ("h200", 1, "D7K1V8")
    ]
    assert alone["draft_vocab"] == step_ahead_of_time.DRAFT_VOCAB == size
    assert 1.2 < alone["bytes_of_plain"] <= 1.35
    launches = {
        row["batch"]: row["launches"]
        for row in tables.where(rows, chip="h200", strategy="plain")
        if row.get("launches")
    }
    assert launches.keys() == {1, 64} and launches[1] <= 250
    for row in rows:
        assert not row.get("refused"), row
        assert row["fits"] in (True, None), row
        assert row["fits"] or row["batch"] != 64, row
    steps = {(r["chip"], r["batch"], r["strategy"]): r for r in rows}
    for chip, batch, strategy in steps:
        if strategy == "D7K1V8N2B":
            shared, whole = steps[chip, batch, strategy], steps[chip, batch, "D7K1V8"]
            assert 1 < shared["flops_of_plain"] < whole["flops_of_plain"] / 2
            assert 1 < shared["bound_of_plain"] <= whole["bound_of_plain"]


COMPILED = """
%add.1 (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %z = f32[] add(%x, %y)
}

%inner (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  %part = f32[8]{0} get-tuple-element(%state), index=1
  %fusion.2 = f32[8]{0} fusion(%part), kind=kLoop, calls=%add.1
  %dot = f32[8]{0} custom-call(%fusion.2), custom_call_target="__cublas$gemm"
  ROOT %tuple.1 = (s32[], f32[8]{0}) tuple(%part, %dot)
}

%more (state.2: (s32[], f32[8])) -> pred[] {
  %state.2 = (s32[], f32[8]{0}) parameter(0)
  ROOT %compare = pred[] fusion(%state.2), kind=kLoop, calls=%add.1
}

%few (x.3: f32[8]) -> f32[8] {
  ROOT %x.3 = f32[8]{0} parameter(0)
}

%body (state.4: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state.4 = (s32[], f32[8]{0}) parameter(0)
  %while.1 = (s32[], /*index=1*/f32[8]{0}) while(%state.4), condition=%more, body=%inner
  %chosen = f32[8]{0} conditional(%p, %a, %b), branch_computations={%few, %inner}
  %copy.1 = f32[8]{0} copy(%chosen)
  ROOT %tuple.2 = (s32[], f32[8]{0}) bitcast(%while.1)
}

ENTRY %main (given: f32[8]) -> f32[8] {
  %fusion.9 = f32[8]{0} fusion(%given), kind=kLoop, calls=%add.1
  %while.2 = (s32[], f32[8]{0}) while(%tuple.9), condition=%more, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%while.2), index=1
}
"""


def test_launches_are_those_of_the_outer_loops_body():
    # Of each turn the condition; within it a loop of two and a condition, the branch
    # with most, and a copy.
    assert launches.of_step(COMPILED) == 1 + (2 + 1) + 2 + 1
    with pytest.raises(ValueError, match="has no loop"):
        launches.of_step(COMPILED.replace("while(", "custom-call("))


@pytest.fixture
def no_cache():
    ahead_of_time.use_compilation_cache(False)
    yield
    ahead_of_time.use_compilation_cache(True)


def compiled(chip, text):
    chips = step_ahead_of_time.CHIPS[chip].num_chips
    mesh = sharding.make_mesh(
        1, 1, chips, devices=step_ahead_of_time.described(chip)[:chips]
    )
    strategy = step_ahead_of_time.strategy_of(text, BATCH)
    asked = step_ahead_of_time.Decoding(MODEL, BATCH, 4096, strategy, mesh)
    caches = asked.program()[0].abstract_caches
    features = getattr(caches.target, "features", None)
    row = step_ahead_of_time.compiled(asked, chip)
    return row, 0 if features is None else features.size * 2


BUDGETED = ("D7K1V8", "D7K1V8N32", "D5K4V16N48")


@pytest.mark.tpu_compile
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("text", BUDGETED)
def test_budgets_compile_for_tpus_and_copy_no_features(text, no_cache):
    row, features = compiled("v5e", text)
    assert row["fits"] and row["compiler_bytes"] > 0, row
    assert row["temp_bytes"] < features / 2


@pytest.mark.cuda_compile
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("text", BUDGETED)
def test_budgets_compile_for_an_h200_and_copy_no_features(text, no_cache):
    row, features = compiled("h200", text)
    assert row["fits"], row
    assert row["temp_bytes"] < features / 2


@pytest.mark.cuda_compile
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_a_step_of_one_row_starts_few_kernels_on_an_h200(no_cache):
    """As many for every layer: those of 28 follow from those of two and four."""
    mesh = sharding.make_mesh(1, 1, 1, devices=step_ahead_of_time.described("h200")[:1])
    found = []
    for num_layers in (2, 4):
        model = dataclasses.replace(
            ahead_of_time.ARCHITECTURES["qwen2.5-7b"], num_layers=num_layers
        )
        asked = step_ahead_of_time.Decoding(model, 1, 2048, None, mesh)
        found.append(step_ahead_of_time.compiled(asked, "h200")["launches"])
    of_layer = (found[1] - found[0]) / 2
    assert found[0] + 26 * of_layer <= 250, found


def test_without_the_compiler_the_message_has_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ahead_of_time.NoCompilerError, match="pip install --no-deps"):
        step_ahead_of_time.described("h200")
