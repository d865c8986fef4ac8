"""Mixtures of experts: a router chooses a few feed-forward blocks for every token.

What a token gets depends on no other token: none is dropped, and products cost what the
chosen experts cost. On CPUs without derivatives one native product takes the experts as
they come. Elsewhere rows are sorted by expert: accelerators multiply them by
`jax.lax.ragged_dot`, which compilers for CPUs expand to all experts times all rows
(measured: 5 to 100 times the work), so that there blocks of rows are multiplied one by
one. So do compilers for GPUs, where the update's rows take blocks as well; an engine's
few rows touch most experts anyway.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from tlt_jax.cpu_kernels import grouped as cpu_grouped
from tlt_jax.models import config as model_config
from tlt_jax.models import kernels as kernels_lib
from tlt_jax.models import layers
from tlt_jax.models import params as model_params
from tlt_jax.runtime import sharding
from tlt_jax.types import Array

# Rows of a block: an expert's last one is filled up with zeros.
_LEAST_BLOCK, _MOST_BLOCK = 8, 64


@struct.dataclass
class Routing:
    """What a layer's router did, or with a leading `L` those of all layers.

    Attributes:
      routes: `[C, B, T] int32`, the experts of every token, the most probable first.
      num_chosen: `[X] float32`, tokens that passed each expert; padding is not counted,
        neither here nor below.
      probs: `[X] float32`, sum over tokens of the expert's probability.
      squares: `[] float32`, sum over tokens of the squared log of the normaliser.
    """

    routes: Array
    num_chosen: Array
    probs: Array
    squares: Array


def mlp(
    layer: model_params.LayerParams,
    x: Array,
    experts: model_config.Experts,
    kernels: kernels_lib.Kernels = kernels_lib.PORTABLE,
    *,
    is_token: Array | None = None,
    given: Array | None = None,
) -> tuple[Array, Routing]:
    """Apply the chosen experts' gated blocks, and sum their shares.

    Reference: Shazeer et al., Outrageously Large Neural Networks: The Sparsely-Gated
    Mixture-of-Experts Layer, 2017, section 2.

    Args:
      layer, kernels: one layer's weights, and see `layers.product`.
      x: `[D, B, T]`, normed; the result is as large.
      experts: how many there are and are chosen.
      is_token: `[B, T] bool`, what is no padding; None: all.
      given: `[C, B, T] int32`, routes to take in place of the router's; those of X and
        more stand for none. None: none is given.
    """
    # The softmax is in float32, as norms are, whatever the activations.
    logits_XBT = layers.product(layer.router, x, kernels).astype(jnp.float32)
    probs_XBT = jax.nn.softmax(logits_XBT, axis=0)
    routes = _choose(probs_XBT, experts.per_token)
    if given is not None:
        routes = jnp.where(given < experts.num, given, routes).astype(jnp.int32)
    shares_CBT = jnp.take_along_axis(probs_XBT, routes, axis=0)
    if experts.normalised:
        shares_CBT = shares_CBT / jnp.sum(shares_CBT, axis=0)
    shares_CBT = shares_CBT.astype(x.dtype)
    compute = _native if kernels.is_native else _portable
    y_DBT = compute(layer, x, routes, shares_CBT, kernels)
    return y_DBT, _routing(routes, logits_XBT, probs_XBT, is_token)


def _choose(probs_XBT: Array, count: int) -> Array:
    """Return the most probable experts of every token, `[C, B, T]`."""
    ranked = lax.top_k(jnp.moveaxis(lax.stop_gradient(probs_XBT), 0, -1), count)[1]
    return jnp.moveaxis(ranked, -1, 0)


def _routing(routes, logits_XBT, probs_XBT, is_token) -> Routing:
    num_experts = probs_XBT.shape[0]
    counted_BT = jnp.ones(routes.shape[1:]) if is_token is None else is_token
    counted_BT = counted_BT.astype(jnp.float32)
    is_chosen_XBT = jnp.sum(
        routes[None] == jnp.arange(num_experts)[:, None, None, None], axis=1
    )
    normaliser_BT = jax.nn.logsumexp(logits_XBT, axis=0)
    return Routing(
        routes=routes,
        num_chosen=jnp.sum(is_chosen_XBT * counted_BT, axis=(1, 2)),
        probs=jnp.sum(probs_XBT * counted_BT, axis=(1, 2)),
        squares=jnp.sum(normaliser_BT**2 * counted_BT),
    )


def _native(layer, x, routes, shares_CBT, kernels) -> Array:
    """Multiply by the native product, columns as they come: `[D, C x B x T]`."""
    del kernels
    experts_M = routes.reshape(-1)
    hidden_2FM = cpu_grouped.product(layer.gate_up, x.reshape(len(x), -1), experts_M)
    gate, up = jnp.split(hidden_2FM, 2)
    gated_FM = jax.nn.silu(gate[0]) * up[0]
    y_DM = cpu_grouped.product(layer.down, gated_FM, experts_M)
    y_DCBT = y_DM.reshape(len(x), *routes.shape)
    # One after the other, whatever surrounds it.
    total = y_DCBT[:, 0] * shares_CBT[0]
    for c in range(1, len(routes)):
        total = total + y_DCBT[:, c] * shares_CBT[c]
    return total


def _portable(layer, x, routes, shares_CBT, kernels) -> Array:
    """Sort rows by expert and multiply; has a derivative.

    Devices of a mesh hold some of the experts each, or a part of every one. All rows of
    a part of the batch come to its devices, which add what their experts give: no
    expert has a capacity, and no row is dropped.
    """
    weights = layer.gate_up.astype(x.dtype), layer.down.astype(x.dtype)
    columns = x, routes, shares_CBT
    if kernels.split is None:
        return _combine(*weights, *columns, first=0, ragged=kernels.ragged)
    mesh, rules = kernels.split.mesh, kernels.split.rules
    parts = tuple(axis for axis in rules.batch if axis not in rules.expert)
    local = dataclasses.replace(rules, batch=parts)

    def spec(array, *axes):
        where = sharding.named(mesh, local, axes, array.shape, replicate=True)
        return where.spec

    holders = tuple(axis for axis in rules.expert if axis in mesh.shape)
    adding = (*holders, *(axis for axis in rules.mlp if axis in mesh.shape))

    def own(gate_up, down, *columns):
        first = lax.axis_index(holders) * len(gate_up) if holders else 0
        y = _combine(gate_up, down, *columns, first=first, ragged=kernels.ragged)
        return lax.psum(y, adding)

    # Of the batch's devices the others add nothing: gradients know that without checks.
    by_part = [spec(array, None, "batch") for array in columns]
    compute = jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(
            spec(weights[0], "expert", None, "mlp"),
            spec(weights[1], "expert", None, "mlp"),
            *by_part,
        ),
        out_specs=by_part[0],
        check_vma=False,
    )
    return compute(*weights, *columns)


def _combine(gate_up, down, x, routes, shares_CBT, *, first, ragged) -> Array:
    """Apply experts `first` and following, those of the weights; `[D, B, T]`.

    What other experts are to do counts as zero.
    """
    rows_TD = x.reshape(len(x), -1).T
    routes_TC = routes.reshape(len(routes), -1).T
    shares_TC = shares_CBT.reshape(len(routes), -1).T
    num_experts = len(gate_up)
    plan = _plan(routes_TC - first, num_experts, ragged)
    sorted_SD = _take(rows_TD, plan.sources // routes_TC.shape[1], plan.slots)
    merged = gate_up.reshape(num_experts, -1, gate_up.shape[-1])
    hidden = _grouped(merged, sorted_SD, plan, ragged)
    gate, up = jnp.split(hidden, 2, axis=1)
    y_SD = _grouped(down, jax.nn.silu(gate) * up, plan, ragged)
    each = _take(y_SD, plan.slots.reshape(-1), plan.sources[:, None])
    each_TCD = each.reshape(*routes_TC.shape, -1)
    y_DT = jnp.einsum(
        "tcd,tc->dt", each_TCD, shares_TC, precision=layers.precision(each.dtype)
    )
    return y_DT.reshape(x.shape)


@struct.dataclass
class _Plan:
    """Where the rows of T x C choices stand when they are sorted by expert.

    S rows are divided into blocks of one expert each; some of them hold nothing.

    Attributes:
      slots: `[T, C] int32`, the row of a choice; S and more: of no expert here.
      sources: `[S] int32`, the choice (t x C + c) of a row, T x C and more: of none.
      counts: `[X] int32`, rows of each expert.
      experts: int32 per block, its expert.
      num_blocks: int32, how many hold something; those behind them do not.
    """

    slots: Array
    sources: Array
    counts: Array
    experts: Array
    num_blocks: Array


def _plan(routes_TC: Array, num_experts: int, ragged: bool) -> _Plan:
    num_choices = routes_TC.size
    block, num_blocks = 1, num_choices
    if not ragged:
        mean = -(-num_choices // num_experts)
        block = min(max(1 << (mean - 1).bit_length(), _LEAST_BLOCK), _MOST_BLOCK)
        # Every expert's last block may be nearly empty.
        num_blocks = min(-(-num_choices // block) + num_experts, num_choices)
    # Counted and not sorted: compilers for TPUs take long over sorts, and there is one
    # in every layer.
    is_own_TCX = routes_TC[..., None] == jnp.arange(num_experts)
    chosen_TX = jnp.sum(is_own_TCX, axis=1, dtype=jnp.int32)
    through_TX = jnp.cumsum(chosen_TX, axis=0)
    counts_X = through_TX[-1]
    blocks_X = -(-counts_X // block)
    stops_X = jnp.cumsum(blocks_X)
    # An expert's rows come by tokens.
    next_TX = (stops_X - blocks_X) * block + through_TX - chosen_TX
    slots_TC = jnp.sum(jnp.where(is_own_TCX, next_TX[:, None], 0), axis=2)
    # A token that is given an expert twice has two rows of it.
    again_TCC = routes_TC[:, :, None] == routes_TC[:, None]
    slots_TC += jnp.sum(jnp.tril(again_TCC, -1), axis=2, dtype=jnp.int32)
    num_slots = num_blocks * block
    slots_TC = jnp.where(jnp.any(is_own_TCX, axis=2), slots_TC, num_slots)
    sources = jnp.full((num_slots,), num_choices, jnp.int32)
    choices_M = jnp.arange(num_choices, dtype=jnp.int32)
    experts = jnp.searchsorted(stops_X, jnp.arange(num_blocks), side="right")
    return _Plan(
        slots=slots_TC.astype(jnp.int32),
        sources=sources.at[slots_TC.reshape(-1)].set(choices_M, mode="drop"),
        counts=counts_X,
        experts=jnp.minimum(experts, num_experts - 1).astype(jnp.int32),
        num_blocks=stops_X[-1],
    )


@jax.custom_vjp
def _take(x: Array, index: Array, inverse: Array) -> Array:
    """Take rows of `x`, zeros where `index` goes beyond it.

    `inverse [len(x), n]` names the rows of the result that a row went to, numbers
    beyond the result for none: so the gradient takes rows as well, and adds none up
    where they collide.
    """
    del inverse
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _take_forward(x, index, inverse):
    return _take(x, index, inverse), inverse


def _take_backward(inverse, grad):
    back = jnp.take(grad, inverse, axis=0, mode="fill", fill_value=0)
    return jnp.sum(back, axis=1), None, None


_take.defvjp(_take_forward, _take_backward)


def _grouped(weight: Array, rows: Array, plan: _Plan, ragged: bool) -> Array:
    """Multiply `[S, in]` by each row's expert of `weight [X, out, in]`."""
    if not ragged:
        return _blocks(weight, rows, plan.experts, plan.num_blocks)
    return lax.ragged_dot(
        rows,
        weight.swapaxes(1, 2),
        plan.counts,
        precision=layers.precision(rows.dtype),
    )


@jax.custom_vjp
def _blocks(weight: Array, rows: Array, experts: Array, num_blocks: Array) -> Array:
    """Multiply blocks of equally many rows by one expert each, `num_blocks` of them."""
    one = _Blocks(rows, experts)

    def body(i, y):
        return one.put(y, i, one.dot(one.of(rows, i), weight[experts[i]], 1, 1))

    start = jnp.zeros((len(rows), weight.shape[1]), rows.dtype)
    return lax.fori_loop(0, num_blocks, body, start)


def _blocks_forward(weight, rows, experts, num_blocks):
    return _blocks(weight, rows, experts, num_blocks), (
        *(weight, rows, experts, num_blocks),
    )


def _blocks_backward(saved, grad) -> tuple[Any, ...]:
    weight, rows, experts, num_blocks = saved
    one = _Blocks(rows, experts)

    def body(i, carry):
        grad_weight, grad_rows = carry
        own, expert = one.of(grad, i), experts[i]
        grad_rows = one.put(grad_rows, i, one.dot(own, weight[expert], 1, 0))
        part = one.dot(own, one.of(rows, i), 0, 0)
        return grad_weight.at[expert].add(part), grad_rows

    start = jnp.zeros_like(weight), jnp.zeros_like(rows)
    return *lax.fori_loop(0, num_blocks, body, start), None, None


_blocks.defvjp(_blocks_forward, _blocks_backward)


class _Blocks:
    """Blocks of rows: their size, and how they are read, multiplied and written."""

    def __init__(self, rows: Array, experts: Array):
        self._size = len(rows) // len(experts)
        self.dot = functools.partial(_dot, precision=layers.precision(rows.dtype))

    def of(self, rows: Array, i: Array) -> Array:
        return lax.dynamic_slice_in_dim(rows, i * self._size, self._size)

    def put(self, rows: Array, i: Array, block: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(rows, block, i * self._size, 0)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int, precision) -> Array:
    dims = ((axis_a,), (axis_b,)), ((), ())
    return lax.dot_general(a, b, dims, precision=precision)
