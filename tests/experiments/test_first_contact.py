"""The first minutes with an accelerator, rehearsed on a CPU."""

import os
import sys

import pytest

from configs import tiny
from experiments import deadlines, device_items, first_contact
from experiments.lab import catalogue, tables
from tlt_jax import config

# What a machine as lent has not.
LACKING = ("ml_collections", "gguf")
CHILD = """
import os, sys, time
from experiments import deadlines

def good():
    print("this goes to the log")
    yield {"case": "a", "value": 1}
    yield {"case": "b", "value": 2.5}

def bad():
    yield {"case": "before"}
    raise RuntimeError("out of memory\\nand more")

def hangs():
    yield {"case": "before"}
    time.sleep(60)

def dies():
    os._exit(3)
    yield

deadlines.answer((name, globals()[name]) for name in sys.argv[1:])
"""


@pytest.fixture
def lacking(tmp_path, monkeypatch):
    """Processes started meanwhile find these packages not installed."""
    for name in LACKING:
        path = tmp_path / "lacking" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text('raise ImportError("not installed on this machine")\n')
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'lacking'}:{os.getcwd()}")


def measured(tmp_path, items, budget_s=60.0, limit_s=1.0):
    limits = [deadlines.Limit(name, limit_s) for name in items]
    command = [sys.executable, "-c", CHILD]
    log = tmp_path / "log"
    rows = list(deadlines.run(command, limits, budget_s, log, os.environ))
    for row in rows:
        row.pop("item_s", None)
    return rows, log.read_text() if log.exists() else ""


def test_what_hangs_fails_or_dies_costs_its_own_limit_and_a_line(tmp_path):
    rows, log = measured(tmp_path, ["good", "bad", "hangs", "dies", "good"])
    whole = [
        {"item": "good", "case": "a", "value": 1},
        {"item": "good", "case": "b", "value": 2.5},
        {"item": "good", "ended": "whole"},
    ]
    assert rows == [
        *whole,
        {"item": "bad", "case": "before"},
        {"item": "bad", "ended": "failed: RuntimeError: out of memory"},
        {"item": "hangs", "case": "before"},
        {"item": "hangs", "ended": "stopped: its limit was spent"},
        {"item": "dies", "ended": "its process ended: see the end of the log"},
        *whole,
    ]
    assert log.count("this goes to the log") == 2
    assert "RuntimeError: out of memory" in log


def test_what_the_budget_leaves_no_time_for_is_said(tmp_path):
    rows, _ = measured(tmp_path, ["hangs", "good"], budget_s=1.0, limit_s=60.0)
    assert rows[-2:] == [
        {"item": "hangs", "ended": "stopped: the budget was spent"},
        {"item": "good", "ended": "not begun: the budget was spent"},
    ]


def test_rehearsal_without_recipes_packages(tmp_path, lacking):
    out = tmp_path / "out"
    rows = first_contact.main(["--rehearse", f"--out={out}", "--items=copy,kernels"])
    assert [row["ended"] for row in rows if "ended" in row] == ["whole"] * 2
    (kernel,) = tables.where(rows, item="kernels", case="decode")
    assert kernel["is_right"] and 0 < kernel["max_error"] < 5e-6
    assert rows[0]["case"] == "copy on the device" and rows[0]["gb_per_s"] > 0.01
    assert tables.read(out / "first_contact.csv")[0]["gb_per_s"] == rows[0]["gb_per_s"]
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"first_contact.{end}" for end in ("csv", "json", "log")]


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path, lacking):
    out = tmp_path / "out"
    rows = first_contact.main(["--rehearse", f"--out={out}", "--budget-s=1800"])
    ended = {row["item"]: row["ended"] for row in rows if "ended" in row}
    assert ended == dict.fromkeys(first_contact.LIMITS, "whole")
    equal = tables.where(rows, item="equality")
    exact = [row for row in equal if "case" in row]
    assert len(exact) == 3 and all(row["rows_equal"] == row["rows"] for row in exact)
    runs = [row for row in rows if row["item"] == "tiny_run" and "case" in row]
    assert [row["case"] for row in runs] == ["off, workers=2", "tlt, workers=2"]
    assert [row["steps_differing"] for row in runs] == [0, 0]
    (timed,) = tables.where(rows, item="bench", case="decode")
    assert timed["median_us"] > 0
    kernels = tables.read(out / "first_contact_kernels.csv")
    assert {row["case"] for row in kernels} == {"B=1", "B=2"}
    assert all(row["us_per_step"] > 0 for row in kernels)
    assert len(list(out.iterdir())) <= 8


def test_the_tiny_run_is_that_of_the_recipe():
    values = tiny.get_config("count")
    found = device_items.tiny_settings("off", 1)
    ours = {key: getattr(values, key) for key in ("seed", "precision")}
    assert found.seed == ours["seed"] and found.precision == ours["precision"]
    flat = {**device_items.OF_HERE, "workers.num": 1, "mesh.data": 1}
    values.update_from_flattened_dict({**flat, "specdec.mode": "off"})
    assert config.differences(config.load(values), found) == {}


def test_items_have_limits_and_children_what_they_need():
    assert list(first_contact.LIMITS) == list(device_items.ITEMS)
    made = first_contact.environment({"JAX_PLATFORMS": "cuda", "A": "b"})
    assert made["JAX_PLATFORMS"] == "cuda,cpu" and made["A"] == "b"
    assert made["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9"
    kept = first_contact.environment(
        {"JAX_PLATFORMS": "cpu", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    )
    assert kept["JAX_PLATFORMS"] == "cpu"
    assert kept["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"


def test_what_cannot_be_asked_for_is_said():
    parse = first_contact.EXPERIMENT.parse
    with pytest.raises(ValueError, match="--items names decod; known are copy, kern"):
        parse(["--items=copy,decod"])
    with pytest.raises(ValueError, match="--budget-s=0: seconds for everything"):
        parse(["--budget-s=0"])
    assert parse([]).out.name == "one_gpu"
    assert parse(["--rehearse"]).out.name == "rehearsal"
    (row,) = tables.where(catalogue.listing("one_gpu"), experiment="first_contact")
    assert row["command"] == "python -m experiments.first_contact --budget-s=420"
    assert row["takes"] == "one accelerator, seven minutes; never run"
