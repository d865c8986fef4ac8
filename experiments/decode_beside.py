"""What a worker's decoding costs while the rest of the machine does something else.

One worker of a recipe, on its simulated device, decodes one row over and over, by turns
with the other cores idle, beside a process that computes in registers and caches alone,
and beside one that streams memory: what training on another core may cost at least, and
at most. `experiments.trainer_makespan` runs this module as a process of its own, with a
recipe's flags and --json=FILE, and prints what it finds beside what a training does
cost.
"""

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import jax
from absl import flags

from experiments.lab import prompts, tables
from tlt_jax import assembly, config, policy, speculation, types
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import request_queue
from tlt_jax.runtime import (
    command_line,
    compile_cache,
    cpu_devices,
    host_memory,
    sharding,
)

ALONE = "alone"
# Programs of one thread.
HOGS = {
    "computing": "a = np.ones((96, 96), np.float32)\nwhile True: a @ a",
    "streaming": "a = np.ones((2, 1 << 26), np.float32)\nwhile True: a[0] = a[1]",
}
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
_SETTLE_S = 0.5

_CONFIG = command_line.define_config_flag()
_JSON = flags.DEFINE_string("json", None, "Where the result goes.", required=True)
_ROUNDS = flags.DEFINE_integer("rounds", 4, "Measurements of each.")
_TOKENS = flags.DEFINE_integer("tokens", 96, "Tokens of a measurement.")


@contextlib.contextmanager
def hog(name: str):
    """Keeps a core busy while the context lasts; `alone` does not."""
    if name == ALONE:
        yield
        return
    command = [sys.executable, "-c", f"import numpy as np\n{HOGS[name]}"]
    with subprocess.Popen(command, env=os.environ | ONE_THREAD) as process:
        try:
            time.sleep(_SETTLE_S)
            yield
        finally:
            process.kill()


def engine_of(run: config.RunConfig, model: policy.Policy) -> engine_lib.Engine:
    """Makes one worker of a recipe, with its drafter if that is ready."""
    made = speculation.of_run(run, model.config)
    device = jax.devices()[-1]
    mesh = sharding.make_mesh(1, 1, 1, [device])
    law = assembly.law_of(run.sampling)
    engine = assembly.engine_of_run(run, model.config, model.tokenizer, law, made, mesh)
    engine.set_params(jax.device_put(model.params, device), 1)
    if made.params is not None:
        engine.offer_drafter(made.params, 1)
    return engine


def step_ms(engine: engine_lib.Engine, model: policy.Policy, number: int) -> float:
    """Decodes a row; returns milliseconds of a decode step."""
    text = prompts.CHAT[number % len(prompts.CHAT)]
    tokens = model.tokenizer.encode_prompt(prompts.as_messages(text))
    request = types.Request(number, 0, 0, tokens, _TOKENS.value)
    queue = request_queue.RequestQueue([request], num_workers=1)
    stats = engine.serve(queue.share(0), 0, on_completion=lambda completion: None)
    return 1e3 * stats.decode_s / stats.num_steps


def main(run: config.RunConfig) -> None:
    """Measures; writes `{"alone": ms, ...}`, medians."""
    host_memory.keep_freed()
    cpu_devices.prepare(run)
    compile_cache.enable()
    model = policy.load(run.model.spec, run.precision)
    engine = engine_of(run, model)
    step_ms(engine, model, 0)
    found: dict[str, list[float]] = {name: [] for name in (ALONE, *HOGS)}
    for number in range(_ROUNDS.value):
        for name, values in found.items():
            with hog(name):
                values.append(step_ms(engine, model, number))
    row: tables.Row = {name: statistics.median(found[name]) for name in found}
    pathlib.Path(_JSON.value).write_text(json.dumps(row), "utf-8")


if __name__ == "__main__":
    command_line.run(main, _CONFIG)
