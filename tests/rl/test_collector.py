"""Collecting a step's experience: whose reward is whose, and what is sampled again."""

import json
import random

import numpy as np

from tests import tiny_runs
from tlt_jax import types
from tlt_jax.rl import collector
from tlt_jax.rl.engine import stats as rollout_stats
from tlt_jax.rl.tasks import prompts, reward_pool
from tlt_jax.runtime import distributed
from tlt_jax.runtime import watch as watch_lib

P, R = 4, 4  # As in `tiny_runs`.


class FakeEngine:
    """Draws completions whose first token is the request, and ends them in disorder."""

    group = distributed.alone()

    def __init__(self):
        self.calls = []

    def run(self, requests, seed, *, expected_lengths, on_completion, on_call):
        self.calls.append((requests, seed, dict(expected_lengths)))
        done = [self.complete(request) for request in requests]
        for i in random.Random(0).sample(range(len(done)), len(done)):
            on_completion(done[i])
            on_call(i, i)
        return done, rollout_stats.RolloutStats(
            num_steps=5, num_row_steps=7, prefill_s=0.5
        )

    def complete(self, request):
        length = 1 + request.prompt_id % 3 + request.sample
        tokens = np.full(length, request.request_id % 2**31, np.int32)
        zeros = np.zeros(length, np.float32)
        return types.Completion(request.request_id, tokens, zeros, "eos")


def words(tokens):
    return " ".join(str(token) for token in tokens)


def by_sample(example, text):
    """Rewards differ within a group, and tell which request was judged."""
    del example
    return float(text.split()[0])


def signal_in(*prompt_ids):
    """A reward that differs within the groups of some prompts only."""

    def judge(example, text):
        telling = example.metadata["prompt_id"] in prompt_ids
        return float(text.split()[0]) if telling else 1.0

    return judge


def make(judge, dynamic_sampling=False, between=None):
    examples = [types.Example(f"e{i}", "", None, {"prompt_id": i}) for i in range(10)]
    prompt_set = prompts.PromptSet(
        examples,
        lambda example: np.array([example.metadata["prompt_id"]], np.int32),
        max_tokens=1,
        long_prompts="refuse",
    )
    engine, shown = FakeEngine(), Shown()
    made = collector.Collector(
        tiny_runs.config_of().rollout,
        3,
        prompt_set,
        engine,
        reward_pool.RewardPool(judge, 0),
        words,
        dynamic_sampling=dynamic_sampling,
        between=between or (lambda watch: None),
    )
    return made, engine, prompt_set, shown


class Shown(watch_lib.Silent):
    """Keeps what was said of the stages."""

    def __init__(self):
        self.said = []

    def stage(self, name):
        self.said.append((name,))

    def within(self, done, total, detail=""):
        self.said.append((done, total, detail))


def collect(made, step=0, shown=None):
    found = made.collect(step, watch_lib.Watch((), shown, step))
    return found.everything, found.useful, found.row()


def ids(drawn):
    return [prompt.prompt_id for prompt in drawn]


def test_each_reward_belongs_to_its_completion():
    made, engine, prompt_set, shown = make(by_sample)
    everything, batch, row = collect(made, 2, shown)
    assert batch is everything
    first = 2 << 32
    assert [c.request_id for c in batch.completions] == list(range(first, first + 16))
    np.testing.assert_array_equal(batch.rewards, np.arange(16.0).reshape(P, R))
    assert ids(batch.prompts) == ids(prompt_set.draw(0, P, seed=3))
    requests, seed, expected = engine.calls[0]
    assert seed == 3 and expected == {}
    assert [r.prompt_id for r in requests[::R]] == ids(batch.prompts)
    assert row["rollout/rounds"] == 1 and row["rollout/decode_steps"] == 5
    assert row["reward/num_failed"] == 0 and "reward/first_failure" not in row
    assert row["rollout/tokens"] == batch.lengths.sum()
    assert shown.said[0] == ("rollout",) and shown.said[-1] == ("reward",)
    assert {said[1] for said in shown.said[1:-1]} == {16}


def test_positions_advance_and_requests_are_never_the_same():
    made, engine, prompt_set, _ = make(by_sample)
    batches = [collect(made, step)[1] for step in range(3)]
    assert made.position == 3 * P
    drawn = [i for batch in batches for i in ids(batch.prompts)]
    assert drawn == ids(prompt_set.draw(0, 3 * P, seed=3))
    request_ids = [c.request_id for batch in batches for c in batch.completions]
    assert len(set(request_ids)) == 3 * P * R


def test_a_resumed_collector_goes_on():
    made, *_ = make(by_sample)
    for step in range(2):
        collect(made, step)
    other, engine, _, _ = make(by_sample)
    other.restore(json.loads(json.dumps(made.state())))
    assert other.state() == made.state()
    a, b = collect(made, 2)[1], collect(other, 2)[1]
    assert ids(a.prompts) == ids(b.prompts)
    assert [c.request_id for c in a.completions] == [
        c.request_id for c in b.completions
    ]


def test_the_engine_is_told_the_lengths_last_seen():
    made, engine, _, _ = make(by_sample)
    first = collect(made)[1]
    expected = {i: 1 + i % 3 + 1.5 for i in ids(first.prompts)}
    assert made.expected_lengths == expected
    collect(made, 1)
    assert engine.calls[1][2] == expected


def line(prompt_set):
    return ids(prompt_set.draw(0, 4 * P, seed=3))


def test_dynamic_sampling_goes_on_until_the_batch_is_full():
    _, _, prompt_set, _ = make(by_sample)
    order = line(prompt_set)
    # Of the first batch one group tells something, of the next ones all.
    useful = set(order[:10]) - {order[0], order[2], order[3]}
    made, engine, _, _ = make(signal_in(*useful), dynamic_sampling=True)
    everything, batch, row = collect(made, step=1)
    expected = [i for i in order[: 2 * P] if i in useful][:P]
    assert ids(batch.prompts) == expected and len(expected) == P
    assert row["rollout/rounds"] == len(engine.calls) == 2
    assert ids(everything.prompts) == order[: 2 * P]
    assert made.position == 2 * P
    # Requests of further rounds are numbered on.
    request_ids = [c.request_id for c in everything.completions]
    assert request_ids == list(range(1 << 32, (1 << 32) + 2 * P * R))
    # Records cover all that was sampled; rewards keep their completions.
    assert row["rollout/decode_steps"] == 10 and row["rollout/prefill_s"] == 1.0
    assert row["rollout/tokens"] == everything.lengths.sum()
    for group, rewards in zip(batch.groups(), batch.rewards, strict=True):
        assert rewards.tolist() == [int(r[0]) for r in group.responses]


def test_dynamic_sampling_gives_up_after_four_batches():
    made, engine, prompt_set, _ = make(signal_in(), dynamic_sampling=True)
    everything, batch, row = collect(made)
    assert batch is None
    assert row["rollout/rounds"] == len(engine.calls) == 4
    assert row["reward/zero_std_frac"] == 1.0
    assert made.position == 4 * P and ids(everything.prompts) == line(prompt_set)


def test_what_four_batches_gave_is_trained_on():
    _, _, prompt_set, _ = make(by_sample)
    lone = line(prompt_set)[0]
    made, *_ = make(signal_in(lone), dynamic_sampling=True)
    _, batch, row = collect(made)
    assert set(ids(batch.prompts)) == {lone} and 1 <= len(batch.prompts) < P
    assert row["rollout/rounds"] == 4


def test_without_dynamic_sampling_groups_stay_as_they_are():
    made, engine, _, _ = make(signal_in())
    _, batch, row = collect(made)
    assert len(batch.prompts) == P and row["rollout/rounds"] == 1


def test_failures_are_counted_over_rounds_and_the_first_is_named():
    def fails(example, text):
        raise RuntimeError(f"no verdict on {example.example_id}")

    made, *_ = make(fails, dynamic_sampling=True)
    _, batch, row = collect(made)
    assert batch is None
    assert row["reward/num_error"] == row["reward/num_failed"] == 4 * P * R
    assert row["reward/first_failure"].startswith("RuntimeError: no verdict on e")


def test_what_is_done_between_rollouts_is_done_there_alone():
    """Processes meet there: as often as there are further rollouts."""
    calls = []

    def between(watch):
        calls.append(len(engine.calls))

    made, engine, _, _ = make(lambda *_: 1.0, dynamic_sampling=True, between=between)
    _, batch, row = collect(made)
    assert batch is None and row["rollout/rounds"] == 4
    assert calls == [1, 2, 3]
