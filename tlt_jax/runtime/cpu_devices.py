"""Simulated devices on CPUs, so that several rollout workers have one each."""

import os

import jax

from tlt_jax import config

_COUNT_FLAG = "xla_force_host_platform_device_count"


def prepare(run: config.RunConfig) -> None:
    """Make as many CPU devices as the run's workers need; before JAX has any.

    They have one pool of threads in common. Native kernels, where decoding spends its
    time, take their device's share of it (`cpu_kernels.ffi`), as if it were a device of
    so many cores; what XLA computes itself, a drafter's training among it, may use any
    core. (No setting of XLA prevents that: `xla_cpu_multi_thread_eigen` is without
    effect, jax 0.10, 0.11.) Workers in processes of their own share no threads, see
    `launch`.
    Accelerators, and devices that the user has asked for, are left as they are.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    tensor = max(run.mesh.tensor, 1)
    # Of separate workers each process has one, and the learner's none.
    is_separate = run.workers.placement == "separate"
    num_engines = 1 if is_separate else run.workers.num
    wanted = num_engines * (run.rollout.tensor or tensor)
    # Whole groups of the learner's.
    wanted = -(-wanted // tensor) * tensor
    if wanted == 1 or _COUNT_FLAG in flags or jax.config.jax_num_cpu_devices > 0:
        return
    jax.config.update("jax_num_cpu_devices", wanted)
