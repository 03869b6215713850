"""Plays in other words, against all solutions that say the same."""

from fractions import Fraction

import numpy as np
import pytest

from o1jax.tasks import make_task
from o1jax.tasks.numbers_rewording import reworded

FREE = make_task("countdown", num_numbers=4)
WHOLE = make_task("countdown", num_numbers=4, integers_only=True)


def unordered(text):
  """The steps, the operands of sums and products in one order."""
  steps = []
  for line in text.split("\n"):
    a, op, b, _, result, _, *left = line.replace(")", "").split(" ")
    if op in "+*":
      a, b = sorted((a, b))
    steps.append((a, op, b, result, tuple(sorted(left))))
  return tuple(steps)


def draws(task, numbers, solution, count=600, canonical=False):
  rng = np.random.default_rng(0)
  return [
    reworded(
      rng,
      numbers,
      solution,
      integers_only=task.integers_only,
      canonical=canonical,
    )
    for _ in range(count)
  ]


@pytest.mark.parametrize("task", [FREE, WHOLE], ids=["free", "whole"])
@pytest.mark.parametrize(
  "numbers, target",
  [
    ([3, 8, 1, 20], 30),  # 3 + 8 - 1 + 20
    ([3, 8, 2, 20], 240),  # 3 * 8 / 2 * 20
    ([5, 9, 2, 16], 98),  # 5 * 16 + 2 * 9
  ],
)
def test_every_legal_order_is_drawn_and_no_other(task, numbers, target):
  problem = task.make_problem(numbers, target)
  by_answer = {}
  for text in task.solutions(problem):
    answer = task.check(problem, text).answer
    by_answer.setdefault(answer, []).append(text)
  largest = max(by_answer.values(), key=len)
  for solution in (largest[0], largest[-1]):
    found = draws(task, numbers, solution)
    assert {unordered(text) for text in found} == {
      unordered(text) for text in largest
    }
    # Operands of sums and products stand in either order.
    orders = []
    for line in "\n".join(found).split("\n"):
      a, op, b, *_ = line.split(" ")
      if op in "+*" and a != b:
        orders.append(Fraction(a) > Fraction(b))
    assert 0.45 < np.mean(orders) < 0.55
    for text in set(found):
      assert task.check(problem, text).is_correct


@pytest.mark.parametrize("task", [FREE, WHOLE], ids=["free", "whole"])
def test_canonical_plays_stay_canonical(task):
  numbers, texts = [3, 8, 1, 20], set()
  problem = task.make_problem(numbers, 14)
  for solution in task.solutions(problem)[:20]:
    found = set(draws(task, numbers, solution, 20, canonical=True))
    texts |= found - {solution}
  assert len(texts) > 10
  for text in texts:
    assert task.check(problem, text).is_correct
    for line in text.split("\n"):
      a, _, b, *_ = line.split(" ")
      assert Fraction(a) >= Fraction(b)


@pytest.mark.parametrize(
  "text",
  [
    "",
    "3 + 8 = 11 (left: 1 20 11)",
    "3 + 8 = 12 (left: 1 20 12)",
    "3 + 8 = 11 (left: 1 20 11)\nback (left: 3 8 1 20)",
    "words",
  ],
)
def test_what_is_no_whole_play_stays_as_it_is(text):
  assert set(draws(WHOLE, [3, 8, 1, 20], text, 3)) == {text}
