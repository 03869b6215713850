"""Problems, solutions and search trees as JSONL, one a line.

Files appear whole or not at all. What is read is checked field by field, and a
bad row ends with one sentence: path, line number, field, what is expected and
what stands there.
"""

import difflib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from o1jax.types import Problem, ScoredSolution

SOURCES = ("search", "hindsight", "demonstration")
# Fields of a solution that hold one number a token.
FLOAT_ARRAYS = ("step_weights", "behavior_log_probs", "policy_log_probs")
NO_PARENT = -1

_PROBLEM_FIELDS = ("id", "task", "prompt", "data")
_REQUIRED = (
  "problem",
  "text",
  "outcome_reward",
  "verdict",
  "iteration",
  "source",
)
_OPTIONAL = ("tokens", *FLOAT_ARRAYS, "num_visits")


def write_jsonl(path: str | os.PathLike, rows: Iterable[Any]) -> None:
  """Writes one JSON value a line.

  Raises:
    OSError: the write failed; a file that stood there before is unharmed.
    ValueError: a number that JSON has no form for, such as NaN.
  """
  path = os.fspath(path)
  partial = f"{path}.partial"
  try:
    with open(partial, "w", encoding="ascii") as file:
      for row in rows:
        file.write(json.dumps(row, allow_nan=False) + "\n")
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except BaseException:
    if os.path.exists(partial):
      os.remove(partial)
    raise


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads one JSON object a line; blank lines are passed over.

  Raises:
    ValueError: a line that is not a JSON object, with path and line number.
  """
  return [row for _, row in numbered_rows(path)]


def write_problems(
  path: str | os.PathLike, problems: Iterable[Problem]
) -> None:
  """Writes problems as rows of id, task, prompt and data."""
  write_jsonl(path, map(problem_row, problems))


def read_problems(path: str | os.PathLike) -> list[Problem]:
  """Reads what `write_problems` wrote; ValueError on a bad row."""
  return [_read_problem(row, "", where) for where, row in numbered_rows(path)]


def write_solutions(
  path: str | os.PathLike, solutions: Iterable[ScoredSolution]
) -> None:
  """Writes solutions with all that is known of them, problem included."""
  write_jsonl(path, map(solution_row, solutions))


def read_solutions(
  path: str | os.PathLike,
  encode_fn: Callable[[str], Sequence[int]] | None = None,
) -> list[ScoredSolution]:
  """Reads what `write_solutions` wrote, or rows made elsewhere.

  Required are problem, text, outcome_reward, verdict, iteration and source.
  Absent log-probs are NaN: unknown. Token ids mean something to one tokenizer
  only, so rows for a run with another one should leave them out. Further fields
  are passed over.

  Args:
    path: the file.
    encode_fn: text to tokens, end mark included; makes the tokens of rows that
      have none, with step weights of 1. Without it such rows are refused.

  Raises:
    ValueError: a bad row.
  """
  return [
    _read_solution(row, where, encode_fn) for where, row in numbered_rows(path)
  ]


def write_trees(
  path: str | os.PathLike, trees: Iterable[Mapping[str, Any]]
) -> None:
  """Writes search trees in the form that `read_trees` expects of them."""
  trees = list(trees)
  for i, tree in enumerate(trees):
    _check_tree(tree, f"tree {i}")
  write_jsonl(path, trees)


def read_trees(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads search trees.

  A tree is a problem row and a list of nodes, each with parent (index of an
  earlier node; -1 for the root, which comes first), text, num_visits, value,
  prior, reward, is_terminal and is_correct (null where nobody checked). Further
  fields are left as they are.

  Raises:
    ValueError: a bad row.
  """
  trees = []
  for where, row in numbered_rows(path):
    _check_tree(row, where)
    trees.append(row)
  return trees


def problem_row(problem: Problem) -> dict[str, Any]:
  """The JSON form of a problem."""
  return {
    "id": problem.id,
    "task": problem.task,
    "prompt": problem.prompt,
    "data": dict(problem.data),
  }


def solution_row(solution: ScoredSolution) -> dict[str, Any]:
  """The JSON form of a solution; log-probs that are unknown are left out."""
  row = {
    "problem": problem_row(solution.problem),
    "text": solution.text,
    "tokens": np.asarray(solution.tokens).tolist(),
  }
  for name in FLOAT_ARRAYS:
    array = np.asarray(getattr(solution, name))
    if not np.isnan(array).any():
      row[name] = array.tolist()
  return row | {
    "outcome_reward": float(solution.outcome_reward),
    "verdict": solution.verdict,
    "iteration": int(solution.iteration),
    "source": solution.source,
    "num_visits": int(solution.num_visits),
  }


class _Kind(NamedTuple):
  """What a field holds: in words, and as a test."""

  expected: str
  is_right: Callable[[Any], bool]


def _number(low, high, expected):
  # NaN fails both comparisons, infinity one of them.
  return _Kind(expected, lambda x: type(x) in (int, float) and low <= x <= high)


def _whole(low, high, expected):
  return _Kind(expected, lambda x: type(x) is int and low <= x <= high)


def _list_of(kind, expected, length=None):
  def is_right(value):
    return (
      type(value) is list
      and (length is None or len(value) == length)
      and all(map(kind.is_right, value))
    )

  return _Kind(expected, is_right)


_STRING = _Kind("a string", lambda x: type(x) is str)
_OBJECT = _Kind("an object", lambda x: isinstance(x, Mapping))
_BOOL = _Kind("true or false", lambda x: type(x) is bool)
_VERDICT = _Kind("true, false or null", lambda x: x is None or type(x) is bool)
_MAX_FLOAT = float(np.finfo(np.float64).max)
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_NUMBER = _number(-_MAX_FLOAT, _MAX_FLOAT, "a finite number")
_LOG_PROB = _number(-_MAX_FLOAT32, _MAX_FLOAT32, "finite numbers")
_WEIGHT = _number(0, _MAX_FLOAT32, "finite numbers >= 0")
_REWARD = _number(0, 1, "a number in [0, 1]")
_COUNT = _whole(0, np.iinfo(np.int64).max, "a whole number >= 0")
_TOKEN = _whole(0, np.iinfo(np.int32).max, "a token id")
_SOURCE = _Kind(f"one of {', '.join(SOURCES)}", lambda x: x in SOURCES)
_TOKENS = _list_of(_TOKEN, "a list of token ids")
_NODES = _Kind(
  "a list of one node or more", lambda x: isinstance(x, list) and bool(x)
)


def numbered_rows(
  path: str | os.PathLike,
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields ("path:line", row) for each line that is not blank.

  Raises:
    ValueError: a line that is not a JSON object, with path and line number.
  """
  with open(path, "rb") as file:
    for number, line in enumerate(file, start=1):
      where = f"{os.fspath(path)}:{number}"
      if not line.strip():
        continue
      try:
        row = json.loads(line, parse_constant=_refuse)
      except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not a line of JSON: {error}") from error
      if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object, got {_show(row)}")
      yield where, row


def _refuse(name):
  raise ValueError(f"{name} is not a JSON number")


def _read_problem(row, prefix, where):
  _check_names(row, prefix, where, _PROBLEM_FIELDS, ())
  return Problem(
    id=_take(row, f"{prefix}id", where, _STRING),
    task=_take(row, f"{prefix}task", where, _STRING),
    prompt=_take(row, f"{prefix}prompt", where, _STRING),
    data=_take(row, f"{prefix}data", where, _OBJECT),
  )


def _read_solution(row, where, encode_fn):
  _check_names(row, "", where, _REQUIRED, _OPTIONAL)
  problem = _take(row, "problem", where, _OBJECT)
  return ScoredSolution(
    problem=_read_problem(problem, "problem.", where),
    text=_take(row, "text", where, _STRING),
    outcome_reward=float(_take(row, "outcome_reward", where, _REWARD)),
    verdict=_take(row, "verdict", where, _STRING),
    iteration=_take(row, "iteration", where, _COUNT),
    source=_take(row, "source", where, _SOURCE),
    num_visits=_take({"num_visits": 1} | row, "num_visits", where, _COUNT),
    **_read_arrays(row, where, encode_fn),
  )


def _read_arrays(row, where, encode_fn):
  """Tokens and their numbers, with what stands in for those absent."""
  if "tokens" in row:
    tokens = _take(row, "tokens", where, _TOKENS)
    _take_present(row, "step_weights", where)
  else:
    if encode_fn is None:
      _take_present(row, "tokens", where)
    for name in FLOAT_ARRAYS:
      if name in row:
        raise ValueError(f"{where}: field {name!r} has no tokens beside it")
    tokens = encode_fn(row["text"])
  arrays = {"tokens": np.array(tokens, np.int32)}
  for name in FLOAT_ARRAYS:
    if name in row:
      kind = _WEIGHT if name == "step_weights" else _LOG_PROB
      expected = f"a list of {len(tokens)} {kind.expected}"
      kind = _list_of(kind, expected, len(tokens))
      arrays[name] = np.array(_take(row, name, where, kind), np.float32)
    else:
      unknown = 1 if name == "step_weights" else np.nan
      arrays[name] = np.full(len(tokens), unknown, np.float32)
  return arrays


def _check_tree(tree, where):
  problem = _take(tree, "problem", where, _OBJECT)
  _read_problem(problem, "problem.", where)
  for i, node in enumerate(_take(tree, "nodes", where, _NODES)):
    name = f"nodes[{i}]"
    if not _OBJECT.is_right(node):
      raise ValueError(f"{where}: {name}: expected an object")
    parent = _whole(0, i - 1, f"an earlier node, 0 to {i - 1}")
    if i == 0:
      parent = _whole(NO_PARENT, NO_PARENT, f"{NO_PARENT}, for the root")
    _take(node, f"{name}.parent", where, parent)
    _take(node, f"{name}.text", where, _STRING)
    _take(node, f"{name}.num_visits", where, _COUNT)
    _take(node, f"{name}.value", where, _NUMBER)
    _take(node, f"{name}.prior", where, _NUMBER)
    _take(node, f"{name}.reward", where, _NUMBER)
    _take(node, f"{name}.is_terminal", where, _BOOL)
    _take(node, f"{name}.is_correct", where, _VERDICT)


def _check_names(row, prefix, where, required, optional):
  """Refuses absent fields, and names that read like a slip for one.

  Further fields are passed over, so that a file may say more than is needed.
  """
  absent = [name for name in (*required, *optional) if name not in row]
  for name in row:
    near = difflib.get_close_matches(name, absent, 1)
    if near and name not in required and name not in optional:
      raise ValueError(
        f"{where}: field {prefix + name!r} is unknown; did you mean "
        f"{near[0]!r}?"
      )
  for name in required:
    _take_present(row, prefix + name, where)


def _take_present(row, name, where):
  field = name.rpartition(".")[2]
  if field not in row:
    raise ValueError(f"{where}: field {name!r} is missing")
  return row[field]


def _take(row, name, where, kind):
  """The field at the end of the dotted `name`, of the right kind."""
  value = _take_present(row, name, where)
  if not kind.is_right(value):
    raise ValueError(
      f"{where}: field {name!r}: expected {kind.expected}, got {_show(value)}"
    )
  return value


def _show(value):
  text = json.dumps(value, default=repr)
  return text if len(text) <= 60 else f"{text[:57]}..."
