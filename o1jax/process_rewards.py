"""Labels of steps: how many of the solutions through a step ended right.

Math-Shepherd (Wang et al., arXiv 2312.08935, section 3) completes a solution
from the end of each of its steps and labels the step by the completions that
are right. Here the completions are there already: the finished solutions of the
same search that go through the step. A step is a node of the tree, so that the
same text below two nodes is two steps, and a solution of `best_of_n`, which is
one node, has one label, its outcome.

Value and process reward are one head, and one loss learns both
(`learning.value_losses`).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from o1jax.searched import Searched
from o1jax.types import LearnerBatch, Verdict

ESTIMATES = ("soft", "hard")


@dataclasses.dataclass(frozen=True)
class Process:
  """How steps are labelled.

  Attributes:
    estimate: "soft", the share of right solutions among those through a step;
      or "hard", 1 where any of them is right.

  Raises:
    ValueError: an unknown estimate.
  """

  estimate: str = "soft"

  def __post_init__(self):
    if self.estimate not in ESTIMATES:
      raise ValueError(
        f"estimate={self.estimate!r} is unknown; take one of "
        f"{', '.join(ESTIMATES)}"
      )


def step_labels(
  searched: Searched, verdicts: Sequence[Verdict], *, estimate: str
) -> dict[int, float]:
  """The label of each step that a solution goes through, by node.

  Args:
    searched: a search.
    verdicts: of each of its solutions; of those that were cut off not read.
    estimate: one of `ESTIMATES`.
  """
  through: dict[int, list[bool]] = {}
  for solution, verdict in zip(searched.solutions, verdicts, strict=True):
    if solution.is_finished:
      for node in solution.path:
        through.setdefault(node, []).append(verdict.is_correct)
  merge = np.mean if estimate == "soft" else np.max
  return {node: float(merge(marks)) for node, marks in through.items()}


def with_step_labels(
  rows: LearnerBatch,
  searched: Sequence[Searched],
  verdicts: Sequence[Sequence[Verdict]],
  starts: Sequence[int],
  *,
  estimate: str,
) -> LearnerBatch:
  """Rows whose value's targets are the labels, at the last token of each step.

  A step that several solutions share stands in the row of each.

  Args:
    rows: in NumPy, the finished solutions of the searches in their order, those
      that were too long left empty.
    searched: the searches.
    verdicts: of each of their solutions.
    starts: tokens of each row's prompt.
    estimate: one of `ESTIMATES`.
  """
  targets = np.zeros_like(rows.value_targets)
  weights = np.zeros_like(rows.value_weights)
  row = 0
  for one, judged in zip(searched, verdicts, strict=True):
    labels = step_labels(one, judged, estimate=estimate)
    for solution in one.solutions:
      if not solution.is_finished:
        continue
      if rows.lengths[row]:
        path = list(solution.path)
        ends = starts[row] + np.cumsum(one.nodes["lengths"][path]) - 1
        targets[row, ends] = [labels[node] for node in path]
        weights[row, ends] = 1
      row += 1
  assert row == len(rows.lengths), (row, len(rows.lengths))
  return rows.replace(value_targets=targets, value_weights=weights)
