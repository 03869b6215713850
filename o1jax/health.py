"""Is the run well? What its searches look like, and when to stop it.

`search_metrics` are the numbers of an iteration's searches that show a policy
going astray: coverage, distinct solutions, lengths. `diagnose` reads the rows
of `metrics.jsonl` and says in words what is wrong and what to try: numbers that
are not finite at once, a collapse once it has lasted. `save_batch` keeps the
rows that an update failed on. All of it is on the host.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from o1jax.searched import Searched
from o1jax.types import Verdict

# Metrics that tell of a collapse; a row that lacks one says nothing about it.
ENTROPY = "learn/entropy"
DIVERGENCE = "learn/kl_to_reference"
TRUNCATED = "search/truncated"
DISTINCT = "search/distinct"

_LOWER_RATE = (
  "lower learn.optimizer.learning_rate or learn.optimizer.clip_norm and start "
  "again from the last checkpoint"
)


@dataclasses.dataclass(frozen=True)
class Limits:
  """What an iteration must keep to.

  Attributes:
    patience: iterations in a row for which a collapse lasts before it is told;
      what is not finite is told at once.
    min_entropy: of the policy, in nats a token; 0 asks for nothing.
    max_divergence: from the reference policy, in nats a token; infinity asks
      for nothing.
    max_truncated: share of solutions cut off by their length that is too much.
    min_distinct: distinct finished solutions a problem that are too few.

  Raises:
    ValueError: a limit out of its range.
  """

  patience: int = 3
  min_entropy: float = 0.0
  max_divergence: float = math.inf
  max_truncated: float = 1.0
  min_distinct: float = 0.0

  def __post_init__(self):
    if self.patience < 1:
      raise ValueError(f"patience={self.patience} must be at least 1")
    if not 0 < self.max_truncated <= 1:
      raise ValueError(f"max_truncated={self.max_truncated} is not in (0, 1]")
    for name in ("min_entropy", "min_distinct"):
      value = getattr(self, name)
      if not 0 <= value < math.inf:
        raise ValueError(f"{name}={value} must be 0 or more")
    if not self.max_divergence > 0:
      raise ValueError(f"max_divergence={self.max_divergence} must be above 0")


class Unhealthy(ValueError):
  """The run is not well; the message says what happened and what to try."""


def check(history: Sequence[Mapping[str, Any]], limits: Limits) -> None:
  """Raises Unhealthy, a ValueError, with what `diagnose` says, if anything."""
  report = diagnose(history, limits)
  if report is not None:
    raise Unhealthy(report)


def diagnose(
  history: Sequence[Mapping[str, Any]], limits: Limits
) -> str | None:
  """What is wrong with the last iteration, on one line; None if nothing.

  Args:
    history: rows as `metrics.jsonl` has them, oldest first, each with its
      `iteration`; numbers that JSON lacks may be strings, as read back. The
      last rows suffice, `patience` of them.
    limits: what the run must keep to.
  """
  if not history:
    return None
  row, before = history[-1], history[:-1]
  found = [
    _not_finite(name, value, before)
    for name, value in row.items()
    if name.startswith("learn/") and _is_bad(value)
  ]
  for name, is_over, words, remedy in (
    (
      ENTROPY,
      lambda value: value < limits.min_entropy,
      f"is below {limits.min_entropy:g}: the policy hardly explores",
      "raise the weight of the entropy or the temperature of the search, or "
      "lower the learning rate",
    ),
    (
      DIVERGENCE,
      lambda value: value > limits.max_divergence,
      f"is above {limits.max_divergence:g}: the policy has left its reference",
      "raise the weight of the KL or lower the learning rate",
    ),
    (
      TRUNCATED,
      lambda value: value >= limits.max_truncated,
      f"has reached {limits.max_truncated:g}: solutions do not end",
      "allow more tokens or steps, or clone demonstrations that end",
    ),
    (
      DISTINCT,
      lambda value: value <= limits.min_distinct,
      f"is not above {limits.min_distinct:g}: searches find too few solutions",
      "raise the temperature of the search, or go back to a checkpoint before "
      "this began",
    ),
  ):
    numbers = _last_numbers(history, name, limits.patience)
    if numbers and all(map(is_over, numbers)):
      lasted = f" for {len(numbers)} iterations" if len(numbers) > 1 else ""
      found.append(f"{name}={numbers[-1]:.3g} {words}{lasted}; {remedy}")
  if not found:
    return None
  return f"iteration {row['iteration']}: " + "; also: ".join(found)


def save_batch(path: str | os.PathLike, batch: Any) -> None:
  """Writes the arrays of a batch into an .npz file, whole or not at all.

  Args:
    path: the file; the ending is not added.
    batch: arrays in records, mappings and sequences; a name in the file is the
      way to its array, such as "policy_gradient.tokens". Types that NumPy lacks
      (bfloat16) become float32, which holds them exactly.

  Raises:
    OSError: the write failed; a file that stood there before is unharmed.
    ValueError: there is no array in the batch.
  """
  leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
  if not leaves:
    raise ValueError("the batch holds no arrays: nothing to save")
  arrays = {}
  for way, leaf in leaves:
    name = jax.tree_util.keystr(way, simple=True, separator=".") or "array"
    array = np.asarray(leaf)
    # The kind of a type that NumPy itself does not know is "V".
    arrays[name] = (
      array.astype(np.float32) if array.dtype.kind == "V" else array
    )
  path = os.fspath(path)
  partial = f"{path}.partial"
  try:
    with open(partial, "wb") as file:
      np.savez(file, **arrays)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except BaseException:
    if os.path.exists(partial):
      os.remove(partial)
    raise


def pass_at_k(
  num_solutions: np.ndarray, num_correct: np.ndarray, k: int
) -> np.ndarray:
  """Chance that one of k solutions drawn from those found is right.

    pass@k = 1 - C(n - c, k) / C(n, k)

  Unbiased for solutions that were drawn independently (Chen et al., arXiv
  2107.03374); those of one tree are not. Where fewer than k were found it is
  that any is right, which is at most pass@k.

  Args:
    num_solutions: `[B]` n of each problem.
    num_correct: `[B]` c of them that are right.
    k: solutions to draw.

  Returns:
    `[B]` float64.

  Raises:
    ValueError: k is below 1, or more are right than there are.
  """
  if k < 1:
    raise ValueError(f"k={k} must be at least 1")
  n = np.asarray(num_solutions, np.int64)
  c = np.asarray(num_correct, np.int64)
  if n.shape != c.shape or (c < 0).any() or (c > n).any():
    raise ValueError(
      f"num_correct={c.tolist()} must be 0 to num_solutions={n.tolist()}"
    )
  # C(n - c, k) / C(n, k), a factor for each of the k draws without return.
  draws = np.arange(k)
  left = np.maximum(n[:, None] - draws, 1)
  wrong = np.maximum(n[:, None] - c[:, None] - draws, 0)
  is_draw = draws < np.minimum(n, k)[:, None]
  missed = np.prod(np.where(is_draw, wrong / left, 1.0), axis=1)
  return np.where(n > 0, 1 - missed, 0.0)


def search_metrics(
  searched: Sequence[Searched],
  verdicts: Sequence[Sequence[Verdict]],
  *,
  ks: Sequence[int] = (1, 2, 4, 8),
) -> dict[str, float]:
  """Numbers of an iteration's searches by which its health is judged.

  A solution that does not end was cut off by its length and counts as wrong.

  Args:
    searched: B searches.
    verdicts: of each of their solutions.
    ks: numbers of solutions for `coverage_at_`.

  Returns:
    Under "search/": means over problems of `coverage_at_k` (see `pass_at_k`),
    of distinct texts among the finished solutions (`distinct`) and the right
    ones (`distinct_correct`); over all solutions the tokens, `length_mean` and
    `length_max`, and the share cut off, `truncated`. 0 where there are no
    solutions.

  Raises:
    ValueError: no searches, or verdicts that do not go with them.
  """
  if not searched:
    raise ValueError("there are no searches to measure")
  lengths, cut, distinct, distinct_correct = [], [], [], []
  found, right = [], []
  for one, judged in zip(searched, verdicts, strict=True):
    pairs = list(zip(one.solutions, judged, strict=True))
    finished = [pair for pair in pairs if pair[0].is_finished]
    correct = [s for s, verdict in finished if verdict.is_correct]
    lengths += [len(solution.tokens) for solution, _ in pairs]
    cut += [not solution.is_finished for solution, _ in pairs]
    distinct.append(len({solution.text for solution, _ in finished}))
    distinct_correct.append(len({solution.text for solution in correct}))
    found.append(len(pairs))
    right.append(len(correct))
  values = {
    f"search/coverage_at_{k}": pass_at_k(found, right, k).mean() for k in ks
  }
  values |= {
    DISTINCT: np.mean(distinct),
    "search/distinct_correct": np.mean(distinct_correct),
    "search/length_mean": np.mean(lengths) if lengths else 0.0,
    "search/length_max": max(lengths, default=0),
    TRUNCATED: np.mean(cut) if cut else 0.0,
  }
  return {name: float(value) for name, value in values.items()}


def _not_finite(name, value, before) -> str:
  """What is said of a number that is not finite, and its last finite one."""
  was = [
    f" ({row[name]:.3g} in iteration {row['iteration']})"
    for row in before
    if name in row and not _is_bad(row[name])
  ]
  return f"{name} is {float(value)}{was[-1] if was else ''}; {_LOWER_RATE}"


def _is_bad(value: Any) -> bool:
  return value is not None and not math.isfinite(float(value))


def _last_numbers(history, name: str, count: int) -> list[float]:
  """The values of the last `count` rows; empty unless each has the metric."""
  rows = history[-count:]
  if len(rows) < count or any(row.get(name) is None for row in rows):
    return []
  return [float(row[name]) for row in rows]
