"""The report: whole, self-contained, harmless, whatever state a run is in."""

import html.parser
import json
import re
import xml.etree.ElementTree as ET

import pytest

from o1jax import records, report

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


@pytest.fixture
def workdir(tmp_path):
  """A small run with every file a report reads."""
  folder = tmp_path / "run"
  metrics = [{"kind": "initialize", "iteration": 0, "pretrain/loss": 2.5}]
  metrics += [
    {
      "kind": "iteration",
      "iteration": i,
      "seconds": 30.0,
      "eval/greedy_accuracy": 0.2 * i,
      "eval/coverage": 0.25 * i,
      "search/solved": 10 * i,
      "learn/policy_loss": 1.0 / i,
    }
    for i in (1, 2, 3)
  ]
  write_lines(folder / "metrics.jsonl", metrics, '{"kind": "iterat')
  evaluation = [
    {
      "iteration": iteration,
      "strategy": strategy,
      "budget": budget,
      "accuracy": 0.5 + budget / 1000,
      "accuracy_low": 0.4,
      "accuracy_high": 0.7,
      "coverage": 0.8,
      "tokens": budget - 1.0,
      "seconds": 2.0,
      "verifier_requests": 0,
      "num_problems": 77,
    }
    for iteration in (2, 3)
    for strategy in ("greedy", "majority_vote", "best_of_n", "mcts", "beam")
    for budget in (32, 256)
  ]
  write_lines(folder / "evaluation.jsonl", evaluation, '{"iteration": 9, "s')
  samples = [
    {
      "iteration": 3,
      "problem": "countdown/2,3,7=13",
      "prompt": "3 7 2 = 13\n",
      "text": text,
      "is_correct": is_correct,
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
  tree = {"problem": "3 7 2 = 13", "iteration": 3, "nodes": nodes}
  write_lines(folder / "samples" / "trees.jsonl", [tree])
  config = {"seed": 0, "search": {"num_simulations": 32, "name": HOSTILE}}
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "manifest.json").write_text('{"jax": "0.10.2", "git": "ab')
  return folder


def test_report_holds_every_section(workdir):
  path = report.write_report(workdir)
  assert path == workdir / "report.html"
  page = Page(path.read_text("utf-8"))
  for text in (
    "greedy accuracy",
    "60%",  # the newest greedy accuracy
    "1.5 min",
    "policy_loss",
    "initialize: pretrain",
    "after iteration 3",
    "77",
    "7 + 6 = 13 (left: 13)",
    "Search tree of 3 7 2 = 13",
    "search.num_simulations",
  ):
    assert text in page.text
  assert "manifest.json" not in page.text  # half written
  assert page.tags.count("details") == 2


def test_every_strategy_has_its_line_in_both_charts(workdir):
  page = Page(report.render_report(workdir))
  lines = [v for _, name, v in page.attributes if name == "data-series"]
  for strategy in ("greedy", "majority vote", "best of n", "mcts", "beam"):
    assert lines.count(strategy) == 2  # against tokens, against iterations


def test_a_strategy_keeps_its_colour(workdir):
  text = report.render_report(workdir)
  colors = re.findall(r'data-series="greedy[^"]*"\s+style="([^"]+)"', text)
  assert colors == ["stroke:var(--s0)"] * 3


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
def test_files_cut_short_anywhere_do_not_break_it(workdir, share):
  for path in [p for p in workdir.rglob("*") if p.is_file()]:
    text = path.read_bytes()
    path.write_bytes(text[: int(share * len(text))])
  Page(report.render_report(workdir))


def test_wrong_types_in_rows_do_not_break_it(workdir):
  odd = [None, "x", [], {}, True, -1, float("inf"), 10**400, "\ud800"]
  for name in ("metrics.jsonl", "evaluation.jsonl", "samples/trees.jsonl",
               "samples/iteration_3.jsonl"):  # fmt: skip
    rows = list(records.read_rows(workdir / name))[:2]
    wrong = [{**r, key: v} for r in rows for key in r for v in odd]
    write_lines(workdir / name, rows + wrong)
  report.write_report(workdir)
  Page((workdir / "report.html").read_text("utf-8"))


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
  assert "greedy accuracy" in text and "Search tree of 3 7 2 = 13" in text
  assert "<script" not in picture.read_text("utf-8")


def test_command_refuses_a_folder_that_is_not_there(tmp_path, capsys):
  with pytest.raises(SystemExit) as stop:
    report.main([f"--workdir={tmp_path / 'none'}"])
  assert stop.value.code != 0
  assert "is not a folder" in capsys.readouterr().err
