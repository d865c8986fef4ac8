"""The command line of a run: mistakes are one line that names what is accepted."""

import pytest

from tests import command_lines

MAIN = "tlt_jax.main"
TINY = "--config=configs/tiny.py"
WORKDIR = "--workdir=DIR"  # Replaced by a directory of the test.

# Arguments, exit status, what standard error says.
MISTAKES = {
    "a key": (
        [TINY, WORKDIR, "--config.rollout.max_bach=4"],
        "error: unknown config key 'rollout.max_bach': did you mean "
        "'rollout.max_batch'?",
    ),
    "a value": (
        [TINY, WORKDIR, "--config.sampling.temperature=-1.0"],
        "error: sampling.temperature=-1.0 is out of range: 0 or at least 0.001, at "
        "most 1000.",
    ),
    "a flag": ([TINY, "--workdr=unused"], "error: Unknown command line flag 'workdr'"),
    "no directory": ([TINY], "workdir"),
    "no recipe": ([WORKDIR], "error: --config=FILE is missing"),
    "another recipe": (
        ["--config=configs/tinny.py", WORKDIR],
        "error: --config=configs/tinny.py: there is no such file; did you mean "
        "configs/tiny.py?",
    ),
    "another variant": (
        ["--config=configs/tiny.py:cont", WORKDIR],
        "has no variant 'cont': use arithmetic (the default), count or experts.",
    ),
    "too few layers": (
        [
            *(TINY, WORKDIR, "--config.specdec.mode=tlt"),
            "--config.drafter.features=low_mid_high",
        ],
        "error: drafter.features='low_mid_high': num_layers=2 has no layers 2 < N/2",
    ),
    "a rule without a drafter": (
        [TINY, WORKDIR, "--config.specdec.mode=ngram", "--config.specdec.rule=block"],
        "error: specdec.rule='block' with specdec.mode='ngram': it judges what a ",
    ),
    "a rule that judges no trees": (
        [
            *(TINY, WORKDIR, "--config.specdec.mode=tlt"),
            *("--config.specdec.rule=block", "--config.specdec.strategies=8:D3K2V8"),
        ],
        "error: specdec.rule='block' judges whole chains that the learned drafter "
        "sampled, and strategy D3K2V8 is none: use D3K1V4 (topk 1, ",
    ),
    "no worker ever waits": (
        [TINY, WORKDIR, "--config.workers.num=2", "--config.workers.min_idle=2"],
        "error: workers.min_idle=2 of workers.num=2: the last worker never waits",
    ),
    "a reward": (
        [TINY, WORKDIR, "--config.reward.functions=task,exakt"],
        "error: unknown reward 'exakt': did you mean 'exact'? There are task, exact, ",
    ),
    "a reward's module": (
        [TINY, WORKDIR, "--config.reward.functions=my_reward:score"],
        "error: reward function 'my_reward:score': there is no module 'my_reward'.",
    ),
    "a reward's function": (
        [TINY, WORKDIR, "--config.reward.functions=tests.judges:ood"],
        "error: reward function 'tests.judges:ood': module 'tests.judges' has no 'ood'"
        "; did you mean 'odd'?",
    ),
    "a reward twice": (
        [TINY, WORKDIR, "--config.reward.functions=exact,exact"],
        "error: reward.functions=exact,exact names 'exact' twice: name each ",
    ),
    "a weight too few": (
        [TINY, WORKDIR, "--config.reward.weights=1"],
        "error: reward.weights=(1.0,) of reward.functions=(): give each function ",
    ),
    "no file": (
        [TINY, WORKDIR, "--config.task.name=/nope/x.jsonl"],
        "error: /nope/x.jsonl is not a file (current directory: ",
    ),
    "no model": (
        [TINY, WORKDIR, "--config.model.spec=somewhere"],
        "error: model.spec='somewhere' names no model; accepted: ",
    ),
    "a model out of reach": (
        [TINY, WORKDIR, "--config.model.spec=nobody/nothing"],
        "error: model.spec='nobody/nothing' is no directory here and could not be "
        "fetched from the model hub",
    ),
}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("main") / "run"
    cases = {name: arguments for name, (arguments, _) in MISTAKES.items()}
    cases["help"] = ["--helpshort"]
    results = command_lines.start(
        [
            [MAIN, *(word.replace("=DIR", f"={workdir}") for word in words)]
            for words in cases.values()
        ],
        stop=False,
    )
    return dict(zip(cases, results, strict=True))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(started, name):
    status, output, errors = started[name]
    assert status == 2, errors
    assert MISTAKES[name][1] in errors
    assert len(errors.splitlines()) == 1 and errors.startswith("error: ")
    # What can be known before anything is made is told before; the rest after that.
    assert output in ("", "  making the model ...\n")


def test_help_lists_the_flags(started):
    status, output, errors = started["help"]
    assert "--workdir" in output and "--config" in output
    assert "The same command on the same directory resumes." in output
    assert "configs/tiny.py" in output and ":arithmetic, :count" in output
    assert (status, errors) == (0, "")
