"""A whole GRPO step against its peers: seconds, fp32, speculation off, no KL term.

    python -m experiments.grpo_step_speed --scale=cpu
    python -m experiments.grpo_step_speed --scale=cpu --model-dir=DIR \
        --peers=trl,tunix --peer-python=trl=PATH,tunix=PATH

A step samples 4 completions of at most 128 tokens for each of 4 prompts at temperature
1, scores them (share of digits), forms advantages within the group and updates all
weights with AdamW at the same learning rate, gradients clipped at norm 1. Two cases:
`fixed` lengths (end-of-sequence ignored or forbidden, all rows of 128 tokens: the same
work for all) and `natural` ones (each system's own samples end where they end).

Natural lengths pack into rows of new shapes now and then, which compiles a program:
`compile_s` of our steps is part of `step_s` and left out of `steady_step_s`. TRL
compiles nothing and Tunix, which pads everything, only in the warm-up round.

With `--one-at-a-time` a system is in memory for its own turn only: it is loaded, takes
a step to warm up, then the one that counts. Ours, TRL and Tunix need 10 GB each.

Target: at least 3 times faster than TRL and than Tunix.
"""

import argparse
import contextlib
import functools

from experiments.lab import claims, experiment, paired, prompts, provenance, tables

OURS = "tlt_jax"
OUR_SCRIPT = "run_tlt_jax_grpo.py"
PEERS = {"trl": "run_trl.py", "tunix": "run_tunix.py"}
LENGTHS = ("fixed", "natural")
METRICS = {
    **dict.fromkeys(("step_s", "steady_step_s", "generate_s", "update_s"), "lower"),
    "step_tokens_per_s": "higher",
}
WARMUPS = 1
LEARNING_RATE = 1e-6
NUM_SAMPLES = 4
RUN_TIMEOUT_S = 1800.0


def check(options: argparse.Namespace) -> None:
    """Finds the systems, and the cases."""
    options.lengths = experiment.known(options.lengths, LENGTHS, "lengths")
    options.systems = paired.systems_of(OURS, OUR_SCRIPT, PEERS, options)


def load_request(options: argparse.Namespace) -> tables.Row:
    """Returns what every runner is told when it loads."""
    return {
        **paired.model_request(options),
        "prompts": prompts.ARITHMETIC,
        "num_samples": NUM_SAMPLES,
        "max_new_tokens": options.max_new_tokens,
        "learning_rate": LEARNING_RATE,
        # One more than is asked for, so that no trainer ends its loop on its own.
        "max_steps": len(options.lengths) * (WARMUPS + options.rounds) + 1,
    }


def load(
    options: argparse.Namespace,
    closing: contextlib.ExitStack,
    record: provenance.Provenance,
) -> dict:
    """Loads the systems; returns their runners."""
    how = {"one_at_a_time": options.one_at_a_time}
    return paired.load(options, load_request(options), closing, record, **how)


def measure(
    options: argparse.Namespace, context: dict, cell: tables.Cell
) -> list[tables.Row]:
    """Asks all systems for steps of one case, in turns."""

    def ask(name, case, number):
        answer = context[name].ask(
            "run",
            timeout_s=RUN_TIMEOUT_S,
            seed=1000 + number,
            fixed_length=case["lengths"] == "fixed",
        )
        tokens = answer["completion_tokens"]
        compile_s = answer.get("compile_s", 0.0)
        return {
            **{name: answer[name] for name in ("step_s", "generate_s", "update_s")},
            "compile_s": compile_s,
            "steady_step_s": answer["step_s"] - compile_s,
            "completion_tokens": tokens,
            "length_mean": tokens / (NUM_SAMPLES * len(prompts.ARITHMETIC)),
            "length_max": answer["length_max"],
            "step_tokens_per_s": tokens / answer["step_s"],
        }

    # A system that is loaded for its turn warms up in it.
    warmups = 0 if options.one_at_a_time else WARMUPS
    return paired.run_paired(
        list(context), [cell.overrides], ask, rounds=options.rounds, warmups=warmups
    )


EXPERIMENT = experiment.Experiment(
    slug="grpo_step_speed",
    text=__doc__,
    title="a GRPO step beside peers",
    needs="--model-dir=DIR --peers=trl,tunix",
    larger=experiment.both("--model-dir=DIR --peers=trl,tunix --max-new-tokens=1024"),
    options=(
        *paired.options_of(PEERS),
        *experiment.plain(max_new_tokens=128, rounds=3),
        experiment.Option("lengths", ",".join(LENGTHS), recorded=False),
        experiment.Option(
            "one-at-a-time",
            False,
            "load a system for its turn only: where memory does not hold all",
        ),
    ),
    check=check,
    settings=lambda options: {
        "scale": options.scale,
        "dtype": "float32",
        "prompts": prompts.ARITHMETIC,
        "num_samples": NUM_SAMPLES,
        "learning_rate": LEARNING_RATE,
        "kl": 0.0,
        "cases": [{"lengths": lengths} for lengths in options.lengths],
        "systems": [system.name for system in options.systems],
    },
    context=load,
    cells=lambda cases: [tables.Cell(case, None) for case in cases],
    measure=measure,
    summary=functools.partial(
        paired.summarise, case_keys=("lengths",), metrics=METRICS, reference=OURS
    ),
    claims={
        "3 times TRL's GRPO step, compilation apart": claims.at_least(
            "steady_step_s/times", 3.0, system="trl"
        ),
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
