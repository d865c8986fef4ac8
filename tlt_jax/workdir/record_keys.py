"""Every key of `metrics.jsonl`: unit, meaning, and when it is there.

`docs/metrics.md` is this table, written by
`python -m tlt_jax.workdir.record_keys > docs/metrics.md`.
"""

import itertools
import re
from typing import NamedTuple

# What stands for a part of a key that settings decide.
_PARTS = {
    "{name}": r"[a-z0-9_.]+",
    "{samples}": r"\d+",
    "{k}": r"\d+",
    "{ranking}": "(?:coupled|deterministic)",
}


class Key(NamedTuple):
    """One key, or several whose names differ in a part in braces.

    Attributes:
      name: as it stands in the record; parts that vary are in braces.
      unit: what a value of 1 is.
      meaning: of a value.
      when: the record has it; empty: in every row.
      stays: every row of a training run has the key, with null where it has no value.
      code: how the code spells it, where it is put together there.
    """

    name: str
    unit: str
    meaning: str
    when: str = ""
    stays: bool = False
    code: str = ""

    def matches(self, name: str) -> bool:
        """Tell whether a record's key is this one."""
        parts = re.split(r"(\{\w+\})", self.name)
        pattern = "".join(_PARTS.get(part, re.escape(part)) for part in parts)
        return re.fullmatch(pattern, name) is not None


_UPDATE = "where a group carried signal; else null"
_UPDATED = "where a group carried signal"
_COMPARED = _UPDATE + ", as with `rollout.lag` and `learner.old_logprobs=rollout`"
_WEIGHTED = "with `algorithm.importance_cap`, or `rollout.lag`"
_LAGS = "with `rollout.lag`"
_MIXTURE = "of a mixture of experts, where a group carried signal"
_SPECULATES = "where a decode call speculated"
_DRAFTS = "where the learned drafter's drafts were verified"
_FRESH = "where the drafter was measured since the last row"
_TRAINED = "where the drafter was trained since the last row"
_ADAPTS = "with `specdec.mode=tlt`"
_EVALUATES = "every `eval.every` steps, and in row 0"
_SEVERAL = "with two or more `reward.functions`; null where every completion failed"

TRAINING = (
    Key("step", "steps", "RL steps done, this one counted", stays=True),
    # Rewards
    Key("reward/mean", "reward", "mean over all completions judged", stays=True),
    Key("reward/std", "reward", "their standard deviation", stays=True),
    Key(
        "reward/zero_std_frac",
        "fraction",
        "groups whose rewards are all equal: they teach nothing",
        stays=True,
    ),
    Key(
        "reward/{name}",
        "reward",
        "mean that one function gave, unweighted, where no function failed; the name "
        "is the function's, its module's before it where two are called alike",
        _SEVERAL,
    ),
    Key("reward/num_failed", "calls", "completions that got `reward.failure_reward`"),
    Key("reward/num_error", "calls", "of these: a function raised", code="num_{status"),
    Key("reward/num_timeout", "calls", "it took too long", code="num_{status"),
    Key("reward/num_crashed", "calls", "it ended its process", code="num_{status"),
    Key("reward/num_nonfinite", "calls", "it gave no finite number", code="num_{stat"),
    Key("reward/first_failure", "text", "what the first one said", "where one failed"),
    Key("reward/scoring_s", "s", "judging, all calls added up"),
    Key("reward/scoring_max_s", "s", "the longest call"),
    # Lengths
    Key("length/mean", "tokens", "length of completions, EOS counted", stays=True),
    Key("length/p50", "tokens", "their median", stays=True),
    Key("length/p95", "tokens", "their 95th percentile", stays=True),
    Key("length/max", "tokens", "the longest", stays=True),
    Key(
        "length/clipped_frac",
        "fraction",
        "completions that `rollout.max_new_tokens` cut",
        stays=True,
    ),
    # Policy
    Key("policy/loss", "-", "the loss, mean over updates", _UPDATE, stays=True),
    Key("policy/entropy", "nats", "of the law at a token, mean", _UPDATE, stays=True),
    Key(
        "policy/kl",
        "nats",
        "divergence from the initial policy at a token, by `algorithm.kl_estimator`",
        "with `algorithm.kl_coef` in the loss; else null",
        stays=True,
    ),
    Key(
        "policy/clip_frac",
        "fraction",
        "tokens whose ratio was clipped",
        _UPDATE,
        stays=True,
    ),
    Key("policy/grad_norm", "-", "norm of the gradient", _UPDATE, stays=True),
    Key("policy/dual_clip_frac", "fraction", "tokens of the dual clip", _UPDATED),
    Key("policy/ratio_mean", "-", "ratio of new to old probability, mean", _UPDATED),
    Key("policy/ratio_std", "-", "its standard deviation", _UPDATED),
    Key(
        "policy/out_of_support_frac",
        "fraction",
        "tokens that the trainer's own top-k, top-p or min-p would not have drawn: "
        "left out of the loss",
        _UPDATED,
    ),
    Key(
        "policy/importance_mean",
        "-",
        "ratio of trainer to sampler, capped, mean",
        _WEIGHTED,
    ),
    Key(
        "policy/importance_capped_frac",
        "fraction",
        "tokens of which it was capped",
        _WEIGHTED,
    ),
    Key("policy/learning_rate", "-", "of the updates, mean", _UPDATED),
    Key(
        "policy/update_skipped",
        "fraction",
        "updates that were not finite and left out; three in a row end the run",
        _UPDATED,
    ),
    Key("policy/weights_digest", "text", "identifies the weights' bits", _UPDATED),
    Key(
        "mismatch/logprob_max_abs",
        "nats",
        "largest distance of a log-probability of the rollout from the trainer's own",
        _COMPARED,
        stays=True,
    ),
    # Mixtures of experts
    Key(
        "moe/route_flips",
        "fraction",
        "tokens x layers that the trainer sent through other experts than the rollout, "
        "before the first update; 0 with `learner.routes=replay`",
        _MIXTURE,
    ),
    Key(
        "moe/load_balancing_loss",
        "-",
        "unevenness of the experts' load within a micro-batch, as trained on with "
        "`learner.load_balancing_coef`; about the experts per token where it is even",
        _MIXTURE,
    ),
    Key(
        "moe/router_z_loss",
        "-",
        "mean squared log of the routers' normalisers, see `learner.router_z_coef`",
        _MIXTURE,
    ),
    # Rollout
    Key("rollout/tokens", "tokens", "drawn, EOS counted", stays=True),
    Key(
        "rollout/tokens_per_s",
        "tokens/s",
        "of the rollout's seconds, without compiling",
        stays=True,
    ),
    Key("rollout/tokens_digest", "text", "SHA-256 of all tokens drawn", stays=True),
    Key("rollout/decode_steps", "steps", "decode steps of all engines"),
    Key("rollout/row_steps", "row-steps", "rows of these steps added up"),
    Key("rollout/prefill_tokens", "tokens", "of prompts computed"),
    Key("rollout/preempted", "rows", "put back for want of pages, and begun again"),
    Key("rollout/prefill_s", "s", "computing prompts, all engines added up"),
    Key("rollout/decode_s", "s", "decoding, all engines added up"),
    Key("rollout/rounds", "rounds", "batches drawn, more than 1 by dynamic sampling"),
    Key(
        "rollout/lag",
        "steps",
        "by which the weights that rolled out are older than those that learn",
        _LAGS,
    ),
    Key("rollout/prompts_skipped", "prompts", "left out of the data as too long"),
    # Speculation
    Key(
        "specdec/accept_length",
        "tokens",
        "that a row got per pass of the target, before a text's end cut them; 1: no "
        "speculation",
        stays=True,
    ),
    Key(
        "specdec/accept_rate_by_depth",
        "fractions",
        "drafts accepted at each depth whose parent was accepted",
        stays=True,
    ),
    Key("specdec/strategy", "text", "the one of most decode calls", stays=True),
    Key(
        "specdec/num_accepted",
        "counts",
        "row-steps that speculated, and drafts accepted at each depth",
        _SPECULATES,
    ),
    Key("specdec/num_tried", "counts", "drafts tried at each depth", _SPECULATES),
    Key(
        "specdec/chance_tried",
        "counts",
        "the learned drafter's drafts whose parent came true, by tenths of the chance "
        "they were given",
        _DRAFTS,
    ),
    Key("specdec/chance_sum", "drafts", "sum of these chances", _DRAFTS),
    Key("specdec/chance_true", "counts", "how many of them came true", _DRAFTS),
    Key("specdec/tau", "-", "by which chances were given at the end", _DRAFTS),
    Key("specdec/sharpness", "-", "by which drafts were ranked at the end", _DRAFTS),
    Key(
        "specdec/rank_verified",
        "counts",
        "the learned drafter's drafts, by their rank by score among all of the "
        "batch, divided by its live rows: up to 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4, "
        "5, 6, 8, 10, 12, 16, 24, 32, 48, 64, and beyond",
        _DRAFTS,
    ),
    Key("specdec/rank_accepted", "counts", "how many of these were accepted", _DRAFTS),
    Key(
        "specdec/rule",
        "text",
        "what accepts the learned drafter's drafts; other than `keyed`: the tokens are "
        "others than plain decoding's, of the same law",
        "unless `specdec.mode=off`",
    ),
    # Workers
    Key("workers/idle_s", "s", "without generating, all workers added", stays=True),
    Key("workers/trained_s", "s", "of these, training the drafter", stays=True),
    Key(
        "workers/idle_frac",
        "fraction",
        "idle seconds per second of all workers present",
        stays=True,
    ),
    Key("workers/num_lost", "workers", "that died or hung so far"),
    Key("workers/lost", "text", "which, and why", "where some are lost"),
    # Drafter
    Key(
        "drafter/version",
        "number",
        "of the weights in use; 0: not trained yet",
        f"{_ADAPTS}; else null",
        stays=True,
    ),
    Key(
        "drafter/loss", "nats", "of its last step", f"{_TRAINED}; else null", stays=True
    ),
    Key(
        "drafter/top1_acc",
        "fraction",
        "tokens of which both laws' likeliest are one, at depth 1",
        f"{_TRAINED}; else null",
        stays=True,
    ),
    Key(
        "drafter/top1_prob",
        "probability",
        "that the target gives the drafter's likeliest token, mean",
        _TRAINED,
        code="drafter/{name}",
    ),
    Key(
        "drafter/overlap",
        "probability",
        "that drafts of the drafter's law are accepted, mean",
        _TRAINED,
        code="drafter/{name}",
    ),
    Key(
        "drafter/token_loss",
        "nats",
        "part of the loss that compares laws",
        _TRAINED,
        code="drafter/{name}",
    ),
    Key("drafter/ready", "0 or 1", "whether the engines may use it", _ADAPTS),
    Key("drafter/num_steps", "steps", "taken since the last row", _ADAPTS),
    Key("drafter/num_skipped", "steps", "of these, not finite and left out", _ADAPTS),
    Key("drafter/num_updates", "updates", "in all", _ADAPTS),
    Key("drafter/train_s", "s", "training and measuring it", _ADAPTS),
    Key("drafter/texts", "texts", "kept for it", _ADAPTS),
    Key("drafter/texts_bytes", "bytes", "of these", _ADAPTS),
    Key("drafter/texts_dropped", "texts", "that gave way to newer ones", _ADAPTS),
    Key(
        "drafter/fresh_accept_length_{ranking}",
        "tokens",
        "what its drafts along new texts would have had accepted, and 1",
        _FRESH,
    ),
    Key("drafter/sharpness", "-", "of coupled drafts, the best one", _FRESH),
    Key(
        "drafter/tau",
        "-",
        "with that sharpness, by which most nearly as many come true as scores say",
        _FRESH,
    ),
    Key("drafter/failure", "text", "why a training was undone", "where one was"),
    # Evaluation
    Key(
        "eval/avg@{samples}",
        "reward",
        "mean over `eval.samples` completions of each held-out prompt",
        _EVALUATES,
        code="avg@{",
    ),
    Key(
        "eval/pass@{k}",
        "probability",
        "that one of k completions is right (a reward of at least 1), without bias",
        _EVALUATES,
        code="pass@{",
    ),
    # Seconds
    Key("time/step_s", "s", "the whole step", stays=True),
    Key("time/rollout_s", "s", "drawing completions", stays=True),
    Key("time/reward_s", "s", "waiting for rewards after the rollout", stays=True),
    Key(
        "time/inference_s",
        "s",
        "log-probabilities of the old and the initial policy",
        stays=True,
    ),
    Key(
        "time/wait_s",
        "s",
        "for the rollout; itself, rewards included, it is beside the step before",
        _LAGS,
        code='stage("wait")',
    ),
    Key("time/update_s", "s", "gradients and optimizer", stays=True),
    Key("time/sync_s", "s", "bringing weights to the workers", stays=True),
    Key(
        "time/compile_s",
        "s",
        "waiting for compilers, which no other time holds but the step's",
        stays=True,
    ),
    Key("time/drafter_s", "s", "training the drafter here", _ADAPTS, code='"drafter"'),
    Key("time/eval_s", "s", "evaluating", "where it was due", code='stage("eval")'),
)

_MEASURED = "where it was measured: row 0, every `eval.every` steps, and the last one"
_STEPS = "in every row but row 0"

DRAFTER = (
    Key("step", "steps", "taken"),
    Key("drafter/loss", "-", "of this step", _STEPS),
    Key("drafter/grad_norm", "-", "norm of the gradient", _STEPS),
    Key("drafter/update_skipped", "0 or 1", "the step was not finite", _STEPS),
    Key(
        "drafter/token_loss",
        "nats",
        "part of the loss that compares laws, by step unrolled",
        _STEPS,
        code="drafter/{name}",
    ),
    Key(
        "drafter/feature_loss",
        "-",
        "part of the loss that compares features, by step unrolled",
        _STEPS,
        code="drafter/{name}",
    ),
    Key(
        "drafter/top1_acc",
        "fractions",
        "tokens of which both laws' likeliest are one, by step unrolled",
        _STEPS,
    ),
    Key(
        "drafter/top1_prob",
        "probabilities",
        "that the target gives the drafter's likeliest token, by step unrolled",
        _STEPS,
        code="drafter/{name}",
    ),
    Key(
        "drafter/overlap",
        "probabilities",
        "that drafts of the drafter's law are accepted, by step unrolled",
        _STEPS,
        code="drafter/{name}",
    ),
    Key("drafter/num_predictions", "tokens", "predicted in the step", _STEPS),
    Key(
        "eval/{ranking}_accept_length",
        "tokens",
        "what drafts along the held-out texts would have had accepted, and 1",
        _MEASURED,
        code="accept_length",
    ),
    Key(
        "eval/{ranking}_rate_by_depth",
        "fractions",
        "of drafts right at each depth, given the text's own tokens before",
        _MEASURED,
        code="rate_by_depth",
    ),
    Key(
        "eval/sharpness",
        "-",
        "of coupled drafts, the best one",
        _MEASURED,
        code='"sharpness"',
    ),
    Key(
        "eval/tau",
        "-",
        "with that sharpness, by which most nearly as many come true as scores say",
        _MEASURED,
        code='"tau"',
    ),
    Key("texts/num", "texts", "to train on", "in row 0"),
    Key("texts/response_tokens", "tokens", "of their responses", "in row 0"),
    Key(
        "texts/draft_vocab_coverage",
        "fraction",
        "held-out response tokens that can be drafted",
        "in row 0 with a draft vocabulary",
    ),
    Key("time/load_s", "s", "loading or making the target", "in row 0", code='"load"'),
    Key("time/texts_s", "s", "writing the texts", "in row 0", code='"texts"'),
    Key("time/step_s", "s", "a step, mean since the last row", _STEPS),
)


def find(name: str, table: tuple[Key, ...] = TRAINING) -> Key | None:
    """Return what a key of a record means; None: it is no key of the table."""
    exact = [key for key in table if key.name == name]
    return next(iter(exact + [key for key in table if key.matches(name)]), None)


def is_function(name: str) -> bool:
    """Tell whether a key is the mean of one reward function among several."""
    found = find(name)
    return found is not None and found.name == "reward/{name}"


def page() -> str:
    """Write `docs/metrics.md`."""
    always = sum(key.stays for key in TRAINING)
    return f"""# Every key of the record

<!-- Written by `python -m tlt_jax.workdir.record_keys > docs/metrics.md`. -->

`metrics.jsonl` in a run's workdir holds one JSON object a line: one per RL step, and
row 0 where the run was evaluated before its first one. TensorBoard, Weights & Biases
and Trackio get its numbers under the same names. Numbers that are not finite are the
strings `"NaN"`, `"Infinity"` and `"-Infinity"`; `tlt_jax.workdir.metrics.read` makes
numbers of them again. Parts in braces vary.

## A training run (`tlt_jax.main`)

{always} keys are in every row from step 1 on, null where there is no value; the last
column says when the others are there.

{_markdown(TRAINING)}
## A drafter's training (`tlt_jax.train_drafter`)

A row every `log.every` steps.

{_markdown(DRAFTER)}"""


def _markdown(table: tuple[Key, ...]) -> str:
    """Write a table for each group of keys, in their order."""
    lines: list[str] = []
    for group, keys in itertools.groupby(table, lambda key: key.name.split("/")[0]):
        lines += [f"### {group}", ""]
        lines += ["| key | unit | meaning | present |", "| --- | --- | --- | --- |"]
        for key in keys:
            cells = f"`{key.name}`", key.unit, key.meaning, key.when or "always"
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page().rstrip())
