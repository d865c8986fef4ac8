"""The line of batches out of a buffer that fills."""

import collections
import dataclasses
import threading

import numpy as np
import pytest

from tests import mutation
from tests.specdec import tiny_drafter
from tests.specdec.texts import test_buffer
from tlt_jax.specdec.texts import buffer as text_buffer
from tlt_jax.specdec.texts import sampling as text_sampling

SIZES = {"row_tokens": 32, "row_bases": 30, "num_rows": 2}
made = test_buffer.made


def opened(records=(), **more):
    buffer = text_buffer.TextBuffer(1_000_000, "float32", **more)
    for record in records:
        buffer.append(record)
    return buffer


def sampler_of(buffer, module=text_sampling, **more):
    return module.Sampler(buffer, **{**SIZES, "seed": 3, **more})


def texts_in(batch):
    """Ids of the texts of a batch (a text's key names it)."""
    keys = batch.keys[batch.valid]
    return list(dict.fromkeys(keys[:, 0].tolist()))


def drawn(sampler, num_batches):
    return [texts_in(sampler.next_batch()) for _ in range(num_batches)]


def same(a, b):
    for name in vars(a):
        x, y = getattr(a, name), getattr(b, name)
        if x is not None:
            np.testing.assert_array_equal(x, y)


def test_texts_of_equal_weight_take_turns():
    buffer = opened([made(i, 10) for i in range(30)])
    sampler = sampler_of(buffer)
    for lap in range(1, 4):
        counts = collections.Counter(i for b in drawn(sampler, 5) for i in b)
        assert counts == dict.fromkeys(range(30), 1), f"lap {lap}"


def test_turns_are_proportional_to_weights():
    # Bases are two fewer than tokens.
    lengths = {i: 2 + n for i, n in enumerate([2, 4, 8, 16] * 5)}
    buffer = opened([made(i, n) for i, n in lengths.items()])
    for power in (0.0, 1.0):
        sampler = sampler_of(buffer, length_power=power, row_tokens=18, row_bases=16)
        counts = collections.Counter(i for b in drawn(sampler, 60) for i in b)
        weights = {i: (n - 2) ** power for i, n in lengths.items()}
        # As many as there are turns; at most one turn in a batch.
        rate = sum(counts.values()) / sum(weights.values())
        for text_id, weight in weights.items():
            # Short texts fill what is left of a row before it is their turn.
            assert abs(counts[text_id] - rate * weight) < 3 + 0.1 * rate * weight


def step_offset_run(module=text_sampling):
    """Last step's texts are there, this step's come, shortest first."""
    lengths = [6, 8, 10, 12, 14, 16, 26, 30]
    buffer = opened([made(i, n, version=1) for i, n in enumerate(lengths)])
    sampler = sampler_of(buffer, module)
    buffer.begin_step(2)
    before = drawn(sampler, 12)
    for i, n in enumerate(lengths[:4]):
        buffer.append(made(100 + i, n, version=2))
    taken = np.array(sampler.num_taken)
    mixed = drawn(sampler, 30)
    return before, mixed, np.array(sampler.num_taken) - taken


def test_long_texts_of_the_last_step_stand_in_for_this_one_s():
    before, mixed, taken = step_offset_run()
    # Nobody has finished: all from the last step, the tail most often.
    counts = collections.Counter(i for batch in before for i in batch)
    assert set(counts) <= set(range(8))
    assert counts[7] > counts[2] and counts[6] > counts[1]
    counts = collections.Counter(i for batch in mixed for i in batch)
    tail = counts[6] + counts[7]
    assert tail > 0.4 * sum(counts[i] for i in range(8))
    # Nobody is left out, and the sides share the positions.
    assert set(counts) == {*range(8), 100, 101, 102, 103}
    assert abs(taken[0] - taken[1]) <= 60 + 0.05 * taken.sum()


def test_share_of_the_last_step():
    for frac in (0.0, 0.25, 1.0):
        buffer = opened([made(i, 12, version=1) for i in range(40)])
        for i in range(40):
            buffer.append(made(100 + i, 12, version=2))
        sampler = sampler_of(buffer, previous_frac=frac)
        drawn(sampler, 10)
        previous, current = sampler.num_taken
        assert abs(previous - frac * (previous + current)) <= 10


def test_older_texts_count_less():
    buffer = opened(max_age=3)
    for version in (1, 2, 3, 4):
        for i in range(8):
            buffer.append(made(10 * version + i, 14, version=version))
    buffer.begin_step(4)
    sampler = sampler_of(buffer, age_decay=0.25, previous_frac=1.0)
    counts = collections.Counter(i // 10 for b in drawn(sampler, 60) for i in b)
    assert counts[3] > 3 * counts[2] > 6 * counts[1] > 0


def test_line_depends_on_seed_and_content_alone():
    records = [made(i, 5 + i % 9) for i in range(20)]
    lines = []
    for order, seed in ((1, 3), (-1, 3), (1, 4)):
        sampler = sampler_of(opened(records[::order]), seed=seed)
        lines.append([sampler.next_batch() for _ in range(6)])
    for one, other in zip(lines[0], lines[1], strict=True):
        same(one, other)
    assert [texts_in(b) for b in lines[0]] != [texts_in(b) for b in lines[2]]


def test_batches_hold_the_texts_and_fit():
    records = [made(i, 4 + i % 40) for i in range(60)]
    sampler = sampler_of(opened(records))
    full = 0
    for _ in range(12):
        batch = sampler.next_batch()
        assert batch.tokens.shape == (2, 32) and batch.bases.shape == (2, 30)
        for row in range(2):
            for number in range(batch.segment[row].max() + 1):
                columns = np.flatnonzero(batch.segment[row] == number)
                valid = batch.valid[row]
                ours = np.isin(batch.bases[row], columns) & valid
                (text_id,) = set(batch.keys[row][ours][:, 0].tolist())
                wanted = records[text_id]
                size = len(columns)
                for name in ("tokens", "hidden", "features"):
                    got = getattr(batch, name)[row, columns]
                    np.testing.assert_array_equal(got, getattr(wanted, name)[:size])
                assert size == min(len(wanted.tokens), 32)
            full += (batch.segment[row] >= 0).sum() > 24
        assert len(texts_in(batch)) == len(set(texts_in(batch)))
    # Rows are used: the texts are about 24 tokens.
    assert full > 12


def test_runs_of_a_long_text_cover_it():
    sampler = sampler_of(opened([made(1, 60)]), row_tokens=64, row_bases=10)
    seen = set()
    for _ in range(25):
        batch = sampler.next_batch()
        assert batch.valid.sum() == 10
        seen.update(batch.bases[batch.valid].tolist())
    assert len(seen) > 50 and max(seen) <= 57


def test_resumed_line_goes_on():
    records = [made(i, 5 + i % 9, 1 + i // 10) for i in range(20)]
    buffer = opened(records)
    sampler = sampler_of(buffer)
    drawn(sampler, 7)
    states = (buffer.state(), sampler.state())
    again = opened()
    again.restore(states[0])
    resumed = sampler_of(again)
    resumed.restore(states[1])
    assert resumed.num_taken == sampler.num_taken
    for step in range(8):
        # At once, too: where it begins its turns was saved.
        if step in (0, 3):
            late = made(99 + step, 12, 2)
            buffer.append(late)
            again.append(late)
        same(sampler.next_batch(), resumed.next_batch())


def test_a_late_text_owes_nothing():
    buffer = opened([made(i, 30) for i in range(4)])
    sampler = sampler_of(buffer)
    drawn(sampler, 50)
    buffer.append(made(9, 30))
    counts = collections.Counter(i for b in drawn(sampler, 10) for i in b)
    assert counts[9] <= 5


def test_texts_that_go_meanwhile_are_left_out(tmp_path):
    with text_buffer.TextBuffer(
        1400, "float32", spill_directory=tmp_path, max_spill_bytes=9000
    ) as buffer:
        for i in range(9):
            buffer.append(made(i, 8))
            buffer.flush()
        for path in list(tmp_path.iterdir())[:3]:
            path.unlink()
        sampler = sampler_of(buffer)
        counts = collections.Counter(i for b in drawn(sampler, 6) for i in b)
        assert len(counts) == len(buffer) == 6
        # A plan that could not be read is not counted.
        assert sum(sampler.num_taken) == 6 * sum(counts.values())


def test_empty_buffers_give_no_batch():
    buffer = opened([made(1, 2), dataclasses.replace(made(2, 9), response_start=9)])
    sampler = sampler_of(buffer)
    assert sampler.next_batch() is None and sampler.next_batch(wait_s=0.01) is None
    threading.Timer(0.05, lambda: buffer.append(made(3))).start()
    assert texts_in(sampler.next_batch(wait_s=20.0)) == [3]
    # A prompt that fills the row leaves nothing to learn from.
    sampler = sampler_of(opened([dataclasses.replace(made(4, 40), response_start=33)]))
    assert sampler.next_batch() is None


def test_batches_come_while_texts_arrive():
    buffer = opened(max_age=2)

    def fill(worker):
        for number in range(40):
            version = 1 + number // 20
            buffer.append(made(1000 * worker + number, 4 + number % 20, version))

    threads = [threading.Thread(target=fill, args=(w,)) for w in range(3)]
    seen = set()
    for thread in threads:
        thread.start()
    sampler = sampler_of(buffer, length_power=0.0)
    while len(seen) < 120:
        batch = sampler.next_batch(0.05)
        seen.update(texts_in(batch) if batch is not None else ())
    for thread in threads:
        thread.join()
    assert len(seen) == 120


def test_training_takes_the_batches():
    records = [
        dataclasses.replace(tiny_drafter.record(i, 9, 3), version=1) for i in range(4)
    ]
    buffer = opened(records)
    batch = sampler_of(buffer, row_tokens=20, row_bases=16).next_batch()
    assert batch.features.shape == (2, 20, 48) and batch.hidden.shape == (2, 20, 16)
    assert sorted(batch.keys[batch.valid][:, 1]) == sorted([*range(4)] * 6)


def test_bad_arguments():
    buffer = opened()
    with pytest.raises(ValueError, match="previous_frac=1.5: give a share"):
        sampler_of(buffer, previous_frac=1.5)
    with pytest.raises(ValueError, match="age_decay=0, length_power=1.0"):
        sampler_of(buffer, age_decay=0)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # This step's texts only.
        ("return PREVIOUS if owed > 0 else CURRENT", "return CURRENT"),
        # Lengths play no role.
        ("**self._length_power", "**0"),
        # Nothing is owed.
        ("owed += self", "owed += 2 * self"),
    ],
)
def test_offset_test_sees_errors(old, new, monkeypatch):
    mutated = mutation.mutate(text_sampling, old, new)
    with pytest.raises(AssertionError):
        monkeypatch.setitem(step_offset_run.__globals__, "text_sampling", mutated)
        monkeypatch.setattr(step_offset_run, "__defaults__", (mutated,))
        test_long_texts_of_the_last_step_stand_in_for_this_one_s()
