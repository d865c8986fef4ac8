"""The table of the record's keys is whole, alive, and what the page shows."""

import pathlib
import re

from tests import tiny_runs
from tlt_jax.workdir import record_keys

ROOT = pathlib.Path(__file__).resolve().parents[2]
TABLE = record_keys.TRAINING + record_keys.DRAFTER
CODE = "\n".join(
    path.read_text("utf-8")
    for path in sorted((ROOT / "tlt_jax").rglob("*.py"))
    if path.name != "record_keys.py"
)


def test_the_page_is_up_to_date():
    found = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    assert found == record_keys.page().rstrip() + "\n", (
        "run `python -m tlt_jax.workdir.record_keys > docs/metrics.md`."
    )


def test_every_row_is_written_by_some_code():
    assert [key.name for key in TABLE if (key.code or key.name) not in CODE] == []
    for table in (record_keys.TRAINING, record_keys.DRAFTER):
        assert len({key.name for key in table}) == len(table)
    for key in TABLE:
        assert key.unit and key.meaning and "|" not in "".join(key[:4])


def test_every_key_that_the_code_names_is_in_the_table():
    groups = {key.name.split("/")[0] for key in TABLE} - {"step"}
    named = re.findall(rf'"((?:{"|".join(groups)})/[a-z0-9_@.]+)"', CODE)
    assert len(set(named)) > 60
    unknown = [
        name
        for name in sorted(set(named))
        if not tiny_runs.is_key(name, TABLE) and not name.endswith("@")
    ]
    assert unknown == []


def test_a_key_is_found_by_what_varies():
    assert record_keys.find("eval/pass@16").name == "eval/pass@{k}"
    assert record_keys.find("eval/pass@k") is None
    assert record_keys.find("reward/mean").meaning.startswith("mean over all")
    assert record_keys.find("reward/close.by").name == "reward/{name}"
    assert record_keys.find("texts/num") is None
    assert record_keys.find("texts/num", record_keys.DRAFTER).unit == "texts"
    name = "eval/coupled_rate_by_depth"
    assert record_keys.find(name, record_keys.DRAFTER).unit == "fractions"
    assert record_keys.find("drafter/fresh_accept_length_other") is None
