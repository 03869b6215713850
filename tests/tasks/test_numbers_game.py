"""The solver against plain enumeration of all plays."""

import itertools
import operator
from fractions import Fraction

import numpy as np
import pytest

from o1jax.tasks import numbers_game, numbers_text

OPS = {
  "+": operator.add,
  "*": operator.mul,
  "-": operator.sub,
  "/": operator.truediv,
}


def plays(numbers, integers_only):
  """Yields (probability, lines, last number) of every legal play.

  Written from the rules alone: ordered pairs of positions, where a sum or
  product counts once for its two orders.
  """
  if len(numbers) == 1:
    yield Fraction(1), (), numbers[0]
    return
  steps = []
  for i, j in itertools.permutations(range(len(numbers)), 2):
    rest = [n for p, n in enumerate(numbers) if p not in (i, j)]
    for op, function in OPS.items():
      if (op in "+*" and i > j) or (op == "/" and numbers[j] == 0):
        continue
      result = function(numbers[i], numbers[j])
      if integers_only and (result < 0 or result.denominator > 1):
        continue
      left = [*rest, result]
      line = f"{numbers[i]} {op} {numbers[j]} = {result} "
      steps.append((line + f"(left: {' '.join(map(str, left))})", left))
  for line, left in steps:
    for share, lines, last in plays(left, integers_only):
      yield share / len(steps), (line, *lines), last


def fractions(numbers):
  return [Fraction(int(number)) for number in numbers]


CASES = [
  ([3, 7, 2], 13),
  ([3, 3, 3], 1),
  ([1, 5, 5], 24),
  ([0, 4, 9], 36),
  ([20, 13, 6], 46),
]


@pytest.mark.parametrize("integers_only", [False, True])
@pytest.mark.parametrize("numbers, target", CASES)
def test_solver_agrees_with_all_plays(numbers, target, integers_only):
  found = list(plays(fractions(numbers), integers_only))
  wins = [(share, lines) for share, lines, last in found if last == target]
  solver = numbers_game.Solver(target, integers_only)
  state = numbers_game.make_state(numbers)
  assert solver.value(state) == pytest.approx(
    float(sum(share for share, _ in wins)), abs=1e-12
  )
  assert solver.can_reach(state) == bool(wins)
  texts = solver.solutions(numbers)
  assert len(set(texts)) == len(texts)
  assert set(texts) == {"\n".join(lines) for _, lines in wins}


def test_four_numbers_agree_with_all_plays():
  numbers = [1, 5, 5, 5]
  found = list(plays(fractions(numbers), False))
  wins = [(share, lines) for share, lines, last in found if last == 24]
  solver = numbers_game.Solver(24)
  value = solver.value(numbers_game.make_state(numbers))
  assert value == pytest.approx(float(sum(s for s, _ in wins)), abs=1e-12)
  texts = {"\n".join(lines) for _, lines in wins}
  assert set(solver.solutions(numbers)) == texts
  assert any("1 / 5 = 1/5" in text for text in texts)  # fractions are needed


@pytest.mark.slow
@pytest.mark.parametrize("integers_only", [False, True])
def test_random_four_number_states_agree_with_all_plays(integers_only):
  rng = np.random.default_rng(0)
  for _ in range(25):
    numbers = rng.integers(0, 14, 4).tolist()
    found = list(plays(fractions(numbers), integers_only))
    target = int(found[int(rng.integers(len(found)))][2])
    value = sum(share for share, _, last in found if last == target)
    solver = numbers_game.Solver(target, integers_only)
    assert solver.value(numbers_game.make_state(numbers)) == pytest.approx(
      float(value), abs=1e-12
    )


def test_three_numbers_have_108_plays():
  # No division by zero in sight: no two numbers are equal or cancel.
  assert sum(1 for _ in plays(fractions([2, 7, 19]), False)) == 108


def test_values_average_over_legal_steps():
  solver = numbers_game.Solver(12)
  numbers = (3, 7, 2)
  children = [
    solver.value(numbers_game.make_state(left))
    for *_, left in numbers_game.legal_steps(numbers)
  ]
  value = solver.value(numbers_game.make_state(numbers))
  assert value == pytest.approx(np.mean(children), abs=1e-12)
  assert value > 0


def test_canonical_steps():
  steps = [
    f"{a} {op} {b} = {result}"
    for a, op, b, result, _ in numbers_game.legal_steps(
      (3, 7, 3, 0), False, True
    )
  ]
  assert sorted(steps) == sorted(
    [f"7 {tail}" for tail in ("+ 3 = 10", "* 3 = 21", "- 3 = 4", "/ 3 = 7/3")]
    * 2
    + [f"3 {tail}" for tail in ("+ 3 = 6", "* 3 = 9", "- 3 = 0", "/ 3 = 1")]
    + [f"7 {tail}" for tail in ("+ 0 = 7", "* 0 = 0", "- 0 = 7")]
    + [f"3 {tail}" for tail in ("+ 0 = 3", "* 0 = 0", "- 0 = 3")] * 2
  )
  # The state of a search trace may hold what canonical play does not make.
  steps = list(numbers_game.legal_steps((2, -4), False, True))
  assert steps == [(2, "-", -4, 6, (6,))]


def test_canonical_play_misses_some_solutions():
  def ends(state):
    if len(state) == 1:
      yield state[0]
    for *_, left in numbers_game.legal_steps(state, False, True):
      yield from ends(left)

  assert 24 not in ends((1, 3, 4, 6))  # 6 / (1 - 3 / 4)
  assert 24 in ends((1, 1, 4, 6))


def test_solutions_are_correct():
  for text in numbers_game.Solver(46).solutions([20, 13, 6]):
    assert numbers_text.check_text([20, 13, 6], 46, text).is_correct


@pytest.mark.parametrize(
  "a, op, b, integers_only, result",
  [
    (6, "/", 4, False, Fraction(3, 2)),
    (6, "/", 4, True, None),
    (6, "/", 3, True, 2),
    (6, "/", 0, False, None),
    (3, "-", 7, False, -4),
    (3, "-", 7, True, None),
    (Fraction(1, 2), "+", Fraction(1, 2), False, 1),
    (0, "/", 5, True, 0),
  ],
)
def test_combine(a, op, b, integers_only, result):
  found = numbers_game.combine(a, op, b, integers_only)
  assert found == result and type(found) is type(result)
