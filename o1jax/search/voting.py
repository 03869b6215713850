"""Majority vote over final answers, on the host.

Self-consistency (Wang et al., arXiv 2203.11171): sample solutions, let their
answers vote; with weights (a verifier's or a value's score of each solution) it
is weighted voting.
"""

import math
from collections.abc import Sequence


def vote(
  answers: Sequence[str | None], weights: Sequence[float] | None = None
) -> str | None:
  """The answer with the greatest sum of weights.

  Args:
    answers: one per solution, in normal form; None where none was read, which
      does not vote.
    weights: one per solution, finite; None for one vote each.

  Returns:
    The answer; of equal sums the one that appears first; None if none votes.

  Raises:
    ValueError: lengths differ or a weight is not finite.
  """
  if weights is None:
    weights = [1.0] * len(answers)
  if len(weights) != len(answers):
    raise ValueError(
      f"{len(answers)} answers with {len(weights)} weights: give one for each"
    )
  ballots: dict[str, list[float]] = {}
  for answer, weight in zip(answers, weights, strict=True):
    if not math.isfinite(weight):
      raise ValueError(f"weight {weight} of answer {answer!r} is not finite")
    if answer is not None:
      ballots.setdefault(answer, []).append(float(weight))
  # fsum, so that the order of the solutions cannot decide between sums.
  return max(ballots, key=lambda a: math.fsum(ballots[a]), default=None)
