"""A target of random weights, a drafter for it, and texts with their features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models import transformer
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import head as drafter_head
from tlt_jax.specdec.texts import layout, shards
from tlt_jax.specdec.training import objectives, unroll

TARGET = model_config.ModelConfig(
    family="qwen3",
    vocab_size=24,
    num_layers=4,
    d_model=16,
    d_ff=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    tie_embeddings=True,
    qk_norm=True,
)
DRAFT_IDS = jnp.array([0, 2, 3, 5, 8, 11, 13, 14, 17, 20, 22])


def drafter_config(**settings) -> drafter.DrafterConfig:
    given = {"feature_layers": (0, 1, 3), "draft_vocab_size": len(DRAFT_IDS)}
    return drafter.of_target(TARGET, **given | settings)


@functools.cache
def target_params() -> model_params.Params:
    return jax.jit(model_params.init, static_argnums=0)(TARGET, jax.random.key(0))


def params_of(cfg: drafter.DrafterConfig) -> drafter.DrafterParams:
    return jax.jit(drafter.init, static_argnums=0)(cfg, jax.random.key(1))


def followed(params: drafter.DrafterParams) -> drafter.DrafterParams:
    """Let tokens of a block say something of the next ones, as after training."""
    own = params.block
    outward = jax.random.normal(jax.random.key(3), own.markov_out.shape)
    return params.replace(block=own.replace(markov_out=outward / 2))


def target_of(cfg: drafter.DrafterConfig) -> unroll.Target:
    ids = DRAFT_IDS if cfg.draft_vocab_size else None
    head = drafter_head.head_rows(target_params(), ids)
    return unroll.Target(target_params().embed, head, ids)


@functools.partial(jax.jit, static_argnums=2)
def _features(params, tokens, layers):
    positions = jnp.arange(tokens.shape[1])[None]
    out = transformer.forward(params, TARGET, tokens, positions, features=layers)
    return out.hidden, out.features


def record(
    text_id: int, length: int, response_start: int, layers=(0, 1, 3)
) -> layout.Record:
    rng = np.random.default_rng(text_id)
    tokens = rng.integers(TARGET.vocab_size, size=length).astype(np.int32)
    padded = np.zeros((1, 16), np.int32)
    padded[0, :length] = tokens
    hidden, features = _features(target_params(), padded, layers)
    features = jnp.concatenate(features) if layers else None

    def rows(x):
        return None if x is None else np.asarray(x[:, 0, :length]).T

    return layout.Record(
        text_id=text_id,
        tokens=tokens,
        response_start=response_start,
        hidden=rows(hidden),
        features=rows(features),
        key=np.array([7, text_id], np.uint32),
        version=0,
    )


def buffer_of(directory, records) -> shards.Shards:
    buffer = shards.Shards(directory, "float32")
    buffer.append(records)
    return buffer


def loss(params, batch, target, *, cfg, objective):
    """All bases at once: the scalar that training descends, and metrics."""
    seen = unroll.see(params, batch, target, cfg=cfg)
    size = batch.bases.shape[1]
    sums = objectives.sums_of(
        params, seen, batch, target, 0, size, cfg=cfg, objective=objective
    )
    return objectives.total_of(sums, batch, objective)
