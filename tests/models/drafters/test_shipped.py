"""Drafters that come with the package: found by name, there once it is installed."""

import configparser
import fnmatch
import json
import pathlib

import pytest

from tlt_jax.models.drafters import shipped

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two drafters, and a folder that holds none."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "shipped")
    for name in ("model-b", "model-a"):
        (tmp_path / "shipped" / name).mkdir(parents=True)
        (tmp_path / "shipped" / name / "config.json").write_text("{}")
    (tmp_path / "shipped" / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "shipped"


def test_a_name_is_that_of_a_folder_in_the_package(folder):
    assert shipped.names() == ["model-a", "model-b"]
    assert shipped.folder("model-b") == str(folder / "model-b")


def test_a_name_stands_before_a_directory_and_paths_are_left_alone(folder):
    pathlib.Path("model-a").mkdir()
    assert shipped.folder("model-a") == str(folder / "model-a")
    pathlib.Path("mine").mkdir()
    for path in ("./model-a", "mine", "workdirs/gone", "~/gone", "/gone"):
        assert shipped.folder(path) is None


@pytest.mark.parametrize(
    "name,remedy",
    [("model_a", ": did you mean 'model-a'?"), ("gone", ": name one of these.")],
)
def test_another_name_is_refused_with_those_there_are(folder, name, remedy):
    with pytest.raises(ValueError) as raised:
        shipped.folder(name)
    assert str(raised.value) == (
        f"the drafter {name!r} is neither a directory here nor one that comes with the "
        f"package (model-a, model-b){remedy}"
    )


def test_every_file_of_a_drafter_is_installed():
    """By the pattern of the package's data; each has its weights and its card."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    pattern = settings["options.package_data"]["tlt_jax.models.drafters"]
    package = shipped.FOLDER.parent
    assert package == ROOT / "tlt_jax" / "models" / "drafters"
    for name in shipped.names():
        files = [path for path in (shipped.FOLDER / name).rglob("*") if path.is_file()]
        assert {path.name for path in files} >= {
            *("config.json", "drafter.safetensors", shipped.CARD),
        }
        for path in files:
            assert fnmatch.fnmatch(str(path.relative_to(package)), pattern)
            assert path.stat().st_size < 12e6
        record = json.loads((shipped.FOLDER / name / "config.json").read_text())
        assert record["about"]["target"] == name
