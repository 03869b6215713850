"""Two runs side by side, also when one is young, foreign or hostile."""

import io
import json
import subprocess
import sys

import pytest

from o1jax import compare
from o1jax import config as config_lib

CONFIG = {"seed": 0, "learn": {"num_updates": 100}}


def make_run(folder, config, rows, **manifest):
  folder.mkdir(parents=True)
  manifest = {"config": config, "versions": {"jax": "1"}, **manifest}
  (folder / "manifest.json").write_text(json.dumps(manifest))
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "metrics.jsonl").write_text(text)
  return str(folder)


def row(iteration, greedy, loss, seconds, kind="iteration"):
  return {
    "kind": kind,
    "iteration": iteration,
    "eval/greedy_accuracy": greedy,
    "learn/loss": loss,
    "seconds": seconds,
  }


@pytest.fixture
def runs(tmp_path):
  slow = make_run(
    tmp_path / "slow",
    CONFIG,
    [
      row(0, 0.0, 3.0, 10.0, kind="initialize"),
      row(1, 0.5, 2.0, 40.0),
      row(2, 0.25, 1.0, 50.0),
    ],
  )
  quick = make_run(
    tmp_path / "quick",
    {"seed": 1, "learn": {"num_updates": 100}, "extra": "\x1b[31m"},
    [row(i, 0.1 * i, 3.0 - i, 20.0) for i in range(4)],
  )
  return slow, quick


def printed(*arguments):
  stream = io.StringIO()
  compare.compare(*arguments, stream)
  parts = stream.getvalue().rstrip("\n").split("\n\n")
  return [
    {cells[0]: tuple(cells[1:]) for cells in map(_cells, part.splitlines())}
    for part in parts
  ]


def _cells(line):
  return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_two_runs_side_by_side(runs):
  differing, reached, timed = printed(*runs, ["accuracy", "loss"])
  assert differing == {
    "what differs": ("slow", "quick"),
    "seed": ("0", "1"),
    "extra": ("absent", r"'\x1b[31m'"),
  }
  # The last common iteration is 2; only shares have a best.
  assert reached == {
    "last common iteration, and best": ("slow", "quick", "second less first"),
    "eval/greedy_accuracy, iteration 2": ("25%", "20%", "-5.0 points"),
    "eval/greedy_accuracy, best": ("50%", "30%", "-20.0 points"),
    "learn/loss, iteration 2": ("1", "1", "+0"),
  }
  # The quick run ends after 80 seconds; the slow one had done iteration 1.
  assert timed == {
    "in equal seconds": ("slow", "quick", "second less first"),
    "whole run, seconds": ("100", "80"),
    "eval/greedy_accuracy after 80": ("50%", "30%", "-20.0 points"),
  }


def test_a_run_is_like_itself(runs):
  slow, _ = runs
  differing, reached, _ = printed(slow, slow, [])
  assert list(differing) == ["what differs", "nothing"]
  # Whole paths where names agree, cut to a cell.
  assert {label[:20] for label in differing["what differs"]} == {slow[:20]}
  assert reached["seconds, iteration 2"] == ("50", "50", "+0")


def test_names_that_a_file_holds_cannot_steer_the_terminal(tmp_path):
  rows = [{"iteration": 1, "\x1b[2J_accuracy": 0.5}]
  pair = [make_run(tmp_path / name, CONFIG, rows) for name in ("a", "b")]
  _, reached = printed(*pair, [])[:2]
  assert reached["\ufffd[2J_accuracy, iteration 1"][:2] == ("50%", "50%")


def test_what_cannot_be_compared_ends_with_one_line(runs, tmp_path):
  slow, quick = runs
  young = make_run(tmp_path / "young", CONFIG, [])
  for first, second, wanted, message in (
    (slow, str(tmp_path / "none"), [], "is not a workdir"),
    (slow, young, [], "young has no iteration yet: wait for the first"),
    (
      slow,
      quick,
      ["acuracy"],
      "--metrics=acuracy names nothing that both runs measured: there are "
      "eval/greedy_accuracy, learn/loss, seconds",
    ),
  ):
    with pytest.raises(config_lib.UserError, match=message):
      printed(first, second, wanted)


def test_the_command_prints_and_refuses(runs):
  def run(*arguments):
    return subprocess.run(
      [sys.executable, "-m", "o1jax.compare", *arguments],
      capture_output=True,
      text=True,
    )

  done = run(*runs)
  assert done.returncode == 0 and done.stdout.startswith("what differs")
  assert "\x1b" not in done.stdout
  alone = run(runs[0])
  assert alone.returncode == 2 and alone.stdout == ""
  assert alone.stderr.startswith("error: give two workdirs")
