"""From completions and rewards to advantages, minibatches and records of a step."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from tlt_jax import types
from tlt_jax.models import config as model_config
from tlt_jax.rl.tasks import prompts
from tlt_jax.rl.update import advantages, algorithms, losses, packing, policy_gradient


@dataclasses.dataclass(frozen=True)
class Experience:
    """Finished groups, in order of their requests; n = P x R completions.

    Attributes:
      prompts: P prompts.
      completions: n, the group's R next to each other.
      rewards: `[P, R] float64`, as judged.
    """

    prompts: Sequence[prompts.Prompt]
    completions: Sequence[types.Completion]
    rewards: np.ndarray

    @property
    def group_size(self) -> int:
        """R."""
        return self.rewards.shape[1]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every completion, `[n]`."""
        return np.array([len(c.tokens) for c in self.completions])

    @property
    def logprobs(self) -> list[np.ndarray]:
        """Log-probabilities that the rollout recorded, n arrays."""
        return [c.logprobs for c in self.completions]

    @property
    def routes(self) -> list[np.ndarray] | None:
        """Experts that the rollout's tokens passed, n arrays, if it recorded them."""
        every = [c.routes for c in self.completions]
        return None if any(routes is None for routes in every) else every

    def groups(self) -> list[packing.Group]:
        """The groups as trees to be packed."""
        size = self.group_size
        return [
            packing.Group(
                prompt.tokens,
                tuple(c.tokens for c in self.completions[i * size : (i + 1) * size]),
            )
            for i, prompt in enumerate(self.prompts)
        ]

    def select(self, chosen: Sequence[int]) -> "Experience":
        """Keep the groups with the indices `chosen`."""
        size = self.group_size
        return Experience(
            [self.prompts[i] for i in chosen],
            [c for i in chosen for c in self.completions[i * size : (i + 1) * size]],
            self.rewards[list(chosen)],
        )

    def places_of(self, chosen: "Experience") -> list[int]:
        """Return the indices of groups that were `select`ed of these."""
        size = self.group_size
        firsts = [c.request_id for c in self.completions[::size]]
        return [firsts.index(c.request_id) for c in chosen.completions[::size]]

    def with_logprobs(self, logprobs: Sequence[np.ndarray]) -> "Experience":
        """Replace the recorded log-probabilities, n arrays."""
        pairs = zip(self.completions, logprobs, strict=True)
        changed = [dataclasses.replace(c, logprobs=own) for c, own in pairs]
        return dataclasses.replace(self, completions=changed)

    def with_logprobs_of(self, chosen: "Experience") -> "Experience":
        """Replace those of the groups that were `select`ed by what they have there."""
        own = {c.request_id: c.logprobs for c in chosen.completions}
        given = [own.get(c.request_id, c.logprobs) for c in self.completions]
        return self.with_logprobs(given)

    def join(self, other: "Experience") -> "Experience":
        """Append another batch's groups."""
        return Experience(
            [*self.prompts, *other.prompts],
            [*self.completions, *other.completions],
            np.concatenate([self.rewards, other.rewards]),
        )


def filling(
    width: int,
    num_prompts: int,
    group_size: int,
    model: model_config.ModelConfig | None = None,
) -> Experience:
    """Make up a batch that packs into rows of a width, to prepare programs with.

    It has a first completion that fills the row, which is at least 2 wide, and others
    without tokens; P and R are those of the batches to come. Of a `model` with experts
    completions have routes.
    """

    def completion(number, length):
        zeros = np.zeros(length)
        return types.Completion(
            number,
            zeros.astype(np.int32),
            zeros.astype(np.float32),
            "length",
            routes=no_routes(model, length),
        )

    num = num_prompts * group_size
    return Experience(
        [prompts.Prompt(i, None, np.zeros(1, np.int32)) for i in range(num_prompts)],
        [completion(i, 0 if i else width - 1) for i in range(num)],
        np.zeros((num_prompts, group_size)),
    )


def no_routes(model: model_config.ModelConfig | None, count: int) -> np.ndarray | None:
    """Make up a completion's routes, see `types.Completion`; of dense blocks None."""
    if model is None or model.experts is None:
        return None
    shape = count, model.num_layers, model.experts.per_token
    return np.zeros(shape, model.experts.route_dtype)


def advantages_of(
    batch: Experience,
    algorithm: algorithms.Algorithm,
    max_new_tokens: int,
    ref_logprobs: Sequence[np.ndarray] | None,
) -> np.ndarray:
    """Shape the rewards as the algorithm says and estimate advantages, `[n] float32`.

    `max_new_tokens` is the length limit, for overlong shaping; `ref_logprobs` are n
    arrays, needed where the KL term is part of the reward.
    """
    shaped = batch.rewards.reshape(-1).astype(np.float64)
    if algorithm.overlong_shaping:
        shaped = shaped + advantages.overlong_shaping(
            batch.lengths,
            max_length=max_new_tokens,
            buffer=max(1, round(algorithm.overlong_buffer_frac * max_new_tokens)),
            penalty=algorithm.overlong_penalty,
        )
    if algorithm.loss.kl_placement == "reward" and ref_logprobs is not None:
        shaped = losses.kl_as_reward(
            shaped, batch.logprobs, ref_logprobs, cfg=algorithm.loss
        )
    shaped = shaped.reshape(batch.rewards.shape)
    estimated = advantages.estimate(algorithm.advantage, shaped)
    return estimated.reshape(-1).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How batches are packed.

    Rows are as wide as one of `widths`, which with the number of completions decides
    all shapes: the few programs can be compiled before they are needed.

    Attributes:
      row_tokens: longest row.
      rows_per_micro_batch: rows whose activations are held at once.
      most_sequences: see `packing.pack`.
    """

    row_tokens: int
    rows_per_micro_batch: int
    most_sequences: int | None = None

    @property
    def widths(self) -> list[int]:
        """T of all rows there can be: quarters of a row, the widest first."""
        quarters = range(self._quarter, self.row_tokens, self._quarter)
        return [self.row_tokens, *reversed(quarters)]

    @property
    def _quarter(self) -> int:
        return max(-(-self.row_tokens // 4), 1)

    def pack(self, batch: Experience) -> list[packing.Packed]:
        """Pack a batch into micro-batches of equal shape."""
        packed = packing.pack(
            batch.groups(),
            row_tokens=self.row_tokens,
            rows_multiple=self.rows_per_micro_batch,
            rounding=self._quarter,
            uniform=True,
            most_sequences=self.most_sequences,
        )
        return packing.split(packed, self.rows_per_micro_batch)


def micro_batches(
    batch: Experience,
    layout: Layout,
    algorithm: algorithms.Algorithm,
    advantages_n: np.ndarray,
    *,
    max_new_tokens: int,
    old_logprobs: Sequence[np.ndarray] | None,
    ref_logprobs: Sequence[np.ndarray] | None,
    num_experts: int = 0,
) -> tuple[list[packing.Packed], list[policy_gradient.MicroBatch]]:
    """Lay one optimizer step's batch out for the learner.

    `advantages_n` are `[n] float32`; the length limit is for the `constant`
    aggregation; log-probabilities are n arrays or None, see `losses.TokenColumns`. Of a
    model with experts their number is needed.

    Returns:
      The packed parts, and for each what the learner reads.
    """
    parts = layout.pack(batch)
    weights = losses.token_weights(
        batch.lengths, algorithm.aggregation, max_length=max_new_tokens
    )
    capped = algorithm.loss.importance_cap is not None
    num_tokens = sum(int(np.sum(part.segment >= 0)) for part in parts)
    return parts, [
        policy_gradient.micro_batch(
            part,
            advantages=advantages_n,
            weights=weights,
            old_logprobs=old_logprobs,
            rollout_logprobs=batch.logprobs if capped else None,
            ref_logprobs=ref_logprobs,
            routes=batch.routes,
            num_experts=num_experts,
            num_tokens=num_tokens,
        )
        for part in parts
    ]


def max_mismatch(batch: Experience, trainer_logprobs: Sequence[np.ndarray]) -> float:
    """Largest absolute difference, in nats, of rollout's and trainer's logprobs.

    The latter are of each of the batch's completions, by the weights that rolled out.
    """
    gaps = [
        np.abs(own - mine)
        for own, mine in zip(trainer_logprobs, batch.logprobs, strict=True)
    ]
    # NumPy's maximum of what is not a number is not a number; Python's may hide it.
    return float(np.max(np.concatenate(gaps), initial=0.0))


def tokens_digest(completions: Sequence[types.Completion]) -> str:
    """Hash all completion token ids, in order, as little-endian 32-bit integers."""
    digest = hashlib.sha256()
    for completion in completions:
        digest.update(np.asarray(completion.tokens, "<i4").tobytes())
    return digest.hexdigest()


def reward_and_length_row(
    rewards: np.ndarray, completions: Sequence[types.Completion]
) -> dict[str, Any]:
    """Record `[P, R]` rewards and the lengths of all P x R completions of a step."""
    lengths = np.array([len(c.tokens) for c in completions])
    cut = [c.finish_reason == "length" for c in completions]
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/zero_std_frac": float(np.mean(~advantages.carries_signal(rewards))),
        "length/mean": float(lengths.mean()),
        "length/p50": float(np.percentile(lengths, 50)),
        "length/p95": float(np.percentile(lengths, 95)),
        "length/max": int(lengths.max()),
        "length/clipped_frac": float(np.mean(cut)),
        "rollout/tokens": int(lengths.sum()),
        "rollout/tokens_digest": tokens_digest(completions),
    }
