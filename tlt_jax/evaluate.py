r"""Judge a policy by a task: avg@n and pass@k with their intervals, lengths, speed.

    python -m tlt_jax.evaluate --model=WORKDIR
    python -m tlt_jax.evaluate --model=SPEC --task=NAME --num_samples=4 --k=1 --k=4

SPEC is a Hugging Face directory, gguf:FILE, a hub name, smollm2-135m-instruct, or the
workdir of a run; --step=N takes an earlier checkpoint of it. A run is asked what its
own evaluation asks, with the same noise: the numbers are those of its record (unless
--rule draws others of the same law). Another task is named by --task: one of
tlt_jax.rl.tasks.build, or a data set, all of which is asked. Standard output has one
line of JSON, standard error what people read; --out writes every prompt with its
completions.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags

from tlt_jax import assembly, config, policy, types
from tlt_jax import speculation as speculation_lib
from tlt_jax.rl import evaluator
from tlt_jax.rl.tasks import build as tasks
from tlt_jax.rl.tasks import files as data_files
from tlt_jax.rl.tasks import prompts, reward_pool
from tlt_jax.runtime import command_line, compile_cache
from tlt_jax.runtime import watch as watch_lib
from tlt_jax.settings import schema, sections
from tlt_jax.specdec import chain, sampling
from tlt_jax.viz import status_line

_FLAGS = policy.Flags()
_TASK = flags.DEFINE_string(
    "task",
    None,
    "A task (arithmetic, a generator of reasoning-gym, ...) or a data set "
    f"({data_files.ACCEPTED}). Default: the run's, its held-out part.",
)
_OPTION = flags.DEFINE_multi_string(
    "option",
    [],
    "KEY=VALUE, an option of the task, such as prompt_key=question; may be given "
    "several times.",
)
_SYSTEM_PROMPT = flags.DEFINE_string(
    "system_prompt", None, "Put before each prompt. Default: the run's, else none."
)
_REWARD = flags.DEFINE_string(
    "reward",
    None,
    "What judges, names parted by commas: exact, number, math_verify or "
    "package.module:function. Default: the run's, else the task's own verifier.",
    allow_override=True,
)
_NUM_PROMPTS = flags.DEFINE_integer(
    "num_prompts",
    None,
    "Prompts, the first ones. Default: the run's eval.num_prompts, else 64; of a data "
    "set all.",
    lower_bound=1,
)
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples",
    None,
    "Completions of each prompt. Default: the run's eval.samples, else 1.",
    lower_bound=1,
    allow_override=True,
)
_K = flags.DEFINE_multi_integer(
    "k",
    None,
    "The k of pass@k, at most --num_samples; may be given several times. Default: 1 "
    "and --num_samples, or the run's eval.k.",
    lower_bound=1,
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens",
    None,
    "Longest completion in tokens. Default: the run's, else 512.",
    lower_bound=1,
    allow_override=True,
)
_SEED = flags.DEFINE_integer(
    "seed",
    None,
    "Fixes all draws. Default: the run's, else 0.",
    lower_bound=0,
    allow_override=True,
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "File to write, .jsonl, a line for each prompt with its completions; absent "
    "before.",
    allow_override=True,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is asked and how it is judged.

    Attributes:
      task, reward: of which task, and what judges.
      split: the part of it; `eval` is held out from training.
      num_prompts, num_samples, ks: prompts, completions of each, the k of pass@k.
      max_new_tokens, seed: of completions and noise.
      law: sampling settings of the run's evaluation; None: the policy recommends.
      engine: sizes of the run's engines, with which tokens are the same to the bit.
    """

    task: sections.Task
    reward: sections.Reward
    split: str
    num_prompts: int
    num_samples: int
    ks: tuple[int, ...]
    max_new_tokens: int
    seed: int
    law: Mapping[str, float] | None
    engine: Mapping[str, Any]


def plan_of(
    run: config.RunConfig | None,
    task: str | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    system_prompt: str | None = None,
    template_options: Mapping[str, Any] | None = None,
    rewards: Sequence[str] = (),
    num_prompts: int | None = None,
    num_samples: int | None = None,
    ks: Sequence[int] | None = None,
    max_new_tokens: int | None = None,
    seed: int | None = None,
) -> Plan:
    """Plan an evaluation: what is not given is the run's, or a default.

    A task that is not the run's own keeps of the run how the policy is asked (system
    prompt, lengths, law), not what is asked and what judges.

    Raises:
      ValueError: no task is named, or settings do not go together.
    """
    cfg = run.eval if run else sections.Eval()
    own = run is not None and task in (None, run.task.name)
    if run is None and task is None:
        raise ValueError(
            "--task=NAME is missing, and --model is no run's workdir, which has a task "
            "of its own: name a task, such as products, or a data file, or correct "
            "--model."
        )
    base = run.task if run else sections.Task()
    values: dict[str, Any] = {"options": dict(base.options) if own else {}}
    values["options"] |= options or {}
    values["template_options"] = dict(base.template_options) | (template_options or {})
    split = "eval"
    if not own:
        values["name"] = task
        if data_files.is_data(task) and not _has_eval_part(values["options"]):
            # Nothing was trained on it: all of it may be asked.
            split = "train"
            values["options"] |= {"holdout_frac": 0.0}
            if num_prompts is not None:
                values["options"].setdefault("limit", num_prompts)
    if system_prompt is not None:
        values["system_prompt"] = system_prompt
    samples = num_samples or cfg.samples
    if not ks:
        ks = cfg.k if num_samples is None else sorted({1, samples})
    if max(ks) > samples:
        raise ValueError(
            f"--k={max(ks)} needs at least so many samples, and there are "
            f"--num_samples={samples}: draw more or lower k."
        )
    judging = run.reward if run else sections.Reward()
    if rewards or not own:
        judging = dataclasses.replace(judging, functions=tuple(rewards), weights=())
    rollout = run.rollout if run else sections.Rollout()
    longest = max_new_tokens or rollout.max_new_tokens
    law, engine = None, {}
    if run:
        law = dataclasses.asdict(assembly.law_of(run.sampling, cfg.temperature))
        names = "stop steps_per_call prefill_chunk cpu_kernels attention check_kernels"
        engine = {name: getattr(rollout, name) for name in names.split()}
        engine |= {"page_size": run.cache.page_size, "max_rows": rollout.max_batch}
        if own and longest == rollout.max_new_tokens:
            engine["max_length"] = run.longest_text
    return Plan(
        task=schema.build(sections.Task, schema.to_dict(base) | values),
        reward=judging,
        split=split,
        num_prompts=num_prompts or cfg.num_prompts,
        num_samples=samples,
        ks=tuple(ks),
        max_new_tokens=longest,
        seed=seed if seed is not None else run.seed if run else 0,
        law=law,
        engine=engine,
    )


def _has_eval_part(options: Mapping[str, Any]) -> bool:
    named = ("eval_path", "eval_split", "holdout_frac")
    return any(options.get(name) is not None for name in named)


def record_of(
    answers: evaluator.Answers, rewards: np.ndarray, ks: Sequence[int]
) -> dict[str, Any]:
    """Say what an evaluation found, fit for JSON; `rewards [P, n]`.

    `<name>_ci95` are 95 % intervals over prompts, lengths are in tokens, and speed is
    without compilation. A chain rule is named: the tokens are its own.
    """
    row: dict[str, Any] = {}
    limits = evaluator.intervals(rewards, ks)
    for name, value in evaluator.rewards_row(rewards, ks).items():
        row |= {name: value, f"{name}_ci95": list(limits[name])}
    lengths = [len(completion.tokens) for completion in answers.completions]
    reasons = [completion.finish_reason for completion in answers.completions]
    stats = answers.stats
    if stats.rule not in ("", chain.KEYED):
        row["rule"] = stats.rule
    busy_s = stats.prefill_s + stats.fill_s + stats.decode_s
    return row | {
        "length_mean": statistics.fmean(lengths),
        "length_median": statistics.median(lengths),
        "length_max": max(lengths),
        "truncated_frac": reasons.count("length") / len(reasons),
        "failed_frac": answers.scores.num_failed / len(reasons),
        "tokens_per_s": stats.num_tokens / busy_s if busy_s else None,
        "accept_length": stats.accept_length,
    }


def describe(record: Mapping[str, Any]) -> str:
    """Say in a few lines what a record says."""
    lines = []
    for name, value in record.items():
        if name.startswith(("avg@", "pass@")) and not name.endswith("_ci95"):
            low, high = record[f"{name}_ci95"]
            lines.append(f"{name:8} {value:.3f}  95 % interval {low:.3f} to {high:.3f}")
    lines.append(
        f"lengths  mean {record['length_mean']:.1f}, median "
        f"{record['length_median']:g}, longest {record['length_max']} tokens; "
        f"{record['truncated_frac']:.1%} cut at {record['max_new_tokens']}"
    )
    if "rule" in record:
        lines.append(
            f"tokens   by the rule {record['rule']}: others than plain decoding's, of "
            "the same law"
        )
    if record["failed_frac"]:
        lines.append(f"rewards  {record['failed_frac']:.1%} failed")
    return "\n".join(lines)


def prompts_asked(plan: Plan, num: int) -> str:
    """Say of so many prompts whether they were held out from training."""
    if plan.split != "eval":
        return f"{num} prompts"
    options = dict(plan.task.options)
    apart = options.get("eval_path") or options.get("eval_split")
    if options.get("holdout_frac") == 0 and not apart:
        return f"{num} prompts, none held out from training"
    return f"{num} held-out prompts"


def run() -> None:
    """Evaluate as the flags say."""
    _FLAGS.check()
    if _OUT.value is not None:
        policy.check_new("out", _OUT.value)
    workdir = policy.workdir_of(_FLAGS.model)
    plan = plan_of(
        policy.run_of(workdir) if workdir else None,
        _TASK.value,
        options=policy.literals("option", _OPTION.value),
        system_prompt=_SYSTEM_PROMPT.value,
        template_options=_FLAGS.template_options(),
        rewards=[name for name in (_REWARD.value or "").split(",") if name],
        num_prompts=_NUM_PROMPTS.value,
        num_samples=_NUM_SAMPLES.value,
        ks=_K.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        seed=_SEED.value,
    )
    task = tasks.build(plan.task, reward=plan.reward, eval_size=plan.num_prompts)
    compile_cache.enable()
    with status_line.StatusLine() as display:
        asked, speculation = _FLAGS.load(display)
        law, how = _FLAGS.law(asked, plan.law)
        record, lines = evaluate(asked, plan, task, law, speculation, display)
        display.clear()
    if _OUT.value is not None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        pathlib.Path(_OUT.value).write_text(text, encoding="utf-8")
    plural = "s" if plan.num_samples > 1 else ""
    what = prompts_asked(plan, record["num_prompts"])
    print(
        f"{asked.identity}, {asked.precision}; {task.name}: {what}, "
        f"{plan.num_samples} completion{plural} each, {how}\n"
        f"{describe(record)}",
        file=sys.stderr,
    )
    print(json.dumps(record, ensure_ascii=False), flush=True)


def evaluate(
    asked: policy.Policy,
    plan: Plan,
    task: tasks.Task,
    law: sampling.SamplingConfig,
    speculation: speculation_lib.Speculation,
    observer: watch_lib.Observer,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask, judge, and say what came of it.

    Returns:
      The record, and one of each prompt with its completions, fit for JSON.

    Raises:
      ValueError: the task has no such examples, or a prompt is too long.
    """
    # A run's own limit stands: its engines were made for it. Elsewhere the model's
    # context is the limit, which is looked at when the engine is made.
    own_limit = "max_length" in plan.engine
    limit = plan.task.max_prompt_tokens if own_limit else sys.maxsize
    found = assembly.prompts_of(
        dataclasses.replace(plan.task, max_prompt_tokens=limit),
        task,
        plan.split,
        asked.tokenizer,
        observer,
    ).prompts
    num_samples = plan.num_samples
    requests = prompts.requests_of(found, num_samples, plan.max_new_tokens, 0)
    judging = plan.reward
    engine = asked.engine_for(requests, speculation, sampling_cfg=law, **plan.engine)
    observer.stage("compiling, reading prompts")

    def progress(num_done, num_tokens):
        observer.stage("generating")
        observer.within(num_done, len(requests), f"{num_tokens} tokens")

    with reward_pool.of_settings(judging, task.score, judging.workers) as pool:
        try:
            pool.wait_until_ready()
            answers = evaluator.answer(
                [engine],
                [found[i // num_samples].example for i in range(len(requests))],
                requests,
                plan.seed,
                pool,
                asked.tokenizer.decode,
                progress,
            )
        finally:
            engine.pool.close()
    if answers.scores.num_failed:
        observer.note(
            f"{answers.scores.num_failed} rewards failed, the first: "
            f"{answers.scores.first_failure()}"
        )
    rewards = answers.scores.rewards.reshape(-1, num_samples)
    record = {
        "model": asked.identity,
        "precision": asked.precision,
        "task": task.name,
        "split": "eval" if plan.split == "eval" else "all",
        "num_prompts": len(found),
        "num_samples": num_samples,
        **dataclasses.asdict(law),
        "max_new_tokens": plan.max_new_tokens,
        "seed": plan.seed,
        **record_of(answers, rewards, plan.ks),
    }
    return record, [
        _line(prompt.example, i * num_samples, num_samples, answers)
        for i, prompt in enumerate(found)
    ]


def _line(
    example: types.Example, first: int, count: int, answers: evaluator.Answers
) -> dict[str, Any]:
    """What was said to a prompt: `count` answers from the `first` on."""
    completions = [
        {
            "text": answers.texts[i],
            "reward": float(answers.scores.items[i].reward),
            "num_tokens": len(answers.completions[i].tokens),
            "finish_reason": answers.completions[i].finish_reason,
        }
        for i in range(first, first + count)
    ]
    named = dict(id=example.example_id, prompt=example.prompt, answer=example.answer)
    return named | {"completions": completions}


def main(argv: Sequence[str]) -> None:
    """Evaluate; what a user can mend is one line, not a traceback."""
    if len(argv) > 1:
        command_line.fail(
            f"unexpected argument {argv[1]!r}: every setting is a --flag."
        )
    with command_line.told(OSError):
        run()


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
