"""What a process needs to train the drafter: its texts, their order, the learner."""

import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from tlt_jax.models.drafters import drafter
from tlt_jax.rl.adaptation import learner as drafter_learner
from tlt_jax.settings import speculation
from tlt_jax.specdec import chain, sampling
from tlt_jax.specdec.texts import buffer as text_buffer
from tlt_jax.specdec.texts import layout, vocabulary
from tlt_jax.specdec.texts import sampling as text_sampling
from tlt_jax.specdec.training import objectives

_BETAS, _CLIP_NORM = (0.9, 0.95), 1.0
_RATE_RANDOM, _RATE_TRAINED = 1e-3, 1e-4
# Levels of which acceptance is measured on fresh texts.
_DEPTH = 4
_MIB = 1 << 20
# What a text buffer writes to disk, below the directory.
SPILL = "spilled_texts"


def _optimizer(
    settings: speculation.Adaptation, *, is_trained: bool
) -> optax.GradientTransformation:
    """Make AdamW whose rate rises to a constant."""
    rate = settings.learning_rate or (_RATE_TRAINED if is_trained else _RATE_RANDOM)
    # The first step, too, shall have some effect.
    start = rate / (settings.warmup_steps + 1)
    schedule = optax.linear_schedule(start, rate, settings.warmup_steps)
    return optax.chain(
        _clip(_CLIP_NORM),
        optax.adamw(schedule, *_BETAS, weight_decay=0.0),
    )


def _clip(most: float) -> optax.GradientTransformation:
    """Scale gradients down to a norm.

    Optax divides and multiplies where the norm is larger and selects: as no number that
    enters the moments can then be made of the gradient alone, compilers keep a scaled
    copy of it, which is written once and read three times.
    """

    def clip(grads, params):
        del params
        scale = most / jnp.maximum(optax.tree.norm(grads), most)
        return jax.tree.map(lambda grad: grad * scale, grads)

    return optax.stateless(clip)


def _sizes(settings: speculation.Adaptation) -> dict[str, int]:
    """Sizes of a training step's batch."""
    return {
        "row_tokens": settings.row_tokens,
        "row_bases": settings.row_bases,
        "num_rows": settings.num_rows,
    }


def learner_of(
    settings: speculation.Adaptation,
    cfg: drafter.DrafterConfig,
    *,
    precision: str,
    is_trained: bool,
) -> drafter_learner.DrafterLearner:
    """Make what a run trains its drafter with, as yet without weights.

    `precision` is that of activations and of what the texts keep. A drafter that
    `is_trained` already learns at a lower rate, unless the settings name one.
    """
    return drafter_learner.DrafterLearner(
        cfg,
        objectives.choose(settings.name, settings.overrides(), cfg.block_size),
        _optimizer(settings, is_trained=is_trained),
        batch=layout.described(
            **_sizes(settings),
            d_model=cfg.layer.d_model,
            num_features=len(cfg.feature_layers),
            dtype=precision,
        ),
        head_chunk=min(settings.head_chunk, settings.row_bases),
        piece_bases=settings.piece_bases,
        depth=min(_DEPTH, cfg.block_size or _DEPTH),
        dtype=precision,
    )


class Training:
    """Texts, the line of batches out of them, and the drafter that learns.

    Attributes:
      settings, cfg: of the training, and the drafter.
      precision, seed: of activations and engines' copies; of weights and of the order
        of texts.
      buffer, sampler: texts and batches.
      learner: the drafter; without weights at first.
      measures: what drafts would have had accepted can be read off the texts.
      is_counted: trainings between rollout and update are as long as was counted.
    """

    def __init__(
        self,
        settings: speculation.Adaptation,
        cfg: drafter.DrafterConfig,
        *,
        is_trained: bool,
        eos_ids: Sequence[int],
        sampling_cfg: sampling.SamplingConfig,
        precision: str,
        seed: int,
        directory: pathlib.Path,
        rule: str,
        note: Callable[[str], None],
    ):
        """Begin without texts and without weights.

        Args:
          settings, cfg: of the training; the drafter.
          is_trained: it does not begin with random weights.
          eos_ids: always among the tokens that can be proposed.
          sampling_cfg: the law of the rollouts.
          precision: of activations, and of the engines' copies.
          seed: of weights and of the order of texts.
          directory: for what memory does not hold.
          rule: by which drafts are accepted. Where tokens hang on the drafter, counted
            trainings (`settings.max_steps`) are that long whatever time they take and
            whatever they are worth: no clock has a say.
          note: told where texts cannot be written to the directory.
        """
        self.settings, self.cfg, self._eos_ids = settings, cfg, tuple(eos_ids)
        self.precision, self.seed, self._note = precision, seed, note
        self._directory = directory
        self.learner = learner_of(
            settings, cfg, precision=precision, is_trained=is_trained
        )
        # What drafts would have had accepted can be read off texts of this law alone,
        # and by their own noise, which chain rules do not draw them by.
        is_plain = sampling_cfg == sampling.SamplingConfig()
        self.measures = rule == chain.KEYED and is_plain
        self.is_counted = rule != chain.KEYED and settings.counts_steps
        self.buffer, self.sampler = self._without_texts()

    def forget(self) -> None:
        """Drop all texts."""
        self.buffer.close()
        self.buffer, self.sampler = self._without_texts()

    def choose_vocabulary(self) -> bool:
        """Choose the tokens that can be proposed once texts tell; true: it is done."""
        if self.learner.has_vocabulary:
            return True
        view = self.buffer.view()
        if texts := [view.read(i) for i in range(len(view))]:
            counts = vocabulary.drawn(texts, self.learner.cfg.layer.vocab_size)
            self.learner.choose_vocabulary(counts, self._eos_ids)
        return self.learner.has_vocabulary

    def close(self) -> None:
        """End what compiles and what writes."""
        self.learner.pool.close()
        self.buffer.close()

    def _without_texts(self) -> tuple[text_buffer.TextBuffer, text_sampling.Sampler]:
        settings = self.settings
        buffer = text_buffer.TextBuffer(
            settings.buffer_mb * _MIB,
            self.precision,
            max_age=settings.max_age,
            spill_directory=self._directory / SPILL if settings.spill_mb else None,
            max_spill_bytes=settings.spill_mb * _MIB,
            on_spill_error=lambda e: self._note(f"{e} Texts stay in memory."),
        )
        return buffer, text_sampling.Sampler(
            buffer,
            seed=self.seed,
            previous_frac=settings.previous_frac,
            **_sizes(settings),
        )
