"""What an update does with its batch, told by a learner that writes it down."""

import dataclasses
import json
import types as python_types

import jax
import numpy as np
import pytest

from tests import tiny_runs
from tests.rl import engines
from tlt_jax import types
from tlt_jax.rl.tasks import prompts
from tlt_jax.rl.update import experience, updater
from tlt_jax.runtime import failures
from tlt_jax.runtime import watch as watch_lib

P, R = 4, 2
# Of completion i, whose tokens are 10 i, 10 i + 1, ...
LENGTHS = (3, 1, 2, 4, 1, 1, 5, 2)
REWARDS = np.array([[1.0, 0.0], [0.0, 4.0], [3.0, 1.0], [0.0, 8.0]])
# Subtracts the group's mean, and nothing else.
PLAIN = {"algorithm.name": "dr_grpo"}
ADVANTAGES = [0.5, -0.5, -2.0, 2.0, 1.0, -1.0, -4.0, 4.0]


def law(model, tokens):
    """Log-probabilities of tokens by a model; all different."""
    return (
        -np.asarray(tokens, np.float64) / 64
        - {"rollout": 0, "now": 2, "first": 4}[model]
    )


def batch_of(groups=range(P)):
    return experience.Experience(
        [
            prompts.Prompt(i, None, np.arange(90, 92 + i, dtype=np.int32))
            for i in range(P)
        ],
        [
            types.Completion(i, tokens, law("rollout", tokens), "eos")
            for i, tokens in enumerate(
                np.arange(10 * i, 10 * i + n, dtype=np.int32)
                for i, n in enumerate(LENGTHS)
            )
        ],
        REWARDS,
    ).select(list(groups))


@dataclasses.dataclass(frozen=True)
class State:
    """Of a learner whose weights are a number of updates."""

    params: object


class FakeLearner:
    """Computes `law`, and writes down what it is given."""

    rows_per_micro_batch = 2

    def __init__(self, *given, **settings):
        self.given, self.settings = given, settings
        self.updates, self.passes, self.prepared = [], [], []
        self.skips = []

    def logprobs(self, params, parts, routes=None):
        self.passes.append(params)
        model = "first" if params == "first" else "now"
        return [np.where(part.valid, law(model, part.target), np.nan) for part in parts]

    def update(self, state, micro, cfg):
        number = len(self.updates)
        self.updates.append((state.params, micro, cfg))
        record = {
            "policy/loss": 1.0 + number,
            "policy/update_skipped": float(self.skips.pop(0) if self.skips else 0),
        }
        trained = [law("rollout", batch.rows.target) + 0.25 + number for batch in micro]
        return State((state.params[0] + 1,)), record, trained

    def prepare(self, batch, cfg, *, with_logprobs):
        self.prepared.append((batch, cfg, with_logprobs))

    def digest(self, params):
        return f"digest of {params}"


class Told(watch_lib.Silent):
    """What people see of an update."""

    def __init__(self):
        self.stages, self.notes = [], []

    def stage(self, name):
        self.stages.append(name)

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(updater.learner_lib, "Learner", FakeLearner)
    made = []

    def build(**settings):
        run = tiny_runs.config_of(
            **{
                "rollout.prompts_per_step": P,
                "rollout.group_size": R,
                "learner.row_tokens": 32,
            }
            | PLAIN
            | settings
        )
        one = updater.Updater(
            engines.CFG,
            algorithm=run.algorithm,
            rollout=run.rollout,
            learner=run.learner,
            optimizer=run.optimizer,
            mesh=run.mesh,
            law="the law",
            num_steps=run.num_steps,
            precision=run.precision,
            remat=run.model.remat,
            max_prompt_tokens=run.task.max_prompt_tokens,
        )
        one.train_state, one.told = State((0,)), Told()
        if one.needs_reference:
            one.reference = "first"
        made.append(one)
        return one

    yield build
    for one in made:
        one.pool.close()


def test_settings_reach_the_learner(make):
    made = make(**{"model.remat": "dots", "optimizer.beta1": 0.5, "num_steps": 9})
    _, law, learner, optimizer = made.learner.given
    assert law == "the law" and learner.row_tokens == 32 and optimizer.beta1 == 0.5
    settings = made.learner.settings
    assert settings.pop("pool") is made.pool
    assert dict(settings.pop("mesh").shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert settings.pop("flash") is None  # on a CPU
    assert settings == {"num_steps": 9, "precision": "float32", "remat": "dots"}


def test_with_a_flash_kernel_every_answer_has_its_prompt(make, monkeypatch):
    asked = []

    def choose(*given):
        asked.append(given)
        return "flash"

    columns = []
    for chosen in (choose, lambda *given: None):
        monkeypatch.setattr(updater.flash_attention, "choose", chosen)
        made = make(**{"learner.attention": "portable"})
        update(made)
        ((_, micro, _),) = made.learner.updates
        prefixes = [row for m in micro for row in m.rows.prefix if row.max() >= 0]
        columns.append([int(np.sum(row >= 0)) for row in prefixes])
        assert made.learner.settings["flash"] == ("flash" if chosen is choose else None)
    assert sum(columns[0]) > sum(columns[1])
    ((name, model, precision, _, _, lengths),) = asked
    assert (name, model, precision) == ("portable", engines.CFG, "float32")
    assert (lengths.group_size, lengths.row) == (R, 32)
    assert lengths.prompt >= 1 and lengths.answer >= 1


def flat(micro, name):
    """A column of all predictions, in order of tokens, or None."""
    found = {}
    for batch in micro:
        values = getattr(batch.columns, name)
        if values is None:
            return None
        valid = np.asarray(batch.columns.valid)
        tokens = np.asarray(batch.rows.target)[valid]
        found.update(zip(tokens.tolist(), values[valid].tolist(), strict=True))
    return [value for _, value in sorted(found.items())]


def tokens_of(completions):
    return [10 * i + j for i in completions for j in range(LENGTHS[i])]


def spread(values, completions):
    return [values[i] for i in completions for _ in range(LENGTHS[i])]


def update(made, batch=None, watch=None):
    watch = watch or watch_lib.Watch((), made.told, step=6)
    return made.update(batch or batch_of(), watch)


ALL = range(P * R)


def test_one_update_of_the_whole_batch(make):
    made = make()
    row = update(made)
    ((params, micro, cfg),) = made.learner.updates
    assert params == (0,) and cfg == made.algorithm.loss
    assert flat(micro, "advantages") == spread(ADVANTAGES, ALL)
    # `constant`: by eight completions and the longest length.
    assert flat(micro, "weights") == pytest.approx([1 / (8 * 6)] * sum(LENGTHS))
    # The policy has not moved, nothing compares with it, and no pass was taken.
    for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs"):
        assert flat(micro, name) is None
    assert made.learner.passes == []
    assert row == {
        "policy/loss": 1.0,
        "policy/update_skipped": 0.0,
        "mismatch/logprob_max_abs": pytest.approx(0.25),
        "policy/weights_digest": "digest of (1,)",
    }
    assert made.train_state == State((1,)) and made.skips.in_a_row == 0
    assert (
        made.told.stages == ["inference", "update", "update"] and made.told.notes == []
    )


def test_three_kinds_of_logprobs_each_in_its_place(make):
    made = make(
        **{
            "algorithm.importance_cap": 2.0,
            "algorithm.kl_coef": 0.1,
            "learner.epochs": 2,
        }
    )
    row = update(made)
    assert len(made.learner.updates) == 2
    for number, (params, micro, _) in enumerate(made.learner.updates):
        assert params == (number,)
        tokens = tokens_of(ALL)
        for name, model in (
            # Old are those before the first update, in the second pass too.
            ("old_logprobs", "now"),
            ("rollout_logprobs", "rollout"),
            ("ref_logprobs", "first"),
        ):
            expected = law(model, tokens).astype(np.float32).tolist()
            assert flat(micro, name) == expected, name
    # The reference's and then the policy's own, once for both epochs.
    assert made.learner.passes == ["first", (0,)]
    assert row["policy/loss"] == 1.5
    # By the pass that the weights that rolled out took.
    assert row["mismatch/logprob_max_abs"] == pytest.approx(2.0)
    assert row["policy/weights_digest"] == "digest of (2,)"


def test_of_older_weights_the_trainers_own_logprobs_stand_for_the_recorded(make):
    made, told = make(**{"rollout.lag": 1, "learner.epochs": 2}), Told()
    assert made.algorithm.loss.importance_cap == 2.0
    assert make(**{"algorithm.importance_cap": 5.0}).algorithm.loss.importance_cap == 5
    assert make().algorithm.loss.importance_cap is None
    batch = batch_of((2, 0))
    found, mismatch = made.behaviour("first", batch, watch_lib.Watch((), told))
    assert made.learner.passes == ["first"] and told.stages == ["inference"]
    # All that is compared: -t / 64 - 4 with the recorded -t / 64.
    assert mismatch == pytest.approx(4.0)
    assert [c.request_id for c in found.completions] == [4, 5, 0, 1]
    for mine, recorded in zip(found.completions, batch.completions, strict=True):
        np.testing.assert_allclose(mine.logprobs, law("first", mine.tokens))
        np.testing.assert_array_equal(recorded.logprobs, law("rollout", mine.tokens))
    row = update(made, found)
    for _, micro, _ in made.learner.updates:
        tokens = sorted(tokens_of((4, 5, 0, 1)))
        for name, model in (("old_logprobs", "now"), ("rollout_logprobs", "first")):
            expected = law(model, tokens).astype(np.float32).tolist()
            assert flat(micro, name) == expected, name
    # The weights have moved since: there is nothing that it could be compared with.
    assert "mismatch/logprob_max_abs" not in row


def test_recorded_logprobs_are_those_of_the_policy_that_rolled_out(make):
    made = make(**{"rollout.lag": 1, "learner.old_logprobs": "rollout"})
    batch = batch_of()
    assert made.behaviour("first", batch, watch_lib.Watch()) == (batch, None)
    update(made, batch)
    ((_, micro, _),) = made.learner.updates
    recorded = law("rollout", tokens_of(ALL)).astype(np.float32).tolist()
    assert flat(micro, "old_logprobs") == flat(micro, "rollout_logprobs") == recorded
    assert made.learner.passes == []


@pytest.mark.parametrize("epochs", [1, 2])
def test_old_logprobs_may_be_the_rollouts(make, epochs):
    settings = {"learner.old_logprobs": "rollout", "learner.epochs": epochs}
    made = make(**settings)
    update(made)
    for _, micro, _ in made.learner.updates:
        expected = law("rollout", tokens_of(ALL)).astype(np.float32).tolist()
        assert flat(micro, "old_logprobs") == expected
        assert flat(micro, "rollout_logprobs") is None
    assert made.learner.passes == []


def test_a_reference_may_change_the_rewards(make):
    settings = {"algorithm.kl_coef": 0.25, "algorithm.kl_estimator": "k1"}
    made = make(**settings, **{"algorithm.kl_placement": "reward"})
    update(made)
    ((_, micro, _),) = made.learner.updates
    # The rollout's law lies 4 nats above the reference's at every token: one less for
    # each token of a completion.
    rewards = REWARDS - np.reshape(LENGTHS, (P, R))
    expected = (rewards - rewards.mean(1, keepdims=True)).reshape(-1)
    assert flat(micro, "advantages") == pytest.approx(spread(expected, ALL))


def test_minibatches_are_whole_groups_in_order_again_in_every_epoch(make):
    made = make(**{"learner.minibatches": 2, "learner.epochs": 2})
    update(made)
    halves = [range(4), range(4, 8)]
    assert len(made.learner.updates) == 4
    for (_, micro, _), chosen in zip(made.learner.updates, 2 * halves, strict=True):
        assert flat(micro, "advantages") == spread(ADVANTAGES, chosen)
        expected = law("now", tokens_of(chosen)).astype(np.float32).tolist()
        assert flat(micro, "old_logprobs") == expected
        # The weights are of a minibatch: four completions of at most six tokens.
        assert flat(micro, "weights")[0] == pytest.approx(1 / (4 * 6))


def test_the_mismatch_is_that_of_every_minibatch(make):
    made = make(**{"learner.minibatches": 2})
    told, off = made.learner.logprobs, 0.0

    def logprobs(params, parts, routes):
        # Of the last completion's last token, which the second minibatch has.
        last = 10 * (P * R - 1) + LENGTHS[-1] - 1
        found = told(params, parts, routes)
        return [x + off * (p.target == last) for x, p in zip(found, parts, strict=True)]

    made.learner.logprobs = logprobs
    for off in (0.0, -0.5):
        row = update(made)
        assert row["mismatch/logprob_max_abs"] == pytest.approx(2.0 - off)
    # Without that pass the first alone is trained by the weights that rolled out.
    made = make(**{"learner.minibatches": 2, "learner.old_logprobs": "rollout"})
    assert update(made)["mismatch/logprob_max_abs"] == pytest.approx(0.25)


def test_groups_that_are_left_are_spread_over_the_minibatches(make):
    """Dynamic sampling may leave fewer, and none may be lost."""
    made = make(**{"learner.minibatches": 4})
    update(made, batch_of([3, 0, 1]))
    targets = [flat(micro, "advantages") for _, micro, _ in made.learner.updates]
    assert targets == [spread(ADVANTAGES, pair) for pair in ((6, 7), (0, 1), (2, 3))]
    made = make(**{"learner.minibatches": 2})
    update(made, batch_of([2, 1, 3]))
    targets = [flat(micro, "advantages") for _, micro, _ in made.learner.updates]
    assert [len(values) for values in targets] == [2 + 6, 7]


def test_seconds_are_told_by_stage(make, monkeypatch):
    made = make(**{"algorithm.kl_coef": 0.1, "learner.epochs": 2})
    now = [0.0]
    fake = python_types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(watch_lib, "time", fake)

    def takes(name, seconds):
        method = getattr(made.learner, name)

        def slow(*arguments):
            now[0] += seconds
            return method(*arguments)

        setattr(made.learner, name, slow)

    takes("logprobs", 1.0)
    takes("update", 10.0)
    takes("digest", 100.0)
    watch = watch_lib.Watch()
    update(made, watch=watch)
    # Two passes; two updates and the digest of what they gave.
    assert watch.row()["time/inference_s"] == 2.0
    assert watch.row()["time/update_s"] == 120.0


def test_updates_that_are_skipped_in_a_row_are_counted(make):
    made = make(**{"learner.epochs": 2})
    made.learner.skips = [0, 1, 1, 0, 1, 1, 1]
    row = update(made)
    assert made.skips.in_a_row == 1 and row["policy/update_skipped"] == 0.5
    # One more, over the step's end, and then one that is finite.
    update(made)
    assert made.skips.in_a_row == 0
    told = "  step 7: loss or gradient is not finite; update skipped ({} in a row)."
    assert made.told.notes == [told.format(n) for n in (1, 2)]
    update(made)
    assert made.skips.in_a_row == 2
    with pytest.raises(failures.TrainingError, match="^3 updates in a row were not"):
        update(made)
    assert made.told.notes[-1] == told.format(3)


def test_a_resumed_run_counts_on(make):
    before, made = make(), make()
    for _ in range(2):
        before.learner.skips = [1]
        update(before)
    made.restore(json.loads(json.dumps(before.state())))
    assert made.skips.in_a_row == 2
    made.learner.skips = [1]
    with pytest.raises(failures.TrainingError, match="^3 updates in a row"):
        update(made)


def form(batch):
    """What decides which program a micro-batch takes."""
    shapes = jax.tree.map(np.shape, (batch.rows, batch.columns))
    absent = [value is None for value in vars(batch.columns).values()]
    return str(shapes), absent, batch.num_sequences


@pytest.mark.parametrize(
    "settings,passes",
    [
        ({}, False),
        ({"learner.epochs": 2}, True),
        ({"learner.minibatches": 2}, True),
        ({"learner.epochs": 2, "learner.old_logprobs": "rollout"}, False),
        ({"learner.old_logprobs": "rollout"}, False),
        ({"algorithm.kl_coef": 0.1}, True),
        ({"algorithm.importance_cap": 2.0}, False),
        ({"rollout.lag": 1}, True),
        ({"rollout.lag": 1, "learner.old_logprobs": "rollout"}, False),
    ],
)
def test_what_is_compiled_before_is_what_updates_take(make, settings, passes):
    made = make(**settings)
    made.warm_up(wait=False)
    prepared = made.learner.prepared
    assert [batch.rows.tokens.shape for batch, _, _ in prepared] == [
        (2, width) for width in (32, 24, 16, 8)
    ]
    assert {cfg for _, cfg, _ in prepared} == {made.algorithm.loss}
    assert {with_logprobs for _, _, with_logprobs in prepared} == {passes}
    batch = batch_of()
    if "rollout.lag" in settings:
        batch, _ = made.behaviour((0,), batch, watch_lib.Watch())
    update(made, batch)
    assert bool(made.learner.passes) == passes
    forms = [form(batch) for batch, _, _ in prepared]
    for _, micro, _ in made.learner.updates:
        for batch in micro:
            assert form(batch) in forms


def test_compiling_is_waited_for_if_that_is_asked(make, monkeypatch):
    made, waits = make(), []
    monkeypatch.setattr(made.pool, "wait", lambda: waits.append(1))
    made.warm_up(wait=False)
    assert not waits
    made.warm_up(wait=True)
    assert waits == [1]
