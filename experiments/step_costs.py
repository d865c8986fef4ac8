"""What a decode step, or a whole program, computes and moves, counted in its trace.

A compiler's own account takes the bodies of loops once, knows nothing of the inside of
a kernel, and that for GPUs gives none. Here a loop's body counts as often as it runs,
a kernel as it estimates itself, and a step is the body of the program's outer loop:

- floating-point operations: those of products and of kernels;
- bytes: what products, reductions, orderings and scans read and write (of a mixture the
  weights of the experts that rows touch where routes are even), what is read or written
  of an array by index, and what kernels say. Arithmetic by element, and what
  only lies otherwise, is taken as part of what reads it, at no cost.

Attention kernels of libraries estimate nothing: theirs are the products of causal rows,
and what goes in and comes out, once.

Both are of all devices together, and of arrays as the program has them: what devices
repeat, or exchange, is not counted.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
import numpy as np

# Read all that they are given, and write what comes of it.
_WHOLE = {"sort", "top_k", "argmax", "argmin", "cumsum", "cummax", "cumlogsumexp"}
_WHOLE |= {f"reduce_{what}" for what in ("sum", "max", "min", "and", "or", "prod")}
# Move what comes of them, or their last array of values, and leave the rest.
_READS = {"gather", "dynamic_slice"}
_WRITES = {"dynamic_update_slice": 1, "scatter": 2, "scatter-add": 2, "scatter_add": 2}
_LOOPS = {"while", "scan"}
# Products of queries and keys, or as large ones, in training attention's kernels.
_PRODUCTS = {
    "splash_mha_fwd": 2,
    "splash_mha_dkv": 4,
    "splash_mha_dq": 3,
    "dot_product_attention_fwd": 2,
    "dot_product_attention_bwd": 5,
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Floating-point operations and bytes."""

    flops: float = 0.0
    num_bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.num_bytes + other.num_bytes)

    def times(self, count: float) -> "Cost":
        """Returns what so many cost."""
        return Cost(self.flops * count, self.num_bytes * count)


@dataclasses.dataclass(frozen=True)
class _Program:
    """What its equations do not say.

    Attributes:
      platform: that they are lowered for.
      trips: of loops that ask whether to go on, one after the other.
      per_token: experts that a row of a mixture passes.
      columns: of a packed row, where it trains.
    """

    platform: str
    trips: Iterator[float]
    per_token: int
    columns: int = 0

    def touched_frac(self, num_experts: int, num_choices: int) -> float:
        """Returns the part of the experts that rows' choices touch, if even."""
        num_rows = num_choices / self.per_token
        return 1 - (1 - self.per_token / num_experts) ** num_rows


def of_step(
    traced: jex_core.ClosedJaxpr,
    platform: str,
    trips: Sequence[int],
    per_token: int = 1,
) -> Cost:
    """Counts one step of a decode program's loop.

    Args:
      traced: the program, whose outer loop is its only one that asks whether to go on.
      platform: `tpu`, `cuda` or `cpu`, for what is written differently for each.
      trips: of each loop inside of it that asks so, too, in their order: the levels
        that are drafted there.
      per_token: experts that a row of a mixture passes.

    Raises:
      ValueError: it has no such loop, or several, or not so many inside.
    """
    loops = [eqn for eqn in _flat(traced.jaxpr) if eqn.primitive.name == "while"]
    if len(loops) != 1:
        raise ValueError(f"the program has {len(loops)} outer loops, not one.")
    program = _Program(platform, iter(trips), per_token)
    cost = _of(loops[0].params["body_jaxpr"].jaxpr, program)
    if next(program.trips, None) is not None:
        raise ValueError(f"a step has fewer loops than {list(trips)} is of.")
    return cost


def of_program(
    traced: jex_core.ClosedJaxpr,
    platform: str,
    *,
    trips: float,
    columns: int,
    per_token: int = 1,
) -> Cost:
    """Counts a whole program that trains on packed rows of so many columns."""
    trips_of_all = itertools.repeat(trips)
    return _of(traced.jaxpr, _Program(platform, trips_of_all, per_token, columns))


def _flat(jaxpr: Any) -> Iterator[Any]:
    """Lists equations, those of calls in their places."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in (*_LOOPS, "cond") or not (inner := _inner(eqn)):
            yield eqn
        else:
            for each in inner:
                yield from _flat(each)


def _of(jaxpr: Any, program: _Program) -> Cost:
    costs = [_of_equation(eqn, program) for eqn in jaxpr.eqns]
    return sum(costs, Cost())


def _of_equation(eqn: Any, program: _Program) -> Cost:
    name, params = eqn.primitive.name, eqn.params
    if name == "pallas_call" and (estimate := params["cost_estimate"]):
        return Cost(estimate.flops, estimate.bytes_accessed)
    if products := _num_products(name, params):
        moved = _bytes(eqn.invars) + _bytes(eqn.outvars)
        query = max(eqn.invars, key=lambda v: _bytes([v])).aval
        return Cost(products * math.prod(query.shape) * program.columns, moved)
    if name == "shard_map":
        # What one device does.
        inside = sum((_of(each, program) for each in _inner(eqn)), Cost())
        return inside.times(params["mesh"].size)
    if name == "while":
        if (trips := next(program.trips, None)) is None:
            raise ValueError("a step has more loops than trips were said of.")
        return _of(params["body_jaxpr"].jaxpr, program).times(trips)
    if name == "scan":
        return _of(params["jaxpr"].jaxpr, program).times(params["length"])
    if name == "cond":
        branches = [b.jaxpr for b in params["branches"]]
        if (chosen := _branch(params, program.platform)) is not None:
            return _of(branches[chosen], program)
        costs = [_of(branch, program) for branch in branches]
        return max(costs, key=lambda cost: cost.num_bytes)
    given, made = eqn.invars, eqn.outvars
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        depth = math.prod(given[0].aval.shape[axis] for axis in contracted)
        flops = 2 * depth * math.prod(made[0].aval.shape)
        return Cost(flops, _bytes(given) + _bytes(made))
    if name == "ragged_dot_general":
        rows, weights = given[0].aval, given[1].aval
        flops = 2 * math.prod(rows.shape) * weights.shape[-1]
        touched = program.touched_frac(weights.shape[0], rows.shape[0])
        read = touched * _bytes(given[1:2])
        return Cost(flops, _bytes(given[:1]) + read + _bytes(made))
    if name in _WHOLE:
        return Cost(0, _bytes(given) + _bytes(made))
    if name in _READS:
        return Cost(0, 2 * _bytes(made) + _bytes(given[1:]))
    if name in _WRITES:
        return Cost(0, 2 * _bytes(given[_WRITES[name] : _WRITES[name] + 1]))
    return sum((_of(each, program) for each in _inner(eqn)), Cost())


def _num_products(name: str, params: Any) -> int:
    """Returns the products of a training attention's kernel; 0: it is none."""
    if name == "pallas_call":
        name = str(params["name"] if "name" in params else params["name_and_src_info"])
    found = [count for kernel, count in _PRODUCTS.items() if name.startswith(kernel)]
    return found[0] if found else 0


def _branch(params: Any, platform: str) -> int | None:
    """Returns which branch a platform takes; None: that is decided as it runs."""
    platforms = params.get("branches_platforms")
    if platforms is None:
        return None
    named = [i for i, names in enumerate(platforms) if names and platform in names]
    return named[0] if named else list(platforms).index(None)


def _inner(eqn: Any) -> list[Any]:
    """Lists what an equation calls."""
    return [value for value in eqn.params.values() if hasattr(value, "eqns")]


def _bytes(variables: Any) -> int:
    return sum(
        math.prod(v.aval.shape) * _itemsize(v.aval.dtype)
        for v in variables
        if hasattr(v.aval, "shape")
    )


def _itemsize(dtype: Any) -> int:
    # Keys are of a type that NumPy does not know, and are small.
    is_key = jax.dtypes.issubdtype(dtype, jax.dtypes.extended)
    return 8 if is_key else np.dtype(dtype).itemsize
