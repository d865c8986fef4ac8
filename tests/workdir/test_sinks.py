"""What sinks get of a run's record: numbers, settings, completions; or are missing."""

import importlib.util
import json
import subprocess
import sys
import types

import pytest
from tensorboard.backend.event_processing import event_accumulator, event_file_loader
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util import tensor_util

from tests import tiny_runs
from tlt_jax.workdir import metrics, sinks

INSTALLED = importlib.util.find_spec("wandb") is not None
ROWS = (
    {"step": 1, "reward/mean": 0.25, "specdec/strategy": "off"},
    {"step": 2, "reward/mean": 0.5, "specdec/accept_rate_by_depth": [0.5, 0.25]},
)


def opened(directory, first_step=0, **overrides):
    run = tiny_runs.config_of(**{"log.wandb": "offline"} | overrides)
    return sinks.open_writer(directory, first_step, run)


def test_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(metrics.MetricsError, match="not installed: pip install wandb"):
        opened(tmp_path)
    assert not list(tmp_path.iterdir())
    with opened(tmp_path, **{"log.wandb": "off"}) as writer:
        writer.write(ROWS[0])
    assert len(metrics.read(tmp_path)) == 1


def test_sinks_get_the_numbers_of_rows_that_are_on_disk(tmp_path):
    class Sink:
        def __init__(self):
            self.rows, self.shown, self.closed = [], [], 0

        def write(self, step, numbers):
            assert metrics.read(tmp_path)[-1]["step"] == step
            self.rows.append((step, numbers))

        def samples(self, step, records):
            self.shown.append((step, [record["reward"] for record in records]))

        def close(self):
            self.closed += 1

    sink = Sink()
    with metrics.MetricsWriter(tmp_path, 0, [sink]) as writer:
        for row in ROWS:
            writer.write(row)
        with pytest.raises(ValueError):
            writer.write({"step": 2})
        writer.samples(2, [{"reward": x} for x in (0.5, 3, 1, 2, 0, 4, 2.5)])
        writer.samples(3, [{"reward": 0.5}])
    depths = {f"specdec/accept_rate_by_depth/{i}": x for i, x in enumerate((0.5, 0.25))}
    assert sink.rows == [(1, {"reward/mean": 0.25}), (2, {"reward/mean": 0.5} | depths)]
    # From the best to the worst, in even steps.
    assert sink.shown == [(2, [4, 2.5, 1, 0]), (3, [0.5])]
    assert sink.closed == 1


# As rollouts/ has them.
SAMPLES = [
    {"reward": 1.25, "text": "= 2\n# So", "prompt": "1+1", "answer": "2"},
    {
        "reward": 0.0,
        "text": "",
        "prompt": [{"role": "user", "content": "2+2"}],
        "answer": None,
    },
]


def test_tensorboard_gets_numbers_settings_and_completions(tmp_path):
    run = tiny_runs.config_of(**{"log.tensorboard": True})
    with sinks.open_writer(tmp_path, 4, run) as writer:
        writer.write({"step": 4, "reward/mean": 0.5, "policy/learning_rate": [1.0, 2]})
        writer.samples(4, SAMPLES)
    (file,) = (tmp_path / sinks.TENSORBOARD).iterdir()
    events = list(event_file_loader.LegacyEventFileLoader(str(file)).Load())
    assert events[1].session_log.status == events[1].session_log.START
    assert {event.step for event in events[1:]} == {4}
    values = [value for event in events[2:] for value in event.summary.value]
    texts = {
        value.tag: tensor_util.make_ndarray(value.tensor).item().decode()
        for value in values
        if value.metadata.plugin_data.plugin_name == "text"
    }
    assert list(texts) == ["settings", "samples/1", "samples/2"]
    assert "\n    rollout.max_new_tokens = 6\n" in texts["settings"]
    assert texts["samples/1"] == (
        "**reward 1.25**\n\ntext\n\n    = 2\n    # So\n\nprompt\n\n    1+1\n\nanswer"
        "\n\n    2"
    )
    assert "prompt\n\n    user: 2+2\n" in texts["samples/2"]
    (started,) = [v for v in values if v.metadata.plugin_data.plugin_name == "hparams"]
    content = started.metadata.plugin_data.content
    session = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert session.hparams["rollout.max_new_tokens"].number_value == 6
    assert session.hparams["algorithm.name"].string_value == "grpo"
    numbers = {v.tag: v.simple_value for v in values if v.HasField("simple_value")}
    assert numbers == {
        "reward/mean": 0.5,
        "policy/learning_rate/0": 1.0,
        "policy/learning_rate/1": 2.0,
    }
    # And TensorBoard's own reader takes it.
    read = event_accumulator.EventAccumulator(str(file)).Reload()
    assert read.Scalars("reward/mean")[0].value == 0.5
    assert "samples/1" in read.Tags()["tensors"]


class Fake(types.ModuleType):
    """Stands in for wandb or trackio, and keeps what it is told."""

    Error = RuntimeError

    def __init__(self, name, monkeypatch):
        super().__init__(name)
        self.__spec__ = importlib.util.spec_from_loader(name, None)
        self.told = []
        monkeypatch.setitem(sys.modules, name, self)

    def Settings(self, **options):
        return options

    def Table(self, columns, data):
        return columns, data

    def init(self, **options):
        print("* what a library likes to say")
        self.told.append(options)
        # Trackio's own run, finished by itself, would be finished again at exit.
        return self if self.__name__ == "wandb" else types.SimpleNamespace(log=self.log)

    def log(self, numbers, step):
        self.told.append((step, numbers))

    def finish(self):
        self.told.append("finished")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_sink_by_name_gets_all_of_it(name, tmp_path, monkeypatch, capsys):
    package = Fake(name, monkeypatch)
    (tmp_path / "run").mkdir()
    on = {"log.wandb": "off", f"log.{name}": "online" if name == "wandb" else True}
    for step in (1, 2):
        with opened(tmp_path / "run", step, **on) as writer:
            writer.write(ROWS[step - 1])
            writer.samples(step, SAMPLES)
    begun, first, shown, end, again, *_ = package.told
    assert (begun["project"], begun["resume"]) == ("tlt_jax", "allow")
    assert begun["config"]["rollout"]["max_new_tokens"] == 6
    assert first == (1, {"reward/mean": 0.25}) and end == "finished"
    columns, data = shown[1]["samples"]
    assert shown[0] == 1 and columns == ["reward", "text", "prompt", "answer"]
    assert data[0] == [1.25, "= 2\n# So", "1+1", "2"]
    assert data[1] == [0.0, "", "user: 2+2", ""]
    # A resumed run goes on in the same one.
    key = "id" if name == "wandb" else "name"
    assert again[key] == begun[key] and len(begun[key]) >= 10
    assert begun["name"].startswith("run")
    if name == "trackio":
        assert capsys.readouterr().out == ""


def test_trackio_that_fails_is_one_line(tmp_path, monkeypatch):
    package = Fake("trackio", monkeypatch)
    settings = {"log.wandb": "off", "log.trackio": True}

    def init(**options):
        raise OSError("database is locked")

    package.init = init
    with pytest.raises(metrics.MetricsError, match=r"begin a run \(database is locked"):
        opened(tmp_path, **settings)
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        metrics.MetricsError, match="not installed: pip install trackio"
    ):
        opened(tmp_path, **settings)


# In a process of its own: wandb starts another, and threads.
_RUN = """
import json, sys
from tests.workdir import test_sinks as here
for first, row in enumerate(here.ROWS):
    with here.opened(sys.argv[1], first + 1) as writer:
        writer.write(row)
"""
# What was written: records in a log of blocks as LevelDB has it, after 7 bytes.
_READ = """
import json, struct, sys
from wandb.proto import wandb_internal_pb2 as pb
for path in sys.argv[1:]:
    data, at, whole = open(path, "rb").read(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind not in (1, 4):
            continue
        record, whole = pb.Record.FromString(whole), b""
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {i.key or "/".join(i.nested_key): i.value_json for i in items}
            print(json.dumps(row))
        if record.WhichOneof("record_type") == "run":
            print(json.dumps({"id": record.run.run_id}))
"""


@pytest.mark.skipif(not INSTALLED, reason="wandb is an extra that tests do not install")
def test_a_run_is_written_offline_and_goes_on(tmp_path):
    def python(code, *arguments):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert python(_RUN, tmp_path) == ""
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    found = [json.loads(line) for line in python(_READ, *files).splitlines()]
    given = (tmp_path / sinks.ID_FILE).read_text().strip()
    assert {row["id"] for row in found if "id" in row} == {given}
    rewards = [row["reward/mean"] for row in found if "reward/mean" in row]
    assert rewards == ["0.25", "0.5"]
    assert len(metrics.read(tmp_path)) == 2
