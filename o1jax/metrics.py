"""Where numbers go: a JSON Lines file, TensorBoard, W&B, and the terminal.

`metrics.jsonl` is the record: one row per iteration, on disk before `write`
returns. A checkpoint keeps its `cursor`, and a resumed run cuts the file back
to it, so that rows written after the checkpoint are not there twice. Fields
whose name ends in `_seconds` are times; all others repeat on a rerun.

`Table` and `progress` speak to the person watching: a row per iteration, and a
bar with the time left where the output is a terminal, else a plain line now
and then. Only what is printed depends on the clock, never what is done.
"""

import functools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np

_COMPILATION = "/jax/core/compile/backend_compile_duration"

Scalars = Mapping[str, Any]


class JsonlWriter:
  """Appends one JSON object per write: {"name": value, ...}.

  Numbers that JSON lacks (nan, infinities) are written as strings.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self._file = open(self.path, "ab")

  def cursor(self) -> int:
    """Bytes written so far, for the checkpoint."""
    return self._file.tell()

  def truncate_to(self, cursor: int) -> None:
    """Drops the rows written after `cursor`.

    Raises:
      ValueError: the file is shorter than that: it is not the run's own.
    """
    size = self.path.stat().st_size
    if size < cursor:
      raise ValueError(
        f"{self.path} has {size} bytes, but the checkpoint saw {cursor}: the "
        "file was replaced or cut; restore it or start in another workdir"
      )
    self._file.truncate(cursor)
    self._file.seek(cursor)
    os.fsync(self._file.fileno())

  def write(self, values: Scalars) -> None:
    """Writes a row; "/" in a name makes groups."""
    row = {name: _json_value(value) for name, value in values.items()}
    self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads the rows of a JSON Lines file; a cut last line is left out.

  Raises:
    ValueError: another line is not JSON; names the file and the line.
  """
  rows = []
  lines = pathlib.Path(path).read_text().split("\n")
  # Every complete row ends in a newline: what follows the last one was cut.
  for number, line in enumerate(lines[:-1], 1):
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError as error:
      raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
  return rows


class TensorBoardWriter:
  """Writes TensorBoard event files, without TensorFlow; numbers only."""

  def __init__(self, directory: str | os.PathLike):
    from tensorboardX import SummaryWriter

    self._writer = SummaryWriter(str(directory))

  def write(self, iteration: int, values: Scalars) -> None:
    for name, value in values.items():
      if value is not None and not isinstance(value, str):
        self._writer.add_scalar(name, float(value), iteration)
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class WandbWriter:
  """Writes to Weights & Biases, the hosted tracker; numbers only.

  Needs the package wandb, and an account unless WANDB_MODE is "offline" or
  "disabled"; all that wandb reads from the environment holds here too. The id
  of the run is kept in its directory, so that a resumed run goes on with the
  same curves: iterations that are run again repeat their numbers, and the
  service keeps the first.
  """

  def __init__(
    self,
    project: str,
    name: str,
    config: Scalars,
    *,
    directory: str | os.PathLike,
  ):
    """Starts the run, or takes up the one of this directory.

    Args:
      project: project that the run belongs to.
      name: what the run is called.
      config: hyper-parameters, nested mappings of plain values.
      directory: there already; where wandb puts its files and the id.

    Raises:
      ValueError: no project, wandb is not installed, or it does not start.
    """
    if not project:
      raise ValueError("project='' names no project of Weights & Biases")
    try:
      import wandb
    except ImportError as error:
      raise ValueError(
        "Weights & Biases is not installed: pip install wandb, or leave "
        "metrics.wandb_project empty"
      ) from error

    id_path = pathlib.Path(directory) / "wandb_run_id"
    known = id_path.read_text().strip() if id_path.exists() else None
    try:
      self._run = wandb.init(
        project=project,
        name=name,
        config=config,
        dir=str(directory),
        id=known,
        resume="allow",
      )
    except wandb.Error as error:
      # Its messages have several lines.
      cause = " ".join(str(error).split())
      raise ValueError(
        f"Weights & Biases does not start ({cause}): log in with wandb login, "
        "set WANDB_MODE=offline, or leave metrics.wandb_project empty"
      ) from error
    if known is None:
      id_path.write_text(f"{self._run.id}\n")

  def write(self, iteration: int, values: Scalars) -> None:
    """Writes the numbers of an iteration; "/" in a name makes groups."""
    numbers = {
      name: float(value)
      for name, value in values.items()
      if value is not None and not isinstance(value, str)
    }
    self._run.log(numbers, step=iteration)

  def close(self) -> None:
    """Sends what is left to send."""
    self._run.finish()


class Table:
  """Prints one fixed-width line per row, the header before the first.

  Args:
    columns: (name, format) pairs, as ("greedy", ".1%"); the format applies to
      the value of that name, and a value that is absent prints as "-".
    stream: where to print; standard output as it is at that moment by default.
  """

  def __init__(
    self, columns: Sequence[tuple[str, str]], stream: TextIO | None = None
  ):
    self._columns = tuple(columns)
    self._stream = stream
    self._has_header = False

  def row(self, values: Scalars) -> None:
    """Prints the row."""
    cells = []
    for name, spec in self._columns:
      cell = format(values[name], spec) if name in values else "-"
      cells.append(cell.rjust(max(len(name), 6)))
    stream = self._stream or sys.stdout
    if not self._has_header:
      self._has_header = True
      names = (name.rjust(max(len(name), 6)) for name, _ in self._columns)
      print("  ".join(names), file=stream)
    print("  ".join(cells), file=stream, flush=True)


def progress(
  items: Iterable[Any],
  label: str,
  total: int,
  *,
  seconds_between_lines: float = 10.0,
  stream: TextIO | None = None,
) -> Iterator[Any]:
  """Yields the items and shows how far along the phase is.

  On a terminal a bar with the time left, below the bar of the phase that it is
  part of; elsewhere one plain line every `seconds_between_lines` and none for a
  phase that ends sooner.

  Args:
    items: what to go through.
    label: name of the phase.
    total: number of items.
    seconds_between_lines: pause between plain lines.
    stream: where to print; standard error as it is at that moment by default.
  """
  stream = stream or sys.stderr
  show = _bar if stream.isatty() else _lines
  return show(items, label, total, seconds_between_lines, stream)


class Clock:
  """Wall time and compilation time since it was made."""

  def __init__(self):
    self._start = self._lap = time.monotonic()
    self._compiled = _compile_seconds()

  def lap(self) -> float:
    """Seconds since the last lap."""
    before, self._lap = self._lap, time.monotonic()
    return self._lap - before

  def total(self) -> float:
    """Seconds since the clock was made."""
    return time.monotonic() - self._start

  def compilation(self) -> float:
    """Seconds that XLA compiled (or read its cache) since then."""
    return _compile_seconds() - self._compiled


@functools.cache
def _compilations() -> list[float]:
  """Durations of all compilations; listens from the first call on."""
  durations: list[float] = []

  def listen(event, seconds, **unused):
    if event == _COMPILATION:
      durations.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  return durations


def _compile_seconds() -> float:
  return sum(_compilations())


# The display on the terminal while a bar is shown: there is one at a time.
_open_displays: list[Any] = []


def _bar(items, label, total, unused_seconds, stream):
  if _open_displays:
    display = _open_displays[0]
    task = display.add_task(label, total=total)
    try:
      yield from _advance(display, task, items)
    finally:
      display.remove_task(task)
    return
  from rich.console import Console
  from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
  )

  columns = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("left"),
    TimeRemainingColumn(),
  )
  display = Progress(
    *columns,
    console=Console(file=stream),
    transient=True,
    # What is piped into a file stays out of the terminal.
    redirect_stdout=sys.stdout.isatty(),
  )
  with display:
    _open_displays.append(display)
    try:
      yield from _advance(display, display.add_task(label, total=total), items)
    finally:
      _open_displays.clear()


def _advance(display, task, items):
  for item in items:
    yield item
    display.advance(task)


def _lines(items, label, total, seconds_between_lines, stream):
  start = last = time.monotonic()
  for count, item in enumerate(items, 1):
    yield item
    now = time.monotonic()
    if now - last >= seconds_between_lines and count < total:
      last = now
      left = (now - start) / count * (total - count)
      print(
        f"{label}: {count}/{total}, {_duration(left)} left",
        file=stream,
        flush=True,
      )


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _json_value(value: Any) -> Any:
  """A Python number, bool or string for a scalar of any array library."""
  if isinstance(value, (str, bool)) or value is None:
    return value
  value = np.asarray(value).item()
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value
