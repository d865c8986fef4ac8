"""Every figure and table of the paper, and of ours beyond it, with what makes it.

`experiments/results/<scale>/<table>` is the result. Scale `cpu` runs on two cores,
`one_gpu` needs one accelerator, `paper` what the paper used; the larger two were never
run and are listed with the commands that would. What is simulated or only compiled is
the same on every machine: it has the scale `cpu` alone. Where there is no module at
all, an item is listed as missing.
"""

import ast
import dataclasses
import pathlib
from collections.abc import Mapping

from experiments.lab import freshness, harness

MISSING = "missing"
A_TOOL = "a tool"
AS_CPU = "as cpu"


@dataclasses.dataclass(frozen=True)
class Item:
    """A figure, a table or a command.

    Attributes:
      slug: of the module in this folder; one that has none yet is listed as missing.
      what: the paper's item, or ours.
      published: the paper's figures, as PAPER.md has them; empty: ours alone.
      needs: flags and inputs beside `--scale`.
      larger: the same at the larger scales; empty: they have no figures of their own.
      table: file of the result; empty: `<slug>.csv`.
      is_tool: it answers questions and has no result.
    """

    slug: str
    what: str
    published: str = ""
    needs: str = ""
    larger: Mapping[str, str] = dataclasses.field(default_factory=dict)
    table: str = ""
    is_tool: bool = False

    @property
    def exists(self) -> bool:
        """Whether there is a module."""
        return (freshness.FOLDER / f"{self.slug}.py").exists()

    def command(self, scale: str) -> str:
        """Returns the command that makes the result; empty: there is none yet."""
        if not self.exists:
            return ""
        flags = self.needs
        if scale != "cpu" and self.larger:
            flags = self.larger[scale]
        elif self.is_tool:
            scale = ""
        else:
            scale = "cpu"
        words = [f"--scale={scale}" if scale else "", flags]
        return " ".join(["python -m", f"experiments.{self.slug}", *filter(None, words)])

    def status(self, scale: str) -> str:
        """Tells whether the result is there, and made by today's code."""
        if not self.exists:
            return MISSING
        if self.is_tool:
            return A_TOOL
        if scale != "cpu" and not self.larger:
            return AS_CPU
        folder = harness.RESULTS_DIR / scale
        return freshness.of_table(self.slug, folder, self.table or f"{self.slug}.csv")


def _both(one_gpu: str, paper: str = "") -> Mapping[str, str]:
    """Flags by scale; `paper` as `one_gpu` where it is left out."""
    return {"one_gpu": one_gpu, "paper": paper or one_gpu}


def _recipes(more: str = "") -> Mapping[str, str]:
    """The same with a recipe of the scale's size."""
    names = ("configs/smollm2.py", "configs/grpo.py:qwen2.5-7b")
    return _both(*(f"--config={name} {more}".strip() for name in names))


def _models(more: str) -> Mapping[str, str]:
    """The same with a model of the scale's size."""
    names = ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-32B-Instruct")
    return _both(*(f"--model={name} --drafter=DIR {more}".strip() for name in names))


_DRAFTER = "--drafter=DIR"
_ALL_SYSTEMS = "--systems=off,ngram,frozen,tlt"
PAPER_ITEMS = (
    Item(
        "end_to_end",
        "end to end by model",
        "1.71 to 2.12 times; TLT-Base 1.31 to 1.54",
        f"--processes=2 {_ALL_SYSTEMS} "
        "--set=drafter.directory=DIR,drafter.max_length=704",
        _both(
            f"{_ALL_SYSTEMS} --set=drafter.directory=DIR,workers.num=1,mesh.data=1,"
            "rollout.max_batch=32",
            f"{_ALL_SYSTEMS} --models=7b=configs/grpo.py:qwen2.5-7b,"
            "32b=configs/grpo.py:qwen2.5-32b "
            "--set=7b:drafter.directory=DIR,32b:drafter.directory=DIR",
        ),
    ),
    Item(
        "trainer_makespan",
        "what the spot trainer costs a rollout",
        needs="--drafter=DIR",
    ),
    Item(
        "cluster_size", "end to end by cluster size", "7B 1.21 to 1.76; 32B 1.83, 2.12"
    ),
    Item("cluster_sensitivity", "the same, one assumption changed at a time"),
    Item(
        "reward_curves",
        "reward curves, on against off",
        "they lie on each other",
        larger=_recipes("--steps=100"),
    ),
    Item(
        "length_tail",
        "response lengths and time split",
        "rollout about 85 % of a step",
        "--workdirs=NAME=DIR",
        _both("--workdirs=NAME=DIR"),
    ),
    Item(
        "speculation_speed",
        "speedup by batch and tokens verified",
        "V16: 3.22 to 2.48, V64: 3.62 to 1.70 (batch 1 to 32)",
        _DRAFTER,
        _models(
            "--cases=1:D10K8V16,8:D10K8V16,32:D10K8V16,1:D10K8V64,8:D10K8V64,"
            "32:D10K8V64"
        ),
    ),
    Item(
        "accept_length",
        "depth by tokens verified, children; rankings, chain rules over temperature",
        "d4: 4.63 to 4.82, d16: 7.25 to 9.78 (V16 to V128)",
        _DRAFTER,
        _models(
            "--strategies=D4K1V5,D16K1V17,D4K8V16,D4K8V128,D16K8V16,D16K8V128 "
            "--temperatures=1,0.6,0"
        ),
    ),
    Item("active_batch", "active-batch threshold, timeline case", "2.44 times"),
    Item(
        "tuner_regret",
        "tuner against static, BEG-MAB and oracle",
        larger=_both("--seeds=5"),
    ),
    Item(
        "program_pool",
        "graph memory",
        "7.81 GB one, 30.39 naive, 10.69 bucketed",
        larger=_recipes(),
    ),
    Item(
        "drafter_adaptation",
        "drafter adaptation over RL steps",
        "4.59 -> 6.53",
        larger=_recipes("--updates=50"),
    ),
    Item(
        "drafter_cadence",
        "cadence of the drafter's updates, size of the drift",
        larger=_recipes("--updates=3840"),
    ),
    Item(
        "transfer",
        "the drafter on other tasks",
        "3.76 -> 5.15 downstream",
        larger=_both("--start-updates=300 --updates=1000 --texts=1024 --prompts=256"),
    ),
    Item(
        "objectives",
        "objectives and losses at equal cost",
        "EAGLE 6.53 / 1x, HASS 6.67 / 3x, EAGLE-3 6.83 / 7x",
        larger=_both("--config=configs/smollm2_drafter.py --unrolled=8400"),
    ),
    Item(
        "ngram_start",
        "suffix matches before the drafter is ready",
        "TLT-Base",
        larger=_recipes(),
    ),
    Item(
        "checkpoint_stall",
        "checkpoint stall in three modes",
        "893, 280, 97 ms",
        larger=_both("--targets=qwen2.5-1.5b --draft-vocab=32000"),
    ),
    Item(
        "packing",
        "packing",
        "13.3 -> 29.6 samples/s",
        larger=_both("--target=qwen2.5-1.5b --draft-vocab=32000 --row-tokens=4096"),
    ),
    Item("devices", "devices, 7B, batch 1", "2.33 (B200) to 3.22 (3090) times"),
)
OUR_ITEMS = (
    Item(
        "losslessness",
        "tokens with speculation on and off, over arms",
        larger=_recipes(),
    ),
    Item(
        "decode_speed",
        "plain decoding beside peers",
        "",
        "--model-dir=DIR --peers=transformers,llamacpp,vllm",
        _both("--model-dir=DIR --peers=transformers,vllm --batches=1,8,32,128"),
    ),
    Item(
        "decode_bandwidth",
        "plain decoding at batch 1 against the memory's bandwidth",
        larger=_both(
            "--model=qwen2.5-7b --dtype=bfloat16 --contexts=512,8192 --steps=256"
        ),
    ),
    Item(
        "grpo_step_speed",
        "a GRPO step beside peers",
        "",
        "--model-dir=DIR --peers=trl,tunix",
        _both("--model-dir=DIR --peers=trl,tunix --max-new-tokens=1024"),
    ),
    Item(
        "peers_side_by_side",
        "ours beside transformers, vLLM, TRL, Tunix in one run",
        "",
        "--model-dir=DIR --peers=transformers,llamacpp,vllm,trl,tunix",
    ),
    Item("ahead_of_time", "large recipes compiled for TPU slices"),
    Item("kernel_ahead_of_time", "attention kernels compiled for TPUs"),
    Item(
        "tuner_trace",
        "trace for the tuners' replay",
        "",
        _DRAFTER,
        _models("--max-rows=32"),
        table="tuner_trace.jsonl",
    ),
    Item("simulator_check", "the simulator against recorded runs"),
    Item(
        "planner",
        "what speculation would bring on your cluster",
        "",
        "--device=h100 --devices=64 --model=qwen2.5-7b --tensor=2",
        is_tool=True,
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
        rows.append(
            {
                "experiment": item.slug,
                "status": item.status(scale),
                "of": "paper" if item in PAPER_ITEMS else "ours",
                "what": item.what,
                "published": item.published,
                "command": item.command(scale),
            }
        )
    return rows
