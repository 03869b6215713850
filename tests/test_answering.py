"""Answers against counts and folds by hand."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from o1jax import mesh as mesh_lib
from o1jax.answering import check_answering, choose, folded_score
from o1jax.evaluation import strategy_options
from o1jax.solver import Solver
from policies import ToyTask, tiny_params, tiny_policy

pytestmark = pytest.mark.usefixtures("quick_programs")

TASK = ToyTask(num_numbers=3, min_number=1, max_number=9)
PROBLEMS = TASK.sample_problems(np.random.default_rng(0), 6)


def found(text, is_finished=True):
  return SimpleNamespace(text=text, is_finished=is_finished)


def last_letters(texts):
  return [None if text.endswith("?") else text[-1] for text in texts]


SOLUTIONS = [
  found("a7"),
  found("b8"),
  found("c7"),
  found("d9"),
  found("e9", is_finished=False),
  found("f?"),
  found("g8"),
]


@pytest.mark.parametrize(
  "answer_by, scores, expected",
  [
    ("score", [0.1, 0.2, 0.3, 0.5, 0.9, 0.4, 0.0], 3),
    ("score", [0.5, 0.2, 0.5, 0.5, 0.9, 0.4, 0.0], 0),
    # 7 and 8 have two votes each, and 7 comes first.
    ("vote", [0.1, 0.9, 0.3, 0.5, 0.9, 0.4, 0.0], 0),
    # 7: 0.4, 8: 0.6, 9: 0.5; the best solution of the answer is shown.
    ("weighted_vote", [0.1, 0.2, 0.3, 0.5, 0.9, 0.9, 0.4], 6),
    ("weighted_vote", [0.1, 0.2, 0.3, 0.7, 0.9, 0.9, 0.4], 3),
  ],
)
def test_what_is_answered(answer_by, scores, expected):
  assert choose(SOLUTIONS, scores, last_letters, answer_by) == expected


@pytest.mark.parametrize("answer_by", ["score", "vote", "weighted_vote"])
def test_nothing_finished_and_nothing_read(answer_by):
  assert choose([], [], last_letters, answer_by) is None
  cut = [found("a7", is_finished=False)]
  assert choose(cut, [0.5], last_letters, answer_by) is None
  unread = choose([found("a?")], [0.5], last_letters, answer_by)
  assert unread == (0 if answer_by == "score" else None)


def test_scores_of_the_steps_are_folded():
  nodes = {
    "value": np.array([0.3, 0.8, 0.5, 0.2, 0.0]),
    "reward": np.array([0.0, 0.0, 0.0, 0.0, 0.6]),
  }
  solution = SimpleNamespace(path=(1, 3, 4))
  folds = {"last": 0.6, "min": 0.2, "product": 0.096, "mean": 1.6 / 3}
  for fold, expected in folds.items():
    assert folded_score(nodes, solution, fold) == pytest.approx(expected)


@pytest.mark.parametrize(
  "fields, words",
  [
    (dict(answer_by="voting"), "answer_by='voting': choose one of search"),
    (dict(fold="max"), "fold='max': choose one of last, min"),
    (dict(fold="min"), "fold='min' with answer_by='search'"),
    (dict(fold="min", answer_by="vote"), "fold='min' with answer_by='vote'"),
    (
      dict(fold="min", answer_by="score", strategy="best_of_n"),
      "fold='min' with strategy='best_of_n'",
    ),
    (
      dict(fold="mean", answer_by="score", strategy="mctsr"),
      "fold='mean' with strategy='mctsr'",
    ),
    (
      dict(answer_by="score", strategy="majority_vote"),
      "answer_by='score' with strategy='majority_vote'",
    ),
    (
      dict(answer_by="weighted_vote", guidance={"log_prob": 1.0}),
      "guidance.log_prob with answer_by='weighted_vote'",
    ),
  ],
)
def test_what_does_not_fit_is_refused(fields, words):
  fits = dict(strategy="beam", answer_by="search", fold="last", guidance=None)
  check_answering(**fits)
  with pytest.raises(ValueError, match=words):
    check_answering(**fits | fields)


@functools.cache
def searched(answer_by, fold):
  solver = Solver(
    tiny_policy(),
    strategy="beam",
    num_candidates=3,
    options={"width": 3},
    answer_by=answer_by,
    fold=fold,
    batch_size=8,
    mesh=mesh_lib.make_mesh({"data": 2}),
    task=TASK,
  )
  return solver(tiny_params(), jax.random.key(3), PROBLEMS)


def test_a_search_answers_by_folded_scores():
  for one in searched("score", "min"):
    scores = {}
    for i, solution in enumerate(one.solutions):
      if solution.is_finished:
        steps = one.nodes["value"][list(solution.path[:-1])].tolist()
        scores[i] = sorted([*steps, solution.outcome])[0]
    if not scores:
      assert one.selected is None
      continue
    assert scores[one.selected] == max(scores.values())


def test_a_tree_may_vote():
  for one in searched("vote", "last"):
    answers = [
      TASK.check(one.problem, s.text).answer if s.is_finished else None
      for s in one.solutions
    ]
    votes = [a for a in answers if a is not None]
    if not votes:
      assert one.selected is None
      continue
    most = max(votes.count(a) for a in votes)
    first = next(a for a in votes if votes.count(a) == most)
    assert one.selected == answers.index(first)


def test_the_tree_is_the_same_however_it_answers():
  chosen = []
  kinds = [("search", "last"), ("score", "min"), ("vote", "last")]
  for kind in kinds:
    found = searched(*kind)
    chosen.append([one.selected for one in found])
    for one, other in zip(found, searched("search", "last"), strict=True):
      np.testing.assert_array_equal(one.nodes["value"], other.nodes["value"])
  assert len({tuple(c) for c in chosen}) == 3


def test_options_of_a_comparison_name_the_way_to_answer():
  options = dict(answer_by="weighted_vote", fold="min")
  plain = strategy_options("beam", 8, 2, 4)
  found = strategy_options("beam", 8, 2, 4, options)
  assert found == plain | options
