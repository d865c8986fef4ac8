"""The record of a run at Weights & Biases, beside metrics.jsonl and TensorBoard.

The package wandb is asked for by name (`log.wandb`) and imported then alone.
"""

import importlib.util
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any, Literal

from tlt_jax import config
from tlt_jax.settings import schema
from tlt_jax.workdir import metrics

# Made once for a workdir, so that a resumed run goes on in the same W&B run.
ID_FILE = "wandb_id"


class WandbLog:
    """Sends every row's numbers to one run of Weights & Biases.

    What it has of a step it keeps: a row that a resumed run writes again is the same.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path,
        mode: Literal["online", "offline"],
        project: str,
        settings: Mapping[str, Any],
    ):
        """Begin, or go on, with the run's nested settings.

        What W&B writes lies in the workdir's folder `wandb`; the mode `offline` writes
        files alone, for `wandb sync` to send later.

        Raises:
          metrics.MetricsError: the package is missing, or the run cannot be begun.
        """
        if importlib.util.find_spec("wandb") is None:
            raise metrics.MetricsError(
                f"log.wandb={mode!r} needs the package wandb, which is not installed: "
                "pip install wandb, or pip install -e '.[wandb]', or set log.wandb to "
                "off."
            )
        import wandb

        workdir = pathlib.Path(workdir).absolute()
        id_file = workdir / ID_FILE
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
        try:
            self._run = wandb.init(
                project=project,
                name=workdir.name,
                dir=str(workdir),
                id=id_file.read_text(encoding="utf-8").strip(),
                resume="allow",
                mode=mode,
                config=dict(settings),
                # What is printed belongs to the display.
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise metrics.MetricsError(
                f"log.wandb={mode!r} could not begin a run ({error}): log in with "
                "`wandb login`, or set log.wandb to offline and send the run later "
                f"with `wandb sync {workdir / 'wandb'}/offline-run-*`."
            ) from error

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of one row."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Wait until everything is sent, or on disk."""
        self._run.finish()


def open_writer(
    workdir: str | pathlib.Path, first_step: int, run: config.RunConfig
) -> metrics.MetricsWriter:
    """Open the record of a run as its settings say; see `metrics.MetricsWriter`.

    Raises:
      metrics.MetricsError: as `metrics.MetricsWriter` and `WandbLog`.
    """
    log, more = run.log, []
    if log.wandb != "off":
        settings = schema.to_dict(run)
        more.append(WandbLog(workdir, log.wandb, log.wandb_project, settings))
    return metrics.MetricsWriter(workdir, first_step, log.tensorboard, more)
