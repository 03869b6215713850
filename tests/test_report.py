"""The report: whole, self-contained, harmless, whatever state a run is in."""

import html.parser
import json
import re
import xml.etree.ElementTree as ET

import pytest

from o1jax import iterate, records, report

VOID = {"meta", "br", "link", "img", "input", "hr"}
HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(1)>"


class Page(html.parser.HTMLParser):
  """Collects tags, attributes and text, and checks that tags close."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.attributes, self.open, self.text = [], [], [], ""
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.attributes += [(tag, name, value) for name, value in attributes]
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.handle_starttag(tag, attributes)
    if tag not in VOID:
      self.open.pop()

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


def write_lines(path, rows, end=""):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)


BUDGETS = {"greedy": (1,), "majority_vote": (2, 16), "mcts": (2, 16)}
BUDGETS |= {"best_of_n": (2, 16), "beam": (2, 16)}  # One that is not known.


def measured(iteration, strategy, budget):
  """A row as `Evaluator.measure` gives, with its iteration."""
  accuracy = 0.2 * iteration + budget / 1000
  return {
    "iteration": iteration,
    "strategy": strategy,
    "budget": budget,
    "accuracy": accuracy,
    "accuracy_low": accuracy - 0.1,
    "accuracy_high": accuracy + 0.1,
    "coverage": accuracy + 0.05,
    "tokens": 20.0 * budget,
    "verifier_requests": 0.0,
    "num_problems": 77,
    "seconds": 2.0,
  }


@pytest.fixture
def workdir(tmp_path):
  """A small run with every file a report reads."""
  folder = tmp_path / "run"
  metrics, evaluation = [], []
  for i in range(4):
    rows = [measured(i, "greedy", 1)]
    if i >= 2:
      rows = [measured(i, name, n) for name in BUDGETS for n in BUDGETS[name]]
      evaluation += rows
    metrics.append(
      {
        "kind": "iteration" if i else "initialize",
        "iteration": i,
        "search/solved": 10 * i,
        "learn/policy_loss": 1.0 / (i + 1),
        **iterate.flatten_rows(rows),
        "seconds": 30.0,
      }
    )
  write_lines(folder / "metrics.jsonl", metrics, '{"kind": "iterat')
  write_lines(folder / "evaluation.jsonl", evaluation, '{"iteration": 9, "s')
  problem = {"id": "countdown/2,3,7=13", "prompt": "3 7 2 = 13\n"}
  samples = [
    {
      "iteration": 3,
      "problem": problem,
      "text": text,
      "outcome_reward": float(is_correct),
      "verdict": verdict,
      "source": "search",
    }
    for text, is_correct, verdict in (
      ("3 * 2 = 6 (left: 7 6)\n7 + 6 = 13 (left: 13)", True, "correct"),
      (HOSTILE, False, HOSTILE),
    )
  ]
  write_lines(folder / "samples" / "iteration_3.jsonl", samples)
  nodes = [
    {"parent": -1, "text": "", "num_visits": 8, "value": 0.4, "prior": 1.0},
    {"parent": 0, "text": HOSTILE, "num_visits": 7, "value": 0.4, "prior": 1.0},
  ]
  tree = {"problem": problem, "iteration": 3, "nodes": nodes}
  write_lines(folder / "trees" / "iteration_3.jsonl", [tree])
  search = {"num_simulations": 32, "name": HOSTILE}
  manifest = {"config": {"seed": 0, "search": search}, "git": "ab"}
  (folder / "manifest.json").write_text(json.dumps(manifest))
  return folder


# What the page of `workdir` says, whatever else stands in the files.
SHOWN = (
  "accuracy: greedy",
  "60.1%",  # the newest greedy accuracy
  "accuracy: mcts, 16 solutions",
  "policy_loss",
  "initialize: learn",
  "after iteration 3",
  "77",
  "7 + 6 = 13 (left: 13)",
  "Search tree of 3 7 2 = 13",
  "config.search.num_simulations",
)


def test_report_holds_every_section(workdir):
  path = report.write_report(workdir)
  assert path == workdir / "report.html"
  page = Page(path.read_text("utf-8"))
  for text in (*SHOWN, "2.0 min"):
    assert text in page.text
  assert page.tags.count("details") == 2


def charts_of(text):
  """Title -> label -> (colour, number of points), of every line chart."""
  charts = {}
  for svg in re.findall(r"<svg.*?</svg>", text, re.S):
    lines = re.findall(
      r'data-series="([^"]+)"\s+style="stroke:var\(--s(\d)\)"\s+points="([^"]+)"',
      svg,
    )
    if lines:
      title = re.search(r'class="title"[^>]*>([^<]*)<', svg)[1]
      charts[title] = {
        name: (int(color), len(points.split())) for name, color, points in lines
      }
  return charts


def test_every_strategy_has_its_line_in_its_colour_in_every_chart(workdir):
  charts = charts_of(report.render_report(workdir))
  colors = {
    "majority vote": 1, "best of n": 2, "mcts": 3, "beam": 4
  }  # fmt: skip
  by_iteration = {"greedy": (0, 4)} | {
    f"{name}, {n} solutions": (color, 2)
    for name, color in colors.items()
    for n in (2, 16)
  }
  pair = {"greedy": (0, 2)} | {name: (c, 2) for name, c in colors.items()}
  assert charts == {
    "Accuracy against training iterations": by_iteration,
    "Coverage against training iterations": by_iteration,
    "Accuracy against test-time tokens": pair | {"greedy": (0, 1)},
    "Accuracy at a budget of 2 solutions, by saved iteration": pair,
    "Accuracy at a budget of 16 solutions, by saved iteration": pair,
  }


def test_nothing_is_fetched_and_no_script_runs(workdir):
  text = report.render_report(workdir)
  page = Page(text)
  assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
  for _, name, value in page.attributes:
    assert name not in ("src", "href", "xlink:href", "srcset", "action")
    assert not name.startswith("on")
    assert name == "xmlns" or "http" not in (value or "")
  assert "@import" not in text and "url(" not in text
  policy = [v for _, name, v in page.attributes if name == "content"]
  assert any("default-src 'none'" in value for value in policy)
  assert HOSTILE in page.text  # shown as text


def test_colours_are_defined_in_both_modes(workdir):
  text = report.render_report(workdir)
  assert text.count("prefers-color-scheme:dark") == 1
  for name in set(re.findall(r"var\(--(\w+)\)", text)):
    assert len(re.findall(rf"--{name}:", text)) == 2


def test_missing_files_leave_a_page_that_says_so(tmp_path):
  page = Page(report.write_report(tmp_path).read_text("utf-8"))
  assert f"python -m o1jax.evaluate --workdir={tmp_path}" in page.text
  assert "No accuracy has been measured yet" in page.text
  with pytest.raises(ValueError, match="no accuracy"):
    report.render_accuracy_svg(tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.93])
def test_files_cut_short_anywhere_show_what_is_whole(workdir, share):
  left = {}
  for path in [p for p in workdir.rglob("*") if p.is_file()]:
    text = path.read_bytes()
    path.write_bytes(text[: int(share * len(text))])
    left[str(path.relative_to(workdir))] = path.read_bytes().count(b"\n")
  text = report.render_report(workdir)
  page, charts = Page(text), charts_of(text)
  if left["metrics.jsonl"]:
    learning = charts["Accuracy against training iterations"]
    assert learning["greedy"] == (0, left["metrics.jsonl"])
  has_title = "Accuracy against test-time tokens" in charts
  assert has_title == (left["evaluation.jsonl"] > 0)
  # Their lines are whole but for the last one, and these hold one object.
  for note, is_missing in (
    ("No accuracy has been measured", left["metrics.jsonl"] == 0),
    ("Not measured yet", left["evaluation.jsonl"] == 0),
    ("No sample has been saved", left["samples/iteration_3.jsonl"] == 0),
    ("No search tree has been saved", True),
  ):
    assert (note in page.text) == is_missing
  assert "manifest.json" not in page.text


def test_wrong_types_in_rows_leave_the_others_shown(workdir):
  odd = [None, "x", [], {}, True, -1, float("inf"), 10**400, "\ud800"]
  for name in ("metrics.jsonl", "evaluation.jsonl", "trees/iteration_3.jsonl",
               "samples/iteration_3.jsonl"):  # fmt: skip
    rows = list(records.read_rows(workdir / name))
    wrong = [{**r, key: v} for r in rows[:2] for key in r for v in odd]
    write_lines(workdir / name, [*rows, *wrong, *rows])
  report.write_report(workdir)
  text = (workdir / "report.html").read_text("utf-8")
  page, charts = Page(text), charts_of(text)
  for shown in SHOWN:
    assert shown in page.text
  learning = charts["Accuracy against training iterations"]
  # At the iterations 0 to 3, and at the odd one.
  assert learning["greedy"] == (0, 5)
  assert learning["mcts, 16 solutions"] == (3, 2)
  for places in re.findall(r' (?:points|x|y|cx|cy|r|d)="([^"]+)"', text):
    assert not re.search("nan|inf", places)


def test_a_failed_write_leaves_the_earlier_report(workdir, monkeypatch):
  path = report.write_report(workdir)
  before = path.read_text("utf-8")
  write_lines(workdir / "metrics.jsonl", [])

  def fail(self, target):
    raise OSError("disk full")

  monkeypatch.setattr("pathlib.Path.replace", fail)
  with pytest.raises(OSError, match="disk full"):
    report.write_report(workdir)
  assert path.read_text("utf-8") == before
  assert not list(workdir.glob("*.partial"))


def test_command_writes_report_and_picture(workdir, tmp_path, capsys):
  picture = tmp_path / "docs" / "run.svg"
  report.main([f"--workdir={workdir}", f"--picture={picture}"])
  assert capsys.readouterr().out.split() == [
    str(workdir / "report.html"),
    str(picture),
  ]
  root = ET.fromstring(picture.read_text("utf-8"))
  text = "".join(root.itertext())
  assert "Search tree of 3 7 2 = 13" in text
  (lines,) = charts_of(picture.read_text("utf-8")).values()
  assert {"greedy", "mcts, 16 solutions", "best of n, 2 solutions"} <= {*lines}
  assert "<script" not in picture.read_text("utf-8")


def test_command_refuses_a_folder_that_is_not_there(tmp_path, capsys):
  with pytest.raises(SystemExit) as stop:
    report.main([f"--workdir={tmp_path / 'none'}"])
  assert stop.value.code != 0
  assert "is not a folder" in capsys.readouterr().err
