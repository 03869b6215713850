"""Problems at the frontier: those that the present policy solves half the time.

What is always solved teaches nothing, and what never is teaches nothing either:
with a success rate p the outcomes of a problem vary by p (1 - p). A
`QuestionGenerator` learns from past searches what makes a problem hard, as a
logistic model of the features that the task gives, and takes from the task's
own sampler those whose predicted p is near one half. Problems may also be
written by a policy, as texts (`question_writer`): `screen` reads them, says how
many of them are of any use, and lets through what may be trained on.

The question generator of the paper is in section 4 (arXiv 2412.14135); problems
by the variance of their outcomes are those of prioritized level replay
(arXiv 2010.03934) and of goals of intermediate difficulty (arXiv 1705.06366).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from o1jax.tasks.task import Featured, Task, Unsolvable
from o1jax.types import Problem

# Seed and number of the problems that features are scaled by.
_SCALE_SEED, _NUM_SCALED = 20241218, 512
# Features are held within this many standard deviations of their mean.
_MAX_SPREADS = 4.0
# Newton steps of one fit, halvings of one step, and the gradient at its end.
_MAX_STEPS, _MAX_HALVINGS, _TOLERANCE = 50, 30, 1e-9


class QuestionGenerator:
  """Chooses problems by what past searches say of them.

  The model is p = sigmoid(w . x) with x the scaled features, their squares
  (what is hard may lie in the middle of a range) and a 1. Its state is a normal
  law of w. Each `learn` takes the law, widened, as the prior of a fit by
  Newton's method and keeps Laplace's approximation of the posterior:

    precision <- memory * precision + (1 - memory) * ridge
    w         <- argmin 1/2 |w - w_old|^2_precision + cross-entropies
    precision <- precision + sum p (1 - p) x x^T

  so that old searches, by a weaker policy, fade.
  """

  def __init__(
    self,
    task: Task,
    *,
    pool_factor: int = 8,
    temperature: float = 0.1,
    frontier: float = 0.25,
    memory: float = 0.7,
    ridge: float = 1.0,
  ):
    """Starts with p = 1/2 for every problem: proposals are then uniform.

    Args:
      task: its sampler is drawn from; it has `problem_features`.
      pool_factor: problems drawn, or written, for each that is proposed.
      temperature: of the choice by the score 4 p (1 - p), which is in [0, 1]:
        0 takes the highest, 1 hardly chooses.
      frontier: a problem is on the frontier where |p - 1/2| is at most this;
        it is for reports alone.
      memory: share of what was known that a fit keeps, in (0, 1].
      ridge: precision of w that is never forgotten, and that of the first.

    Raises:
      ValueError: an option out of its range, or a task without features.
    """
    if not isinstance(task, Featured):
      raise ValueError(
        f"task {task.name!r} has no problem_features: add that method, or take "
        "problems from its sampler alone"
      )
    if pool_factor < 1:
      raise ValueError(f"pool_factor={pool_factor} must be at least 1")
    if not 0 <= temperature < np.inf:
      raise ValueError(f"temperature={temperature} must be 0 or more")
    if not 0 < frontier < 0.5:
      raise ValueError(f"frontier={frontier} is not between 0 and 0.5")
    if not 0 < memory <= 1:
      raise ValueError(f"memory={memory} is not in (0, 1]")
    if not 0 < ridge < np.inf:
      raise ValueError(f"ridge={ridge} must be above 0")
    self._task = task
    self._pool_factor = pool_factor
    self._temperature = temperature
    self._frontier = frontier
    self._memory = memory
    self._ridge = ridge
    # Scaled by fixed problems: what a weight means never moves.
    rng = np.random.default_rng(_SCALE_SEED)
    known = self._raw_features(task.sample_problems(rng, _NUM_SCALED))
    self._mean = known.mean(axis=0)
    spread = known.std(axis=0)
    self._spread = np.where(spread > 0, spread, 1.0)
    size = 1 + 2 * len(self._mean)
    self._weights = np.zeros(size)
    self._precision = ridge * np.eye(size)
    self._num_learned = 0

  @property
  def pool_factor(self) -> int:
    """Problems drawn, or written, for each that is proposed."""
    return self._pool_factor

  @property
  def num_learned(self) -> int:
    """Problems learned from so far."""
    return self._num_learned

  def predict(self, problems: Sequence[Problem]) -> np.ndarray:
    """Probability, `[n]`, that a solution of each problem is right."""
    return _sigmoid(self._features(problems) @ self._weights)

  def propose(
    self, rng: np.random.Generator, n: int
  ) -> tuple[list[Problem], dict[str, float]]:
    """Draws a pool from the task's sampler and takes the most promising.

    Args:
      rng: draws.
      n: problems to propose.

    Returns:
      `(problems, report)`: n training problems, distinct as far as the pool
      reaches and repeated beyond; and numbers: `pool` distinct problems drawn,
      `heldout` refused because they may not be trained on, `repeated` share of
      proposals, means of predicted success and shares on the frontier of the
      proposals and of the pool.

    Raises:
      ValueError: n is below 1, or nothing drawn may be trained on.
    """
    if n < 1:
      raise ValueError(f"n={n} must be at least 1")
    drawn = self._task.sample_problems(rng, n * self._pool_factor)
    distinct = list({problem.id: problem for problem in drawn}.values())
    pool = [one for one in distinct if self._task.is_train(one)]
    if not pool:
      raise ValueError(
        f"none of {len(drawn)} problems that {self._task.name} drew may be "
        "trained on: its sampler and is_train disagree"
      )
    chosen = self.choose(rng, pool, n)
    num_distinct = len(chosen)
    chosen += [chosen[i % num_distinct] for i in range(n - num_distinct)]
    predicted, overall = self.predict(chosen), self.predict(pool)
    report = {
      "pool": len(pool),
      "heldout": len(distinct) - len(pool),
      "repeated": 1 - num_distinct / n,
      "predicted_success": predicted.mean(),
      "pool_predicted_success": overall.mean(),
      "frontier": self._on_frontier(predicted).mean(),
      "pool_frontier": self._on_frontier(overall).mean(),
    }
    return chosen, {name: float(value) for name, value in report.items()}

  def choose(
    self, rng: np.random.Generator, problems: Sequence[Problem], n: int
  ) -> list[Problem]:
    """The n most promising of some problems, all where there are fewer.

    Without repeats, with probabilities proportional to
    exp(4 p (1 - p) / temperature) at each draw (the Gumbel-top-k trick, Kool et
    al., arXiv 1903.06059); at temperature 0 the highest, the first of equals
    before.
    """
    scores = variance_score(self.predict(problems))
    if self._temperature:
      scores = scores / self._temperature + rng.gumbel(size=len(problems))
    order = np.argsort(-scores, kind="stable")[:n]
    return [problems[i] for i in order.tolist()]

  def screen(
    self, texts: Sequence[str], known_ids: Collection[str] = ()
  ) -> tuple[list[Problem], dict[str, float]]:
    """Reads problems that a policy wrote; refuses those of no use.

    The exact filter lets a problem through that is well formed, solvable, may
    be trained on (nothing that is held out ever passes), is like training
    problems, and is new. Whether it is on the frontier is reported and not
    asked for: `choose` goes by that.

    Args:
      texts: problems as a user would type them.
      known_ids: ids of problems that are not new, such as those of D_search.

    Returns:
      `(problems, report)`: what passes, in the order of the texts; and shares
      of all texts before the filter, 0 for no texts: `well_formed`; of these
      `solvable`; and of the solvable ones `trainable`, `like_training`, `new`
      (neither known nor written before) and `frontier`, each by itself. `kept`
      is the share that passes.
    """
    names = ("well_formed", "solvable", "trainable", "like_training", "new")
    counts = dict.fromkeys((*names, "frontier", "kept"), 0.0)
    seen = set(known_ids)
    kept = []
    for text in texts:
      try:
        problem = self._task.parse(text)
      except Unsolvable:
        counts["well_formed"] += 1
        continue
      except ValueError:
        continue
      is_trainable = self._task.is_train(problem)
      is_like = self._task.unlike_training(problem) is None
      is_new = problem.id not in seen
      seen.add(problem.id)
      passed = (True, True, is_trainable, is_like, is_new)
      for name, is_passed in zip(names, passed, strict=True):
        counts[name] += is_passed
      counts["frontier"] += self._on_frontier(self.predict([problem])).sum()
      if all(passed):
        kept.append(problem)
    counts["kept"] = len(kept)
    share = 1 / max(len(texts), 1)
    return kept, {name: float(x) * share for name, x in counts.items()}

  def learn(
    self, problems: Sequence[Problem], success_rates: Sequence[float]
  ) -> dict[str, float]:
    """Takes in what searches found.

    Args:
      problems: those searched, repeats allowed.
      success_rates: `[n]` in [0, 1], the share of each problem's solutions that
        is right.

    Returns:
      Numbers before the fit, so of problems not seen yet: `success`, the mean
      rate; `predicted`, the mean prediction; and `brier`, the mean squared
      distance of the two (a rate of 1/2 that is predicted as such has 0).
      Empty for no problems, which change nothing.

    Raises:
      ValueError: lengths differ, or a rate is no number in [0, 1].
    """
    rates = np.asarray(success_rates, np.float64)
    if rates.shape != (len(problems),):
      raise ValueError(
        f"{len(problems)} problems but success rates of shape {rates.shape}: "
        "give one of each"
      )
    wrong = rates[~((rates >= 0) & (rates <= 1))]
    if len(wrong):
      raise ValueError(f"success rate {wrong[0]} is not in [0, 1]")
    if not len(rates):
      return {}
    features = self._features(problems)
    before = _sigmoid(features @ self._weights)
    prior = self._memory * self._precision
    prior += (1 - self._memory) * self._ridge * np.eye(len(self._weights))
    self._weights, self._precision = _fit(features, rates, self._weights, prior)
    self._num_learned += len(rates)
    return {
      "success": float(rates.mean()),
      "predicted": float(before.mean()),
      "brier": float(np.mean((before - rates) ** 2)),
    }

  def to_arrays(self) -> dict[str, np.ndarray]:
    """What was learned, as a flat dict of arrays, none of them empty."""
    return {
      "question_weights": self._weights.copy(),
      "question_precision": self._precision.copy(),
      "question_num_learned": np.array([self._num_learned], np.int64),
    }

  @classmethod
  def from_arrays(
    cls, arrays: Mapping[str, np.ndarray], task: Task, **options: Any
  ) -> "QuestionGenerator":
    """Rebuilds exactly what `to_arrays` gave; others of the dict are ignored.

    Args:
      arrays: may hold other arrays of the checkpoint beside.
      task: as in the constructor, with the same features.
      **options: as in the constructor.

    Raises:
      ValueError: the arrays are missing, or of another number of features.
    """
    generator = cls(task, **options)
    expected = generator.to_arrays()
    for name, array in expected.items():
      if name not in arrays:
        raise ValueError(
          f"the checkpoint has no {name}: it is of a run without a question "
          "generator; start in another workdir"
        )
      if arrays[name].shape != array.shape:
        raise ValueError(
          f"{name} has shape {arrays[name].shape}, not {array.shape}: the "
          "features of the task have changed; start in another workdir"
        )
    weights, precision, num_learned = (arrays[name] for name in expected)
    generator._weights = np.array(weights, np.float64)
    generator._precision = np.array(precision, np.float64)
    generator._num_learned = int(num_learned[0])
    return generator

  def _on_frontier(self, success: np.ndarray) -> np.ndarray:
    return np.abs(success - 0.5) <= self._frontier

  def _raw_features(self, problems: Sequence[Problem]) -> np.ndarray:
    return np.array([self._task.problem_features(one) for one in problems])

  def _features(self, problems: Sequence[Problem]) -> np.ndarray:
    """`[n, 1 + 2 k]`: a 1, the scaled features and their squares."""
    features = np.ones((len(problems), len(self._weights)))
    if len(problems):
      scaled = (self._raw_features(problems) - self._mean) / self._spread
      # Written problems may lie far outside; a square must not run away.
      scaled = np.clip(scaled, -_MAX_SPREADS, _MAX_SPREADS)
      features[:, 1:] = np.concatenate([scaled, scaled**2], axis=1)
    return features


def variance_score(success: np.ndarray) -> np.ndarray:
  """4 p (1 - p): 1 where half of the solutions are right, 0 at both ends.

  Also what a problem earns the policy that writes such, once it was searched.
  """
  return 4 * success * (1 - success)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
  # The same function as 1 / (1 + e^-z), and nothing in it overflows.
  return (1 + np.tanh(logits / 2)) / 2


def _fit(features, rates, mean, precision):
  """Mode and precision of Laplace's approximation, see the class."""

  def objective(weights):
    logits = features @ weights
    # log(1 + e^z) - y z is the cross-entropy of a rate y.
    data = np.logaddexp(0, logits) - rates * logits
    offset = weights - mean
    return data.sum() + offset @ precision @ offset / 2

  def slopes(weights):
    p = _sigmoid(features @ weights)
    gradient = features.T @ (p - rates) + precision @ (weights - mean)
    curvature = (features * (p * (1 - p))[:, None]).T @ features + precision
    return gradient, curvature

  weights = mean
  gradient, curvature = slopes(weights)
  for _ in range(_MAX_STEPS):
    if np.abs(gradient).max() <= _TOLERANCE * len(rates):
      break
    step = np.linalg.solve(curvature, gradient)
    height, size = objective(weights), 1.0
    for _ in range(_MAX_HALVINGS):
      if objective(weights - size * step) <= height:
        break
      size /= 2
    weights = weights - size * step
    gradient, curvature = slopes(weights)
  return weights, curvature
