"""Train: `python -m tlt_jax.main --config=configs/<recipe>.py --workdir=DIR`.

Any setting of the recipe is overridden by `--config.key=value`; `tlt_jax/config.py`
lists them with their meaning. The same command on the same directory resumes.
"""

from absl import flags, logging

from tlt_jax import (
    checkpoint,
    command_line,
    compile_cache,
    config,
    cpu_devices,
    failures,
    metrics,
    train,
    workdir,
)

_CONFIG = command_line.define_config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the run: config, metrics, rollouts, checkpoints, plots.",
    required=True,
)


def main(run: config.RunConfig) -> None:
    """Run one configuration; what a user can mend is one line, not a traceback."""
    cpu_devices.prepare(run)
    compile_cache.enable()
    if not flags.FLAGS["verbosity"].present:
        # Libraries report every file they write; the run has its own display.
        logging.set_verbosity(logging.WARNING)
    try:
        train.train(run, _WORKDIR.value)
    except (
        ValueError,
        failures.TrainingError,
        checkpoint.CheckpointError,
        metrics.MetricsError,
        workdir.WorkdirError,
    ) as error:
        if logging.level_debug():
            raise
        command_line.fail(f"{error} (--verbosity=1 shows where)")


if __name__ == "__main__":
    command_line.run(main, _CONFIG)
