"""One budget for many problems, shared out by how hard each seems.

Every problem is probed with a few solutions, which are kept and paid for. Their
scores say how hard it seems; the checker does not, unless it is the reward. The
rest of the budget goes where it promises most:

  MarginalGain    one more solution at a time to the problem that gains most by
                  it: Damani et al., arXiv 2410.04707, Section 3
  ComputeOptimal  a table of the best search for each bin of difficulty, made on
                  problems of the training split: Snell et al., arXiv
                  2408.03314, Section 3.2

Both are called as a `Solver` is and never pass the budget. They search with a
few sizes, powers of two, so that few programs compile.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from o1jax.searched import Searched
from o1jax.solver import Solver
from o1jax.types import Problem, Verdict

PROBE_SHARE = 4  # The probe costs this part of the budget, or one solution.
MOST_TIMES = 4  # A problem gets this many times the mean effort at most.
NUM_BINS = 4
ARM_STRATEGIES = ("best_of_n", "mcts")

SolverOf = Callable[[str, int], Solver]


class MarginalGain:
  """Best-of-N with an N of its own for every problem.

  Solutions beyond the probe's are drawn in parts of 1, 2, 4, ... by the binary
  digits of their number, each with a key of its own.
  """

  def __init__(self, solver_of: SolverOf, effort: int):
    """Compiles nothing.

    Args:
      solver_of: `(strategy, effort) -> Solver`.
      effort: mean budget of a problem, in solutions.

    Raises:
      ValueError: an effort that leaves nothing to share out.
    """
    self._effort, self._num_probes = effort, num_probes(effort)
    self._most = MOST_TIMES * effort - self._num_probes
    self._probe = solver_of("best_of_n", self._num_probes)
    self._parts = {n: solver_of("best_of_n", n) for n in powers(self._most)}

  def prepare(self, params: Any, problems: Sequence[Problem]) -> None:
    """Compiles every program."""
    for solver in (self._probe, *self._parts.values()):
      solver(params, jax.random.key(0), problems[:1])

  def __call__(
    self, params: Any, key: jax.Array, problems: Sequence[Problem]
  ) -> list[Searched]:
    """Searches all problems; `nodes` of the results are left out."""
    probed = self._probe(params, jax.random.fold_in(key, 0), problems)
    budget = (self._effort - self._num_probes) * len(problems)
    counts = share_out(
      success_rates(probed), error_rates(probed), budget, self._most
    )
    found = [[one] for one in probed]
    for size, solver in self._parts.items():
      index = np.flatnonzero(counts & size)
      part_key = jax.random.fold_in(key, size)
      extend(found, index, solver, params, part_key, problems)
    return [merge(parts) for parts in found]


class ComputeOptimal:
  """A probe, then the search that was best for its bin of difficulty."""

  def __init__(
    self,
    solver_of: SolverOf,
    effort: int,
    *,
    calibration: Sequence[Problem],
    judge: Callable[[Searched], Sequence[Verdict]],
  ):
    """Compiles nothing.

    Args:
      solver_of: `(strategy, effort) -> Solver`.
      effort: mean budget of a problem, in solutions.
      calibration: problems of the training split, which the table is made on.
      judge: the checker's verdicts on these.

    Raises:
      ValueError: an effort that leaves nothing to share out, or does not pay
        for a search of the table.
    """
    self._effort, self._num_probes = effort, num_probes(effort)
    self._probe = solver_of("best_of_n", self._num_probes)
    sizes = [n for n in powers(2 * effort) if PROBE_SHARE * n >= effort]
    self._costs = [0, *[n for _ in ARM_STRATEGIES for n in sizes]]
    # The first arm leaves it at the probe.
    self._arms = [solver_of(name, n) for name in ARM_STRATEGIES for n in sizes]
    self._calibration = calibration
    self._judge = judge
    self._edges = np.zeros(0)
    self._accuracy = np.zeros((0, 0))

  def prepare(self, params: Any, problems: Sequence[Problem]) -> None:
    """Makes the table for these parameters; `problems` are not looked at."""
    del problems
    key = jax.random.key(0)
    probed = self._probe(params, jax.random.fold_in(key, 0), self._calibration)
    answers = [probed]
    for arm, solver in enumerate(self._arms, 1):
      arm_key = jax.random.fold_in(key, arm)
      found = solver(params, arm_key, self._calibration)
      answers.append([merge(p) for p in zip(probed, found, strict=True)])
    is_right = np.array(
      [[self._is_right(one) for one in column] for column in answers]
    ).T
    rates = success_rates(probed)
    shares = np.arange(1, NUM_BINS) / NUM_BINS
    self._edges = np.quantile(rates, shares)
    self._accuracy = mean_by_bin(is_right, self._bins(rates))

  def __call__(
    self, params: Any, key: jax.Array, problems: Sequence[Problem]
  ) -> list[Searched]:
    """Searches all problems, after `prepare` with the same parameters."""
    probed = self._probe(params, jax.random.fold_in(key, 0), problems)
    bins = self._bins(success_rates(probed))
    budget = (self._effort - self._num_probes) * len(problems)
    chosen = choose_arms(
      self._accuracy,
      self._costs,
      np.bincount(bins, minlength=NUM_BINS),
      budget,
    )
    found = [[one] for one in probed]
    for arm, solver in enumerate(self._arms, 1):
      index = np.flatnonzero(np.asarray(chosen)[bins] == arm)
      arm_key = jax.random.fold_in(key, arm)
      extend(found, index, solver, params, arm_key, problems)
    return [merge(parts) for parts in found]

  def _bins(self, rates: np.ndarray) -> np.ndarray:
    return np.searchsorted(self._edges, rates, side="right")

  def _is_right(self, one: Searched) -> bool:
    if one.selected is None:
      return False
    return self._judge(one)[one.selected].is_correct


def num_probes(effort: int) -> int:
  """Solutions that every problem is probed with.

  Raises:
    ValueError: the effort leaves nothing to share out.
  """
  if type(effort) is not int or effort < 2:
    raise ValueError(
      f"an effort of {effort} leaves nothing to share out after one solution "
      "for each problem: give a whole number of at least 2"
    )
  return max(1, effort // PROBE_SHARE)


def powers(most: int) -> list[int]:
  """1, 2, 4, ... up to `most`."""
  return [1 << digit for digit in range(most.bit_length())]


def success_rates(searched: Sequence[Searched]) -> np.ndarray:
  """Chances `[n]` that one more solution is right, as the scores have it.

  The mean score of a problem's solutions, where those of all problems count as
  one more: few solutions do not make it 0 or 1.
  """
  scores = [[s.outcome for s in one.solutions] for one in searched]
  totals = np.array([sum(own) for own in scores], np.float64)
  counts = np.array([len(own) for own in scores])
  prior = totals.sum() / max(counts.sum(), 1)
  return np.clip((totals + prior) / (counts + 1), 0.0, 1.0)


def error_rates(searched: Sequence[Searched]) -> np.ndarray:
  """Chances `[n]` that the answer so far is wrong: 1 less its score."""
  best = [
    0.0 if one.selected is None else one.solutions[one.selected].outcome
    for one in searched
  ]
  return np.clip(1.0 - np.array(best, np.float64), 0.0, 1.0)


def share_out(
  rates: np.ndarray, errors: np.ndarray, budget: int, most: int
) -> np.ndarray:
  """How many more solutions each problem gets, `[n]`.

  Maximises the mistakes that are mended, sum of

    errors_i * (1 - (1 - rates_i)^count_i),

  by giving the next solution to whom it helps most. That is exact, because each
  helps less than the one before it. What helps nobody is not spent. Damani et
  al., arXiv 2410.04707, equation 2, with `errors` of 1.

  Args:
    rates: `[n]` chance that one solution is right.
    errors: `[n]` chance that the problem needs one.
    budget: solutions in all.
    most: for one problem.
  """
  gains = (errors * rates)[:, None] * (1.0 - rates[:, None]) ** np.arange(most)
  order = np.argsort(-gains, axis=None, kind="stable")[:budget]
  order = order[gains.reshape(-1)[order] > 0]
  return np.bincount(order // most, minlength=len(rates))


def mean_by_bin(is_right: np.ndarray, bins: np.ndarray) -> np.ndarray:
  """Accuracies `[NUM_BINS, arms]` of `is_right` `[n, arms]`; 0 where none."""
  sums = np.zeros((NUM_BINS, is_right.shape[1]))
  np.add.at(sums, bins, is_right)
  counts = np.bincount(bins, minlength=NUM_BINS)
  return sums / np.maximum(counts, 1)[:, None]


def choose_arms(
  accuracy: np.ndarray,
  costs: Sequence[int],
  counts: np.ndarray,
  budget: int,
) -> tuple[int, ...]:
  """The arm of each bin with which most problems come out right.

  Tries all combinations; of equal ones it takes the cheapest.

  Args:
    accuracy: `[bins, arms]`.
    costs: of each arm, for one problem; one of them is 0.
    counts: `[bins]` problems.
    budget: that the arms of all problems may cost.
  """
  num_bins, num_arms = accuracy.shape

  def worth(arms):
    cost = sum(n * costs[arm] for n, arm in zip(counts, arms, strict=True))
    right = counts @ accuracy[np.arange(num_bins), arms]
    return (cost <= budget, right, -cost)

  return max(itertools.product(range(num_arms), repeat=num_bins), key=worth)


def extend(
  found: list[list[Searched]],
  index: np.ndarray,
  solver: Solver,
  params: Any,
  key: jax.Array,
  problems: Sequence[Problem],
) -> None:
  """Searches the problems of `index` once more and adds what was found."""
  searched = solver(params, key, [problems[i] for i in index])
  for i, one in zip(index, searched, strict=True):
    found[i].append(one)


def merge(parts: Sequence[Searched]) -> Searched:
  """Several searches of a problem as one, without their trees.

  The answer is that part's whose own has the highest score, the first of equal
  ones. Costs are sums, texts that were checked twice count twice.
  """
  solutions: list[Any] = []
  best = None
  for part in parts:
    if part.selected is not None:
      score = part.solutions[part.selected].outcome
      if best is None or score > best[0]:
        best = (score, len(solutions) + part.selected)
    solutions.extend(part.solutions)
  names = parts[0].cost
  return Searched(
    problem=parts[0].problem,
    solutions=solutions,
    selected=None if best is None else best[1],
    nodes={},
    cost={name: sum(part.cost[name] for part in parts) for name in names},
  )
