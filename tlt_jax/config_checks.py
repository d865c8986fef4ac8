"""Checks of a training run's settings against each other."""

import dataclasses
from typing import TYPE_CHECKING

from tlt_jax.settings import schema, speculation

if TYPE_CHECKING:
    from tlt_jax import config


def check(run: "config.RunConfig") -> None:
    """Check what no single field can say.

    Raises:
      schema.ConfigError: two settings contradict each other, or one is not built yet.
    """
    for name, value in (("model.spec", run.model.spec), ("task.name", run.task.name)):
        if not value:
            raise schema.ConfigError(f"{name} is empty: set it in the recipe.")
    speculation.check_shape(run.drafter)
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
    longest = run.task.max_prompt_tokens + run.rollout.max_new_tokens
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
        raise schema.ConfigError(
            f"mesh=(data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]}): each axis "
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
