"""A run or a model is judged as training judges: one evaluation, with its intervals."""

import json

import jax
import numpy as np
import pytest

from tests import command_lines, tiny_runs
from tlt_jax import evaluate, policy, train, types
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import io as drafter_io
from tlt_jax.rl import evaluator
from tlt_jax.rl.engine import stats as rollout_stats
from tlt_jax.rl.tasks import reward_pool
from tlt_jax.workdir import metrics

SAMPLES = 3


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run that was evaluated after each of two steps."""
    directory = tmp_path_factory.mktemp("run") / "run"
    settings = {
        "num_steps": 2,
        # Right now and then.
        "pretrain.steps": 150,
        "pretrain.noise_frac": 0.3,
        "eval.every": 1,
        "eval.num_prompts": 6,
        "eval.samples": SAMPLES,
        "eval.k": (1, 2),
        "checkpoint.every": 1,
    }
    with pytest.MonkeyPatch.context() as patch:
        # Drawing takes longer than training here.
        patch.setattr(train.plots, "draw_all", lambda directory: None)
        train.train(tiny_runs.config_of(**settings), directory)
    return directory


def command(*arguments):
    """Evaluate; return the record and the error output."""
    status, out, errors = command_lines.in_process(evaluate, *map(str, arguments))
    assert status == 0, errors
    # One line, and nothing else.
    (line,) = out.splitlines()
    return json.loads(line), errors


@pytest.mark.parametrize("step", [2, 1])
def test_a_run_is_judged_as_it_was_while_it_ran(workdir, step):
    (row,) = (r for r in metrics.read(workdir) if r["step"] == step)
    recorded = {k.removeprefix("eval/"): v for k, v in row.items() if "eval/" in k}
    assert recorded.keys() == {"avg@3", "pass@1", "pass@2"}
    assert 0 < recorded["avg@3"] < 1
    chosen = () if step == 2 else (f"--step={step}",)
    record, errors = command(f"--model={workdir}", *chosen)
    assert {name: record[name] for name in recorded} == recorded
    assert record["model"] == f"{workdir}, step {step}"
    assert (record["task"], record["split"]) == ("arithmetic", "eval")
    assert (record["num_prompts"], record["num_samples"]) == (6, SAMPLES)
    assert record["max_new_tokens"] == 6 and record["temperature"] == 1.0
    for name, value in recorded.items():
        low, high = record[f"{name}_ci95"]
        assert 0 <= low <= value <= high <= 1 and low < high
    assert "6 held-out prompts, 3 completions each, temperature 1 (the run's)" in errors
    assert "generating ..." in errors


def test_examples_are_written_with_their_answers(workdir, tmp_path):
    out = tmp_path / "answers.jsonl"
    record, _ = command(f"--model={workdir}", f"--out={out}", "--num_prompts=4")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == record["num_prompts"] == 4
    rewards, lengths = [], []
    for i, line in enumerate(lines):
        assert line["id"] == f"arithmetic/eval/{i}"
        assert line["prompt"].endswith("=") and line["answer"].lstrip("-").isdigit()
        assert len(line["completions"]) == SAMPLES
        for one in line["completions"]:
            assert one.keys() == {"text", "reward", "num_tokens", "finish_reason"}
            # The run's own verifier judges, as it did in training.
            assert one["reward"] == float(one["text"].strip() == line["answer"])
            rewards.append(one["reward"])
            lengths.append(one["num_tokens"])
    assert record["avg@3"] == pytest.approx(np.mean(rewards))
    assert record["length_mean"] == pytest.approx(np.mean(lengths))
    assert record["length_max"] == max(lengths)


def test_a_model_is_judged_by_a_file(workdir, tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = [{"q": f"{a}+{9 - a}=", "answer": 9} for a in range(0, 8, 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = (f"--model={workdir / 'initial_model'}", f"--task={path}")
    model += ("--option=prompt_key=q", "--reward=exact", "--max_new_tokens=6")
    plain, errors = command(*model, "--num_samples=4")
    assert plain["num_prompts"] == 4 and plain["split"] == "all"
    assert plain["temperature"] == 0.7 and "(by default)" in errors
    assert 0 < plain["avg@4"] == plain["pass@1"] < plain["pass@4"]
    assert plain["accept_length"] == 1.0
    # Speculation changes how fast it is and nothing else.
    target = policy.load(str(workdir / "initial_model")).config
    cfg = drafter.of_target(target, output_norm=False, max_length=50)
    drafter_io.save(tmp_path / "d", drafter.init(cfg, jax.random.key(0)), cfg)
    speculate = (f"--drafter={tmp_path / 'd'}", "--strategy=16:D2K2V4")
    quick, _ = command(*model, "--num_samples=4", *speculate)
    assert quick["accept_length"] > 1.0
    # By another rule, here of trees, other answers come, and that is said.
    speculate = (*speculate, "--rule=rejection")
    others, errors = command(*model, "--num_samples=4", *speculate)
    assert (
        others["rule"] == "rejection" and others["length_mean"] != plain["length_mean"]
    )
    assert "tokens   by the rule rejection: others than plain" in errors
    changing = ("accept_length", "tokens_per_s")
    assert {k: v for k, v in quick.items() if k not in changing} == {
        k: v for k, v in plain.items() if k not in changing
    }


def run_settings(**overrides):
    return tiny_runs.config_of(**tiny_runs.settings("scratch", **overrides))


def test_a_runs_own_evaluation_is_the_default():
    run = run_settings(**{"seed": 7, "eval.samples": 4, "eval.temperature": 0.5})
    plan = evaluate.plan_of(run)
    assert (plan.task, plan.reward) == (run.task, run.reward)
    assert (plan.split, plan.num_prompts, plan.num_samples) == ("eval", 64, 4)
    assert (plan.ks, plan.max_new_tokens, plan.seed) == ((1,), 6, 7)
    assert plan.law == dict(temperature=0.5, top_k=0, top_p=1.0, min_p=0.0)
    assert plan.engine["max_length"] == run.longest_text
    assert plan.engine["page_size"] == 4 and plan.engine["max_rows"] == 4
    # By its own name it is the same; options of it come on top.
    assert evaluate.plan_of(run, run.task.name) == plan
    options = dict(evaluate.plan_of(run, options={"holdout_frac": 0.5}).task.options)
    assert options == dict(run.task.options) | {"holdout_frac": 0.5}
    given = evaluate.plan_of(
        *(run, None),
        rewards=["exact"],
        system_prompt="Be brief.",
        num_prompts=5,
        num_samples=8,
        max_new_tokens=9,
        seed=0,
    )
    assert given.reward.functions == ("exact",)
    assert given.task.system_prompt == "Be brief."
    assert (given.num_prompts, given.ks, given.seed) == (5, (1, 8), 0)
    # Longer texts than those that its engines were made for.
    assert "max_length" not in given.engine and given.max_new_tokens == 9


def test_another_task_keeps_how_a_run_is_asked_and_not_what():
    run = run_settings(**{"task.system_prompt": "Be brief."})
    plan = evaluate.plan_of(run, "products", options={"max_terms": 2})
    assert (plan.task.name, plan.task.system_prompt) == ("products", "Be brief.")
    assert plan.task.options == (("max_terms", 2),)
    assert plan.reward.functions == () and plan.split == "eval"
    assert "max_length" not in plan.engine


def test_of_a_data_set_all_is_asked_unless_a_part_is_named():
    plan = evaluate.plan_of(None, "mine.jsonl")
    assert plan.split == "train" and dict(plan.task.options) == {"holdout_frac": 0.0}
    limited = evaluate.plan_of(None, "mine.jsonl", num_prompts=9)
    assert dict(limited.task.options)["limit"] == 9
    named = evaluate.plan_of(None, "mine.jsonl", options={"eval_split": "test"})
    assert named.split == "eval"
    assert dict(named.task.options) == {"eval_split": "test"}
    # What a run has trained on is held out as it was then.
    own = run_settings(**{"task.name": "mine.jsonl", "task.options": {}})
    assert evaluate.plan_of(own, "mine.jsonl").split == "eval"


@pytest.mark.parametrize(
    "options,said",
    [
        ({}, "9 held-out prompts"),
        ({"holdout_frac": 0.0}, "9 prompts, none held out from training"),
        ({"holdout_frac": 0.0, "eval_path": "e.jsonl"}, "9 held-out prompts"),
    ],
)
def test_what_training_asks_as_well_is_not_called_held_out(options, said):
    run = run_settings(**{"task.name": "mine.jsonl", "task.options": options})
    assert evaluate.prompts_asked(evaluate.plan_of(run), 9) == said


def test_of_all_of_a_data_set_nothing_is_said_of_training():
    assert evaluate.prompts_asked(evaluate.plan_of(None, "mine.jsonl"), 9) == (
        "9 prompts"
    )


def test_a_record_counts_what_was_said():
    lengths, reasons = [2, 4, 6, 6], ["eos", "eos", "length", "stop"]
    completions = [
        types.Completion(i, np.zeros(n, np.int32), np.zeros(n, np.float32), reason)
        for i, (n, reason) in enumerate(zip(lengths, reasons, strict=True))
    ]
    values = [(1.0, "ok"), (0.0, "ok"), (0.0, "timeout"), (1.0, "ok")]
    scored = tuple(reward_pool.Scored(r, status, "", 0.0) for r, status in values)
    stats = rollout_stats.RolloutStats(
        num_tokens=18, prefill_s=1.0, decode_s=3.0, fill_s=2.0, num_accepted=[6, 3]
    )
    answers = evaluator.Answers(
        completions, [""] * 4, reward_pool.Scores(scored, 0.0), stats
    )
    rewards = np.array([[1, 0], [0, 1]], np.float32)
    record = evaluate.record_of(answers, rewards, (2,))
    assert record == {
        "avg@2": 0.5,
        "avg@2_ci95": [0.5, 0.5],
        "pass@2": 1.0,
        "pass@2_ci95": [1.0, 1.0],
        "length_mean": 4.5,
        "length_median": 5.0,
        "length_max": 6,
        "truncated_frac": 0.25,
        "failed_frac": 0.25,
        "tokens_per_s": 3.0,
        "accept_length": 1.5,
    }
    # The tokens of a chain rule are its own.
    stats.rule = "block"
    chained = evaluate.record_of(answers, rewards, (2,))
    assert chained == record | {"rule": "block"}
    assert evaluate.describe(chained | {"max_new_tokens": 6}).splitlines()[3] == (
        "tokens   by the rule block: others than plain decoding's, of the same law"
    )
    stats.rule = "keyed"
    assert evaluate.record_of(answers, rewards, (2,)) == record
    assert evaluate.describe(record | {"max_new_tokens": 6}).splitlines() == [
        "avg@2    0.500  95 % interval 0.500 to 0.500",
        "pass@2   1.000  95 % interval 1.000 to 1.000",
        "lengths  mean 4.5, median 5, longest 6 tokens; 25.0% cut at 6",
        "rewards  25.0% failed",
    ]


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "--model=SPEC is missing"),
        (["--model=M"], "and --model is no run's workdir, which has a task"),
        (["--model=M", "--task=product"], "did you mean 'products'"),
        (["--model=M", "--task=absent.jsonl"], "absent.jsonl"),
        (["--model=M", "--task=count", "--option=max=3"], "has no option 'max'"),
        (["--model=M", "--task=count", "--option=3"], "not of the form KEY=VALUE"),
        (["--model=M", "--task=count", "--k=2"], "--k=2 needs at least so many"),
        (["--model=M", "--task=count", "--k=0"], "--k=0"),
        (["--model=M", "--task=count", "--num_prompts=many"], "--num_prompts=many"),
        (["--model=M", "--task=count", "--reward=exakt"], "did you mean 'exact'"),
        (["--model=M", "--task=count", "--out=absent/o.jsonl"], "lies in no directory"),
        (["--model=M", "--task=count", "--strategy=1:D1K1V2"], "name a drafter"),
        (["--model=M", "--task=count", "--num_promts=1"], "Did you mean: num_prompts"),
        (["--model=M", "--task=count", "count"], "every setting is a --flag"),
        (["--model=M", "--task=count"], "without a model (config.json and"),
        (["--model=org/absent", "--task=count"], "could not be fetched from the model"),
        (["--model=absent.gguf", "--task=count"], "names no model"),
        (["--model=gguf:absent.gguf", "--task=count"], "absent.gguf"),
        (["--model=BROKEN"], "does not give the settings of a run"),
    ],
)
def test_mistakes_are_one_line_and_status_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken" / "checkpoints").mkdir(parents=True)
    places = {"M": "nothing", "BROKEN": "broken"}
    for short, name in places.items():
        full = f"--model={tmp_path / name}"
        arguments = [full if a == f"--model={short}" else a for a in arguments]
    status, out, errors = command_lines.in_process(evaluate, *arguments)
    *stages, last = errors.splitlines()
    assert (status, out) == (2, "")
    assert last.startswith("error: ") and message in last
    assert all(stage.endswith(" ...") for stage in stages)
