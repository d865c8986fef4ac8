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

from tlt_jax.pallas_kernels.verify_attention import (
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
    arrays = (query, keys, values, cache_keys, cache_values)
    rows = (page_table, lengths, positions, words)
    validators.check_shapes(*arrays, *rows, packing)
    if implementation.name != "reference":
        validators.check_kernel(
            implementation.name,
            query,
            cache_keys,
            page_table.shape[1],
            packing,
            compiled=not implementation.interpret,
        )
    # Inside a program nobody knows them: see `validators.checked_lengths`.
    if not any(isinstance(x, jax.core.Tracer) for x in (cache_keys, *rows, layer)):
        sizes = (*cache_keys.shape[:2], cache_keys.shape[4] // packing)
        validators.check_values(sizes, layer, *rows)
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
