"""Which programs an engine has, and that they fit what the host gives them."""

import concurrent.futures
import dataclasses
import threading

import jax
import numpy as np
import pytest
from jax._src import cache_key, compiler
from jax.experimental.compilation_cache import compilation_cache

from tests.rl import engines
from tests.rl.engine import test_engine_speculation, test_speculator
from tests.rl.engine.test_engine_speculation import DRAFTER, EAGLE
from tlt_jax.models import transformer
from tlt_jax.rl.engine import programs as engine_programs
from tlt_jax.runtime import compile_cache, sharding
from tlt_jax.specdec import chain, strategy
from tlt_jax.specdec.proposers import both, learned, ngram

engine_of = test_engine_speculation.engine_of


class Recorder:
    """Takes a program pool's place and keeps what is prepared."""

    def __init__(self):
        self.keys = []

    def prepare(self, program):
        self.keys.append(program.key)


def prepared(engine):
    engine.pool.close()
    engine.pool = Recorder()
    engine.warm_up(wait=False)
    return engine.pool.keys


def named(text):
    return strategy.parse(text)


def test_warm_up_names_every_program_once():
    common = [("cache",), ("prefill", 1), ("prefill", 2), ("prefill", 4), ("copy",)]
    fills = [("fill", 1), ("fill", 2), ("fill", 4)]
    plain = engines.engine_of(max_rows=6)
    buckets = [("decode", 6), ("decode", 4), ("decode", 2), ("decode", 1)]
    assert prepared(plain) == common + buckets
    by_rows = [
        *(("decode", 4), ("speculate", 2, named("D2K2V4"))),
        ("speculate", 1, named("D4K2V9")),
    ]
    assert prepared(engine_of("by rows")) == common + by_rows + fills
    captured = engine_of("by rows", speculator_changes=dict(capture=True))
    assert prepared(captured) == common + by_rows + fills + [("read_features",)]
    matches = [("speculate", b, named("D3K2V5-ngram")) for b in (4, 2, 1)]
    assert prepared(engine_of("ngram", cfg=None)) == common + matches


@pytest.mark.parametrize("text", ["D3K1V4", "D3K1V4-ngram", "D3K1V5-both"])
def test_programs_are_compiled_for_what_the_host_gives(text):
    engine = engine_of("chain", EAGLE)
    rows = [test_speculator.row_of(3, (1,))]
    given = engine._speculator.inputs(rows, 2, named(text))
    described = engine.programs._inputs(engine.params, 2, named(text))
    engine.pool.close()

    def shapes(tree):
        return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)

    assert shapes(described) == shapes(given)
    assert jax.tree.structure(described) == jax.tree.structure(given)


def test_strategies_and_rules_name_their_parts():
    engine = engine_of("chain", DRAFTER, dict(ranking="deterministic"))
    made = [engine.programs._proposer(named(t)) for t in ("D3K1V4", "D3K1V4-ngram")]
    engine.pool.close()
    assert made == [
        learned.Learned(
            named("D3K1V4"), engine.programs.settings, DRAFTER, "deterministic"
        ),
        ngram.NGram(named("D3K1V4-ngram")),
    ]
    engine = engine_of("chain", EAGLE, dict(rule="block"))
    assert engine.programs._proposer(named("D3K1V4")).ranking == learned.SAMPLED
    united = engine.programs._proposer(named("D3K1V5-both"))
    assert isinstance(united, both.Both) and united.strategy == named("D3K1V5-both")
    assert len(set(chain.RULES.values())) == len(chain.RULES) == 3
    engine.pool.close()


def test_sizes_follow_from_the_settings():
    cfg = engine_programs.EngineConfig(
        max_rows=3, max_length=10, page_size=4, prefill_chunk=5
    )
    assert (cfg.max_pages, cfg.total_pages, cfg.chunk) == (3, 13, 8)
    assert dataclasses.replace(cfg, num_pages=7).total_pages == 7
    engine = engine_of("chain", EAGLE, dict(capture=True), max_length=16)
    caches = engine.programs.abstract_caches
    engine.pool.close()
    # Last features alone: nothing is kept beside them. 1 + 4 x (4 + 1) pages.
    assert caches.target.features.shape[1:3] == (21, 1)
    assert int(np.prod(caches.target.features.shape[2:])) == engines.CFG.d_model * 4
    fused = engine_of("chain", DRAFTER, dict(capture=True), max_length=16)
    kept = fused.programs.abstract_caches.target.features
    fused.pool.close()
    # Two layers are fused, and the last features kept for the training.
    assert int(np.prod(kept.shape[2:])) == 3 * engines.CFG.d_model * 4


def test_equal_devices_trace_and_lower_a_program_once(monkeypatch):
    """Eight engines of a process, whose threads ask at the same time."""
    forwards, forward = [], transformer.forward

    def counted(*given, **how):
        forwards.append(threading.get_ident())
        return forward(*given, **how)

    monkeypatch.setattr(transformer, "forward", counted)

    def made_for(device):
        # No other test's width of a call.
        mesh = sharding.make_mesh(1, 1, 1, [device])
        return engine_of("by rows", mesh=mesh, steps_per_call=7)

    def lowered(engine):
        made, params = engine.programs, engine.params
        wanted = made.decoding(params, 2, named("D2K2V4")), made.prefill(params, 1)
        return [program.lower() for program in wanted]

    made = [made_for(device) for device in jax.devices()]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lowered, made))
    for engine in made:
        engine.pool.close()
    # The target's in the step, and in prefilling.
    assert len(forwards) == 2
    assert len({decoding.as_text() for decoding, _ in found}) == 1


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of compiled programs, and the names of what is compiled."""
    compiled, whole = [], compiler.backend_compile_and_load

    def counted(backend, module, *rest):
        compiled.append(module.operation.attributes["sym_name"].value)
        return whole(backend, module, *rest)

    monkeypatch.setattr(compiler, "backend_compile_and_load", counted)
    hashed = cache_key._hash_serialized_compile_options
    monkeypatch.setattr(cache_key, hashed.__name__, getattr(hashed, "whole", hashed))
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield compiled
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_equal_devices_compile_a_program_once(cache):
    """Eight engines of a process, whose threads ask at the same time."""

    def made_for(device):
        mesh = sharding.make_mesh(1, 1, 1, [device])
        params = jax.device_put(engines.PARAMS, device)
        # No other test's width of a call.
        changes = dict(max_rows=1, steps_per_call=11)
        return engines.engine_of(params=params, mesh=mesh, **changes)

    def tokens_of(engine):
        completions, _ = engine.run(engines.REQUESTS[5:7], engines.SEED)
        where = engine._caches.target.keys.devices()
        return [c.tokens.tolist() for c in completions], where

    made = [made_for(device) for device in jax.devices()]
    names = ["jit__empty", "jit_copy_pages", "jit_decode", "jit_prefill"]
    assert not compile_cache.serves_equal_devices()
    compile_cache._leave_devices_out(cache_key)
    assert compile_cache.serves_equal_devices()
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = list(threads.map(tokens_of, made))
    for engine in made:
        engine.pool.close()
        assert engine.pool.stats.num_compiled == 4
    assert sorted(name for name in cache if name in names) == names
    assert all(tokens == found[0][0] for tokens, _ in found)
    assert [where for _, where in found] == [{device} for device in jax.devices()]
