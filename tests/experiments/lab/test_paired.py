"""Runners and pairing; no peer is needed."""

import argparse
import pathlib
import subprocess
import sys
import time

import pytest

from experiments.lab import paired
from experiments.peers import protocol

FAKE = f"""
import sys, threading, time
sys.path.insert(0, {str(paired.PEERS_DIR)!r})
import protocol
ticks = [0]
def count():
    while True:
        ticks[0] += 1
        time.sleep(0.005)
threading.Thread(target=count, daemon=True).start()
def load(request):
    print("a library's chatter")
    sys.stdout.flush()
    return {{"versions": {{"fake": "1"}}, "model": request["model"]}}
def run(request):
    if request.get("fail"):
        raise ValueError("the peer's own words")
    if request.get("die"):
        print("last words", file=sys.stderr, flush=True)
        raise SystemExit(3)
    time.sleep(request.get("sleep_s", 0))
    return {{"ticks": ticks[0]}}
protocol.serve({{"load": load, "run": run}})
"""


@pytest.fixture
def system(tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE, encoding="utf-8")
    return paired.System("fake", sys.executable, str(script))


@pytest.fixture
def runner(system, tmp_path):
    runner = paired.Runner(system, tmp_path)
    yield runner
    runner.close()


def test_answers_stand_apart_from_what_libraries_print(runner, tmp_path):
    answer = runner.ask("load", timeout_s=30, model="m")
    assert answer == {"versions": {"fake": "1"}, "model": "m"}
    assert "a library's chatter" in (tmp_path / "fake.log").read_text()


def test_a_runner_stands_still_between_requests(runner):
    first = runner.ask("run", timeout_s=30)["ticks"]
    time.sleep(0.5)
    second = runner.ask("run", timeout_s=30)["ticks"]
    assert second - first < 20  # a hundred if it had gone on


def test_an_error_carries_the_peers_own_traceback_and_the_runner_goes_on(runner):
    with pytest.raises(paired.RunnerError, match="the peer's own words"):
        runner.ask("run", timeout_s=30, fail=True)
    assert runner.ask("run", timeout_s=30)["ticks"] > 0


def test_a_runner_that_ends_is_named_with_the_end_of_its_log(runner):
    words = "(?s)exit status 3.*README.*last words"
    with pytest.raises(paired.RunnerError, match=words):
        runner.ask("run", timeout_s=30, die=True)


def test_a_runner_that_takes_too_long_is_ended(runner):
    runner.ask("run", timeout_s=30)
    words = "without an answer to run.*killed.*memory"
    with pytest.raises(paired.RunnerError, match=words):
        runner.ask("run", timeout_s=0.2, sleep_s=60)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for it")
def test_a_stopped_runner_ends_with_a_killed_harness(system, tmp_path):
    text = f"""
from experiments.lab import paired
import pathlib
system = paired.System("fake", {system.python!r}, {system.script!r})
runner = paired.Runner(system, pathlib.Path({str(tmp_path)!r}))
runner.ask("run", timeout_s=30)
print(runner._process.pid, flush=True)
input()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=paired.PEERS_DIR.parents[1],
    )
    with parent:
        stat = pathlib.Path(f"/proc/{int(parent.stdout.readline())}/stat")
        assert stat.exists()
        parent.kill()
    deadline = time.monotonic() + 30
    while _alive(stat):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(stat):
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_loaded_ends_every_runner_even_after_an_error(system, tmp_path):
    with pytest.raises(KeyError):
        with paired.loaded([system], {"model": "m"}, 30) as (got, versions):
            process = got["fake"]._process
            assert versions == {"fake": {"versions": {"fake": "1"}, "model": "m"}}
            raise KeyError("from the experiment")
    assert process.returncode is not None


def test_a_visitor_is_there_for_its_request_only_and_has_warmed_up(
    system, tmp_path, monkeypatch
):
    asked = []

    class Watched(paired.Runner):
        def ask(self, command, **fields):
            answer = super().ask(command, **fields)
            asked.append((self._process, command, answer))
            return answer

    monkeypatch.setattr(paired, "Runner", Watched)
    with paired.loaded([system], {"model": "m"}, 30, one_at_a_time=True) as (
        visitors,
        versions,
    ):
        assert not asked and versions == {"fake": {}}
        answer = visitors["fake"].ask("run", timeout_s=30)
        processes, commands, answers = zip(*asked, strict=True)
        assert commands == ("load", "run", "run") and answer == answers[2]
        assert versions["fake"]["versions"] == {"fake": "1"}
        # Ended by now, and at the next request there is another.
        assert processes[0].returncode is not None
        with pytest.raises(paired.RunnerError, match="the peer's own words"):
            visitors["fake"].ask("run", timeout_s=30, fail=True)
    assert asked[3][0] is not processes[0] and asked[3][0].returncode is not None


def test_systems_take_turns_and_warm_up_is_not_kept():
    asked = []

    def measure(name, case, number):
        asked.append((name, number))
        return None if name == "c" and case["batch"] == 2 else {"x": number}

    rows = paired.run_paired(
        ["a", "b", "c"],
        [{"batch": 1}, {"batch": 2}],
        measure,
        rounds=2,
        warmups=1,
    )
    names = "".join(name for name, _ in asked)
    assert names == "cababcbca" + "cababcbca"
    kept = [(r["batch"], r["round"], r["order"], r["system"]) for r in rows]
    assert kept[:6] == [
        (1, 0, 0, "a"),
        (1, 0, 1, "b"),
        (1, 0, 2, "c"),
        (1, 1, 0, "b"),
        (1, 1, 1, "c"),
        (1, 1, 2, "a"),
    ]
    assert len(kept) == 10  # c does not take batch 2


def table():
    speeds = {"us": [10.0, 20.0, 60.0], "peer": [5.0, 20.0, 20.0]}
    return [
        {"batch": 8, "system": name, "round": n, "speed": v, "seconds": 120 / v}
        for name, values in speeds.items()
        for n, v in enumerate(values)
    ]


def test_ratios_are_medians_of_the_ratios_within_a_round():
    # Rounds give 2, 1 and 3 times; the ratio of medians would be 1.
    us, peer = paired.summarise(
        table(),
        case_keys=["batch"],
        metrics={"speed": "higher", "seconds": "lower"},
        reference="us",
    )
    assert us == {
        "batch": 8,
        "system": "us",
        "rounds": 3,
        "speed/median": 20.0,
        "speed/min": 10.0,
        "speed/max": 60.0,
        "seconds/median": 6.0,
        "seconds/min": 2.0,
        "seconds/max": 12.0,
    }
    assert peer["speed/times"] == peer["seconds/times"] == 2.0
    assert peer["speed/times_min"] == peer["seconds/times_min"] == 1.0


def test_only_rounds_that_both_have_are_compared():
    rows = [r for r in table() if (r["system"], r["round"]) != ("us", 1)]
    rows[0]["speed"] = None
    peer = paired.summarise(
        rows, case_keys=["batch"], metrics={"speed": "higher"}, reference="us"
    )[1]
    assert peer["speed/times"] == 3.0


def test_peers_are_chosen_by_name_and_the_others_are_told(capsys):
    known = {"a": "run_a.py", "b": "run_b.py"}
    chosen = paired.choose_peers(known, "b", "b=/py")
    assert chosen == [paired.System("b", "/py", "run_b.py")]
    assert "Not compared (see --peers): a." in capsys.readouterr().out
    assert paired.choose_peers(known, "a,b", "")[0].python == sys.executable
    with pytest.raises(ValueError, match="--peers names c; known here are a, b"):
        paired.choose_peers(known, "c", "")
    with pytest.raises(ValueError, match="--peer-python names c"):
        paired.choose_peers(known, "a", "c=/py")
    with pytest.raises(ValueError, match="'b' has no value"):
        paired.choose_peers(known, "a", "a=/py,b")


def test_peers_without_a_model_directory_are_refused():
    parser = argparse.ArgumentParser()
    for option in paired.options_of({"a": "run_a.py"}):
        option.add_to(parser)
    with pytest.raises(ValueError, match="needs --model-dir"):
        paired.model_request(parser.parse_args(["--peers=a"]))
    assert paired.model_request(parser.parse_args([])) == {
        "model": paired.DEFAULT_MODEL,
        "gguf": "",
    }


def test_a_peers_step_is_answered_with_its_generation_apart():
    answers = []

    class Conversation:
        reply = staticmethod(answers.append)

    clock = protocol.StepClock(Conversation())
    generate = clock.timed(lambda n: {"ids": [[1] * n, [2]]}, lambda made: made["ids"])
    assert generate(3) == {"ids": [[1, 1, 1], [2]]}
    clock.answer(2.0)
    (answer,) = answers
    assert answer["completion_tokens"] == 4 and answer["length_max"] == 3
    assert 0 < answer["generate_s"] < 1
    assert answer["generate_s"] + answer["update_s"] == answer["step_s"] == 2.0
