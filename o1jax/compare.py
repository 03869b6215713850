"""Shows two runs side by side: what differs, what each reached, at what cost.

python -m o1jax.compare runs/a runs/b

Reads what the runs wrote and loads no policy, so runs that go on, and runs of
another machine, can be compared too. Three parts: fields, versions and devices
that differ; every metric that both have at their last common iteration, with
the best value of each run; and what they reached in equal seconds. `--metrics`
takes other metrics, by any part of their names.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from absl import flags

from o1jax import config as config_lib
from o1jax import records
from o1jax.drawing import clean, format_number

SECONDS = "seconds"  # of an iteration, whichever phase it belongs to
MAX_CHARS = 60  # of a cell

# metric -> points (iteration, value), both phases of a run joined
Metrics = Mapping[str, Sequence[tuple[float, float]]]


def define_flags() -> None:
  """Defines what the command line takes; `main` reads it."""
  flags.DEFINE_list(
    "metrics",
    ["accuracy", "coverage"],
    "Parts of the names of the metrics to show; an empty list shows all.",
  )


def main(argv: Sequence[str]) -> None:
  """Reads the flags and compares."""
  if len(argv) != 3:
    raise config_lib.UserError(
      "give two workdirs: python -m o1jax.compare runs/a runs/b"
    )
  compare(argv[1], argv[2], flags.FLAGS.metrics, sys.stdout)


def compare(
  first: str, second: str, wanted: Sequence[str], stream: TextIO
) -> None:
  """Prints the comparison of two workdirs.

  Args:
    first: a workdir.
    second: the other.
    wanted: parts of names of metrics; empty for all.
    stream: where to print.

  Raises:
    UserError: one is no workdir, or they have no metric of that name in
      common.
  """
  workdirs = first, second
  manifests = [config_lib.read_manifest(workdir) for workdir in workdirs]
  runs = [read_metrics(workdir) for workdir in workdirs]
  for workdir, metrics in zip(workdirs, runs, strict=True):
    if not metrics:
      raise config_lib.UserError(
        f"{workdir} has no iteration yet: wait for the first"
      )
  common = sorted(runs[0].keys() & runs[1].keys())
  names = [n for n in common if not wanted or any(part in n for part in wanted)]
  if not names:
    raise config_lib.UserError(
      f"--metrics={','.join(wanted)} names nothing that both runs measured: "
      f"there are {', '.join(common)}"
    )
  labels = _labels(*workdirs)
  changed = (*labels, "second less first")
  for header, rows in (
    (("what differs", *labels), _differences(*manifests)),
    (("last common iteration, and best", *changed), _reached(names, *runs)),
    (("in equal seconds", *changed), _in_equal_seconds(names, *runs)),
  ):
    _print_table([header, *rows], stream)


def read_metrics(workdir: str) -> Metrics:
  """The metrics of a run against its iterations, both phases joined."""
  joined: dict[str, dict[float, float]] = {}
  for curves in records.read_curves(workdir).values():
    for name, points in curves.items():
      joined.setdefault(name, {}).update(points)
  return {name: sorted(points.items()) for name, points in joined.items()}


def _labels(first: str, second: str) -> tuple[str, str]:
  """Short names of the runs; whole paths where their last parts agree."""
  names = pathlib.Path(first).name, pathlib.Path(second).name
  return (first, second) if names[0] == names[1] else names


def _differences(
  first: Mapping[str, Any], second: Mapping[str, Any]
) -> list[tuple[str, ...]]:
  """Rows of a name and two values, for each field of the manifests."""
  fields = config_lib.flatten(first), config_lib.flatten(second)
  rows = []
  for name in sorted(fields[0].keys() | fields[1].keys()):
    values = [repr(f[name]) if name in f else "absent" for f in fields]
    if values[0] != values[1]:
      rows.append((name.removeprefix("config."), *values))
  return rows or [("nothing", "", "")]


def _reached(
  names: Sequence[str], first: Metrics, second: Metrics
) -> list[tuple[str, ...]]:
  """Each metric where both have it last, their difference, and the best."""
  rows = []
  for name in names:
    points = dict(first[name]), dict(second[name])
    both = points[0].keys() & points[1].keys()
    if not both:
      continue
    last = max(both)
    values = [p[last] for p in points]
    rows.append(
      (
        f"{name}, iteration {last:.0f}",
        *(_show(name, v) for v in values),
        _change(name, *values),
      )
    )
    if _is_share(name):
      best = [max(p.values()) for p in points]
      rows.append(
        (
          f"{name}, best",
          *(_show(name, v) for v in best),
          _change(name, *best),
        )
      )
  return rows


def _in_equal_seconds(
  names: Sequence[str], first: Metrics, second: Metrics
) -> list[tuple[str, ...]]:
  """Shares that each run had reached when the shorter of them ended.

  Seconds of iterations that a resumed run had done before count once.
  """
  clocks = [_elapsed(metrics) for metrics in (first, second)]
  if not all(clocks):
    return []
  seconds = min(max(clock.values()) for clock in clocks)
  rows: list[tuple[str, ...]] = [
    (
      "whole run, seconds",
      *(format_number(max(clock.values())) for clock in clocks),
    )
  ]
  for name in filter(_is_share, names):
    values = [
      [v for i, v in metrics[name] if i in clock and clock[i] <= seconds]
      for metrics, clock in zip((first, second), clocks, strict=True)
    ]
    if all(values):
      last = [v[-1] for v in values]
      rows.append(
        (
          f"{name} after {format_number(seconds)}",
          *(_show(name, v) for v in last),
          _change(name, *last),
        )
      )
  return rows


def _elapsed(metrics: Metrics) -> dict[float, float]:
  """Seconds from the start to the end of each iteration."""
  total, elapsed = 0.0, {}
  for iteration, seconds in metrics.get(SECONDS, ()):
    total += seconds
    elapsed[iteration] = total
  return elapsed


def _is_share(name: str) -> bool:
  """Whether a metric is a share of problems, where more is better."""
  return "accuracy" in name or name.startswith("coverage/")


def _show(name: str, value: float) -> str:
  return format_number(value, is_percent=_is_share(name))


def _change(name: str, before: float, after: float) -> str:
  """The second run's value less the first's."""
  if _is_share(name):
    return f"{100 * (after - before):+.1f} points"
  text = format_number(after - before)
  return text if text.startswith("-") else f"+{text}"


def _print_table(rows: Sequence[tuple[str, ...]], stream: TextIO) -> None:
  """Left-aligned columns; what a workdir holds cannot steer the terminal."""
  # The rows of a run's whole have no difference.
  width = len(rows[0])
  cells = [
    [clean(cell, MAX_CHARS) for cell in (*row, "")[:width]] for row in rows
  ]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  for row in cells:
    padded = [cell.ljust(n) for cell, n in zip(row, widths, strict=True)]
    print("  ".join(padded).rstrip(), file=stream)
  print(file=stream)


if __name__ == "__main__":
  define_flags()
  config_lib.run(main)
