"""The persistent compilation cache, so that a second run compiles nothing twice."""

import os
import pathlib

import jax


def enable() -> None:
    """Keep compiled programs on disk, unless the user has configured that already.

    The directory is `xla` below `TLT_JAX_CACHE` (default `~/.cache/tlt_jax`). Programs
    of every size are kept: on CPUs the many small ones are most of a start's time.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    root = os.environ.get("TLT_JAX_CACHE") or pathlib.Path.home() / ".cache" / "tlt_jax"
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(root) / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
