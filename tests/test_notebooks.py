"""Notebooks: that they run, show pictures, hold what they show, and define nothing.

Cells run one after the other in this process, with small settings; the longer notebooks
among the slow tests. One of these runs each as Jupyter does, in a process of its own
and with the settings it has.
"""

import ast
import contextlib
import importlib.util
import io
import json
import re
import subprocess
import sys
import urllib.request

import pytest

import notebooks.__main__ as runner
from tlt_jax.runtime import compile_cache
from tlt_jax.viz import style

ADDRESS = re.compile(r"github(?:\.com)?/([\w.-]+/[\w.-]+?)(?:\"|/blob)")


def load(name):
    return json.loads((runner.FOLDER / f"{name}.ipynb").read_text("utf-8"))


def code_of(name):
    """The sources of a notebook's code cells, and which of them holds the settings."""
    cells = [c for c in load(name)["cells"] if c["cell_type"] == "code"]
    tagged = ["parameters" in cell["metadata"].get("tags", ()) for cell in cells]
    return ["".join(cell["source"]) for cell in cells], tagged.index(True)


def run(name, **settings):
    """Execute a notebook's cells; return its names, and the values of its cells."""
    sources, settings_cell = code_of(name)
    space, shown = {"__name__": "__main__"}, []
    for number, source in enumerate(sources):
        tree = ast.parse(source, f"{name}, cell {number}")
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(tree, f"{name}:{number}", "exec"), space)
            if last is not None:
                code = compile(ast.Expression(last.value), f"{name}:{number}", "eval")
                shown.append(eval(code, space))
        if number == settings_cell:
            unknown = settings.keys() - space.keys()
            assert not unknown, f"{name} has no setting {unknown}"
            space |= settings
    return space, [value for value in shown if isinstance(value, style.Picture)]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch):
    """The compilation cache is the tests', and it stays so."""
    monkeypatch.setattr(compile_cache, "enable", lambda: None)


@pytest.fixture(scope="module")
def drafter_directory(tmp_path_factory):
    return str(tmp_path_factory.mktemp("drafter"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_trees(drafter_directory):
    few = {"TARGET_STEPS": 2, "DRAFTER_STEPS": 1, "WORKDIR": drafter_directory}
    space, pictures = run("1_draft_tree", **few)
    assert len(pictures) == 4 and len(space["steps"]) > 1
    # The same settings find the same drafter.
    space, pictures = run(
        "2_coupled_drafting", NUM_SAMPLES=2, SHAPES=("D2K1V3",), **few
    )
    assert len(pictures) == 4 and set(space["at_each"]) == {"coupled", "deterministic"}


def test_one_step(tmp_path):
    space, pictures = run("3_one_rl_step", TARGET_STEPS=2, WORKDIR=str(tmp_path))
    assert len(pictures) == 4
    assert space["record"]["mismatch/logprob_max_abs"] < 1e-4
    # The initial weights have the first one.
    assert space["version"] == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_and_what_it_leaves(tmp_path):
    small = {"NUM_STEPS": 2, "TARGET_STEPS": 2, "WORKDIR": str(tmp_path)}
    space, pictures = run("4_tlt_run", **small)
    # One shows the drafter's training, for which two steps may leave no time.
    assert len(pictures) == 3 + (space["drawn"] is not None) and len(space["rows"]) == 2
    space, pictures = run("5_reading_results", RUN=str(tmp_path / "tlt"))
    assert len(pictures) == 2 and space["path"].is_file()
    assert len(space["completions"]) == 4


@pytest.mark.parametrize("name", runner.names())
def test_it_imports_and_defines_no_algorithm(name):
    sources, _ = code_of(name)
    for source in sources[1:]:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                used = {alias.name for alias in node.names}
                assert used <= {
                    "tempfile",
                    "itertools",
                    "json",
                    "statistics",
                    "numpy",
                }, used
            if isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in ("tlt_jax", "configs")
            assert not isinstance(node, ast.ClassDef | ast.While)
    text = "\n".join(sources)
    assert "style.picture(" in text


@pytest.mark.parametrize("name", runner.names())
def test_it_opens_in_colab_and_holds_what_it_shows(name):
    notebook = load(name)
    head, setup = ("".join(cell["source"]) for cell in notebook["cells"][:2])
    assert f"/blob/main/notebooks/{name}.ipynb)" in head
    assert len({*ADDRESS.findall(head), *ADDRESS.findall(setup)}) == 1
    assert "git" in setup and "pip" in setup
    assert runner.is_executed(notebook), (
        f"{name}: a cell was changed; execute it again with python -m notebooks {name}"
    )
    kinds = [
        kind
        for cell in notebook["cells"]
        for output in cell.get("outputs", ())
        for kind in output.get("data", ())
    ]
    assert "image/png" in kinds
    # Where it was executed is nobody's business.
    outputs = [cell.get("outputs") for cell in notebook["cells"]]
    assert not re.search(r"/(?:tmp|home|root|Users)/", json.dumps(outputs))
    assert (runner.FOLDER / f"{name}.ipynb").stat().st_size < 400_000


def test_the_first_cell_is_one():
    cells = {"".join(load(name)["cells"][1]["source"]) for name in runner.names()}
    assert len(cells) == 1


@pytest.mark.parametrize(
    ("opened", "cloned"),
    [
        (
            "/x/fileId=https%3A%2F%2Fgithub.com%2Fme%2Fmy.fork%2Fblob%2Fside%2Fb"
            "%2Fnotebooks%2F1.ipynb",
            ["--branch=side/b", "https://github.com/me/my.fork"],
        ),
        ("/x/drive/1.ipynb", ["https://github.com/OWNER/tlt_jax"]),
        (None, ["https://github.com/OWNER/tlt_jax"]),
    ],
)
def test_the_first_cell_installs_the_fork_it_was_opened_from(
    tmp_path, monkeypatch, opened, cloned
):
    """With Colab's answer to who runs here, and without one."""

    def urlopen(address, data, timeout):
        assert address == "http://172.28.0.12:9000/api/sessions"
        if opened is None:
            raise OSError("no such server")
        return io.BytesIO(json.dumps([{"path": opened}]).encode())

    found, started = iter([None, importlib.util.find_spec("tlt_jax")]), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLAB_JUPYTER_IP", "172.28.0.12")
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: next(found))
    monkeypatch.setattr(subprocess, "run", lambda words, check: started.append(words))
    monkeypatch.setattr(sys, "path", [*sys.path])
    sources, _ = code_of(runner.names()[0])
    exec(sources[0], {})
    clone, install = started
    assert clone == [
        *("git", "clone", "--quiet", "--depth=1", *cloned, "tlt_jax_clone"),
    ]
    assert install[1:] == ["-m", "pip", "install", "--quiet", "tlt_jax_clone"]


def test_the_first_cell_finds_the_clone_it_lies_in(monkeypatch):
    """Jupyter starts a notebook in its own folder."""
    root = runner.FOLDER.parent
    monkeypatch.chdir(runner.FOLDER)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(subprocess, "run", None)
    monkeypatch.delitem(sys.modules, "tlt_jax")
    sources, _ = code_of(runner.names()[0])
    exec(sources[0], {})
    assert sys.path[0] == str(root)


def test_an_address_is_written_everywhere(tmp_path, monkeypatch):
    name = runner.names()[0]
    (tmp_path / f"{name}.ipynb").write_text(json.dumps(load(name)))
    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    runner.publish("someone/tlt.jax")
    notebook = load(name)
    text = json.dumps(notebook)
    assert set(re.findall(r"[\w.-]+/[\w.-]+(?=/blob/)", text)) == {"someone/tlt.jax"}
    assert "https://github.com/someone/tlt.jax\\" in text
    assert runner.is_executed(notebook)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", runner.names())
def test_it_runs_as_it_is(name, tmp_path, monkeypatch):
    (tmp_path / f"{name}.ipynb").write_text(json.dumps(load(name)))
    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    root = runner.pathlib.Path(runner.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    runner.execute(name)
    assert runner.is_executed(load(name))
