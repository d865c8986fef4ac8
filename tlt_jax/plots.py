"""Draw a run's plots again: `python -m tlt_jax.plots --workdir=DIR`, at any time."""

from collections.abc import Sequence

from absl import app, flags

from tlt_jax.runtime import command_line
from tlt_jax.viz import plots


def _main(argv: Sequence[str]) -> None:
    del argv
    for path in plots.draw_all(flags.FLAGS.workdir):
        print(path)


if __name__ == "__main__":
    # Here, because the run's program defines a flag of this name too.
    flags.DEFINE_string("workdir", None, "The run's directory.", required=True)
    app.run(_main, flags_parser=command_line.parse_flags)
