"""What is told of a table: command, code, machine; no path."""

import importlib.machinery
import json
import os
import sys
import types

import pytest

from experiments.lab import provenance


def test_provenance_tells_what_is_needed_and_no_path(tmp_path, monkeypatch):
    home = str(tmp_path)
    arguments = [f"--model-dir={home}/m", f"--peer-python=a={home}/p,b=~/q", "--n=3"]
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    record = provenance.Provenance("decode_speed", {"rounds": 5})
    record.record["versions"] |= {"a": {"torch": "2"}}
    record.write(tmp_path / "p.json")
    text = (tmp_path / "p.json").read_text()
    told = json.loads(text)
    assert told["command"] == (
        "python -m experiments.decode_speed --model-dir=PATH "
        "--peer-python=a=PATH,b=PATH --n=3"
    )
    assert home not in text
    for name in ("commit", "cpu_model", "device", "settings", "wall_s"):
        assert told[name] is not None
    assert told["versions"]["a"] == {"torch": "2"}
    assert told["config_hash"] == provenance.config_hash({"rounds": 5})
    assert told["config_hash"] != provenance.config_hash({"rounds": 6})


def test_a_record_names_the_command_that_was_given(monkeypatch):
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    for name, told in (
        ("experiments.peers_side_by_side", "peers_side_by_side"),
        ("experiments.__main__", "decode_speed"),
        ("pytest.__main__", "decode_speed"),
    ):
        main.__spec__ = importlib.machinery.ModuleSpec(name, None)
        assert provenance.started_module("decode_speed") == told


def test_a_stamp_tells_scale_and_device():
    record = {"command": "python -m experiments.e --scale=one_gpu", "commit": "a" * 40}
    gpu = provenance.stamp(record | {"device": "1 x H100", "cpu_model": "Zen"})
    assert gpu == "scale one_gpu · 1 x H100 · aaaaaaaa"
    cpu = {"command": "python -m experiments.e", "device": "cpu", "cpu_model": "Zen"}
    assert provenance.stamp(cpu) == "scale cpu · Zen · no commit"


def test_a_stamp_names_every_machine_that_rows_are_of():
    def run(model, commit, **more):
        return {"device": "cpu", "cpu_model": model, "commit": commit * 40, **more}

    first = run("Zen", "a", command="python -m experiments.e")
    also = {"continued": [run("Zen", "b", uncommitted_changes=True)]}
    assert provenance.stamp(first | also) == "scale cpu · Zen · aaaaaaaa, bbbbbbbb+"
    also["continued"].append(run("Xeon", "c"))
    two = "scale cpu · 2 machines: Zen · aaaaaaaa, bbbbbbbb+; Xeon · cccccccc"
    assert provenance.stamp(first | also) == two
    many = {"continued": [run("Zen", commit) for commit in "bcd"]}
    assert provenance.stamp(first | many) == "scale cpu · Zen · aaaaaaaa and 3 others"
    read = {"sources": [run("Xeon", "c")]}
    assert "Zen · aaaaaaaa; Xeon" in provenance.stamp(first | read)
    assert provenance.stamp(first | read, is_read=True) == "scale cpu · Xeon · cccccccc"
    assert provenance.caption(first | {"started_utc": "2026-11-23T01:02"}) == (
        "Zen · aaaaaaaa · 2026-11-23"
    )


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="needs Linux")
def test_the_processor_has_a_name():
    assert provenance.cpu_model() not in ("", "unknown")
