"""What `experiments.first_contact` measures, item by item, in a process of its own.

    python -m experiments.first_contact --budget-s=420

starts it. Each item yields rows as it finds them, at sizes of a 7B model or at toy
sizes. Nothing here needs a network, a file of weights, recipes or what only they need.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import gc
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments import deadlines, decode_bandwidth
from experiments.lab import experiment, random_drafter, random_engine, tables
from tlt_jax import config, train
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.pallas_kernels.verify_attention import (
    api,
    arg_specs,
    bench,
    page_layout,
)
from tlt_jax.runtime import compile_cache
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.workdir import metrics

PLAIN = "plain"
_KERNELS_TOLD = 40


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
      model, dtype: of `decode_bandwidth.DESCRIBED`, with random weights.
      copied_bytes: of a copy.
      specs: arguments of kernels that are timed; `implementations` beside ours.
      right: arguments on which kernels are compared with the reference.
      context, steps: of decoding.
      batches: rows at a time.
      verified: nodes of a chain that is verified.
      new_tokens: of an answer.
      equal_rows, equal_tokens, equal_strategies: whose tokens are compared.
      run: settings of the tiny run above `TINY_RUN`.
    """

    model: str
    dtype: str
    copied_bytes: int
    specs: tuple[str, ...]
    implementations: tuple[str, ...]
    right: tuple[arg_specs.ArgSpec, ...]
    context: int
    steps: int
    page_size: int
    batches: tuple[int, ...]
    verified: tuple[int, ...]
    new_tokens: int
    equal_rows: int
    equal_tokens: int
    equal_strategies: tuple[str, ...]
    run: tuple[tuple[str, object], ...] = ()


DEVICE = Sizes(
    model="qwen2.5-7b",
    dtype="bfloat16",
    copied_bytes=2**32,
    specs=("decode_b1_8k", "decode_b32_8k", "verify_b32_8k_w16"),
    implementations=bench.PEERS,
    right=arg_specs.SUITE,
    context=8192,
    steps=128,
    page_size=128,
    batches=(1, 32),
    verified=(4, 8, 16),
    new_tokens=256,
    equal_rows=12,
    equal_tokens=192,
    equal_strategies=("D4K1V5-ngram", "D4K1V5", "D3K2V8"),
)
TOY = Sizes(
    model="tiny",
    dtype="float32",
    copied_bytes=2**20,
    specs=("decode",),
    implementations=("reference",),
    right=(arg_specs.by_name("decode"),),
    context=8,
    steps=16,
    page_size=16,
    batches=(1, 2),
    verified=(2,),
    new_tokens=8,
    equal_rows=2,
    equal_tokens=24,
    equal_strategies=("D4K1V5-ngram",),
    run=(("num_steps", 2), ("pretrain.steps", 20), ("rollout.max_new_tokens", 16)),
)
# configs/tiny.py:count as values, since recipes need a package that may be lacking.
TINY_RUN = {
    "model.spec": "scratch",
    "model.remat": "none",
    "task.name": "count",
    "task.max_prompt_tokens": 8,
    "task.options": {"max_n": 32},
    "pretrain.noise_frac": 0.7,
    "pretrain.steps": 400,
    "pretrain.num_rows": 8,
    "rollout.prompts_per_step": 16,
    "rollout.group_size": 8,
    "rollout.max_batch": 32,
    "rollout.prefill_chunk": 16,
    "rollout.max_new_tokens": 96,
    "rollout.steps_per_call": 16,
    "cache.page_size": 16,
    "optimizer.learning_rate": 5e-4,
    "drafter.features": "last",
    "learner.row_tokens": 256,
    "algorithm.name": "grpo",
    "algorithm.kl_coef": 0.0,
    "reward.workers": 0,
}
OF_HERE = {
    "num_steps": 6,
    "checkpoint.every": 0,
    "log.progress": "off",
    "log.tensorboard": False,
    "log.plots_every": 0,
    "specdec.tuner": "static",
    "specdec.strategies": ("32:D4K1V5",),
    "adaptation.row_tokens": 128,
    "adaptation.row_bases": 96,
    "adaptation.num_rows": 4,
}


def copy_bandwidth(sizes: Sizes) -> Iterator[tables.Row]:
    """Reads and writes a large array on the device; moves one to it and back."""
    count = sizes.copied_bytes // 4
    turn = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = jax.block_until_ready(turn(jnp.zeros(count, jnp.float32)))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(4):
            array = turn(array)
        jax.block_until_ready(array)
        times.append((time.perf_counter() - started) / 4)
    rate = 2 * sizes.copied_bytes / min(times) / 1e9
    kind = jax.devices()[0].device_kind
    row = {"case": "copy on the device", "gb_per_s": rate, "device": kind}
    if published := bench.BANDWIDTH.get(kind):
        row["of_published"] = rate * 1e9 / published
    yield row
    host = np.ones(min(count, 2**26), np.float32)
    for case, move in (("to it", jax.device_put), ("from it", np.asarray)):
        times = []
        for _ in range(3):
            given = host if case == "to it" else jax.device_put(host) + 0
            jax.block_until_ready(given)
            started = time.perf_counter()
            jax.block_until_ready(move(given))
            times.append(time.perf_counter() - started)
        yield {"case": case, "gb_per_s": host.nbytes / min(times) / 1e9}


def kernels_right(sizes: Sizes) -> Iterator[tables.Row]:
    """Compares our kernel with the reference, computed by the CPU in float32."""
    name = api.for_platform(jax.default_backend())
    # On CPUs the suite of the tests interprets the kernels.
    kernel = api.Implementation(name or "triton_gpu", interpret=name is None)
    for spec in sizes.right:
        given = arg_specs.make(spec)
        exact = {
            key: value.astype(np.float32)
            if value is not None and key in ("query", "keys", "values", *_CACHE)
            else value
            for key, value in given.items()
        }
        how = {"scale": spec.scale, "window": spec.window, "soft_cap": spec.soft_cap}
        with jax.default_device(jax.devices("cpu")[0]):
            wanted, _ = api.verify_attention(
                **exact, **how, implementation=api.Implementation("reference")
            )
        packing = page_layout.packing(kernel.name, spec.page_size, spec.head_dim)
        if name is None:
            packing = 1
        room = page_layout.padded(spec.head_dim, packing) - spec.head_dim
        for pages in _CACHE:
            wide = np.pad(given[pages], [(0, 0)] * 3 + [(0, room), (0, 0)])
            given[pages] = page_layout.pack(wide, packing)
        call = functools.partial(
            api.verify_attention, **how, packing=packing, implementation=kernel
        )
        found, _ = jax.jit(call)(**given)
        found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
        # As tests/pallas_kernels has it: bfloat16 rounds weights, and the output.
        atol, rtol = (5e-6, 0) if spec.dtype == "float32" else (5e-3, 2**-8)
        error = np.abs(found - wanted)
        yield {
            "case": spec.name,
            "implementation": kernel.name,
            "max_error": float(error.max()),
            "is_right": bool((error <= atol + rtol * np.abs(wanted)).all()),
        }


_CACHE = ("cache_keys", "cache_values")


def kernel_bench(sizes: Sizes) -> Iterator[tables.Row]:
    """Times our attention kernel beside jax's own."""
    ours = api.for_platform(jax.default_backend())
    bandwidth = bench.copy_bandwidth(num_bytes=min(sizes.copied_bytes, 2**30))
    for spec in map(arg_specs.by_name, sizes.specs):
        for name in filter(None, (ours, *sizes.implementations)):
            row = bench.measure(spec, name, bandwidth=bandwidth)
            yield {"case": row.pop("arguments"), **row}


@functools.cache
def weights(model: str, dtype: str) -> tuple[model_config.ModelConfig, object]:
    """Draws a model's weights, once for all items of a process."""
    options = argparse.Namespace(model=model, dtype=dtype)
    return decode_bandwidth.load(options)


def decoding(sizes: Sizes) -> Iterator[tables.Row]:
    """Times plain decode steps behind a context, and what runs in them by kernel."""
    cfg, params = weights(sizes.model, sizes.dtype)
    kind, options = jax.devices()[0].device_kind, argparse.Namespace(**vars(sizes))
    for batch in sizes.batches:
        made = decode_bandwidth.Decoder(cfg, params, options, sizes.context, 1.0, batch)
        step_s = float(np.median([made.measure()[0] for _ in range(4)][1:]))
        cached = sizes.context + sizes.steps / 2
        needed = decode_bandwidth.minimal_bytes(cfg, params, batch * cached)
        row = {"case": f"B={batch}", "step_ms": 1e3 * step_s, "minimal_bytes": needed}
        # Noise can exceed what a few steps of a toy take.
        if step_s > 0:
            row["tokens_per_s"] = batch / step_s
            row["gb_per_s"] = needed / step_s / 1e9
        yield row | {"model": sizes.model, "dtype": sizes.dtype, "device": kind}
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                made.seconds(sizes.steps // 4)
            for told in kernel_table(pathlib.Path(folder), sizes.steps // 4):
                yield {"table": "kernels", "case": f"B={batch}", **told}
        del made
        gc.collect()


def kernel_table(folder: pathlib.Path, num_steps: int) -> list[tables.Row]:
    """Adds up a trace's events on the device by name, the longest first.

    Without a device's own lines (on CPUs) those of all threads are taken.
    """
    (path,) = folder.rglob("*.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    of_device = [plane for plane in planes if plane.name.startswith("/device:")]
    spent: collections.Counter = collections.Counter()
    times: collections.Counter = collections.Counter()
    for plane in of_device or planes:
        for line in plane.lines:
            # These sum up what other lines have singly.
            if line.name in ("Steps", "XLA Modules", "Framework Ops", "python"):
                continue
            for event in line.events:
                spent[event.name] += event.duration_ns
                times[event.name] += 1
    return [
        {
            "kernel": name[:120],
            "calls_per_step": times[name] / num_steps,
            "us_per_step": nanoseconds / 1e3 / num_steps,
        }
        for name, nanoseconds in spent.most_common(_KERNELS_TOLD)
    ]


def chains(sizes: Sizes) -> list[str]:
    """Names the strategies: chains of so many nodes, found in texts or drafted."""
    return [
        PLAIN,
        *(
            f"D{num - 1}K1V{num}{kind}"
            for num in sizes.verified
            for kind in ("", "-ngram")
        ),
    ]


def speculation(sizes: Sizes) -> Iterator[tables.Row]:
    """Times whole answers with random weights: plain, verified alone, and drafted.

    Next to nothing is accepted, so that a step's time in plain steps is the accept
    length from which on speculation pays. Of `-ngram` nothing is drafted by a model:
    what the others take above it is drafting.
    """
    cfg, params = weights(sizes.model, sizes.dtype)
    for batch in sizes.batches:
        requests = random_engine.requests(
            cfg.vocab_size, batch, sizes.page_size, sizes.new_tokens
        )
        plain_ms = None
        for name in chains(sizes):
            engine = random_engine.make(
                *(cfg, params, batch, _strategy(name)),
                max_length=sizes.page_size + sizes.new_tokens,
                page_size=sizes.page_size,
                dtype=sizes.dtype,
            )
            engine.run(requests, 0)
            completions, stats = engine.run(requests, 1)
            engine.pool.close()
            step_ms = 1e3 * stats.decode_s / stats.num_steps
            plain_ms = plain_ms or step_ms
            num_tokens = sum(len(each.tokens) for each in completions)
            whole_s = stats.prefill_s + stats.fill_s + stats.decode_s
            yield {
                "case": f"B={batch} {name}",
                "step_ms": step_ms,
                "of_plain": step_ms / plain_ms,
                "accept_length": stats.accept_length,
                "tokens_per_s": num_tokens / whole_s,
                "prefill_s": stats.prefill_s,
                "model": sizes.model,
            }
            del engine
            gc.collect()


def tiny_settings(
    mode: str, num_workers: int, more: Sequence[tuple[str, object]] = ()
) -> config.RunConfig:
    """Returns the settings of a run that makes its model on the spot."""
    values: dict = {}
    workers = {"workers.num": num_workers, "mesh.data": num_workers}
    flat = {**TINY_RUN, **OF_HERE, **workers, **dict(more), "specdec.mode": mode}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return config.load(values)


def tiny_run(sizes: Sizes) -> Iterator[tables.Row]:
    """Trains a tiny policy with everything off, and with an adaptive drafter.

    Two workers where there are two devices. What was compiled in the first steps is
    left out of `tokens_per_s`.
    """
    num_workers = min(2, len(jax.devices()))
    digests = {}
    for mode in ("off", "tlt"):
        with tempfile.TemporaryDirectory() as folder:
            run = tiny_settings(mode, num_workers, sizes.run)
            train.train(run, pathlib.Path(folder) / "run")
            found = metrics.read(pathlib.Path(folder) / "run")
        steps = [row for row in found if row["step"]]
        digests[mode] = [row["rollout/tokens_digest"] for row in steps]
        late = steps[len(steps) // 2 :]
        decode_s = sum(row["rollout/decode_s"] for row in late)
        yield {
            "case": f"{mode}, workers={num_workers}",
            "steps": len(steps),
            "tokens_per_s": sum(row["rollout/tokens"] for row in late) / decode_s,
            "accept_length": late[-1].get("specdec/accept_length"),
            "steps_differing": sum(
                ours != plain
                for ours, plain in zip(digests[mode], digests["off"], strict=True)
            ),
            "reward": late[-1]["reward/mean"],
        }


_EQUAL_MODEL = random_drafter.model_of(
    (512, 64, 128, 4, 2, 16, 4), "qwen2", tie_embeddings=False
)
_EQUAL_CASES = (("float32", None), ("float32", "highest"), ("bfloat16", None))


def equality(sizes: Sizes) -> Iterator[tables.Row]:
    """Compares tokens with speculation and without, of a random model, by precision.

    `float32, highest` asks for whole products: accelerators compute those of float32
    with fewer bits unless they are told.
    """
    cfg, rows, page_size = _EQUAL_MODEL, sizes.equal_rows, 16
    requests = random_engine.requests(
        cfg.vocab_size, rows, page_size, sizes.equal_tokens
    )
    for dtype, precision in _EQUAL_CASES:
        drawn = model_params.init(cfg, jax.random.key(0), jnp.dtype(dtype))
        params = model_params.unstack(drawn)
        texts: dict[str, list] = {}
        for name in (PLAIN, *sizes.equal_strategies):
            with jax.default_matmul_precision(precision or "default"):
                engine = random_engine.make(
                    *(cfg, params, rows, _strategy(name)),
                    max_length=page_size + sizes.equal_tokens,
                    page_size=page_size,
                    dtype=dtype,
                    # So cold that texts repeat themselves, and guesses come true.
                    temperature=0.1,
                )
                completions, stats = engine.run(requests, 7)
            engine.pool.close()
            texts[name] = [each.tokens.tolist() for each in completions]
            if name == PLAIN:
                continue
            places = [
                random_engine.first_differing(ours, plain)
                for ours, plain in zip(texts[name], texts[PLAIN], strict=True)
            ]
            changed = [place for place in places if place is not None]
            yield {
                "case": f"{dtype}{', highest' if precision else ''} {name}",
                "rows": rows,
                "rows_equal": rows - len(changed),
                "first_differing": min(changed, default=None),
                "accept_length": stats.accept_length,
            }


def _strategy(name: str) -> strategy_lib.Strategy | None:
    return None if name == PLAIN else strategy_lib.parse(name)


ITEMS: dict[str, Callable[[Sizes], Iterator[tables.Row]]] = {
    "copy": copy_bandwidth,
    "kernels": kernels_right,
    "bench": kernel_bench,
    "decode": decoding,
    "speculation": speculation,
    "tiny_run": tiny_run,
    "equality": equality,
}
_NEED_WEIGHTS = ("decode", "speculation")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the items that are named; `deadlines.run` reads what it tells."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("items", nargs="+")
    options = parser.parse_args(arguments)
    experiment.known(",".join(options.items), ITEMS, "items")
    sizes = TOY if options.toy else DEVICE
    if options.toy:
        # Two workers of a run have a device each.
        jax.config.update("jax_num_cpu_devices", 2)
    compile_cache.enable()

    def measure(name: str) -> Iterator[tables.Row]:
        if name not in _NEED_WEIGHTS:
            weights.cache_clear()
        with contextlib.ExitStack() as closing:
            closing.callback(gc.collect)
            yield from ITEMS[name](sizes)

    deadlines.answer((name, functools.partial(measure, name)) for name in options.items)


if __name__ == "__main__":
    main()
