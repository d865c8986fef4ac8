"""A policy ready to be asked: weights, tokenizer and engine of a model or of a run."""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from tlt_jax import assembly
from tlt_jax import speculation as speculation_lib
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models.formats import source
from tlt_jax.models.formats import tokenizer as model_tokenizer
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.workdir import checkpoint, metrics

_TOKENIZER = "tokenizer"
# The workdir of a run has one of these.
_RUN_MARKS = (checkpoint.DIRECTORY, metrics.FILE, _TOKENIZER)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model that can be asked.

    Attributes:
      config: the architecture.
      params: on the first device, layers as a tuple, of the type of `precision`.
      tokenizer: the model's own.
      identity: which weights these are, for people to read.
      precision: of weights, activations and cache: `float32` or `bfloat16`.
      files: that all this was read from; of a run's checkpoint the file that has
        the checksums of the rest.
    """

    config: model_config.ModelConfig
    params: model_params.Params
    tokenizer: model_tokenizer.Tokenizer
    identity: str
    precision: str
    files: tuple[pathlib.Path, ...] = ()

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a completion: the model's and the tokenizer's."""
        return assembly.eos_ids_of(self.config, self.tokenizer)

    def engine(
        self,
        *,
        max_rows: int,
        max_length: int,
        speculation: speculation_lib.Speculation = speculation_lib.PLAIN,
        **settings: Any,
    ) -> engine_lib.Engine:
        """Make an engine that has the weights; it compiles what it needs when it does.

        `max_length` is of the longest text in tokens, prompt and completion; `settings`
        are further ones of `engine_programs.EngineConfig`.
        """
        # On TPUs the attention kernel takes pages of a whole tile.
        page_size = 128 if jax.default_backend() == "tpu" else 64
        sizes = dict(dtype=self.precision, page_size=page_size) | settings
        engine = assembly.engine_of(
            self.config,
            self.tokenizer,
            speculation,
            max_rows=max_rows,
            max_length=max_length,
            **sizes,
        )
        engine.set_params(self.params, version=0)
        if speculation.params is not None:
            engine.set_drafter(speculation.params, version=0)
        return engine


def load(spec: str, precision: str = "float32") -> Policy:
    """Load the policy that `spec` names, in `float32` or `bfloat16`.

    It names what `models.formats.source.resolve` takes, or the workdir of a run, whose
    newest checkpoint is read.

    Raises:
      ValueError: nothing of that name can be had, or it is not computed here.
      CheckpointError: the run has no complete checkpoint, or it is damaged.
    """
    dtype, directory = jnp.dtype(precision), os.path.expanduser(spec)
    if any(os.path.exists(os.path.join(directory, name)) for name in _RUN_MARKS):
        params, cfg, step = checkpoint.restore_policy(directory)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        tokenizer = model_tokenizer.from_directory(os.path.join(directory, _TOKENIZER))
        identity = f"{spec}, step {step}"
        files = [checkpoint.checksums_path(directory, step)]
        files += sorted(pathlib.Path(directory, _TOKENIZER).glob("*"))
    else:
        found = source.resolve(spec)
        files = [pathlib.Path(path) for path in found.files()]
        params, cfg, tokenizer = found.load(dtype), found.config, found.tokenizer()
        identity = spec
    params = model_params.unstack(params)
    return Policy(cfg, params, tokenizer, identity, precision, tuple(files))
