"""Texts that the target writes for its drafter, and the training on them."""

import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.rl import engines
from tlt_jax.models import transformer
from tlt_jax.models.drafters import drafter
from tlt_jax.rl.adaptation import learner as drafter_learner
from tlt_jax.rl.adaptation import offline, offline_texts
from tlt_jax.rl.engine import capture, speculator
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import programs as engine_programs
from tlt_jax.runtime import failures
from tlt_jax.specdec import strategy
from tlt_jax.specdec.texts import layout, shards, vocabulary
from tlt_jax.specdec.training import acceptance, objectives

LAYERS = (0, 1)
CFG = drafter.of_target(engines.CFG, feature_layers=LAYERS, draft_vocab_size=12)
NEW_TOKENS, SEED = 20, 5
SIZES = {"row_tokens": 32, "row_bases": 24, "num_rows": 2}
FIRST = offline_texts.HELD_OUT
DEVICES = tuple(jax.devices()[:1])


class Killed(Exception):
    """In place of a signal."""


def asked():
    rng = np.random.default_rng(2)
    ids = [*range(9), FIRST, FIRST + 1, FIRST + 2]
    return [
        offline_texts.request_of(
            i, rng.integers(3, 32, 1 + n).astype(np.int32), NEW_TOKENS
        )
        for n, i in enumerate(ids)
    ]


@pytest.fixture(scope="module")
def engine():
    """Draws plainly, in batches of two, and its pages keep what a drafter fuses."""
    made = engine_lib.Engine(
        engines.CFG,
        engine_programs.EngineConfig(
            max_rows=2,
            max_length=40,
            page_size=4,
            steps_per_call=5,
            prefill_chunk=8,
            eos_ids=(engines.EOS,),
        ),
        speculator_cfg=speculator.SpeculatorConfig(
            strategy.Arms(()), CFG, capture=True
        ),
    )
    made.set_params(engines.PARAMS, version=0)
    yield made
    made.pool.close()


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Groups of four texts, in shards of three and of what is left."""
    monkeypatch.setattr(offline_texts, "_SHARD_TEXTS", 3)
    monkeypatch.setattr(offline_texts, "_GROUP_ROUNDS", 2)


def write(engine, directory, told=None):
    texts = shards.Shards(directory, "float32")
    offline_texts.write(
        engine,
        asked(),
        texts,
        seed=SEED,
        on_progress=None if told is None else lambda *given: told.append(given),
    )
    return texts


@pytest.fixture(scope="module")
def texts(engine, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        small_groups.__wrapped__(patch)
        return write(engine, tmp_path_factory.mktemp("texts") / "texts")


def assert_same(one, other):
    assert one.text_ids == other.text_ids
    for i in range(len(one)):
        for name in ("tokens", "hidden", "features", "key", "response_start"):
            got, wanted = (getattr(x.read(i), name) for x in (one, other))
            np.testing.assert_array_equal(got, wanted, err_msg=f"{name} of {i}")


def test_features_are_those_of_a_forward_that_nobody_made(
    engine, tmp_path, monkeypatch
):
    used, brought = [], {}
    get, add = engine.pool.get, capture.Delivery.add

    def counted(self, text, pages):
        brought[text.text_id] = [page.nbytes for page in pages]
        return add(self, text, pages)

    def noted(program):
        used.append(program.key[0])
        return get(program)

    monkeypatch.setattr(engine.pool, "get", noted)
    monkeypatch.setattr(capture.Delivery, "add", counted)
    told = []
    texts = write(engine, tmp_path / "texts", told)
    # Texts cost what drawing them costs, and the reading of their own pages.
    assert set(used) - {"cache", "copy"} == {"prefill", "decode", "read_features"}
    assert used.count("read_features") == len(texts) == len(brought) == 12
    for text_id, length in zip(texts.text_ids, texts.lengths, strict=True):
        page = 4 * engines.CFG.d_model * (len(LAYERS) + 1) * np.float32().nbytes
        assert brought[text_id] == [page] * -(-(length - 1) // 4)
    prompts = {one.request_id: one.prompt for one in asked()}
    forward = jax.jit(
        lambda tokens: transformer.forward(
            engines.PARAMS,
            engines.CFG,
            tokens[None],
            jnp.arange(40)[None],
            features=LAYERS,
        )
    )
    num_drawn = 0
    for i in range(len(texts)):
        record = texts.read(i)
        start, length = record.response_start, len(record.tokens)
        np.testing.assert_array_equal(record.tokens[:start], prompts[record.text_id])
        assert start < length <= start + NEW_TOKENS
        out = forward(engines.padded(record.tokens))
        hidden = np.asarray(out.hidden)[:, 0].T[: length - 1]
        fused = np.concatenate(out.features)[:, 0].T[: length - 1]
        np.testing.assert_allclose(record.hidden[:-1], hidden, atol=2e-5)
        np.testing.assert_allclose(record.features[:-1], fused, atol=2e-5)
        # The last token was never fed; no position learns from it.
        assert not record.hidden[-1].any() and not record.features[-1].any()
        num_drawn += length - start
    assert told[-1][1:] == (12, num_drawn) and told[-1][0] <= 12
    assert [t[2] for t in told] == sorted(t[2] for t in told)


@pytest.mark.parametrize("call", [1, 2, 5])
def test_a_killed_writing_goes_on_to_the_same_bits(
    engine, texts, tmp_path, monkeypatch, call
):
    """Groups are answered whole, also where a part of one is there."""
    append, check = shards.Shards.append, engine_lib.Engine.check
    calls, groups = [], []

    def counted(*given):
        calls.append(None)
        if len(calls) == call:
            raise Killed
        append(*given)

    def noted(engine, requests):
        groups.append([r.request_id for r in requests])
        check(engine, requests)

    monkeypatch.setattr(engine_lib.Engine, "check", noted)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shards.Shards, "append", counted)
        write(engine, tmp_path)
    again = write(engine, tmp_path)
    assert_same(again, texts)
    begun = (call - 1) // 2
    wanted = [[0, 1, 2, 3], [4, 5, 6, 7], [8, FIRST, FIRST + 1, FIRST + 2]]
    assert groups == wanted[: begun + 1] + wanted[begun:]
    groups.clear()
    write(engine, tmp_path)
    assert groups == []


def learner_of(learning_rate=1e-2):
    return drafter_learner.DrafterLearner(
        CFG,
        objectives.Objective(2),
        optax.adam(learning_rate),
        batch=layout.described(
            d_model=16, num_features=len(LAYERS), dtype="float32", **SIZES
        ),
        head_chunk=32,
        piece_bases=0,
        depth=3,
        dtype="float32",
    )


@pytest.fixture(scope="module")
def pool():
    """Of one learner, for all: their programs are the same."""
    made = learner_of().pool
    yield made
    made.close()


def training_of(texts, pool):
    learner = learner_of()
    learner.pool.close()
    learner.pool = pool
    return offline.OfflineTraining(
        learner, texts, seed=SEED, eos_ids=(engines.EOS,), **SIZES
    )


def losses(training, until):
    return [float(outcome["loss"]) for outcome in training.steps(until)]


def test_a_killed_training_goes_on_bit_for_bit(texts, pool):
    whole = training_of(texts, pool)
    whole.begin(DEVICES, engines.PARAMS)
    # In the midst of the second epoch.
    killed = len(whole._plan(whole._train, (SEED, 0))) + 1
    end = killed + 3
    expected = losses(whole, end)
    assert expected[-1] < expected[0] and whole.num_steps == end
    first = training_of(texts, pool)
    first.begin(DEVICES, engines.PARAMS)
    found = losses(first, killed)
    first.skips.in_a_row = 3
    second = training_of(texts, pool)
    second.restore(first.state(), first.num_steps)
    assert (second.num_steps, second.skips.in_a_row) == (killed, 3)
    second.begin(DEVICES, engines.PARAMS)
    assert found + losses(second, end) == expected
    jax.tree.map(
        np.testing.assert_array_equal, second.state().state, whole.state().state
    )
    assert int(second.learner.newest.num_updates) == end
    # Every step's outcome but the last was looked at.
    assert second.skips.in_a_row == 0


def test_an_epoch_takes_every_training_text_once(texts, pool):
    training = training_of(texts, pool)
    keys = {bytes(texts.read(i).key): texts.text_ids[i] for i in range(len(texts))}
    num_batches = len(training._plan(training._train, (SEED, 0)))
    seen = [[], []]
    stream = training._batches(0)
    for epoch in range(2):
        for batch in itertools.islice(stream, num_batches):
            for row in range(SIZES["num_rows"]):
                for key in batch.keys[row][batch.valid[row]]:
                    text_id = keys[bytes(key)]
                    if text_id not in seen[epoch]:
                        seen[epoch].append(text_id)
    learnable = [
        texts.text_ids[i]
        for i in range(len(texts))
        if layout.num_bases(texts.lengths[i], texts.response_starts[i])
    ]
    assert sorted(seen[0]) == sorted(seen[1]) == [i for i in learnable if i < FIRST]
    assert seen[0] != seen[1]


def test_the_held_out_texts_are_measured(texts, pool, monkeypatch):
    in_use, summarise = [], acceptance.summarise

    def noted(sums, sharpness):
        in_use.append(sharpness)
        return summarise(sums, sharpness)

    monkeypatch.setattr(acceptance, "summarise", noted)
    training = training_of(texts, pool)
    training.begin(DEVICES, engines.PARAMS)
    assert training.learner.sharpness is None
    found = training.measure()
    assert found["sharpness"] == training.learner.sharpness
    # Not kept for being the one in use.
    training.learner.sharpness = acceptance.SHARPNESSES[-1]
    assert training.measure() == found
    assert in_use == [None, None]
    counts = texts.lengths - np.maximum(texts.response_starts, 2)
    rows = training._plan(training._held_out, None)
    measured = sum(s.num_bases for batch in rows for row in batch for s in row)
    assert measured == sum(counts[9:]) > 0
    assert 1 <= found["coupled/accept_length"] <= 4


def test_the_vocabulary_is_that_of_the_training_texts(texts, pool):
    training = training_of(texts, pool)
    training.begin(DEVICES, engines.PARAMS)
    records = [texts.read(i) for i in range(9)]
    drawn = [r.tokens[r.response_start :] for r in records]
    weights = vocabulary.expected(records, engines.PARAMS.head)
    wanted = vocabulary.choose(weights, 12, (engines.EOS,))
    np.testing.assert_array_equal(training.learner.draft_ids, wanted)
    # Those drawn most are others.
    counts = vocabulary.drawn(records, engines.CFG.vocab_size)
    by_counts = vocabulary.choose(counts, 12, (engines.EOS,))
    assert by_counts.tolist() != wanted.tolist()
    kept = training.state()
    again = training_of(texts, pool)
    again.restore(kept, 0)
    np.testing.assert_array_equal(again.learner.draft_ids, wanted)
    # An older checkpoint tells by its texts: they were counted then.
    again = training_of(texts, pool)
    again.restore(dataclasses.replace(kept, meta={"num_skipped": 0}), 0)
    np.testing.assert_array_equal(again.learner.draft_ids, by_counts)
    row = training.about_texts()
    assert row["texts/num"] == 9
    assert row["texts/response_tokens"] == sum(map(len, drawn))
    held_out = [
        texts.read(i).tokens[texts.read(i).response_start :] for i in (9, 10, 11)
    ]
    known = np.isin(np.concatenate(held_out), wanted).mean()
    assert row["texts/draft_vocab_coverage"] == known < 1


def fake(outcomes):
    """A learner whose steps are skipped or not, as told."""

    def step(batch):
        yield None
        return {"skipped": np.int32(next(outcomes))}

    return types.SimpleNamespace(
        step=step, choose_vocabulary=lambda *given: None, sharpness=1.0
    )


def test_a_training_that_diverges_ends(texts):
    outcomes = iter([1] * 9 + [0] + [1] * 99)
    training = offline.OfflineTraining(
        fake(outcomes), texts, seed=SEED, eos_ids=(), **SIZES
    )
    taken = []
    with pytest.raises(failures.TrainingError, match="10 updates in a row.*texts/ can"):
        taken.extend(training.steps(99))
    # The tenth in a row is the twentieth step, which is looked at after the next.
    assert len(taken) == 20 and training.num_steps == 21


def test_texts_without_a_base_are_no_texts(tmp_path):
    texts = shards.Shards(tmp_path, "float32")
    texts.append(
        [
            layout.Record(
                text_id=1,
                tokens=np.arange(4, dtype=np.int32),
                response_start=4,
                hidden=np.zeros((4, 16), np.float32),
                features=np.zeros((4, 32), np.float32),
                key=np.zeros(2, np.uint32),
            )
        ]
    )
    with pytest.raises(ValueError, match="no text has a position to draft from"):
        offline.OfflineTraining(fake(iter(())), texts, seed=0, eos_ids=(), **SIZES)
