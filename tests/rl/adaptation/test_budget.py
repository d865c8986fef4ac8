"""Training where nobody waits is bounded, and not done where it does not pay."""

import numpy as np
import pytest

from tlt_jax.rl.adaptation import budget as budget_lib


def gain(budget, rollout_s, x):
    level = budget.accept_length
    later = level + budget.gain_per_s * x
    return budget_lib._HORIZON * rollout_s * (1 - level / later) - x


@pytest.mark.parametrize("level", [1.0, 2.5, 6.0])
@pytest.mark.parametrize("gain_per_s", [0.002, 0.05, 0.5])
@pytest.mark.parametrize("rollout_s", [2.0, 60.0])
def test_the_time_chosen_gains_the_most(level, gain_per_s, rollout_s):
    budget = budget_lib.Budget(gain_per_s, level)
    most = 0.5 * rollout_s
    chosen = budget.seconds(rollout_s, 0.5)
    tried = np.linspace(0, most, 2001)
    best = tried[np.argmax([gain(budget, rollout_s, x) for x in tried])]
    assert chosen == pytest.approx(best, abs=most / 1000)


def test_nothing_is_spent_where_it_does_not_pay_but_for_a_probe():
    budget = budget_lib.Budget()
    # Nothing is known yet.
    assert budget.seconds(10.0, 0.2) == 2.0
    budget = budget.trained(2.0, before=2.0, after=2.0)
    spent = []
    for _ in range(10):
        spent.append(budget.seconds(10.0, 0.2))
        budget = budget.skipped()
    assert spent == [0.0] * 8 + [0.2] * 2
    # The target moved, and training pays again.
    budget = budget.trained(0.2, before=1.5, after=1.7)
    assert budget.num_idle == 0 and budget.seconds(10.0, 0.2) > 0.2
    assert budget.seconds(10.0, 0.0) == 0.0


def test_gains_are_averaged_over_trainings():
    budget = budget_lib.Budget().trained(1.0, 1.0, 2.0).trained(2.0, 2.0, 3.0)
    assert budget == budget_lib.Budget(0.75, 3.0)
