"""What is said of speed."""

from tlt_jax.rl.engine import stats as rollout_stats
from tlt_jax.viz import speed


def test_the_report_keeps_compilation_apart():
    stats = rollout_stats.RolloutStats(
        num_tokens=90,
        num_steps=50,
        num_prefill_tokens=30,
        prefill_s=0.5,
        decode_s=3.0,
        compile_s=7.0,
    )
    assert speed.report(stats, 2).splitlines() == [
        "prefill 30 tokens in 0.50 s, 60.0 tokens/s",
        "decode  90 tokens in 3.00 s, 30.0 tokens/s, 50 target forwards for 2 rows",
        "compile 7.00 s",
        "accept length 1.00: a token per target forward",
    ]
    stats.num_accepted, stats.num_tried, stats.rule = [10, 5], [10], "block"
    stats.strategies["D1K1V2"] = 4
    assert speed.report(stats, 2).splitlines()[-2:] == [
        "accept length 1.50 tokens per target forward; accepted by depth: 0.50",
        "calls by strategy: D1K1V2 4 (rule block draws others from the same law)",
    ]
    stats.rule = "keyed"
    assert speed.report(stats, 2).endswith("\ncalls by strategy: D1K1V2 4")
    assert "prefill 0 tokens in 0.00 s, nothing to do" in speed.report(
        rollout_stats.RolloutStats(), 1
    )
