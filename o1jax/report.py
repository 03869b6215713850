"""A run's report: one self-contained page, and one picture for a README.

`write_report` reads what a run left in its workdir (`metrics.jsonl`,
`evaluation.jsonl`, `samples/`, `trees/`, `manifest.json`) and writes
`report.html`: no script, no network, light and dark. Any of the files may be
missing, old, or cut short by a kill: the page shows what is there and says how
to make the rest.

`python -m o1jax.report --workdir=W` writes it again for a finished run, and
with `--picture=docs/x.svg` also the accuracy curve with a search tree.
"""

import argparse
import collections
import html
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from o1jax import drawing, records, tree_drawing
from o1jax.drawing import Series, escape, format_number
from o1jax.records import Curves, number

REPORT_NAME = "report.html"
_NUM_SAMPLES = 6  # right ones shown, and as many wrong ones

# Colour and place of a strategy stay the same from report to report.
_STRATEGIES = ("greedy", "majority_vote", "best_of_n", "mcts")

_PAGE_STYLE = """
body{margin:0;background:var(--page);font-size:15px;line-height:1.5}
main{max-width:1080px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:26px;line-height:1.2;margin:0 0 4px}
h2{font-size:19px;margin:40px 0 4px}
h3{font-size:13px;margin:20px 0 6px;color:var(--ink2);font-weight:600}
p{margin:4px 0 12px;color:var(--ink2);max-width:72ch}
.card{background:var(--surface);border:1px solid var(--grid);
border-radius:10px;padding:14px;margin:10px 0;overflow-x:auto}
.card>svg{display:block;width:100%;height:auto;min-width:620px}
.card.tree>svg{width:auto;min-width:0}
.tiles{display:grid;gap:10px;margin:20px 0;
grid-template-columns:repeat(auto-fit,minmax(150px,1fr))}
.tile{background:var(--surface);border:1px solid var(--grid);
border-radius:10px;padding:10px 14px}
.tile b{display:block;font-size:24px;font-weight:600}
.tile span{color:var(--ink2);font-size:13px}
.cells{display:grid;gap:10px;
grid-template-columns:repeat(auto-fill,minmax(220px,1fr))}
.cells .card{margin:0;padding:10px 12px}
.cells .card>svg{min-width:0;width:100%}
table{border-collapse:collapse;width:100%;font-size:13px;
font-variant-numeric:tabular-nums}
th{color:var(--ink2);font-weight:600;text-align:left}
th,td{padding:6px 10px;border-bottom:1px solid var(--grid);
vertical-align:top}
tr:last-child td{border-bottom:0}
td.n,th.n{text-align:right;white-space:nowrap}
pre,code,td.t{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
font-size:12px}
pre,td.t{white-space:pre-wrap;overflow-wrap:anywhere;margin:0}
pre.wide{white-space:pre;overflow-x:auto}
.good{color:var(--good)}.bad{color:var(--bad)}
.good,.bad{white-space:nowrap;font-weight:600}
summary{cursor:pointer;color:var(--ink2)}
details{margin:10px 0}
"""

# Should an escape ever be missed, the browser still runs and loads nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


# Charts.


# Names that `iterate.flatten_rows` gives; greedy has no budget.
_KEYS = {
  "accuracy": re.compile(r"eval/(.+?)(?:_(\d+))?_accuracy"),
  "coverage": re.compile(r"coverage/(.+?)(?:_(\d+))?"),
}


class _Curve(NamedTuple):
  """One strategy at one budget against iterations."""

  strategy: str
  budget: int | None
  points: Sequence[tuple[float, float]]

  @property
  def label(self) -> str:
    name = self.strategy.replace("_", " ")
    if self.budget is None:
      return name
    return f"{name}, {self.budget} solution{'s' if self.budget != 1 else ''}"


def _match(key: str) -> tuple[str, str, int | None] | None:
  """Quantity, strategy and budget that a metric's name stands for, if any."""
  for quantity, pattern in _KEYS.items():
    if found := pattern.fullmatch(key):
      strategy, budget = found.groups()
      return quantity, strategy, None if budget is None else int(budget)
  return None


def _curves_of(curves: Curves, quantity: str) -> list[_Curve]:
  """All curves of a quantity, of both phases; by strategy, then by budget."""
  found = collections.defaultdict(dict)
  for by_key in curves.values():
    for key, points in by_key.items():
      match = _match(key)
      if match and match[0] == quantity:
        found[match[1:]].update(points)
  made = [_Curve(*cell, sorted(found[cell].items())) for cell in found]
  return sorted(made, key=lambda c: (_place(c.strategy), c.budget or 0))


def _place(strategy: str) -> tuple[int, str]:
  """Sorts the known strategies first, in their order, then the others."""
  if strategy in _STRATEGIES:
    return _STRATEGIES.index(strategy), ""
  return len(_STRATEGIES), strategy


def _colors(
  curves: Curves, rows: Sequence[Mapping[str, Any]]
) -> dict[str, int]:
  """The colour of every strategy of a run, the same in all its charts."""
  present = {row["strategy"] for row in rows}
  for quantity in _KEYS:
    present |= {curve.strategy for curve in _curves_of(curves, quantity)}
  names = sorted({*_STRATEGIES, *present}, key=_place)
  return {name: i % drawing.NUM_COLORS for i, name in enumerate(names)}


def _draw_curves(
  curves: Curves, quantity: str, colors: Mapping[str, int]
) -> drawing.Drawing | None:
  """A quantity against iterations; None where nothing was measured."""
  series = [
    Series(curve.label, curve.points, color=colors[curve.strategy])
    for curve in _curves_of(curves, quantity)
  ]
  if not series:
    return None
  return drawing.draw_lines(
    series,
    title=f"{quantity.capitalize()} against training iterations",
    x_title="iteration",
    is_percent=True,
  )


def _strategy_series(
  rows: Sequence[Mapping[str, Any]], x_key: str, colors: Mapping[str, int]
) -> list[Series]:
  """One line per strategy, accuracy against `x_key`, with its intervals."""
  series = []
  for strategy in sorted({row["strategy"] for row in rows}, key=_place):
    own = [row for row in rows if row["strategy"] == strategy]
    own.sort(key=lambda row: row[x_key])
    intervals = []
    for row in own:
      low, high = (number(row.get(f"accuracy_{k}")) for k in ("low", "high"))
      here = row["accuracy"]
      intervals.append(
        (here if low is None else low, here if high is None else high)
      )
    series.append(
      Series(
        strategy.replace("_", " "),
        [(row[x_key], row["accuracy"]) for row in own],
        intervals,
        colors[strategy],
      )
    )
  return series


# Sections, each an HTML text; "" where there is nothing to show.


def _card(inner: str, kind: str = "") -> str:
  return f'<div class="card {kind}">{inner}</div>'


def _chart(picture: drawing.Drawing, kind: str = "") -> str:
  return _card(drawing.to_svg(picture, has_style=False), kind)


def _table(
  head: Sequence[str], rows: Sequence[Sequence[str]], first: int
) -> str:
  """A table of ready HTML cells; columns from `first` on hold numbers."""

  def line(tag, cells):
    marked = (
      f"<{tag}{' class=n' if i >= first else ''}>{cell}</{tag}>"
      for i, cell in enumerate(cells)
    )
    return f"<tr>{''.join(marked)}</tr>"

  body = "".join(line("td", row) for row in rows)
  return (
    f"<table><thead>{line('th', head)}</thead><tbody>{body}</tbody></table>"
  )


def _tiles(curves: Curves) -> str:
  """The run in a few large figures."""
  # Of each strategy, at its largest budget.
  newest = {c.strategy: c for c in _curves_of(curves, "accuracy")}
  tiles = [
    (format_number(c.points[-1][1], is_percent=True), f"accuracy: {c.label}")
    for c in newest.values()
  ]
  seconds = [p for by_key in curves.values() for p in by_key.get("seconds", [])]
  iterations = curves.get("iteration", {}).get("seconds", [])
  if iterations:
    tiles.append((str(len(iterations)), "iterations"))
  if seconds:
    minutes = sum(value for _, value in seconds) / 60
    tiles.append((f"{minutes:.1f} min", "of search and learning"))
  cells = (
    f'<div class="tile"><b>{value}</b><span>{escape(name)}</span></div>'
    for value, name in tiles
  )
  return f'<div class="tiles">{"".join(cells)}</div>' if tiles else ""


def _accuracy_section(curves: Curves, colors: Mapping[str, int]) -> str:
  accuracy = _draw_curves(curves, "accuracy", colors)
  coverage = _draw_curves(curves, "coverage", colors)
  if accuracy is None:
    return "<p>No accuracy has been measured yet.</p>"
  out = [
    "<p>Accuracy of the one solution a strategy answers with, on held-out"
    " problems. A budget is the tokens of that many solutions.</p>",
    _chart(accuracy),
  ]
  if coverage is not None:
    out += [
      "<p>Coverage: share of problems with a right one among all solutions that"
      " were found.</p>",
      _chart(coverage),
    ]
  return "".join(out)


def _evaluation_section(
  workdir: pathlib.Path,
  rows: Sequence[Mapping[str, Any]],
  colors: Mapping[str, int],
) -> str:
  if not rows:
    command = f"python -m o1jax.evaluate --workdir={workdir}"
    return (
      "<p>Not measured yet. This command compares the strategies at equal"
      f" budgets, and the next report shows them:</p>"
      f"{_card(f'<code>{escape(command)}</code>')}"
    )
  last = max(row["iteration"] for row in rows)
  newest = [row for row in rows if row["iteration"] == last]
  tokens = [row["tokens"] for row in newest]
  out = [
    "<p>Accuracy of the one solution a strategy answers with, at equal budgets,"
    f" after iteration {format_number(last)}. A budget is the tokens of that"
    " many solutions. Bars are bootstrap intervals.</p>",
    _chart(
      drawing.draw_lines(
        _strategy_series(newest, "tokens", colors),
        title="Accuracy against test-time tokens",
        x_title="generated tokens a problem",
        is_percent=True,
        is_log=max(tokens) > 8 * min(tokens),
      )
    ),
  ]

  def share(row, key):
    return format_number(number(row.get(key)), is_percent=True)

  newest.sort(
    key=lambda row: (number(row.get("budget")) or 0.0, _place(row["strategy"]))
  )
  plain = ("tokens", "seconds", "verifier_requests", "num_problems")
  table = [
    [
      escape(row["strategy"].replace("_", " ")),
      format_number(number(row.get("budget"))),
      share(row, "accuracy"),
      f"{share(row, 'accuracy_low')} to {share(row, 'accuracy_high')}",
      share(row, "coverage"),
      *(format_number(number(row.get(key))) for key in plain),
    ]
    for row in newest
  ]
  head = (
    "strategy",
    "budget",
    "accuracy",
    "interval",
    "coverage",
    "tokens",
    "seconds",
    "verifier requests",
    "problems",
  )
  out.append(_card(_table(head, table, 1)))
  # Budgets of earlier iterations, which the chart above does not show.
  searched = [row for row in rows if row["strategy"] != "greedy"]
  earlier = {number(r.get("budget")) for r in searched if r["iteration"] < last}
  for budget in sorted(earlier - {None}):
    shown = [row for row in searched if number(row.get("budget")) == budget]
    shown += [row for row in rows if row["strategy"] == "greedy"]
    out.append(
      _chart(
        drawing.draw_lines(
          _strategy_series(shown, "iteration", colors),
          title=f"Accuracy at a budget of {format_number(budget)} solutions, by"
          " saved iteration",
          x_title="iteration",
          is_percent=True,
        )
      )
    )
  return "".join(out)


def _tree_section(tree: Mapping[str, Any] | None) -> str:
  if tree is None:
    return "<p>No search tree has been saved yet.</p>"
  text = html.escape(tree_drawing.render_tree_text(tree))
  return (
    "<p>Each circle is a node: one step of reasoning. Rest the pointer on it"
    " for its visits, value and prior.</p>"
    f"{_chart(tree_drawing.draw_tree(tree), 'tree')}"
    f"<details><summary>The same tree as text</summary>"
    f"{_card(f'<pre class=wide>{text}</pre>')}</details>"
  )


def _sample_section(samples: Sequence[Mapping[str, Any]]) -> str:
  if not samples:
    return "<p>No sample has been saved yet.</p>"
  rows = []
  for row in samples:
    mark, kind = (
      ("\u2713 right", "good")
      if records.is_right(row)
      else ("\u2717 wrong", "bad")
    )
    lines = str(row["text"]).split("\n")
    text = "\n".join(escape(line, 400) for line in lines[:40])
    prompt = str(row["problem"].get("prompt", "")).strip()
    rows.append(
      f'<tr><td class="{kind}">{mark}</td>'
      f'<td class="t">{escape(prompt, 400)}</td><td class="t">{text}</td>'
      f"<td>{escape(row.get('verdict', ''), 200)}</td>"
      f"<td>{escape(row.get('source', ''), 60)}</td></tr>"
    )
  head = "".join(
    f"<th>{name}</th>"
    for name in ("", "problem", "solution", "verdict", "source")
  )
  return (
    f"<p>Of iteration {format_number(records.iteration_of(samples[0]))}.</p>"
    + _card(f"<table><tr>{head}</tr>{''.join(rows)}</table>")
  )


def _metrics_section(curves: Curves) -> str:
  """Small multiples of everything else, by kind and prefix."""
  out = []
  kinds = sorted(curves, key=lambda kind: (kind == "initialize", kind))
  for kind in kinds:
    groups = collections.defaultdict(list)
    for key in sorted(curves[kind]):
      if _match(key) is None:
        groups[key.split("/")[0] if "/" in key else "run"].append(key)
    for group in sorted(groups):
      name = group if kind == "iteration" else f"{kind}: {group}"
      cells = (
        _chart(
          drawing.draw_sparkline(
            curves[kind][key], title=key.removeprefix(f"{group}/")
          )
        )
        for key in groups[group]
      )
      out.append(
        f'<h3>{escape(name)}</h3><div class="cells">{"".join(cells)}</div>'
      )
  return "".join(out) or "<p>No metrics have been written yet.</p>"


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
  """Dotted names and JSON texts of nested objects."""
  if isinstance(value, dict) and value:
    for key in value:
      yield from _flatten(value[key], f"{prefix}.{key}" if prefix else str(key))
  else:
    yield prefix, json.dumps(value, ensure_ascii=False)


def _settings_section(workdir: pathlib.Path) -> str:
  rows = [
    (f"<code>{escape(key)}</code>", f"<code>{escape(value, 2000)}</code>")
    for key, value in _flatten(records.read_object(workdir / "manifest.json"))
    if key
  ]
  if not rows:
    return ""
  table = _card(_table(("field", "value"), rows, 2))
  return f"<details><summary>manifest.json</summary>{table}</details>"


def render_report(workdir: str | os.PathLike) -> str:
  """The report of a workdir as the text of one HTML page."""
  workdir = pathlib.Path(workdir)
  curves = records.read_curves(workdir)
  rows = records.read_evaluation(workdir)
  colors = _colors(curves, rows)
  sections = (
    ("Learning", _accuracy_section(curves, colors)),
    ("Test-time search", _evaluation_section(workdir, rows, colors)),
    ("A search tree", _tree_section(records.read_tree(workdir))),
    (
      "Solutions",
      _sample_section(records.read_samples(workdir, count=_NUM_SAMPLES)),
    ),
    ("All metrics", _metrics_section(curves)),
    ("Settings", _settings_section(workdir)),
  )
  name = escape(workdir.resolve().name)
  body = "".join(
    f"<section><h2>{title}</h2>{section}</section>"
    for title, section in sections
    if section
  )
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    f"<title>{name} - o1jax</title><style>{drawing.STYLE}{_PAGE_STYLE}</style>"
    f'</head><body class="o1jax"><main><h1>{name}</h1>'
    f"<p>Search and learning, iteration by iteration.</p>{_tiles(curves)}{body}"
    "</main></body></html>\n"
  )


def _write(path: pathlib.Path, text: str) -> None:
  """Writes whole or not at all: a reader never sees half a page."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".partial")
  try:
    partial.write_text(text, encoding="utf-8", errors="replace")
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)


def write_report(workdir: str | os.PathLike) -> pathlib.Path:
  """Writes `report.html` into the workdir and returns its path.

  Raises:
    OSError: the file cannot be written; an earlier report stays.
  """
  path = pathlib.Path(workdir) / REPORT_NAME
  _write(path, render_report(workdir))
  return path


def _accuracy_drawing(workdir: str | os.PathLike) -> drawing.Drawing:
  curves = records.read_curves(workdir)
  picture = _draw_curves(curves, "accuracy", _colors(curves, ()))
  if picture is None:
    raise ValueError(f"{workdir}: metrics.jsonl holds no accuracy yet")
  return picture


def render_accuracy_svg(workdir: str | os.PathLike) -> str:
  """The accuracy curves of a workdir as an SVG that stands alone.

  Raises:
    ValueError: the workdir holds no accuracy yet.
  """
  return drawing.to_svg(_accuracy_drawing(workdir))


def write_picture(
  workdir: str | os.PathLike, path: str | os.PathLike, *, max_nodes: int = 24
) -> None:
  """Writes an SVG of the accuracy curves with a search tree beneath.

  Raises:
    ValueError: the workdir holds no accuracy yet.
    OSError: the file cannot be written.
  """
  parts = [_accuracy_drawing(workdir)]
  tree = records.read_tree(workdir)
  if tree is not None:
    parts.append(tree_drawing.draw_tree(tree, max_nodes=max_nodes))
  picture = drawing.stack(parts, width=960)
  _write(pathlib.Path(path), drawing.to_svg(picture) + "\n")


def main(arguments: Sequence[str]) -> None:
  """Writes the report of a workdir, and a picture where one is asked for."""
  # argparse and not absl: flags of an imported module would be flags of every
  # command that writes a report.
  parser = argparse.ArgumentParser(prog="python -m o1jax.report")
  parser.add_argument("--workdir", required=True, help="folder of the run")
  parser.add_argument("--picture", help="also write this SVG file")
  args = parser.parse_args(arguments)
  if not os.path.isdir(args.workdir):
    parser.error(f"--workdir={args.workdir} is not a folder")
  try:
    print(write_report(args.workdir))
    if args.picture:
      write_picture(args.workdir, args.picture)
      print(args.picture)
  except (OSError, ValueError) as error:
    parser.error(str(error))


if __name__ == "__main__":
  main(sys.argv[1:])
