"""Drawn search trees: nothing overlaps, parents are there, order is visits."""

import math
import random
import re
import xml.etree.ElementTree as ET

import pytest

from o1jax import tree_drawing

SVG = "{http://www.w3.org/2000/svg}"


def node(parent, text, visits, **fields):
  defaults = {
    "value": 0.5,
    "prior": 0.25,
    "reward": 0.0,
    "is_terminal": False,
    "is_correct": None,
  }
  return {
    "parent": parent, "text": text, "num_visits": visits, **defaults, **fields
  }  # fmt: skip


def small_tree():
  done = {"is_terminal": True}
  return {
    "problem": {"prompt": "3 7 2 = 13\n"},
    "iteration": 4,
    "nodes": [
      node(-1, "", 33, value=0.4, prior=1.0),
      node(0, "3 + 7 = 10 (left: 2 10)", 9),
      node(0, "3 * 2 = 6 (left: 7 6)", 20, value=0.9),
      node(0, "7 - 3 = 4 (left: 2 4)", 0),
      node(2, "7 + 6 = 13 (left: 13)", 17, is_correct=True, **done),
      node(1, "10 + 2 = 12 (left: 12)", 4, is_correct=False, **done),
      node(1, "10 - 2 = 8 (left: 8)", 3, **done),
    ],
  }


def random_tree(seed, num_nodes):
  """Nodes in any order of visits, also children visited more than parents."""
  rng = random.Random(seed)
  nodes = [node(-1, "", 200)]
  for i in range(1, num_nodes):
    text = "x" * rng.randrange(1, 60)
    nodes.append(node(rng.randrange(i), text, rng.randrange(100)))
  return {"problem": {"prompt": "p"}, "nodes": nodes}


@pytest.mark.parametrize(
  "seed, num_nodes", [(0, 1), (1, 12), (2, 90), (3, 400)]
)
def test_layout_draws_parents_and_keeps_nodes_apart(seed, num_nodes):
  tree = random_tree(seed, num_nodes)
  placed = tree_drawing.layout_tree(tree, max_nodes=40)
  assert len(placed) == min(40, num_nodes)
  at = {p.index: p for p in placed}
  assert len(at) == len(placed) and 0 in at
  for p in placed:
    if p.index:
      assert p.parent == tree["nodes"][p.index]["parent"]
      assert at[p.parent].x < p.x
  for i, p in enumerate(placed):
    for q in placed[:i]:
      distance = math.hypot(p.x - q.x, p.y - q.y)
      assert distance > p.radius + q.radius + 2
      if p.depth == q.depth:  # nor do the labels of a column
        assert abs(p.y - q.y) >= 14
  for p in placed:  # a label ends before the next column starts
    later = [q.x - q.radius for q in placed if q.depth == p.depth + 1]
    assert p.x + 13 + 6.7 * len(p.label) < min(later, default=math.inf)
  drawn = [sum(q.parent == p.index for q in placed) for p in placed]
  for p, count in zip(placed, drawn, strict=True):
    total = sum(n["parent"] == p.index for n in tree["nodes"])
    assert p.num_hidden == total - count


def test_chosen_nodes_are_the_most_visited_with_their_ancestors():
  tree = small_tree()
  assert tree_drawing.choose_nodes(tree, 3) == {0, 2, 4}
  assert tree_drawing.choose_nodes(tree, 100) == set(range(7))


def test_area_grows_with_visits():
  placed = {p.index: p for p in tree_drawing.layout_tree(small_tree())}
  share = (placed[2].radius / placed[0].radius) ** 2
  assert share == pytest.approx(20 / 33)
  assert placed[3].radius > 0


def test_svg_shows_every_node_with_its_verdict_and_details():
  root = ET.fromstring(tree_drawing.render_tree_svg(small_tree()))
  circles = [e for e in root.iter(f"{SVG}circle") if e.get("data-node")]
  assert {e.get("data-node") for e in circles} == set("0123456")
  rings = [e for e in root.iter(f"{SVG}circle") if e.get("class") == "ring"]
  assert len(rings) == 1
  kinds = [e.get("class") for e in root.iter(f"{SVG}path")]
  assert kinds.count("yes") == 2 and kinds.count("no") == 2  # and the legend
  assert kinds.count("edge") == 6
  hover = [e.text for e in root.iter(f"{SVG}title")]
  assert (
    "3 * 2 = 6 (left: 7 6): 20 visits, value 0.9, prior 0.25, reward 0" in hover
  )
  assert any(h.endswith("correct") for h in hover)
  fills = {e.get("data-node"): e.get("style") for e in circles}
  assert fills["2"] == "fill:var(--v6)" and fills["0"] == "fill:var(--v2)"


def test_svg_stands_alone_in_both_modes():
  svg = tree_drawing.render_tree_svg(small_tree())
  assert "prefers-color-scheme:dark" in svg
  assert not re.search(r"(href|src|url|@import|<script)", svg)
  defined = set(re.findall(r"--(\w+):", svg))
  assert set(re.findall(r"var\(--(\w+)\)", svg)) <= defined


def test_text_lists_children_by_visits():
  assert tree_drawing.render_tree_text(small_tree()).split("\n") == [
    "visits  value  prior",
    "    33   0.40   1.00  3 7 2 = 13",
    "    20   0.90   0.25  \u251c\u2500 3 * 2 = 6 (left: 7 6)",
    "    17   0.50   0.25  \u2502  \u2514\u2500 7 + 6 = 13 (left: 13)  \u2713",
    "     9   0.50   0.25  \u251c\u2500 3 + 7 = 10 (left: 2 10)",
    "     4   0.50   0.25  \u2502  \u251c\u2500 10 + 2 = 12 (left: 12)  \u2717",
    "     3   0.50   0.25  \u2502  \u2514\u2500 10 - 2 = 8 (left: 8)",
    "     0   0.50   0.25  \u2514\u2500 7 - 3 = 4 (left: 2 4)",
  ]
  short = tree_drawing.render_tree_text(small_tree(), max_nodes=2, max_chars=8)
  assert "(+2 more)" in short and "3 * 2 =\u2026" in short


def test_hostile_and_broken_nodes_are_drawn_harmlessly():
  broken = {"parent": 0, "is_terminal": True, "is_correct": [], "value": "?"}
  tree = {
    "problem": {"prompt": "<b>\x1b[2J"},
    "nodes": [
      {"parent": -1},
      node(0, "</text><script>alert(1)</script>\x00", float("nan")),
      node(0, "\u6f22" * 90, 10**400, value=float("inf"), prior=None),
      node(7, "an orphan", 5),
      node(4, "its own parent", 5),
      broken,
    ],
  }
  svg = tree_drawing.render_tree_svg(tree)
  ET.fromstring(svg)
  assert "<script" not in svg
  text = tree_drawing.render_tree_text(tree)
  assert "\x1b" not in text and "orphan" not in text
  assert "\u2717" not in text  # a verdict that is no verdict is not "wrong"
  assert len(text.split("\n")) == 1 + 4


@pytest.mark.parametrize("tree", [{}, {"nodes": []}, {"nodes": [{}]}, None])
def test_what_is_no_tree_is_refused(tree):
  for render in (tree_drawing.render_tree_svg, tree_drawing.render_tree_text):
    with pytest.raises(ValueError, match="nodes"):
      render(tree)
