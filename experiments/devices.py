"""Speculation at batch 1 on seven devices: the paper's table beside a prediction.

    python -m experiments.devices --scale=cpu

Nothing here is measured on any of these devices. Seconds of plain and speculative steps
of Qwen2.5-7B follow from data sheets, as in `experiments.cluster_size`, with the two
numbers that were fitted to other published figures (32B on H100); accept lengths are
the published ones of 32B in proportion to the 7B's 6.53. For each device the best of
some strategies is taken.

Reproduces: the paper's speedups by device, 7B, batch 1, as a prediction.
"""

from experiments import cluster_size
from experiments.lab import claims, experiment, plotting, tables
from experiments.simulation import costs, published
from tlt_jax.specdec import strategy as strategy_lib

MODEL = "qwen2.5-7b"
# Vendors' data sheets: bytes per second, dense bf16 operations per second, bytes.
DEVICES = {
    **{name: costs.DEVICES[name] for name in ("b200", "h100", "a100")},
    "rtx 5090": costs.Device(1.792e12, 209.5e12, 32e9),
    "rtx 4090": costs.Device(1.008e12, 165.2e12, 24e9),
    "rtx 3090": costs.Device(0.936e12, 71.2e12, 24e9),
}
PUBLISHED = {
    "b200": 2.33,
    "h100": 2.61,
    "a100": 2.79,
    "rtx 5090": 2.91,
    "rtx 4090": 2.87,
    "rtx 3090": 3.22,
}
STRATEGIES = ("D4K8V16", "D8K8V16", "D8K8V32", "D8K8V64", "D12K8V48", "D12K8V64")


def measure(cell: tables.Cell) -> list[tables.Row]:
    """Predicts a device's best strategy and speedup."""
    device = cell["device"]
    machine = published.machine(DEVICES[device], costs.MODELS[MODEL], 1)
    plain_s = machine.step_s(1, None, published.CONTEXT)
    speedups = {}
    for name in STRATEGIES:
        strategy = strategy_lib.parse(name)
        length = published.accept_length(strategy, cluster_size.SCALE_7B)
        step_s = machine.step_s(1, strategy, published.CONTEXT)
        speedups[name] = length * plain_s / step_s
    best = max(speedups, key=speedups.get)
    return [
        {
            "device": device,
            "strategy": best,
            "plain_ms": 1e3 * plain_s,
            "times_faster": speedups[best],
            "published": PUBLISHED[device],
        }
    ]


def plot(rows: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws predicted and published speedups."""
    fig, axes = plotting.figure(
        "Qwen2.5-7B at batch 1, by device (prediction)",
        "",
        "times plain decoding",
        stamp,
    )
    names, values, told = (
        tables.column(rows, name) for name in ("device", "times_faster", "published")
    )
    axes.bar(names, values, 0.6, color=plotting.COLORS[0], label="predicted")
    axes.plot(names, told, "s", color=plotting.COLORS[3], label="published")
    return fig


def _close(rows: claims.Rows) -> claims.Finding:
    errors = {r["device"]: r["times_faster"] / r["published"] - 1 for r in rows}
    worst = max(errors, key=lambda name: abs(errors[name]))
    return abs(errors[worst]) <= 0.1, f"worst: {worst}, off by {errors[worst]:+.0%}"


EXPERIMENT = experiment.Experiment(
    slug="devices",
    text=__doc__,
    title="devices, 7B, batch 1",
    published="2.33 (B200) to 3.22 (3090) times",
    constants={"model": MODEL, "strategies": STRATEGIES},
    cells={"device": DEVICES},
    measure=measure,
    plot=plot,
    claims={
        "predicted speedups by device are within 10 % of the paper's": _close,
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
