"""What a command's flags say: which policy, and how it samples."""

import json

import pytest

from tlt_jax import policy
from tlt_jax.models.formats import hf_config
from tlt_jax.specdec import sampling

NOTHING = dict.fromkeys(("temperature", "top_k", "top_p", "min_p"))


@pytest.mark.parametrize(
    "given,recommended,law,words",
    [
        ({}, {}, dict(temperature=0.7), "temperature 0.7 (by default)"),
        (
            {},
            dict(temperature=0.2, top_p=0.9),
            dict(temperature=0.2, top_p=0.9),
            "temperature 0.2 (the model's own), top_p 0.9",
        ),
        # A truncation of one's own goes with the recommended temperature, ...
        (
            dict(top_k=5),
            dict(temperature=0.2, top_p=0.9),
            dict(temperature=0.2, top_p=0.9, top_k=5),
            "temperature 0.2 (the model's own), top_k 5, top_p 0.9",
        ),
        # ... a temperature of one's own with nothing recommended.
        (
            dict(temperature=1.0),
            dict(temperature=0.2, top_p=0.9),
            dict(temperature=1.0),
            "temperature 1",
        ),
        (dict(temperature=0.0), {}, dict(temperature=0.0), "greedy"),
        (
            {},
            dict(temperature=0.0),
            dict(temperature=0.0),
            "greedy (the model's own)",
        ),
    ],
)
def test_the_law_is_as_asked_else_as_recommended(given, recommended, law, words):
    found = policy.law_of(NOTHING | given, recommended)
    assert found == (sampling.SamplingConfig(**law), words)


@pytest.mark.parametrize(
    "written,read",
    [
        ({}, {}),
        ({"eos_token_id": 2}, {}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": None},
            {"temperature": 0.6, "top_k": 20},
        ),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"min_p": 0.1, "top_p": "a"}, {"min_p": 0.1}),
    ],
)
def test_the_makers_sampling_is_read(written, read, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(written))
    assert hf_config.read_sampling(tmp_path) == read


def test_without_a_generation_config_the_makers_say_nothing(tmp_path):
    assert hf_config.read_sampling(tmp_path) == {}


def test_settings_are_literals_and_text_where_not():
    pairs = ["a=1", "b=0.5", "c=true", "d=word", "e=(1, 2)", "f=x=y", "g=", "h=False"]
    found = policy.literals("option", pairs)
    expected = dict(a=1, b=0.5, c=True, d="word", e=(1, 2), f="x=y", g="", h=False)
    assert found == expected and type(found["c"]) is bool
    for pairs, message in (
        (["a"], "--option='a' is not of the form KEY=VALUE"),
        (["=1"], "not of the form"),
        (["a=1", "a=2"], "--option=a=... is given twice"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.literals("option", pairs)


def test_a_directory_that_holds_nothing_says_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError) as raised:
        policy.load(str(tmp_path))
    for word in ("config.json", "checkpoints", "metrics.jsonl", "a run's workdir"):
        assert word in str(raised.value)
    with pytest.raises(ValueError, match="step=3 is for the workdir of a run"):
        policy.load(str(tmp_path), step=3)
    assert policy.workdir_of(str(tmp_path)) is None
    (tmp_path / "metrics.jsonl").touch()
    assert policy.workdir_of(str(tmp_path)) == str(tmp_path)
    with pytest.raises(ValueError, match="does not give the settings of a run"):
        policy.run_of(str(tmp_path))


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    policy.check_new("out", str(tmp_path / "new.jsonl"))
    (tmp_path / "old.jsonl").touch()
    with pytest.raises(ValueError, match="old.jsonl is there already"):
        policy.check_new("out", str(tmp_path / "old.jsonl"))
    with pytest.raises(ValueError, match="lies in no directory"):
        policy.check_new("out", str(tmp_path / "absent" / "new.jsonl"))
