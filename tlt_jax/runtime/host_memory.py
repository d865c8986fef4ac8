"""Keep host memory that was freed, where the devices are CPUs.

XLA allocates the scratch space of every call anew. glibc gives blocks of that size back
to the system at once, so each call pays a page fault for every 4 KiB of it again: an
update of SmolLM2 met 1.4 million of them, a quarter of its time.
"""

import ctypes
import importlib.metadata
import importlib.util

import jax

# From glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_GROWTH_BYTES = 64 << 20


def keep_freed() -> bool:
    """Let freed memory stay with the process; before JAX makes its threads.

    Only where nothing but CPUs can be computed on: with accelerators the host has other
    uses for its memory. The process then holds the most that it ever had. Threads made
    earlier keep arenas of their own, which cannot be kept. Returns whether it was done;
    not without glibc either.
    """
    if not _computes_on_cpus_alone():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (
        (_MMAP_MAX, 0),
        (_TRIM_THRESHOLD, -1),
        (_TOP_PAD, _GROWTH_BYTES),
        # Large blocks of other arenas would be mapped and unmapped all the same.
        (_ARENA_MAX, 1),
    )
    return all([mallopt(name, value) for name, value in settings])


def _computes_on_cpus_alone() -> bool:
    if platforms := jax.config.jax_platforms:
        return platforms == "cpu"
    if importlib.util.find_spec("libtpu") or importlib.util.find_spec("jax_plugins"):
        return False
    return not importlib.metadata.entry_points(group="jax_plugins")
