"""Write a run's report: `python -m tlt_jax.report --workdir=DIR [--out=FILE]`.

At any time, while the run goes on too.
"""

from collections.abc import Sequence

from absl import app, flags

from tlt_jax.runtime import command_line
from tlt_jax.viz import report
from tlt_jax.workdir import metrics


def _main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        command_line.fail(
            f"unexpected argument {argv[1]!r}: every setting is a --flag."
        )
    try:
        values = flags.FLAGS
        print(report.write(values.workdir, values.out, values.num_answers))
    except OSError as error:
        command_line.fail(
            f"--out={error.filename} could not be written ({error.strerror}): name a "
            "file in a directory that is there and may be written."
        )
    except (metrics.MetricsError, ValueError) as error:
        command_line.fail(error)


if __name__ == "__main__":
    # Here, because the run's program defines a flag of this name too.
    flags.DEFINE_string("workdir", None, "The run's directory.", required=True)
    flags.DEFINE_string("out", None, "The file; by default report.html in the workdir.")
    flags.DEFINE_integer("num_answers", 8, "Sample answers shown.", lower_bound=0)
    app.run(_main, flags_parser=command_line.parse_flags)
