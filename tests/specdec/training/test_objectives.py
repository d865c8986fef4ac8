"""Unrolled training against drafting itself, and what may influence what."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.specdec import tiny_drafter
from tlt_jax.models import attention, kv_cache
from tlt_jax.models.drafters import block, drafter
from tlt_jax.runtime import train_state
from tlt_jax.specdec.texts import layout
from tlt_jax.specdec.training import losses as drafter_losses
from tlt_jax.specdec.training import objectives
from tlt_jax.specdec.training import unroll as unroll_lib

SIZES = {"row_tokens": 16, "row_bases": 10}
NUM_STEPS = 4
# Two short texts fill a row; blocks and chunks are smaller than what they cut.
RECORDS = ((1, 9, 4), (2, 7, 3))
CFG = tiny_drafter.drafter_config()
FORWARD = unroll_lib.ForwardConfig(CFG, head_chunk=8, attention_block=4)
# Compiled sooner.
PLAIN = unroll_lib.ForwardConfig(CFG, head_chunk=32)


@pytest.fixture(scope="module")
def buffer(tmp_path_factory):
    records = [tiny_drafter.record(*numbers) for numbers in RECORDS]
    return tiny_drafter.buffer_of(tmp_path_factory.mktemp("buffer"), records)


def batch_of(buffer, rows):
    spans = [
        [
            layout.Span(
                i,
                int(buffer.lengths[i]),
                int(buffer.response_starts[i]) - 2,
                int(buffer.lengths[i] - buffer.response_starts[i]),
            )
            for i in row
        ]
        for row in rows
    ]
    return layout.lay_out(buffer, spans, **SIZES)


@functools.partial(jax.jit, static_argnames=("num_steps", "cfg"))
def unroll(params, batch, target, num_steps=NUM_STEPS, cfg=FORWARD):
    return unroll_lib.unroll(params, batch, target, num_steps, cfg=cfg)


FORWARD_ONE = jax.jit(drafter.forward, static_argnums=1)


def drafted(params, record, base, num_steps):
    """Features of a chain drafted at `base` by cache, levels and fresh keys."""
    page_size = 4
    tokens = jnp.asarray(record.tokens)[None]
    features = drafter.fuse(params, CFG, jnp.asarray(record.features).T[:, None])
    embedded = drafter.embed(tiny_drafter.target_params(), tokens)
    positions = jnp.arange(tokens.shape[1])[None]
    cache = kv_cache.create(CFG.layer, 5, page_size, jnp.float32)
    table = jnp.array([[2, 4, 1, 3]])
    here = slice(0, base)
    if base:
        filled = FORWARD_ONE(
            params,
            CFG,
            embedded[..., 1 : base + 1],
            features[..., here],
            positions[:, here],
        )
        cache = kv_cache.append(
            cache,
            (filled.keys,),
            (filled.values,),
            table,
            jnp.array([0]),
            jnp.array([base]),
        )
    view = kv_cache.CacheView(cache, table, jnp.array([base]))
    feature, past, outputs = features[..., base : base + 1], None, []
    for k in range(num_steps):
        out = FORWARD_ONE(
            params,
            CFG,
            embedded[..., base + k + 1 : base + k + 2],
            feature,
            jnp.array([[base + k]]),
            visibility=attention.Visibility(ancestors=jnp.ones((1, 1, 1), bool)),
            view=view,
            past=past,
        )
        feature = out.hidden
        outputs.append(out.hidden[:, 0, 0])
        keys, values = out.keys, out.values
        if past is not None:
            keys = jnp.concatenate([past.keys, keys], -1)
            values = jnp.concatenate([past.values, values], -1)
        past = drafter.Past(keys, values, jnp.ones((1, 1, k + 1), bool))
    return outputs


def test_unrolled_step_is_the_drafted_level(buffer):
    params = tiny_drafter.params_of(CFG)
    batch = batch_of(buffer, [[0, 1]])
    steps = unroll(params, batch, tiny_drafter.target_of(CFG))
    exists = unroll_lib.step_exists(batch, NUM_STEPS)
    compared = 0
    for m, base in ((0, 2), (2, 4), (5, 10), (7, 12)):
        text, position = (0, base) if base < 9 else (1, base - 9)
        assert batch.bases[0, m] == base
        depth = int(exists[:, 0, m].sum())
        expected = drafted(params, buffer.read(text), position, depth)
        for k in range(depth):
            np.testing.assert_allclose(
                steps[k][:, 0, m], expected[k], atol=1e-5, rtol=0
            )
            compared += 1
    assert compared == 4 + 3 + 4 + 2


BLOCK = tiny_drafter.drafter_config(architecture="block", block_size=3)
BLOCK_FORWARD = dataclasses.replace(FORWARD, drafter=BLOCK)


def drafted_block(params, record, base):
    """Features of a block behind `base`, as drafting makes them: all in one pass."""
    tokens = jnp.asarray(record.tokens)[None]
    size, more = BLOCK.block_size, BLOCK.block_size - 1
    embedded = drafter.embed(tiny_drafter.target_params(), tokens)
    features = jnp.asarray(record.features).T[:, None]
    # The text up to the base, and the masks of the base behind it.
    columns = np.array([*range(base + 1), *[base] * more])
    seen = np.tri(base + size, dtype=bool)
    seen[base:, base:] = block.seen(size)
    numbers = np.array([*[0] * base, *range(size)])
    out = FORWARD_ONE(
        params,
        BLOCK,
        embedded[..., columns + 1],
        drafter.fuse(params, BLOCK, features)[..., columns],
        jnp.arange(base + size)[None],
        visibility=attention.Visibility(ancestors=jnp.asarray(seen)[None]),
        added=block.masks_of(params.block, numbers[None], jnp.float32),
    )
    # The token before each place: the pending one, then those behind it.
    before = embedded[..., base + 1 :][..., : BLOCK.block_size]
    code = block.code_of(params.block, before, BLOCK.layer.rms_norm_eps)
    return block.follow(
        params.block, out.hidden[..., base:][..., : code.shape[2]], code
    )


def test_blocks_of_training_are_those_of_drafting(buffer):
    params = tiny_drafter.followed(tiny_drafter.params_of(BLOCK))
    batch, target = batch_of(buffer, [[0, 1]]), tiny_drafter.target_of(BLOCK)
    remat = dataclasses.replace(BLOCK_FORWARD, remat=True)
    for num_steps, cfg in ((3, BLOCK_FORWARD), (2, remat)):
        steps = unroll(params, batch, target, num_steps=num_steps, cfg=cfg)
        exists = unroll_lib.step_exists(batch, num_steps)
        for m, base in ((0, 2), (2, 4), (5, 10), (7, 12)):
            text, position = (0, base) if base < 9 else (1, base - 9)
            expected = drafted_block(params, buffer.read(text), position)
            for k in range(int(exists[:, 0, m].sum())):
                np.testing.assert_allclose(
                    steps[k][:, 0, m], expected[:, 0, k], atol=1e-5, rtol=0
                )
    with pytest.raises(ValueError, match="num_steps=4 of a drafter.* blocks of 3"):
        unroll(params, batch, target, num_steps=4, cfg=BLOCK_FORWARD)


def test_a_block_learns_masks_and_what_tokens_say_of_the_next(buffer):
    params, target = tiny_drafter.params_of(BLOCK), tiny_drafter.target_of(BLOCK)
    batch = batch_of(buffer, [[0, 1], []])
    objective = objectives.choose("eagle", {"num_steps": 9, "decay": 0.7}, 3)
    assert objective == objectives.Objective(3, decay=0.7, token_loss="lk_hybrid")
    optimizer = optax.adamw(3e-3)
    state, losses = train_state.begin(params, optimizer), []

    @jax.jit
    def step(state):
        (loss, _), slopes = jax.value_and_grad(tiny_drafter.loss, has_aux=True)(
            state.params, batch, target, cfg=BLOCK_FORWARD, objective=objective
        )
        return train_state.step(state, slopes, loss, optimizer)[0], loss

    for _ in range(60):
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]
    for name, before in vars(params.block).items():
        moved = np.abs(getattr(state.params.block, name) - before)
        assert np.sqrt((moved**2).mean()) > 0.02, name


def test_steps_that_exist_stay_in_their_text(buffer):
    batch = batch_of(buffer, [[0, 1]])
    exists = np.asarray(unroll_lib.step_exists(batch, NUM_STEPS))
    ends = {0: 9, 1: 16}
    for m in range(9):
        text = int(batch.segment[0, batch.bases[0, m]])
        for k in range(NUM_STEPS):
            inside = int(batch.bases[0, m]) + k + 2 < ends[text]
            assert exists[k, 0, m] == inside
    assert not exists[:, 0, 9].any()


VALUE_AND_SLOPES = jax.jit(
    jax.value_and_grad(tiny_drafter.loss, has_aux=True),
    static_argnames=("cfg", "objective"),
)


def test_imported_head_and_norm_enter_the_drafters_law_alone(buffer):
    """The target's law has the target's head; the drafter's own head stays as it is."""
    cfg = tiny_drafter.drafter_config(architecture="eagle3")
    cfg = dataclasses.replace(cfg, own_head=True)
    params, target = tiny_drafter.params_of(cfg), tiny_drafter.target_of(CFG)
    params = params.replace(norm=params.norm * jnp.linspace(0.5, 1.5, 16))
    batch = batch_of(buffer, [[0, 1]])
    forward = dataclasses.replace(PLAIN, drafter=cfg)
    objective = objectives.Objective(1)
    (_, metrics), slopes = VALUE_AND_SLOPES(
        params, batch, target, cfg=forward, objective=objective
    )
    (step,) = unroll(params, batch, target, num_steps=1, cfg=forward)
    x = np.asarray(step[:, 0], np.float64)
    x = x / np.sqrt((x**2).mean(0) + cfg.layer.rms_norm_eps)
    x = x * np.asarray(params.norm)[:, None]
    logits = np.asarray(params.head, np.float64) @ x
    draft = np.exp(logits) / np.exp(logits).sum(0)
    ahead = np.asarray(batch.hidden)[0, np.asarray(batch.bases)[0] + 1]
    law = np.exp(np.asarray(target.head) @ ahead.T)
    law = law / law.sum(0)
    valid = np.asarray(batch.valid)[0]
    loss = -(law * np.log(draft)).sum(0)[valid].mean()
    np.testing.assert_allclose(metrics["token_loss"], [loss], rtol=1e-4)
    overlap = np.minimum(law, draft).sum(0)[valid].mean()
    np.testing.assert_allclose(metrics["overlap"], [overlap], rtol=1e-4)
    assert not np.any(slopes.head) and np.abs(slopes.norm).max() > 1e-4


@pytest.mark.parametrize("name", ["hass", "eagle3"])
def test_texts_in_one_row_have_the_losses_of_two_rows(buffer, tmp_path, name):
    objective = dataclasses.replace(objectives.preset(name), num_steps=2)
    cfg, forward = CFG, FORWARD
    if name == "hass":
        cfg = tiny_drafter.drafter_config(feature_layers=(), output_norm=False)
        forward = dataclasses.replace(PLAIN, drafter=cfg)
        records = [tiny_drafter.record(*numbers, layers=()) for numbers in RECORDS]
        buffer = tiny_drafter.buffer_of(tmp_path / "plain", records)
    params, target = tiny_drafter.params_of(cfg), tiny_drafter.target_of(cfg)
    results = [
        VALUE_AND_SLOPES(
            params, batch_of(buffer, rows), target, cfg=forward, objective=objective
        )
        for rows in ([[0, 1], []], [[1], [0]])
    ]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-4), *results
    )
    (_, metrics), slopes = results[0]
    np.testing.assert_array_equal(metrics["count"], [5 + 4, 4 + 3])
    assert np.abs(slopes.join).max() > 1e-3
    assert (np.asarray(metrics["feature_loss"]) > 0).all() == (name == "hass")


def test_loss_is_the_plain_sum_over_predictions(buffer):
    """Chunks, shared target laws and the stated gradient against the direct form."""
    objective = objectives.Objective(2, decay=0.5, token_loss="lk_hybrid")
    params, target = tiny_drafter.params_of(CFG), tiny_drafter.target_of(CFG)
    batch = batch_of(buffer, [[0, 1], []])
    exists = np.asarray(unroll_lib.step_exists(batch, 2))

    @jax.jit
    @jax.value_and_grad
    def plain(params):
        steps = unroll_lib.unroll(params, batch, target, 2, cfg=FORWARD)
        total = 0.0
        for k, hidden in enumerate(steps):
            here = np.flatnonzero(exists[k, 0])
            law = batch.hidden[0, batch.bases[0, here] + k + 1] @ target.head.T
            draft = hidden[:, 0, here].T @ target.head.T
            total += 0.5**k * jnp.mean(drafter_losses.lk_hybrid(law, draft))
        return total

    expected, expected_slopes = plain(params)
    (value, _), slopes = VALUE_AND_SLOPES(
        params, batch, target, cfg=FORWARD, objective=objective
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-3),
        slopes,
        expected_slopes,
    )


def test_no_gradient_from_other_texts_later_positions_or_other_bases(buffer):
    params, target = tiny_drafter.params_of(CFG), tiny_drafter.target_of(CFG)
    batch = batch_of(buffer, [[0, 1]])

    @jax.jit
    def slope(m):
        def chosen(features):
            steps = unroll(params, batch.replace(features=features), target)
            return jnp.sum(steps[2][:, 0, m])

        return jnp.abs(jax.grad(chosen)(batch.features))[0].sum(-1)

    # Base at column 4 of the first text; base at column 11, the third of the second.
    np.testing.assert_array_equal(slope(2) > 0, np.arange(16) <= 4)
    columns = np.arange(16)
    np.testing.assert_array_equal(slope(6) > 0, (columns >= 9) & (columns <= 11))


def test_detached_steps_pass_no_gradient_and_remat_changes_none(buffer):
    params, target = tiny_drafter.params_of(CFG), tiny_drafter.target_of(CFG)
    batch = batch_of(buffer, [[0, 1]])
    remat = dataclasses.replace(PLAIN, remat=True)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    @functools.partial(jax.grad, argnums=2)
    def slope(detach, cfg, params):
        steps = unroll_lib.unroll(params, batch, target, 2, cfg=cfg, detach=detach)
        return jnp.sum(steps[1])

    whole, cut = slope(False, PLAIN, params), slope(True, PLAIN, params)
    # Keys of step 0 still have one.
    assert np.abs(cut.fuse).max() > 1e-4
    assert np.abs(whole.fuse - cut.fuse).max() > 1e-4
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4),
        slope(False, remat, params),
        whole,
    )


def test_step_learns_and_skips_what_is_not_finite(buffer):
    params, target = tiny_drafter.params_of(CFG), tiny_drafter.target_of(CFG)
    batch = batch_of(buffer, [[0, 1], []])
    optimizer = optax.adamw(3e-3)
    state = train_state.begin(params, optimizer)
    objective = objectives.Objective(2, token_loss="kl")

    @jax.jit
    def step(state, batch, target):
        compute = functools.partial(tiny_drafter.loss, cfg=PLAIN, objective=objective)
        (loss, metrics), grads = jax.value_and_grad(compute, has_aux=True)(
            state.params, batch, target
        )
        state, _, skipped = train_state.step(state, grads, loss, optimizer)
        return state, metrics | {"loss": loss, "skipped": skipped}

    losses = []
    for _ in range(40):
        state, metrics = step(state, batch, target)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.3 * losses[0]
    assert step._cache_size() == 1
    broken = batch.replace(hidden=np.full_like(batch.hidden, np.nan))
    after, metrics = step(state, broken, target)
    assert int(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_objectives():
    eagle = objectives.preset("eagle")
    assert (eagle.feature_weight, eagle.token_weight, eagle.num_steps) == (1.0, 0.1, 1)
    eagle3 = objectives.preset("eagle3")
    assert (eagle3.feature_weight, eagle3.num_steps, eagle3.decay) == (0.0, 7, 0.8)
    with pytest.raises(ValueError, match="objective='eagle4'.*eagle, hass or eagle3"):
        objectives.preset("eagle4")
