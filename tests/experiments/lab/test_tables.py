"""Tables are continued cell by cell; their records say who measured what."""

import csv
import json

import pytest

from experiments.lab import provenance, tables


def record(n=1, source_hash="s", machine="here"):
    made = provenance.Provenance("e", {"n": n})
    made.record |= {"source_hash": source_hash, "cpu_model": machine}
    return made


def run(folder, cells, measure_cell, made=None, **more):
    return tables.measure(folder, "e", made or record(), cells, measure_cell, **more)


def measured(calls):
    def measure(cell):
        calls.append(cell.name)
        return [{"value": cell.overrides["x"] * 2.5, "told": None}]

    return measure


CELLS = [tables.Cell({"x": n}, seed=7) for n in (1, 2, 3)]


def test_finished_cells_are_skipped(tmp_path):
    calls = []
    with pytest.raises(RuntimeError, match="lights out"):
        run(tmp_path, CELLS, failing_at(2, calls))
    assert calls == ["x=1 seed=7", "x=2 seed=7"]
    told = json.loads((tmp_path / "e.json").read_text())
    assert told["cells"] == {"wanted": 3, "done": 1}
    rows = run(tmp_path, CELLS, measured(calls))[""]
    assert calls[2:] == ["x=2 seed=7", "x=3 seed=7"]
    assert [row["value"] for row in rows] == [2.5, 5.0, 7.5]
    assert tables.read(tmp_path / "e.csv") == rows
    again = run(tmp_path, CELLS[:1], measured(calls), again=True)[""]
    assert len(calls) == 5 and len(again) == 1


def failing_at(x, calls):
    def measure(cell):
        calls.append(cell.name)
        if cell["x"] == x:
            raise RuntimeError("lights out")
        return [{"value": cell.overrides["x"] * 2.5, "told": None}]

    return measure


@pytest.mark.parametrize("other", [{"n": 2}, {"source_hash": "t"}])
def test_stale_rows_are_refused(tmp_path, other):
    run(tmp_path, CELLS, measured([]))
    with pytest.raises(ValueError, match="rows of other .*--again"):
        run(tmp_path, CELLS, measured([]), record(**other))


def test_a_carried_table_is_continued_and_stays_carried(tmp_path):
    run(tmp_path, CELLS[:1], measured([]))
    path = tmp_path / "e.json"
    step = {"from": "s", "to": "t", "commit": "abc", "why": "equal digests"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"carried": [step]}))
    rows = run(tmp_path, CELLS, measured([]), record(source_hash="t"))[""]
    assert len(rows) == 3
    told = json.loads(path.read_text())
    assert provenance.is_current(told, "t") and told["source_hash"] == "s"
    with pytest.raises(ValueError, match="rows of other code"):
        run(tmp_path, CELLS, measured([]), record(source_hash="u"))


def test_a_record_stays_that_of_the_machine_that_measured(tmp_path):
    run(tmp_path, CELLS[:2], measured([]))
    first = (tmp_path / "e.json").read_text()
    again = record(machine="elsewhere")
    run(tmp_path, CELLS[:2], measured([]), again)
    # Nothing was measured: what a plot is stamped with is the record that is there.
    assert (tmp_path / "e.json").read_text() == first
    assert again.record == json.loads(first)
    run(tmp_path, CELLS, measured([]), record(machine="elsewhere"))
    told = json.loads((tmp_path / "e.json").read_text())
    assert told["cpu_model"] == "here" and told["cells"] == {"wanted": 3, "done": 3}
    (added,) = told["continued"]
    assert added["cpu_model"] == "elsewhere" and added["cells"] == ["x=3 seed=7"]
    assert added["wall_s"] >= 0 and told["wall_s"] == json.loads(first)["wall_s"]


def test_tables_of_an_experiment_are_continued_together(tmp_path):
    def measure(cell):
        return {"": [{"x": cell["x"]}], "curves": [{"y": n} for n in range(2)]}

    run(tmp_path, CELLS[:1], measure, others=("curves",))
    found = run(tmp_path, CELLS, measure, others=("curves",))
    assert len(found[""]) == 3 and len(found["curves"]) == 6
    assert tables.read(tmp_path / "e_curves.csv") == found["curves"]


def test_rows_are_chosen_and_collected():
    rows = [{"a": 1, "b": 2}, {"a": 2, "b": 3}, {"a": 1, "b": 4}]
    assert tables.where(rows, a=1) == [rows[0], rows[2]]
    assert tables.groups(rows, "a") == {(1,): [rows[0], rows[2]], (2,): [rows[1]]}
    assert tables.values(rows, "a") == [1, 2] and tables.column(rows, "b") == [2, 3, 4]


def test_tables_hold_every_column_that_some_row_has(tmp_path):
    rows = [{"a": 1, "b": None}, {"a": 2, "c": 0.123456789}]
    path = tmp_path / "new" / "t.csv"
    tables.write(path, rows)
    with path.open(newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"a": "1", "b": "", "c": ""},
            {"a": "2", "b": "", "c": "0.123456789"},
        ]
    assert tables.shown(rows).splitlines() == [
        "a  b       c",
        "1  -       -",
        "2  -  0.1235",
    ]
