"""Arrays of plays against one play at a time in exact fractions."""

import collections
import math
from fractions import Fraction

import numpy as np
import pytest

from o1jax.tasks import numbers_game, numbers_play, numbers_text


def follow(numbers, choices, integers_only):
  """The number a play ends at, None where a step of it is not legal."""
  left = list(numbers)
  for choice in choices:
    pair, branch = divmod(int(choice), 6)
    i, j = [(i, j) for i in range(len(left)) for j in range(i + 1, len(left))][
      pair
    ]
    result = numbers_game.branch_results(left[i], left[j], integers_only)
    if result[branch] is None:
      return None
    left = [n for p, n in enumerate(left) if p not in (i, j)]
    left.append(result[branch])
  return left[0]


@pytest.mark.parametrize("integers_only", [False, True])
@pytest.mark.parametrize("num_numbers", [2, 3, 4])
def test_enumeration_agrees_with_single_plays(num_numbers, integers_only):
  rng = np.random.default_rng(num_numbers)
  numbers = rng.integers(0, 6, (4, num_numbers))
  ends = numbers_play.enumerate_plays(numbers, integers_only)
  total = numbers_play.num_plays(num_numbers)
  assert ends.num.shape == ends.legal.shape == (4, total)
  plays = rng.choice(total, min(total, 300), replace=False)
  choices = numbers_play.play_choices(plays, num_numbers)
  for row, start in enumerate(numbers.tolist()):
    for play, choice in zip(plays, choices, strict=True):
      expected = follow(start, choice, integers_only)
      assert bool(ends.legal[row, play]) == (expected is not None)
      if expected is not None:
        found = Fraction(int(ends.num[row, play]), int(ends.den[row, play]))
        assert found == expected and ends.den[row, play] > 0


def test_enumeration_is_exact_at_the_largest_numbers():
  largest = 1
  while True:
    try:
      numbers_play.require_exact(2 * largest, 3, 100)
    except ValueError:
      break
    largest *= 2
  numbers = np.array([[largest, largest - 1, largest - 2]])
  ends = numbers_play.enumerate_plays(numbers, False)
  choices = numbers_play.play_choices(np.arange(108), 3)
  for play, choice in enumerate(choices):
    found = Fraction(int(ends.num[0, play]), int(ends.den[0, play]))
    assert found == follow(numbers[0].tolist(), choice, False)


def test_whole_values():
  num, den = np.array([[6, 7, -4, 0]]), np.array([[3, 2, 1, 5]])
  legal = np.array([[True, True, True, True]])
  ends = numbers_play.Exact(num, den, legal)
  np.testing.assert_array_equal(
    numbers_play.whole_values(ends), [[2, -1, -1, 0]]
  )
  ends = numbers_play.Exact(num, den, ~legal)
  np.testing.assert_array_equal(numbers_play.whole_values(ends), [[-1] * 4])


def end_probabilities(state, *law):
  """Distribution of the last number under the law, by exact recursion."""
  if len(state) == 1:
    return {state[0]: Fraction(1)}
  steps = list(numbers_game.legal_steps(tuple(state), *law))
  total = collections.defaultdict(Fraction)
  for *_, left in steps:
    for end, share in end_probabilities(left, *law).items():
      total[end] += share / len(steps)
  return total


@pytest.mark.parametrize("canonical", [False, True])
@pytest.mark.parametrize("integers_only", [False, True])
def test_random_plays_follow_the_uniform_law(integers_only, canonical):
  # Equal numbers: zero comes up, so illegal divisions have to be redrawn.
  start, n = (2, 2, 3), 20_000
  rng = np.random.default_rng(1)
  plays = numbers_play.random_plays(
    rng, np.tile(start, (n, 1)), integers_only, canonical
  )
  texts, reached = plays.texts(), plays.whole_values()
  ends = collections.Counter(text.split("(left: ")[-1][:-1] for text in texts)
  expected = end_probabilities(start, integers_only, canonical)
  assert set(ends) <= set(map(str, expected))
  for end, share in expected.items():
    sigma = math.sqrt(n * float(share) * (1 - float(share)))
    assert abs(ends[str(end)] - n * float(share)) < 5 * sigma
  whole = {str(e): e for e in expected if isinstance(e, int) and e >= 0}
  for text, value in zip(texts[:500], reached[:500].tolist(), strict=True):
    assert value == whole.get(text.split("(left: ")[-1][:-1], -1)


@pytest.mark.parametrize("integers_only", [False, True])
def test_texts_of_random_plays_have_right_steps(integers_only):
  rng = np.random.default_rng(2)
  numbers = rng.integers(0, 10, (300, 4))
  texts = numbers_play.random_plays(rng, numbers, integers_only).texts()
  for row, text in zip(numbers.tolist(), texts, strict=True):
    steps = list(numbers_text.judge_lines(row, None, text, integers_only))
    assert len(steps) == 3 and not any(step.reason for step in steps)


@pytest.mark.parametrize("integers_only", [False, True])
def test_canonical_plays_write_each_step_in_one_way(integers_only):
  rng = np.random.default_rng(4)
  numbers = rng.integers(0, 10, (300, 4))
  plays = numbers_play.random_plays(rng, numbers, integers_only, True)
  ops = collections.Counter()
  for row, text in zip(numbers.tolist(), plays.texts(), strict=True):
    steps = list(numbers_text.judge_lines(row, None, text, integers_only))
    assert len(steps) == 3 and not any(step.reason for step in steps)
    for line in text.split("\n"):
      a, op, b, _, result, *_ = line.split(" ")
      assert Fraction(a) >= Fraction(b) and Fraction(result) >= 0
      ops[op] += 1
  assert set(ops) == set("+-*/") and max(ops.values()) < 400


def test_texts_are_those_of_the_rows_asked_for():
  rng = np.random.default_rng(5)
  plays = numbers_play.random_plays(rng, rng.integers(0, 10, (40, 3)), False)
  rows = np.array([7, 3, 3, 39])
  texts = plays.texts()
  assert plays.texts(rows) == [texts[row] for row in rows]
  assert plays.texts(rows[:0]) == []


def test_one_play_per_end():
  rng = np.random.default_rng(6)
  sets = rng.integers(-1, 5, (50, 8))
  sets[3] = -1  # a set that reaches nothing
  picked = numbers_play.one_play_per_end(rng, sets.ravel(), 8)
  owners = (picked // 8).tolist()
  assert owners == sorted(owners)
  found = list(zip(owners, sets.ravel()[picked].tolist(), strict=True))
  assert len(set(found)) == len(found)
  assert set(found) == {
    (owner, end)
    for owner, ends in enumerate(sets.tolist())
    for end in ends
    if end >= 0
  }


def test_one_play_per_end_is_in_random_order():
  # One set after another: the first of each is not the likelier end.
  ends = np.where(np.random.default_rng(0).random((4000, 8)) < 0.9, 1, 2)
  ends[:, 7] = 2  # every set reaches both, or 2 alone
  picked = numbers_play.one_play_per_end(
    np.random.default_rng(1), ends.ravel(), 8
  )
  _, firsts = np.unique(picked // 8, return_index=True)
  both = firsts[(ends == 1).any(axis=1)]
  share = np.mean(ends.ravel()[picked[both]] == 1)
  assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(len(both))


def test_both_orders_of_a_sum_are_written():
  rng = np.random.default_rng(3)
  numbers, choices = np.tile([3, 7], (200, 1)), np.zeros((200, 1), int)
  texts = numbers_play.chosen_plays(rng, numbers, choices, False)
  counts = collections.Counter(texts)
  assert set(counts) == {"3 + 7 = 10 (left: 10)", "7 + 3 = 10 (left: 10)"}
  assert min(counts.values()) > 60


def test_pick_true_is_uniform_over_the_mask():
  mask = np.tile([False, True, True, False, True], (6000, 1))
  picked = numbers_play.pick_true(np.random.default_rng(0), mask)
  counts = np.bincount(picked, minlength=5)
  assert counts[0] == counts[3] == 0
  assert np.abs(counts[[1, 2, 4]] - 2000).max() < 5 * math.sqrt(6000 * 2 / 9)
