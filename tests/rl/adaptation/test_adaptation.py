"""A run's drafter: what survives a kill, when engines may use it, its versions."""

import dataclasses
import inspect
import json
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rl import engines
from tlt_jax import train
from tlt_jax.models.drafters import drafter
from tlt_jax.rl import rollouts
from tlt_jax.rl.adaptation import adaptation, spot_trainer, training
from tlt_jax.runtime import distributed, sharding
from tlt_jax.runtime import watch as watch_lib
from tlt_jax.settings import speculation
from tlt_jax.specdec import sampling
from tlt_jax.specdec.texts import layout

CFG = drafter.of_target(engines.CFG, feature_layers=(0, 1), draft_vocab_size=12)
SETTINGS = {"row_tokens": 24, "row_bases": 16, "head_chunk": 8, "piece_bases": 0}
PLAIN = sampling.SamplingConfig()


class Workers:
    """One engine's place in a run; writes down what it is offered."""

    def __init__(self, group=None):
        self.group = group or distributed.alone()
        self.num, self.first, self.version = self.group.num, 0, 0
        mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
        self.engines = [types.SimpleNamespace(mesh=mesh, params=engines.PARAMS)]
        self.on_text, self.capture_frac = None, 1.0
        self.offered = []

    def others(self):
        return self.engines[0].params

    def offer_drafter(self, params, version):
        self.offered.append((params, version))


class Tuner:
    """Writes down what it is told."""

    def __init__(self):
        self.told = []

    def changed(self, what):
        self.told.append(what)


@pytest.fixture
def make(tmp_path):
    """Makes adaptations, with their workers and a tuner, and closes them."""
    made = []

    def one(group=None, initial=None, law=PLAIN, rule="keyed", **settings):
        workers, tuner = Workers(group), Tuner()
        own = training.Training(
            speculation.Adaptation(**SETTINGS | settings),
            CFG,
            is_trained=initial is not None,
            eos_ids=(engines.EOS,),
            sampling_cfg=law,
            precision="float32",
            seed=3,
            directory=tmp_path,
            rule=rule,
            note=print,
        )
        one = adaptation.Adaptation(
            own, workers, [tuner], initial=initial, observer=watch_lib.Silent()
        )
        made.append(one)
        return one, workers, tuner

    yield one
    for adapted in made:
        adapted.close()


def text(number, version=0):
    rng = np.random.default_rng(number)
    length = 9 + number % 7
    return layout.Record(
        text_id=number,
        tokens=rng.integers(3, 32, length).astype(np.int32),
        response_start=2,
        hidden=rng.normal(size=(length, 16)).astype(np.float32),
        features=rng.normal(size=(length, 32)).astype(np.float32),
        key=rng.integers(0, 2**32, 2, dtype=np.uint32),
        version=version,
    )


def after_rollout(seconds=1.0):
    """The watch of a step whose rollout took so long."""
    watch = watch_lib.Watch()
    watch.spent["rollout"] = seconds
    return watch


def trained(make, **settings):
    """One that has taken two steps between a rollout and an update."""
    adapted, workers, tuner = make(max_frac=1e6, max_steps=2, **settings)
    adapted.start()
    for number in range(8):
        workers.on_text(text(number))
    adapted.end_rollout(2.5, after_rollout(1.0))
    return adapted, workers, tuner


def as_saved(snapshot):
    """What a checkpoint gives back: arrays on the host, and JSON."""
    meta = json.loads(json.dumps(snapshot.meta))
    arrays = {name: np.array(array) for name, array in snapshot.arrays.items()}
    return type(snapshot)(jax.device_get(snapshot.state), arrays, meta)


def test_everything_that_changes_survives_a_kill(make):
    before, workers, _ = trained(make)
    # Whatever training made of them: none has the value that it begins with.
    before.learner.sharpness, before.learner.tau = 2.0, 1.5
    before.is_ready = True
    before._offer()
    before._offer()
    state = as_saved(before.state())
    fresh = make()[0].state()
    assert state.meta.keys() == fresh.meta.keys()
    for name, value in state.meta.items():
        assert value != fresh.meta[name], name
    assert int(state.state.num_updates) == 2
    for name, array in state.arrays.items():
        begun = fresh.arrays.get(name)
        if name not in ("buffer.version", "sampler.owed"):
            assert begun is None or not np.array_equal(array, begun), name

    after, others, _ = make()
    after.restore(state)
    again = after.state()
    assert again.meta == state.meta
    assert again.arrays.keys() == state.arrays.keys() > fresh.arrays.keys()
    for name, array in state.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array, err_msg=name)
        assert again.arrays[name].dtype == array.dtype, name
    jax.tree.map(np.testing.assert_array_equal, again.state, state.state)
    # The engines get the same weights again, which is no new version.
    after.start()
    assert [version for _, version in others.offered] == [2]
    jax.tree.map(
        np.testing.assert_array_equal, others.offered[-1][0], workers.offered[-1][0]
    )


def test_other_processes_go_on_without_the_first_ones_texts(make):
    before, _, _ = trained(make)
    state = before.state()
    given = before.for_others(state)
    assert set(given.arrays) == {"draft_ids"} and given.meta == state.meta
    after, _, _ = make()
    after.restore(as_saved(given))
    assert len(after.buffer) == 0 and after.learner.num_updates == 2
    np.testing.assert_array_equal(after.learner.draft_ids, before.learner.draft_ids)


def test_training_between_rollout_and_update_is_judged_and_recorded(make):
    adapted, _, _ = trained(make)
    assert adapted.budget.gain_per_s is not None and adapted.budget.num_idle == 0
    # The tokens that end a text can always be proposed.
    assert len(adapted.learner.draft_ids) == 12
    assert engines.EOS in adapted.learner.draft_ids
    row = adapted.row()
    assert row["drafter/num_steps"] == row["drafter/num_updates"] == 2
    assert row["drafter/texts"] == 8 and row["drafter/texts_bytes"] > 0
    # The next step's record begins anew.
    assert adapted.row()["drafter/num_steps"] == 0


@pytest.mark.parametrize(
    ("without", "measured", "ready"),
    [
        (2.0, None, False),
        (2.0, 1.9, False),
        (2.0, 2.0, False),
        (2.0, 2.1, True),
        # Plain decoding accepts one token a step, whatever a rollout without drafts
        # says.
        (0.0, 1.0, False),
        (0.0, 1.1, True),
    ],
)
def test_engines_get_the_drafter_once_it_is_the_better_one(
    make, without, measured, ready
):
    adapted, workers, tuner = make(enabled=False)
    adapted.start()
    if measured is not None:
        adapted.trainer.report.measured = {"coupled/accept_length": measured}
    adapted.end_rollout(without, after_rollout())
    assert adapted.is_ready == ready
    assert [version for _, version in workers.offered] == [1] * ready
    assert tuner.told == ["drafter"] * ready
    assert adapted.state().meta["ngram_accept_length"] == without
    # Once ready it stays so, and is offered no second time.
    adapted.end_rollout(99.0, after_rollout())
    assert adapted.is_ready == ready and len(workers.offered) == ready


def test_by_a_chain_rule_counted_trainings_heed_no_clock(make):
    settings = {"max_frac": 1e-9, "max_steps": 3}
    for rule, num_steps in (("block", [3, 3, 3]), ("keyed", [1, 0, 0])):
        adapted, workers, _ = make(rule=rule, **settings)
        adapted.start()
        for number in range(8):
            workers.on_text(text(number))
        rows = []
        for _ in range(3):
            # What was worth nothing is not tried again, but where steps are counted.
            adapted.end_rollout(2.5, after_rollout(1.0))
            adapted.budget = dataclasses.replace(adapted.budget, gain_per_s=-1.0)
            rows.append(adapted.row())
        assert [row["drafter/num_steps"] for row in rows] == num_steps
        # Its texts were not drawn by the noise that drafts would be ranked by.
        assert ("drafter/sharpness" in rows[0]) == (rule == "keyed")
        assert rows[0]["drafter/ready"] or rule == "keyed"


def test_under_another_law_the_first_update_decides(make):
    adapted, workers, _ = make(enabled=False, law=sampling.SamplingConfig(0.7))
    adapted.start()
    adapted.trainer.report.measured = {"coupled/accept_length": 9.0}
    adapted.end_rollout(1.0, after_rollout())
    assert not adapted.is_ready and not workers.offered
    state = adapted.learner.state
    adapted.learner.state = state.replace(num_updates=np.int32(1))
    adapted.end_rollout(1.0, after_rollout())
    assert adapted.is_ready and adapted.version == 1


def test_versions_count_offers_of_a_ready_drafter(make):
    adapted, workers, tuner = make()
    adapted.start()
    adapted._publish()
    assert adapted.version == 0 and not workers.offered
    adapted.is_ready = True
    for version in (1, 2, 3):
        adapted._publish()
        assert adapted.version == version == workers.offered[-1][1]
    assert tuner.told == ["drafter"] * 3


def test_a_trained_drafter_is_offered_at_once(make):
    initial = drafter.init(CFG, jax.random.key(1), jnp.float32)
    ids = jnp.arange(2, 14)
    initial = initial.replace(
        draft_ids=ids, sharpness=np.float32(1.5), tau=np.float32(2.5)
    )
    adapted, workers, _ = make(initial=initial, capture_frac=0.25)
    adapted.start()
    ((params, version),) = workers.offered
    assert version == 1 and adapted.is_ready
    assert (params.sharpness, params.tau) == (1.5, 2.5)
    jax.tree.map(np.testing.assert_array_equal, params, initial)
    assert workers.capture_frac == 0.25


def test_a_new_target_is_told_once(make):
    adapted, workers, tuner = make(max_age=0)
    adapted.start()
    adapted.begin_rollout()
    assert tuner.told == []
    workers.on_text(text(1))
    workers.version = 2
    adapted.begin_rollout()
    adapted.begin_rollout()
    assert tuner.told == ["target"] and len(adapted.buffer) == 0


def test_what_another_process_learned_is_taken_over(make):
    learned = []

    class Group(distributed.Group):
        def gather(self, topic, given):
            return [given, learned[0]]

    adapted, workers, _ = make(Group(0, 2))
    adapted.trainer.start = lambda: None
    adapted.start()
    adapted.is_ready = True
    other = jax.tree.map(lambda x: x + 1, adapted.learner.state)
    ids = np.arange(3, 15)
    report = spot_trainer.Report(num_steps=3)
    learned.append((report, 7, (other, ids, 1.25, 0.75)))
    adapted.hand_over(watch_lib.Watch())
    assert adapted.learner.state is other and adapted.learner.draft_ids is ids
    # The other one's newest version was 7, and this is a newer one.
    assert adapted.version == 8 == workers.offered[-1][1]
    params = workers.offered[-1][0]
    assert (params.sharpness, params.tau) == (1.25, 0.75)
    assert adapted.row()["drafter/num_steps"] == 3


def test_no_adaptation_answers_as_one_does():
    nobody, one = adaptation.NoAdaptation, adaptation.Adaptation
    methods = dict(inspect.getmembers(nobody, inspect.isfunction))
    for name, method in methods.items():
        given = inspect.signature(method).parameters
        wanted = inspect.signature(getattr(one, name)).parameters
        kinds = [[p.kind for p in x.values()] for x in (given, wanted)]
        assert kinds[0] == kinds[1], name
    sources = [pathlib.Path(m.__file__).read_text("utf-8") for m in (train, rollouts)]
    used = set(re.findall(r"\b_?(?:adaptation|adapting)\.([a-z]\w*)", "".join(sources)))
    assert {"start", "end_rollout", "row"} <= used
    assert used <= set(dir(nobody))
    quiet = nobody()
    quiet.start()
    quiet.warm_up(wait=True)
    quiet.begin_rollout()
    watch = watch_lib.Watch()
    quiet.end_rollout(1.0, watch)
    quiet.hand_over(watch)
    # Its records have no seconds of a drafter, either.
    assert quiet.row() == watch.spent == {} and not quiet.trains
    quiet.close()
