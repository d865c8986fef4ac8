"""Verification attention: one call for plain decode, verification and prefill.

Fresh queries see their row's cached past, which is read once from its pages, and those
fresh keys that a mask of bit words names (or, in order, all before them). Rows do not
interact: a row's numbers depend on nothing in the others, nor on how many there are.

Which implementation runs is asked for by name, or by platform; nothing else is ever
taken in its place.
"""

import dataclasses
import functools
from typing import Any

import jax

from tlt_jax.pallas_kernels.verify_attention import (
    arguments,
    page_layout,
    pallas_gpu,
    pallas_mosaic_tpu,
    reference,
    validators,
)
from tlt_jax.runtime import sharding
from tlt_jax.types import Array

_OF_PLATFORM = {"tpu": "mosaic_tpu", "gpu": "triton_gpu", "cuda": "triton_gpu"}
_NAMES = ("reference", "mosaic_tpu", "triton_gpu")


@dataclasses.dataclass(frozen=True)
class Implementation:
    """What computes, and over which devices.

    Attributes:
      name: `reference`, `mosaic_tpu` or `triton_gpu`.
      interpret: run a kernel's program step by step on a CPU: slow, for tests. True, or
        for `mosaic_tpu` the parameters of the TPU simulator.
      mesh: devices that the call is spread over, by kv heads; None: one.
      rules: which mesh axes split kv heads.
    """

    name: str
    interpret: Any = False
    mesh: jax.sharding.Mesh | None = None
    rules: sharding.ShardingRules = sharding.ShardingRules()

    def __post_init__(self):
        if self.name not in _NAMES:
            raise ValueError(
                f"implementation {self.name!r} is not known: use one of "
                f"{', '.join(_NAMES)}."
            )


def for_platform(platform: str) -> str | None:
    """Name a platform's kernel; None: it has none, which is so on CPUs."""
    return _OF_PLATFORM.get(platform)


def verify_attention(
    query: Array,
    keys: Array,
    values: Array,
    cache_keys: Array,
    cache_values: Array,
    layer: Array | int,
    page_table: Array,
    lengths: Array,
    positions: Array,
    words: Array | None = None,
    *,
    scale: float,
    window: Array | int | None = None,
    soft_cap: float | None = None,
    packing: int = 1,
    with_log_normaliser: bool = False,
    implementation: Implementation,
) -> tuple[Array, Array | None]:
    """Attend over the cached past and the fresh keys.

    Query t of row b weighs values by `exp(score) / sum(exp(score))` over the cached
    slots s < lengths[b] and the fresh keys that it sees; `score` is scale x query .
    key, squashed by `soft_cap` if there is one. Sums are float32. There is no
    derivative but the reference's.

    Reference: Dao et al., FlashAttention, 2022, algorithm 1; Kwon et al., Efficient
    Memory Management for LLM Serving with PagedAttention, 2023, section 4.1.

    Args:
      query: `[B, K, G, T, H]`.
      keys, values: `[B, K, H, T]`, fresh, in the query's dtype; finite.
      cache_keys, cache_values: `[L, num_pages, K, H, page_size]`, or these packed, see
        `page_layout`; slots that no row may read hold anything, NaN as well.
      layer: int32 scalar, whose pages.
      page_table: `[B, max_pages] int32`; entries behind a row's last page are not used.
      lengths: `[B] int32`, cached positions.
      positions: `[B, T] int32` of the queries and fresh keys; matter with a window.
      words: `[B, T, ceil(T / 32)] uint32`: query t sees fresh key s where bit s % 32 of
        word s // 32 is set; None: causal, s <= t.
      scale: multiplies the scores.
      window: see only keys at distance below this, or None; may be traced.
      soft_cap: scores become soft_cap x tanh(score / soft_cap), or None.
      packing: features side by side in the pages given, see `page_layout`; 1: columns.
      with_log_normaliser: return it, too: needed to join with attention over more keys.
      implementation: what computes.

    Returns:
      The output `[B, K, G, T, H]` in the query's dtype (float32 of the reference), and
      log(sum(exp(score))) `[B, K, G, T] float32` or None; -1e30 for a query that sees
      nothing, whose output is zero.

    Raises:
      ValueError: shapes, types or (where they are known) values do not fit together.
      NotImplementedError: the implementation cannot do this, or not here.
    """
    args = arguments.Arguments(
        *(query, keys, values, cache_keys, cache_values, layer),
        *(page_table, lengths, positions, words, window),
        scale=scale,
        soft_cap=soft_cap,
        packing=packing,
        with_log_normaliser=with_log_normaliser,
    )
    validators.check_shapes(args)
    if implementation.name != "reference":
        compiled = not implementation.interpret
        validators.check_kernel(implementation.name, args, compiled=compiled)
    # Inside a program nobody knows them: see `validators.checked_lengths`.
    rows = (page_table, lengths, positions, words)
    if not any(isinstance(x, jax.core.Tracer) for x in (cache_keys, *rows, layer)):
        sizes = (*cache_keys.shape[:2], args.sizes.page_size)
        validators.check_values(sizes, layer, *rows)
    if implementation.mesh is None or implementation.mesh.size == 1:
        return _run(args, implementation)
    return _run_spread(args, implementation)


def _run(
    args: arguments.Arguments, implementation: Implementation
) -> tuple[Array, Array | None]:
    if implementation.name == "mosaic_tpu":
        return pallas_mosaic_tpu.verify_attention(args, implementation.interpret)
    if args.packing > 1:
        head_dim = args.query.shape[4]
        cache_keys, cache_values = (
            page_layout.unpack(x, args.packing)[..., :head_dim, :]
            for x in (args.cache_keys, args.cache_values)
        )
        args = args.replace(cache_keys=cache_keys, cache_values=cache_values, packing=1)
    if implementation.name == "triton_gpu":
        return pallas_gpu.verify_attention(args, implementation.interpret)
    return reference.verify_attention(args)


def _run_spread(
    args: arguments.Arguments, implementation: Implementation
) -> tuple[Array, Array | None]:
    """Run on each device with its kv heads; rows and page tables are everywhere."""

    def split(*axes, shape=args.query.shape):
        return sharding.named(
            implementation.mesh, implementation.rules, axes, shape, replicate=True
        ).spec

    by_head = split(None, "kv_heads")
    pages = split(None, None, "kv_heads", shape=args.cache_keys.shape)
    specs = jax.tree.map(lambda _: split(), args)
    specs = specs.replace(query=by_head, keys=by_head, values=by_head)
    specs = specs.replace(cache_keys=pages, cache_values=pages)
    return jax.shard_map(
        functools.partial(_run, implementation=implementation),
        mesh=implementation.mesh,
        in_specs=(specs,),
        out_specs=(by_head, by_head),
        check_vma=False,
    )(args)
