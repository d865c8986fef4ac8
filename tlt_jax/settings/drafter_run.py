"""Every setting of a drafter's offline training: meaning, unit, range, default."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

if typing.TYPE_CHECKING:
    import ml_collections

from tlt_jax.settings import schema, sections, speculation


@dataclasses.dataclass(frozen=True)
class Texts:
    """What the target writes for the drafter to learn from.

    Attributes:
      tasks: where prompts come from, in turns: names of `tlt_jax.rl.tasks.build`, of
        reasoning-gym's with a style and numbers (`products:cot,max_digits=1`); `chat`,
        requests without a right answer; `everyday`, more of them and problems to be
        worked in steps. Required.
      num: texts to train on, at a time.
      round_steps: steps after which `num` others are written; 0: the texts stay.
      kept_rounds: so many times `num` texts, the newest ones, are trained on and on
        disk; older ones are deleted.
      num_held_out: texts of held-out prompts to measure on.
      seed: fixes which prompts are asked.
      template_options: settings of the target's chat template, as those of
        `task.template_options`, which the drafter is to serve.
      max_prompt_tokens: longer prompts are left out.
      max_new_tokens: longest response.
      max_batch: rows decoded at once.
      steps_per_call: decode steps per jitted call.
      page_size: tokens per page of the target's cache.
      dtype: type that features are kept in.
    """

    tasks: tuple[str, ...] = schema.names()
    num: int = schema.number(1024, 1, 10**8)
    round_steps: int = schema.number(0, 0, 10**9)
    kept_rounds: int = schema.number(1, 1, 10**6)
    num_held_out: int = schema.number(64, 1, 10**6)
    seed: int = schema.number(0, 0, 10**18)
    template_options: schema.Options = ()
    max_prompt_tokens: int = schema.number(256, 1, 10**7)
    max_new_tokens: int = schema.number(256, 1, 10**7)
    max_batch: int = schema.number(32, 1, 2**16)
    steps_per_call: int = schema.number(32, 1, 10**6)
    page_size: int = schema.number(64, 1, 2**16)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of a step, each filled with whole texts.

    Attributes:
      num_rows: rows of a step.
      row_tokens: columns of a row; of longer texts the end is left out.
      row_bases: positions of a row that are drafted from; of a text with more, a random
        run of them is.
      head_chunk: bases whose logits are held at once.
      remat: compute activations again in the backward pass.
    """

    num_rows: int = schema.number(4, 1, 10**6)
    row_tokens: int = schema.number(512, 3, 10**8)
    row_bases: int = schema.number(384, 1, 10**7)
    head_chunk: int = schema.number(256, 1, 10**7)
    remat: bool = False


@dataclasses.dataclass(frozen=True)
class Eval:
    """Measuring on the held-out texts.

    Attributes:
      every: steps between measurements; 0: only before the first and after the last.
      depth: levels drafted, of a `drafter.block_size` at most as many.
    """

    every: int = schema.number(0, 0, 10**9)
    depth: int = schema.number(8, 1, 256)


@dataclasses.dataclass(frozen=True)
class Log:
    """What is shown.

    Attributes:
      every: steps between rows of metrics.jsonl.
      progress: `auto` (live on a terminal, else lines), `plain` or `off`.
    """

    every: int = schema.number(10, 1, 10**9)
    progress: Literal["auto", "plain", "off"] = "auto"


@dataclasses.dataclass(frozen=True)
class DrafterRun:
    """One offline training of a drafter; see the sections' own classes.

    Attributes:
      seed: fixes noise, weights and order.
      num_steps: optimizer steps.
      average: decay a step of the weights' moving average, which is measured and
        written in their place; 0: none.
      precision: type of activations and products; the drafter's weights are float32.
      model: the target.
    """

    seed: int = schema.number(0, 0, 10**18)
    num_steps: int = schema.number(1000, 1, 10**9)
    average: float = schema.number(0.0, 0.0, 0.99999)
    precision: Literal["float32", "bfloat16"] = "float32"
    model: sections.Model = sections.Model()
    pretrain: sections.Pretrain = sections.Pretrain()
    texts: Texts = Texts()
    drafter: speculation.DrafterShape = speculation.DrafterShape()
    objective: speculation.Objective = speculation.Objective()
    optimizer: sections.Optimizer = sections.Optimizer()
    batch: Batch = Batch()
    eval: Eval = Eval()
    checkpoint: sections.Checkpoint = sections.Checkpoint()
    log: Log = Log()

    def __post_init__(self):
        schema.check_fields(self)
        if not self.model.spec:
            raise schema.ConfigError("model.spec is empty: set it in the recipe.")
        if not self.texts.tasks:
            raise schema.ConfigError(
                "texts.tasks is empty: name at least one source of prompts."
            )
        speculation.check_shape(self.drafter)


def default() -> "ml_collections.ConfigDict":
    """Return a new locked ConfigDict with every key at its default.

    `model.spec` and `texts.tasks` are empty: a recipe must set them.
    """
    made = schema.to_config_dict(DrafterRun)
    made.lock()
    made.texts.template_options.unlock()
    return made


def load(values: Mapping[str, Any]) -> DrafterRun:
    """Check plain nested values and freeze them.

    Raises:
      schema.ConfigError: a key is unknown or a value cannot be used.
    """
    return schema.build(DrafterRun, values)
