"""Files that are there as a whole or as they were; what a killed process left."""

import errno
import os

import pytest

from tlt_jax.workdir import files


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    with files.replacing(path) as file:
        file.write("one")
        assert not path.exists()
    # Who has the old one open reads it to its end.
    old = path.open()
    with files.replacing(path) as file:
        file.write("one")
    path.write_text("another")
    assert old.read() == "one"
    old.close()
    with files.replacing(path) as file:
        file.write("one")
    with pytest.raises(KeyError), files.replacing(path) as file:
        file.write("half of t")
        raise KeyError
    assert path.read_text() == "one"
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(
        files.WorkdirError, match=r"a\.json could not be written \(No s"
    ):
        with files.replacing(path) as file:
            file.write("two")
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["a.json"]


def test_a_folder_is_filled_when_all_is_there(tmp_path):
    folder = tmp_path / "tokenizer"
    with files.filling(folder) as aside:
        (aside / "a").write_text("1")
        (aside / "b").write_text("1")
        assert not folder.exists()
    with pytest.raises(KeyError), files.filling(folder) as aside:
        (aside / "a").write_text("2")
        raise KeyError
    assert (folder / "a").read_text() == "1"
    with files.filling(folder) as aside:
        (aside / "a").write_text("3")
    assert [(folder / name).read_text() for name in "ab"] == ["3", "1"]
    assert os.listdir(tmp_path) == ["tokenizer"]


def test_lines_are_appended_behind_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "t.jsonl"
    files.append_line(path, "one")
    files.append_line(path, "two")
    assert path.read_bytes() == b"one\ntwo\n"
    # What a killed process left; longer than the block that is looked through.
    with path.open("a") as file:
        file.write("thr" * 50_000)
    files.append_line(path, "four")
    assert path.read_bytes() == b"one\ntwo\nfour\n"
    path.write_text("no line at all")
    files.append_line(path, "one")
    assert path.read_bytes() == b"one\n"
    write = os.pwrite
    monkeypatch.setattr(files.os, "pwrite", lambda f, data, at: write(f, data[:2], at))
    with pytest.raises(files.WorkdirError, match=r"t\.jsonl could not be written"):
        files.append_line(path, "five")
    assert path.read_bytes() == b"one\n"


def test_remains_are_removed(tmp_path):
    for name in (".config.json.partial", "rollouts/.step_000003.jsonl.partial"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    (tmp_path / ".initial_model.x1y2.partial").mkdir()
    (tmp_path / ".initial_model.x1y2.partial" / "model.safetensors").write_text("half")
    (tmp_path / "kept.partial").write_text("somebody's")
    (tmp_path / "rollouts" / "step_000002.jsonl").write_text("whole")
    files.remove_remains(tmp_path)
    left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*"))
    assert left == ["kept.partial", "rollouts", "rollouts/step_000002.jsonl"]
