"""Texts of a running step: bounds, disk, threads, faults, checkpoints."""

import errno
import threading
import types

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from tests import mutation
from tlt_jax.specdec.texts import arrays as text_arrays
from tlt_jax.specdec.texts import buffer as text_buffer
from tlt_jax.specdec.texts import layout, shards

# Bytes of a text of n tokens as made below, in float32.
PER_TOKEN, PER_TEXT = 4 * (1 + 3 + 6), 8


def made(text_id, length=8, version=1, start=2, width=3, features=True):
    rng = np.random.default_rng((text_id, version))
    return layout.Record(
        text_id=text_id,
        tokens=rng.integers(50, size=length).astype(np.int32),
        response_start=start,
        hidden=rng.normal(size=(length, width)).astype(np.float32),
        features=rng.normal(size=(length, 2 * width)).astype(np.float32)
        if features
        else None,
        key=np.array([text_id, 1], np.uint32),
        version=version,
    )


def size(*lengths):
    return sum(PER_TOKEN * n + PER_TEXT for n in lengths)


def opened(max_bytes, directory=None, max_spill_bytes=0, dtype="float32", **more):
    return text_buffer.TextBuffer(
        max_bytes,
        dtype,
        spill_directory=directory,
        max_spill_bytes=max_spill_bytes,
        **more,
    )


def ids(buffer):
    return buffer.view().text_ids.tolist()


def assert_same(got, wanted):
    assert (got.text_id, got.version) == (wanted.text_id, wanted.version)
    assert got.response_start == wanted.response_start
    for name in ("tokens", "hidden", "features", "key"):
        a, b = getattr(got, name), getattr(wanted, name)
        if b is None:
            assert a is None
        else:
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def assert_holds(buffer, wanted, dtype="float32"):
    """The buffer holds these texts and no other, bit for bit."""
    view = buffer.view()
    assert view.text_ids.tolist() == sorted(r.text_id for r in wanted)
    for index, record in enumerate(sorted(wanted, key=lambda r: r.text_id)):
        kept = text_arrays.kept(record, jnp.dtype(dtype))
        assert_same(view.read(index), kept)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("features", [True, False])
def test_texts_come_back_from_memory_and_disk(tmp_path, dtype, features):
    records = [made(i, 6 + i, features=features) for i in (4, 2, 7, 1)]
    kept = jnp.dtype(dtype)
    total = sum(text_arrays.num_bytes(record, kept) for record in records)
    with opened(total - 50, tmp_path / "spill", 4000, dtype) as buffer:
        for record in records:
            assert buffer.append(record)
            buffer.flush()
        on_disk = len(list((tmp_path / "spill").iterdir()))
        assert on_disk == buffer.num_spilled == 2
        if features and dtype == "float32":
            # The longest are the ones that stay.
            assert buffer.num_bytes == size(13, 10)
            assert buffer.num_disk_bytes == size(8, 7)
        assert_holds(buffer, records, dtype)
    assert not list((tmp_path / "spill").iterdir())


def test_append_takes_a_copy():
    record = made(1)
    buffer = opened(10_000)
    buffer.append(record)
    for name in ("tokens", "hidden", "features", "key"):
        getattr(record, name)[:] = 0
    assert_same(buffer.view().read(0), made(1))


texts = st.tuples(st.integers(2, 30), st.integers(0, 2), st.booleans())


@hypothesis.settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    trace=st.lists(texts, max_size=25),
    max_bytes=st.integers(100, 4000),
    max_spill_bytes=st.sampled_from([0, 700, 3000]),
)
def test_bounds_hold_and_no_text_is_lost_uncounted(
    tmp_path, trace, max_bytes, max_spill_bytes
):
    version = 1
    with opened(max_bytes, tmp_path, max_spill_bytes, max_age=2) as buffer:
        asked, useless = {}, 0
        for number, (length, forward, wait) in enumerate(trace):
            version += forward == 2
            record = made(number, length, version)
            kept = buffer.append(record)
            useless += layout.num_bases(length, 2) == 0
            if kept:
                asked[number] = record
            if wait:
                buffer.flush()
            assert buffer.num_bytes <= max_bytes
            assert buffer.num_disk_bytes <= max_spill_bytes
        buffer.flush()
        view = buffer.view()
        there = [asked[i] for i in view.text_ids.tolist()]
        assert_holds(buffer, there)
        # What is held is what is counted, here and on the disk.
        total = sum(size(len(r.tokens)) for r in there)
        assert buffer.num_bytes + buffer.num_disk_bytes == total
        on_disk = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert buffer.num_disk_bytes == on_disk
        old = sum(r.version < version - 2 for r in asked.values())
        missing = len(trace) - useless - len(there)
        assert missing - old <= buffer.num_dropped <= missing


def test_memory_is_taken_before_the_copy_is_made(monkeypatch):
    buffer = opened(size(8))
    seen = []

    def copy(record, dtype):
        seen.append((buffer.num_bytes, ids(buffer)))
        raise MemoryError

    monkeypatch.setattr(text_arrays, "kept", copy)
    with pytest.raises(MemoryError):
        buffer.append(made(1))
    # A text that is not complete is counted and not shown.
    assert seen == [(size(8), [])]
    assert (buffer.num_bytes, ids(buffer)) == (0, [])


def test_early_finishers_do_not_push_out_the_last_step_s_tail():
    buffer = opened(size(*[20] * 6))
    for number in range(6):
        buffer.append(made(number, 20, version=1))
    buffer.begin_step(2)
    for number in range(10, 40):
        buffer.append(made(number, 6 if number < 39 else 20, version=2))
    view = buffer.view()
    lengths = view.lengths[view.versions == 1]
    assert 2 <= len(lengths) and (lengths == 20).all()
    # And the newest text found room, long as it is.
    assert 39 in view.text_ids and (view.versions == 2).sum() > 2


def test_a_text_too_large_changes_nothing():
    buffer = opened(size(20, 20))
    for number in (1, 2):
        buffer.append(made(number, 20))
    assert not buffer.append(made(3, 50))
    assert not buffer.append(made(4, 10))
    assert ids(buffer) == [1, 2]
    assert (buffer.num_appended, buffer.num_dropped) == (4, 2)


def test_texts_that_are_too_old_go(tmp_path):
    with opened(1500, tmp_path, 4000, max_age=1) as buffer:
        for version in (1, 2):
            for number in range(3):
                buffer.append(made(10 * version + number, version=version))
                buffer.flush()
        assert len(buffer) == 6 and buffer.num_disk_bytes
        buffer.begin_step(3)
        assert not buffer.append(made(99, version=1))
        assert ids(buffer) == [20, 21, 22]
        # A newer text begins its step; one of the last step still comes.
        assert buffer.append(made(40, version=4)) and buffer.append(made(30, version=3))
        assert ids(buffer) == [30, 40] and buffer.version == 4
        buffer.begin_step(6)
        buffer.flush()
        assert len(buffer) == buffer.num_bytes == buffer.num_disk_bytes == 0
        assert not list(tmp_path.iterdir()) and buffer.num_dropped == 0


def test_held_texts_stay_until_they_are_let_go(tmp_path):
    with opened(size(8, 8), tmp_path, size(8)) as buffer:
        buffer.append(made(1))
        view = buffer.view()
        with view.holding([0]) as all_there:
            assert all_there
            buffer.begin_step(9)
            assert ids(buffer) == [] and buffer.num_bytes == size(8)
            assert not buffer.append(made(2, 20, version=9))
            assert_same(view.read(0), made(1))
        assert buffer.num_bytes == 0
        with pytest.raises(text_buffer.TextGoneError, match="text 1 was dropped"):
            view.read(0)
        with view.holding([0]) as all_there:
            assert not all_there


def test_batches_are_those_of_the_offline_buffer(tmp_path):
    records = [made(i, 5 + i % 7) for i in range(12)]
    offline = shards.Shards(tmp_path / "offline", "float32")
    offline.append(records)
    sizes = {"row_tokens": 24, "row_bases": 14}
    with opened(1500, tmp_path / "spill", 10_000) as buffer:
        for record in reversed(records):
            buffer.append(record)
            buffer.flush()
        view = buffer.view()
        plans = [
            layout.plan(b, range(12), num_rows=3, seed=(1,), **sizes)
            for b in (offline, view)
        ]
        assert plans[0] == plans[1]
        for rows in plans[0]:
            got, wanted = (layout.lay_out(b, rows, **sizes) for b in (view, offline))
            for name in vars(wanted):
                np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))


def test_a_batch_reads_every_text_once(monkeypatch):
    buffer = opened(10_000)
    for number in range(6):
        buffer.append(made(number))
    view, read = buffer.view(), []
    monkeypatch.setattr(
        buffer, "read", lambda e: read.append(e.text_id) or made(e.text_id)
    )
    sizes = {"row_tokens": 24, "row_bases": 14}
    (rows,) = layout.plan(view, range(6), num_rows=3, seed=None, **sizes)
    layout.lay_out(view, rows, **sizes)
    assert sorted(read) == list(range(6))


def test_threads_append_while_others_read(tmp_path):
    with opened(40_000, tmp_path, 60_000, max_age=1) as buffer:
        stop, bad = threading.Event(), []

        def fill(worker):
            for number in range(60):
                text_id = 1000 * worker + number
                buffer.append(made(text_id, 4 + number % 20, 1 + number // 30))

        def read():
            while not stop.is_set():
                view = buffer.view()
                for index in range(len(view)):
                    with view.holding([index]) as there:
                        if there:
                            got = view.read(index)
                            wanted = made(got.text_id, len(got.tokens), got.version)
                            if got.hidden.tobytes() != wanted.hidden.tobytes():
                                bad.append(got.text_id)
                if buffer.num_bytes > 40_000 or buffer.num_disk_bytes > 60_000:
                    bad.append("bound")

        reader = threading.Thread(target=read)
        workers = [threading.Thread(target=fill, args=(w,)) for w in range(4)]
        reader.start()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        stop.set()
        reader.join()
        buffer.flush()
        assert not bad and buffer.spill_error is None and buffer.num_spilled
        assert buffer.num_appended == 240
        view = buffer.view()
        # The disk may be slower than four threads; what it was too slow for is counted.
        assert buffer.num_dropped + len(view) == 240
        total = sum(size(n) for n in view.lengths.tolist())
        assert buffer.num_bytes + buffer.num_disk_bytes == total


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def break_disk(buffer, patch):
    patch.setattr(
        buffer._spill,
        "_store",
        types.SimpleNamespace(write=full, read=buffer._spill._store.read),
    )


def test_a_full_disk_is_reported_once_and_the_run_goes_on(tmp_path, monkeypatch):
    heard = []
    with opened(
        size(*[8] * 4), tmp_path, 90_000, max_age=9, on_spill_error=heard.append
    ) as buffer:
        buffer.append(made(1))
        with monkeypatch.context() as patch:
            break_disk(buffer, patch)
            for number in range(2, 12):
                assert buffer.append(made(number, 8 + (number == 11)))
                buffer.flush()
                assert buffer.num_bytes <= size(*[8] * 4)
            buffer.begin_step(2)
            buffer.flush()
        assert len(heard) == 1 and "No space left on device" in str(heard[0])
        assert str(tmp_path) in str(heard[0]) and buffer.spill_error is heard[0]
        assert buffer.num_disk_bytes == buffer.num_spilled == 0
        assert len(buffer) == 3 and buffer.num_dropped == 8
        assert_holds(buffer, [made(i, 8 + (i == 11)) for i in ids(buffer)])
        # There is room again: tried from the next step on.
        buffer.begin_step(3)
        buffer.flush()
        buffer.append(made(50, version=3))
        buffer.flush()
        assert buffer.num_spilled and len(heard) == 1


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with opened(size(*[8] * 4), tmp_path / "file", 90_000) as buffer:
        for number in range(8):
            buffer.append(made(number))
            buffer.flush()
        assert "Not a directory" in str(buffer.spill_error)
        assert len(buffer) == 4 and buffer.num_dropped == 4


def test_a_file_that_is_gone_or_cut_loses_its_text_alone(tmp_path):
    with opened(1500, tmp_path, 9000) as buffer:
        for number in range(9):
            buffer.append(made(number))
            buffer.flush()
        view, files = buffer.view(), sorted(tmp_path.iterdir())
        files[0].unlink()
        files[1].write_bytes(b"short")
        gone = 0
        for index in range(9):
            try:
                assert_same(view.read(index), made(index))
            except text_buffer.TextGoneError:
                gone += 1
        assert gone == 2 and len(buffer) == 7
        assert "something else changes this directory" in str(buffer.spill_error)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("features", [True, False])
def test_state_comes_back_bit_for_bit(tmp_path, dtype, features):
    records = [made(i, 6 + i, 1 + i // 4, features=features) for i in range(8)]
    with opened(1300, tmp_path / "a", 9000, dtype) as buffer:
        for record in records:
            buffer.append(record)
            buffer.flush()
        np.savez(tmp_path / "state.npz", **buffer.state())
        bytes_here = (buffer.num_bytes, buffer.num_disk_bytes)
        there = ids(buffer)
    state = dict(np.load(tmp_path / "state.npz"))
    with opened(1300, tmp_path / "b", 9000, dtype) as again:
        again.restore(state)
        again.flush()
        assert (again.num_bytes, again.num_disk_bytes) == bytes_here
        assert (again.version, ids(again)) == (2, there)
        assert_holds(again, [r for r in records if r.text_id in there], dtype)
        assert again.num_appended == 0
        for name, array in again.state().items():
            assert array.tobytes() == state[name].tobytes(), name
        with pytest.raises(ValueError, match="text_id=7 is in the buffer already"):
            again.append(made(7, 13, 2, features=features))
        with pytest.raises(ValueError, match="restore needs an empty buffer"):
            again.restore(state)
    # Without a disk, what there is no room for goes.
    small = opened(1300, dtype=dtype)
    small.restore(state)
    assert set(ids(small)) <= set(there) and small.num_bytes <= 1300
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    with pytest.raises(ValueError, match="the texts were kept in another one"):
        opened(1300, dtype=other).restore(state)


def test_state_of_an_empty_buffer():
    buffer = opened(100)
    buffer.begin_step(5)
    again = opened(100)
    again.restore(buffer.state())
    assert len(again) == 0 and again.version == 5


def test_bad_arguments():
    with pytest.raises(ValueError, match="dtype='int8': use float32 or bfloat16"):
        opened(10, dtype="int8")
    with pytest.raises(ValueError, match="max_bytes=0, max_spill_bytes=0, max_age=1"):
        opened(0)
    with pytest.raises(ValueError, match="max_spill_bytes=5 needs a spill_directory"):
        opened(10, None, 5)
    buffer = opened(10_000)
    buffer.append(made(1))
    with pytest.raises(ValueError, match="text_id=1 is in the buffer already"):
        buffer.append(made(1))
    with pytest.raises(ValueError, match=r"widths \(4, 8\), others \(3, 6\)"):
        buffer.append(made(2, width=4))
    with pytest.raises(ValueError, match="response_start=0 in 8 tokens"):
        buffer.append(made(2, start=0))


@pytest.mark.parametrize(
    ("old", "new", "test"),
    [
        (
            "self.num_bytes += entry.num_bytes\n        try:",
            "pass\n        try:",
            test_memory_is_taken_before_the_copy_is_made,
        ),
        ("if first and self", "if self", None),
    ],
)
def test_the_tests_see_errors(old, new, test, monkeypatch, tmp_path):
    mutated = mutation.mutate(text_buffer, old, new)
    monkeypatch.setattr(text_buffer, "TextBuffer", mutated.TextBuffer)
    with pytest.raises(AssertionError):
        if test is not None:
            test(monkeypatch)
        else:
            test_a_full_disk_is_reported_once_and_the_run_goes_on(tmp_path, monkeypatch)
