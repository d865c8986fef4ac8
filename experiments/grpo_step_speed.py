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
import pathlib
import tempfile

from experiments.lab import harness, prompts

SLUG = "grpo_step_speed"
OURS = "tlt_jax"
OUR_SCRIPT = "run_tlt_jax_grpo.py"
PEERS = {"trl": "run_trl.py", "tunix": "run_tunix.py"}
LENGTHS = ("fixed", "natural")
WARMUPS = 1
LEARNING_RATE = 1e-6
NUM_SAMPLES = 4
LOAD_TIMEOUT_S = 900.0
RUN_TIMEOUT_S = 1800.0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = harness.argument_parser(__doc__, PEERS)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--lengths", default=",".join(LENGTHS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--one-at-a-time",
        action="store_true",
        help="load a system for its turn only: where memory does not hold all",
    )
    options = parser.parse_args(arguments)
    options.lengths = options.lengths.split(",")
    if unknown := set(options.lengths) - set(LENGTHS):
        raise ValueError(
            f"--lengths names {', '.join(sorted(unknown))}; known are "
            f"{', '.join(LENGTHS)}."
        )
    return options


def load_request(options: argparse.Namespace) -> harness.Row:
    """Returns what every runner is told when it loads."""
    return {
        **harness.model_request(options),
        "prompts": prompts.ARITHMETIC,
        "num_samples": NUM_SAMPLES,
        "max_new_tokens": options.max_new_tokens,
        "learning_rate": LEARNING_RATE,
        # One more than is asked for, so that no trainer ends its loop on its own.
        "max_steps": len(options.lengths) * (WARMUPS + options.rounds) + 1,
    }


def measurement(runners: dict[str, harness.Runner]):
    """Returns the function that asks one system for one step."""

    def measure(name: str, case: harness.Row, number: int) -> harness.Row:
        answer = runners[name].ask(
            "run",
            timeout_s=RUN_TIMEOUT_S,
            seed=1000 + number,
            fixed_length=case["lengths"] == "fixed",
        )
        tokens = answer["completion_tokens"]
        compile_s = answer.get("compile_s", 0.0)
        return {
            "step_s": answer["step_s"],
            "generate_s": answer["generate_s"],
            "update_s": answer["update_s"],
            "compile_s": compile_s,
            "steady_step_s": answer["step_s"] - compile_s,
            "completion_tokens": tokens,
            "length_mean": tokens / (NUM_SAMPLES * len(prompts.ARITHMETIC)),
            "length_max": answer["length_max"],
            "step_tokens_per_s": tokens / answer["step_s"],
        }

    return measure


def main(arguments: list[str] | None = None) -> list[harness.Row]:
    """Runs the experiment; returns the summary that it also writes."""
    options = parse_arguments(arguments)
    request = load_request(options)
    peers = harness.choose_peers(PEERS, options.peers, options.peer_python)
    systems = [harness.our_system(OURS, OUR_SCRIPT), *peers]
    cases = [{"lengths": lengths} for lengths in options.lengths]
    settings = {
        "scale": options.scale,
        "dtype": "float32",
        "prompts": prompts.ARITHMETIC,
        "num_samples": NUM_SAMPLES,
        "max_new_tokens": options.max_new_tokens,
        "learning_rate": LEARNING_RATE,
        "kl": 0.0,
        "cases": cases,
        "rounds": options.rounds,
        "one_at_a_time": options.one_at_a_time,
        "systems": [system.name for system in systems],
    }
    # A system that is loaded for its turn warms up in it.
    warmups = 0 if options.one_at_a_time else WARMUPS
    with tempfile.TemporaryDirectory() as log_dir:
        with harness.loaded(
            systems,
            pathlib.Path(log_dir),
            request,
            LOAD_TIMEOUT_S,
            one_at_a_time=options.one_at_a_time,
        ) as (runners, versions):
            provenance = harness.Provenance(SLUG, settings, versions)
            rows = harness.run_paired(
                list(runners),
                cases,
                measurement(runners),
                rounds=options.rounds,
                warmups=warmups,
            )
    metrics = {
        "step_s": "lower",
        "steady_step_s": "lower",
        "generate_s": "lower",
        "update_s": "lower",
        "step_tokens_per_s": "higher",
    }
    summary = harness.summarise(
        rows, case_keys=("lengths",), metrics=metrics, reference=OURS
    )
    harness.write_results(options, SLUG, rows, summary, provenance)
    return summary


if __name__ == "__main__":
    main()
