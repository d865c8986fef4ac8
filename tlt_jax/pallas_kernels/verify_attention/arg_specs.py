"""Named arguments of verification attention, for tests, compilers and the bench.

`SUITE` is small enough to be interpreted step by step; every implementation is tested
on all of it. `LARGE` has the shapes of real models, one device's share of the heads.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from tlt_jax.pallas_kernels.verify_attention import page_layout


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """Arguments by their sizes.

    Attributes:
      name: unique.
      lengths: cached positions of each row.
      num_tokens: T, fresh tokens of each row.
      kind: `causal` or `tree`.
      num_kv, group: K and G.
      head_dim: H.
      page_size: slots of a page.
      dtype: of all.
      window, soft_cap: None: there is none.
      num_layers: of the cache; the last one is read.
    """

    name: str
    lengths: tuple[int, ...]
    num_tokens: int
    kind: str = "tree"
    num_kv: int = 2
    group: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: str = "float32"
    window: int | None = None
    soft_cap: float | None = None
    num_layers: int = 2

    @property
    def batch(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def max_pages(self) -> int:
        """Columns of the page table: one more than the longest row fills."""
        return max(self.lengths) // self.page_size + 1

    @property
    def num_filled(self) -> list[int]:
        """Pages that each row fills."""
        return [-(-length // self.page_size) for length in self.lengths]

    @property
    def scale(self) -> float:
        """What the scores are multiplied by."""
        return self.head_dim**-0.5

    @property
    def query_shape(self) -> tuple[int, ...]:
        """`(B, K, G, T, H)`."""
        return (self.batch, self.num_kv, self.group, self.num_tokens, self.head_dim)

    @property
    def minimal_bytes(self) -> int:
        """What has to be moved: cached and fresh columns, queries and output, once."""
        columns = self.num_kv * (self._num_near + self.batch * self.num_tokens)
        queries = self.batch * self.num_kv * self.group * self.num_tokens
        return 2 * (columns + queries) * self.head_dim * jnp.dtype(self.dtype).itemsize

    @property
    def minimal_flops(self) -> int:
        """Products of queries with cached keys and of weights with cached values."""
        scores = self._num_near * self.num_kv * self.group * self.num_tokens
        return 4 * scores * self.head_dim

    @property
    def _num_near(self) -> int:
        """Cached positions that some query of their row sees."""
        most = max(self.lengths) if self.window is None else self.window
        return sum(min(length, most) for length in self.lengths)


_decode = dict(num_tokens=1, kind="causal")
_prefill = dict(kind="causal")
SUITE = (
    ArgSpec("decode", (0, 5, 16, 33), **_decode),
    ArgSpec("decode_long", (1100, 40, 700), num_kv=1, page_size=128, **_decode),
    ArgSpec("decode_bf16", (70, 130), page_size=128, dtype="bfloat16", **_decode),
    ArgSpec("tree", (31, 0, 48), 7),
    ArgSpec(
        *("tree_bf16", (90, 64), 16),
        **dict(num_kv=1, head_dim=128, page_size=64, dtype="bfloat16"),
    ),
    ArgSpec("tree_wide", (20,), 128, num_kv=1, group=1, page_size=32),
    ArgSpec(
        *("tree_capped", (33, 2), 33),
        **dict(num_kv=1, group=3, head_dim=80, page_size=128, soft_cap=2.0),
    ),
    ArgSpec(
        *("tree_capped_bf16", (150, 0), 5),
        **dict(num_kv=1, page_size=128, soft_cap=2.0, dtype="bfloat16"),
    ),
    # What `verify_b32_8k_w16_h256_window` is at the size of a model.
    ArgSpec(
        *("tree_capped_window_bf16", (200, 40), 3),
        **dict(num_kv=1, head_dim=256, page_size=128, dtype="bfloat16"),
        **dict(soft_cap=1.5, window=90),
    ),
    ArgSpec("tree_window", (1300, 3), 9, num_kv=1, page_size=128, window=70),
    ArgSpec("tree_256", (40, 16), 5, num_kv=1, group=1, head_dim=256),
    ArgSpec("prefill_window", (64, 0), 48, num_kv=1, window=10, **_prefill),
    ArgSpec("prefill_long", (128,), 160, num_kv=1, group=8, page_size=128, **_prefill),
)

_verify = dict(lengths=(8192,) * 32, num_tokens=16)
_qwen_7b = dict(group=7, num_kv=4, head_dim=128, page_size=128, dtype="bfloat16")
_llama_70b = dict(group=8, num_kv=2, head_dim=128, page_size=128, dtype="bfloat16")
_smollm2 = dict(group=3, num_kv=3, head_dim=64, page_size=128, dtype="bfloat16")
LARGE = (
    ArgSpec("decode_b1_8k", (8192,), **_decode, **_qwen_7b),
    ArgSpec("decode_b32_8k", (8192,) * 32, **_decode, **_qwen_7b),
    ArgSpec("verify_b32_8k_w16", **_verify | _qwen_7b),
    ArgSpec("verify_b4_32k_w64", (32768,) * 4, 64, **_qwen_7b),
    ArgSpec("verify_b32_8k_w16_llama_70b", **_verify | _llama_70b),
    ArgSpec("verify_b32_2k_w16_h64", (2048,) * 32, 16, **_smollm2),
    ArgSpec(
        "verify_b32_8k_w16_h80",
        **_verify | _qwen_7b | dict(head_dim=80, group=1, num_kv=8),
    ),
    ArgSpec(
        "verify_b32_8k_w16_h256_window",
        **_verify | _qwen_7b | dict(head_dim=256, group=2, num_kv=4),
        **dict(window=4096, soft_cap=50.0),
    ),
    ArgSpec(
        "verify_b8_8k_w16_fp32", (8192,) * 8, 16, **_qwen_7b | dict(dtype="float32")
    ),
    ArgSpec("prefill_b4_8k_t1024", (8192,) * 4, 1024, **_prefill, **_qwen_7b),
    ArgSpec("verify_b32_8k_w16_page16", **_verify | _qwen_7b | dict(page_size=16)),
    # Packed on TPUs; the first with the default page size.
    ArgSpec("verify_b32_8k_w16_h64_page64", **_verify | _smollm2 | dict(page_size=64)),
    ArgSpec("verify_b32_8k_w16_h64_page16", **_verify | _smollm2 | dict(page_size=16)),
    ArgSpec(
        *("verify_b8_8k_w16_h80_page32_fp32", (8192,) * 8, 16),
        **_smollm2 | dict(head_dim=80, page_size=32, dtype="float32"),
    ),
)


def by_name(name: str) -> ArgSpec:
    """Find a spec.

    Raises:
      ValueError: there is none of this name.
    """
    specs = {spec.name: spec for spec in (*SUITE, *LARGE)}
    if name not in specs:
        known = ", ".join(specs)
        raise ValueError(f"no arguments are called {name!r}: use one of {known}.")
    return specs[name]


def shapes(
    spec: ArgSpec, implementation: str | None = None
) -> dict[str, jax.ShapeDtypeStruct | None]:
    """Describe the arguments that `make` would draw, by name.

    Pages lie as the kernel of `implementation` reads them; None: as columns.
    """
    dtype, batch, num_tokens = jnp.dtype(spec.dtype), spec.batch, spec.num_tokens
    packing = page_layout.packing(implementation, spec.page_size, spec.head_dim)
    num_rows = page_layout.padded(spec.head_dim, packing) // packing
    pages = (spec.num_layers, 1 + sum(spec.num_filled), spec.num_kv, num_rows)
    pages = (*pages, spec.page_size * packing)
    fresh = (batch, spec.num_kv, spec.head_dim, num_tokens)
    words = (batch, num_tokens, -(-num_tokens // 32))
    described = {
        "query": (spec.query_shape, dtype),
        "keys": (fresh, dtype),
        "values": (fresh, dtype),
        "cache_keys": (pages, dtype),
        "cache_values": (pages, dtype),
        "layer": ((), jnp.int32),
        "page_table": ((batch, spec.max_pages), jnp.int32),
        "lengths": ((batch,), jnp.int32),
        "positions": ((batch, num_tokens), jnp.int32),
        "words": (words, jnp.uint32),
    }
    made = {k: jax.ShapeDtypeStruct(*v) for k, v in described.items()}
    return made if spec.kind == "tree" else made | {"words": None}


def random_words(rng: np.random.Generator, num_tokens: int) -> tuple[np.ndarray, ...]:
    """Draw a tree of W = `num_tokens` nodes.

    Returns:
      Ancestors and self as words `[W, ceil(W / 32)] uint32`, depths `[W] int32`.
    """
    mask = np.eye(num_tokens, dtype=bool)
    depths = np.zeros(num_tokens, np.int32)
    for node in range(1, num_tokens):
        parent = rng.integers(max(node - 8, 0), node)
        mask[node] |= mask[parent]
        depths[node] = depths[parent] + 1
    return words_of(mask), depths


def words_of(mask: np.ndarray) -> np.ndarray:
    """Pack a mask `[..., S] bool` into words `[..., ceil(S / 32)] uint32`."""
    num_words = -(-mask.shape[-1] // 32)
    padded = np.zeros((*mask.shape[:-1], num_words * 32), bool)
    padded[..., : mask.shape[-1]] = mask
    packed = np.packbits(padded, axis=-1, bitorder="little")
    return packed.view("<u4").astype(np.uint32)


def draw_page_table(spec: ArgSpec, rng: np.random.Generator, behind: int) -> np.ndarray:
    """Draw pages in no order, `[B, max_pages] int32`, with `behind` after the last."""
    order = 1 + rng.permutation(sum(spec.num_filled))
    table = np.full((spec.batch, spec.max_pages), behind, np.int32)
    for row, count in enumerate(spec.num_filled):
        table[row, :count], order = order[:count], order[count:]
    return table


def make(spec: ArgSpec) -> dict[str, np.ndarray | int | None]:
    """Draw arguments, with NaN in every slot that no row may read.

    Pages stand in no order. Entries of the table behind a row's last page name pages
    that do not exist, so that reading one shows.

    Returns:
      The arrays of `api.verify_attention` by name.
    """
    rng = np.random.default_rng(0)
    dtype = np.dtype(ml_dtypes.bfloat16) if spec.dtype == "bfloat16" else np.float32
    size, num_pages = spec.page_size, 1 + sum(spec.num_filled)
    table = draw_page_table(spec, rng, num_pages + 1000)
    pages = (spec.num_layers, num_pages, spec.num_kv, spec.head_dim, size)
    cache = np.full((2, *pages), np.nan, dtype)
    for row, length in enumerate(spec.lengths):
        for j, page in enumerate(table[row, : spec.num_filled[row]]):
            slots = min(length - j * size, size)
            shape = (2, spec.num_kv, spec.head_dim, slots)
            cache[:, -1, page, :, :, :slots] = rng.normal(size=shape)
    if spec.kind == "tree":
        trees = [random_words(rng, spec.num_tokens) for _ in spec.lengths]
        words, depths = (np.stack(part) for part in zip(*trees, strict=True))
    else:
        words, depths = None, np.arange(spec.num_tokens, dtype=np.int32)
    lengths = np.array(spec.lengths, np.int32)
    fresh = (2, spec.batch, spec.num_kv, spec.head_dim, spec.num_tokens)
    keys, values = rng.normal(size=fresh).astype(dtype)
    return dict(
        query=rng.normal(size=spec.query_shape).astype(dtype),
        keys=keys,
        values=values,
        cache_keys=cache[0],
        cache_values=cache[1],
        layer=spec.num_layers - 1,
        page_table=table,
        lengths=lengths,
        positions=lengths[:, None] + np.broadcast_to(depths, fresh[1::3]),
        words=words,
    )
