"""How fast completions were generated, in words."""

from collections.abc import Sequence

import numpy as np

from tlt_jax import types
from tlt_jax.rl.engine import stats as rollout_stats
from tlt_jax.specdec import chain


def report(stats: rollout_stats.RolloutStats, num_samples: int) -> str:
    """Say in a few lines what was computed and how fast; compilation apart."""

    def line(name: str, num_tokens: int, seconds: float) -> str:
        speed = f"{num_tokens / seconds:.1f} tokens/s" if seconds else "nothing to do"
        return f"{name} {num_tokens} tokens in {seconds:.2f} s, {speed}"

    decoded = line("decode ", stats.num_tokens, stats.decode_s)
    rows = "" if num_samples == 1 else f" for {num_samples} rows"
    lines = [
        line("prefill", stats.num_prefill_tokens, stats.prefill_s),
        f"{decoded}, {stats.num_steps} target forwards{rows}",
        f"compile {stats.compile_s:.2f} s",
    ]
    if stats.num_fill_tokens:
        lines.insert(1, line("drafter", stats.num_fill_tokens, stats.fill_s))
    if not stats.num_accepted:
        return "\n".join([*lines, "accept length 1.00: a token per target forward"])
    rates = " ".join(f"{rate:.2f}" for rate in stats.accept_rates())
    calls = ", ".join(f"{name} {count}" for name, count in stats.strategies.items())
    lines += [
        f"accept length {stats.accept_length:.2f} tokens per target forward; "
        f"accepted by depth: {rates}",
        f"calls by strategy: {calls}{_told(stats)}",
    ]
    return "\n".join(lines)


def compare(
    completions: Sequence[types.Completion],
    stats: rollout_stats.RolloutStats,
    plain_completions: Sequence[types.Completion],
    plain_stats: rollout_stats.RolloutStats,
) -> str:
    """Say how speculation did against plain decoding of the same requests."""
    num_equal = sum(
        np.array_equal(a.tokens, b.tokens)
        for a, b in zip(completions, plain_completions, strict=True)
    )
    num_tokens, plain_s = plain_stats.num_tokens, plain_stats.decode_s
    ratio = plain_s / (stats.decode_s + stats.fill_s)
    return (
        f"plain   {num_tokens} tokens in {plain_s:.2f} s, "
        f"{num_tokens / plain_s:.1f} tokens/s\n"
        f"speculation: {ratio:.2f} times as fast, tokens equal in {num_equal} of "
        f"{len(completions)}{_told(stats)}"
    )


def _told(stats: rollout_stats.RolloutStats) -> str:
    """Say of a rule that keeps no tokens that it does not."""
    if stats.rule in ("", chain.KEYED):
        return ""
    return f" (rule {stats.rule} draws others from the same law)"
