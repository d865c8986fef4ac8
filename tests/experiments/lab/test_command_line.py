"""Every experiment tells in a line what is wrong with it; stopped, it keeps rows."""

import json
import pathlib
import sys

import pytest

from experiments.lab import catalogue, command_line, experiment, recipes, tables
from tests import command_lines

ROOT = pathlib.Path(__file__).resolve().parents[3]
MEASURED = [item for item in catalogue.every() if not item.is_tool]
# A command; what its line has to say.
WRONG = [
    (["experiments.length_tail"], "--workdirs= is missing: NAME=DIR"),
    (["experiments.speculation_speed"], "--drafter= is missing: workdir of tlt_jax"),
    (
        ["experiments.trainer_makespan", "--drafter=nowhere"],
        "--drafter=nowhere is no directory here: train one, for the recipe by python",
    ),
    *(
        (
            [f"experiments.{slug}", "--drafter=nowhere"],
            "--drafter=nowhere is no directory here: train one, for example with",
        )
        for slug in ("speculation_speed", "accept_length", "tuner_trace")
    ),
    (
        ["experiments.end_to_end", "--models=a=configs/gone.py"],
        "the recipe configs/gone.py is no file here: recipes are in configs/",
    ),
    (["experiments.end_to_end", "--systems=on"], "--systems names on; known are off"),
    (
        ["experiments.end_to_end", "--systems=frozen"],
        "--systems names frozen, and smollm2 has no drafter",
    ),
    (["experiments.end_to_end", "--set=seed"], "'seed' has no value; write name=value"),
    (["experiments.reward_curves", "--config=gone.py"], "gone.py is no file here"),
    (["experiments.losslessness", "--arms=gone"], "--arms names gone; known are"),
    (["experiments.packing", "--target=gone"], "--target names gone; known"),
    (["experiments.checkpoint_stall", "--targets=gone"], "--targets names gone; known"),
    (["experiments.grpo_step_speed", "--lengths=gone"], "--lengths names gone; known"),
    (
        ["experiments.decode_speed", "--peers=gone"],
        "--peers names gone; known here are",
    ),
    (["experiments.decode_speed", "--peers=vllm"], "needs --model-dir=DIR: make it"),
    (["experiments.active_batch", "--trace=gone"], "--trace=gone is no file: make one"),
    (["experiments.tuner_regret", "--trace=gone"], "--trace=gone is no file: make one"),
    (
        ["experiments.simulator_check", "--workdirs=a=b"],
        "all of experiments.end_to_end",
    ),
    (["experiments.ahead_of_time", "--models=gone"], "--models names gone; known are"),
    (["experiments.length_tail", "--workdirs=a=gone"], "gone has no rollouts"),
    (["experiments.cluster_size", "--models=gone"], "--models names gone; known are"),
    (["experiments.cluster_size", "--devices=8,x"], "--devices=8,x: 'x' is no whole"),
    (["experiments.decode_bandwidth", "--contexts=x"], "--contexts=x: 'x' is no whole"),
    (
        ["experiments.cluster_size", "--seed=x"],
        "argument --seed: invalid int value: 'x'",
    ),
    (["experiments.cluster_sensitivity", "--changes=gone"], "--changes names gone"),
    (
        ["experiments.speculation_speed", "--drafter=.", "--cases=x"],
        "--cases=x: 'x' is not batch:strategy, for example 8:D7K1V8",
    ),
    (["experiments.planner", "--device=abacus"], "--device=abacus is not known"),
    (["experiments", "plots", "--out=gone"], "gone has no tables: run an experiment"),
    (
        ["experiments", "carry", "gone"],
        "carry was given gone; with tables at scale cpu",
    ),
    (["experiments", "lits"], "invalid choice: 'lits'"),
    (["experiments", "check", "packing"], "check takes no names, and packing came"),
]
# Started as a user starts them, one of each kind; the others within this process.
STARTED = [
    (
        ["experiments.active_batch", "--scael=cpu"],
        "--scael=cpu is unknown: did you mean --scale? (python -m",
    ),
    *(
        entry
        for entry in WRONG
        if entry[0][0] in ("experiments", "experiments.planner")
    ),
    *(
        entry
        for entry in WRONG
        if entry[0][0].endswith(("length_tail", "cluster_size"))
    ),
    *(entry for entry in WRONG if entry[0][0].endswith(("end_to_end", "makespan"))),
]
INSIDE = [entry for entry in WRONG if entry not in STARTED]


def named(value):
    """Names a case by its command alone."""
    return " ".join(value)[:70] if isinstance(value, list) else ""


@pytest.fixture(scope="module")
def started():
    """What came of the wrong commands that are started."""
    commands = [words for words, _ in STARTED]
    results = command_lines.start(commands, stop=False)
    return {tuple(w): r for w, r in zip(commands, results, strict=True)}


def line_of(status, errors):
    """The one line that is told, with status 2 and nothing else."""
    lines = errors.strip().splitlines()
    assert status == 2, errors
    assert len(lines) == 1 and lines[0].startswith("error: "), errors
    return lines[0]


@pytest.mark.parametrize(("words", "told"), STARTED, ids=named)
def test_what_is_wrong_with_a_command_is_one_line(started, words, told):
    status, _, errors = started[tuple(words)]
    assert told in line_of(status, errors)


def ended(item, flags, monkeypatch, capsys):
    """Runs an experiment as its command line does; returns the line that it ends by."""
    monkeypatch.setattr(sys, "argv", ["x", *flags])
    with pytest.raises(SystemExit) as end:
        item.main()
    return line_of(end.value.code, capsys.readouterr().err)


@pytest.mark.parametrize(("words", "told"), INSIDE, ids=named)
def test_what_is_wrong_with_any_experiment_is_one_line(
    words, told, monkeypatch, capsys
):
    item = catalogue.declared(words[0].partition(".")[2])
    assert told in ended(item, words[1:], monkeypatch, capsys)


def test_every_experiment_refuses_a_misspelt_flag_and_an_unknown_scale(
    monkeypatch, capsys
):
    for item in MEASURED:
        needed = [f"--{option.name}=x" for option in item.options if option.required]
        line = ended(item, [*needed, "--scael=cpu"], monkeypatch, capsys)
        assert line == (
            "error: --scael=cpu is unknown: did you mean --scale? "
            f"(python -m experiments.{item.slug} --help lists all)"
        )
        line = ended(item, [*needed, "--scale=huge"], monkeypatch, capsys)
        assert "--scale: invalid choice: 'huge' (choose from 'cpu', 'one_gpu'" in line
        # A flag is not taken for another that begins alike.
        line = ended(item, [*needed, "--scal=cpu"], monkeypatch, capsys)
        assert "--scal=cpu is unknown: did you mean --scale?" in line


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (KeyboardInterrupt(), 130, "stopped: 1 of 2 cells are kept in"),
        (ValueError("of a cell"), 2, "error: of a cell (--verbosity=1 shows where)"),
        (OSError(28, "No space left"), 2, "error: [Errno 28] No space left"),
    ],
)
def test_what_ends_an_experiment_is_a_line_and_rows_are_kept(
    tmp_path, monkeypatch, capsys, error, status, told
):
    def measure(cell):
        if cell["kind"] == "last":
            raise error
        return [{"value": 1}]

    made = experiment.Experiment(
        slug="packing",
        text="Made.",
        title="made",
        cells={"kind": ("first", "last")},
        measure=measure,
    )
    monkeypatch.setattr(sys, "argv", ["x", f"--out={tmp_path}"])
    with pytest.raises(SystemExit) as ended:
        made.main()
    assert ended.value.code == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(told)
    (row,) = tables.read(tmp_path / "packing.csv")
    assert row == {"cell": "kind=first", "value": 1}
    record = json.loads((tmp_path / "packing.json").read_text())
    assert record["cells"] == {"wanted": 2, "done": 1}


def test_every_experiment_keeps_rows_as_they_are_measured():
    """By cells, of which there are several; the others write as they go."""
    by_hand = {"ahead_of_time", "tuner_trace"}
    for item in MEASURED:
        assert (item.cells is None) == (item.slug in by_hand), item.slug


def test_a_drafter_of_other_texts_is_told(tmp_path, capsys):
    config = {"texts": {"tasks": ["chat", "chain_sum:cot,max_terms=2", "chat"]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    drafter = str(tmp_path)
    recipe = "configs/smollm2_tlt.py"
    recipes.print_other_task_of(recipe, {"drafter.directory": drafter})
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert (
        "was trained on chat, chain_sum, and configs/smollm2_tlt.py runs "
        "counting" in told
    )
    # Where it fits, or nothing tells, nothing is said.
    recipes.print_other_tasks(drafter, ["chain_sum"], "x")
    recipes.print_other_tasks(str(tmp_path / "gone"), ["x"], "x")
    recipes.print_other_task_of(recipe, {})
    assert not capsys.readouterr().out


def test_an_experiment_writes_to_ones_own_folder_unless_told():
    item = catalogue.declared("active_batch")
    own, told = item.parse([]), item.parse(["--out=there"])
    assert own.out == experiment.RESULTS_DIR / "mine" / "cpu"
    assert item.parse(["--scale=paper"]).out == own.out.with_name("paper")
    assert told.out == pathlib.Path("there")
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "experiments/results/mine/" in ignored
    # Of other results one's own are read first, then those of record.
    of_record = experiment.RESULTS_DIR / "cpu" / "tuner_trace.jsonl"
    assert experiment.find(told, "tuner_trace.jsonl") == of_record


def test_paths_are_shown_as_they_are_typed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command_line.shown(tmp_path / "a" / "b") == "a/b"
    assert command_line.shown(tmp_path.parent / "c") == str(tmp_path.parent / "c")
