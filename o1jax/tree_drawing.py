"""Search trees as SVG and as text.

A tree is a row of the `trees/` of a run, see `jsonl.read_trees`.
`choose_nodes` takes its most visited part, `layout_tree` gives every node a
place (a column per depth, a row per leaf), `render_tree_svg` and
`render_tree_text` show it.
"""

import heapq
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from o1jax.drawing import (
  NUM_SHADES,
  Drawing,
  clean,
  escape,
  format_number,
  to_svg,
)
from o1jax.records import is_tree, number

_MAX_RADIUS = 13.0
_MIN_RADIUS = 3.0
_ROW = 2 * _MAX_RADIUS + 4
_CHAR = 6.7  # width of one character of a step, in pixels


class PlacedNode(NamedTuple):
  """A drawn node: its index in the tree, place, and undrawn children."""

  index: int
  parent: int
  depth: int
  x: float
  y: float
  radius: float
  label: str
  num_hidden: int


def _visits(node: Mapping[str, Any]) -> float:
  return max(0.0, number(node.get("num_visits")) or 0.0)


def _verdict(node: Mapping[str, Any]) -> str:
  """ "correct", "wrong" or "unchecked" for a finished solution, else ""."""
  if not node.get("is_terminal"):
    return ""
  is_correct = node.get("is_correct")
  if isinstance(is_correct, bool):
    return "correct" if is_correct else "wrong"
  return "unchecked"


def _children(nodes: Sequence[Mapping[str, Any]]) -> list[list[int]]:
  """Children of every node, the most visited first; node 0 is the root."""
  children = [[] for _ in nodes]
  for index, node in enumerate(nodes):
    if index > 0 and 0 <= node["parent"] < len(nodes):
      children[node["parent"]].append(index)
  for siblings in children:
    siblings.sort(key=lambda i: (-_visits(nodes[i]), i))
  return children


def choose_nodes(tree: Mapping[str, Any], max_nodes: int) -> set[int]:
  """The most visited nodes, grown from the root so that parents are in."""
  nodes = tree["nodes"]
  children = _children(nodes)
  chosen, border = set(), [(0.0, 0)]
  while border and len(chosen) < max_nodes:
    _, index = heapq.heappop(border)
    chosen.add(index)
    for child in children[index]:
      heapq.heappush(border, (-_visits(nodes[child]), child))
  return chosen


def _label(tree: Mapping[str, Any], index: int, max_chars: int) -> str:
  text = tree["nodes"][index].get("text")
  if index == 0:
    problem = tree.get("problem")
    text = problem.get("prompt") if isinstance(problem, Mapping) else ""
  return clean(str(text or "").strip() or "\u2205", max_chars)


def _text_width(text: str) -> float:
  wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
  return _CHAR * (len(text) + wide)


def layout_tree(
  tree: Mapping[str, Any], *, max_nodes: int = 40, max_chars: int = 34
) -> list[PlacedNode]:
  """Places the most visited nodes: a column per depth, a row per leaf.

  A parent stands between its first and its last child, so that no two nodes
  of a column come nearer than a row. The area of a node is its share of the
  root's visits, down to a smallest size.

  Returns:
    Placed nodes, parents before children and siblings by visits.
  """
  nodes = tree["nodes"]
  chosen = choose_nodes(tree, max_nodes)
  children = _children(nodes)
  most = max(_visits(nodes[i]) for i in chosen) or 1.0

  order, depth = [], {0: 0}
  pending = [0]
  while pending:
    index = pending.pop()
    order.append(index)
    for child in reversed([c for c in children[index] if c in chosen]):
      depth[child] = depth[index] + 1
      pending.append(child)

  labels, hidden, widths = {}, {}, {}
  for index in order:
    hidden[index] = sum(c not in chosen for c in children[index])
    labels[index] = _label(tree, index, max_chars)
    width = _text_width(labels[index]) + 12
    width += _CHAR * 4 if hidden[index] else 0
    width += 16 if nodes[index].get("is_terminal") else 0
    widths[depth[index]] = max(widths.get(depth[index], 0), width)
  column, x = {}, _MAX_RADIUS + 6
  for level in sorted(widths):
    column[level] = x
    x += widths[level] + 2 * _MAX_RADIUS + 40

  rows, next_row = {}, 0
  for index in reversed(order):  # children before parents, last leaf first
    drawn = [rows[c] for c in children[index] if c in chosen]
    if drawn:
      rows[index] = (min(drawn) + max(drawn)) / 2
    else:
      rows[index] = next_row
      next_row += 1
  return [
    PlacedNode(
      index=i,
      parent=nodes[i]["parent"] if i else -1,
      depth=depth[i],
      x=column[depth[i]],
      y=(next_row - 1 - rows[i]) * _ROW + _ROW / 2,
      radius=max(
        _MIN_RADIUS, _MAX_RADIUS * math.sqrt(_visits(nodes[i]) / most)
      ),
      label=labels[i],
      num_hidden=hidden[i],
    )
    for i in order
  ]


def _details(node: Mapping[str, Any]) -> str:
  """Numbers of a node for its hover text."""
  lines = [f"{_visits(node):.0f} visits"]
  for name in ("value", "prior", "reward"):
    lines.append(f"{name} {format_number(number(node.get(name)))}")
  return ", ".join([*lines, *filter(None, [_verdict(node)])])


def _verdict_mark(node: Mapping[str, Any], x: float, y: float) -> str:
  """A tick, a cross, or a dash for a finished text nobody checked."""
  shape, kind = {
    "correct": ("l3.5 4 l6 -8", "yes"),
    "wrong": ("m0 -4 l8 8 m0 -8 l-8 8", "no"),
    "unchecked": ("h8", "axis"),
  }[_verdict(node)]
  return f'<path class="{kind}" d="M{x:.1f} {y:.1f} {shape}"/>'


def _draw_node(tree: Mapping[str, Any], placed: PlacedNode) -> str:
  """Circle, verdict mark and step text of one node."""
  node = tree["nodes"][placed.index]
  value = number(node.get("value"))
  x, y, radius = placed.x, placed.y, placed.radius
  shade = "surface"
  if value is not None:
    shade = f"v{min(NUM_SHADES - 1, max(0, int(value * NUM_SHADES)))}"
  hover = f"{_label(tree, placed.index, 400)}: {_details(node)}"
  out = [f"<g><title>{escape(hover)}</title>"]
  if _verdict(node) == "correct":
    out.append(
      f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="{radius + 2.5:.1f}"/>'
    )
  out.append(
    f'<circle class="node" data-node="{placed.index}" cx="{x:.1f}"'
    f' cy="{y:.1f}" r="{radius:.1f}" style="fill:var(--{shade})"/>'
  )
  text_x = x + _MAX_RADIUS + 6
  if node.get("is_terminal"):
    out.append(_verdict_mark(node, text_x, y))
    text_x += 15
  more = ""
  if placed.num_hidden:
    more = f'<tspan class="off"> +{placed.num_hidden}</tspan>'
  faint = " off" if _visits(node) == 0 else ""
  out.append(
    f'<text class="step{faint}" x="{text_x:.1f}" y="{y + 4:.1f}">'
    f"{escape(placed.label)}{more}</text></g>"
  )
  return "".join(out)


def draw_tree(tree: Mapping[str, Any], *, max_nodes: int = 40) -> Drawing:
  """A search tree from left to right, with its legend above.

  Circle area: visits. Shade: value, light to dark. Width of an edge: its
  share of the visits of its parent. A tick and a ring mark a correct finished
  solution, a cross a wrong one. `+3` counts children left out.
  """
  placed = layout_tree(tree, max_nodes=max_nodes)
  nodes = tree["nodes"]
  by_index = {p.index: p for p in placed}
  top = 62
  out = []
  for p in placed:
    if p.parent < 0:
      continue
    start = by_index[p.parent]
    begin = start.x + _MAX_RADIUS + 10 + _text_width(start.label)
    begin += _CHAR * 4 if start.num_hidden else 0
    begin += 15 if nodes[start.index].get("is_terminal") else 0
    end, middle = p.x - p.radius - 3, p.x - _MAX_RADIUS - 22
    share = _visits(nodes[p.index]) / (_visits(nodes[p.parent]) or 1.0)
    out.append(
      f'<path class="edge" stroke-width="{1 + 4 * min(1.0, share):.1f}"'
      f' d="M{begin:.1f} {start.y:.1f} C{middle:.1f} {start.y:.1f}'
      f' {middle:.1f} {p.y:.1f} {end:.1f} {p.y:.1f}"/>'
    )
  out += [_draw_node(tree, p) for p in placed]

  title = f"Search tree of {_label(tree, 0, 60)}"
  if len(placed) < len(nodes):
    title += f" ({len(placed)} most visited of {len(nodes)} nodes)"
  head = [f'<text class="title" x="4" y="20">{escape(title)}</text>']
  head.append('<text class="tick" x="4" y="42">value 0</text>')
  for i in range(NUM_SHADES):
    head.append(
      f'<rect x="{48 + 16 * i}" y="33" width="16" height="10"'
      f' style="fill:var(--v{i})"/>'
    )
  head.append(
    '<text class="tick" x="166" y="42">1</text>'
    '<text class="tick" x="196" y="42">area: visits</text>'
    '<path class="yes" d="M282 38 l3.5 4 l6 -8"/>'
    '<text class="tick" x="297" y="42">correct</text>'
    '<path class="no" d="M352 34 l8 8 m0 -8 l-8 8"/>'
    '<text class="tick" x="366" y="42">wrong</text>'
  )
  width = 16 + max(
    p.x + _MAX_RADIUS + 22 + _text_width(p.label) + 4 * _CHAR for p in placed
  )
  height = top + max(p.y for p in placed) + _ROW / 2 + 4
  body = "".join(head) + f'<g transform="translate(0 {top})">{"".join(out)}</g>'
  return Drawing(max(width, 430, 9 * len(title)), height, body, title)


def render_tree_svg(tree: Mapping[str, Any], *, max_nodes: int = 40) -> str:
  """A search tree as an SVG that stands alone: a file, or a notebook's output.

  Args:
    tree: a row of the `trees/` of a run, see `jsonl.read_trees`.
    max_nodes: nodes drawn, the most visited ones.

  Raises:
    ValueError: `tree` holds no list of nodes.
  """
  if not is_tree(tree):
    raise ValueError("a search tree needs `nodes`, each with its `parent`")
  return to_svg(draw_tree(tree, max_nodes=max_nodes))


def render_tree_text(
  tree: Mapping[str, Any], *, max_nodes: int = 40, max_chars: int = 60
) -> str:
  """A search tree as indented lines for a terminal; most visited nodes first.

  Each line holds visits, value and prior, then the step, with a tick or a
  cross behind a finished solution. Arguments and errors as `render_tree_svg`.
  """
  if not is_tree(tree):
    raise ValueError("a search tree needs `nodes`, each with its `parent`")
  nodes = tree["nodes"]
  chosen = choose_nodes(tree, max_nodes)
  children = _children(nodes)
  lines = ["visits  value  prior"]

  pending = [(0, "", "")]  # node, its own branch sign, indent of its children
  while pending:
    index, branch, indent = pending.pop()
    node = nodes[index]
    value, prior = (
      "    -" if v is None else f"{v:5.2f}"
      for v in (number(node.get("value")), number(node.get("prior")))
    )
    mark = {"correct": "  \u2713", "wrong": "  \u2717"}.get(_verdict(node), "")
    drawn = [c for c in children[index] if c in chosen]
    hidden = len(children[index]) - len(drawn)
    more = f"  (+{hidden} more)" if hidden else ""
    lines.append(
      f"{_visits(node):6.0f}  {value}  {prior}  "
      f"{branch}{_label(tree, index, max_chars)}{mark}{more}"
    )
    for child in reversed(drawn):
      is_last = child == drawn[-1]
      sign, space = (
        ("\u2514\u2500 ", "   ") if is_last else ("\u251c\u2500 ", "\u2502  ")
      )
      pending.append((child, indent + sign, indent + space))
  return "\n".join(lines)
