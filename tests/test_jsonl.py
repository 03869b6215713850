"""What is written is read back; what is wrong is named with its line."""

import dataclasses
import json
import os

import numpy as np
import pytest

from o1jax import jsonl
from o1jax.types import Problem, ScoredSolution

PROBLEM = Problem("p/é", "toy", "3 7 =\n", {"target": 10, "numbers": [3, 7]})


def make_solution(**changes):
  solution = ScoredSolution(
    problem=PROBLEM,
    text="3 + 7 = 10\n",
    tokens=np.array([4, 2, 9], np.int32),
    step_weights=np.array([0.1, 0.0, 1.0], np.float32),
    behavior_log_probs=np.array([-0.3, -1e-9, -20.0], np.float32),
    policy_log_probs=np.array([-0.1, -0.2, -1 / 3], np.float32),
    outcome_reward=1 / 3,
    verdict="correct",
    iteration=4,
    source="hindsight",
    num_visits=12,
  )
  return dataclasses.replace(solution, **changes)


def assert_same(found, expected):
  for field in dataclasses.fields(ScoredSolution):
    x, y = getattr(found, field.name), getattr(expected, field.name)
    if isinstance(y, np.ndarray):
      assert x.dtype == y.dtype
      np.testing.assert_array_equal(x, y)
    else:
      assert x == y, field.name


def make_tree():
  node = {
    "parent": -1,
    "text": "",
    "num_visits": 3,
    "value": 0.5,
    "prior": 1.0,
    "reward": 0.0,
    "is_terminal": False,
    "is_correct": None,
  }
  child = node | {"parent": 0, "text": "3 + 7 = 10", "is_terminal": True}
  return {
    "problem": jsonl.problem_row(PROBLEM),
    "nodes": [node, child, dict(child)],
    "strategy": "mcts",
  }


def test_problems_solutions_and_trees_come_back_as_they_went(tmp_path):
  path = tmp_path / "rows.jsonl"
  jsonl.write_problems(path, [PROBLEM, PROBLEM])
  assert jsonl.read_problems(path) == [PROBLEM, PROBLEM]
  unknown = np.full(3, np.nan, np.float32)
  solutions = [make_solution(), make_solution(behavior_log_probs=unknown)]
  jsonl.write_solutions(path, solutions)
  for found, expected in zip(
    jsonl.read_solutions(path), solutions, strict=True
  ):
    assert_same(found, expected)
  jsonl.write_trees(path, [make_tree()])
  assert jsonl.read_trees(path) == [make_tree()]
  assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_rows_made_elsewhere_get_their_tokens_here(tmp_path):
  row = jsonl.solution_row(make_solution())
  for name in ("tokens", *jsonl.FLOAT_ARRAYS, "num_visits"):
    del row[name]
  path = tmp_path / "rows.jsonl"
  path.write_text(f"\n{json.dumps(row)}\n\n")
  found = jsonl.read_solutions(path, lambda text: [len(text), 1])[0]
  np.testing.assert_array_equal(found.tokens, [11, 1])
  np.testing.assert_array_equal(found.step_weights, [1, 1])
  assert np.isnan(found.policy_log_probs).all()
  assert found.num_visits == 1
  with pytest.raises(ValueError, match=r"rows.jsonl:2: field 'tokens' is mis"):
    jsonl.read_solutions(path)


@pytest.mark.parametrize(
  ("name", "slip"),
  [("text", "txt"), ("tokens", "token"), ("num_visits", "num_visit")],
)
def test_a_slip_in_a_name_is_refused_and_further_fields_pass(
  tmp_path, name, slip
):
  path = tmp_path / "rows.jsonl"
  row = jsonl.solution_row(make_solution()) | {"prompt": "3 7", "is_kept": 1}
  path.write_text(json.dumps(row))
  assert_same(jsonl.read_solutions(path)[0], make_solution())
  row[slip] = row.pop(name)
  path.write_text(json.dumps(row))
  words = f"field '{slip}' is unknown; did you mean '{name}'"
  with pytest.raises(ValueError, match=words):
    jsonl.read_solutions(path, lambda text: [1])


LISTED = r"field 'step_weights': expected a list of 3 finite numbers >= 0, got "


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"text": 7}, "field 'text': expected a string, got 7"),
    ({"outcome_reward": 1.5}, r"expected a number in \[0, 1\], got 1.5"),
    ({"outcome_reward": True}, r"'outcome_reward': .* got true"),
    ({"outcome_reward": "1"}, r"'outcome_reward': .* got \"1\""),
    ({"source": "found"}, "'source': expected one of search, hindsight, dem"),
    ({"iteration": -1}, "'iteration': expected a whole number >= 0, got -1"),
    ({"iteration": 1.5}, "'iteration': expected a whole number >= 0"),
    ({"num_visits": None}, "'num_visits': .* got null"),
    ({"tokens": [1, 2**31, 2]}, "'tokens': expected a list of token ids"),
    ({"tokens": [1, -1, 2]}, "'tokens': expected a list of token ids"),
    ({"step_weights": [1, 2]}, LISTED),
    ({"step_weights": [1, 2, "3"]}, LISTED),
    ({"step_weights": [1, 2, 1e300]}, LISTED),
    ({"step_weights": [1, 2, -1]}, LISTED),
    ({"policy_log_probs": [-1, -2, 10**400]}, "a list of 3 finite numbers, g"),
    ({"problem": 3}, "'problem': expected an object, got 3"),
    ({"problem": {"id": "p"}}, "field 'problem.task' is missing"),
    ({"problem": jsonl.problem_row(PROBLEM) | {"id": 3}}, "'problem.id': exp"),
  ],
)
def test_a_bad_solution_is_named_with_line_and_field(tmp_path, change, words):
  path = tmp_path / "rows.jsonl"
  good = jsonl.solution_row(make_solution())
  lines = [json.dumps(good), json.dumps(good | change)]
  path.write_text("\n".join(lines))
  with pytest.raises(ValueError, match=words) as error:
    jsonl.read_solutions(path)
  assert str(error.value).startswith(f"{path}:2: ")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*jsonl.solution_row(make_solution())])
def test_only_log_probs_and_visits_may_be_absent(tmp_path, name):
  path = tmp_path / "rows.jsonl"
  row = jsonl.solution_row(make_solution())
  del row[name]
  path.write_text(json.dumps(row))
  if name in ("behavior_log_probs", "policy_log_probs", "num_visits"):
    assert len(jsonl.read_solutions(path)) == 1
    return
  # Weights without tokens are refused for the tokens they lack.
  words = "no tokens beside" if name == "tokens" else f"'{name}' is missing"
  with pytest.raises(ValueError, match=words):
    jsonl.read_solutions(path, lambda text: [1])


@pytest.mark.parametrize(
  ("line", "words"),
  [
    (b'{"id": "p"', "not a line of JSON"),
    (b'{"id": NaN}', "NaN is not a JSON number"),
    (b"[1]", r"expected an object, got \[1\]"),
    (b'"\xff"', "not a line of JSON"),
    (b"[" * 100_000, "not a line of JSON"),
  ],
)
def test_a_line_that_is_no_object_is_named(tmp_path, line, words):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(b'{"a": 1}\n' + line + b"\n")
  with pytest.raises(ValueError, match=words) as error:
    jsonl.read_jsonl(path)
  assert str(error.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize(
  ("index", "change", "words"),
  [
    (0, {"parent": 0}, r"nodes\[0\].parent': expected -1, for the root"),
    (2, {"parent": 2}, r"nodes\[2\].parent': expected an earlier node, 0 to 1"),
    (1, {"parent": -1}, r"nodes\[1\].parent': expected an earlier node"),
    (1, {"num_visits": 1.5}, r"nodes\[1\].num_visits': expected a whole"),
    (1, {"prior": None}, r"nodes\[1\].prior': expected a finite number"),
    (1, {"is_terminal": 1}, r"nodes\[1\].is_terminal': expected true or f"),
    (1, {"is_correct": 1}, r"nodes\[1\].is_correct': expected true, false o"),
  ],
)
def test_a_bad_tree_is_refused_in_both_directions(
  tmp_path, index, change, words
):
  tree = make_tree()
  tree["nodes"][index] |= change
  path = tmp_path / "rows.jsonl"
  with pytest.raises(ValueError, match=words):
    jsonl.write_trees(path, [tree])
  assert not path.exists()
  path.write_text(json.dumps(tree))
  with pytest.raises(ValueError, match=words) as error:
    jsonl.read_trees(path)
  assert str(error.value).startswith(f"{path}:1: ")


def test_a_tree_needs_nodes_that_are_objects(tmp_path):
  path = tmp_path / "rows.jsonl"
  for nodes in ([], 3, [7]):
    path.write_text(json.dumps(make_tree() | {"nodes": nodes}))
    with pytest.raises(ValueError, match="nodes.*expected a"):
      jsonl.read_trees(path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
  path = tmp_path / "rows.jsonl"
  jsonl.write_jsonl(path, [{"a": 1}])

  def rows():
    yield {"a": 2}
    raise OSError("disk full")

  with pytest.raises(OSError, match="disk full"):
    jsonl.write_jsonl(path, rows())
  with pytest.raises(ValueError, match="JSON compliant"):
    jsonl.write_jsonl(path, [{"a": float("nan")}])
  assert jsonl.read_jsonl(path) == [{"a": 1}]
  assert os.listdir(tmp_path) == ["rows.jsonl"]
