"""Runs a study: measures the cells that are missing, shows all there are.

A result is a file W/studies/<name>/<key>.json whose key is a hash of the cell,
the study's version, the policy (its parameters, tokenizer and shapes) and the
problems. It appears whole, so a study that was killed goes on where it
stopped; another checkpoint has keys of its own, and the old results stay. A
file that is damaged, or holds other content than its name says, is measured
anew.
"""

import hashlib
import json
import pathlib
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from o1jax import config, drawing, metrics, records
from o1jax.studies.context import Context, TaskContext
from o1jax.studies.study import Cell, Measured, Result, Study
from o1jax.tasks.task import require_known

TABLE, FIGURE = "table.md", "figure.svg"


def select(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
  """The cells that have the settings asked for.

  Args:
    cells: of a grid.
    only: texts "setting=value"; of several values of one setting a cell has
      one, of several settings all.

  Raises:
    ValueError: no cell has such a setting or value; names the nearest.
  """
  wanted: dict[str, set[str]] = {}
  known = sorted({name for cell in cells for name in cell})
  for text in only:
    name, _, value = text.partition("=")
    require_known("setting", name, known)
    values = {_show(cell[name]) for cell in cells if name in cell}
    require_known(name, value, sorted(values))
    wanted.setdefault(name, set()).add(value)
  return [
    cell
    for cell in cells
    if all(n in cell and _show(cell[n]) in wanted[n] for n in wanted)
  ]


def run(
  study: Study,
  context: Context | TaskContext,
  folder: pathlib.Path,
  *,
  num_seeds: int,
  only: Sequence[str] = (),
  max_cells: int | None = None,
) -> tuple[list[Measured], int]:
  """Measures the missing cells and keeps each as soon as it is there.

  Args:
    study: what to measure.
    context: on what.
    folder: of the results.
    num_seeds: seeds of the grid.
    only: as for `select`; further cells are shown but not measured.
    max_cells: most cells to measure now; None for all.

  Returns:
    All cells of the grid that have a result, and how many have none.

  Raises:
    UserError: a cell that cannot be measured, before any is.
    OSError: a result could not be written; those before it are kept.
  """
  with config.user_input():
    cells = study.make_cells(context, num_seeds)
    chosen = select(cells, only)
    places = _places(study, context, folder, cells)
    results = [_read(*place) for place in places]
    missing = [
      i for i, cell in enumerate(cells) if cell in chosen and results[i] is None
    ][:max_cells]
    for i in missing:
      study.check(context, cells[i])
  # Seeds of one setting one after another: they share what is compiled.
  settings = [{**cell, "seed": None} for cell in cells]
  missing.sort(key=lambda i: settings.index(settings[i]))
  folder.mkdir(parents=True, exist_ok=True)
  for i in metrics.progress(missing, f"study {study.name}", len(missing)):
    _write(*places[i], study.measure(context, cells[i]))
    results[i] = _read(*places[i])
  measured = [
    Measured(cell, result)
    for cell, result in zip(cells, results, strict=True)
    if result is not None
  ]
  return measured, len(cells) - len(measured)


def show(
  study: Study,
  measured: Sequence[Measured],
  folder: pathlib.Path,
  caption: str,
) -> str:
  """Writes table and figure into the folder; returns the table."""
  table = f"{caption}\n\n{study.make_table(measured)}\n"
  config.write_atomically(folder / TABLE, table.encode())
  picture = study.draw(measured)
  if picture is not None:
    svg = drawing.to_svg(picture) + "\n"
    config.write_atomically(folder / FIGURE, svg.encode())
  return table


def _places(study, context, folder, cells):
  """The file of each cell, with the content that its name stands for."""
  shared = {"study": study.name, "version": study.version, **context.identity()}
  places = []
  for cell in cells:
    identity = {**shared, "cell": dict(cell)}
    text = json.dumps(identity, sort_keys=True, allow_nan=False)
    key = hashlib.sha256(text.encode()).hexdigest()[:20]
    places.append((folder / f"{key}.json", json.loads(text)))
  return places


def _read(path: pathlib.Path, identity: Mapping[str, Any]) -> Result | None:
  if not path.exists():
    return None
  record = records.read_object(path)
  is_whole = record.keys() == {"identity", "result", "checksum"}
  if (
    is_whole
    and record["identity"] == identity
    and record["checksum"] == _checksum(record["result"])
  ):
    return record["result"]
  print(f"{path} is damaged: it counts as not measured", file=sys.stderr)
  return None


def _write(path, identity, result: Result) -> None:
  plain = {name: np.asarray(value).tolist() for name, value in result.items()}
  record = {"identity": identity, "result": plain, "checksum": _checksum(plain)}
  text = json.dumps(record, allow_nan=False)
  config.write_atomically(path, f"{text}\n".encode())


def _checksum(result: Any) -> int:
  return zlib.crc32(json.dumps(result, sort_keys=True).encode())


def _show(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value)
