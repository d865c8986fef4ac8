"""Where compiled programs are kept, and which."""

import pathlib
import types

import pytest

from tlt_jax.runtime import compile_cache


@pytest.fixture
def set_to(monkeypatch):
    """What is set, in a process in which nothing was set before."""
    values = {"jax_compilation_cache_dir": None}
    config = types.SimpleNamespace(
        update=values.__setitem__, **{"jax_compilation_cache_dir": None}
    )
    monkeypatch.setattr(compile_cache, "jax", types.SimpleNamespace(config=config))
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
