"""Charts: ticks, numbers, labels, and text that must do no harm."""

import math
import xml.etree.ElementTree as ET

import pytest

from o1jax import drawing
from o1jax.drawing import Series

SVG = "{http://www.w3.org/2000/svg}"


def chart(*series, **options):
  """The parsed elements of a line chart."""
  picture = drawing.draw_lines(series, title="t", x_title="x", **options)
  return ET.fromstring(drawing.to_svg(picture))


@pytest.mark.parametrize(
  "low, high",
  [(0.0, 0.93), (0.002, 0.0031), (-3.0, 12.0), (5.0, 5.0), (0.0, 0.0),
   (99.0, 1234.0), (-7.0, -7.0)],
)  # fmt: skip
def test_ticks_enclose_the_range_at_nice_multiples(low, high):
  ticks = drawing.nice_ticks(low, high)
  assert ticks[0] <= low and ticks[-1] >= high
  assert 2 <= len(ticks) <= 9
  step = ticks[1] - ticks[0]
  leading = step / 10 ** math.floor(math.log10(step) + 1e-9)
  assert min(abs(leading - m) for m in (1, 2, 5)) < 1e-6
  assert all(abs(t / step - round(t / step)) < 1e-6 for t in ticks)


def test_integer_ticks_are_whole():
  for high in range(1, 30):
    ticks = drawing.nice_ticks(0, high, count=8, is_integer=True)
    assert all(t == int(t) for t in ticks)


@pytest.mark.parametrize(
  "value, is_percent, text",
  [(0.4125, True, "41.2%"), (1.0, True, "100%"), (0.0, True, "0%"),
   (0.000123, False, "0.000123"), (999.6, False, "1000"), (20.0, False, "20"),
   (12500.0, False, "12.5k"), (3e6, False, "3M"), (-2e9, False, "-2G"),
   (None, False, "\u2013")],
)  # fmt: skip
def test_numbers_are_short(value, is_percent, text):
  assert drawing.format_number(value, is_percent=is_percent) == text


@pytest.mark.parametrize("end", [0.0, 0.5, 1.0])
def test_every_line_is_drawn_and_named_and_labels_keep_apart(end):
  lines = [
    Series(f"line {i}", [(1, 0.0), (2, end * (1 - i / 1000))], color=i)
    for i in range(drawing.NUM_COLORS)
  ]
  root = chart(*lines, is_percent=True)
  drawn = {e.get("data-series") for e in root.iter(f"{SVG}polyline")}
  assert {s.label for s in lines} <= drawn
  heights = sorted(
    float(e.get("y"))
    for e in root.iter(f"{SVG}text")
    if (e.text or "").startswith("line ")
  )
  assert len(heights) == len(lines)
  gaps = [b - a for a, b in zip(heights, heights[1:], strict=False)]
  assert min(gaps) >= 15
  assert heights[0] > 30 and heights[-1] < 340 - 30


def test_higher_values_stand_higher_and_bars_span_their_interval():
  root = chart(
    Series("a", [(1, 0.2), (4, 0.8)], [(0.1, 0.3), (0.7, 0.9)]),
    is_percent=True,
  )
  dots = [e for e in root.iter(f"{SVG}circle") if len(e)][:2]
  low, high = (float(e.get("cy")) for e in dots)
  assert high < low
  bars = [e for e in root.iter(f"{SVG}line") if e.get("class") == "bar"]
  for bar, dot in zip(bars, dots, strict=True):
    below, above = float(bar.get("y1")), float(bar.get("y2"))
    assert above < float(dot.get("cy")) < below
    assert bar.get("x1") == pytest.approx(dot.get("cx"))


def test_charts_of_odd_values_stay_inside_the_picture():
  cases = [
    ([(3, 0.0)], {"is_percent": True}),
    ([(0, 1.0), (1, 1.0)], {"is_percent": True}),
    ([(5, 0.99), (6, 1.0)], {"is_percent": True}),
    ([(1, 0.5), (1000, 0.6)], {"is_log": True, "is_percent": True}),
    ([(20, 7.0), (20, 7.0)], {"is_log": True}),
    ([(0, -4e9), (1, 1e-9)], {}),
  ]
  for points, options in cases:
    root = chart(Series("a", points), **options)
    for dot in root.iter(f"{SVG}circle"):
      assert 0 <= float(dot.get("cx")) <= 960
      assert 0 <= float(dot.get("cy")) <= 340


def test_logarithmic_axis_gives_equal_factors_equal_room():
  root = chart(Series("a", [(10, 1.0), (100, 2.0), (1000, 3.0)]), is_log=True)
  xs = [float(e.get("cx")) for e in root.iter(f"{SVG}circle")][:3]
  assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)


def test_an_axis_of_shares_has_ticks_between_whole_numbers():
  def ticks(points):
    texts = chart(Series("a", points)).iter(f"{SVG}text")
    return [e.text for e in texts if e.get("text-anchor") == "middle"][:-1]

  assert ticks([(0.0, 1.0), (0.5, 2.0), (1.0, 3.0)]) == (
    ["0", "0.2", "0.4", "0.6", "0.8", "1"]
  )
  assert ticks([(0, 1.0), (1, 3.0)]) == ["0", "1"]


def test_colors_that_come_again_are_dashed():
  root = chart(*(Series("a", [(0, 1.0), (1, 2.0)], color=c) for c in (1, 9)))
  lines = [e for e in root.iter(f"{SVG}polyline") if e.get("data-series")]
  assert [e.get("class") for e in lines] == ["line", "line dashed"]
  assert lines[0].get("style") == lines[1].get("style") == "stroke:var(--s1)"


def test_text_of_a_model_becomes_harmless():
  hostile = "<script>\"&'\x1b[31m\x00\u202e\ud800\n"
  assert drawing.clean(hostile) == (
    "<script>\"&'\ufffd[31m\ufffd\ufffd\ufffd \u23ce "
  )
  escaped = drawing.escape(hostile)
  assert not set("<>\"'") & set(escaped)
  escaped.encode("utf-8")
  assert drawing.clean("abcdef", 4) == "abc\u2026"
  picture = drawing.draw_sparkline([(0, 1.0)], title=hostile)
  ET.fromstring(drawing.to_svg(picture))
  chart(Series(hostile, [(0, 1.0)]))


def test_stacked_drawings_do_not_overlap():
  parts = [
    drawing.Drawing(400, 100, "", "a"),
    drawing.Drawing(2000, 500, "", "b"),
  ]
  picture = drawing.stack(parts, width=1000, gap=10)
  assert picture.width == 1000
  assert picture.height == 10 + 100 + 10 + 250 + 10
  assert "translate(0 10) scale(1.0000)" in picture.body
  assert "translate(0 120) scale(0.5000)" in picture.body
