"""Budgets, intervals and accuracies, counted by hand."""

import math
import time

import numpy as np
import pytest

from o1jax import behaviors, evaluation
from o1jax import mesh as mesh_lib
from o1jax.evaluation import (
  Evaluator,
  bootstrap_interval,
  solutions_worth,
  strategy_options,
)
from o1jax.searched import FoundSolution, Searched
from policies import ToyTask, tiny_policy

TASK = ToyTask(num_numbers=3, min_number=1, max_number=9)


def evaluator(**changed):
  options = dict(batch_size=4, num_candidates=4, temperature=1.0, rule="puct")
  mesh = mesh_lib.make_mesh({"data": 2})
  return Evaluator(tiny_policy(), TASK, mesh, **options | changed)


def test_greedy_has_one_budget_and_votes_take_it_whole():
  assert strategy_options("greedy", 9, 2, 4) == {}
  for strategy in ("best_of_n", "majority_vote"):
    assert strategy_options(strategy, 9, 2, 4) == {"num_candidates": 9}


@pytest.mark.parametrize(
  "effort, num_steps, num_candidates",
  [(8, 2, 4), (7, 3, 4), (2, 2, 4), (5, 4, 1)],
)
def test_a_tree_decodes_no_more_steps_than_its_budget_pays(
  effort, num_steps, num_candidates
):
  options = strategy_options("mcts", effort, num_steps, num_candidates)
  steps = options["num_expansions"] * num_candidates
  assert steps <= effort * num_steps < steps + num_candidates
  assert options["num_candidates"] == num_candidates
  # A simulation costs no tokens; too few would leave expansions unspent.
  assert options["num_simulations"] >= steps


def test_an_effort_below_one_expansion_is_refused():
  words = "effort of 1 solutions of 3 steps does not pay.*num_candidates=4"
  with pytest.raises(ValueError, match=words):
    strategy_options("mcts", 1, 3, 4)


@pytest.mark.parametrize("effort", [0, -1, "8", 1.5])
def test_an_effort_that_is_no_count_is_refused(effort):
  with pytest.raises(ValueError, match="whole number above 0"):
    strategy_options("best_of_n", effort, 3, 4)


def test_efforts_are_words_or_numbers():
  words = [solutions_worth(word) for word in ("low", "medium", "high")]
  assert words == sorted(words)
  assert solutions_worth("7") == solutions_worth(7) == 7
  for effort in ("huge", "0", -1, "1.5", ""):
    with pytest.raises(ValueError, match="none of low, medium, high"):
      solutions_worth(effort)


@pytest.mark.parametrize("num_revisions", [0, 1, 3, 7, 20])
def test_one_option_turns_parallel_into_sequential(num_revisions):
  """From best-of-N to one chain of N, never more answers than N."""
  effort = 8
  options = strategy_options(
    "revision", effort, 2, 4, {"num_revisions": num_revisions}
  )
  length = 1 + options["num_revisions"]
  assert length == min(1 + num_revisions, effort)
  chains = options["options"]["num_chains"]
  assert effort - length < chains * length <= effort
  assert chains == {0: 8, 1: 4, 3: 2, 7: 1, 20: 1}[num_revisions]


def test_best_of_n_in_rounds_draws_as_many():
  options = strategy_options("best_of_n", 12, 2, 4, {"num_rounds": 3})
  assert options == {"num_candidates": 4, "options": {"num_rounds": 3}}


@pytest.mark.parametrize(
  "strategy, options, words",
  [
    ("revision", {"num_chains": 9}, "options.revision.num_chains=9: it follow"),
    ("beam", {"width": 9}, "options.beam.width=9: it follows from the effort"),
    ("best_of_n", {"num_rounds": 3}, "num_rounds=3: give a whole number that"),
    ("best_of_n", {"num_rounds": 0}, "num_rounds=0: give a whole number that"),
  ],
)
def test_options_that_break_the_budget_are_refused(strategy, options, words):
  with pytest.raises(ValueError, match=words):
    strategy_options(strategy, 8, 2, 4, options)


def test_the_interval_is_the_binomials_where_values_are_0_and_1():
  # Resampling n zeros and ones draws a binomial: its quantiles, by summing it.
  for n, hits, level in ((40, 10, 0.95), (200, 150, 0.8)):
    p = hits / n
    probs = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    below = np.cumsum(probs)
    tail = (1 - level) / 2
    expected = [np.searchsorted(below, q) / n for q in (tail, 1 - tail)]
    found = bootstrap_interval(
      np.repeat([1.0, 0.0], [hits, n - hits]), level=level
    )
    # A thousand draws find a quantile to about a hit or two.
    np.testing.assert_allclose(found, expected, atol=2.5 / n)
    assert found[0] < p < found[1]


def test_the_interval_covers_the_truth_as_often_as_it_says():
  rng = np.random.default_rng(5)
  covered = [
    low <= 0.3 <= high
    for low, high in (
      bootstrap_interval(rng.random(100) < 0.3, level=0.9) for _ in range(200)
    )
  ]
  assert 0.82 <= np.mean(covered) <= 0.96
  assert bootstrap_interval(np.ones(9)) == (1.0, 1.0)
  # The same values have the same interval.
  values = rng.random(20)
  assert bootstrap_interval(values) == bootstrap_interval(values)


def found(text, is_finished=True):
  nothing = np.zeros(1, np.float32)
  return FoundSolution(
    1, text, (1,), np.ones(1), nothing, nothing, is_finished, 0.5, 1
  )


def test_accuracy_is_of_the_selected_and_coverage_of_any(monkeypatch):
  problem = TASK.sample_problems(np.random.default_rng(0), 1)[0]
  right = "" if len(problem.prompt) % 2 == 0 else "1"
  wrong = right + "+"
  assert TASK.check(problem, right).is_correct
  cases = [
    ([right, wrong], 0),  # right
    ([wrong, right], 0),  # wrong, though it was found
    ([wrong, wrong], 1),  # wrong
    ([], None),  # nothing found
  ]
  cost = dict(generated_tokens=10, verifier_requests=3)
  searched = [
    Searched(problem, [found(t) for t in texts], chosen, {}, cost)
    for texts, chosen in cases
  ]
  # Right text, but it never ended.
  searched.append(Searched(problem, [found(right, False)], 0, {}, cost))
  calls = []

  def solver(params, key, problems):
    calls.append(len(problems))
    if len(calls) == 1:
      time.sleep(0.5)  # It compiles.
    return searched

  judge = evaluator()
  monkeypatch.setattr(judge, "_solver", lambda *_: solver)
  row, same = judge.measure(None, [problem] * 5, "best_of_n", 2, None)
  assert same is searched
  assert row["accuracy"] == 1 / 5 and row["coverage"] == 2 / 5
  assert (
    row["tokens"] == 10
    and row["tokens_spread"] == 0
    and row["verifier_requests"] == 3
  )
  assert row["num_problems"] == 5 and 0 <= row["seconds"] < 0.5
  interval = (row["accuracy_low"], row["accuracy_high"])
  assert interval == bootstrap_interval(np.array([1, 0, 0, 0, 0]))
  judge.measure(None, [problem] * 5, "best_of_n", 2, None)
  assert calls == [1, 5, 5]  # Once before the first measurement.
  assert judge.judge(searched[-1]) == [evaluation.CUT_OFF]


def test_a_row_counts_the_behaviors_of_the_answers(monkeypatch):
  (problem,) = TASK.sample_problems(np.random.default_rng(0), 1)
  texts = ["3 + 4 = 7\nwait, that's wrong", "check: 3 + 4 = 7, ok"]
  cost = dict(generated_tokens=10, verifier_requests=3)
  searched = [
    Searched(problem, [found(t) for t in texts], chosen, {}, cost)
    for chosen in (0, 0, 1, None)
  ]
  judge = evaluator()
  monkeypatch.setattr(judge, "_solver", lambda *_: lambda *_: searched)
  row, _ = judge.measure(None, [problem] * 4, "best_of_n", 2, None)
  counted = {
    name.partition("/")[2]: value
    for name, value in row.items()
    if name.startswith("behaviors/")
  }
  assert list(counted) == list(behaviors.COUNTED)
  # Of three answers; what was not answered with does not count.
  assert {name: value for name, value in counted.items() if value} == {
    "task_completion": 2 / 3,
    "self_correction": 2 / 3,
    "self_evaluation": 1 / 3,
  }


def test_solvers_are_made_once_and_greedy_once_for_all_efforts():
  made = evaluator(reward="checker")
  assert made._solver("greedy", 1) is made._solver("greedy", 16)
  assert made._solver("best_of_n", 4) is made._solver("best_of_n", 4)
  assert made._solver("best_of_n", 4) is not made._solver("best_of_n", 8)


def test_bad_options_are_refused():
  with pytest.raises(ValueError, match="temperature=-2.0"):
    evaluator(temperature=-2.0)
  with pytest.raises(ValueError, match="strategy='beams'"):
    evaluator()._solver("beams", 4)
  with pytest.raises(ValueError, match="batch_size=3 does not divide"):
    evaluator(batch_size=3)._solver("best_of_n", 4)


def test_the_table_has_a_line_for_every_row():
  row = {
    "strategy": "mcts",
    "budget": 16,
    "accuracy": 0.5,
    "accuracy_low": 0.25,
    "accuracy_high": 0.754,
    "coverage": 1.0,
    "tokens": 123.45,
    "tokens_spread": 6.78,
    "verifier_requests": 0.0,
    "seconds": 1.5,
  }
  head, line = evaluation.format_rows([row]).split("\n")
  assert head.split()[:3] == ["strategy", "budget", "accuracy"]
  assert line.split() == (
    ["mcts", "16", "50.0%", "25.0%-75.4%", "100.0%"]
    + ["123.5", "6.8", "0.0", "1.50"]
  )
  assert len(head) == len(line)
