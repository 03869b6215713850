"""Line charts as SVG, from plain Python values.

A picture is a `Drawing`: its size and SVG elements whose colours are CSS
variables, so that one drawing serves light and dark pages. `to_svg` makes a
file of it; `draw_lines` and `draw_sparkline` make charts, `tree_drawing`
makes search trees.

Every text may come from a model and is treated as hostile: `clean` keeps the
printable characters (no terminal escapes, no text running backwards, nothing
that XML forbids), `escape` makes markup harmless.
"""

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

NUM_COLORS = 8  # lines in one chart that stay easy to tell apart
NUM_SHADES = 7  # of the ramp that shows a node's value

# Eight colours, 3:1 or more against the background. The first four, and the
# two that share a marker's shape, keep apart for colour-blind readers (Oklab
# distance over 0.11 under simulated red and green blindness). The ramp is one
# hue that runs away from the background in both modes.
_LIGHT = {
  "surface": "#fcfcfb",
  "page": "#f4f4f1",
  "ink": "#0b0b0b",
  "ink2": "#52514e",
  "muted": "#77756f",
  "grid": "#e6e5df",
  "axis": "#c3c2b7",
  "good": "#0a7d32",
  "bad": "#c22f2f",
  "series": "#5f90e2 #81311b #33996c #6a48ac #928039 #a65791 #407132 #dc625a",
  "ramp": "#dceafc #b7d3f6 #86b6ef #5598e7 #2a78d6 #1c5cab #0d366b",
}
_DARK = {
  "surface": "#1a1a19",
  "page": "#111110",
  "ink": "#f7f7f5",
  "ink2": "#c3c2b7",
  "muted": "#98968e",
  "grid": "#2c2c2a",
  "axis": "#4a4a46",
  "good": "#4cc26b",
  "bad": "#f07171",
  "series": "#8cc2fd #e36c2e #8be1c6 #995fc2 #f6b762 #f69ed6 #68b269 #dd9393",
  "ramp": "#1b2f4a #184f95 #256abf #3987e5 #6da7ec #9ec5f4 #dceafc",
}


def _variables(colors: Mapping[str, str]) -> str:
  """CSS variables of one mode; `series` and `ramp` are lists of colours."""
  single = {k: v for k, v in colors.items() if k not in ("series", "ramp")}
  for i, color in enumerate(colors["series"].split()):
    single[f"s{i}"] = color
  for i, color in enumerate(colors["ramp"].split()):
    single[f"v{i}"] = color
  return "".join(f"--{name}:{color};" for name, color in single.items())


STYLE = (
  f".o1jax{{{_variables(_LIGHT)}color-scheme:light dark;color:var(--ink);"
  "font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}"
  f"@media(prefers-color-scheme:dark){{.o1jax{{{_variables(_DARK)}}}}}"
  ".o1jax text{fill:var(--ink2);font-size:12px;"
  "font-variant-numeric:tabular-nums}"
  ".o1jax .tick{fill:var(--muted);font-size:11px}"
  ".o1jax .title{fill:var(--ink);font-size:15px;font-weight:600}"
  ".o1jax .step{fill:var(--ink);font-size:11px;white-space:pre;"
  "font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}"
  ".o1jax .off{fill:var(--muted)}"
  ".o1jax .grid{stroke:var(--grid)}"
  ".o1jax .axis{stroke:var(--axis)}"
  ".o1jax .lead{stroke:var(--muted);stroke-dasharray:1 3}"
  ".o1jax .line{fill:none;stroke-width:2;stroke-linejoin:round}"
  ".o1jax .dashed{stroke-dasharray:7 4}"
  ".o1jax .bar{stroke-width:1.5;opacity:.55}"
  ".o1jax .dot{stroke:var(--surface);stroke-width:1.5}"
  ".o1jax .edge{fill:none;stroke:var(--axis)}"
  ".o1jax .node{stroke:var(--ink2);stroke-width:1}"
  ".o1jax .ring{fill:none;stroke:var(--good);stroke-width:2}"
  ".o1jax .yes,.o1jax .no{fill:none;stroke-width:2;stroke-linecap:round}"
  ".o1jax .yes{stroke:var(--good)}.o1jax .no{stroke:var(--bad)}"
  ".o1jax .surface{fill:var(--surface)}"
)


class Drawing(NamedTuple):
  """SVG elements with their size in pixels and a title read aloud."""

  width: float
  height: float
  body: str
  label: str


class Series(NamedTuple):
  """One line of a chart.

  Attributes:
    label: written at the end of the line.
    points: `(x, y)` pairs in the order of x.
    intervals: `(low, high)` of each point, drawn as bars; None without.
    color: index of the colour; it also picks the marker's shape, so that lines
      are not told apart by colour alone. From `NUM_COLORS` on colours come
      again, and the line is dashed.
  """

  label: str
  points: Sequence[tuple[float, float]]
  intervals: Sequence[tuple[float, float]] | None = None
  color: int = 0


def clean(text: Any, max_chars: int | None = None) -> str:
  """One printable line: line ends shown as a sign, other controls replaced."""
  line = str(text).replace("\n", " \u23ce ")
  line = "".join(c if c.isprintable() else "\ufffd" for c in line)
  if max_chars is not None and len(line) > max_chars:
    line = line[: max_chars - 1] + "\u2026"
  return line


def escape(text: Any, max_chars: int | None = None) -> str:
  """`clean` text with markup made harmless, for elements and attributes."""
  return html.escape(clean(text, max_chars))


def to_svg(drawing: Drawing, *, has_style: bool = True) -> str:
  """Makes an SVG element; with its style it stands alone as a file."""
  style = f"<style>{STYLE}</style>" if has_style else ""
  ground = '<rect class="surface" width="100%" height="100%"/>'
  return (
    '<svg xmlns="http://www.w3.org/2000/svg" class="o1jax" role="img"'
    f' aria-label="{escape(drawing.label)}" width="{drawing.width:.0f}"'
    f' height="{drawing.height:.0f}"'
    f' viewBox="0 0 {drawing.width:.0f} {drawing.height:.0f}">'
    f"{style}{ground if has_style else ''}{drawing.body}</svg>"
  )


def stack(drawings: Sequence[Drawing], *, width: float, gap: float = 24):
  """One drawing of several, one below the other, shrunk to the width."""
  parts, y = [], gap
  for drawing in drawings:
    scale = min(1.0, width / drawing.width)
    place = f"translate(0 {y:.0f}) scale({scale:.4f})"
    parts.append(f'<g transform="{place}">{drawing.body}</g>')
    y += drawing.height * scale + gap
  return Drawing(width, y, "".join(parts), "; ".join(d.label for d in drawings))


# Line charts.


def format_number(value: float | None, *, is_percent: bool = False) -> str:
  """Three figures in short form: 41.3%, 0.00012, 0.482, 5.32, 12.5k, 3M."""
  if value is None:
    return "\u2013"
  if is_percent:
    return f"{100 * value:.1f}".removesuffix(".0") + "%"
  size = abs(value)
  for unit, suffix, start in (
    (1e9, "G", 1e9),
    (1e6, "M", 1e6),
    (1e3, "k", 1e4),
  ):
    if size >= start:
      return f"{value / unit:.4g}{suffix}"
  if value == round(value) or size >= 100:
    return f"{value:.0f}"
  return f"{value:.3g}"


def nice_ticks(
  low: float, high: float, *, count: int = 5, is_integer: bool = False
) -> list[float]:
  """Multiples of 1, 2 or 5 times a power of ten that enclose [low, high].

  Args:
    low: smallest value shown.
    high: largest value shown; where equal to `low` the range is widened.
    count: steps wanted; about as many come.
    is_integer: True for counts, whose ticks are whole numbers.

  Returns:
    At least two increasing ticks; the first is <= low, the last >= high.
  """
  if high <= low:
    high = low + (abs(low) * 0.1 or 1.0)
  rough = (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
  if is_integer:
    step = max(1.0, round(step))
  first = math.floor(low / step + 1e-9)
  last = math.ceil(high / step - 1e-9)
  return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
  """1, 2 and 5 times powers of ten inside [low, high]."""
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  ticks = [m * 10.0**p for p in powers for m in (1, 2, 5)]
  return [t for t in ticks if low <= t <= high]


def _marker(x: float, y: float, color: int, size: float, title: str) -> str:
  """A circle, square, diamond or triangle around (x, y)."""
  style = f'class="dot" style="fill:var(--s{color % NUM_COLORS})"'
  hover = f"<title>{escape(title)}</title>"
  if color % 4 == 0:
    return (
      f'<circle {style} cx="{x:.1f}" cy="{y:.1f}" r="{size}">{hover}</circle>'
    )
  corners = {
    1: ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    2: ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    3: ((0, -1.2), (1.2, 0.9), (-1.2, 0.9)),
  }[color % 4]
  points = " ".join(
    f"{x + size * a:.1f},{y + size * b:.1f}" for a, b in corners
  )
  return f'<polygon {style} points="{points}">{hover}</polygon>'


def _spread(heights: Sequence[float], gap: float, bottom: float) -> list[float]:
  """Moves labels apart by `gap`, as little as a single sweep each way can."""
  order = sorted(range(len(heights)), key=lambda i: heights[i])
  places = list(heights)
  for above, here in itertools.pairwise(order):
    places[here] = max(places[here], places[above] + gap)
  limit = bottom
  for here in reversed(order):
    places[here] = min(places[here], limit)
    limit = places[here] - gap
  return places


def draw_lines(
  series: Sequence[Series],
  *,
  title: str,
  x_title: str,
  is_percent: bool = False,
  is_log: bool = False,
  width: float = 960,
  height: float = 340,
) -> Drawing:
  """A line chart with nice ticks; every line carries its name at its end.

  Args:
    series: lines with at least one point each.
    title: what the chart shows; written above it.
    x_title: name of the horizontal axis.
    is_percent: True for shares: the axis reads in percent, and starts at 0
      unless every value is high.
    is_log: True for a logarithmic horizontal axis (x > 0).
    width: of the whole drawing in pixels.
    height: of the whole drawing in pixels.
  """
  names = [clean(s.label, 36) for s in series]
  left, top, bottom = 52, 44, height - 44
  right = width - 42 - 6.5 * max(len(name) for name in names)
  xs = [x for s in series for x, _ in s.points]
  ys = [y for s in series for _, y in s.points]
  ys += [y for s in series for pair in s.intervals or () for y in pair]

  y_low, y_high = min(ys), max(ys)
  if is_percent:
    y_low = 0.0 if y_low < 0.6 * y_high else min(y_low, y_high - 0.05)
  y_ticks = nice_ticks(y_low, y_high)
  if is_percent and max(ys) <= 1.0:
    y_ticks = [t for t in y_ticks if t <= 1.0]
  x_low, x_high = min(xs), max(xs)
  if is_log:
    x_low, x_high = x_low / 1.2, x_high * 1.05
    x_ticks = _log_ticks(x_low, x_high)
  else:
    is_whole = all(x == round(x) for x in xs)
    x_ticks = nice_ticks(x_low, x_high, count=8, is_integer=is_whole)
    x_low, x_high = min(x_ticks[0], x_low), max(x_high, x_ticks[1])
    x_ticks = [t for t in x_ticks if t <= x_high]

  def place_x(x):
    if is_log:
      x, low, high = math.log(x), math.log(x_low), math.log(x_high)
    else:
      low, high = x_low, x_high
    return left + (right - left) * (x - low) / (high - low)

  def place_y(y):
    share = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
    return bottom - (bottom - top) * share

  def show(y):
    return format_number(y, is_percent=is_percent)

  out = [f'<text class="title" x="4" y="20">{escape(title)}</text>']
  for tick in y_ticks:
    y = place_y(tick)
    out.append(
      f'<line class="grid" x1="{left}" x2="{right:.1f}" y1="{y:.1f}"'
      f' y2="{y:.1f}"/><text class="tick" text-anchor="end" x="{left - 8}"'
      f' y="{y + 4:.1f}">{show(tick)}</text>'
    )
  out.append(f'<path class="axis" d="M{left} {bottom} H{right:.1f}"/>')
  for tick in x_ticks:
    out.append(
      f'<text class="tick" text-anchor="middle" x="{place_x(tick):.1f}"'
      f' y="{bottom + 18}">{format_number(tick)}</text>'
    )
  out.append(
    f'<text class="tick" text-anchor="middle" x="{(left + right) / 2:.0f}"'
    f' y="{bottom + 36}">{escape(x_title)}</text>'
  )
  ends = [place_y(s.points[-1][1]) for s in series]
  places = _spread(ends, 16, bottom)
  for s, name, end, place in zip(series, names, ends, places, strict=True):
    line = f'style="stroke:var(--s{s.color % NUM_COLORS})"'
    kind = "line dashed" if s.color >= NUM_COLORS else "line"
    for (x, _), (low, high) in zip(s.points, s.intervals or (), strict=False):
      out.append(
        f'<line class="bar" {line} x1="{place_x(x):.1f}"'
        f' x2="{place_x(x):.1f}" y1="{place_y(low):.1f}"'
        f' y2="{place_y(high):.1f}"/>'
      )
    path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in s.points)
    last_x = place_x(s.points[-1][0])
    out.append(
      f'<polyline class="{kind}" data-series="{escape(name)}" {line}'
      f' points="{path}"/><polyline class="lead" fill="none" points="'
      f"{last_x + 6:.1f},{end:.1f} {right:.1f},{end:.1f}"
      f' {right + 12:.1f},{place:.1f}"/>'
    )
    for x, y in s.points:
      hover = f"{name}: {show(y)} ({x_title}: {format_number(x)})"
      size = 4 if len(s.points) <= 25 else 2
      out.append(_marker(place_x(x), place_y(y), s.color, size, hover))
    out.append(
      _marker(right + 18, place, s.color, 4, name)
      + f'<text x="{right + 27:.1f}" y="{place + 4:.1f}">{escape(name)}</text>'
    )
  return Drawing(width, height, "".join(out), title)


def draw_sparkline(
  points: Sequence[tuple[float, float]],
  *,
  title: str,
  width: float = 240,
  height: float = 96,
) -> Drawing:
  """A small line: its name, its newest value, lowest and highest in grey."""
  left, right, top, bottom = 4, width - 8, 42, height - 22
  xs, ys = zip(*points, strict=True)
  x_span, y_span = (max(xs) - min(xs)) or 1, (max(ys) - min(ys)) or 1
  places = [
    (
      left + (right - left) * (x - min(xs)) / x_span,
      bottom - (bottom - top) * (y - min(ys)) / y_span,
    )
    for x, y in points
  ]
  path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
  limits = f"{format_number(min(ys))} to {format_number(max(ys))}"
  body = (
    f'<text x="{left}" y="13">{escape(title, 30)}</text>'
    f'<text class="title" x="{left}" y="32">{format_number(ys[-1])}</text>'
    f'<polyline class="line" style="stroke:var(--s0)" points="{path}">'
    f"<title>{escape(title)}</title></polyline>"
    f"{_marker(*places[-1], 0, 3.5, f'{title}: {format_number(ys[-1])}')}"
    f'<text class="tick" x="{left}" y="{height - 4}">{limits}</text>'
  )
  return Drawing(width, height, body, title)
