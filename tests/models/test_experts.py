"""A mixture of experts against a slow twin; tokens and devices change nothing."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cpu_kernels import hosts
from tlt_jax.models import config as model_config
from tlt_jax.models import experts, kernels
from tlt_jax.models import params as model_params
from tlt_jax.runtime import sharding

D, F, X, C = 16, 24, 8, 3
MIXTURE = model_config.Experts(X, C, F)
RAGGED = kernels.Kernels(ragged=True)


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def layer_of(seed=0):
    """A layer of which only the mixture matters."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5)

    return model_params.LayerParams(
        *([None] * 4), draw(X, 2, F, D), draw(X, D, F), router=3 * draw(X, D)
    )


def columns(batch=2, length=7, seed=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((D, batch, length), np.float32))


def twin(layer, x, normalised=True):
    """Every token by itself, in float64."""
    gate_up, down, router = (
        np.asarray(w, np.float64) for w in (layer.gate_up, layer.down, layer.router)
    )
    y = np.zeros(x.shape)
    for b, t in np.ndindex(x.shape[1:]):
        column = np.asarray(x[:, b, t], np.float64)
        probs = np.exp(router @ column)
        probs /= probs.sum()
        chosen = np.argsort(-probs)[:C]
        shares = probs[chosen] / (probs[chosen].sum() if normalised else 1)
        for share, e in zip(shares, chosen, strict=True):
            gate, up = gate_up[e] @ column
            y[:, b, t] += share * (down[e] @ (gate / (1 + np.exp(-gate)) * up))
    return y


def run(layer, x, kernels_=kernels.PORTABLE, mixture=MIXTURE, **more):
    compute = functools.partial(experts.mlp, experts=mixture, kernels=kernels_)
    return jax.jit(compute)(layer, x, **more)


@pytest.mark.parametrize("name", ["blocks", "ragged", "native"])
@pytest.mark.parametrize("normalised", [True, False])
def test_each_form_computes_what_the_slow_twin_does(name, normalised):
    chosen = {"blocks": kernels.PORTABLE, "ragged": RAGGED, "native": kernels.NATIVE}
    mixture = model_config.Experts(X, C, F, normalised)
    layer, x = layer_of(), columns()
    y, _ = run(layer, x, chosen[name], mixture)
    np.testing.assert_allclose(y, twin(layer, x, normalised), atol=1e-5)


def test_gradients_of_both_portable_forms_are_those_of_all_experts_at_once():
    layer, x = layer_of(), columns()
    weights = (layer.gate_up, layer.down, layer.router, x)

    def rebuilt(weights):
        gate_up, down, router, x = weights
        return layer.replace(gate_up=gate_up, down=down, router=router), x

    def every(weights):
        """All experts of every token, those that are not chosen times zero."""
        layer, x = rebuilt(weights)
        probs = jax.nn.softmax(jnp.einsum("xd,dbt->xbt", layer.router, x), axis=0)
        kept = probs >= jnp.sort(probs, axis=0)[X - C]
        shares = jnp.where(kept, probs, 0)
        shares = shares / shares.sum(axis=0)
        gate, up = jnp.einsum("xgfd,dbt->gxfbt", layer.gate_up, x)
        each = jnp.einsum("xdf,xfbt->xdbt", layer.down, jax.nn.silu(gate) * up)
        return jnp.sum(jnp.sin(jnp.sum(each * shares[:, None], axis=0)))

    expected = jax.jit(jax.grad(every))(weights)
    for form in (kernels.PORTABLE, RAGGED):

        def loss(weights, form=form):
            return jnp.sum(jnp.sin(run(*rebuilt(weights), form)[0]))

        for got, want in zip(jax.jit(jax.grad(loss))(weights), expected, strict=True):
            np.testing.assert_allclose(got, want, atol=2e-5)


@hosts.needs_native
def test_a_token_has_the_same_bits_in_every_batch():
    layer, x = layer_of(), columns(4, 9)
    whole, routing = run(layer, x, kernels.NATIVE)
    flat, routes = np.asarray(whole).reshape(D, -1), routing.routes.reshape(C, -1)
    for first, last in ((0, 1), (5, 6), (3, 8), (10, 36), (35, 36)):
        part = x.reshape(D, 1, -1)[:, :, first:last]
        y, own = run(layer, part, kernels.NATIVE)
        np.testing.assert_array_equal(y[:, 0], flat[:, first:last])
        np.testing.assert_array_equal(own.routes[:, 0], routes[:, first:last])


def test_no_token_is_dropped_where_all_want_the_same_experts():
    layer, x = layer_of(), columns(8, 40)
    x = x.at[0].set(5.0)
    layer = layer.replace(
        router=jnp.zeros((X, D)).at[:C, 0].set(jnp.arange(1.0, C + 1))
    )
    y, routing = run(layer, x)
    assert routing.num_chosen.tolist() == [320.0] * C + [0.0] * (X - C)
    np.testing.assert_allclose(y, twin(layer, x), atol=1e-4)


def test_what_routers_did_is_counted_without_padding():
    layer, x = layer_of(), columns(1, 5)
    is_token = jnp.array([[True, True, False, True, False]])
    _, routing = run(layer, x, is_token=is_token)
    logits = np.asarray(jnp.einsum("xd,dt->xt", layer.router, x[:, 0]))[:, [0, 1, 3]]
    probs = np.exp(logits) / np.exp(logits).sum(axis=0)
    np.testing.assert_allclose(routing.probs, probs.sum(axis=1), rtol=1e-5)
    squares = np.log(np.exp(logits).sum(axis=0)) ** 2
    np.testing.assert_allclose(routing.squares, squares.sum(), rtol=1e-5)
    chosen = np.argsort(-probs, axis=0)[:C]
    np.testing.assert_array_equal(routing.routes[:, 0, [0, 1, 3]], chosen)
    counts = np.bincount(chosen.ravel(), minlength=X)
    np.testing.assert_array_equal(routing.num_chosen, counts)


def test_given_routes_are_taken_where_they_are_known():
    layer, x = layer_of(), columns(1, 4)
    plain, own = run(layer, x)
    given = np.asarray(own.routes).copy()
    given[:, 0, 1] = X
    given[:, 0, 2] = [(int(given[:, 0, 2].max()) + i) % X for i in range(C)]
    y, routing = run(layer, x, given=jnp.asarray(given))
    expected = given.copy()
    expected[:, 0, 1] = own.routes[:, 0, 1]
    np.testing.assert_array_equal(routing.routes, expected)
    # Order aside the others are as before.
    np.testing.assert_array_equal(y[:, 0, :2], plain[:, 0, :2])
    assert np.abs(np.asarray(y - plain)[:, 0, 2]).max() > 1e-3


@pytest.mark.parametrize(
    ("platform", "in_engines", "in_updates"),
    [("cpu", False, False), ("tpu", True, True), ("gpu", True, False)],
)
def test_ragged_products_are_where_compilers_do_not_expand_many_rows(
    platform, in_engines, in_updates
):
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(devices=np.array([device]), size=1)
    split = kernels.Split(mesh, sharding.ShardingRules())
    assert kernels.for_experts(kernels.PORTABLE, split).ragged == in_engines
    trains = kernels.for_experts(kernels.PORTABLE, split, trains=True)
    assert trains.ragged == in_updates


def test_eight_devices_equal_one():
    layer, x = layer_of(), columns(4, 6)
    mesh = sharding.make_mesh(1, 2, 2, expert=2)
    split = kernels.for_experts(
        kernels.PORTABLE, kernels.Split(mesh, sharding.ShardingRules())
    )
    assert split.split is not None and not split.ragged

    def grads(form):
        def loss(layer, x):
            return jnp.sum(jnp.sin(run(layer, x, form)[0]))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    names = dict(gate_up=("expert", None, "mlp", "embed"), router=(None, "embed"))
    names |= dict(down=("expert", "embed", "mlp"))
    rules = sharding.ShardingRules()
    placed = layer.replace(
        **{
            name: jax.device_put(
                getattr(layer, name), sharding.named(mesh, rules, axes)
            )
            for name, axes in names.items()
        }
    )
    where = sharding.named(mesh, rules, (None, "batch"))
    found = grads(split)(placed, jax.device_put(x, where))
    expected = grads(kernels.PORTABLE)(layer, x)
    for got, want in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
