"""The engine with speculation: the same tokens, whatever guesses, and when."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.rl import engines
from tests.specdec import tiny_drafter
from tlt_jax.models.drafters import drafter
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import speculator
from tlt_jax.runtime import sharding
from tlt_jax.specdec import sampling, strategy
from tlt_jax.specdec.tuners import tuner

DRAFTER = drafter.of_target(engines.CFG, feature_layers=(0, 1), draft_vocab_size=20)
EAGLE = drafter.of_target(engines.CFG, output_norm=False)
BLOCK = drafter.of_target(
    engines.CFG,
    feature_layers=(0, 1),
    draft_vocab_size=20,
    architecture="block",
    block_size=5,
)
TABLES = {
    "chain": ("4:D3K1V4",),
    "by rows": ("1:D4K2V9", "2:D2K2V4"),
    "tail": ("2:D3K1V4",),
    "ngram": ("4:D3K2V5-ngram",),
    "both": ("2:D3K2V7-both",),
    # Rows that share: three have 8 nodes of 15, two of them 8 of 10.
    "shared": ("4:D3K2V5N8",),
    "shared ngram": ("4:D3K2V5N8-ngram",),
}
# Fewer rows than a batch, and so few pages that rows are put back.
SMALL = dict(max_rows=3, page_size=2, num_pages=26, steps_per_call=4, prefill_chunk=3)


def drafter_params(cfg, seed=0):
    params = drafter.init(cfg, jax.random.key(seed))
    if cfg.draft_vocab_size:
        ids = np.random.default_rng(seed).permutation(engines.CFG.vocab_size)
        ids = np.sort(ids[: cfg.draft_vocab_size]).astype(np.int32)
        params = params.replace(draft_ids=jax.numpy.asarray(ids))
    if not cfg.block_size:
        return params
    # So sure that what it says decides as much as the noise.
    return tiny_drafter.followed(params.replace(norm=5 * params.norm))


def engine_of(table, cfg=DRAFTER, speculator_changes=None, mesh=None, **changes):
    engine = engine_lib.Engine(
        engines.CFG,
        dataclasses.replace(engines.BASE, **changes),
        speculator_cfg=speculator.SpeculatorConfig(
            **{"table": strategy.parse_arms(TABLES[table]), "drafter_cfg": cfg}
            | (speculator_changes or {})
        ),
        decode_text=engines.letters,
        mesh=mesh,
    )
    engine.set_params(engines.split(mesh) if mesh else engines.PARAMS, version=0)
    if cfg is not None:
        engine.set_drafter(drafter_params(cfg), version=0)
    return engine


@pytest.fixture(scope="module")
def expected():
    """Completions of the plain engine by request id, and what it took."""
    engine = engines.engine_of()
    completions, stats = engine.run(engines.REQUESTS, engines.SEED)
    engine.pool.close()
    return {c.request_id: c for c in completions}, stats


def assert_equal(completions, expected):
    for completion in completions:
        wanted = expected[completion.request_id]
        assert completion.tokens.tolist() == wanted.tokens.tolist()
        assert completion.finish_reason == wanted.finish_reason
        np.testing.assert_allclose(completion.logprobs, wanted.logprobs, atol=1e-5)


def assert_notes_what_was_drafted(completions, stats):
    """As many as the steps say, but for what limits cut off the last step of a row."""
    noted = sum(int(c.was_drafted.sum()) for c in completions)
    assert all(len(c.was_drafted) == len(c.tokens) for c in completions)
    most = max(len(stats.num_accepted) - 1, 1)
    accepted = sum(stats.num_accepted[1:])
    assert 0 < noted <= accepted and accepted - noted <= most * len(completions)


@pytest.mark.parametrize(
    "table,changes",
    [
        ("chain", dict(cfg=EAGLE)),
        ("by rows", {}),
        ("by rows", SMALL | dict(check_kernels=True)),
        ("ngram", dict(cfg=None)),
        ("both", SMALL),
        ("shared", SMALL | dict(check_kernels=True)),
        ("shared ngram", SMALL | dict(cfg=None)),
        ("by rows", SMALL | dict(cfg=BLOCK, check_kernels=True)),
        ("shared", SMALL | dict(cfg=BLOCK)),
        ("both", dict(cfg=BLOCK)),
    ],
    ids="chain rows preempting ngram both shared shared_ngram "
    "block shared_block block_and_ngram".split(),
)
def test_tokens_are_those_of_plain_decoding(expected, table, changes):
    completions_of, plain_stats = expected
    engine = engine_of(table, **changes)
    completions, stats = engine.run(engines.REQUESTS, engines.SEED)
    assert_equal(completions, completions_of)
    assert stats.num_tokens == plain_stats.num_tokens
    used = {name for name in stats.strategies if name != "none"}
    assert used and used <= {entry.split(":")[1] for entry in TABLES[table]}
    assert stats.num_accepted[0] > 0 and stats.accept_length > 1
    assert all(0 <= rate <= 1 for rate in stats.accept_rates())
    assert_notes_what_was_drafted(completions, stats)
    if changes.get("max_rows") == 3:
        assert stats.num_preempted > 0
    # Once more: nothing that the first run left behind shows.
    again, later = engine.run(engines.REQUESTS, engines.SEED)
    assert_equal(again, completions_of)
    if changes.get("cfg", True) is None:
        # What is thought of matches begins anew with every start of a run.
        assert not np.any(stats.reliability)
    if table == "ngram":
        # But that answers which were given before are found again.
        assert later.accept_length > stats.accept_length + 0.5
    engine.pool.close()


def test_two_devices_speculate_as_one(expected):
    mesh = sharding.make_mesh(1, 1, 2, jax.devices()[2:4])
    engine = engine_of("chain", mesh=mesh, max_rows=1)
    features = engine.programs.abstract_caches.target.features
    # Half of what a position has on each, as of the keys.
    assert features.sharding.shard_shape(features.shape)[3] == engines.CFG.d_model
    completions, stats = engine.run(engines.REQUESTS[5:9], engines.SEED)
    assert_equal(completions, expected[0])
    assert stats.accept_length > 1
    program = engine.programs.decoding(engine.params, 1, strategy.parse("D3K1V4"))
    assert " all-to-all" not in engine.pool.get(program).as_text()
    engine.pool.close()


def test_a_chain_rule_gives_other_tokens_with_the_targets_log_probs():
    law = sampling.SamplingConfig(temperature=0.8, top_p=0.95)
    engine = engine_of("tail", EAGLE, dict(rule="rejection"), **SMALL, sampling_cfg=law)
    completions, stats = engine.run(engines.REQUESTS, engines.SEED)
    assert stats.rule == "rejection"
    assert set(stats.strategies) == {"none", "D3K1V4"}
    assert stats.num_preempted > 0 and stats.accept_length > 1
    for request, completion in zip(engines.REQUESTS, completions, strict=True):
        exact = engines.exact_logprobs(request, completion, law)
        np.testing.assert_allclose(completion.logprobs, exact, rtol=0, atol=1e-4)
        ended = completion.tokens == engines.EOS
        assert not ended[:-1].any()
        assert ended[-1] == (completion.finish_reason == "eos")
        assert ended[-1] or len(completion.tokens) == request.max_new_tokens
    # The same run again gives the same tokens; another drafter gives others.
    again, _ = engine.run(engines.REQUESTS, engines.SEED)
    assert_equal(again, {c.request_id: c for c in completions})
    engine.set_drafter(drafter_params(EAGLE, 1), version=1)
    others, _ = engine.run(engines.REQUESTS, engines.SEED)
    tokens = [[c.tokens.tolist() for c in run] for run in (completions, others)]
    assert tokens[0] != tokens[1]
    engine.pool.close()


def test_until_a_drafter_comes_suffix_matches_are_keyed_under_a_chain_rule(expected):
    early = strategy.parse_arms(TABLES["ngram"])
    changes = dict(rule="block", early=early)
    engine = engine_of("chain", EAGLE, changes, max_rows=1)
    engine._speculator._early_tuner = tuner.Static(early)
    weights, engine._speculator.weights = engine._speculator.weights, None
    completions, stats = engine.run(engines.REQUESTS, engines.SEED)
    assert set(stats.strategies) == {"D3K2V5-ngram"} and stats.accept_length > 1
    assert_equal(completions, expected[0])
    engine._speculator.weights = weights
    others, stats = engine.run(engines.REQUESTS, engines.SEED)
    assert set(stats.strategies) == {"D3K1V4"} and stats.rule == "block"
    tokens = [[c.tokens.tolist() for c in run] for run in (completions, others)]
    assert tokens[0] != tokens[1]
    engine.pool.close()


def test_stop_strings_and_limits_inside_an_accepted_run(expected):
    texts = [engines.letters(c.tokens) for c in expected[0].values()]
    stop = next(text[3:5] for text in texts if len(text) > 8)
    outcomes = []
    for engine in (engines.engine_of(stop=(stop,)), engine_of("by rows", stop=(stop,))):
        completions, _ = engine.run(engines.REQUESTS, engines.SEED)
        outcomes.append([(c.tokens.tolist(), c.finish_reason) for c in completions])
        assert all(len(c.was_drafted) == len(c.tokens) for c in completions)
        engine.pool.close()
    assert outcomes[0] == outcomes[1]
    assert any(reason == "stop" for _, reason in outcomes[0])


def test_warm_up_compiles_all_that_a_run_needs():
    engine = engine_of("by rows", EAGLE)
    engine.warm_up()
    num = len(engine.pool)
    # cache, copy; prefill and fill for 1, 2, 4 rows; plain decoding of 4 rows, as 3 and
    # 4 rows have no strategy; one strategy for 2 rows and one for 1.
    assert num == 2 + 2 * 3 + 1 + 2
    assert engine.pool.stats.num_compiled == num
    events = []

    def listen(name, seconds, **_):
        if name.startswith("/jax/core/compile/"):
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    for seed in range(3):
        engine.run(engines.REQUESTS, seed)
        engine.set_drafter(drafter_params(EAGLE, seed), version=seed)
    jax.monitoring.unregister_event_duration_listener(listen)
    assert len(engine.pool) == num
    engine.pool.close()


def test_a_drafter_is_waited_for_and_may_be_exchanged(expected):
    engine = engine_of("by rows", EAGLE)
    engine._speculator.weights = None
    engine._speculator._params = None
    _, stats = engine.run(engines.REQUESTS, engines.SEED)
    assert set(stats.strategies) == {"none"} and stats.accept_length == 1
    for version in (1, 2):
        engine.set_drafter(drafter_params(EAGLE, version), version)
        assert engine.drafter_version == version
        completions, stats = engine.run(engines.REQUESTS, engines.SEED)
        assert set(stats.strategies) > {"none"}
        assert stats.num_fill_tokens > 0
        assert_equal(completions, expected[0])
    engine.pool.close()


@pytest.mark.parametrize("setting", [None, 2.0])
def test_a_drafters_sharpness_and_tau_are_told_with_every_call(setting):
    """A setting goes before the drafter's own tau, and before the default."""
    table = strategy.parse_arms(TABLES["chain"])
    cfg = speculator.SpeculatorConfig(table, EAGLE, tau=setting)
    made = speculator.Speculator(cfg, page_size=2, max_length=40)
    params = drafter_params(EAGLE)
    for given, told in (((1.5, 2.75), (1.5, 2.75)), ((None, None), (1.0, 0.5))):
        sharpness, tau = (x and np.float32(x) for x in given)
        made.offer(params.replace(sharpness=sharpness, tau=tau), version=0)
        made.take_up((), engines.PARAMS)
        call = made.inputs([], 1, table.first(1))
        assert (call.sharpness, call.tau) == (told[0], setting or told[1])
        assert call.sharpness.dtype == call.tau.dtype == np.float32
        # Else programs would have been compiled for other weights.
        assert call.weights.params.sharpness is call.weights.params.tau is None


def test_shared_prompt_pages_are_filled_once():
    request = engines.REQUESTS[0]
    group = [
        dataclasses.replace(
            request,
            request_id=i,
            prompt_id=1,
            prompt=np.arange(3, 16, dtype=np.int32),
            max_new_tokens=6,
        )
        for i in range(4)
    ]
    engine = engine_of("chain", EAGLE)
    _, stats = engine.run(group, engines.SEED)
    # 12 cached positions are 3 full pages; the last position of a text is taken in by
    # the speculative step itself.
    assert stats.num_fill_tokens == 12
    engine.pool.close()


@pytest.mark.parametrize(
    "build,message",
    [
        (
            lambda: engine_of("chain", dataclasses.replace(DRAFTER, target="other")),
            "made for the target other",
        ),
        (
            lambda: engine_of("chain", dataclasses.replace(DRAFTER, max_length=39)),
            "trained for 39: train one on longer texts",
        ),
        (lambda: engine_of("chain", None), "there is none"),
        (
            lambda: engine_of("chain", speculator_changes=dict(ranking="best")),
            "ranking='best': use one of coupled",
        ),
        (lambda: engine_of("chain", speculator_changes=dict(tau=0.0)), "tau=0.0"),
        (
            lambda: engine_of("by rows", speculator_changes=dict(rule="block")),
            "strategy D4K2V9 is none: use D4K1V5",
        ),
        (
            lambda: engine_of(
                "chain",
                speculator_changes=dict(rule="block"),
                sampling_cfg=sampling.SamplingConfig(temperature=0),
            ),
            "temperature=0 samples nothing",
        ),
        (
            lambda: engines.engine_of().set_drafter(drafter_params(EAGLE), 0),
            "without speculator_cfg",
        ),
    ],
    ids="target length none ranking tau rule greedy plain".split(),
)
def test_what_cannot_be_built_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
