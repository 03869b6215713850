"""Checkpoints: what survives an iteration, saved whole or not at all.

One checkpoint is one folder, named by its step:

  state/           a pytree of device arrays, written by Orbax
  host.npz         NumPy arrays, such as the experience
  checkpoint.json  small values, the names and shapes of the arrays, and the
                   size and checksum of every file

It is written under another name and renamed when everything is on disk, and
renamed again before it is removed: a process killed at any moment leaves only
whole ones behind, and leftovers that the next start sweeps away. The last one
is kept, the one with the best metric, and every n-th on request.

Restoring first compares every file, then every name, shape and type: a cut
file or another network's checkpoint ends with one line, never with wrong
numbers.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

_STATE, _HOST, _RECORD = "state", "host.npz", "checkpoint.json"
_FIELDS = ("meta", "metric", "leaves", "files")
_UNFINISHED = "unfinished-"
_DELETED = "deleted-"
_TRIAL = "room.tmp"


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint read back.

  Attributes:
    state: pytree of arrays, placed as the target asked.
    host: NumPy arrays by name.
    meta: JSON values by name.
  """

  state: Any
  host: dict[str, np.ndarray]
  meta: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run.

  Args:
    directory: made at the first save. One process may write to it; others open
      it with `read_only`.
    keep_every: besides the last and the best, keep every so many steps; they
      count from 0, so 10 keeps 9, 19, 29. 0 keeps none.
    read_only: never write or sweep.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    keep_every: int = 0,
    read_only: bool = False,
  ):
    self.directory = pathlib.Path(directory).resolve()
    self._keep_every = keep_every
    self._read_only = read_only
    if not read_only:
      self._sweep()

  def steps(self) -> list[int]:
    """Steps that have a whole checkpoint, ascending."""
    if not self.directory.is_dir():
      return []
    return sorted(
      int(path.name)
      for path in self.directory.iterdir()
      if path.name.isdecimal() and (path / _RECORD).is_file()
    )

  def latest(self) -> int | None:
    """The last step, None where nothing was saved."""
    steps = self.steps()
    return steps[-1] if steps else None

  def best(self) -> int | None:
    """The step with the highest metric, the earliest of equals."""
    metrics = {step: self._read_record(step)["metric"] for step in self.steps()}
    metrics = {step: m for step, m in metrics.items() if m is not None}
    return max(metrics, key=metrics.__getitem__) if metrics else None

  def save(
    self,
    step: int,
    *,
    state: Any,
    host: Mapping[str, np.ndarray],
    meta: Mapping[str, Any],
    metric: float | None = None,
  ) -> None:
    """Saves and returns when it is on disk; then drops what need not be kept.

    Args:
      step: later than all that were saved.
      state: pytree of jax arrays, typed keys among them.
      host: NumPy arrays by name; numbers, booleans or texts, no objects.
      meta: JSON values by name.
      metric: the higher, the better; None where it was not measured.

    Raises:
      OSError: nothing was saved (disk full, no permission); the checkpoints
        from before are untouched.
      ValueError: `step` is not later than the last.
    """
    assert not self._read_only, "opened to read only"
    latest = self.latest()
    if latest is not None and step <= latest:
      raise ValueError(f"checkpoint {step} after {latest}: steps must ascend")
    leaves = _describe(state)
    size = sum(leaf["bytes"] for leaf in leaves.values())
    size += sum(array.nbytes for array in host.values())
    with self._failing_cleanly(step):
      self.directory.mkdir(parents=True, exist_ok=True)
      _sync(self.directory.parent)
      # Orbax's writer threads print pages when a write fails, so room is
      # proven first. The margin is for tables of contents.
      _prove_room(self.directory / _TRIAL, size + size // 16 + 65536)
      folder = self.directory / f"{_UNFINISHED}{step}"
      folder.mkdir()
      _write_state(folder / _STATE, state)
      with open(folder / _HOST, "wb") as file:
        np.savez(file, allow_pickle=False, **host)
      metric = None if metric is None else float(metric)
      record = {"meta": dict(meta), "metric": metric, "leaves": leaves}
      record["files"] = _describe_files(folder)
      _write_record(folder / _RECORD, record)
      for path in [*folder.rglob("*"), folder]:
        _sync(path)
      folder.rename(self.directory / str(step))
      # Only when the new name is on disk may older checkpoints go.
      _sync(self.directory)
    self._drop()

  def read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads `(host, meta)` alone, for what is needed to build the state.

    Raises:
      ValueError: there is no such checkpoint, or it is damaged or foreign.
    """
    record = self._read_record(step)
    with self._reading(step):
      folder = self.directory / str(step)
      if _describe_files(folder, besides=_RECORD) != record["files"]:
        raise ValueError("a file is cut, altered or missing")
      with np.load(folder / _HOST, allow_pickle=False) as file:
        host = {name: file[name] for name in file.files}
    return host, record["meta"]

  def restore(self, step: int, target: Any) -> Restored:
    """Reads a checkpoint back.

    Args:
      step: one of `steps()`.
      target: pytree of arrays like the saved state; gives structure, shapes,
        types and shardings. Its values are not used.

    Raises:
      ValueError: there is no such checkpoint, or it is damaged or foreign.
    """
    host, meta = self.read(step)
    self._compare(step, self._read_record(step)["leaves"], target)
    with self._reading(step):
      state = _read_state(self.directory / str(step) / _STATE, target)
    return Restored(state=state, host=host, meta=meta)

  @contextlib.contextmanager
  def _failing_cleanly(self, step: int) -> Iterator[None]:
    try:
      yield
    # Orbax raises ValueError for a full disk.
    except (OSError, ValueError) as error:
      with contextlib.suppress(OSError):
        self._sweep()
      latest = self.latest()
      previous = "there is none before it"
      if latest is not None:
        previous = f"the previous one, {latest}, is good"
      raise OSError(
        f"checkpoint {step} could not be written to {self.directory} "
        f"({_first_line(error)}); {previous}: make room and run again"
      ) from error

  @contextlib.contextmanager
  def _reading(self, step: int) -> Iterator[None]:
    try:
      yield
    # A damaged file can raise anything: tensorstore, zipfile, json, Orbax.
    except Exception as error:
      raise ValueError(self._unreadable(step, _first_line(error))) from error

  def _unreadable(self, step: int, cause: str) -> str:
    return (
      f"checkpoint {self.directory / str(step)} cannot be read ({cause}): "
      "remove that folder to go on from the one before, or take another workdir"
    )

  def _read_record(self, step: int) -> dict[str, Any]:
    if step not in self.steps():
      raise ValueError(
        f"there is no checkpoint {step} in {self.directory}; there are "
        f"{self.steps()}"
      )
    with self._reading(step):
      return _read_record(self.directory / str(step) / _RECORD)

  def _compare(self, step: int, leaves: Mapping[str, Any], target: Any):
    """Checks names, shapes and types before anything is read."""
    wanted = _describe(target)
    for name in sorted(leaves.keys() | wanted.keys()):
      saved, want = (
        f"{side[name]['dtype']}{side[name]['shape']}"
        if name in side
        else "absent"
        for side in (leaves, wanted)
      )
      if saved != want:
        raise ValueError(
          self._unreadable(step, f"{name} is {saved}, this run has {want}")
        )

  def _drop(self) -> None:
    kept = {self.latest(), self.best()}
    for step in self.steps():
      is_regular = self._keep_every and (step + 1) % self._keep_every == 0
      if step not in kept and not is_regular:
        path = self.directory / str(step)
        path.rename(self.directory / f"{_DELETED}{step}")
    self._sweep()

  def _sweep(self) -> None:
    """Removes what a killed process left, and dropped checkpoints."""
    if not self.directory.is_dir():
      return
    for path in self.directory.iterdir():
      if path.name == _TRIAL:
        path.unlink()
      elif path.name.startswith((_DELETED, _UNFINISHED)):
        shutil.rmtree(path)


def _describe(tree: Any) -> dict[str, Any]:
  """Shape, type and bytes of every array, by path."""
  leaves = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    leaves[name] = {
      "shape": list(leaf.shape),
      "dtype": str(leaf.dtype),
      "bytes": math.prod(leaf.shape) * leaf.dtype.itemsize,
    }
  return leaves


def _describe_files(folder: pathlib.Path, besides: str = "") -> dict[str, Any]:
  """Size and checksum of every file below `folder`, by path."""
  files = {}
  for path in sorted(folder.rglob("*")):
    name = path.relative_to(folder).as_posix()
    if path.is_file() and name != besides:
      content = path.read_bytes()
      files[name] = [len(content), zlib.crc32(content)]
  return files


def _write_state(path: pathlib.Path, state: Any) -> None:
  import orbax.checkpoint as ocp

  with _quiet(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
    writer.save(path, args=ocp.args.StandardSave(_present(state)))


def _read_state(path: pathlib.Path, target: Any) -> Any:
  import orbax.checkpoint as ocp

  with _quiet(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
    present = _present(target)
    found = reader.restore(path, args=ocp.args.StandardRestore(present))
  return found if present is target else dataclasses.replace(target, **found)


def _present(state: Any) -> Any:
  """Fields of a dataclass by name, those that are None left out.

  Orbax would write them, and could then not read checkpoints without them. A
  state that is complete, or no dataclass, is returned as it is.
  """
  if not dataclasses.is_dataclass(state):
    return state
  fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
  present = {name: v for name, v in fields.items() if v is not None}
  return state if len(present) == len(fields) else present


def _write_record(path: pathlib.Path, record: Mapping[str, Any]) -> None:
  """Writes the record and, as second line, its own checksum."""
  text = json.dumps(record)
  path.write_text(f"{text}\n{zlib.crc32(text.encode())}\n")


def _read_record(path: pathlib.Path) -> dict[str, Any]:
  text, _, checksum = path.read_text().partition("\n")
  if checksum != f"{zlib.crc32(text.encode())}\n":
    raise ValueError(f"{_RECORD} is cut or altered")
  record = json.loads(text)
  for field in _FIELDS:
    if field not in record:
      raise ValueError(f"{_RECORD} lacks {field!r}")
  return record


def _sync(path: pathlib.Path) -> None:
  """Waits until a file, or the names in a folder, are on disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _prove_room(path: pathlib.Path, size: int) -> None:
  """Writes and removes a file of `size` bytes; OSError where it fails."""
  block = bytes(2**20)
  try:
    with open(path, "wb") as file:
      for start in range(0, size, len(block)):
        file.write(block[: size - start])
      file.flush()
      os.fsync(file.fileno())
  finally:
    path.unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return lines[0][:200] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps Orbax's remarks out of the run's log."""
  from absl import logging

  before = logging.get_verbosity()
  logging.set_verbosity(logging.FATAL)
  try:
    yield
  finally:
    logging.set_verbosity(before)
