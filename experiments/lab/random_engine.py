"""Engines of random weights, and what they are asked."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax import types
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import programs as engine_programs
from tlt_jax.rl.engine import speculator
from tlt_jax.specdec import sampling
from tlt_jax.specdec import strategy as strategy_lib

# Tokens that a drafter can propose, at most.
DRAFT_VOCAB = 32_768


def make(
    cfg: model_config.ModelConfig,
    params: model_params.Params,
    batch: int,
    strategy: strategy_lib.Strategy | None,
    *,
    max_length: int,
    page_size: int,
    dtype: str,
    temperature: float = 1.0,
) -> engine_lib.Engine:
    """Makes an engine that always does the same, its drafter of random weights.

    `strategy` None: plain decoding.
    """
    chosen = draft_cfg = None
    vocab = min(DRAFT_VOCAB, cfg.vocab_size)
    if strategy is not None:
        if strategy.drafts:
            draft_cfg = drafter.of_target(
                cfg,
                feature_layers=drafter.low_mid_high(cfg.num_layers)
                if cfg.num_layers > 2
                else (cfg.num_layers - 1,),
                draft_vocab_size=vocab,
            )
        arms = strategy_lib.Arms(((batch, (strategy,)),))
        chosen = speculator.SpeculatorConfig(arms, draft_cfg)
    engine = engine_lib.Engine(
        cfg,
        engine_programs.EngineConfig(
            max_rows=batch,
            max_length=max_length,
            page_size=page_size,
            steps_per_call=64,
            sampling_cfg=sampling.SamplingConfig(temperature),
            dtype=dtype,
        ),
        speculator_cfg=chosen,
    )
    engine.set_params(params, version=0)
    if draft_cfg is not None:
        drawn = drafter.init(draft_cfg, jax.random.key(1), jnp.dtype(dtype))
        drawn = drawn.replace(draft_ids=jnp.arange(vocab, dtype=jnp.int32))
        engine.set_drafter(drawn, version=0)
    return engine


def requests(
    vocab_size: int, count: int, num_prompt: int, new_tokens: int
) -> list[types.Request]:
    """Makes requests of random prompts."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, vocab_size, (count, num_prompt)).astype(np.int32)
    return [types.Request(i, i, 0, row, new_tokens) for i, row in enumerate(drawn)]


def first_differing(ours: Sequence[int], others: Sequence[int]) -> int | None:
    """Returns the first place where two texts differ; None: they are equal."""
    for place, (one, other) in enumerate(zip(ours, others, strict=False)):
        if one != other:
            return place
    return None if len(ours) == len(others) else min(len(ours), len(others))
