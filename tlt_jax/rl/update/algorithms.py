"""Named presets of the policy-gradient algorithms."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tlt_jax.rl.update import losses
from tlt_jax.settings import schema, sections


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """One algorithm: what the host computes before the loss, and the loss.

    Attributes:
      advantage: estimator in `advantages`.
      aggregation: how `losses.token_weights` turns tokens into one number.
      dynamic_sampling: sample on until every group of the batch carries signal.
      overlong_shaping: subtract `advantages.overlong_shaping` from rewards.
      overlong_buffer_frac: width of its ramp as a fraction of the length limit.
      overlong_penalty: its full penalty, in units of reward.
      loss: the surrogate's own settings.
    """

    advantage: str
    aggregation: losses.Aggregation
    dynamic_sampling: bool
    overlong_shaping: bool
    overlong_buffer_frac: float
    overlong_penalty: float
    loss: losses.LossConfig

    def __post_init__(self):
        schema.check_like(sections.Algorithm, self)


def preset(name: str) -> dict[str, Any]:
    """Gives the settings of a published algorithm, to be overridden one by one.

    Args:
      name: `grpo`, `dr_grpo`, `dapo`, `rloo`, `reinforce_pp_baseline` or `gspo`.

    Returns:
      A new flat dict: every field of `losses.LossConfig` and every field of `Algorithm`
      but `loss`. `build` turns it into an `Algorithm`.
    """
    return _PRESETS["grpo"] | _PRESETS[name]


def build(settings: Mapping[str, Any]) -> Algorithm:
    """Makes the frozen algorithm from what `preset` returns, with values overridden.

    Raises:
      ValueError: a setting is out of range.
    """
    loss = {f.name: settings[f.name] for f in dataclasses.fields(losses.LossConfig)}
    host = {key: value for key, value in settings.items() if key not in loss}
    return Algorithm(loss=losses.LossConfig(**loss), **host)


# Where the weights that rolled out are older than those that learn, unless settings say
# otherwise: the decoupled objective, ratios clipped around the policy before the update
# and weighted by its ratio to the one that rolled out. Reference: Hilton et al., "Batch
# size-invariance for policy optimization", section 3; Fu et al., "AReaL: A Large-Scale
# Asynchronous Reinforcement Learning System for Language Reasoning", section 5.2.
LAGGING = {"importance_cap": 2.0}

# What an algorithm does not say is as in GRPO.
_PRESETS: dict[str, dict[str, Any]] = {
    # Group relative policy optimization: standardized group rewards, symmetric clipping
    # at 0.2, the mean over sequences of token means, low-variance KL to the reference
    # in the loss. Reference: Shao et al., "DeepSeekMath: Pushing the Limits of
    # Mathematical Reasoning in Open Language Models", section 4.1 (its section 4.2 uses
    # a KL coefficient of 0.04). The coefficient 0.001 here is the one of later
    # reasoning runs: DeepSeek-AI, "DeepSeek-R1", and TLT, "Taming the Long-Tail",
    # evaluation setup.
    "grpo": {
        "advantage": "grpo",
        "aggregation": "sequence_mean",
        "dynamic_sampling": False,
        "overlong_shaping": False,
        "overlong_buffer_frac": 0.2,
        "overlong_penalty": 1.0,
        "surrogate": "clipped",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": None,
        "ratio_level": "token",
        "kl_coef": 0.001,
        "kl_estimator": "k3",
        "kl_placement": "loss",
        "importance_cap": None,
        "entropy_coef": 0.0,
    },
    # GRPO done right: no division by the deviation nor by the response's length.
    # Reference: Liu et al., "Understanding R1-Zero-Like Training: A Critical
    # Perspective", section 3.2; no KL term, as in its experiments.
    "dr_grpo": {"advantage": "dr_grpo", "aggregation": "constant", "kl_coef": 0.0},
    # Decoupled clip and dynamic sampling policy optimization: clip-higher 0.2/0.28
    # (section 3.1), dynamic sampling (3.2), token mean (3.3), overlong shaping over the
    # last fifth of the limit (3.4: 4096 of 20480 tokens), no KL (2.3). Reference: Yu et
    # al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", sections
    # 2.3, 3.1 to 3.4 and 4.1.
    "dapo": {
        "aggregation": "token_mean",
        "dynamic_sampling": True,
        "overlong_shaping": True,
        "clip_high": 0.28,
        "kl_coef": 0.0,
    },
    # REINFORCE leave-one-out: a response is one action, KL is part of its reward. Token
    # terms are summed, not averaged, within a sequence (`constant`). The paper has no
    # clipping; with one update per rollout the ratio is 1 and the clip never acts. The
    # KL coefficient is GRPO's; the paper tunes it per task. Reference: Ahmadian et al.,
    # "Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human
    # Feedback in LLMs", section 3.
    "rloo": {
        "advantage": "rloo",
        "aggregation": "constant",
        "kl_estimator": "k1",
        "kl_placement": "reward",
    },
    # REINFORCE++ with baseline: group mean subtracted, whitened over the batch. The KL
    # coefficient is GRPO's. Reference: Hu et al., "REINFORCE++: Stabilizing Critic-Free
    # Policy Optimization with Global Advantage Normalization", the variant with
    # baseline, whose KL is a separate loss with the k2 estimator.
    "reinforce_pp_baseline": {
        "advantage": "reinforce_pp_baseline",
        "aggregation": "token_mean",
        "kl_estimator": "k2",
    },
    # Group sequence policy optimization: one length-normalized ratio per sequence.
    # Reference: Zheng et al., "Group Sequence Policy Optimization", sections 4.1 and
    # 4.3; clipping ranges 3e-4 and 4e-4 from section 5.1.
    "gspo": {
        "ratio_level": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "kl_coef": 0.0,
    },
}
