"""Where a run's record goes besides metrics.jsonl: TensorBoard, W&B, Trackio.

Each gets every row's numbers, the run's settings, and a few sampled completions where
they are kept. A package that is not asked for by name is not imported.
"""

import contextlib
import importlib.util
import io
import json
import pathlib
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.plugins.text import summary_v2 as text_plugin
from tensorboard.summary.writer import event_file_writer

from tlt_jax import config
from tlt_jax.settings import schema
from tlt_jax.workdir import metrics

TENSORBOARD = "tensorboard"
# Made once for a workdir, so that a resumed run goes on in the same run elsewhere.
ID_FILE = "wandb_id"
TRACKIO_FILE = "trackio_name"
_COLUMNS = ("reward", "text", "prompt", "answer")


class TensorBoard(metrics.Sink):
    """Event files in the workdir's folder `tensorboard`."""

    def __init__(
        self,
        workdir: str | pathlib.Path,
        first_step: int,
        settings: Mapping[str, Any] | None = None,
    ):
        """Begin at a step, with a run's settings by dotted name.

        TensorBoard forgets what it has read of this step and later ones.
        """
        folder = pathlib.Path(workdir) / TENSORBOARD
        self._events = event_file_writer.EventFileWriter(str(folder))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(event_pb2.Event(step=first_step, session_log=start))
        if settings is not None:
            plain = {key: _plain(value) for key, value in settings.items()}
            name = pathlib.Path(workdir).resolve().name
            self._summary(first_step, hparams.hparams_pb(plain, trial_id=name))
            told = "\n".join(f"    {key} = {value}" for key, value in plain.items())
            self._summary(first_step, text_plugin.text_pb("settings", told))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write scalars."""
        summary = summary_pb2.Summary()
        for tag, number in numbers.items():
            summary.value.add(tag=tag, simple_value=number)
        self._summary(step, summary)

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Write texts, one below the other."""
        for number, row in enumerate(_table(records), 1):
            told = f"**reward {row[0]:.4g}**"
            for name, value in zip(_COLUMNS[1:], row[1:], strict=True):
                # Indented, or Markdown takes what a model says for its own.
                lines = "\n".join(f"    {line}" for line in str(value).splitlines())
                told += f"\n\n{name}\n\n{lines}"
            self._summary(step, text_plugin.text_pb(f"samples/{number}", told))

    def close(self) -> None:
        """Close the file."""
        self._events.close()

    def _summary(self, step: int, summary: summary_pb2.Summary) -> None:
        self._add(event_pb2.Event(step=step, summary=summary))

    def _add(self, event: event_pb2.Event) -> None:
        event.wall_time = time.time()
        self._events.add_event(event)
        self._events.flush()


class WeightsAndBiases(metrics.Sink):
    """One run of Weights & Biases.

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
        _check_installed("wandb", f"log.wandb={mode!r}", "off")
        import wandb

        workdir = pathlib.Path(workdir).absolute()
        try:
            self._run = wandb.init(
                project=project,
                name=workdir.name,
                dir=str(workdir),
                id=_kept(workdir / ID_FILE, uuid.uuid4().hex[:12]),
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
        self._table_of = wandb.Table

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of one row."""
        self._run.log(dict(numbers), step=step)

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Send a table."""
        table = self._table_of(columns=list(_COLUMNS), data=_table(records))
        self._run.log({"samples": table}, step=step)

    def close(self) -> None:
        """Wait until everything is sent, or on disk."""
        self._run.finish()


class Trackio(metrics.Sink):
    """One run of Trackio, which keeps it on this machine: `trackio show` displays it.

    Its own variables, such as TRACKIO_SPACE_ID, send it elsewhere.
    """

    def __init__(
        self, workdir: str | pathlib.Path, project: str, settings: Mapping[str, Any]
    ):
        """Begin, or go on, with the run's nested settings.

        Raises:
          metrics.MetricsError: the package is missing, or the run cannot be begun.
        """
        _check_installed("trackio", "log.trackio=True", "False")
        import trackio

        workdir = pathlib.Path(workdir).absolute()
        # Runs are found by their names: two workdirs may be called alike.
        new = f"{workdir.name}-{uuid.uuid4().hex[:6]}"
        name = _kept(workdir / TRACKIO_FILE, new)
        try:
            with _silent():
                self._run = trackio.init(
                    project=project,
                    name=name,
                    resume="allow",
                    config=dict(settings),
                    embed=False,
                )
        except Exception as error:  # of its database, its client, or the disk
            raise metrics.MetricsError(
                f"log.trackio=True could not begin a run ({error}): mend that, or set "
                "log.trackio to False."
            ) from error
        self._trackio = trackio

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Keep the numbers of one row."""
        self._run.log(dict(numbers), step=step)

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Keep a table."""
        table = self._trackio.Table(columns=list(_COLUMNS), data=_table(records))
        self._run.log({"samples": table}, step=step)

    def close(self) -> None:
        """Wait until everything is kept."""
        with _silent():
            self._trackio.finish()


def open_writer(
    workdir: str | pathlib.Path, first_step: int, run: config.RunConfig
) -> metrics.MetricsWriter:
    """Open the record of a run as its settings say; see `metrics.MetricsWriter`.

    Raises:
      metrics.MetricsError: as `metrics.MetricsWriter`, or a sink cannot be had.
    """
    log, settings = run.log, json.loads(config.to_json(run))
    sinks: list[metrics.Sink] = []
    if log.wandb != "off":
        sinks.append(WeightsAndBiases(workdir, log.wandb, log.project, settings))
    if log.trackio:
        sinks.append(Trackio(workdir, log.project, settings))
    writer = metrics.MetricsWriter(workdir, first_step, sinks)
    if log.tensorboard:
        leaves = dict(schema.leaves(run))
        writer.sinks.append(TensorBoard(workdir, first_step, leaves))
    return writer


def _check_installed(package: str, setting: str, off: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise metrics.MetricsError(
            f"{setting} needs the package {package}, which is not installed: pip "
            f"install {package}, or pip install -e '.[{package}]', or set "
            f"{setting.partition('=')[0]} to {off}."
        )


def _kept(path: pathlib.Path, new: str) -> str:
    """Return what a file of one line holds; it is made if it is not there."""
    if not path.exists():
        path.write_text(new + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _silent() -> contextlib.AbstractContextManager:
    """What is printed belongs to the display."""
    return contextlib.redirect_stdout(io.StringIO())


def _table(records: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Make rows of `_COLUMNS` of kept completions; messages become text."""
    rows = []
    for record in records:
        prompt = record["prompt"]
        if not isinstance(prompt, str):
            prompt = "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        rows.append([record["reward"], record["text"], prompt, record["answer"] or ""])
    return rows


def _plain(value: Any) -> bool | int | float | str:
    """Make of a setting what TensorBoard takes for one."""
    return value if isinstance(value, bool | int | float | str) else str(value)
