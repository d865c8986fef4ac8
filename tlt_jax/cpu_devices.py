"""Simulated devices on CPUs, so that several rollout workers have one each."""

import os

import jax

from tlt_jax import config

_COUNT_FLAG = "xla_force_host_platform_device_count"
_THREADS_FLAG = "--xla_cpu_multi_thread_eigen=false"


def prepare(run: config.RunConfig) -> None:
    """Make as many CPU devices as the run's workers need; before JAX has any.

    Each then computes with one thread of its own, as if it were a device of one core:
    a worker that waits leaves a core idle, and nothing else. (Native kernels see to it
    themselves, see `cpu_kernels.ffi`.) Accelerators, and devices
    that the user has asked for, are left as they are.

    Args:
      run: its workers and its mesh are read.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    tensor = max(run.mesh.tensor, 1)
    wanted = run.workers.num * (run.rollout.tensor or tensor)
    # Whole groups of the learner's.
    wanted = -(-wanted // tensor) * tensor
    if wanted == 1 or _COUNT_FLAG in flags or jax.config.jax_num_cpu_devices > 0:
        return
    jax.config.update("jax_num_cpu_devices", wanted)
    if wanted >= _num_cores():
        os.environ["XLA_FLAGS"] = f"{flags} {_THREADS_FLAG}".strip()


def _num_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
