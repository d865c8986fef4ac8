"""Every figure and table of the paper, and of ours beyond it, with what makes it.

`experiments/results/<scale>/<table>` is the result. Scale `cpu` runs on two cores,
`one_gpu` needs one accelerator, `paper` what the paper used. No module has the larger
two yet: they are listed as unrun; where there is no module at all, as missing.
"""

import ast
import dataclasses
import pathlib

from experiments import freshness, harness

SCALES = ("cpu", "one_gpu", "paper")
MISSING = "missing"


@dataclasses.dataclass(frozen=True)
class Item:
    """A figure, a table or a command.

    Attributes:
      slug: of the module in this folder; one that has none yet is listed as missing.
      what: the paper's item, or ours.
      published: the paper's figures, as PAPER.md has them; empty: ours alone.
      needs: flags and inputs beside `--scale`.
      table: file of the result; empty: `<slug>.csv`.
      cpu: whether there is a CPU scale.
    """

    slug: str
    what: str
    published: str = ""
    needs: str = ""
    table: str = ""
    cpu: bool = True

    @property
    def exists(self) -> bool:
        """Whether there is a module."""
        return (freshness.FOLDER / f"{self.slug}.py").exists()

    def command(self, scale: str) -> str:
        """Returns the command that makes the result; empty: there is none yet."""
        if self.slug == "planner":
            return f"python -m experiments.planner {self.needs}"
        if not self.exists or scale != "cpu":
            return ""
        flags = " ".join(filter(None, [f"--scale={scale}", self.needs]))
        return f"python -m experiments.{self.slug} {flags}"

    def status(self, scale: str) -> str:
        """Tells whether the result is there, and made by today's code."""
        if not self.exists:
            return MISSING
        if scale != "cpu" or not self.cpu:
            return freshness.UNRUN
        folder = harness.RESULTS_DIR / scale
        if self.table:
            return freshness.of_table(self.slug, folder, self.table)
        return freshness.status(self.slug, folder)


_DRAFTER = "--drafter=DIR"
PAPER_ITEMS = (
    Item(
        "end_to_end", "end to end by model", "1.71 to 2.12 times; TLT-Base 1.31 to 1.54"
    ),
    Item(
        "cluster_size", "end to end by cluster size", "7B 1.21 to 1.76; 32B 1.83, 2.12"
    ),
    Item("cluster_sensitivity", "the same, one assumption changed at a time"),
    Item("reward_curves", "reward curves, on against off", "they lie on each other"),
    Item(
        "length_tail",
        "response lengths and time split",
        "rollout about 85 % of a step",
        "--workdirs=NAME=DIR",
    ),
    Item(
        "speculation_speed",
        "speedup by batch and tokens verified",
        "V16: 3.22 to 2.48, V64: 3.62 to 1.70 (batch 1 to 32)",
        _DRAFTER,
    ),
    Item(
        "accept_length",
        "depth by tokens verified, children; rankings, chain rules over temperature",
        "d4: 4.63 to 4.82, d16: 7.25 to 9.78 (V16 to V128)",
        _DRAFTER,
    ),
    Item("active_batch", "active-batch threshold, timeline case", "2.44 times"),
    Item("tuner_regret", "tuner against static, BEG-MAB and oracle"),
    Item("program_pool", "graph memory", "7.81 GB one, 30.39 naive, 10.69 bucketed"),
    Item("drafter_adaptation", "drafter adaptation over RL steps", "4.59 -> 6.53"),
    Item("drafter_cadence", "cadence of the drafter's updates, size of the drift"),
    Item("transfer", "the drafter on other tasks", "3.76 -> 5.15 downstream"),
    Item(
        "objectives",
        "objectives and losses at equal cost",
        "EAGLE 6.53 / 1x, HASS 6.67 / 3x, EAGLE-3 6.83 / 7x",
    ),
    Item("ngram_start", "suffix matches before the drafter is ready", "TLT-Base"),
    Item("checkpoint_stall", "checkpoint stall in three modes", "893, 280, 97 ms"),
    Item("packing", "packing", "13.3 -> 29.6 samples/s"),
    Item("devices", "devices, 7B, batch 1", "2.33 (B200) to 3.22 (3090) times"),
)
OUR_ITEMS = (
    Item("losslessness", "tokens with speculation on and off, over arms"),
    Item("decode_speed", "plain decoding beside peers"),
    Item("grpo_step_speed", "a GRPO step beside peers"),
    Item("ahead_of_time", "large recipes compiled for TPU slices"),
    Item("kernel_ahead_of_time", "attention kernels compiled for TPUs"),
    Item(
        "tuner_trace",
        "trace for the tuners' replay",
        "",
        _DRAFTER,
        table="tuner_trace.jsonl",
    ),
    Item("simulator_check", "the simulator against recorded runs"),
    Item(
        "planner",
        "what speculation would bring on your cluster",
        "",
        "--device=h100 --devices=64 --model=qwen2.5-7b --tensor=2",
        cpu=False,
    ),
)
ITEMS = PAPER_ITEMS + OUR_ITEMS


def first_line(path: pathlib.Path) -> str:
    """Returns the first docstring line of a module, without importing it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def listing(scale: str) -> list[harness.Row]:
    """Returns a row for each item."""
    rows = []
    for item in ITEMS:
        status = item.status(scale)
        rows.append(
            {
                "experiment": item.slug,
                "status": "a tool" if item.slug == "planner" else status,
                "of": "paper" if item in PAPER_ITEMS else "ours",
                "what": item.what,
                "published": item.published,
                "command": item.command(scale),
            }
        )
    return rows
