"""What a run wrote is read back, also when it is missing, cut or foreign."""

import json

from o1jax import records


def write_lines(path, *rows, end=""):
  path.parent.mkdir(parents=True, exist_ok=True)
  text = "".join(json.dumps(row) + "\n" for row in rows)
  path.write_text(text + end)


def test_only_whole_objects_are_read(tmp_path):
  path = tmp_path / "a.jsonl"
  deep = "[" * 100_000
  path.write_bytes(
    b'{"a": 1}\n[1]\n\nnonsense\n\xff\xfe\n'
    + deep.encode()
    + b'\n{"a": 2}\n{"a": 3, "b'
  )
  assert [row["a"] for row in records.read_rows(path)] == [1, 2]
  assert list(records.read_rows(tmp_path / "none.jsonl")) == []
  assert list(records.read_rows(tmp_path)) == []


def test_curves_keep_finite_numbers_of_the_last_writing(tmp_path):
  write_lines(
    tmp_path / "metrics.jsonl",
    {"kind": "iteration", "iteration": 2, "learn/loss": 0.5},
    {"kind": "iteration", "iteration": 1, "learn/loss": 9.0},
    {"kind": "iteration", "iteration": 1, "learn/loss": 1.0, "note": "text"},
    {"kind": "iteration", "iteration": 3, "learn/loss": float("nan")},
    {"kind": "initialize", "iteration": 1, "seconds": 7, "is_done": True},
    {"learn/loss": 3.0},
    {"iteration": 3, "huge": 10**400, "zero": 0},
    end='{"kind":"iteration","iteration":4,"learn/lo',
  )
  assert records.read_curves(tmp_path) == {
    "iteration": {"learn/loss": [(1, 1.0), (2, 0.5)], "zero": [(3, 0.0)]},
    "initialize": {"seconds": [(1, 7.0)]},
  }


def test_evaluation_keeps_the_last_row_of_each_cell(tmp_path):
  row = {"iteration": 1, "strategy": "mcts", "budget": 64, "tokens": 60.0}
  write_lines(
    tmp_path / "evaluation.jsonl",
    {**row, "accuracy": 0.1},
    {**row, "accuracy": 0.2},
    {**row, "accuracy": 0.3, "budget": 128},
    {**row, "accuracy": None},
    {**row, "accuracy": 0.4, "tokens": 0},
    {"iteration": 1, "tokens": 3, "accuracy": 0.5},
  )
  rows = records.read_evaluation(tmp_path)
  assert [r["accuracy"] for r in rows] == [0.2, 0.3]


def test_newest_largest_tree_with_a_correct_end_is_chosen(tmp_path):
  def tree(iteration, size, is_correct=None):
    nodes = [{"parent": i - 1, "is_correct": is_correct} for i in range(size)]
    return {"iteration": iteration, "nodes": nodes}

  def size():
    return len(records.read_tree(tmp_path)["nodes"])

  assert records.read_tree(tmp_path) is None
  path = tmp_path / "trees" / "a.jsonl"
  write_lines(path, tree(1, 9, True), tree(2, 7, False), {"nodes": "x"})
  assert size() == 7
  write_lines(path, tree(2, 7, False), tree(2, 3, True), tree(1, 9, True))
  assert size() == 3
  end = '{"iteration": 9, "nodes": ['
  write_lines(path.with_name("b.jsonl"), tree(2, 4, True), end=end)
  assert size() == 4


def test_samples_are_some_right_and_wrong_of_the_newest_iteration(tmp_path):
  def sample(iteration, name, is_correct):
    return {
      "problem": {},
      "iteration": iteration,
      "text": name,
      "outcome_reward": float(is_correct),
    }

  old = [sample(1, "old", True)]
  new = [sample(2, f"s{i}", i % 3 == 0) for i in range(9)]
  write_lines(tmp_path / "samples" / "b.jsonl", *old)
  write_lines(tmp_path / "samples" / "a.jsonl", *new, {"iteration": 3})
  rows = records.read_samples(tmp_path, count=2)
  assert [row["text"] for row in rows] == ["s0", "s3", "s1", "s2"]
