"""What a study is: a grid of cells, how one is measured, how all are shown.

A cell is a flat dict of settings that JSON can hold, its seed among them. The
same cell, policy and problems give the same result, so results are kept by
content; see `runner`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from o1jax import drawing, evaluation

Cell = Mapping[str, Any]
Result = Mapping[str, Any]


class Measured(NamedTuple):
  """A cell with what was measured: numbers, and lists of one per problem."""

  cell: Cell
  result: Result


@dataclasses.dataclass(frozen=True)
class Study:
  """A question, put to a trained policy (or to a task) on problems.

  Attributes:
    name: of its folder in the workdir.
    version: part of the key of each result; a new one measures all anew.
    make_cells: the grid, `(context, number of seeds) -> cells`.
    check: refuses a cell with a ValueError, before anything compiles.
    measure: `(context, cell) -> result`; NumPy arrays and numbers, none NaN.
    make_table: Markdown of what was measured, rows in the grid's order.
    draw: the figure; None where there is nothing to draw.
    note: `context -> sentence` for the caption, "" for none.
    has_policy: whether contexts are a `Context`; else a `TaskContext`.
  """

  name: str
  version: str
  make_cells: Callable[[Any, int], Sequence[Cell]]
  check: Callable[[Any, Cell], Any]
  measure: Callable[[Any, Cell], Result]
  make_table: Callable[[Sequence[Measured]], str]
  draw: Callable[[Sequence[Measured]], drawing.Drawing | None]
  note: Callable[[Any], str] = lambda context: ""
  has_policy: bool = True


def estimate(values: np.ndarray) -> tuple[float, float, float]:
  """The mean of `values` `[n]`, one a problem, and its bootstrap interval."""
  return float(values.mean()), *evaluation.bootstrap_interval(values)


def markdown_table(
  head: Sequence[str], rows: Sequence[Sequence[str]], num_left: int = 1
) -> str:
  """A Markdown table whose columns also line up in a terminal.

  Args:
    head: names of the columns.
    rows: ready cells.
    num_left: columns aligned to the left; the others hold numbers.
  """
  widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

  def line(cells):
    padded = (
      cell.ljust(width) if i < num_left else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return f"| {' | '.join(padded)} |"

  rule = [
    "-" * width if i < num_left else "-" * (width - 1) + ":"
    for i, width in enumerate(widths)
  ]
  return "\n".join([line(head), line(rule), *map(line, rows)])


def percent(mean: float, low: float, high: float, sign: str = "") -> str:
  """A share with its interval as text; `sign="+"` for a difference."""
  return f"{mean:{sign}.1%} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"


def by_setting(
  measured: Sequence[Measured], names: Sequence[str]
) -> dict[tuple[Any, ...], list[Measured]]:
  """Groups what was measured by some settings, None where a cell lacks one."""
  groups: dict[tuple[Any, ...], list[Measured]] = {}
  for one in measured:
    key = tuple(one.cell[n] if n in one.cell else None for n in names)
    groups.setdefault(key, []).append(one)
  return groups
