"""Settings of losses that mean nothing are refused by name."""

import pytest

from tlt_jax.rl.update import losses


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: losses.LossConfig(clip_low=1.5), "clip_low=1.5"),
        (lambda: losses.LossConfig(clip_high=-0.1), "clip_high=-0.1"),
        (lambda: losses.LossConfig(kl_coef=float("nan")), "kl_coef=nan"),
        (lambda: losses.LossConfig(dual_clip=1.1), "dual_clip=1.1 must exceed"),
        (lambda: losses.LossConfig(importance_cap=0.0), "importance_cap=0.0"),
        (lambda: losses.LossConfig(ratio_level="word"), "ratio_level='word'"),
        (lambda: losses.LossConfig(kl_estimator="k4"), "kl_estimator='k4'"),
        (lambda: losses.LossConfig(kl_placement="both"), "kl_placement='both'"),
    ],
)
def test_bad_settings_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
