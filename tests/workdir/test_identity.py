"""A run is its settings and what it has read: both are compared when it goes on."""

import hashlib
import json

import jax.numpy as jnp
import pytest

from tests import tiny_runs
from tests.workdir import test_checkpoint
from tlt_jax import config
from tlt_jax.rl.tasks import build as tasks
from tlt_jax.runtime import distributed
from tlt_jax.settings import schema, sections
from tlt_jax.workdir import checkpoint, identity, metrics

RUN = tiny_runs.config_of()


@pytest.fixture
def inputs(tmp_path):
    """Files of two kinds, two of them of the same name."""
    made = {}
    for role, names in {"data": ["a/x.jsonl", "b/x.jsonl"], "model": ["m"]}.items():
        made[role] = [tmp_path / "inputs" / name for name in names]
        for path in made[role]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"content of {path.name}")
    return made


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def claim(directory, inputs, run=RUN, lines=None):
    return identity.claim(directory, run, inputs, (lines or []).append)


def begin(directory):
    (directory / metrics.FILE).write_text('{"step": 1}\n')


def save(directory, about, step=2):
    """A checkpoint that says this of its run."""
    with checkpoint.Checkpointer(directory) as checkpointer:
        state = {"w": jnp.ones(3)}, {"m": jnp.ones(3)}
        checkpointer.save(step, *state, test_checkpoint.CFG, about)


def test_what_was_read_is_written_down(directory, inputs):
    about = claim(directory, inputs)
    digest = hashlib.sha256(b"content of x.jsonl").hexdigest()
    assert about["inputs"]["data"] == [["x.jsonl", digest], ["x.jsonl", digest]]
    assert about["inputs"]["model"][0][0] == "m"
    assert json.loads((directory / "inputs.json").read_text()) == about["inputs"]
    assert config.load(about["settings"]) == RUN


def test_a_file_that_has_changed_is_refused_by_name(directory, inputs):
    claim(directory, inputs)
    # A start that failed binds nobody.
    inputs["data"][1].write_text("a better one")
    claim(directory, inputs)
    begin(directory)
    claim(directory, inputs)
    inputs["data"][1].write_text("another")
    old, new = (
        hashlib.sha256(t).hexdigest()[:12] for t in (b"a better one", b"another")
    )
    with pytest.raises(schema.ConfigError) as raised:
        claim(directory, inputs)
    assert str(raised.value) == (
        f"{directory} holds a run that has read another x.jsonl (data; SHA-256 {old}"
        f"... then, {new}... now): restore the file, or use another --workdir."
    )
    inputs["data"][1].write_text("a better one")
    claim(directory, inputs)
    with pytest.raises(schema.ConfigError, match="has read 2 files of its data and fi"):
        claim(directory, inputs | {"data": inputs["data"][:1]})


def test_processes_have_the_same_files(directory, inputs):
    """They may be of machines with a disk each."""
    asked = []

    class Group(distributed.Group):
        def exchange(self, topic, value):
            asked.append((topic, value))
            return [value, "of other files"]

    with pytest.raises(
        ValueError, match="the processes have different files to read: "
    ):
        identity.claim(directory, RUN, inputs, print, Group(0, 2))
    ((topic, value),) = asked
    assert topic == "files to read" and len(value) == 16
    assert not list(directory.iterdir())


def test_a_checkpoint_knows_what_was_read_where_the_list_is_gone(directory, inputs):
    save(directory, claim(directory, inputs))
    (directory / "inputs.json").unlink()
    inputs["model"][0].write_text("another")
    with pytest.raises(
        schema.ConfigError, match=r"has read another m \(model; SHA-256"
    ):
        claim(directory, inputs)
    assert not (directory / "inputs.json").exists()


def test_a_checkpoint_knows_the_settings_where_the_record_is_gone(directory, inputs):
    save(directory, claim(directory, inputs))
    faster = tiny_runs.config_of(**{"optimizer.learning_rate": 0.5})
    rate = RUN.optimizer.learning_rate
    with pytest.raises(schema.ConfigError) as raised:
        identity.check_settings(directory, faster, config.load)
    assert str(raised.value) == (
        f"{directory} holds a run with optimizer.learning_rate={rate!r}, not 0.5: use "
        "another --workdir, or the same settings to resume."
    )
    identity.check_settings(directory, RUN, config.load)


def test_a_jump_of_the_learning_rate_is_said(directory, inputs):
    falling = {"optimizer.schedule": "cosine", "num_steps": 10}
    run = tiny_runs.config_of(**falling)
    save(directory, claim(directory, inputs, run))
    longer = tiny_runs.config_of(**falling | {"num_steps": 20})
    lines = ["before"]
    claim(directory, inputs, run, lines)
    assert lines == ["before"]
    claim(directory, inputs, longer, lines)
    assert lines[1:] == [
        "optimizer.schedule='cosine' falls to 0 at num_steps, 20 and no longer 10: "
        "from here on the learning rate is that of a run of 20 steps."
    ]
    constant = schema.to_dict(tiny_runs.config_of(num_steps=10))
    assert identity.jump(constant, tiny_runs.config_of(num_steps=20)) == ""


def test_tasks_say_what_they_read(tmp_path):
    for name in ("train", "test"):
        rows = [{"prompt": f"{name} {i}", "answer": str(i)} for i in range(30)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    one, two = (str(tmp_path / f"{name}.jsonl") for name in ("train", "test"))

    def read(name, **options):
        pairs = tuple(sorted(options.items()))
        task = sections.Task(name=name, options=pairs, system_prompt="Think.")
        return [str(path) for path in tasks.files_of(tasks.build(task))]

    assert read(one) == [one]
    assert read(one, eval_path=two) == [one, two]
    assert read(str(tmp_path), split="train", eval_split="test") == [one, two]
    assert read("count") == []
