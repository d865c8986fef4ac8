"""The same as `drafters` on a real model, whose text is uncertain: once, not thrice.

    python -m experiments.drafters_smollm2 --scale=cpu

Runs of `configs/smollm2_tlt.py:products`: SmolLM2-135M-Instruct writes products out in
steps, at temperature 1, by a policy that hardly moves and by one that moves far. About
three hours of two cores, 10 GB of memory; each drafter at each drift is kept once it is
there.
"""

import dataclasses

from experiments import drafter_students as students
from experiments import drafters
from experiments.lab import experiment

(RECIPE,) = (name for name, study in students.STUDIES.items() if study.head_chunk)

EXPERIMENT = dataclasses.replace(
    drafters.EXPERIMENT,
    slug="drafters_smollm2",
    text=__doc__,
    title="the same on SmolLM2, whose reasoning is uncertain",
    larger={},
    options=(
        experiment.Option("config", RECIPE),
        experiment.Option("steps", 8, "RL steps of a run"),
        experiment.Option("rollouts", 3, "of the policy before RL, to learn from"),
        experiment.Option("updates", 100, "of EAGLE-3; others have as many as cost it"),
        experiment.seeds(1),
    ),
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
