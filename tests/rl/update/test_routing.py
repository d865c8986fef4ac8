"""Losses of routers against `transformers`; flips counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax import assembly, types
from tlt_jax import config as config_lib
from tlt_jax.models import config as model_config
from tlt_jax.models import experts
from tlt_jax.models import params as model_params
from tlt_jax.rl.tasks import prompts
from tlt_jax.rl.update import algorithms, experience, learner, routing
from tlt_jax.runtime import programs, sharding
from tlt_jax.settings import sections

X, C, L = 6, 2, 3
MODEL = model_config.ModelConfig(
    *("qwen3_moe", 32, 2, 16, 24, 4, 2, 4, False),
    qk_norm=True,
    experts=model_config.Experts(4, 2, 8),
)


def routing_of(logits_LXBT, is_token_BT):
    """What a forward says of such logits."""
    probs = jax.nn.softmax(logits_LXBT, axis=1)
    routes = jax.vmap(lambda p: experts._choose(p, C))(probs)
    each = [
        experts._routing(*args, is_token_BT)
        for args in zip(routes, logits_LXBT, probs, strict=True)
    ]
    return jax.tree.map(lambda *x: jnp.stack(x), *each)


def test_losses_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_moe import modeling_qwen3_moe as theirs

    rng = np.random.default_rng(0)
    logits_LXBT = rng.standard_normal((L, X, 2, 5)).astype(np.float32) * 2
    mask_BT = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found = routing_of(jnp.asarray(logits_LXBT), jnp.asarray(mask_BT == 1))
    # A tensor for each layer, of tokens in the order of the mask.
    gates = tuple(torch.tensor(x.reshape(X, -1).T.copy()) for x in logits_LXBT)
    expected = theirs.load_balancing_loss_func(gates, X, C, torch.tensor(mask_BT))
    np.testing.assert_allclose(routing.load_balancing(found), expected, rtol=1e-5)
    kept = torch.stack(gates)[:, torch.tensor(mask_BT.ravel() == 1)]
    squares = torch.logsumexp(kept, dim=-1) ** 2
    np.testing.assert_allclose(routing.router_z(found), squares.mean(), rtol=1e-5)


def test_even_routing_costs_the_experts_of_a_token():
    even = experts.Routing(
        jnp.zeros((1, C, 1, 3), jnp.int32),
        *(jnp.ones((1, X)), jnp.full((1, X), 0.5), jnp.zeros((1,))),
    )
    assert float(routing.load_balancing(even)) == C


def test_flips_are_counted_order_aside_where_routes_are_known():
    # [L = 1, C = 2, B = 1, T = 4] against [B, T, L, C].
    own = jnp.array([[[[0, 3, 5, 1]], [[1, 2, 4, 0]]]])
    rollout = np.array([[[[1, 0]], [[3, 1]], [[5, 4]], [[X, X]]]], np.uint8)
    found = experts.Routing(own, *(jnp.zeros((1, X)),) * 2, jnp.zeros((1,)))
    flipped, known = routing.flips(found, jnp.asarray(rollout))
    assert (float(flipped), float(known)) == (1.0, 3.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("routes", "replay"), ("load_balancing_coef", 0.1), ("router_z_coef", 0.2)],
)
def test_what_only_mixtures_have_is_refused_for_others(name, value):
    cfg = sections.Learner(**{name: value})
    with pytest.raises(ValueError, match=f"learner.{name}={value} is of mixtures"):
        routing.of_settings(cfg, MODEL.dense())
    assert routing.of_settings(cfg, MODEL) != routing.Config()
    assert routing.of_settings(sections.Learner(), MODEL.dense()) == routing.Config()


def completion(number, length, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 32, length).astype(np.int32)
    routes = [[rng.permutation(4)[:2] for _ in range(2)] for _ in range(2 + length - 1)]
    logprobs = np.zeros(length, np.float32)
    return types.Completion(
        number, tokens, logprobs, "eos", routes=np.uint8(routes).reshape(-1, 2, 2)
    )


def batch_of():
    """Two groups of two; their prompts have two tokens."""
    made = [completion(i, n, i) for i, n in enumerate((3, 5, 4, 1))]
    # Of one prompt the routes are the same.
    for first, second in ((0, 1), (2, 3)):
        made[second].routes[:2] = made[first].routes[:2]
    asked = [prompts.Prompt(i, None, np.int32([5 + i, 9])) for i in range(2)]
    return experience.Experience(asked, made, np.array([[0.0, 1.0], [1.0, 0.0]]))


def updated(rows, **settings):
    """Take a step on `batch_of`, `rows` at once; return its record and weights."""
    base = config_lib.default()
    base.model.spec, base.task.name = "unused", "count"
    run = config_lib.load(base)
    cfg = dataclasses.replace(run.learner, rows_per_micro_batch=rows, **settings)
    made = learner.Learner(
        *(MODEL, assembly.law_of(run.sampling), cfg),
        dataclasses.replace(run.optimizer, learning_rate=0.1),
        num_steps=1,
        precision="float32",
        remat="none",
        mesh=sharding.make_mesh(1, 1, 1),
        pool=programs.ProgramPool(),
    )
    batch = batch_of()
    algorithm = algorithms.build(algorithms.preset("grpo") | {"kl_coef": 0.0})
    _, micro = experience.micro_batches(
        batch,
        experience.Layout(8, rows),
        algorithm,
        np.float32([-1, 1, 1, -1]),
        max_new_tokens=8,
        old_logprobs=None,
        ref_logprobs=None,
        num_experts=4,
    )
    state = made.init_state(model_params.init(MODEL, jax.random.key(0)))
    state, record, _ = made.update(state, micro, algorithm.loss)
    return record, jax.device_get(state.params), len(micro)


def test_an_update_records_what_routers_did_and_may_replay_routes():
    record, plain, num_micro = updated(1)
    assert num_micro > 1
    # Routes made at random; 2 of 4 experts meet by chance in one of six.
    assert 0.5 < record["moe/route_flips"] < 1
    assert record["moe/load_balancing_loss"] >= 1.9 and record["moe/router_z_loss"] > 0
    replayed, other, _ = updated(1, routes="replay")
    assert replayed["moe/route_flips"] == 0.0
    assert np.abs(other.layers.down - plain.layers.down).max() > 1e-3
    costly, balanced, _ = updated(1, load_balancing_coef=1.0, router_z_coef=0.1)
    for name in ("moe/load_balancing_loss", "moe/router_z_loss", "policy/loss"):
        assert costly[name] == record[name]
    assert np.abs(balanced.layers.router - plain.layers.router).max() > 1e-3
