"""Checksums of arrays: what a checkpoint says of its content, compared on reading.

Arrays that this process's CPUs hold are summed as bytes (CRC-32, several GB/s). Those
that lie on accelerators, or on devices of several processes, are summed where they lie,
which moves nothing and does not depend on how they are split. Either sum differs
whenever one bit does.
"""

import concurrent.futures
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from tlt_jax.rl.update import weights_digest

_BYTES, _WORDS = "crc32", "words64"
_NUM_THREADS = 4


def of(trees: Any, like: Mapping[str, str] | None = None) -> dict[str, str]:
    """Sum every array of a tree; by its path, `kind:digits`.

    Kinds are chosen by where an array lies, or are those of `like`, the sums of the
    same tree. All processes that hold a part of an array call this.
    """
    leaves = named(trees)
    kinds = {
        path: like[path].partition(":")[0] if like else _kind(leaf)
        for path, leaf in leaves.items()
    }
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        # Programs of several processes run in the same order in each.
        words = {p: _words(x) for p, x in leaves.items() if kinds[p] == _WORDS}
        own = {p: x for p, x in leaves.items() if p not in words}
        sums = dict(zip(own, pool.map(_crc, own.values()), strict=True))
    for path, value in jax.device_get(words).items():
        sums[path] = weights_digest.text(value)
    return {path: f"{kinds[path]}:{sums[path]}" for path in leaves}


def named(trees: Any) -> dict[str, Any]:
    """Return the arrays of a tree by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _kind(leaf: Any) -> str:
    if not isinstance(leaf, jax.Array):
        return _BYTES
    here = leaf.is_fully_addressable
    is_host = all(d.platform == "cpu" for d in leaf.sharding.device_set)
    return _BYTES if here and is_host else _WORDS


def _crc(array: Any) -> str:
    flat = np.ascontiguousarray(array).reshape(-1)
    return f"{zlib.crc32(flat.view(np.uint8)):08x}"


_words = jax.jit(weights_digest.sums)
