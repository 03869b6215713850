"""How well each guidance tells right solutions from wrong ones.

Every finished solution that best-of-N draws is scored by every guidance and
checked; those that fold the values of steps are scored on solutions that were
sampled alike, step by step. AUROC says how well the scores order the solutions
of all problems, and of each problem alone (a search chooses among the latter);
ECE and the Brier score say how far they are probabilities; the last column
answers with the solution of the highest score. Intervals resample problems.

A guidance is a function from a search to one finite number a solution, higher
for what is held to be right; those in [0, 1] are read as probabilities. It may
read the answers of the context's verdicts, not whether they are right.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from o1jax import calibration, drawing
from o1jax.answering import folded_score
from o1jax.search.host_guidance import class_entropy
from o1jax.searched import Searched
from o1jax.studies.context import Context
from o1jax.studies.study import (
  Cell,
  Measured,
  Study,
  by_setting,
  markdown_table,
)

NUM_SOLUTIONS = 16

# `(context, search) -> [G]`, in the order of the search's solutions.
Guidance = Callable[[Context, Searched], np.ndarray]


def value(context: Context, searched: Searched) -> np.ndarray:
  """The value head after the last token."""
  del context
  return np.array([s.outcome for s in searched.solutions])


def self_evaluation(context: Context, searched: Searched) -> np.ndarray:
  """The policy's own judgement in writing, by which its search scored."""
  return value(context, searched)


def sequence_log_prob(context: Context, searched: Searched) -> np.ndarray:
  """The policy's probability of the whole solution."""
  del context
  sums = [s.policy_log_probs.sum() for s in searched.solutions]
  return np.exp(np.array(sums, np.float64))


def mean_log_prob(context: Context, searched: Searched) -> np.ndarray:
  """The same per token: the geometric mean of the tokens' probabilities."""
  del context
  means = [s.policy_log_probs.mean() for s in searched.solutions]
  return np.exp(np.array(means, np.float64))


def least_log_prob(context: Context, searched: Searched) -> np.ndarray:
  """The probability of the least likely token."""
  del context
  least = [s.policy_log_probs.min() for s in searched.solutions]
  return np.exp(np.array(least, np.float64))


def heuristic(context: Context, searched: Searched) -> np.ndarray:
  """The task's heuristic of the whole solution."""
  score = context.trained.task.heuristic
  scores = [score(searched.problem, s.text) for s in searched.solutions]
  return np.array(scores, float)


def value_min(context: Context, searched: Searched) -> np.ndarray:
  """The least value of a step: see answering.py."""
  return _folded(searched, "min")


def value_product(context: Context, searched: Searched) -> np.ndarray:
  """The product of the values of the steps."""
  return _folded(searched, "product")


def value_mean(context: Context, searched: Searched) -> np.ndarray:
  """The mean of the values of the steps."""
  return _folded(searched, "mean")


def _folded(searched, fold) -> np.ndarray:
  found = [folded_score(searched.nodes, s, fold) for s in searched.solutions]
  return np.array(found, float)


def self_consistency(context: Context, searched: Searched) -> np.ndarray:
  """The share of the finished solutions with the same answer.

  Wang et al., arXiv 2203.11171.
  """
  finished = np.array([s.is_finished for s in searched.solutions], float)
  return _answer_share(context, searched, finished)


def weighted_consistency(context: Context, searched: Searched) -> np.ndarray:
  """The same share, each solution weighing its value."""
  weights = [s.outcome * s.is_finished for s in searched.solutions]
  return _answer_share(context, searched, np.array(weights, float))


def _answer_share(context, searched, weights) -> np.ndarray:
  """Each answer's share of the weights; 0 where no answer was read."""
  answers = [verdict.answer for verdict in context.judge(searched)]
  total = max(weights.sum(), np.finfo(float).tiny)
  shares = [
    weights[[other == answer for other in answers]].sum() / total
    if answer is not None
    else 0.0
    for answer in answers
  ]
  return np.minimum(np.array(shares, float), 1.0)


def semantic_entropy(context: Context, searched: Searched) -> np.ndarray:
  """How far the solutions of a problem have one answer, the same for them all.

  Farquhar et al., Nature 2024; see search/host_guidance.py.
  """
  return _agreement([verdict.answer for verdict in context.judge(searched)])


def semantic_entropy_by_policy(
  context: Context, searched: Searched
) -> np.ndarray:
  """The same with the classes of entailment asked of the policy."""
  finished = [s.text for s in searched.solutions if s.is_finished]
  labels = iter(context.classes_fn(searched.problem, finished))
  return _agreement(
    [next(labels) if s.is_finished else None for s in searched.solutions]
  )


def _agreement(labels: Sequence[Hashable | None]) -> np.ndarray:
  """1 - H / log M, once for each of M solutions."""
  size = len(labels)
  if size < 2:
    return np.ones(size)
  return np.full(size, 1.0 - class_entropy(labels, size) / math.log(size))


# A further guidance is a function of the same signature, named here.
GUIDANCES: Mapping[str, Guidance] = {
  "value": value,
  "sequence_log_prob": sequence_log_prob,
  "mean_log_prob": mean_log_prob,
  "least_log_prob": least_log_prob,
  "self_consistency": self_consistency,
  "weighted_consistency": weighted_consistency,
  "semantic_entropy": semantic_entropy,
  "semantic_entropy_by_policy": semantic_entropy_by_policy,
  "heuristic": heuristic,
  "self_evaluation": self_evaluation,
  "value_min": value_min,
  "value_product": value_product,
  "value_mean": value_mean,
}
# Those that need solutions of several steps; they come last, so that the
# searches follow each other, and so does self_evaluation with its own search.
OF_STEPS = ("value_min", "value_product", "value_mean")


def make_cells(context: Context, num_seeds: int) -> list[Cell]:
  """Every guidance on the same solutions, which differ by seed.

  A policy that was not taught to judge, or to compare, is not asked to.
  """
  names = list(GUIDANCES)
  if not context.was_taught("comparing"):
    names.remove("semantic_entropy_by_policy")
  if not _can_judge(context):
    names.remove("self_evaluation")
  return [
    {
      "guidance": name,
      "seed": seed,
      "reward": "value",
      **_sampling(context, is_stepwise=name in OF_STEPS),
      "temperature": context.evaluation["temperature"],
    }
    for seed in range(num_seeds)
    for name in names
  ]


def _sampling(context: Context, is_stepwise: bool) -> dict[str, Any]:
  """Options of best-of-N, or of the same draws a step at a time."""
  if not is_stepwise:
    return {"strategy": "best_of_n", "num_candidates": NUM_SOLUTIONS}
  num_steps = context.trained.policy.lengths.num_steps
  return {
    "strategy": "speculative_rejection",
    "num_expansions": NUM_SOLUTIONS * num_steps,
    "options": {"num_rows": NUM_SOLUTIONS, "rejection_rate": 0.0},
  }


def _can_judge(context: Context) -> bool:
  """Whether verdicts are words of the policy, as after rows.judging."""
  trained = context.trained
  tokenizer = trained.policy.tokenizer
  return all(len(tokenizer.encode(w)) == 1 for w in trained.task.verdict_words)


def check(context: Context, cell: Cell) -> None:
  """Refuses options that `Solver` refuses, and a policy that has no words."""
  if cell["guidance"] == "semantic_entropy_by_policy":
    _ = context.classes_fn
  context.solver(_options(cell))


def measure(context: Context, cell: Cell) -> dict[str, Any]:
  """Scores of all finished solutions, with the truth beside them.

  Returns:
    The number of problems, and lists `[n]`: problem (its index), scores and
    is_correct.
  """
  searched, _ = context.search(_options(cell), cell["seed"])
  problem, scores, is_correct = [], [], []
  for i, one in enumerate(searched):
    found = GUIDANCES[cell["guidance"]](context, one)
    rows = zip(one.solutions, found, context.judge(one), strict=True)
    for solution, score, verdict in rows:
      if solution.is_finished:
        problem.append(i)
        scores.append(float(score))
        is_correct.append(verdict.is_correct)
  return {
    "num_problems": len(searched),
    "problem": problem,
    "scores": scores,
    "is_correct": is_correct,
  }


def _options(cell: Cell) -> dict[str, Any]:
  """Of the search: the solutions are the same whatever it scores them by."""
  options = {n: cell[n] for n in cell if n not in ("guidance", "seed")}
  if cell["guidance"] == "self_evaluation":
    options["guidance"] = {"self_evaluation": 1.0}
  return options


class Scored(NamedTuple):
  """Solutions of all seeds, by rising score, which makes resamples quick.

  Attributes:
    scores, is_correct: `[n]`.
    search: `[n]` index of the search; those of a problem follow each other.
    num_seeds: searches of a problem.
    num_searches: problems times seeds.
  """

  scores: np.ndarray
  is_correct: np.ndarray
  search: np.ndarray
  num_seeds: int
  num_searches: int


def pool(group: Sequence[Measured]) -> Scored:
  """Joins the seeds of one guidance."""
  results, num_seeds = [one.result for one in group], len(group)
  scores = np.concatenate([np.array(r["scores"], float) for r in results])
  labels = np.concatenate([np.array(r["is_correct"], bool) for r in results])
  search = np.concatenate(
    [
      np.array(r["problem"], int) * num_seeds + seed
      for seed, r in enumerate(results)
    ]
  )
  order = np.argsort(scores, kind="stable")
  return Scored(
    scores[order],
    labels[order],
    search[order],
    num_seeds,
    num_seeds * results[0]["num_problems"],
  )


def make_table(measured: Sequence[Measured]) -> str:
  """One row a guidance."""
  head = (
    "guidance",
    "AUROC",
    "AUROC in a problem",
    "ECE",
    "Brier score",
    "accuracy by its best",
    "solutions",
    "right",
  )
  rows = []
  for (name,), group in by_setting(measured, ("guidance",)).items():
    scored = pool(group)
    rows.append(
      (
        name,
        _pooled(calibration.auroc, scored),
        _within(scored),
        _of_probabilities(calibration.calibration_error, scored),
        _of_probabilities(calibration.brier_score, scored),
        _by_best(scored),
        str(len(scored.scores)),
        f"{scored.is_correct.mean():.1%}" if len(scored.scores) else "-",
      )
    )
  return markdown_table(head, rows)


def _estimate(measure: Callable[[np.ndarray], float], problem) -> str:
  """A measure with its interval, as text."""
  found = measure(np.ones(len(problem)))
  if math.isnan(found):
    return "-"
  low, high = calibration.bootstrap(measure, problem)
  return f"{found:.3f} ({low:.3f}-{high:.3f})"


def _pooled(measure: Callable[..., float], scored: Scored) -> str:
  scores, labels = scored.scores, scored.is_correct
  problem = scored.search // scored.num_seeds
  return _estimate(lambda weights: measure(scores, labels, weights), problem)


def _of_probabilities(measure: Callable[..., float], scored: Scored) -> str:
  return _pooled(measure, scored) if _are_probabilities(scored) else "-"


def _within(scored: Scored) -> str:
  """The AUROC over pairs of one search."""
  wins, pairs = calibration.pair_wins(
    scored.scores, scored.is_correct, scored.search
  )
  problem = np.unique(scored.search) // scored.num_seeds

  def area(weights):
    total = weights @ pairs
    return float(weights @ wins / total) if total else math.nan

  return _estimate(area, problem)


def _by_best(scored: Scored) -> str:
  """Accuracy of the highest score of each search; ties share their chance."""
  count, search = scored.num_searches, scored.search
  best = np.full(count, -np.inf)
  np.maximum.at(best, search, scored.scores)
  is_best = scored.scores == best[search]
  right = np.bincount(search, is_best & scored.is_correct, count)
  # A search that finished nothing has no answer, so it is not right.
  chance = right / np.maximum(np.bincount(search, is_best, count), 1)
  problem = np.arange(count) // scored.num_seeds
  return _estimate(lambda w: float(w @ chance / w.sum()), problem)


def _are_probabilities(scored: Scored) -> bool:
  return bool(((scored.scores >= 0) & (scored.scores <= 1)).all())


def draw(measured: Sequence[Measured]) -> drawing.Drawing | None:
  """Reliability: how often solutions of a score are right."""
  series = []
  groups = by_setting(measured, ("guidance",))
  for color, ((name,), group) in enumerate(groups.items()):
    scored = pool(group)
    if len(scored.scores) and _are_probabilities(scored):
      mean, right, _ = calibration.reliability(scored.scores, scored.is_correct)
      points = list(zip(mean.tolist(), right.tolist(), strict=True))
      label = name.replace("_", " ")
      series.append(drawing.Series(label, points, color=color))
  if not series:
    return None
  exact = [(0.0, 0.0), (1.0, 1.0)]
  series.append(drawing.Series("calibrated", exact, color=len(groups)))
  return drawing.draw_lines(
    series,
    title="Share of solutions that are right, by the score of a guidance",
    x_title="mean score of a bin of equally many solutions",
    is_percent=True,
    height=420,
  )


STUDY = Study("guidance", "1", make_cells, check, measure, make_table, draw)
