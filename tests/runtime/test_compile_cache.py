"""Where compiled programs are kept, and which."""

import pathlib
import types

import pytest
from jax._src import compiler

from tlt_jax.runtime import compile_cache


@pytest.fixture
def set_to(monkeypatch):
    """What is set, in a process in which nothing was set before."""
    values = {"jax_compilation_cache_dir": None}
    config = types.SimpleNamespace(
        update=values.__setitem__, **{"jax_compilation_cache_dir": None}
    )
    monkeypatch.setattr(compile_cache, "jax", types.SimpleNamespace(config=config))
    monkeypatch.setattr(compile_cache, "compiler", types.ModuleType("none"))
    values["config"] = config
    return values


def test_programs_of_every_size_are_kept_in_the_users_cache(set_to, monkeypatch):
    monkeypatch.delenv("TLT_JAX_CACHE", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", lambda: pathlib.Path("/home/somebody"))
    compile_cache.enable()
    del set_to["config"]
    assert set_to == {
        "jax_compilation_cache_dir": "/home/somebody/.cache/tlt_jax/xla",
        # JAX's own limits, a second and none of a size of its own, would keep few.
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }


def test_another_place_may_be_named(set_to, monkeypatch):
    monkeypatch.setenv("TLT_JAX_CACHE", "/fast/disk")
    compile_cache.enable()
    assert set_to["jax_compilation_cache_dir"] == "/fast/disk/xla"


def test_what_the_user_has_set_stays(set_to, monkeypatch):
    monkeypatch.setenv("TLT_JAX_CACHE", "/fast/disk")
    set_to["config"].jax_compilation_cache_dir = "/mine"
    compile_cache.enable()
    assert set_to.keys() == {"jax_compilation_cache_dir", "config"}
    assert set_to["jax_compilation_cache_dir"] is None


def of_process(index):
    """JAX's functions as a process has them, and what they write in the cache."""
    its, written = types.ModuleType("its"), []
    state = types.SimpleNamespace(process_id=index)
    vars(its).update(vars(compiler))
    its.distributed = types.SimpleNamespace(global_state=state)
    cache = types.SimpleNamespace(
        put_executable_and_time=lambda key, *_: written.append(key),
        is_persistent_cache_enabled=lambda: True,
    )
    its.compilation_cache = cache
    # As it is in a program that has not called `enable` yet.
    whole = getattr(compiler._cache_write, "whole", compiler._cache_write)
    its._cache_write = types.FunctionType(whole.__code__, vars(its))
    return its, written


@pytest.mark.parametrize("platform,kept", [("cpu", 1), ("tpu", 1), ("gpu", 0)])
def test_every_process_keeps_what_it_compiles(platform, kept):
    """On GPUs the others find what process 0 keeps, and nowhere else."""
    backend = types.SimpleNamespace(platform=platform)
    whole = getattr(compiler._cache_write, "whole", compiler._cache_write)
    rest = [()] * (whole.__code__.co_argcount - 5)
    for index, num in ((0, 1), (1, kept)):
        its, written = of_process(index)
        for _ in range(2):  # A second time changes nothing.
            compile_cache._let_every_process_keep(its)
        its._cache_write("a key", 10.0, "a name", backend, object(), *rest)
        assert written == ["a key"] * num
    its, written = of_process(1)
    its._cache_write("a key", 10.0, "a name", backend, object(), *rest)
    assert not written  # Else this is mended in JAX, and can go here.


def test_a_jax_without_that_function_is_left_as_it_is():
    its = types.ModuleType("its")
    compile_cache._let_every_process_keep(its)
    assert not hasattr(its, "_cache_write")
