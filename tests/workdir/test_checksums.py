"""Checksums of a folder's files: literals, and every kind of damage by name."""

import json
import os

import pytest

from tests.workdir import damage
from tlt_jax.workdir import checksums


@pytest.fixture
def folder(tmp_path):
    for name, text in {"above": "a", "one/x": "hello", "two/deep/y": ""}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    checksums.write(tmp_path)
    return tmp_path


def test_sums_are_what_they_were(folder):
    """Checkpoints of other days are compared with these."""
    assert json.loads((folder / "checksums.json").read_text()) == {
        "one/x": [5, 0x3610A686],
        "two/deep/y": [0, 0],
    }
    assert checksums.damaged(folder) == ""


def test_damage_is_named(folder):
    for path, bit in damage.flips(folder, num_per_file=12, seed=3):
        name = path.relative_to(folder).as_posix()
        # A name or number of the list that is another's makes that one wrong.
        found = checksums.damaged(folder)
        if name == checksums.FILE:
            assert found, bit
        else:
            # What is above the subfolders is its writer's own.
            assert found == name.replace("above", ""), (name, bit)
    for path, how in damage.losses(folder):
        assert checksums.damaged(folder) or path.name == "above", how
    assert checksums.damaged(folder) == ""
    (folder / "two" / "deep" / "y").unlink()
    assert checksums.damaged(folder) == "two/deep/y"


def test_of_parts_the_others_are_not_read(folder):
    os.truncate(folder / "one" / "x", 2)
    assert checksums.damaged(folder, ("two",)) == ""
    assert checksums.damaged(folder, ("one", "two")) == "one/x"


@pytest.mark.parametrize("place", [0, 5 << 20, (9 << 20) - 1])
def test_large_files_are_read_from_end_to_end(tmp_path, place):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(bytes(9 << 20))
    checksums.write(tmp_path)
    with (tmp_path / "a" / "x").open("rb+") as file:
        file.seek(place)
        file.write(b"\1")
    assert checksums.damaged(tmp_path) == "a/x"


@pytest.mark.parametrize("text", ["", "[]", "3", '{"top": 5}', '{"top": ["a", 1]}'])
def test_a_list_that_is_none_is_damaged(folder, text):
    (folder / "checksums.json").write_text(text)
    assert checksums.damaged(folder) == "checksums.json"
