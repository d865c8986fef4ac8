"""Lists the experiments: `python -m experiments`."""

import ast
import pathlib

from experiments import harness

# What holds today; the figures behind each line are in results/ and LOG.md.
STATUS = {
    "accept_length": "runs on CPU; needs a trained drafter",
    "ahead_of_time": "compiles for described TPU slices; needs libtpu",
    "checkpoint_stall": "runs on CPU",
    "decode_speed": "runs on CPU",
    "end_to_end": "runs on CPU, an hour or so",
    "grpo_step_speed": "runs on CPU",
    "packing": "runs on CPU",
    "speculation_speed": "runs on CPU; needs a trained drafter",
    "tuner_regret": "runs on CPU; replays the recorded trace",
    "tuner_trace": "runs on CPU; needs a trained drafter",
}


def first_line(path: pathlib.Path) -> str:
    """Returns the first docstring line of a module, without importing it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def main() -> list[harness.Row]:
    """Prints and returns one row per experiment."""
    folder = pathlib.Path(__file__).parent
    rows = [
        {
            "experiment": slug,
            "status": status,
            "what": first_line(folder / f"{slug}.py"),
        }
        for slug, status in STATUS.items()
    ]
    for row in rows:
        print(f"{row['experiment']}  [{row['status']}]\n    {row['what']}")
    print("Start one with: python -m experiments.<experiment> --scale=cpu")
    return rows


if __name__ == "__main__":
    main()
