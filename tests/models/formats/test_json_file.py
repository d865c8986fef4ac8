"""JSON of strangers."""

import pytest

from tlt_jax.models.formats import json_file


@pytest.mark.parametrize(
    "text,message",
    [
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "says 'c' twice"),
        ("[" * 100_000 + "]" * 100_000, "nest too deep"),
        ("{", "property name"),
        (b"\xff{}", "decode"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        json_file.parse(text)
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"x\.json is not valid JSON \(.*: restore it"):
        json_file.read(path, "restore it")


def test_objects_alone_are_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": [{"b": 1}]}')
    assert json_file.read(path, "") == {"a": [{"b": 1}]}
    path.write_text("[1]")
    with pytest.raises(ValueError, match="holds list, not a JSON object: restore it"):
        json_file.read(path, "restore it")
    with pytest.raises(ValueError, match="cannot be read .Is a directory"):
        json_file.read(tmp_path, "restore it")
    with pytest.raises(FileNotFoundError):
        json_file.read(tmp_path / "y", "")


def test_values_are_shown_in_a_line():
    assert json_file.show("é\n") == r"'é\n'"
    assert len(json_file.show("x" * 1000)) == 80
