"""An evaluation says the same, however many engines share it."""

import contextlib
import itertools
import threading
import types

import numpy as np
import pytest

from tests.rl import engines
from tlt_jax.rl import evaluator
from tlt_jax.rl.tasks import prompts
from tlt_jax.runtime import distributed
from tlt_jax.settings import sections

SAMPLES = 3


class Rewards:
    """Judges by the text's length; keeps what it was asked."""

    def __init__(self):
        self.judged = []

    def score(self, pairs):
        self.judged = [(example, tuple(text)) for example, text in pairs]
        found = [len(text) % 2 for _, text in self.judged]
        return types.SimpleNamespace(rewards=np.array(found, np.float32))


class Group:
    """Two processes, of which the other one was left without workers, or this one."""

    num = 2

    def __init__(self, index, others):
        self.index, self.others = index, others

    def first(self, name, make):
        return make()

    def exchange(self, name, own):
        found = [self.others[name]] * 2
        found[self.index] = own
        return found

    gather = exchange


def evaluator_of(some_engines, rewards, group=None, used=None):
    rng = np.random.default_rng(7)
    asked = [
        prompts.Prompt(i, f"example {i}", rng.integers(3, 32, 4 + i).astype(np.int32))
        for i in range(5)
    ]
    cfg = sections.Eval(samples=SAMPLES, k=(1, 2))
    prompt_set = types.SimpleNamespace(prompts=asked)
    used = used or [True] * len(some_engines)
    policy = types.SimpleNamespace(params=engines.PARAMS, version=4)
    workers = types.SimpleNamespace(
        group=group or distributed.alone(),
        engines=[policy] * len(used),
        first=10,
        lost={10 + i: "it fell silent" for i, use in enumerate(used) if not use},
    )
    return evaluator.Evaluator(
        *(cfg, 12, 3, prompt_set, workers, some_engines, rewards, tuple)
    )


@pytest.fixture(scope="module")
def first():
    made = engines.engine_of()
    yield made
    made.pool.close()


def evaluate(first, used):
    """Judge by so many engines; return row, texts, and the engines at work."""
    team = [first, *(engines.engine_of(first.pool) for _ in used[1:])]
    at_work = set()
    # They begin together: else one may have answered all before another has begun.
    together = threading.Barrier(sum(used), timeout=60)
    for number, engine in enumerate(team):

        def serve(*args, engine=engine, number=number, **options):
            together.wait()
            stats = type(engine).serve(engine, *args, **options)
            if stats.num_tokens:
                at_work.add(number)
            return stats

        engine.serve = serve
    rewards = Rewards()
    row = evaluator_of(team, rewards, used=used).evaluate()
    del first.serve
    return row, rewards.judged, at_work


def test_engines_share_the_prompts_and_change_no_answer(first):
    row, judged, at_work = evaluate(first, [True])
    assert at_work == {0} and len(judged) == 5 * SAMPLES
    assert set(row) == {f"eval/avg@{SAMPLES}", "eval/pass@1", "eval/pass@2"}
    assert 0 < row["eval/avg@3"] < 1
    assert evaluate(first, [True] * 3) == (row, judged, {0, 1, 2})
    # An engine that is lost has no part.
    assert evaluate(first, [True, False, True]) == (row, judged, {0, 2})


def test_an_evaluation_is_decoded_aside(first):
    """What it teaches, tuners and stores of texts forget."""
    log = []
    other = engines.engine_of(first.pool)
    for name, engine in (("first", first), ("other", other)):

        @contextlib.contextmanager
        def aside(name=name):
            log.append(f"{name} aside")
            yield
            log.append(f"{name} back")

        def serve(*args, engine=engine, name=name, **options):
            log.append("serves")
            return type(engine).serve(engine, *args, **options)

        engine.aside, engine.serve = aside, serve
    evaluator_of([first, other], Rewards()).evaluate()
    del first.aside, first.serve
    assert log[:2] == ["first aside", "other aside"] and "serves" in log[2:-2]
    assert sorted(log[-2:]) == ["first back", "other back"]


def test_an_engine_that_fails_ends_the_evaluation(first):
    other = engines.engine_of(first.pool)

    def fail(*_, **__):
        raise OSError("the device is gone")

    other.serve = fail
    with pytest.raises(OSError, match="the device is gone"):
        evaluator_of([first, other], Rewards()).evaluate()


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_without_engines_leaves_its_prompts_to_the_others(first, index):
    alone = Rewards()
    expected = evaluator_of([first], alone).evaluate()
    nothing = ([], np.zeros(0, np.float32))
    group = Group(index, {"evaluators": False, "evaluation": nothing})
    rewards = Rewards()
    made = evaluator_of([first], rewards, group)
    assert made.evaluate() == expected
    assert rewards.judged == alone.judged
    # The other way round: what is judged elsewhere is all there is.
    scores = np.array([len(text) % 2 for _, text in alone.judged], np.float32)
    everything = (list(range(len(scores))), scores)
    group = Group(index, {"evaluators": True, "evaluation": everything})
    rewards = Rewards()
    made = evaluator_of([first], rewards, group, used=[False])
    assert made.evaluate() == expected and not rewards.judged


@pytest.mark.parametrize("num_right", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_counts_the_subsets(num_right, k):
    correct = np.arange(5) < num_right
    subsets = list(itertools.combinations(correct, k))
    assert evaluator.pass_at_k(correct[None], k) == pytest.approx(
        sum(map(any, subsets)) / len(subsets), abs=1e-12
    )


def test_pass_at_k_literals():
    # 1 - C(7, 5) / C(10, 5) = 1 - 21 / 252.
    correct = np.arange(10)[None] < 3
    assert evaluator.pass_at_k(correct, 5) == pytest.approx(11 / 12)
    # Problems count equally: (11/12 + 0) / 2.
    both = np.concatenate([correct, np.zeros((1, 10), bool)])
    assert evaluator.pass_at_k(both, 5) == pytest.approx(11 / 24)


def test_pass_at_k_stays_exact_with_many_samples():
    correct = np.zeros((1, 10_000), bool)
    correct[0, 0] = True
    assert evaluator.pass_at_k(correct, 100) == pytest.approx(0.01, rel=1e-9)


def test_the_interval_of_two_prompts_by_hand():
    # Of the four draws of two prompts, one in four has the wrong one twice.
    assert evaluator.bootstrap(np.array([0.0, 1.0])) == (0.0, 1.0)
    assert evaluator.bootstrap(np.array([0.25])) == (0.25, 0.25)
    assert evaluator.bootstrap(np.full(50, 0.5)) == (0.5, 0.5)


def test_the_interval_is_that_of_all_draws():
    values = np.array([0.0, 0.0, 0.3, 1.0, 1.0])
    means = [np.mean(draw) for draw in itertools.product(values, repeat=5)]
    # 3,125 draws, equally likely; 2.5 % of them are below, and above.
    exact = np.quantile(means, [0.025, 0.975])
    assert evaluator.bootstrap(values) == pytest.approx(tuple(exact), abs=1e-12)
    assert exact == pytest.approx([0.06, 0.86])
    assert evaluator.bootstrap(values) == evaluator.bootstrap(values.copy())


def test_the_interval_of_many_prompts_is_the_normal_one():
    values = (np.arange(400) < 100).astype(float)
    low, high = evaluator.bootstrap(values)
    error = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert (low, high) == pytest.approx((0.25 - error, 0.25 + error), abs=0.005)


def test_rows_and_their_intervals_have_the_same_names():
    rewards = np.array([[1.0, 0.0], [0.5, 0.5], [1.0, 1.0]], np.float32)
    row = evaluator.rewards_row(rewards, (1, 2))
    assert row == pytest.approx({"avg@2": 4 / 6, "pass@1": 0.5, "pass@2": 2 / 3})
    found = evaluator.intervals(rewards, (1, 2))
    assert found.keys() == row.keys()
    # Prompts are drawn, with all their samples: the half-right ones never mix.
    assert found["avg@2"] == evaluator.bootstrap(np.array([0.5, 0.5, 1.0]))
    assert found["pass@1"] == evaluator.bootstrap(np.array([0.5, 0.0, 1.0]))
    assert found["pass@2"] == evaluator.bootstrap(np.array([1.0, 0.0, 1.0]))
