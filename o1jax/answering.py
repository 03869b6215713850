"""Which of the solutions that a search found it answers with.

  search         the one that the strategy selects
  score          the one of highest score
  vote           one with the answer that most solutions give (self-consistency,
                 Wang et al., arXiv 2203.11171)
  weighted_vote  the best one with the answer whose solutions have the greatest
                 sum of scores (Li et al., arXiv 2206.02336)

The score of a solution is folded from those of the steps on its path, each as
the guidances gave it when the step was written; that of the last step is the
outcome. Process scores are folded as in Lightman et al., arXiv 2305.20050,
section 2.6, and Snell et al., arXiv 2408.03314, section 5.1. Answers are in the
normal form of the task; only finished solutions count, and in trees that merge
equal steps each distinct one counts once.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from o1jax.combinations import REVISIONS, WHOLE
from o1jax.search import voting
from o1jax.searched import FoundSolution

ANSWERS = ("search", "score", "vote", "weighted_vote")
# `scores of the steps, first to last -> score of the solution`
FOLDS: Mapping[str, Callable[[Sequence[float]], float]] = {
  "last": lambda scores: scores[-1],
  "min": min,
  "product": math.prod,
  "mean": statistics.fmean,
}


def check_answering(
  strategy: str,
  answer_by: str,
  fold: str,
  guidance: Mapping[str, float] | None,
) -> None:
  """Refuses ways to answer that do not fit the search.

  Raises:
    ValueError: what to change.
  """
  for field, value, known in (
    ("answer_by", answer_by, ANSWERS),
    ("fold", fold, tuple(FOLDS)),
  ):
    if value not in known:
      raise ValueError(f"{field}={value!r}: choose one of {', '.join(known)}")
  if strategy == "majority_vote" and answer_by not in ("search", "vote"):
    raise ValueError(
      f"answer_by={answer_by!r} with strategy='majority_vote', which is "
      "best_of_n that answers by vote: set the strategy to best_of_n"
    )
  if fold != "last" and answer_by in ("search", "vote"):
    raise ValueError(
      f"fold={fold!r} with answer_by={answer_by!r}, which reads no folded "
      "scores: set answer_by to score or weighted_vote, or fold to last"
    )
  if fold != "last" and strategy in (*WHOLE, *REVISIONS):
    raise ValueError(
      f"fold={fold!r} with strategy={strategy!r}: its solutions are written as "
      "one step each, which leaves nothing to fold; set fold to last"
    )
  reads_positive = answer_by == "weighted_vote" or fold == "product"
  if reads_positive and guidance is not None and guidance.get("log_prob"):
    raise ValueError(
      f"guidance.log_prob with answer_by={answer_by!r} and fold={fold!r}: "
      "weights and factors must not be negative; use guidance.mean_prob"
    )


def folded_score(
  nodes: Mapping[str, np.ndarray], solution: FoundSolution, fold: str
) -> float:
  """The score of a solution, from the arrays of its tree.

  Of a step it is the value it was given, of an end the outcome.
  """
  scores = nodes["value"] + nodes["reward"]
  return FOLDS[fold]([float(scores[n]) for n in solution.path])


def choose(
  solutions: Sequence[FoundSolution],
  scores: Sequence[float],
  answers_fn: Callable[[list[str]], list[str | None]],
  answer_by: str,
) -> int | None:
  """Index of the solution answered with, None where there is none.

  Args:
    solutions: of one search.
    scores: theirs, folded.
    answers_fn: from texts of solutions to answers in normal form, None where
      none was read.
    answer_by: "score", "vote" or "weighted_vote"; of equal ones the first.
  """
  finished = [i for i, s in enumerate(solutions) if s.is_finished]
  if answer_by != "score":
    answers = answers_fn([solutions[i].text for i in finished])
    weights = [scores[i] for i in finished] if answer_by != "vote" else None
    winner = voting.vote(answers, weights)
    finished = [
      i
      for i, answer in zip(finished, answers, strict=True)
      if winner is not None and answer == winner
    ]
  if answer_by == "vote":
    return finished[0] if finished else None
  return max(finished, key=lambda i: scores[i], default=None)
