import json
import logging

import pyarrow as pa
import pytest
from pyarrow import parquet

from tlt_jax.rl.tasks import examples as examples_lib

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl_gives_prompts_answers_ids_and_metadata(tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = [
        {"prompt": "1+1?", "answer": "2", "id": "first", "level": 3},
        {"prompt": CHAT, "answer": 4},
        {"prompt": "?", "id": 7, "answer": None},
    ]
    path.write_bytes(
        b"\xef\xbb\xbf" + "\n\n".join(map(json.dumps, rows)).encode() + b"\n\n"
    )
    first, second, third = examples_lib.read_examples(path)
    assert (first.example_id, first.prompt, first.answer) == ("first", "1+1?", "2")
    assert first.metadata == {"level": 3}
    assert (second.example_id, second.prompt, second.answer) == (
        "sums:3",
        tuple(CHAT),
        "4",
    )
    assert (third.example_id, third.answer) == ("7", None)


def test_parquet_gives_the_same_as_jsonl(tmp_path):
    rows = [
        {"id": "a", "prompt": CHAT, "reward_model": {"ground_truth": "4"}, "n": 1},
        {"id": "b", "prompt": CHAT[1:], "reward_model": {"ground_truth": "5"}, "n": 2},
    ]
    # A Parquet struct holds every field for every message, unused ones as null.
    padded = [
        row | {"prompt": [m | {"name": None} for m in row["prompt"]]} for row in rows
    ]
    parquet.write_table(pa.Table.from_pylist(padded), tmp_path / "x.parquet")
    keys = {"answer_key": "reward_model.ground_truth"}
    from_parquet = examples_lib.read_examples(tmp_path / "x.parquet", **keys)
    assert [e.answer for e in from_parquet] == ["4", "5"]
    assert from_parquet == examples_lib.read_examples(
        write(tmp_path / "x.jsonl", rows), **keys
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'{"prompt": "a", "answer": "\ud83d"}', r"answer holds half .*\(U\+D83D\)"),
        (r'{"prompt": "\udc00b"}', "prompt holds half a character"),
        (r'{"prompt": "b", "id": "\udc00"}', "id holds half a character"),
        ('{"prompt": "x"', r"came '\{\"prompt\": \"x\"', which is not JSON"),
        ("[1]", r"came \[1\], accepted is a JSON object"),
        ('{"question": "x", "a": 1}', r"no 'prompt' among the columns a, question"),
        ('{"prompt": ""}', "prompt is empty text"),
        ('{"prompt": 3}', r"prompt=3: accepted are text or a list of \{'role'"),
        ('{"prompt": []}', r"prompt=\[\]: accepted are text or a list"),
        ('{"prompt": ["x"]}', r"prompt\[0\]='x': accepted are"),
        ('{"prompt": [{"role": "user"}]}', r"prompt\[0\]=\{'role': 'user'\}: acc"),
        (
            '{"prompt": [{"role": "boss", "content": "x"}]}',
            r"prompt\[0\] has the role 'boss': accepted are system, user",
        ),
        (
            '{"prompt": [{"role": "assistant", "content": "x"}]}',
            "ends with the message of 'assistant': the last one must be the user's",
        ),
        ('{"prompt": "x", "answer": [1]}', r"answer=\[1\]: accepted are text, a num"),
        ('{"prompt": "x", "answer": true}', "answer=True: accepted are text, a num"),
        ('{"prompt": "x", "id": 1.5}', "id=1.5: accepted are text or an integer"),
        ('{"prompt": "x", "id": "good"}', "the id 'good' is that of line 1, too"),
        (b'{"prompt": "\xff"}', "it is not UTF-8"),
    ],
)
def test_bad_line_is_named_or_skipped_and_counted(tmp_path, caplog, line, message):
    path = tmp_path / "x.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"prompt": "x", "id": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 2: .*{message}") as error:
        examples_lib.read_examples(path)
    assert "on_bad='skip'" in str(error.value)
    with caplog.at_level(logging.WARNING):
        assert [
            e.example_id for e in examples_lib.read_examples(path, on_bad="skip")
        ] == ["good"]
    assert "skipped 1 of 2 lines" in caplog.text and "line 2" in caplog.text


def test_files_that_hold_no_examples(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl is not a file"):
        examples_lib.read_examples(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"suffix '\.txt': give a \.jsonl file"):
        examples_lib.read_examples(tmp_path / "x.txt")
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match="holds no examples: it is empty"):
        examples_lib.read_examples(empty)
    bad = write(tmp_path / "bad.jsonl", [1, 2])
    with pytest.raises(ValueError, match="all 2 lines were skipped"):
        examples_lib.read_examples(bad, on_bad="skip")
    with pytest.raises(ValueError, match="on_bad='ignore' is not one of error, skip"):
        examples_lib.read_examples(bad, on_bad="ignore")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.parquet is not a Parquet file"):
        examples_lib.read_examples(tmp_path / "text.parquet")
    # Of a damaged file the end is there, and what it tells of.
    table = pa.table({"prompt": [f"{i}?" for i in range(5000)]})
    parquet.write_table(table, tmp_path / "damaged.parquet", compression="none")
    data = bytearray((tmp_path / "damaged.parquet").read_bytes())
    data[4:400] = bytes(396)
    (tmp_path / "damaged.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged\.parquet (cannot be|is not)") as bad:
        examples_lib.read_examples(tmp_path / "damaged.parquet")
    assert "\n" not in str(bad.value)


def test_csv_gives_text_and_nothing_for_empty_cells(tmp_path):
    path = tmp_path / "x.csv"
    # As a spreadsheet writes it: a mark of the order of bytes, and a column of numbers.
    path.write_text(
        ',question,gold,level\n0,"1+1, or\nso?",2,easy\n1,2+2?,,\n\n2,3+3?,6,hard\n',
        "utf-8-sig",
    )
    keys = {"prompt_key": "question", "answer_key": "gold"}
    first, second, third = examples_lib.read_examples(path, **keys)
    assert first.prompt == "1+1, or\nso?" and first.answer == "2"
    # Numbered by the line on which a row ends.
    assert [e.example_id for e in (first, second, third)] == ["x:3", "x:4", "x:6"]
    assert first.metadata == {"": "0", "level": "easy"}
    assert second.answer is None and second.metadata["level"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("answer\n1\n", "x.csv, line 2: no 'prompt' among the columns answer"),
        ("prompt,answer\n,1\n", "x.csv, line 2: prompt is empty"),
        ("prompt,answer\na,b,1\n", "line 2 has more cells than the header: put text"),
        ('prompt\n"a', r"x.csv, line 2: unexpected end of data"),
        (b"prompt\nna\xefve\n", r"line 2: prompt holds half a character \(U\+DCEF\)"),
    ],
)
def test_csv_that_is_no_data(tmp_path, text, message):
    (tmp_path / "x.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        examples_lib.read_examples(tmp_path / "x.csv")
