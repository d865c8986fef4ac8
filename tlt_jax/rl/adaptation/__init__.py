"""Training of the drafter: beside rollouts, and before a run."""
