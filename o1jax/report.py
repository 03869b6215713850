"""A run's report: one self-contained page, and one picture for a README.

`write_report` reads what a run left in its workdir (`metrics.jsonl`,
`evaluation.jsonl`, `samples/`, `trees/`, `config.json`, `manifest.json`) and
writes `report.html`: no script, no network, light and dark. Any of the files
may be missing, old, or cut short by a kill: the page shows what is there and
says how to make the rest.

`python -m o1jax.report --workdir=W` writes it again for a finished run, and
with `--picture=docs/x.svg` also the accuracy curve with a search tree.
"""

import argparse
import collections
import html
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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


def _is_accuracy(key: str) -> bool:
  return key.endswith(("accuracy", "coverage"))


def _strategy_of(key: str) -> str | None:
  """The known strategy whose accuracy a key of `eval/` holds."""
  name = key.removeprefix("eval/").removesuffix("_accuracy")
  return name if name in _STRATEGIES else None


def _accuracy_curves(curves: Curves) -> list[Series]:
  """Accuracy and coverage against iterations, as many as have colours.

  Strategies come first, in the colours they have in the other charts. Rows of
  kind "initialize" count on an axis of their own and are left to it.
  """
  found = collections.defaultdict(dict)
  for kind, by_key in curves.items():
    for key in filter(_is_accuracy, by_key):
      if kind != "initialize":
        found[key].update(by_key[key])

  def place(key):
    strategy = _strategy_of(key)
    known = _STRATEGIES.index(strategy) if strategy else len(_STRATEGIES)
    return known, not key.startswith("eval/"), key

  free = iter(range(len(_STRATEGIES), drawing.NUM_COLORS))
  series = []
  for key in sorted(found, key=place):
    strategy = _strategy_of(key)
    color = _STRATEGIES.index(strategy) if strategy else next(free, None)
    if color is None:
      break
    name = key.removeprefix("eval/").replace("_", " ").replace("/", " ")
    series.append(Series(name, sorted(found[key].items()), color=color))
  return series


def _draw_accuracy(series: Sequence[Series]) -> drawing.Drawing:
  return drawing.draw_lines(
    series,
    title="Accuracy against training iterations",
    x_title="iteration",
    is_percent=True,
  )


def _strategies(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Strategies present: the known ones in their order, then the others."""
  present = {row["strategy"] for row in rows}
  others = sorted(present - set(_STRATEGIES))
  return [s for s in _STRATEGIES if s in present] + others


def _strategy_color(strategy: str, others: Sequence[str]) -> int:
  names = [*_STRATEGIES, *(s for s in others if s not in _STRATEGIES)]
  return names.index(strategy) % drawing.NUM_COLORS


def _strategy_series(
  rows: Sequence[Mapping[str, Any]], x_key: str
) -> list[Series]:
  """One line per strategy, accuracy against `x_key`, with its intervals."""
  series, strategies = [], _strategies(rows)
  for strategy in strategies:
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
        _strategy_color(strategy, strategies),
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
  tiles = [
    (format_number(s.points[-1][1], is_percent=True), s.label)
    for s in _accuracy_curves(curves)[:4]
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


def _accuracy_section(curves: Curves) -> str:
  series = _accuracy_curves(curves)
  if not series:
    return "<p>No accuracy has been measured yet.</p>"
  return _chart(_draw_accuracy(series))


def _evaluation_section(workdir: pathlib.Path) -> str:
  rows = records.read_evaluation(workdir)
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
    "<p>Accuracy of the one solution a strategy selects, at equal budgets of"
    f" generated tokens, after iteration {format_number(last)}. Bars are"
    " bootstrap intervals.</p>",
    _chart(
      drawing.draw_lines(
        _strategy_series(newest, "tokens"),
        title="Accuracy against test-time tokens",
        x_title="generated tokens a problem",
        is_percent=True,
        is_log=max(tokens) > 8 * min(tokens),
      )
    ),
  ]

  def share(row, key):
    return format_number(number(row.get(key)), is_percent=True)

  strategies = _strategies(newest)
  newest.sort(
    key=lambda row: (
      number(row.get("budget")) or 0.0,
      strategies.index(row["strategy"]),
    )
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
  if len({row["iteration"] for row in rows}) > 1:
    largest = max(number(row.get("budget")) or 0.0 for row in rows)
    at_largest = [
      row for row in rows if (number(row.get("budget")) or 0.0) == largest
    ]
    out.append(
      _chart(
        drawing.draw_lines(
          _strategy_series(at_largest, "iteration"),
          title=f"At a budget of {format_number(largest)} tokens, per saved"
          " iteration",
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
      ("\u2713 right", "good") if row["is_correct"] else ("\u2717 wrong", "bad")
    )
    lines = str(row["text"]).split("\n")
    text = "\n".join(escape(line, 400) for line in lines[:40])
    prompt = str(row.get("prompt") or row.get("problem") or "").strip()
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
      if kind == "initialize" or not _is_accuracy(key):
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
  out = []
  for name in ("config.json", "manifest.json"):
    rows = [
      (f"<code>{escape(key)}</code>", f"<code>{escape(value, 2000)}</code>")
      for key, value in _flatten(records.read_object(workdir / name))
      if key
    ]
    if rows:
      table = _card(_table(("field", "value"), rows, 2))
      out.append(f"<details><summary>{name}</summary>{table}</details>")
  return "".join(out)


def render_report(workdir: str | os.PathLike) -> str:
  """The report of a workdir as the text of one HTML page."""
  workdir = pathlib.Path(workdir)
  curves = records.read_curves(workdir)
  sections = (
    ("Learning", _accuracy_section(curves)),
    ("Test-time search", _evaluation_section(workdir)),
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


def render_accuracy_svg(workdir: str | os.PathLike) -> str:
  """The accuracy curves of a workdir as an SVG that stands alone.

  Raises:
    ValueError: the workdir holds no accuracy yet.
  """
  series = _accuracy_curves(records.read_curves(workdir))
  if not series:
    raise ValueError(f"{workdir}: metrics.jsonl holds no accuracy yet")
  return drawing.to_svg(_draw_accuracy(series))


def write_picture(
  workdir: str | os.PathLike, path: str | os.PathLike, *, max_nodes: int = 24
) -> None:
  """Writes an SVG of the accuracy curves with a search tree beneath.

  Raises:
    ValueError: the workdir holds no accuracy yet.
    OSError: the file cannot be written.
  """
  series = _accuracy_curves(records.read_curves(workdir))
  if not series:
    raise ValueError(f"{workdir}: metrics.jsonl holds no accuracy yet")
  parts = [_draw_accuracy(series)]
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
