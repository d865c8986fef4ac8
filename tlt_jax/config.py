"""A training run's settings as one record, and the checks between them.

A recipe (`configs/*.py`) takes `default()`, a locked ConfigDict with every key, and
overrides some. At the border `load` turns it into a `RunConfig`: frozen, hashable and
checked, the only form that the rest of the package sees. The dataclasses of
`tlt_jax/settings/` are the one description from which the ConfigDict, the checks and
the JSON form follow.
"""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from typing import Any, Literal

if typing.TYPE_CHECKING:
    import ml_collections

from tlt_jax.settings import describe, drafter_run, schema, sections, speculation


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run; see the sections' own classes.

    Attributes:
      seed: fixes all randomness.
      num_steps: RL steps in all.
      precision: type of activations and products; weights and optimizer are float32.
    """

    seed: int = schema.number(0, 0, 10**18)
    num_steps: int = schema.number(100, 1, 10**9)
    precision: Literal["float32", "bfloat16"] = "float32"
    model: sections.Model = sections.Model()
    pretrain: sections.Pretrain = sections.Pretrain()
    task: sections.Task = sections.Task()
    sampling: sections.Sampling = sections.Sampling()
    rollout: sections.Rollout = sections.Rollout()
    cache: sections.Cache = sections.Cache()
    specdec: speculation.Specdec = speculation.Specdec()
    drafter: speculation.Drafter = speculation.Drafter()
    adaptation: speculation.Adaptation = speculation.Adaptation()
    workers: speculation.Workers = speculation.Workers()
    algorithm: sections.Algorithm = sections.Algorithm()
    optimizer: sections.Optimizer = sections.Optimizer()
    learner: sections.Learner = sections.Learner()
    mesh: sections.Mesh = sections.Mesh()
    reward: sections.Reward = sections.Reward()
    eval: sections.Eval = sections.Eval()
    checkpoint: sections.Checkpoint = sections.Checkpoint()
    log: sections.Log = sections.Log()

    def __post_init__(self):
        schema.check_fields(self)
        _check(self)

    @property
    def longest_text(self) -> int:
        """Positions of the longest prompt with the longest completion."""
        return self.task.max_prompt_tokens + self.rollout.max_new_tokens


def default() -> "ml_collections.ConfigDict":
    """Return a new locked ConfigDict with every key at its default.

    `model.spec` and `task.name` are empty: a recipe must set them.
    """
    config = schema.to_config_dict(RunConfig)
    config.lock()
    config.task.options.unlock()
    config.task.template_options.unlock()
    return config


def load(config: "ml_collections.ConfigDict | Mapping[str, Any]") -> RunConfig:
    """Check nested keys and values and freeze them; absent keys keep their defaults.

    Raises:
      schema.ConfigError: a key is unknown (the nearest one is named), or a value has
        the wrong type or is out of range.
    """
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    return schema.build(RunConfig, config)


def to_json(run: RunConfig) -> str:
    """Write `run` as JSON; `load(json.loads(text))` gives it back."""
    return json.dumps(schema.to_dict(run), indent=2, sort_keys=True) + "\n"


def digest(run: RunConfig) -> str:
    """Return 16 hex digits that identify the configuration."""
    text = json.dumps(schema.to_dict(run), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return `{key: (old value, new value)}` of the keys in which two runs differ."""
    new_leaves = dict(schema.leaves(new))
    return {
        key: (value, new_leaves[key])
        for key, value in schema.leaves(old)
        if value != new_leaves[key]
    }


def page() -> str:
    """Describe every setting of every program: what stands in `docs/settings.md`."""
    return _PAGE + describe.page(
        {"tlt_jax.main": RunConfig, "tlt_jax.train_drafter": drafter_run.DrafterRun}
    )


_PAGE = """\
# Settings

A recipe (`configs/`) sets some of these, `--config.KEY=VALUE` any of them, and
`--config=FILE.yaml` takes them from a file, such as the `config.yaml` that every run
writes. On the command line:

- text is written as it is, flags as `true` or `false`;
- a tuple as Python has it, `"--config.rollout.stop=('###', 'Q:')"`; one element may
  stand alone, names may be parted by commas;
- `None` unsets what is unset by default;
- free keys stand behind another dot, `--config.task.options.prompt_key=question`: what
  reads as a number, a tuple, true or false is one, the rest is text. They belong to the
  task: with another `task.name` than the recipe's, the recipe's `task.options` go.

`package.module:Name` is one of your own, see [extending](extending.md). This page is
written by `python -m tlt_jax.config > docs/settings.md`.

"""


def _check(run: RunConfig) -> None:
    """Check what no single field can say.

    Raises:
      schema.ConfigError: two settings contradict each other, or one is not built yet.
    """
    for name, value in (("model.spec", run.model.spec), ("task.name", run.task.name)):
        if not value:
            raise schema.ConfigError(f"{name} is empty: set it in the recipe.")
    if run.sampling.temperature == 0:
        raise schema.ConfigError(
            "sampling.temperature=0 draws the same answer for all of a group, which "
            "teaches nothing: set it above 0 (eval.temperature=0 is greedy evaluation)."
        )
    if "" in run.rollout.stop:
        raise schema.ConfigError(
            f"rollout.stop={run.rollout.stop} holds an empty string, which would end "
            "every completion at its first token: leave it out."
        )
    # A function of one's own may do without a group.
    if run.rollout.group_size == 1 and ":" not in (run.algorithm.advantage or ""):
        named = run.algorithm.advantage or run.algorithm.name
        raise schema.ConfigError(
            f"rollout.group_size=1 with the advantages of {named}, which compare the "
            "completions of a group: one alone teaches nothing. Set it to 2 or more."
        )
    speculation.check_rule(run.specdec)
    speculation.check_shape(run.drafter)
    speculation.check_placement(run.workers, run.specdec, run.adaptation)
    sections.check_reward(run.reward)
    asked = {"ngram": "ngram_strategies", "tlt": "strategies"}.get(run.specdec.mode)
    if asked and not getattr(run.specdec, asked):
        raise schema.ConfigError(
            f"specdec.mode={run.specdec.mode!r} with specdec.{asked}=(): nothing would "
            "be speculated. Name a strategy, such as 4:D4K1V5, or set specdec.mode=off."
        )
    if run.workers.min_idle >= run.workers.num > 1:
        raise schema.ConfigError(
            f"workers.min_idle={run.workers.min_idle} of workers.num={run.workers.num}"
            ": the last worker never waits, so fewer must do."
        )
    longest = run.longest_text
    if run.learner.row_tokens < longest:
        raise schema.ConfigError(
            f"learner.row_tokens={run.learner.row_tokens} cannot hold a prompt of "
            f"task.max_prompt_tokens={run.task.max_prompt_tokens} with a completion of "
            f"rollout.max_new_tokens={run.rollout.max_new_tokens}: give at least "
            f"{longest}."
        )
    if run.rollout.prompts_per_step % run.learner.minibatches:
        raise schema.ConfigError(
            f"learner.minibatches={run.learner.minibatches} does not divide "
            f"rollout.prompts_per_step={run.rollout.prompts_per_step}: every minibatch "
            "has the same number of prompts."
        )
    sizes = dataclasses.astuple(run.mesh)
    if 0 in sizes or sizes.count(-1) > 1:
        named = f"data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]}"
        named += f", expert={sizes[3]}" if sizes[3] != 1 else ""
        raise schema.ConfigError(
            f"mesh=({named}): each axis "
            "has at least 1 device, and at most one is -1 (all that remain)."
        )
    if not all(1 <= k <= run.eval.samples for k in run.eval.k):
        raise schema.ConfigError(
            f"eval.k={run.eval.k} needs 1 <= k <= eval.samples={run.eval.samples}: "
            "draw more samples or lower k."
        )
    if run.cache.num_pages * run.cache.page_size < longest and run.cache.num_pages:
        raise schema.ConfigError(
            f"cache.num_pages={run.cache.num_pages} of cache.page_size="
            f"{run.cache.page_size} tokens cannot hold one row of {longest} tokens: "
            f"give at least {-(-longest // run.cache.page_size)} pages, or 0."
        )


if __name__ == "__main__":
    print(page(), end="")
