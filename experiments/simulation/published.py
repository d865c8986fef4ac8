"""Figures that the system's paper published, and costs fitted to them.

Published are accept lengths and speedups of Qwen2.5-32B on H100 with tensor parallelism
4 and eight children a node, and speedups of whole RL steps by cluster size (PAPER.md;
several figures stand in one transcription alone). Step times in seconds are not
published: they come from the devices' data sheets, with two numbers fitted so that the
published speedups follow from the published accept lengths.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Collection

import numpy as np

from experiments.simulation import costs, workload
from tlt_jax.specdec import strategy as strategy_lib

Strategy = strategy_lib.Strategy
TOPK = 8
# By draft depth: accept lengths with 16 and with 128 tokens verified.
ACCEPT_LENGTHS = {4: (4.63, 4.82), 8: (6.34, 7.51), 12: (7.02, 9.06), 16: (7.25, 9.78)}
# (tokens verified, batch): times plain decoding, 32B, TP4; drafted 12 levels deep
# where the best speed is told (3.66 at D12 V64), which is taken to hold for all four.
SPEEDUPS = {(16, 1): 3.22, (16, 32): 2.48, (64, 1): 3.62, (64, 32): 1.70}
SPEEDUP_DEPTH = 12
# Accept length on RL data of a 7B model after adaptation; 4.59 before.
ADAPTED = 6.53
# Times the same RL system without speculation, by (model, nodes of 8 H100).
CLUSTER_SIZE = {
    ("qwen2.5-7b", 1): 1.21,
    ("qwen2.5-7b", 2): 1.45,
    ("qwen2.5-7b", 4): 1.62,
    ("qwen2.5-7b", 8): 1.76,
    ("qwen2.5-32b", 4): 1.83,
    ("qwen2.5-32b", 8): 2.12,
}
# Cached tokens of a row when the speedups were measured: not told.
CONTEXT = 4096


def accept_length(strategy: Strategy, scale: float = 1.0) -> float:
    """Interpolates the published accept lengths in depth and in log2 of the nodes.

    Depth 4 to 16; verified tokens are taken into 16 to 128. The scale is of the tokens
    beyond the first.
    """
    depths = sorted(ACCEPT_LENGTHS)
    share = (math.log2(min(max(strategy.tokens_to_verify, 16), 128)) - 4) / 3
    values = [
        ACCEPT_LENGTHS[d][0] + share * (ACCEPT_LENGTHS[d][1] - ACCEPT_LENGTHS[d][0])
        for d in depths
    ]
    found = float(np.interp(strategy.draft_depth, depths, values))
    return 1 + scale * (found - 1)


def acceptance(
    strategies: Collection[Strategy], adapted: float = 1.0, stale: float | None = None
) -> workload.Acceptance:
    """Makes acceptance of strategies, as published or in proportion.

    `adapted` and `stale` scale tokens beyond the first; without `stale` both are alike.
    """

    def table(scale):
        return {
            s: (workload.hazard_of(accept_length(s, scale), s.draft_depth),)
            for s in strategies
        }

    return workload.Acceptance(
        table(adapted), table(adapted if stale is None else stale)
    )


@dataclasses.dataclass(frozen=True)
class Fit:
    """What the published speedups say of the machine: fields of `costs.RooflineCosts`.

    And what these predict: speedups, in the order of `SPEEDUPS`.
    """

    level_s: float
    flops_frac: float
    predicted: tuple[float, ...]


def speedup(machine: costs.RooflineCosts, strategy: Strategy, batch: int) -> float:
    """Returns how many times plain decoding a strategy is."""
    context = batch * CONTEXT
    plain_s = machine.step_s(batch, None, context)
    return accept_length(strategy) * plain_s / machine.step_s(batch, strategy, context)


@functools.cache
def fit() -> Fit:
    """Finds the two numbers with the least squared error of log speedups."""
    model, device = costs.MODELS["qwen2.5-32b"], costs.DEVICES["h100"]
    best: tuple[float, Fit] | None = None
    levels = np.linspace(0, 1.2e-3, 61)
    fractions = np.linspace(0.3, 1.0, 36)
    for level_s, fraction in itertools.product(levels, fractions):
        machine = costs.RooflineCosts(
            device, model, 4, level_s=float(level_s), flops_frac=float(fraction)
        )
        found = tuple(
            speedup(machine, Strategy(SPEEDUP_DEPTH, TOPK, verify), batch)
            for verify, batch in SPEEDUPS
        )
        error = sum(
            math.log(a / b) ** 2 for a, b in zip(found, SPEEDUPS.values(), strict=True)
        )
        if best is None or error < best[0]:
            best = error, Fit(float(level_s), float(fraction), found)
    return best[1]


def machine(
    device: costs.Device, model: costs.Model, tensor: int
) -> costs.RooflineCosts:
    """Returns a worker's costs with the two fitted numbers."""
    return costs.RooflineCosts(
        device, model, tensor, level_s=fit().level_s, flops_frac=fit().flops_frac
    )
