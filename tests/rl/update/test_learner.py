"""The learner through the real forward: packed against plain, summed against whole."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rl.update import padding
from tlt_jax import assembly
from tlt_jax import config as config_lib
from tlt_jax.models import config as model_config
from tlt_jax.models import kernels, transformer
from tlt_jax.models import params as model_params
from tlt_jax.rl.update import learner, losses, packing, policy_gradient
from tlt_jax.runtime import programs, sharding
from tlt_jax.settings import sections
from tlt_jax.specdec import sampling

MODEL = model_config.ModelConfig(
    "qwen3", 64, 2, 32, 48, 4, 2, 8, False, qkv_bias=True, qk_norm=True
)
FORWARD = policy_gradient.ForwardConfig(MODEL, remat="none")
ROWS, NUM_GROUPS = 4, 12
LOSS = losses.LossConfig(kl_coef=0.01, importance_cap=2.0, entropy_coef=0.01)


def make_groups(seed=0, num_groups=4):
    rng = np.random.default_rng(seed)

    def draw(n):
        return rng.integers(0, 64, n).astype(np.int32)

    return [
        packing.Group(draw(5), tuple(draw(n) for n in rng.integers(0, 9, 3)))
        for _ in range(num_groups)
    ]


def pack_evenly(groups, rows_multiple=ROWS, lay_out=packing.pack):
    """Rows of one shape for most tests: few programs are compiled."""
    return lay_out(groups, row_tokens=32, rounding=32, rows_multiple=rows_multiple)


def make_parts(groups=None):
    packed = pack_evenly(
        make_groups(num_groups=NUM_GROUPS) if groups is None else groups
    )
    return packing.split(packed, ROWS)


def make_batch(packed, seed=1, **changes):
    """A micro-batch with off-policy numbers, the same for any layout."""
    rng = np.random.default_rng(seed)

    def logprobs():
        return [rng.uniform(-5, -3, n).astype(np.float32) for n in packed.lengths]

    settings = dict(
        advantages=rng.normal(size=len(packed.lengths)).astype(np.float32),
        weights=losses.token_weights(packed.lengths, "sequence_mean", max_length=1),
        old_logprobs=logprobs(),
        rollout_logprobs=logprobs(),
        ref_logprobs=logprobs(),
    )
    batch = policy_gradient.micro_batch(packed, **settings | changes)
    # Only a bound: a common one for rows of one shape.
    return dataclasses.replace(batch, num_sequences=len(packed.tokens) * 16)


@functools.cache
def make_params(seed=0):
    """Random weights whose biases and norms matter."""
    params = model_params.init(MODEL, jax.random.key(seed))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    shaken = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(treedef, shaken)


def make_run(optimizer=None, **sections):
    return config_lib.load(
        {
            "model": {"spec": "none", "remat": "none"},
            "task": {"name": "count"},
            "optimizer": {"learning_rate": 1e-2} | (optimizer or {}),
        }
        | sections
    )


def learner_of(run, mesh, pool, **more):
    return learner.Learner(
        MODEL,
        assembly.law_of(run.sampling),
        run.learner,
        run.optimizer,
        num_steps=run.num_steps,
        precision=run.precision,
        remat=run.model.remat,
        mesh=mesh,
        pool=pool,
        **more,
    )


@pytest.fixture(scope="module")
def pool():
    pool = programs.ProgramPool()
    yield pool
    pool.close()


@pytest.fixture
def make_learner(pool):
    def make(shape=(1, 1, 1), head_chunk=1024, **sections):
        mesh = sharding.make_mesh(*shape)
        return learner_of(make_run(**sections), mesh, pool, head_chunk=head_chunk)

    return make


def zero_gradient(params):
    return policy_gradient.Gradient(jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))


@functools.cache
def jitted_accumulate(**static):
    return jax.jit(functools.partial(policy_gradient.accumulate, **static))


def gradient_of(params, batches, cfg=FORWARD, loss_cfg=LOSS):
    carry = zero_gradient(params)
    outputs = []
    for batch in batches:
        step = jitted_accumulate(
            cfg=cfg, loss_cfg=loss_cfg, num_sequences=batch.num_sequences
        )
        carry, _, logprobs = step(params, carry, batch.rows, batch.columns)
        outputs.append(np.asarray(logprobs))
    return carry, outputs


def assert_close(a, b, tolerance=1e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance),
        a,
        b,
    )


@jax.jit
def plain_logits(params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    out = transformer.forward(params, MODEL, tokens, positions)
    return transformer.logits(params, out.hidden)


def plain_logprobs(params, groups, law):
    """Causal forward of each prompt with one response, softmax in NumPy."""
    pairs = [(g.prompt, response) for g in groups for response in g.responses]
    texts = np.zeros((len(pairs), 16), np.int32)
    for text, (prompt, response) in zip(texts, pairs, strict=True):
        text[: len(prompt) + len(response)] = np.concatenate([prompt, response])
    expected = []
    logits = np.asarray(plain_logits(params, texts), np.float64)
    for row, (prompt, response) in zip(logits, pairs, strict=True):
        scores = row[len(prompt) - 1 :][: len(response)] / law.temperature
        if law.top_k:
            kth = np.sort(scores, axis=-1)[:, -law.top_k, None]
            scores = np.where(scores >= kth, scores, -np.inf)
        scores -= scores.max(axis=-1, keepdims=True)
        normal = np.log(np.exp(scores).sum(axis=-1, keepdims=True))
        expected.append((scores - normal)[np.arange(len(response)), response])
    return expected


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.7, 40)])
def test_logprobs_are_those_of_a_plain_forward_per_response(
    make_learner, temperature, top_k
):
    settings = dict(temperature=temperature, top_k=top_k)
    # Chunks of the head that do not divide the predictions evenly.
    trainer = make_learner(sampling=settings, head_chunk=10 if top_k else 1024)
    params = make_params()
    parts = make_parts()
    assert len(parts) == 2
    state = trainer.init_state(params)
    got = packing.scatter(parts, trainer.logprobs(state.params, parts))
    law = sampling.SamplingConfig(**settings)
    expected = plain_logprobs(params, make_groups(num_groups=NUM_GROUPS), law)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"ratio_level": "sequence", "importance_cap": None}]
)
def test_packed_equals_padded_in_logprobs_loss_and_gradient(changes):
    params, groups = make_params(), make_groups(num_groups=2)
    loss_cfg = dataclasses.replace(LOSS, **changes)
    results = []
    for lay_out in (packing.pack, padding.pad):
        packed = pack_evenly(groups, 8, lay_out)
        assert packed.tokens.shape == (8, 32)
        total, logprobs = gradient_of(params, [make_batch(packed)], loss_cfg=loss_cfg)
        results.append((total, packing.scatter([packed], logprobs)))
    assert_close(*results)
    assert float(results[0][0].loss) != 0


def test_a_flash_kernel_with_a_prompt_for_each_answer_equals_the_tree():
    params, groups = make_params(), make_groups(num_groups=2)
    in_pairs = functools.partial(packing.pack, most_sequences=3)
    flash = kernels.Kernels(training=kernels.Flash("splash", interpret=True))
    results, widths = [], []
    for lay_out, chosen in ((packing.pack, kernels.PORTABLE), (in_pairs, flash)):
        cfg = dataclasses.replace(FORWARD, kernels=chosen)
        packed = pack_evenly(groups, 4, lay_out)
        widths.append(int(np.sum(packed.segment >= 0)))
        total, logprobs = gradient_of(params, [make_batch(packed)], cfg)
        results.append((total, packing.scatter([packed], logprobs)))
    assert_close(*results)
    assert widths[1] - widths[0] == 10  # two more prompts of five tokens


def test_micro_batches_add_up_to_a_single_shot():
    params = make_params()
    packed = pack_evenly(make_groups(num_groups=NUM_GROUPS))
    assert packed.tokens.shape == (8, 32)
    whole, _ = gradient_of(params, [make_batch(packed)])
    parts = [make_batch(part) for part in packing.split(packed, ROWS)]
    summed, _ = gradient_of(params, parts)
    assert_close(summed, whole)


@pytest.mark.parametrize(
    "settings",
    [dict(remat="full", head_chunk=7), dict(remat="dots")],
)
def test_memory_settings_change_no_number(settings):
    params = make_params()
    batch = make_batch(make_parts()[0])
    cfg = policy_gradient.ForwardConfig(MODEL, **settings)
    assert_close(gradient_of(params, [batch], cfg), gradient_of(params, [batch]))


def test_a_response_feels_its_prompt_and_itself_only():
    """Gradient of one response's log-probabilities by the embeddings of every column.

    The embedding table is widened so that every column has an entry of its own.
    """
    groups = make_groups(3)
    packed = packing.pack(groups, row_tokens=64)
    rows = policy_gradient.rows_of(packed)
    num_rows, num_columns = rows.tokens.shape
    table = np.random.default_rng(0).normal(size=(num_rows * num_columns, 32))
    own = np.arange(num_rows * num_columns).reshape(num_rows, num_columns)
    params = make_params().replace(embed=jnp.float32(table))
    rows = rows.replace(tokens=own)

    @jax.jit
    def by_embedding(chosen):
        def total(embed):
            logprobs, _, _ = policy_gradient.token_logprobs(
                params.replace(embed=embed), rows, cfg=FORWARD
            )
            return jnp.where(chosen, logprobs, 0.0).sum()

        return jax.grad(total)(params.embed)

    seen = packing.visible(packed)
    for sequence in np.unique(packed.sequence[packed.valid]):
        chosen = packed.valid & (packed.sequence == sequence)
        felt = np.abs(by_embedding(chosen)).sum(-1).reshape(num_rows, num_columns) > 0
        expected = np.zeros_like(felt)
        for row, m in zip(*np.nonzero(chosen), strict=True):
            expected[row] |= seen[row, packed.source[row, m]]
        np.testing.assert_array_equal(felt, expected)


@pytest.mark.parametrize("law", [{"top_p": 0.5}, {"top_k": 9, "min_p": 0.2}])
def test_truncated_laws_give_finite_gradients(law):
    """Most tokens lie outside such a law: they count as out of support."""
    batch = make_batch(make_parts()[0])
    cfg = policy_gradient.ForwardConfig(
        MODEL, law=sampling.SamplingConfig(**law), remat="none"
    )
    total, logprobs = gradient_of(make_params(), [batch], cfg)
    outside = np.isneginf(logprobs[0][np.asarray(batch.columns.valid)])
    assert outside.any() and not outside.all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(total))
    assert np.abs(total.params.final_norm).max() > 0


def test_eight_devices_agree_with_one(make_learner):
    parts = make_parts()
    results = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        # A large eps keeps the step smooth: the sign of a tiny gradient is noise.
        trainer = make_learner(shape, optimizer={"eps": 1e-3})
        state = trainer.init_state(make_params())
        for _ in range(2):
            state, metrics, logprobs = trainer.update(
                state, [make_batch(part) for part in parts], LOSS
            )
        results.append((state, metrics, packing.scatter(parts, logprobs)))
    assert_close(*results)
    sharded = results[1][0]
    qkv = sharded.params.layers.qkv
    assert qkv.addressable_shards[0].data.shape == (2, 1, 4, 8, 16)
    moments = [x for x in jax.tree.leaves(sharded.opt_state) if x.shape == qkv.shape]
    assert len(moments) == 2
    assert {moment.sharding for moment in moments} == {qkv.sharding}
    assert trainer.rows_per_micro_batch == 4


def test_state_is_as_described_and_rows_must_divide(make_learner):
    trainer = make_learner((2, 2, 2))
    state = trainer.init_state(make_params())
    for leaf, described in zip(
        jax.tree.leaves(state), jax.tree.leaves(trainer.abstract_state()), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (described.shape, described.dtype)
        assert leaf.sharding.is_equivalent_to(described.sharding, leaf.ndim)
    packed = pack_evenly(make_groups(), rows_multiple=3)
    with pytest.raises(ValueError, match="does not divide"):
        trainer.logprobs(state.params, packing.split(packed, 3))


def poison(batch, name):
    """Make one token's number infinite: a broken batch."""
    values = getattr(batch.columns, name).copy()
    values[np.nonzero(batch.columns.valid)[0][0], 0] = np.inf
    return dataclasses.replace(batch, columns=batch.columns.replace(**{name: values}))


def test_what_is_not_finite_changes_no_bit(make_learner):
    trainer = make_learner(optimizer={"weight_decay": 0.1})
    batches = [make_batch(part) for part in make_parts()]
    state = trainer.init_state(make_params())
    state, metrics, _ = trainer.update(state, batches, LOSS)
    assert metrics["policy/update_skipped"] == 0
    before = jax.tree.map(np.array, state)
    broken = [batches[0], poison(batches[1], "advantages")]
    state, metrics, _ = trainer.update(state, broken, LOSS)
    assert metrics["policy/update_skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, state, before)
    assert int(state.num_updates) == 1
    state, metrics, _ = trainer.update(state, batches, LOSS)
    assert metrics["policy/update_skipped"] == 0
    assert int(state.num_updates) == 2
    assert np.abs(np.array(state.params.embed) - before.params.embed).max() > 0


def test_same_shapes_compile_once():
    pool = programs.ProgramPool()
    mesh = sharding.make_mesh(1, 1, 1)
    trainer = learner_of(make_run(), mesh, pool)
    state = trainer.init_state(make_params())
    counts = []
    for seed in range(3):
        parts = make_parts(make_groups(seed, num_groups=NUM_GROUPS - seed))
        old = packing.scatter(parts, trainer.logprobs(state.params, parts))
        batches = [make_batch(part, old_logprobs=old) for part in parts]
        state, _, _ = trainer.update(state, batches, LOSS)
        counts.append(pool.stats.num_compiled)
    # init, logprobs, zeros, accumulate, apply
    assert counts == [5, 5, 5]
    pool.close()


def test_what_was_prepared_is_not_compiled_again():
    pool = programs.ProgramPool()
    made = learner_of(make_run(), sharding.make_mesh(1, 1, 1), pool)
    (part,) = packing.split(pack_evenly(make_groups()), ROWS)
    batch = make_batch(part)
    made.prepare(batch, LOSS, with_logprobs=True)
    pool.wait()
    state = made.init_state(make_params())
    compiled = pool.stats.num_compiled
    made.logprobs(state.params, [part])
    made.update(state, [batch], LOSS)
    assert pool.stats.num_compiled == compiled
    pool.close()


def test_logits_held_at_once_are_counted_on_each_device(make_learner):
    assert make_learner((2, 2, 2), head_chunk=3).forward_cfg.head_chunk == 12


def test_first_logprobs_are_the_inference_passes(make_learner):
    trainer = make_learner()
    state = trainer.init_state(make_params())
    parts = make_parts()
    inference = packing.scatter(parts, trainer.logprobs(state.params, parts))
    batches = [make_batch(part, old_logprobs=inference) for part in parts]
    _, metrics, logprobs = trainer.update(state, batches, LOSS)
    assert_close(packing.scatter(parts, logprobs), inference)
    assert metrics["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["policy/clip_frac"] == 0


def test_bandit_learns_the_rewarded_token(make_learner):
    """One prompt, one-token answers drawn from the policy, reward for token 7."""
    trainer = make_learner(optimizer={"learning_rate": 1e-2, "clip_norm": 0.0})
    state = trainer.init_state(make_params())
    rng = np.random.default_rng(0)
    prompt = np.array([3, 1, 4], np.int32)
    every = packing.Group(prompt, tuple(np.array([[v] for v in range(64)], np.int32)))
    every = packing.split(packing.pack([every], row_tokens=128), 1)
    chances = []
    for _ in range(12):
        logprobs = packing.scatter(every, trainer.logprobs(state.params, every))
        probs = np.exp(np.concatenate(logprobs).astype(np.float64))
        chances.append(probs[7])
        drawn = rng.choice(64, size=64, p=probs / probs.sum()).astype(np.int32)
        reward = (drawn == 7).astype(np.float32)
        group = packing.Group(prompt, tuple(drawn[:, None]))
        packed = packing.pack([group], row_tokens=128)
        batch = policy_gradient.micro_batch(
            packed,
            # A fixed baseline: a batch without the token teaches something too.
            advantages=reward - 0.1,
            weights=losses.token_weights(packed.lengths, "token_mean", max_length=1),
        )
        state, _, _ = trainer.update(state, [batch], losses.LossConfig())
    assert chances[0] < 0.2
    assert chances[-1] > 0.9


def test_bfloat16_computes_with_float32_masters(make_learner):
    trainer = make_learner(precision="bfloat16")
    state = trainer.init_state(make_params())
    parts = make_parts()
    exact = plain_logprobs(
        make_params(), make_groups(num_groups=NUM_GROUPS), sampling.SamplingConfig()
    )
    state, metrics, logprobs = trainer.update(state, [*map(make_batch, parts)], LOSS)
    got = packing.scatter(parts, logprobs)
    difference = np.abs(np.concatenate(got) - np.concatenate(exact)).max()
    assert 1e-4 < difference < 0.3
    assert metrics["policy/update_skipped"] == 0
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rate_rises_and_falls(schedule, expected):
    cfg = sections.Optimizer(learning_rate=2.0, schedule=schedule, warmup_steps=1)
    rate = learner.learning_rate(cfg, num_steps=3, updates_per_step=2)
    got = [float(rate(jnp.int32(n))) for n in range(6)]
    np.testing.assert_allclose(got, 2.0 * np.array(expected), rtol=1e-5)
    if schedule != "constant":
        assert float(rate(jnp.int32(6))) == pytest.approx(0.0, abs=1e-6)


def test_recorded_rate_is_the_optimizers(make_learner):
    """A step of AdamW on a constant gradient moves by the rate."""
    settings = {"schedule": "linear", "clip_norm": 0.0, "eps": 1e-30}
    trainer = make_learner(optimizer=settings, num_steps=4)
    state = trainer.init_state(make_params())
    batch = make_batch(make_parts()[0])
    for wanted in (1e-2, 0.75e-2):
        before = np.array(state.params.final_norm)
        state, metrics, _ = trainer.update(state, [batch], LOSS)
        assert metrics["policy/learning_rate"] == pytest.approx(wanted)
        if wanted == 1e-2:
            moved = np.abs(np.array(state.params.final_norm) - before)
            np.testing.assert_allclose(moved, wanted, rtol=1e-3)


def test_wrong_input_is_refused(make_learner):
    trainer = make_learner()
    params = make_params()
    with pytest.raises(ValueError, match="tuple of layers"):
        trainer.init_state(model_params.unstack(params))
    with pytest.raises(ValueError, match="but the model's are"):
        trainer.init_state(params.replace(embed=params.embed[:32]))
