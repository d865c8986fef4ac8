"""The persistent compilation cache, so that a second run compiles nothing twice."""

import os
import pathlib
import types

import jax
from jax._src import cache_key, compiler


def enable() -> None:
    """Keep compiled programs on disk, unless the user has configured that already.

    The directory is `xla` below `TLT_JAX_CACHE` (default `~/.cache/tlt_jax`). Programs
    of every size are kept: on CPUs the many small ones are most of a start's time.
    Every process of a run keeps its own, wherever the directory is; what one of its
    devices has compiled there is for its equals, too, see `serves_equal_devices`.
    """
    _let_every_process_keep(compiler)
    _leave_devices_out(cache_key)
    if jax.config.jax_compilation_cache_dir:
        return
    root = os.environ.get("TLT_JAX_CACHE") or pathlib.Path.home() / ".cache" / "tlt_jax"
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(root) / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _let_every_process_keep(its: types.ModuleType) -> None:
    """Let JAX keep what processes above 0 compile, in `its` (JAX's) functions.

    It lets process 0 alone write, and has no setting for that. But on CPUs and TPUs a
    program's name in the cache says which devices it is for, so that the others would
    compile theirs again after every restart. On GPUs names are the same for all.
    """
    whole = getattr(its, "_cache_write", None)
    if not isinstance(whole, types.FunctionType) or hasattr(whole, "whole"):
        return  # A later JAX may do otherwise: then as it does.
    first = types.SimpleNamespace(global_state=types.SimpleNamespace(process_id=0))
    by_all = types.FunctionType(whole.__code__, vars(its) | {"distributed": first})

    def write(key, seconds, name, backend, *rest) -> None:
        one = whole if backend.platform == "gpu" else by_all
        one(key, seconds, name, backend, *rest)

    write.whole = whole
    its._cache_write = write


def serves_equal_devices() -> bool:
    """Tell whether what a device compiles here the process's others find in the cache.

    On GPUs names say nothing of devices, and process 0 writes. On CPUs they do not in
    the only process of a run; with several, each would write what another reads. On
    TPUs names say which device it is: whether executables may move nobody has tried.
    """
    if not (
        jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir
    ):
        return False
    if jax.default_backend() == "gpu":
        return jax.process_index() == 0
    hashed = getattr(cache_key, "_hash_serialized_compile_options", None)
    return hasattr(hashed, "whole") and _is_nameless(jax)


def _is_nameless(its: types.ModuleType) -> bool:
    return its.default_backend() == "cpu" and its.process_count() == 1


def _leave_devices_out(its: types.ModuleType) -> None:
    """Let names of programs for CPUs say nothing of devices, as those for GPUs.

    JAX loads what it finds for the devices that ask, whoever compiled it. `its` are
    JAX's functions.
    """
    whole = getattr(its, "_hash_serialized_compile_options", None)
    if not isinstance(whole, types.FunctionType) or hasattr(whole, "whole"):
        return  # A later JAX may do otherwise: then as it does.

    def hashed(hash_obj, options, strip_device_assignment=False):
        strip = strip_device_assignment or _is_nameless(jax)
        return whole(hash_obj, options, strip_device_assignment=strip)

    hashed.whole = whole
    its._hash_serialized_compile_options = hashed
