"""Data sets as directories and on the hub: their layouts written down, not imported."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from tlt_jax.rl.tasks import build as tasks
from tlt_jax.rl.tasks import examples as examples_lib
from tlt_jax.rl.tasks import files as data_files
from tlt_jax.settings import sections

ROWS = [
    {"prompt": [{"role": "user", "content": f"{i}+1?"}], "answer": str(i + 1), "id": i}
    for i in range(7)
]


def save(directory, rows, num_files=2, **state):
    """Write what `save_to_disk` of datasets 5 does: streams, and a list of them."""
    directory.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{num_files:05d}.arrow" for i in range(num_files)]
    size = -(-len(rows) // num_files)
    for i, name in enumerate(names):
        table = pa.Table.from_pylist(rows[i * size : (i + 1) * size])
        with pa.OSFile(str(directory / name), "wb") as file:
            with pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
    written = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "e1d4d9a7b8a3c2f1",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (directory / "state.json").write_text(json.dumps(written | state))
    (directory / "dataset_info.json").write_text("{}")
    return directory


def ids(name, **options):
    return [int(e.example_id) for e in examples_lib.read_examples(name, **options)]


def test_directories_that_datasets_saved(tmp_path):
    assert ids(save(tmp_path / "one", ROWS)) == list(range(7))
    save(tmp_path / "all" / "train", ROWS[2:])
    save(tmp_path / "all" / "test", ROWS[:2], 1)
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert ids(tmp_path / "all") == [2, 3, 4, 5, 6]
    assert ids(tmp_path / "all", split="test") == [0, 1]
    with pytest.raises(ValueError, match="no split 'dev': it has train, test; name"):
        ids(tmp_path / "all", split="dev")
    with pytest.raises(ValueError, match="holds one split alone"):
        ids(tmp_path / "one", split="train")
    # Rows are named by their file.
    bad = [ROWS[0], {"prompt": [], "answer": "", "id": 9}]
    with pytest.raises(ValueError, match=r"data-00000-of-00001\.arrow, row 2: prompt="):
        ids(save(tmp_path / "bad", bad, 1))


def test_damaged_directories_are_refused(tmp_path):
    directory = save(tmp_path / "x", ROWS)
    (directory / "data-00001-of-00002.arrow").write_bytes(b"ARROW1")
    with pytest.raises(ValueError, match="00001-of-00002.arrow is not an Arrow stream"):
        ids(directory)
    (directory / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match="lacks data-00001-of-00002.arrow: save the"):
        ids(directory)
    (directory / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="lists no files"):
        ids(directory)
    (directory / "state.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        ids(directory)
    indexed = save(tmp_path / "y", ROWS, _indices_data_files=[{"filename": "i.arrow"}])
    with pytest.raises(ValueError, match="flatten_indices"):
        ids(indexed)


def test_directories_of_files(tmp_path):
    with pytest.raises(ValueError, match="holds no data: give a .jsonl file"):
        data_files.find(tmp_path)
    assert not data_files.is_data(str(tmp_path))
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in (
        ("train-00000-of-00002", ROWS[:3]),
        ("train-00001-of-00002", ROWS[3:5]),
        ("test-00000-of-00001", ROWS[5:]),
    ):
        parquet.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    assert data_files.is_data(str(tmp_path))
    assert ids(tmp_path) == [0, 1, 2, 3, 4]
    assert ids(str(tmp_path), split="test") == [5, 6]
    (folder / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds .jsonl and .parquet files"):
        ids(tmp_path)
    with pytest.raises(ValueError, match="subset='main' is for sets on the hub"):
        ids(tmp_path, subset="main")
    with pytest.raises(ValueError, match="is one file: leave it out"):
        ids(folder / "train.jsonl", split="train")


# As the hub lists the branch refs/convert/parquet of openai/gsm8k, in another order.
GSM8K = [
    ".gitattributes",
    "main/test/0000.parquet",
    "main/train/0001.parquet",
    "main/train/0000.parquet",
    "socratic/test/0000.parquet",
    "socratic/train/0000.parquet",
]


def test_files_on_the_hub_are_chosen():
    def chosen(split=None, subset="main", there=GSM8K):
        return data_files.on_hub("openai/gsm8k", there, split, subset)

    assert chosen() == ["main/train/0000.parquet", "main/train/0001.parquet"]
    assert chosen("test", "socratic") == ["socratic/test/0000.parquet"]
    assert chosen(subset=None, there=GSM8K[:2]) == GSM8K[1:2]
    with pytest.raises(ValueError, match="no subset 'default': it has main, socratic"):
        chosen(subset=None)
    with pytest.raises(ValueError, match="no split 'dev': it has test, train"):
        chosen("dev")


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    with pytest.raises(
        ValueError, match=r"hub:a/b could not be fetched .*offline.*copy"
    ):
        data_files.find("hub:a/b")


def test_a_task_has_its_splits(tmp_path):
    save(tmp_path / "train", ROWS[2:])
    save(tmp_path / "test", ROWS[:2], 1)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    made = tasks.build(
        sections.Task(name=str(tmp_path), options=(("eval_split", "test"),))
    )
    assert [e.example_id for e in made.examples("eval")] == ["0", "1"]
    assert len(made.examples("train")) == 5
    assert made.score(made.examples("eval")[0], "Answer: 1") == 1.0
    both = (("eval_split", "test"), ("eval_path", "x.jsonl"))
    with pytest.raises(ValueError, match="both name evaluation examples"):
        tasks.build(sections.Task(name=str(tmp_path), options=both))
