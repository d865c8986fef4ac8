"""A drafter of random weights with the sizes of a real target's, and its training."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from tlt_jax.models import config as model_config
from tlt_jax.models.drafters import drafter
from tlt_jax.runtime import train_state
from tlt_jax.specdec.training import objectives, unroll
from tlt_jax.specdec.training import step as step_lib

# vocab_size, d_model, d_ff, num_heads, num_kv_heads, head_dim, num_layers.
SHAPES = {
    "smollm2-135m": (49152, 576, 1536, 9, 3, 64, 30),
    "qwen2.5-1.5b": (151936, 1536, 8960, 12, 2, 128, 28),
    "tiny": (64, 16, 24, 2, 1, 8, 8),
}


def model_of(
    shape: Sequence[int], family: str, **more: object
) -> model_config.ModelConfig:
    """Returns a model of such sizes, in the order of `SHAPES`."""
    vocab, width, d_ff, heads, kv_heads, head_dim, layers = shape
    return model_config.ModelConfig(
        family=family,
        vocab_size=vocab,
        num_layers=layers,
        d_model=width,
        d_ff=d_ff,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        **more,
    )


def check(names: Sequence[str], argument: str) -> None:
    """Refuses a target whose sizes are not known.

    Raises:
      ValueError: with those that are.
    """
    if unknown := [name for name in names if name not in SHAPES]:
        raise ValueError(
            f"--{argument} names {', '.join(unknown)}; known here are "
            f"{', '.join(SHAPES)}."
        )


class Training:
    """A drafter in training: three fused features, a reduced vocabulary, AdamW."""

    def __init__(
        self, name: str, draft_vocab: int, *, num_steps: int = 1, head_chunk: int = 256
    ):
        """Makes a drafter of `SHAPES`, which can propose at most `draft_vocab` tokens.

        Unrolls `num_steps`; the logits of `head_chunk` bases are held at once.
        """
        target = model_of(SHAPES[name], "llama", tie_embeddings=True)
        vocab, width = target.vocab_size, target.d_model
        size = min(draft_vocab, vocab)
        layers = drafter.low_mid_high(target.num_layers)
        self.cfg = drafter.of_target(
            target, feature_layers=layers, draft_vocab_size=size
        )
        keys = iter(jax.random.split(jax.random.key(0), 3))
        self.target = unroll.Target(
            jax.random.normal(next(keys), (vocab, width)),
            jax.random.normal(next(keys), (size, width)),
            jnp.arange(size),
        )
        optimizer = optax.adamw(1e-4)
        params = jax.jit(drafter.init, static_argnums=0)(self.cfg, next(keys))
        self.state = train_state.TrainState(
            params, jax.jit(optimizer.init)(params), jnp.int32(0)
        )
        whole_step = functools.partial(
            _whole_step,
            cfg=unroll.ForwardConfig(self.cfg, head_chunk=head_chunk),
            objective=objectives.Objective(num_steps, decay=0.8),
            optimizer=optimizer,
        )
        self._step = jax.jit(whole_step, donate_argnums=0)

    def step(self, batch: unroll.Batch) -> dict[str, jax.Array]:
        """Takes one step and waits for it; returns its metrics."""
        self.state, outcome = self._step(self.state, batch, self.target)
        return jax.block_until_ready((self.state, outcome))[1]


def _whole_step(state, batch, target, *, cfg, objective, optimizer):
    """The pieces of a step in a row, as one program."""
    given, how = (state.params, batch, target), {"cfg": cfg, "objective": objective}
    under_way = step_lib.begin(*given, **how)
    size = batch.bases.shape[1]
    under_way = step_lib.add(under_way, *given, 0, size=size, **how)
    grads = step_lib.close(under_way.grads, under_way.seen_grads, *given, cfg=cfg)
    return step_lib.update(
        state, grads, under_way.sums, batch, objective=objective, optimizer=optimizer
    )
