"""Writers, and what people see of a run."""

import io
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax import metrics


def test_rows_keep_names_and_values(tmp_path):
  writer = metrics.JsonlWriter(tmp_path / "metrics.jsonl")
  values = {
    "loss": jnp.float32(0.5),
    "count": np.int64(3),
    "is_finite": np.bool_(True),
    "name": "mcts",
    "zero": 0,
    "bad": float("nan"),
    "worse": -math.inf,
    "absent": None,
  }
  writer.write({"iteration": np.int32(7), **values})
  # On disk before close: a killed process loses nothing.
  rows = metrics.read_jsonl(tmp_path / "metrics.jsonl")
  assert rows == [
    {
      "iteration": 7,
      "loss": 0.5,
      "count": 3,
      "is_finite": True,
      "name": "mcts",
      "zero": 0,
      "bad": "nan",
      "worse": "-inf",
      "absent": None,
    }
  ]
  writer.close()


def test_a_resumed_run_writes_the_rows_of_an_undisturbed_one(tmp_path):
  def run(path, iterations, cursor=0):
    writer = metrics.JsonlWriter(path)
    writer.truncate_to(cursor)
    cursors = {}
    for i in iterations:
      writer.write({"iteration": i, "loss": 1 / (i + 1)})
      cursors[i] = writer.cursor()
    writer.close()
    return cursors

  whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
  run(whole, range(6))
  cursors = run(cut, range(4))
  with open(cut, "a") as file:
    file.write('{"iteration": 4, "lo')
  assert len(metrics.read_jsonl(cut)) == 4
  run(cut, range(2, 6), cursor=cursors[1])
  assert cut.read_bytes() == whole.read_bytes()


def test_a_file_shorter_than_its_cursor_is_refused(tmp_path):
  writer = metrics.JsonlWriter(tmp_path / "metrics.jsonl")
  writer.write({"loss": 1.0})
  cursor = writer.cursor()
  with pytest.raises(ValueError, match=f"has {cursor} bytes, but the check"):
    writer.truncate_to(cursor + 1)
  writer.truncate_to(cursor)
  assert len(metrics.read_jsonl(writer.path)) == 1
  writer.close()


def test_a_line_that_is_not_json_is_named(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"a": 0}\n{"a"\n{"a": 2}\n')
  with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not JSON"):
    metrics.read_jsonl(path)


def test_tensorboard_reads_what_was_written(tmp_path):
  from tensorboard.backend.event_processing import event_accumulator

  writer = metrics.TensorBoardWriter(tmp_path / "events")
  for i in range(3):
    writer.write(i, {"search/greedy": i / 2, "name": "mcts", "absent": None})
  writer.close()
  reader = event_accumulator.EventAccumulator(str(tmp_path / "events"))
  reader.Reload()
  assert reader.Tags()["scalars"] == ["search/greedy"]
  events = reader.Scalars("search/greedy")
  assert [(e.step, e.value) for e in events] == [(0, 0.0), (1, 0.5), (2, 1.0)]


class FakeWandb:
  """The few names of wandb that we use; keeps what it was given."""

  class Error(Exception):
    pass

  def __init__(self, failure=""):
    self.failure, self.inits, self.logs, self.num_finished = failure, [], [], 0
    self.id = ""

  def init(self, **arguments):
    if self.failure:
      raise self.Error(self.failure)
    self.inits.append(arguments)
    self.id = arguments["id"] or f"made{len(self.inits)}"
    return self

  def log(self, values, step):
    self.logs.append((step, values))

  def finish(self):
    self.num_finished += 1


def test_wandb_gets_the_numbers(tmp_path, monkeypatch):
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  config = {"seed": 3, "search": {"rule": "puct"}}

  def start():
    return metrics.WandbWriter("o1", "run", config, directory=tmp_path)

  writer = start()
  values = {"loss": jnp.float32(0.5), "name": "mcts", "gone": None, "zero": 0}
  writer.write(np.int64(4), values | {"bad": np.nan})
  step, found = fake.logs[0]
  assert step == 4 and math.isnan(found.pop("bad"))
  assert found == {"loss": 0.5, "zero": 0.0}
  assert all(type(value) is float for value in found.values())
  assert not fake.num_finished
  writer.close()
  assert fake.num_finished == 1
  # A resumed run is the same one to the service.
  start()
  shared = {
    "project": "o1",
    "name": "run",
    "config": config,
    "dir": str(tmp_path),
    "resume": "allow",
  }
  assert fake.inits == [shared | {"id": None}, shared | {"id": "made1"}]


def test_wandb_that_does_not_start_says_what_to_do(tmp_path, monkeypatch):
  def start(project="o1"):
    metrics.WandbWriter(project, "run", {}, directory=tmp_path)

  monkeypatch.setitem(sys.modules, "wandb", FakeWandb("no key\n  configured"))
  message = r"not start \(no key configured\): log in .* WANDB_MODE=offline"
  with pytest.raises(ValueError, match=message) as raised:
    start()
  assert "\n" not in str(raised.value)
  with pytest.raises(ValueError, match="names no project"):
    start(project="")
  # None there makes the import fail.
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ValueError, match="pip install wandb, or leave metrics"):
    start()
  assert not list(tmp_path.iterdir())


def test_table_prints_its_header_once_and_columns_line_up():
  stream = io.StringIO()
  columns = [("iteration", "d"), ("greedy", ".1%"), ("loss", ".3f")]
  table = metrics.Table(columns, stream)
  table.row({"iteration": 1, "greedy": 0.125, "loss": 1.0, "other": 3})
  table.row({"iteration": 12, "loss": jnp.float32(0.25)})
  assert stream.getvalue().splitlines() == [
    "iteration  greedy    loss",
    "        1   12.5%   1.000",
    "       12       -   0.250",
  ]


class Clock:
  """A clock that the test turns."""

  def __init__(self, monkeypatch):
    self.now = 0.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: self.now)


def test_progress_prints_plain_lines_now_and_then(monkeypatch):
  clock, stream = Clock(monkeypatch), io.StringIO()
  seen = []
  for item in metrics.progress("abcdefgh", "search", 8, stream=stream):
    seen.append(item)
    clock.now += 20 if item < "g" else 1
  assert "".join(seen) == "abcdefgh"
  assert stream.getvalue().splitlines() == [
    "search: 1/8, 2 min 20 s left",
    "search: 2/8, 2 min 00 s left",
    "search: 3/8, 1 min 40 s left",
    "search: 4/8, 1 min 20 s left",
    "search: 5/8, 1 min 00 s left",
    "search: 6/8, 40 s left",
  ]


def test_clock_tells_laps_and_compilation_apart(monkeypatch):
  turned = Clock(monkeypatch)
  clock = metrics.Clock()
  turned.now = 2.0
  assert clock.lap() == 2.0
  turned.now = 5.0
  assert (clock.lap(), clock.total(), clock.compilation()) == (3.0, 5.0, 0.0)
  double = jax.jit(lambda x: x * 2 + 12345)
  double(jnp.float32(1))
  compiled = clock.compilation()
  assert compiled > 0
  double(jnp.float32(2))
  assert clock.compilation() == compiled
  assert metrics.Clock().compilation() == 0


def test_a_short_phase_prints_nothing():
  stream = io.StringIO()
  items = metrics.progress(range(3), "learn", 3, stream=stream)
  assert list(items) == [0, 1, 2]
  assert stream.getvalue() == ""


class Terminal(io.StringIO):
  """What is printed on it may move."""

  def isatty(self):
    return True


def test_what_is_piped_stays_out_of_the_terminal(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  stream, log = Terminal(), io.StringIO()
  monkeypatch.setattr(metrics.sys, "stdout", log)
  for _ in metrics.progress("ab", "run", 2, stream=stream):
    print("a row")
  assert log.getvalue() == "a row\n" * 2
  assert "a row" not in stream.getvalue()


def test_a_phase_within_a_phase_has_its_own_bar(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  stream, seen = Terminal(), []
  for i in metrics.progress(range(2), "run", 2, stream=stream):
    for j in metrics.progress(range(3), "learn", 3, stream=stream):
      seen.append((i, j))
    metrics._open_displays[0].refresh()
  assert seen == [(i, j) for i in range(2) for j in range(3)]
  assert "run" in stream.getvalue() and "1/2" in stream.getvalue()
  assert not metrics._open_displays


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  stream = Terminal()
  assert list(metrics.progress("ab", "pretrain", 2, stream=stream)) == [
    "a",
    "b",
  ]
  assert "pretrain" in stream.getvalue() and "2/2" in stream.getvalue()


def test_rows_are_plain_json(tmp_path):
  writer = metrics.JsonlWriter(tmp_path / "metrics.jsonl")
  with pytest.raises(ValueError):
    writer.write({"vector": np.ones(3)})
  writer.write({"texts": "→"})
  writer.close()
  (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert json.loads(line) == {"texts": "→"}
