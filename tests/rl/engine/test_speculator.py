"""The host's side of speculation: what is filled, what proposers get, what is kept."""

import numpy as np
import pytest

from tests.rl import engines
from tests.rl.engine.test_engine_speculation import EAGLE, drafter_params
from tlt_jax import types
from tlt_jax.rl.engine import scheduler, speculator
from tlt_jax.specdec import calibration, strategy
from tlt_jax.specdec.tuners import bandit, shared, tuner

CHAIN = strategy.parse("D3K1V4")
BOTH = strategy.parse("D3K1V5-both")
NGRAM = strategy.parse("D3K1V4-ngram")
PAGE = 4
TABLE = strategy.parse_arms(("8:D3K1V4",))


def made(cfg=EAGLE, table=("4:D3K1V4",), **tuners):
    return speculator.Speculator(
        speculator.SpeculatorConfig(strategy.parse_arms(table), cfg),
        page_size=PAGE,
        max_length=20,
        **tuners,
    )


def row_of(num_prompt, pages, tokens=(), prompt_id=0, drafted=0):
    """A row whose text is 10, 11, 12, ... and then its tokens, all but one cached."""
    prompt = np.arange(10, 10 + num_prompt, dtype=np.int32)
    length = num_prompt - 1 + len(tokens)
    request = types.Request(prompt_id, prompt_id, 0, prompt, 8)
    return scheduler.Row(
        request, list(tokens), pages=list(pages), length=length, drafted=drafted
    )


def ranges(rounds):
    return [[(job.start, job.stop, job.pages) for job in jobs] for jobs in rounds]


def test_shared_pages_are_filled_first_and_once():
    state = made()
    # Ten cached positions: two full pages that both rows share, and two positions more.
    rows = [row_of(11, (1, 2, 3)), row_of(11, (1, 2, 5))]
    assert ranges(state.missing(rows, CHAIN)) == [
        [(0, 8, (1, 2, 3))],
        [(8, 9, (1, 2, 3)), (8, 9, (1, 2, 5))],
    ]
    # The last cached position is taken in by the step itself.
    assert [row.drafted for row in rows] == [9, 9]
    assert state.missing(rows, CHAIN) == []
    # Page 2 is written anew: a row that comes then needs it, and no page before it.
    state.written([scheduler.Part(np.arange(8, dtype=np.int32), 4, 8, (1, 2))])
    assert ranges(state.missing([row_of(11, (1, 2, 7))], CHAIN)) == [
        [(4, 8, (1, 2, 7))],
        [(8, 9, (1, 2, 7))],
    ]
    state.begin()
    assert ranges(state.missing([row_of(6, (1, 9))], CHAIN)) == [[(0, 4, (1, 9))]]


def test_only_what_lags_too_far_behind_is_filled():
    state = made()
    # A step takes in up to four positions.
    near, far = (row_of(1, (1, 2), range(7), drafted=d) for d in (3, 2))
    assert ranges(state.missing([near, far], CHAIN)) == [[(0, 6, (1, 2))]]
    assert (near.drafted, far.drafted) == (3, 6)
    assert state.missing([row_of(9, (1, 2))], NGRAM) == []
    assert state.missing([row_of(9, (1, 2))], None) == []


def with_weights(**how):
    state = made(**how)
    state.offer(drafter_params(EAGLE), version=3)
    state.take_up((), engines.PARAMS)
    return state


def test_a_drafter_gets_the_rest_of_each_text():
    state = with_weights()
    rows = [row_of(6, (1, 2), drafted=3), row_of(3, (3,), (7,), drafted=0)]
    draft = state.inputs(rows, 4, CHAIN)
    assert draft.lengths.tolist() == [3, 0, 0, 0]
    # Tokens of positions 4 on, and 1 on; the pending token is the last.
    assert draft.tokens.tolist() == [[14, 15, 0, 0], [11, 12, 7, 0], [0] * 4, [0] * 4]
    assert (draft.tau, draft.sharpness) == (0.5, 1.0)
    assert draft.weights is state.weights


def test_matching_lays_the_rows_and_finished_answers_out():
    state = with_weights()
    rows = [row_of(3, (1,), (7,)), row_of(3, (2,), (8,))]
    state.finished(rows[0].request, np.array([7, 9], np.int32))
    matching = state.inputs(rows, 3, NGRAM)
    texts, lengths = matching.corpus.texts, matching.corpus.lengths
    assert texts.shape == (3 + 32, 20)
    # The third row is padding; behind it stands the finished answer.
    assert lengths[:5].tolist() == [4, 4, 0, 5, 0]
    assert texts[0, :5].tolist() == [10, 11, 12, 7, -1]
    assert texts[3, :6].tolist() == [10, 11, 12, 7, 9, -1]
    # Its own text, the finished answer, the sibling.
    assert matching.sources[:, :4].tolist() == [
        *([0, 3, 1, -1], [1, 3, 0, -1], [-1] * 4)
    ]
    first, second = state.inputs(rows, 3, BOTH)
    assert first.lengths.tolist() == [0, 0, 0]
    np.testing.assert_array_equal(second.corpus.texts, texts)
    assert state.inputs(rows, 2, None) == ()


def call_of(how):
    return tuner.Call(2, 2, how, 1.0, 1, 2, (2, 1) if how else ())


def test_what_proposers_tell_is_kept():
    state, rows = with_weights(), [row_of(3, (1,)), row_of(3, (2,))]
    outcomes = np.ones((9, 2), np.float32)
    state.took(rows, call_of(CHAIN), (np.array([5, 6, 0, 0], np.int32), None))
    assert [row.drafted for row in rows] == [5, 6]
    state.took(rows, call_of(NGRAM), outcomes)
    assert [row.drafted for row in rows] == [5, 6]
    assert state.inputs(rows, 2, NGRAM).outcomes.tolist() == outcomes.tolist()
    state.took(rows, call_of(BOTH), ((np.array([7, 8], np.int32), None), 2 * outcomes))
    assert [row.drafted for row in rows] == [7, 8]
    assert state.inputs(rows, 2, NGRAM).outcomes[0, 0] == 2
    state.took(rows, call_of(None), ())
    # In a new run what was observed counts for less.
    state.begin()
    assert state.inputs(rows, 2, NGRAM).outcomes[0, 0] == np.float32(1.6)


class Recorder(tuner.Static):
    """Keeps what it is told."""

    def __init__(self, *table):
        super().__init__(strategy.parse_arms(table))
        self.calls = []

    def record(self, call):
        self.calls.append(call)


def test_the_early_tuner_chooses_until_there_is_a_drafter():
    early, late = Recorder("4:D3K1V4-ngram"), Recorder("2:D3K1V4")
    state = made(tuner=late, early_tuner=early)
    assert state.choices(2) == (CHAIN, NGRAM)
    assert state.choose(2) == NGRAM
    state.took([], call_of(NGRAM), np.zeros((9, 2), np.float32))
    rows = [row_of(9, (1, 2, 3), drafted=6)]
    state.offer(drafter_params(EAGLE), version=3)
    assert state.version == -1 and state.choose(2) == NGRAM
    state.take_up(rows, engines.PARAMS)
    assert state.version == 3 and state.choose(2) == CHAIN
    # What was in the cache was another drafter's.
    assert rows[0].drafted == 0
    assert (len(early.calls), len(late.calls)) == (1, 0)
    # Without one a drafter is waited for.
    alone = made(tuner=late)
    assert alone.choices(2) == (CHAIN, None)
    assert alone.choose(2) is None


def test_what_is_decoded_aside_leaves_no_trace():
    """An evaluation's prompts are numbered from 0 like those of training."""
    arms = strategy.parse_arms(("4:D3K1V4-ngram,D2K1V3-ngram",))
    early = shared.SharedTuner(bandit.BegMab(arms, seed=1, epsilon=0.5))
    late = shared.SharedTuner(tuner.Threshold(TABLE, 4, 6)).for_engine()
    state = made(tuner=late, early_tuner=early)
    rows = [row_of(3, (1,), (7,))]

    def decode(tokens, seconds):
        for _ in range(6):
            how = state.choose(2)
            call = tuner.Call(1, 1, how, seconds, 1, 2, (2, 1))
            state.took(rows, call, state.inputs(rows, 1, how).outcomes + 1)
        seen = calibration.Evidence(np.array([seconds, 1]), np.eye(2))
        state._calibration.record(seen)
        late.choose(1)
        state.finished(rows[0].request, np.array(tokens, np.int32))

    def everything():
        matching = state.inputs(rows, 1, NGRAM)
        arrays = [matching.corpus.texts, matching.corpus.lengths, matching.outcomes]
        learning = early, late, state._calibration
        return [x.tolist() for x in arrays], *(part.state() for part in learning)

    decode([7, 9], seconds=0.5)
    late.choose(8)
    before = everything()
    with state.aside():
        assert 9 not in state.inputs(rows, 1, NGRAM).corpus.texts
        state.begin()
        decode([7, 8], seconds=0.25)
        assert all(a != b for a, b in zip(before, everything(), strict=True))
    assert everything() == before
    with pytest.raises(KeyError), state.aside():
        decode([7, 8], seconds=0.25)
        raise KeyError
    assert everything() == before


def test_an_engine_that_was_not_told_how_never_speculates():
    plain = speculator.Speculator(speculator.NEVER, page_size=PAGE, max_length=20)
    rows = [row_of(9, (1, 2))]
    assert plain.choose(1) is None and plain.choices(1) == (None,)
    assert plain.missing(rows, None) == [] and plain.inputs(rows, 1, None) == ()
    assert (plain.version, plain.rule, plain.weights) == (-1, "keyed", None)
    with pytest.raises(ValueError, match="without speculator_cfg"):
        engines.engine_of().offer_drafter(drafter_params(EAGLE), 0)
