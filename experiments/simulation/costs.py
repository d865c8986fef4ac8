"""What the parts of a step take, from measured seconds or from a machine's figures.

Seconds are of one worker; tokens of one row unless said otherwise. Both kinds of costs
tell the same: `step_s`, `prefill_s`, `fill_s`, and the constants `finished_s`,
`measured_s`, `drafter_s`, `start_s`, `sync_s` that `TableCosts` explains.
"""

import dataclasses
from collections.abc import Mapping

from tlt_jax.specdec import strategy as strategy_lib

Strategy = strategy_lib.Strategy
Kind = tuple[int, Strategy | None]


@dataclasses.dataclass(frozen=True)
class TableCosts:
    """Measured seconds.

    Attributes:
      steps: seconds of a decode step by batch bucket and strategy.
      prefill_token_s, fill_token_s: of a token.
      finished_s: of a finished response.
      measured_s: in which an RL step's first training examines the drafter.
      drafter_s: of a training step, to which each worker brings rows of its own.
      start_s: from the order to train to the first step.
      sync_s: to give a trained drafter to the engines.
    """

    steps: Mapping[Kind, float]
    prefill_token_s: float = 0.0
    fill_token_s: float = 0.0
    finished_s: float = 0.0
    measured_s: float = 0.0
    drafter_s: float = 0.0
    start_s: float = 0.0
    sync_s: float = 0.0

    def step_s(self, bucket: int, strategy: Strategy | None, context: float) -> float:
        """Returns seconds of a decode step of `bucket` rows; None: a plain one.

        `context` are cached tokens of all rows together; they do not count here.

        Raises:
          ValueError: it was not measured.
        """
        del context
        try:
            return self.steps[bucket, strategy]
        except KeyError:
            known = ", ".join(f"{b}:{s or 'plain'}" for b, s in self.steps)
            raise ValueError(
                f"bucket {bucket} with {strategy or 'plain decoding'} has no measured "
                f"seconds; there are {known}: measure it, or leave it out."
            ) from None

    def prefill_s(self, num_tokens: int) -> float:
        """Returns seconds to cache prompt tokens."""
        return self.prefill_token_s * num_tokens

    def fill_s(self, num_tokens: int) -> float:
        """Returns seconds to fill the drafter's cache."""
        return self.fill_token_s * num_tokens

    def times(self, factor: float) -> "TableCosts":
        """Returns them of a machine that takes so many times as long for everything."""
        others = {name: factor * s for name, s in vars(self).items() if name != "steps"}
        steps = {kind: factor * value for kind, value in self.steps.items()}
        return TableCosts(steps, **others)


@dataclasses.dataclass(frozen=True)
class Device:
    """Published bytes and dense bf16 operations per second of an accelerator."""

    bandwidth: float
    flops: float
    memory_bytes: float


# Vendors' data sheets, dense bf16.
DEVICES = {
    "a100": Device(2.039e12, 312e12, 80e9),
    "h100": Device(3.35e12, 989e12, 80e9),
    "h200": Device(4.8e12, 989e12, 141e9),
    "b200": Device(8.0e12, 2250e12, 192e9),
    "v5e": Device(8.19e11, 197e12, 16e9),
    "v5p": Device(2.765e12, 459e12, 95e9),
}


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Experts of a target whose tokens pass a few of them each.

    Attributes:
      num, per_token: experts of a layer, and those that a token passes.
      params: weights of all experts of all layers.
      d_ff: of the dense block that a drafter has in their place.
    """

    num: int
    per_token: int
    params: float
    d_ff: int

    def touched_frac(self, num_tokens: float) -> float:
        """Returns the part of the experts that some token passes, routes being even."""
        return 1 - (1 - self.per_token / self.num) ** num_tokens


@dataclasses.dataclass(frozen=True)
class Model:
    """A target's sizes, as its configuration says; `mixture` is None of dense ones."""

    num_params: float
    num_layers: int
    d_model: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    mixture: Mixture | None = None

    def read_params(self, num_tokens: float) -> float:
        """Returns weights that a forward over so many tokens reads."""
        if self.mixture is None:
            return self.num_params
        untouched = 1 - self.mixture.touched_frac(num_tokens)
        return self.num_params - untouched * self.mixture.params

    @property
    def active_params(self) -> float:
        """Weights that one token is multiplied by."""
        return self.read_params(1)

    @property
    def kv_bytes(self) -> int:
        """Bytes of a cached token, bf16."""
        return 4 * self.num_layers * self.kv_heads * self.head_dim

    @property
    def drafter_params(self) -> float:
        """One layer, the fusing product, and the target's head that it reads."""
        dense = self.num_params - (self.mixture.params if self.mixture else 0)
        layer = (dense - 2 * self.vocab_size * self.d_model) / self.num_layers
        if self.mixture:
            layer += 3 * self.d_model * self.mixture.d_ff
        return max(layer, 0) + 2 * self.d_model**2 + self.vocab_size * self.d_model


# The models' published configurations.
MODELS = {
    "qwen2.5-1.5b": Model(1.54e9, 28, 1536, 2, 128, 151936),
    "qwen2.5-3b": Model(3.09e9, 36, 2048, 2, 128, 151936),
    "qwen2.5-7b": Model(7.62e9, 28, 3584, 4, 128, 152064),
    "ds-r1-distill-qwen-7b": Model(7.62e9, 28, 3584, 4, 128, 152064),
    "qwen2.5-32b": Model(32.8e9, 64, 5120, 8, 128, 152064),
    "llama-3.3-70b": Model(70.6e9, 80, 8192, 8, 128, 128256),
    "qwen3-30b-a3b": Model(
        *(30.5e9, 48, 2048, 4, 128, 151936),
        Mixture(128, 8, params=48 * 128 * 3 * 2048 * 768, d_ff=6144),
    ),
}


@dataclasses.dataclass(frozen=True)
class RooflineCosts:
    """Seconds of a worker of `tensor` devices, from bandwidth and operations.

    A forward over n tokens takes the larger of reading weights (of a mixture those that
    n tokens touch) and cache and of computing, and `layer_s` of each layer for launches
    and collectives. A step of a strategy costs a forward over the nodes that it
    verifies, those of its budget where rows share, and per level
    drafted a forward of the drafter, which has one layer and the target's head;
    `level_s` comes on top.
    `bandwidth_frac` and `flops_frac` of the published figures are reached, when
    training `training_flops_frac`. A member of a drafter step has `drafter_rows` of
    `row_tokens`.
    """

    device: Device
    model: Model
    tensor: int
    bandwidth_frac: float = 0.75
    flops_frac: float = 0.5
    layer_s: float = 2e-5
    level_s: float = 2e-4
    training_flops_frac: float = 0.35
    drafter_rows: int = 4
    row_tokens: int = 8192

    # Features leave the device beside the next step.
    finished_s = 0.0
    # What a compiled program's first batch waits for.
    start_s = 0.5

    def _forward_s(
        self,
        params: float,
        layers: int,
        tokens: float,
        cache_bytes: float,
        active_params: float | None = None,
    ) -> float:
        active = params if active_params is None else active_params
        reading = (2 * params + cache_bytes) / (
            self.device.bandwidth * self.bandwidth_frac
        )
        computing = 2 * active * tokens / (self.device.flops * self.flops_frac)
        return max(reading, computing) / self.tensor + layers * self.layer_s

    def _target_s(self, tokens: float, cache_bytes: float) -> float:
        model = self.model
        return self._forward_s(
            model.read_params(tokens),
            model.num_layers,
            tokens,
            cache_bytes,
            model.active_params,
        )

    def step_s(self, bucket: int, strategy: Strategy | None, context: float) -> float:
        """Returns seconds of a decode step."""
        columns = strategy.num_columns(bucket) if strategy else bucket
        model = self.model
        total = self._target_s(columns, context * model.kv_bytes)
        if strategy is not None and strategy.drafts:
            level = self._forward_s(
                model.drafter_params,
                1,
                bucket * strategy.topk,
                context * model.kv_bytes / model.num_layers,
            )
            total += strategy.draft_depth * (level + self.level_s)
        return total

    def prefill_s(self, num_tokens: int) -> float:
        """Returns seconds to cache prompt tokens."""
        return self._target_s(num_tokens, 0.0)

    def fill_s(self, num_tokens: int) -> float:
        """Returns seconds to take positions into the drafter's cache."""
        return self._forward_s(self.model.drafter_params, 1, num_tokens, 0.0)

    @property
    def measured_s(self) -> float:
        """Seconds of a forward over a drafter step's batch."""
        return self.drafter_s / 3

    @property
    def drafter_s(self) -> float:
        """Seconds of a drafter's step."""
        tokens = self.drafter_rows * self.row_tokens
        operations = 6 * self.model.drafter_params * tokens
        speed = self.tensor * self.device.flops * self.training_flops_frac
        return operations / speed + 6 * self.layer_s

    @property
    def sync_s(self) -> float:
        """Seconds to broadcast the drafter's weights at 50 GB/s."""
        return 2 * self.model.drafter_params / 50e9

    def send_s(self, bytes_per_s: float) -> float:
        """Returns seconds to bring bf16 weights to workers of their own, round a ring.

        Every process passes them on as they come: it is the same for any number.
        """
        return 2 * self.model.num_params / bytes_per_s

    def update_s(
        self, num_tokens: float, num_devices: int, *, passes: float, exchange_s: float
    ) -> float:
        """Returns seconds of inference or training, `exchange_s` of them constant.

        Of all tokens of a step, prompts included, on all devices of the cluster.
        `passes`: forwards' worth of operations, 1 for a forward, 3 with its gradient.
        """
        operations = 2 * passes * self.model.active_params * num_tokens
        speed = num_devices * self.device.flops * self.training_flops_frac
        return operations / speed + exchange_s


Costs = TableCosts | RooflineCosts
