"""Shares of a budget against brute force; searches with them, counted."""

import itertools

import jax
import numpy as np
import pytest

from o1jax import allocation
from o1jax import mesh as mesh_lib
from o1jax.allocation import ComputeOptimal, MarginalGain
from o1jax.evaluation import Evaluator
from o1jax.searched import FoundSolution, Searched
from o1jax.types import Verdict
from policies import ToyTask, tiny_params, tiny_policy

pytestmark = pytest.mark.usefixtures("quick_programs")

TASK = ToyTask(num_numbers=3, min_number=1, max_number=9)
PROBLEMS = TASK.heldout_problems(8)
TOKENS = 10  # of a solution of the solver below


def mended(rates, errors, counts):
  """What `share_out` maximises, term by term."""
  return sum(
    error * (1 - (1 - rate) ** count)
    for rate, error, count in zip(rates, errors, counts, strict=True)
  )


@pytest.mark.parametrize("seed", range(4))
def test_no_other_shares_mend_more(seed):
  rng = np.random.default_rng(seed)
  rates, errors = rng.random((2, 4))
  rates[0] = (0.0, 1.0, rates[0], rates[1])[seed]
  for budget in (0, 3, 7, 20):
    counts = allocation.share_out(rates, errors, budget, 5)
    assert counts.sum() <= budget and counts.max() <= 5
    best = max(
      mended(rates, errors, other)
      for other in itertools.product(range(6), repeat=4)
      if sum(other) <= budget
    )
    np.testing.assert_allclose(mended(rates, errors, counts), best, rtol=1e-9)
    # What helps nobody is not spent.
    assert not np.any(counts[rates == 0])
    assert np.all(counts[rates == 1] <= 1)


def best_by_table(accuracy, costs, counts, budget):
  """Most problems right at a cost of exactly 0, 1, ...: bin after bin."""
  right = [0.0] + [-np.inf] * budget
  for row, count in zip(accuracy, counts, strict=True):
    grown = [-np.inf] * (budget + 1)
    for before, value in enumerate(right):
      for arm, cost in enumerate(costs):
        at = before + int(count) * cost
        if at <= budget:
          grown[at] = max(grown[at], value + count * row[arm])
    right = grown
  return max(right)


@pytest.mark.parametrize("seed", range(3))
def test_no_other_arms_are_right_more_often(seed):
  rng = np.random.default_rng(seed)
  accuracy, costs = rng.random((4, 4)), [0, 1, 2, 4]
  counts = rng.integers(0, 9, 4)
  for budget in (0, 5, 20, 100):
    arms = allocation.choose_arms(accuracy, costs, counts, budget)
    cost = sum(int(n) * costs[arm] for n, arm in zip(counts, arms, strict=True))
    assert cost <= budget
    right = sum(
      n * accuracy[b, arm]
      for b, (n, arm) in enumerate(zip(counts, arms, strict=True))
    )
    best = best_by_table(accuracy, costs, counts, budget)
    np.testing.assert_allclose(right, best, rtol=1e-9)


def test_equal_arms_are_the_cheapest():
  accuracy = np.full((2, 3), 0.5)
  arms = allocation.choose_arms(accuracy, [4, 0, 2], np.array([3, 3]), 99)
  assert arms == (1, 1)


def found(text, score):
  nothing = np.zeros(1, np.float32)
  return FoundSolution(
    1, text, (1,), np.ones(1), nothing, nothing, True, score, 1
  )


def searched(problem, scores, selected="best"):
  solutions = [found(str(score), score) for score in scores]
  if selected == "best":
    selected = int(np.argmax(scores)) if scores else None
  cost = {"generated_tokens": TOKENS * len(scores), "verifier_requests": 1}
  return Searched(problem, solutions, selected, {"parent": 0}, cost)


def test_rates_are_means_with_one_solution_of_all_problems_added():
  probed = [
    searched(PROBLEMS[0], [1.0, 0.5]),
    searched(PROBLEMS[1], [0.0, 0.1]),
    searched(PROBLEMS[2], []),
  ]
  prior = (1.0 + 0.5 + 0.1) / 4
  np.testing.assert_allclose(
    allocation.success_rates(probed),
    [(1.5 + prior) / 3, (0.1 + prior) / 3, prior],
  )
  np.testing.assert_allclose(allocation.error_rates(probed), [0.0, 0.9, 1.0])


def test_parts_are_merged_with_the_best_of_their_answers():
  problem = PROBLEMS[0]
  parts = [
    searched(problem, [0.2, 0.9], selected=0),
    searched(problem, [], selected=None),
    searched(problem, [0.1, 0.7, 0.8], selected=1),
    searched(problem, [0.7], selected=0),
  ]
  one = allocation.merge(parts)
  assert one.problem == problem
  assert [s.outcome for s in one.solutions] == [0.2, 0.9, 0.1, 0.7, 0.8, 0.7]
  # The first of the two that their searches answered with and score 0.7.
  assert one.selected == 3
  assert one.cost == {"generated_tokens": 60, "verifier_requests": 4}
  assert allocation.merge(parts[1:2]).selected is None


def scripted(log, skill):
  """`solver_of` whose solutions have scores drawn by key and problem."""

  def solver_of(strategy, effort):
    def solver(params, key, problems):
      log.append((strategy, effort, len(problems), key))
      rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
      return [
        searched(p, list(skill[p.id, strategy] * rng.uniform(0.98, 1, effort)))
        for p in problems
      ]

    return solver

  return solver_of


def test_hard_problems_get_more_and_the_budget_holds():
  log, effort = [], 8
  # The first half is easy: the probe's answers are nearly sure.
  skill = {
    (p.id, "best_of_n"): 1.0 if i < 4 else 0.3 for i, p in enumerate(PROBLEMS)
  }
  search = MarginalGain(scripted(log, skill), effort)
  results = search(None, jax.random.key(0), PROBLEMS)
  assert [one.problem for one in results] == PROBLEMS
  counts = np.array([len(one.solutions) for one in results])
  assert sum(effort * num for _, effort, num, _ in log) == counts.sum()
  assert effort * 6 < counts.sum() <= effort * len(PROBLEMS)
  assert counts.min() >= 2 and counts.max() <= 4 * effort
  assert counts[:4].max() < counts[4:].min()
  for one, count in zip(results, counts, strict=True):
    assert one.cost["generated_tokens"] == TOKENS * count
    assert one.solutions[one.selected].outcome == max(
      s.outcome for s in one.solutions
    )
  # The probe and all parts draw with keys of their own.
  keys = {tuple(np.asarray(jax.random.key_data(key))) for *_, key in log}
  assert len(keys) == len(log) > 2
  efforts = [e for _, e, _, _ in log[1:]]
  assert all(e & (e - 1) == 0 for e in efforts)


def test_the_table_gives_every_bin_its_best_search():
  """Two kinds of problems, each with a strategy that works on it."""
  log, effort = [], 4
  kinds = {p.id: i % 2 for i, p in enumerate(PROBLEMS)}
  skill = {}
  for i, (name, kind) in enumerate(kinds.items()):
    # The probe tells the kinds apart; what is right is told by the judge.
    skill[name, "best_of_n"] = (0.8 if kind else 0.2) + 0.02 * i
    skill[name, "mcts"] = 1.0

  def judge(one):
    is_searched = len(one.solutions) > 1
    right = is_searched and not kinds[one.problem.id]
    return [Verdict(right, "", None)] * len(one.solutions)

  search = ComputeOptimal(
    scripted(log, skill), effort, calibration=PROBLEMS, judge=judge
  )
  search.prepare(None, PROBLEMS)
  log.clear()
  results = search(None, jax.random.key(5), PROBLEMS)
  (probe, *others) = log
  assert probe[:3] == ("best_of_n", 1, 8)
  for one in results:
    # The one kind is never mended, so that it gets nothing more.
    assert (len(one.solutions) == 1) == bool(kinds[one.problem.id])
  assert sum(e * n for _, e, n, _ in (probe, *others)) <= effort * 8


@pytest.mark.parametrize("effort", [1, 0, 2.5])
def test_an_effort_without_anything_to_share_is_refused(effort):
  for make in (
    MarginalGain,
    lambda *a: ComputeOptimal(*a, calibration=[], judge=None),
  ):
    with pytest.raises(ValueError, match="leaves nothing to share out"):
      make(scripted([], {}), effort)


def evaluator(**changed):
  options = dict(batch_size=8, num_candidates=1, temperature=1.0, rule="puct")
  mesh = mesh_lib.make_mesh({"data": 2})
  return Evaluator(tiny_policy(), TASK, mesh, **options | changed)


@pytest.mark.parametrize(
  "strategy",
  ["adaptive", pytest.param("compute_optimal", marks=pytest.mark.slow)],
)
def test_a_policy_spends_no_more_than_its_budget(strategy, monkeypatch):
  monkeypatch.setattr(allocation, "MOST_TIMES", 2)  # Fewer programs.
  judge, effort = evaluator(), 2
  row, results = judge.measure(
    tiny_params(), PROBLEMS, strategy, effort, jax.random.key(3)
  )
  lengths = tiny_policy().lengths
  per_solution = lengths.num_steps * lengths.step_tokens
  spent = [one.cost["generated_tokens"] for one in results]
  assert sum(spent) <= effort * len(PROBLEMS) * per_solution
  assert row["tokens"] == np.mean(spent)
  assert row["tokens_spread"] == np.std(spent) > 0
  for one in results:
    tokens = sum(len(s.tokens) for s in one.solutions)
    if strategy == "adaptive":
      assert one.cost["generated_tokens"] == tokens
    finished = [s for s in one.solutions if s.is_finished]
    if finished:
      chosen = one.solutions[one.selected]
      assert chosen.outcome == max(s.outcome for s in finished)


def test_scores_that_are_no_chances_are_refused():
  judge = evaluator(guidance={"log_prob": 1.0})
  for strategy in ("adaptive", "compute_optimal"):
    with pytest.raises(ValueError, match="its scores are no chances"):
      judge.check([(strategy, 4)], PROBLEMS)
