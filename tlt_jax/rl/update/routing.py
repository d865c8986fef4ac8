"""What a mixture's routers did in the trainer's forward: their losses, and flips.

A route flips where the trainer's forward sends a token through other experts than the
rollout did, in one layer: log-probabilities and gradients are then those of another
network. One forward serves both here, so that in float32 none flips but in near ties.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from tlt_jax.models import config as model_config
from tlt_jax.models import experts
from tlt_jax.settings import sections
from tlt_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Config:
    """What is asked of the routers.

    Attributes:
      replay: the rollout's routes are taken where they are known.
      balance_coef: weight of `load_balancing`.
      z_coef: weight of `router_z`.
    """

    replay: bool = False
    balance_coef: float = 0.0
    z_coef: float = 0.0


def of_settings(cfg: sections.Learner, model: model_config.ModelConfig) -> Config:
    """Take from the settings what is asked of a model's routers.

    Raises:
      ValueError: something is asked, and the model has none.
    """
    asked = {
        "routes": cfg.routes != "own",
        "load_balancing_coef": cfg.load_balancing_coef > 0,
        "router_z_coef": cfg.router_z_coef > 0,
    }
    for name, is_asked in asked.items():
        if is_asked and model.experts is None:
            raise ValueError(
                f"learner.{name}={getattr(cfg, name)} is of mixtures of experts, and "
                f"this {model.family} model is none: leave it out."
            )
    return Config(cfg.routes == "replay", cfg.load_balancing_coef, cfg.router_z_coef)


def given(routes: Array | None, cfg: Config) -> Array | None:
    """Return what the forward shall take of `routes [B, T, L, C]`, `[L, C, B, T]`."""
    if routes is None or not cfg.replay:
        return None
    return jnp.moveaxis(routes, (2, 3), (0, 1)).astype(jnp.int32)


def losses(
    routing: experts.Routing, routes: Array | None, share: Array, cfg: Config
) -> tuple[Array, dict[str, Array]]:
    """Compute the routers' part of a micro-batch's loss.

    Balance is within a micro-batch, each weighted by its part of the minibatch.

    Args:
      routing: of all layers.
      routes: `[B, T, L, C]`, the rollout's; None: not known.
      share: `[B] float32`, see `policy_gradient.Rows`.
      cfg: coefficients.

    Returns:
      What to add to the loss, and sums for `summarise`.
    """
    part = jnp.sum(share)
    balance, z = part * load_balancing(routing), part * router_z(routing)
    sums = {"load_balancing": balance, "router_z": z}
    if routes is not None:
        num_flipped, num_routes = flips(routing, routes)
        sums |= {"num_flipped": num_flipped, "num_routes": num_routes}
    return cfg.balance_coef * balance + cfg.z_coef * z, sums


def summarise(sums: Mapping[str, float]) -> dict[str, float]:
    """Turn sums over all micro-batches into records; of dense blocks there are none."""
    if "load_balancing" not in sums:
        return {}
    record = {
        "moe/load_balancing_loss": sums["load_balancing"],
        "moe/router_z_loss": sums["router_z"],
    }
    if "num_routes" in sums:
        record["moe/route_flips"] = sums["num_flipped"] / max(sums["num_routes"], 1.0)
    return record


def load_balancing(routing: experts.Routing) -> Array:
    """Compute X x sum over experts of tokens' and probability's share, `[]`.

    All layers count as one; its least value is the number of experts per token, where
    all are even.

    Reference: Fedus, Zoph and Shazeer, Switch Transformers, 2021, eq. 4 to 6.
    """
    total = _num_passes(routing)
    chosen_X = jnp.sum(routing.num_chosen, axis=0) / total
    probs_X = jnp.sum(routing.probs, axis=0) / total
    return len(chosen_X) * jnp.sum(chosen_X * probs_X)


def router_z(routing: experts.Routing) -> Array:
    """Compute the mean squared log of the routers' normalisers, `[]`.

    Reference: Zoph et al., ST-MoE, 2022, eq. 5.
    """
    return jnp.sum(routing.squares) / _num_passes(routing)


def flips(routing: experts.Routing, routes: Array) -> tuple[Array, Array]:
    """Count tokens x layers whose experts are others than `routes [B, T, L, C]`.

    In whichever order they were chosen; second how many are known, both float32.
    """
    num_experts = routing.probs.shape[-1]
    known_LCBT = jnp.moveaxis(routes, (2, 3), (0, 1)).astype(jnp.int32)
    is_known_LBT = known_LCBT[:, 0] < num_experts
    ours, theirs = (jnp.sort(x, axis=1) for x in (routing.routes, known_LCBT))
    is_flipped_LBT = is_known_LBT & jnp.any(ours != theirs, axis=1)
    counts = jnp.sum(is_flipped_LBT), jnp.sum(is_known_LBT)
    return tuple(count.astype(jnp.float32) for count in counts)


def _num_passes(routing: experts.Routing) -> Array:
    """Tokens x layers."""
    per_token = routing.routes.shape[1]
    return jnp.maximum(jnp.sum(routing.num_chosen) / per_token, 1.0)
