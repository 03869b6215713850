"""How well scores tell right from wrong, and how far they are probabilities.

Discrimination is the AUROC: over all solutions, and over pairs of the same
problem only, which is what a search needs to choose among its candidates.
Calibration is the error of the scores read as probabilities of being right.

Every measure takes weights, so that a bootstrap resample is a vector of
counts. Solutions of one problem are alike, so intervals resample problems and
not solutions. Everything is NumPy on the host, in float64.
"""

from collections.abc import Callable

import numpy as np

BOOTSTRAP_SEED = 11
NUM_RESAMPLES = 1000
NUM_BINS = 10


def auroc(
  scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> float:
  """Chance that a right solution scores above a wrong one; ties count half.

    AUROC = sum_{i right, j wrong} w_i w_j ([s_i > s_j] + [s_i = s_j] / 2)
            / (sum_{i right} w_i * sum_{j wrong} w_j)

  The statistic of Mann and Whitney (1947), exact with ties.

  Args:
    scores: `[n]`, higher for what is held to be right; infinities are allowed.
    labels: `[n]` True where the solution is right.
    weights: `[n]` counts of each solution; None for one each.

  Returns:
    The area in [0, 1]; NaN where all solutions are right or all are wrong.

  Raises:
    ValueError: lengths differ, or a score is NaN.
  """
  scores, labels, weights = _checked(scores, labels, weights)
  wins, pairs = _wins(scores, labels, weights)
  return wins / pairs if pairs else float("nan")


def pair_wins(
  scores: np.ndarray, labels: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Pairs of right and wrong within a group, and how many are in order.

  The quotient of the sums is the AUROC over pairs of one group alone; another
  one, for a resample, weighs the groups.

  Args:
    scores: `[n]` as in `auroc`.
    labels: `[n]` as in `auroc`.
    groups: `[n]` what each solution belongs to, such as one search.

  Returns:
    `(wins, pairs)`, `[k]` each, groups in the order of `np.unique`; ties are
    half a win.

  Raises:
    ValueError: as in `auroc`.
  """
  scores, labels, weights = _checked(scores, labels, None)
  names, members = np.unique(np.asarray(groups), return_inverse=True)
  order = np.argsort(members, kind="stable")
  parts = np.split(order, np.flatnonzero(np.diff(members[order])) + 1)
  counts = [_wins(scores[i], labels[i], weights[i]) for i in parts if len(i)]
  wins, pairs = np.array(counts).reshape(len(names), 2).T
  return wins, pairs


def reliability(
  probabilities: np.ndarray,
  labels: np.ndarray,
  weights: np.ndarray | None = None,
  *,
  num_bins: int = NUM_BINS,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Mean probability, share that is right and mass of bins of equal mass.

  A solution's bin is that of its middle rank, so equal probabilities share a
  bin and the order of the solutions does not matter. Empty bins are left out.

  Args:
    probabilities: `[n]` in [0, 1].
    labels: `[n]` as in `auroc`.
    weights: `[n]` as in `auroc`.
    num_bins: bins asked for.

  Returns:
    Three arrays `[k]`, k <= num_bins, by rising probability; the mass sums
    to 1.

  Raises:
    ValueError: lengths differ, or a probability is outside [0, 1].
  """
  values, labels, weights = _probabilities(probabilities, labels, weights)
  values, labels, weights = _sorted(values, labels, weights)
  total = weights.sum()
  if not total:
    return (np.zeros(0),) * 3
  first = _tie_starts(values)
  mass = np.add.reduceat(weights, first)
  middle = (np.cumsum(mass) - mass / 2) / total
  bins = np.minimum((middle * num_bins).astype(int), num_bins - 1)
  mass, right, sums = (
    np.bincount(bins, np.add.reduceat(x, first), num_bins)
    for x in (weights, weights * labels, weights * values)
  )
  kept = mass > 0
  mass, right, sums = mass[kept], right[kept], sums[kept]
  return sums / mass, right / mass, mass / total


def calibration_error(
  probabilities: np.ndarray,
  labels: np.ndarray,
  weights: np.ndarray | None = None,
  *,
  num_bins: int = NUM_BINS,
) -> float:
  """Expected calibration error over bins of equal mass.

    ECE = sum_bins mass * |share that is right - mean probability|

  Naeini et al. (AAAI 2015) with the equal-mass bins of Nixon et al.
  (arXiv 1904.01685). Arguments and errors as in `reliability`; NaN for no
  solutions.
  """
  mean, right, mass = reliability(
    probabilities, labels, weights, num_bins=num_bins
  )
  return float(mass @ np.abs(right - mean)) if len(mass) else float("nan")


def brier_score(
  probabilities: np.ndarray,
  labels: np.ndarray,
  weights: np.ndarray | None = None,
) -> float:
  """Mean squared distance of the probability from what is true (Brier, 1950).

  Arguments and errors as in `reliability`; NaN for no solutions.
  """
  values, labels, weights = _probabilities(probabilities, labels, weights)
  total = weights.sum()
  return float(weights @ (values - labels) ** 2 / total) if total else np.nan


def bootstrap(
  measure: Callable[[np.ndarray], float],
  groups: np.ndarray,
  *,
  level: float = 0.95,
) -> tuple[float, float]:
  """Percentile interval of a measure when whole groups are drawn anew.

  Args:
    measure: weights `[n]` to a number; NaN where it is not defined, and such
      resamples are left out.
    groups: `[n]` the problem that each solution belongs to.
    level: share of the resamples inside.

  Returns:
    `(low, high)`, the same at each call; NaN where no resample has a value.
  """
  names, members = np.unique(np.asarray(groups), return_inverse=True)
  if not len(names):
    return float("nan"), float("nan")
  rng = np.random.default_rng(BOOTSTRAP_SEED)
  found = []
  for _ in range(NUM_RESAMPLES):
    drawn = rng.integers(0, len(names), len(names))
    counts = np.bincount(drawn, minlength=len(names)).astype(np.float64)
    found.append(measure(counts[members]))
  found = np.array(found)
  found = found[~np.isnan(found)]
  if not len(found):
    return float("nan"), float("nan")
  tail = 100 * (1 - level) / 2
  low, high = np.percentile(found, [tail, 100 - tail])
  return float(low), float(high)


def _checked(scores, labels, weights):
  scores = np.asarray(scores, np.float64)
  labels = np.asarray(labels, np.float64)
  if weights is None:
    weights = np.ones(len(scores))
  weights = np.asarray(weights, np.float64)
  if not len(scores) == len(labels) == len(weights):
    raise ValueError(
      f"{len(scores)} scores, {len(labels)} labels and {len(weights)} weights:"
      " give one of each a solution"
    )
  if np.isnan(scores).any():
    raise ValueError(
      f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN"
    )
  return scores, labels, weights


def _probabilities(values, labels, weights):
  values, labels, weights = _checked(values, labels, weights)
  outside = values[(values < 0) | (values > 1)]
  if len(outside):
    raise ValueError(f"{outside[0]} is no probability: it is outside [0, 1]")
  return values, labels, weights


def _sorted(scores, labels, weights):
  # Stable: quick on what is sorted already, as in a bootstrap.
  order = np.argsort(scores, kind="stable")
  return scores[order], labels[order], weights[order]


def _tie_starts(ordered):
  """Where each run of equal values begins."""
  return np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])


def _wins(scores, labels, weights) -> tuple[float, float]:
  """Weight of the pairs in the right order, and of all pairs."""
  if not len(scores):
    return 0.0, 0.0
  scores, labels, weights = _sorted(scores, labels, weights)
  first = _tie_starts(scores)
  right = np.add.reduceat(weights * labels, first)
  wrong = np.add.reduceat(weights * (1 - labels), first)
  below = np.cumsum(wrong) - wrong
  wins = right @ (below + wrong / 2)
  return float(wins), float(right.sum() * wrong.sum())
