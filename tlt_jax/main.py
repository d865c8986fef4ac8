"""Train: `python -m tlt_jax.main --config=configs/<recipe>.py --workdir=DIR`.

Any setting of the recipe is overridden by `--config.key=value`; `--help` lists them
with their meaning. The same command on the same directory resumes. Several processes of
one machine are started by `tlt_jax.launch`.
"""

from absl import flags

from tlt_jax import assembly, config, train
from tlt_jax.rl.tasks import reward_workers
from tlt_jax.runtime import (
    command_line,
    compile_cache,
    cpu_devices,
    distributed,
    host_memory,
    stopping,
)

_CONFIG = command_line.define_config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the run: config, metrics, rollouts, checkpoints, plots.",
    required=True,
)
_CLUSTER = flags.DEFINE_boolean(
    "cluster",
    False,
    "This is one of several processes that the cluster's launcher (Slurm, Open MPI, "
    "Kubernetes, TPU pods) has started; JAX finds the others.",
)


def main(run: config.RunConfig) -> None:
    """Run one configuration; what a user can mend is one line, not a traceback."""
    # First of all, as others begin threads.
    host_memory.keep_freed()
    with command_line.told(), stopping.heard() as stop:
        judged = distributed.reward_meetings()
        if judged and judged[0].worker is not None:
            reward_workers.serve(run, judged, assembly.about_workers(run))
            return
        distributed.initialize(_CLUSTER.value)
        cpu_devices.prepare(run)
        compile_cache.enable()
        meeting = distributed.meeting()
        if meeting is not None and meeting.worker is not None:
            assembly.roll_out(run, _WORKDIR.value, meeting)
        else:
            train.train(run, _WORKDIR.value, stop)


if __name__ == "__main__":
    command_line.run(main, _CONFIG)
