"""Reading back what a run wrote into its workdir.

Files may be missing, old, still being written, or cut short by a kill: every
function here returns what is there. A line that is no JSON object is left out.
"""

import collections
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# kind of row -> key -> points (iteration, value)
Curves = Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]


def number(value: Any) -> float | None:
  """The value as a finite float; None for anything else, booleans too."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return None
  try:
    value = float(value)
  except OverflowError:
    return None
  return value if math.isfinite(value) else None


def is_tree(value: Any) -> bool:
  """True for a mapping that holds a list of nodes, each with its parent."""
  nodes = value.get("nodes") if isinstance(value, Mapping) else None
  if not isinstance(nodes, list) or not nodes:
    return False
  return all(
    isinstance(n, Mapping) and isinstance(n.get("parent"), int) for n in nodes
  )


def read_rows(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
  """Yields the JSON objects of a file, one a line; nothing if it is missing.

  Lines that are cut short, foreign, or nested beyond reason are skipped: a
  report can be asked for while the run is writing.
  """
  try:
    with open(path, encoding="utf-8", errors="replace") as lines:
      for line in lines:
        try:
          row = json.loads(line)
        except (ValueError, RecursionError):
          continue
        if isinstance(row, dict):
          yield row
  except OSError:
    return


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """A file that holds one JSON object; empty if it is missing or broken."""
  try:
    value = json.loads(path.read_text("utf-8", errors="replace"))
  except (OSError, ValueError, RecursionError):
    return {}
  return value if isinstance(value, dict) else {}


def iteration_of(row: Mapping[str, Any]) -> float:
  """Iteration of a row; -1 where it has none."""
  value = number(row.get("iteration"))
  return -1.0 if value is None else value


def _rows_of(
  workdir: str | os.PathLike, folder: str
) -> Iterator[dict[str, Any]]:
  """Rows of all files of a folder of the workdir."""
  for path in sorted((pathlib.Path(workdir) / folder).glob("*.jsonl")):
    yield from read_rows(path)


def _newest(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
  """The rows of the last iteration, in their order; others are not held."""
  kept, last = [], -1.0
  for row in rows:
    here = iteration_of(row)
    if here > last:
      kept, last = [], here
    if here == last:
      kept.append(row)
  return kept


def read_curves(workdir: str | os.PathLike) -> Curves:
  """Curves of `metrics.jsonl`: kind -> key -> `(iteration, value)` points.

  A row that a resumed run wrote again replaces the earlier one.
  """
  table = collections.defaultdict(lambda: collections.defaultdict(dict))
  for row in read_rows(pathlib.Path(workdir) / "metrics.jsonl"):
    x = number(row.get("iteration"))
    if x is None:
      continue
    for key, value in row.items():
      if key != "iteration" and number(value) is not None:
        table[str(row.get("kind", "iteration"))][key][x] = number(value)
  return {
    kind: {key: sorted(points.items()) for key, points in curves.items()}
    for kind, curves in table.items()
  }


def read_evaluation(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """Rows of `evaluation.jsonl` that can be drawn; the last of a kind counts."""
  rows = {}
  for row in read_rows(pathlib.Path(workdir) / "evaluation.jsonl"):
    numbers = [number(row.get(k)) for k in ("iteration", "tokens", "accuracy")]
    if None in numbers or numbers[1] <= 0 or "strategy" not in row:
      continue
    strategy, budget = str(row["strategy"]), number(row.get("budget"))
    rows[numbers[0], strategy, budget] = {**row, "strategy": strategy}
  return list(rows.values())


def read_tree(workdir: str | os.PathLike) -> dict[str, Any] | None:
  """The newest iteration's largest tree, one with a correct end if possible."""

  def rank(tree):
    nodes = tree["nodes"]
    return (any(n.get("is_correct") is True for n in nodes), len(nodes))

  found = _newest(tree for tree in _rows_of(workdir, "trees") if is_tree(tree))
  return max(found, key=rank, default=None)


def read_samples(
  workdir: str | os.PathLike, *, count: int
) -> list[dict[str, Any]]:
  """Some right and some wrong solutions of the newest iteration."""
  rows = _newest(
    row
    for row in _rows_of(workdir, "samples")
    if "text" in row and isinstance(row.get("problem"), Mapping)
  )
  right = [row for row in rows if is_right(row)][:count]
  wrong = [row for row in rows if not is_right(row)][:count]
  return right + wrong


def is_right(sample: Mapping[str, Any]) -> bool:
  """True for a solution with full reward."""
  return number(sample.get("outcome_reward")) == 1
