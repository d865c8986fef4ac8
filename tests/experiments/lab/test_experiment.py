"""One program runs every declaration: command line, cells, tables, plot, record."""

import json

import pytest

from experiments.lab import claims, experiment, plotting, provenance, tables

LINE = claims.at_least("mean", 1.0, kind="up")


def declared(calls, **more):
    """An experiment that counts what it is asked for."""

    def context(options, closing):
        closing.callback(calls.append, "closed")
        calls.append("context")
        return options.scale_by

    def measure(context, cell, constant):
        calls.append(cell.name)
        value = context * {"up": 1, "down": -1}[cell["kind"]] + cell.seed
        return {tables.ROWS: [{"kind": cell["kind"], "value": value}], "twice": [{}]}

    def summary_of(rows, scale_by):
        return [
            {"kind": kind, "mean": sum(tables.column(its, "value")) / scale_by}
            for (kind,), its in tables.groups(rows, "kind").items()
        ]

    def plot(rows, summary, constant, stamp):
        calls.append(f"plot {len(rows)} {len(summary)} {constant} {stamp}")
        return plotting.figure("title", "x", "y", stamp)[0]

    made = {
        "slug": "made",
        "text": "Says what it is.",
        "title": "a title",
        "options": (
            *experiment.plain(scale_by=2),
            *experiment.plain(recorded=False, unseen="x"),
            experiment.seeds(2),
        ),
        "constants": {"constant": 7},
        "context": context,
        "cells": {"kind": ("up", "down")},
        "measure": measure,
        "others": ("twice",),
        "summary": summary_of,
        "plot": plot,
        "claims": {"what goes up is 1 or more": LINE},
    }
    return experiment.Experiment(**made | more)


def test_functions_are_given_what_they_name(tmp_path):
    calls = []
    made = declared(calls)
    summary = made.main([f"--out={tmp_path}", "--scale-by=4"])
    names = ["up seed=0", "down seed=0", "up seed=1", "down seed=1"]
    assert calls[:-2] == ["context", *(f"kind={name}" for name in names)]
    assert calls[-2].startswith("plot 4 2 7 scale cpu") and calls[-1] == "closed"
    assert summary == [{"kind": "up", "mean": 9 / 4}, {"kind": "down", "mean": -7 / 4}]
    assert tables.read(tmp_path / "made_summary.csv") == summary
    assert len(tables.read(tmp_path / "made_twice.csv")) == 4
    told = json.loads((tmp_path / "made.json").read_text())
    assert told["settings"] == {"scale_by": 4, "constant": 7}
    (found,) = made.check_claims(tmp_path)
    assert found["verdict"] == claims.HOLDS
    assert (tmp_path / "made.png").stat().st_size > 5000


def test_a_run_that_was_stopped_is_taken_up_where_it_stood(tmp_path):
    calls = []

    def stopped(cell):
        if cell["kind"] == "down":
            raise KeyboardInterrupt
        return [{"kind": cell["kind"], "value": 1}]

    options = [f"--out={tmp_path}", "--seeds=1"]
    with pytest.raises(KeyboardInterrupt):
        declared(calls, measure=stopped).main(options)
    assert tables.read(tmp_path / "made.csv") == [
        {"cell": "kind=up seed=0", "kind": "up", "value": 1}
    ]
    calls.clear()
    declared(calls).main(options)
    assert calls[:2] == ["context", "kind=down seed=0"]
    # With more seeds it goes on; of other settings it does not.
    calls.clear()
    declared(calls).main([f"--out={tmp_path}", "--seeds=2", "--unseen=y"])
    assert calls[1:3] == ["kind=up seed=1", "kind=down seed=1"]
    with pytest.raises(ValueError, match="made.csv has rows of other settings"):
        declared(calls).main([*options, "--scale-by=3"])
    calls.clear()
    declared(calls).main([*options, "--again"])
    assert calls[1:3] == ["kind=up seed=0", "kind=down seed=0"]


def test_a_picture_of_cells_that_were_there_is_stamped_as_they_are(
    tmp_path, monkeypatch
):
    calls = []
    monkeypatch.setattr(provenance, "device_name", lambda: "1 x there")
    declared(calls).main([f"--out={tmp_path}"])
    stamped, record = calls[-2], (tmp_path / "made.json").read_text()
    monkeypatch.setattr(provenance, "device_name", lambda: "1 x elsewhere")
    declared(calls).main([f"--out={tmp_path}"])
    assert calls[-1] == stamped and "1 x there" in stamped
    assert (tmp_path / "made.json").read_text() == record
    # What is read from elsewhere, and measured nowhere, is made anew.
    declared(calls, is_derived=True).main([f"--out={tmp_path}"])
    assert "1 x elsewhere" in calls[-2]
    # It is drawn again from its tables alone.
    assert declared(calls).redraw(tmp_path) == "drawn"
    assert declared(calls, plot=None).redraw(tmp_path) == "has no plot"
    assert declared(calls).redraw(tmp_path / "gone") == "has no results"
    lacking = declared(calls, plot=lambda rows, gone: None)
    assert "lack 'gone': run it again" in lacking.redraw(tmp_path)


def test_names_and_pairs_are_read_or_refused():
    assert experiment.known("b,a", "abc", "letters") == ["b", "a"]
    with pytest.raises(ValueError, match="--letters names z; known are a, b, c"):
        experiment.known("a,z", "abc", "letters")
    assert experiment.parse_pairs("a=1,b=x=y", "set") == {"a": "1", "b": "x=y"}
    with pytest.raises(ValueError, match="--set=a: 'a' has no value"):
        experiment.parse_pairs("a", "set")
