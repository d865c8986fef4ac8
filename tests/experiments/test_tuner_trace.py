"""A trace of a tiny engine, and that replaying it is what the engine did."""

import json

import jax
import numpy as np
import pytest

from experiments import tuner_trace
from experiments.lab import speculation_setting
from experiments.simulation import arm_replay, trace_file
from tests.experiments import test_speculation
from tlt_jax import policy, speculation
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import io as drafter_io
from tlt_jax.models.formats import convert
from tlt_jax.models.formats import tokenizer as model_tokenizer
from tlt_jax.rl.adaptation import offline_texts
from tlt_jax.rl.engine import speculator
from tlt_jax.specdec import strategy
from tlt_jax.specdec.texts import shards

CFG = test_speculation.CFG
D1, D2 = strategy.parse("D1K1V2"), strategy.parse("D2K1V3")
NEW_TOKENS = 14


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Texts of a random model, and the trace that the command makes of them."""
    folder = tmp_path_factory.mktemp("trace")
    tokenizer = model_tokenizer.from_alphabet(test_speculation.ALPHABET)
    tokenizer.chat_template = test_speculation.TEMPLATE
    tokenizer.save(folder / "tokenizer")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        # Flat laws: random drafts are accepted now and then.
        lambda w: 0.3 * rng.normal(size=w.shape).astype("f") / w.fan_in**0.5,
        model_params.describe(CFG),
    )
    model, workdir = folder / "model", folder / "workdir"
    convert.save(
        params, CFG, model, tokenizer_source=folder / "tokenizer", dtype="float32"
    )
    cfg = drafter.of_target(CFG, output_norm=False)
    drafter_io.save(
        workdir / "drafter", drafter.init(cfg, jax.random.key(0)), cfg, {"steps": 3}
    )
    capturing = speculator.SpeculatorConfig(strategy.Arms(()), cfg, capture=True)
    engine = policy.load(str(model)).engine(
        max_rows=2,
        max_length=16 + NEW_TOKENS,
        speculation=speculation.Speculation(capturing, params=None),
    )
    offline_texts.write(
        engine,
        [
            offline_texts.request_of(
                offline_texts.HELD_OUT + i,
                rng.integers(4, 90, 3 + i).astype(np.int32),
                NEW_TOKENS,
            )
            for i in range(3)
        ],
        shards.Shards(workdir / "texts", "float32"),
        seed=1000,
    )
    engine.pool.close()
    texts = {"dtype": "float32", "tasks": ["count"]}
    (workdir / "config.json").write_text(json.dumps({"texts": texts}))
    calls = []
    keep = tuner_trace.step_seconds

    def spy(given):
        calls.extend(given)
        return keep(given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner_trace, "step_seconds", spy)
        trace = tuner_trace.main(
            [
                f"--model={model}",
                f"--drafter={workdir}",
                f"--new-tokens={NEW_TOKENS}",
                f"--out={folder / 'out'}",
                "--arms=2:D1K1V2,D2K1V3",
                "--max-rows=2",
                "--calls=2",
                "--steps-per-call=4",
                "--max-levels=3",
                "--blends=0,1",
            ]
        )
    return trace, calls, folder / "out", shards.Shards(workdir / "texts", "float32")


def test_every_arm_of_every_bucket_was_measured(recorded):
    trace, *_ = recorded
    assert set(trace.step_s) == {(b, s) for b in (1, 2) for s in (None, D1, D2)}
    assert all(len(calls) >= 2 for calls in trace.step_s.values())
    assert all(s > 0 for calls in trace.step_s.values() for s in calls)


def test_a_file_says_the_same(recorded):
    trace, _, out, _ = recorded
    read = trace_file.read(out / "tuner_trace.jsonl")
    assert read.max_levels == 3 and set(read.step_s) == set(trace.step_s)
    for kind, seconds in trace.step_s.items():
        assert read.step_s[kind] == pytest.approx(seconds, abs=1e-6)
    assert list(read.lifetimes) == ["0", "1"]
    for name, texts in trace.lifetimes.items():
        for one, other in zip(texts, read.lifetimes[name], strict=True):
            np.testing.assert_array_equal(one, other)
    record = json.loads((out / "tuner_trace.json").read_text())
    assert record["settings"]["arms"] == "2:D1K1V2,D2K1V3"


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="name a file that experiments.tuner_trace"):
        trace_file.read(path)


class Scripted:
    """Chooses what was chosen before, and keeps what it is told."""

    def __init__(self, arms):
        self.arms, self.calls = list(arms), []

    def choose(self, num_rows):
        return self.arms[len(self.calls)]

    def record(self, call):
        self.calls.append(call)


def test_replaying_the_engines_choices_gives_its_calls(recorded):
    """Steps, tokens and acceptance of each call: from the texts' lifetimes alone."""
    trace, calls, _, buffer = recorded
    texts = [arm_replay.Text(lifetimes) for lifetimes in trace.lifetimes["1"]]
    assert [len(text) for text in texts] == [
        int(n) for n in buffer.lengths - buffer.response_starts
    ]
    machine = arm_replay.Machine(
        trace.step_s, strategy.parse_arms(("2:D1K1V2,D2K1V3",)), 2, tokens_per_call=4
    )
    # The first run: the prompts with the longest answers, the seed of the texts.
    longest = sorted(texts, key=lambda text: -len(text))
    tuner = Scripted(call.strategy for call in calls)
    rollout = arm_replay.Rollout(tuple(longest[:2]))
    replayed = [c.call for c in arm_replay.replay(machine, [rollout], tuner, 0)]
    assert len(replayed) >= 4
    accepted = 0
    for here, there in zip(replayed, calls, strict=False):
        assert (here.num_rows, here.bucket) == (there.num_rows, there.bucket)
        assert (here.num_steps, here.num_tokens) == (there.num_steps, there.num_tokens)
        if here.strategy is not None:
            assert here.num_accepted[0] == there.num_accepted[0]
            # Behind the end of a text the engine may go on to accept.
            assert all(
                a <= b
                for a, b in zip(here.num_accepted, there.num_accepted, strict=True)
            )
            accepted += sum(here.num_accepted[1:])
    assert accepted > 3


def test_texts_are_needed(recorded, tmp_path):
    with pytest.raises(ValueError, match="has no folder texts: name the workdir"):
        speculation_setting.texts_of(tmp_path)
