"""Compiles decode programs for accelerators that are not there: what does a step cost?

    python -m experiments.step_ahead_of_time
    python -m experiments.step_ahead_of_time --compiled=32,64,128 --again
    python -m experiments.step_ahead_of_time --model=qwen3-30b-a3b --chips=h200

The decode programs of a 7B model and its drafter, plain and speculative, are compiled
whole by the compilers for an H200 (jax's CUDA plug-in) and for four chips of v5e
(libtpu), which need neither: those of the batches that `--compiled` names, as it takes
a minute a program. In a strategy `N2B` stands for a budget of two nodes a row. Rows are
as long as the cache allows, `max_length`; rows without `draft_vocab` were measured with
a drafter of 32,768 tokens.

`flops` and `bytes` are of one step on all chips together, as `step_costs` counts them;
all levels are drafted. `bound_ms` is the longer of the two by the chips' peaks, and
`bound_of_plain` what a step then costs in plain steps: speculation pays on that chip
where more tokens a step are accepted. `launches` are the kernels that a GPU starts
for a step, counted in the compiled text. `compiler_bytes` and `compiler_flops` are the
compiler's, of a device, loops' bodies once; that for GPUs tells none. No time is
measured but that of compiling.
"""

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Sequence
from typing import Any

import jax

from experiments import ahead_of_time, step_costs
from experiments.lab import experiment, launches, tables
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.pallas_kernels.verify_attention import bench
from tlt_jax.rl.engine import programs as engine_programs
from tlt_jax.rl.engine import speculator
from tlt_jax.rl.workers import weight_sync
from tlt_jax.runtime import programs, sharding
from tlt_jax.specdec import chain, decode, sampling, speculate
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.proposers import expansion

PLAIN = "plain"
MODEL = "qwen2.5-7b"
STRATEGIES = "D7K1V8,D7K1V8N2B,D7K1V8N3B,D5K4V16N3B"
# Of the large recipes: D7K1V8 of one row then moves 1.33 times a plain step's bytes,
# with twice as many 1.38 times.
DRAFT_VOCAB = 16_384
PAGE_SIZE = 128


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator, and how many of them a program is compiled for.

    Attributes:
      kind: of its devices, as jax calls it.
      platform: that a program is lowered for.
      num_chips: that split the key/value heads.
      flops_per_s: peak of products in bfloat16, of a chip.
      hbm_bytes: of a chip that its compiler gives to programs.
    """

    kind: str
    platform: str
    num_chips: int
    flops_per_s: float
    hbm_bytes: float

    def bound_s(self, cost: step_costs.Cost) -> float:
        """Returns what computing or moving takes at the least, evenly divided."""
        bandwidth = bench.BANDWIDTH[self.kind]
        longest = max(cost.flops / self.flops_per_s, cost.num_bytes / bandwidth)
        return longest / self.num_chips


CHIPS = {
    "h200": Chip("NVIDIA H200", "cuda", 1, 989e12, ahead_of_time.HBM_BYTES["h200"]),
    "v5e": Chip("TPU v5 lite", "tpu", 4, 197e12, ahead_of_time.HBM_BYTES["v5e"]),
}
_SLICES = {"h200": "h200:1x1x1", "v5e": "v5e:2x2"}


def described(chip: str) -> Sequence[Any]:
    """Returns the devices of a chip's programs, which need not exist.

    Raises:
      NoCompilerError: its compiler is not installed; the message has the command.
    """
    return ahead_of_time.described_devices(_SLICES[chip])


def strategy_of(text: str, batch: int) -> strategy_lib.Strategy | None:
    """Reads a strategy, `N2B` in it as a budget of two nodes a row; None: plain."""
    if text == PLAIN:
        return None
    shape, has_budget, per_row = text.partition("N")
    if has_budget and per_row.endswith("B"):
        text = f"{shape}N{int(per_row[:-1]) * batch}"
    return strategy_lib.parse(text)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A decode program of a model with a drafter, on described devices or a CPU.

    Attributes:
      model: the target.
      batch: rows.
      max_length: positions that a row's pages have room for.
      strategy: None: plain decoding, of a cache without a drafter's features.
      mesh: of the devices.
      attention: see `programs.EngineConfig`.
    """

    model: model_config.ModelConfig
    batch: int
    max_length: int
    strategy: strategy_lib.Strategy | None
    mesh: jax.sharding.Mesh
    attention: str = "auto"

    def program(self) -> tuple[engine_programs.EnginePrograms, model_params.Params]:
        """Returns the engine's programs, and abstract weights where they belong."""
        chosen = None
        if self.strategy is not None:
            cfg = drafter.of_target(
                self.model,
                feature_layers=drafter.low_mid_high(self.model.num_layers),
                draft_vocab_size=min(DRAFT_VOCAB, self.model.vocab_size),
            )
            arms = strategy_lib.Arms(((self.batch, (self.strategy,)),))
            chosen = speculator.SpeculatorConfig(table=arms, drafter_cfg=cfg)
        made = engine_programs.EnginePrograms(
            self.model,
            engine_programs.EngineConfig(
                max_rows=self.batch,
                max_length=self.max_length,
                page_size=PAGE_SIZE,
                steps_per_call=64,
                sampling_cfg=sampling.SamplingConfig(temperature=0.9),
                eos_ids=self.model.eos_ids,
                dtype="bfloat16",
                attention=self.attention,
            ),
            chosen,
            self.mesh,
        )
        layered = jax.eval_shape(
            model_params.unstack, model_params.abstract(self.model, "bfloat16")
        )
        sync = weight_sync.WeightSync(
            self.model,
            source=self.mesh,
            targets=[self.mesh],
            dtype="bfloat16",
            pool=programs.ProgramPool(),
        )
        return made, engine_programs.abstract_of(layered, sync.placed[0])

    def lower(self) -> jax.stages.Lowered:
        """Lowers the program that an engine runs."""
        made, weights = self.program()
        # Kernels' compilers ask which device they are for.
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return made.decoding(weights, self.batch, self.strategy).lower()

    def cost(self, platform: str) -> step_costs.Cost:
        """Counts one step, all levels drafted."""
        made, weights = self.program()
        # What is traced is what the engine lowers, hence the private names.
        ends = made._ints(), made._ints()
        rows, settings, per_token = made._rows(self.batch), made.settings, 1
        if self.model.experts is not None:
            # Not as the CPU that interprets it would multiply.
            per_token = self.model.experts.per_token
            kernels = dataclasses.replace(settings.kernels, ragged=True)
            settings = dataclasses.replace(settings, kernels=kernels)
        how = {"settings": settings}
        if self.strategy is None:
            call = functools.partial(decode.decode, **how)
            given = weights, made.abstract_caches.target, rows, *ends
            traced = jax.make_jaxpr(call)(*given)
            return step_costs.of_step(traced, platform, (), per_token)
        strategy = self.strategy.of_batch(self.batch)
        proposer = made._proposer(strategy)
        call = functools.partial(
            speculate.run,
            proposer=proposer,
            rule=chain.RULES[chain.KEYED],
            **how,
        )
        inputs = made._inputs(weights, self.batch, strategy)
        given = weights, made.abstract_caches, rows, inputs, *ends
        grow = expansion.Expansion(strategy, proposer.settings, proposer.cfg, False)
        # Levels are drafted in a loop, or in several of which each has fewer columns.
        last = [1, *(level for level, _ in grow.spans(self.batch))]
        levels = [b - a for a, b in itertools.pairwise(last)]
        traced = jax.make_jaxpr(call)(*given)
        return step_costs.of_step(traced, platform, levels, per_token)


def counted(decoding: Decoding, platform: str) -> step_costs.Cost:
    """Counts a step where no accelerator is described: as a CPU interprets it."""
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices("cpu")[:1])
    return dataclasses.replace(
        decoding, mesh=mesh, attention="mosaic_tpu_interpreted"
    ).cost(platform)


def compiled(decoding: Decoding, chip: str) -> tables.Row:
    """Compiles a program; returns what its compiler says of it, on a device."""
    started = time.perf_counter()
    lowered = decoding.lower()
    lower_s = round(time.perf_counter() - started, 1)
    started, used = time.perf_counter(), time.process_time()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        told = ahead_of_time.first_line(error)
        return {"lower_s": lower_s, "fits": False, "refused": told}
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    is_gpu = CHIPS[chip].platform == "cuda"
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = memory.argument_size_in_bytes + fresh + memory.temp_size_in_bytes
    total += memory.generated_code_size_in_bytes
    return {
        "lower_s": lower_s,
        "compile_s": round(time.perf_counter() - started, 1),
        "compile_cpu_s": round(time.process_time() - used, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "total_bytes": total,
        "hbm_bytes": int(CHIPS[chip].hbm_bytes),
        "fits": total <= CHIPS[chip].hbm_bytes,
        "launches": launches.of_step(program.as_text()) if is_gpu else None,
        "compiler_flops": cost.get("flops"),
        "compiler_bytes": cost.get("bytes accessed"),
    }


def measure(
    cell: tables.Cell, max_length: int, compiled_batches: Sequence[int]
) -> list[tables.Row]:
    """Counts a step, beside a plain one; compiles its program for one chip if asked."""
    name = cell.overrides.get("model", MODEL)
    model, chip = ahead_of_time.ARCHITECTURES[name], CHIPS[cell["chip"]]
    devices = described(cell["chip"])[: chip.num_chips]
    mesh = sharding.make_mesh(1, 1, chip.num_chips, devices=devices)
    strategy = strategy_of(cell["strategy"], cell["batch"])
    asked = Decoding(model, cell["batch"], max_length, strategy, mesh)
    cost = counted(asked, chip.platform)
    plain = counted(dataclasses.replace(asked, strategy=None), chip.platform)
    num_columns = strategy.num_columns(asked.batch) if strategy else asked.batch
    is_compiled = asked.batch in compiled_batches
    told = compiled(asked, cell["chip"]) if is_compiled else {}
    return [
        {
            **cell.overrides,
            "program": str(strategy or PLAIN),
            "num_chips": chip.num_chips,
            "draft_vocab": min(DRAFT_VOCAB, model.vocab_size),
            "columns": num_columns,
            "flops": int(cost.flops),
            "bytes": int(cost.num_bytes),
            "flops_of_plain": round(cost.flops / plain.flops, 3),
            "bytes_of_plain": round(cost.num_bytes / plain.num_bytes, 3),
            "bound_ms": round(chip.bound_s(cost) * 1e3, 3),
            "bound_of_plain": round(chip.bound_s(cost) / chip.bound_s(plain), 3),
            **told,
        }
    ]


def cells(
    model: str, chips: list[str], batches: list[int], strategies: list[str]
) -> list[tables.Cell]:
    """Lists the programs, the middle batch first: each takes a minute or two."""
    order = sorted(batches, key=lambda batch: abs(batch - 64))
    # The first model's cells are older than the choice.
    own = {} if model == MODEL else {"model": model}
    return [
        tables.Cell({**own, "chip": chip, "batch": batch, "strategy": strategy}, None)
        for batch in order
        for chip in chips
        for strategy in (PLAIN, *strategies)
    ]


def check(options: argparse.Namespace) -> None:
    """Refuses what cannot be read."""
    experiment.known(options.model, ahead_of_time.ARCHITECTURES, "model")
    options.chips = experiment.known(options.chips, CHIPS, "chips")
    options.batches = experiment.numbers(options.batches, "batches")
    compiled_batches = filter(None, options.compiled.split(","))
    options.compiled = experiment.numbers(",".join(compiled_batches), "compiled")
    options.strategies = options.strategies.split(",")
    for text in options.strategies:
        strategy_of(text, options.batches[0])


EXPERIMENT = experiment.Experiment(
    slug="step_ahead_of_time",
    text=__doc__,
    title="decode steps of a 7B model, compiled for an H200 and v5e",
    options=(
        experiment.Option(
            "model",
            MODEL,
            f"one of {', '.join(ahead_of_time.ARCHITECTURES)}",
            recorded=False,
        ),
        experiment.Option("chips", ",".join(CHIPS), recorded=False),
        experiment.Option("batches", "1,32,64,128", recorded=False),
        experiment.Option("strategies", STRATEGIES, recorded=False),
        experiment.Option(
            *("compiled", "64", "batches of which programs are compiled, too"),
            recorded=False,
        ),
        experiment.Option("max-length", 2048, "positions of a row"),
    ),
    constants={"model": MODEL},
    check=check,
    context=ahead_of_time.without_devices,
    cells=lambda options: cells(
        options.model, options.chips, options.batches, options.strategies
    ),
    measure=lambda options, context, cell, max_length: measure(
        cell, max_length, options.compiled
    ),
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
