"""Verification attention: one call for plain decode, verification and prefill.

Fresh queries see their row's cached past, which is read once from its pages, and those
fresh keys that a mask of bit words names (or, in order, all before them). Rows do not
interact: a row's numbers depend on nothing in the others, nor on how many there are.

Which implementation runs is asked for by name, or by platform; nothing else is ever
taken in its place.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax import sharding
from tlt_jax.pallas_kernels.verify_attention import (
    page_layout,
    pallas_gpu,
    pallas_mosaic_tpu,
    reference,
    tpu_plan,
)
from tlt_jax.types import Array

MAX_NODES = 128
_HEAD_DIMS = range(16, 257, 16)
_PAGE_SIZES = (16, 32, 64, 128)
_DTYPES = ("float32", "bfloat16")
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
    arrays = (query, keys, values, cache_keys, cache_values)
    rows = (page_table, lengths, positions, words)
    check_shapes(*arrays, *rows, packing)
    max_pages = page_table.shape[1]
    check_implementation(implementation, query, cache_keys, max_pages, packing)
    if not any(isinstance(x, jax.core.Tracer) for x in (cache_keys, *rows, layer)):
        sizes = (*cache_keys.shape[:2], cache_keys.shape[4] // packing)
        check_values(sizes, layer, *rows)
    options = dict(scale=scale, soft_cap=soft_cap)

    def run(layer, window, *given):
        pages = given[3:5]
        if implementation.name != "mosaic_tpu" and packing > 1:
            pages = tuple(
                page_layout.unpack(x, packing)[..., : query.shape[4], :] for x in pages
            )
        given = (*given[:3], *pages, layer, *given[5:])
        if implementation.name == "reference":
            out, log = reference.verify_attention(*given, window=window, **options)
            return (out, log) if with_log_normaliser else (out, None)
        kernel = {
            "mosaic_tpu": pallas_mosaic_tpu.verify_attention,
            "triton_gpu": pallas_gpu.verify_attention,
        }[implementation.name]
        return kernel(
            *given,
            window=window,
            with_log_normaliser=with_log_normaliser,
            interpret=implementation.interpret,
            **options,
            **(dict(packing=packing) if implementation.name == "mosaic_tpu" else {}),
        )

    if implementation.mesh is None or implementation.mesh.size == 1:
        return run(layer, window, *arrays, *rows)

    def split(*axes, shape=query.shape):
        return sharding.named(
            implementation.mesh, implementation.rules, axes, shape, replicate=True
        ).spec

    by_head = split(None, "kv_heads")
    pages = split(None, None, "kv_heads", shape=cache_keys.shape)
    whole = split()
    return jax.shard_map(
        run,
        mesh=implementation.mesh,
        in_specs=(whole, whole, *[by_head] * 3, pages, pages, *[whole] * 4),
        out_specs=(by_head, by_head),
        check_vma=False,
    )(layer, window, *arrays, *rows)


def check_shapes(
    query: Array,
    keys: Array,
    values: Array,
    cache_keys: Array,
    cache_values: Array,
    page_table: Array,
    lengths: Array,
    positions: Array,
    words: Array | None,
    packing: int = 1,
) -> None:
    """Check what shapes and types tell; see `verify_attention` for the arguments.

    Raises:
      ValueError: an argument's shape or type is not what the others ask for.
    """
    if query.ndim != 5 or cache_keys.ndim != 5:
        raise ValueError(
            f"query has shape {query.shape} and cache_keys {cache_keys.shape}: give "
            "[B, K, G, T, H] and [L, num_pages, K, H, page_size]."
        )
    batch, num_kv, _, num_tokens, head_dim = query.shape
    num_features = page_layout.padded(head_dim, packing)
    lanes = cache_keys.shape[4] // packing * packing
    pages = (*cache_keys.shape[:2], num_kv, num_features // packing, lanes)
    fresh = (batch, num_kv, head_dim, num_tokens)
    num_words = -(-num_tokens // 32)
    wanted = {
        "keys": (keys, fresh, query.dtype),
        "values": (values, fresh, query.dtype),
        "cache_keys": (cache_keys, pages, None),
        "cache_values": (cache_values, pages, cache_keys.dtype),
        "page_table": (page_table, (batch, page_table.shape[-1]), jnp.int32),
        "lengths": (lengths, (batch,), jnp.int32),
        "positions": (positions, (batch, num_tokens), jnp.int32),
    }
    if words is not None:
        wanted["words"] = (words, (batch, num_tokens, num_words), jnp.uint32)
    for name, (array, shape, dtype) in wanted.items():
        if array.shape != shape:
            raise ValueError(
                f"{name} has shape {array.shape}, but query {query.shape} and the pages"
                f" {cache_keys.shape} ask for {shape}."
            )
        if dtype is not None and array.dtype != dtype:
            raise ValueError(f"{name} is {array.dtype}: give {jnp.dtype(dtype)}.")
    for name, array in (("query", query), ("cache_keys", cache_keys)):
        if array.dtype not in _DTYPES:
            raise ValueError(f"{name} is {array.dtype}: use {' or '.join(_DTYPES)}.")
    if words is not None and num_tokens > MAX_NODES:
        raise ValueError(
            f"words masks T={num_tokens} fresh tokens, more than {MAX_NODES}: verify "
            "fewer nodes (tokens_to_verify), or leave it out for causal ones."
        )


def check_values(
    sizes: tuple[int, int, int],
    layer: Array | int,
    page_table: Array,
    lengths: Array,
    positions: Array,
    words: Array | None,
) -> None:
    """Check what values tell, on the host; every eager call does.

    Args:
      sizes: of the cache, `(L, num_pages, page_size)`.
      layer, page_table, lengths, positions, words: see `verify_attention`.

    Raises:
      ValueError: a length, page, position or bit is out of its range.
    """
    num_layers, num_pages, page_size = sizes
    table, lengths = np.asarray(page_table), np.asarray(lengths)
    most = table.shape[1] * page_size
    if not 0 <= int(layer) < num_layers:
        raise ValueError(f"layer={int(layer)} of {num_layers}: count from 0.")
    bad = np.flatnonzero((lengths < 0) | (lengths > most))
    if bad.size:
        raise ValueError(
            f"lengths[{bad[0]}]={lengths[bad[0]]} is outside 0 to {most}, which "
            f"{table.shape[1]} pages of {page_size} hold: give the table more columns."
        )
    used = np.arange(table.shape[1]) * page_size < lengths[:, None]
    bad = np.argwhere(used & ((table < 0) | (table >= num_pages)))
    if bad.size:
        row, column = bad[0]
        raise ValueError(
            f"page_table[{row}, {column}]={table[row, column]} is no page of the "
            f"{num_pages} that there are."
        )
    bad = np.flatnonzero((np.asarray(positions) < lengths[:, None]).any(axis=1))
    if bad.size:
        raise ValueError(
            f"positions[{bad[0]}] holds one below lengths[{bad[0]}]="
            f"{lengths[bad[0]]}: fresh tokens stand behind the cached ones."
        )
    if words is None:
        return
    num_tokens = positions.shape[1]
    bits = np.unpackbits(
        np.ascontiguousarray(words).astype("<u4").view(np.uint8),
        axis=-1,
        bitorder="little",
    )
    itself = np.arange(num_tokens)
    for what, wrong in (
        ("does not name node {} itself", ~bits[:, itself, itself].astype(bool)),
        (
            "names a node behind node {}: parents stand before children",
            (bits * (np.arange(bits.shape[-1]) > itself[:, None])).any(axis=-1),
        ),
    ):
        bad = np.argwhere(wrong)
        if bad.size:
            row, node = bad[0]
            raise ValueError(f"words[{row}, {node}] {what.format(node)}.")


def check_implementation(
    implementation: Implementation,
    query: Array,
    cache_keys: Array,
    max_pages: int,
    packing: int = 1,
) -> None:
    """Check that an implementation can compute this, whatever the values.

    Args:
      implementation: what is to compute.
      query, cache_keys: see `verify_attention`.
      max_pages: columns of the page table.
      packing: see `verify_attention`.

    Raises:
      NotImplementedError: it cannot; the message says what can.
    """
    name = implementation.name
    if name == "reference":
        return
    head_dim = query.shape[4]
    page_size = cache_keys.shape[4] // packing
    reasons = []
    if head_dim not in _HEAD_DIMS:
        reasons.append(f"has head dimensions 16, 32, 48, ... 256, not {head_dim}")
    if page_size not in _PAGE_SIZES:
        reasons.append(f"has page sizes {_PAGE_SIZES}, not {page_size}")
    if name == "mosaic_tpu" and not reasons and not implementation.interpret:
        sizes = query.shape, query.dtype, page_size, max_pages
        told = tpu_plan.obstacle(*sizes, packing)
        reasons += [f"cannot take this: {told}"] if told else []
    if reasons:
        raise NotImplementedError(
            f"the kernel {name!r} {' and '.join(reasons)}. The reference and the "
            "portable walk over pages (rollout.attention='portable') take any."
        )
