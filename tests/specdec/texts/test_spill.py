"""Arrays set aside on disk: whole or an error that names the directory."""

import numpy as np
import pytest

from tlt_jax.specdec.texts import spill


def test_arrays_come_back_end_to_end(tmp_path):
    store = spill.Spill(tmp_path / "below")
    one, two = np.arange(5, dtype=np.int32), np.ones((2, 3), np.float32)
    # Columns of a larger array lie apart in memory.
    store.write(4, [one, np.arange(12).reshape(3, 4)[:, 1:2], two.T])
    data = bytes(store.read(4, 20 + 24 + 24))
    assert data == one.tobytes() + np.array([1, 5, 9]).tobytes() + two.tobytes()
    store.write(4, [one])
    assert bytes(store.read(4, 20)) == one.tobytes()


def test_what_is_gone_or_cut_is_an_error(tmp_path):
    store = spill.Spill(tmp_path)
    store.write(1, [np.zeros(4, np.uint8)])
    with pytest.raises(spill.SpillError, match="text_1 holds 4 bytes, not 5"):
        store.read(1, 5)
    store.delete(1)
    assert not list(tmp_path.glob("text_*"))
    with pytest.raises(spill.SpillError, match=f"{tmp_path}/text_1 holds 0 bytes"):
        store.read(1, 4)


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    store = spill.Spill(tmp_path / "file")
    with pytest.raises(spill.SpillError, match=f"writing to {tmp_path}/file failed"):
        store.write(1, [np.zeros(4)])


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / "text_7").write_bytes(b"left")
    (tmp_path / "notes.md").write_text("mine")
    spill.Spill(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]
