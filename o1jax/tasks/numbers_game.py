"""The exact numbers game: rules, true values, all solutions.

A state is a collection of numbers. A step takes two of them, combines them by
+, -, * or / and puts the result back; a play ends when one number is left, and
solves the problem when that number is the target. Everything is exact: a
number is an int, or a Fraction that is not whole.

The uniform law of legal play, used by every function that says "random play"
or "value": at a state, each pair of positions (i < j) offers six steps
(`BRANCHES`), the illegal ones are struck out, and each of the rest is equally
likely. Division by zero is always illegal. Under `integers_only` (the rule of
Stream of Search, arXiv 2404.03683) so is each result that is not a
non-negative whole number. Three numbers have 3 * 6 * 6 = 108 plays.

Canonical play writes a step in one way: the larger operand stands first and
the result is not negative. A pair a >= b offers a + b, a * b, a - b and a / b,
those that are legal equally likely, and neither b - a nor b / a. The last is
no other way to write a / b, so that a few solutions, such as 6 / (1 - 3 / 4),
are not canonical. Values and solutions are always those of the full law.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction

Number = int | Fraction
State = tuple[Number, ...]  # sorted

# Operator, and whether the operands of the pair change places.
BRANCHES = (
  ("+", False),
  ("*", False),
  ("-", False),
  ("-", True),
  ("/", False),
  ("/", True),
)

# Five numbers have 233,280 plays; six have 21 million, too many to enumerate.
MIN_NUMBERS, MAX_NUMBERS = 2, 5


def combine(
  a: Number, op: str, b: Number, integers_only: bool = False
) -> Number | None:
  """`a op b`, exact and in normal form, or None where it is not legal."""
  if op == "/":
    if b == 0:
      return None
    result = Fraction(a, b)
  elif op == "+":
    result = a + b
  elif op == "-":
    result = a - b
  else:
    result = a * b
  if isinstance(result, Fraction) and result.denominator == 1:
    result = result.numerator
  if integers_only and (isinstance(result, Fraction) or result < 0):
    return None
  return result


@functools.lru_cache(maxsize=2**16)
def branch_results(
  a: Number, b: Number, integers_only: bool
) -> tuple[Number | None, ...]:
  """Results of the six steps on a pair, in the order of `BRANCHES`."""
  return tuple(
    combine(b, op, a, integers_only)
    if is_swapped
    else combine(a, op, b, integers_only)
    for op, is_swapped in BRANCHES
  )


def make_state(numbers: Sequence[Number]) -> State:
  """The state of some numbers, whatever their order."""
  return tuple(sorted(numbers))


def step_text(a: Number, op: str, b: Number, result, left) -> str:
  """One line: `3 + 7 = 10 (left: 2 10)`."""
  return f"{a} {op} {b} = {result} (left: {' '.join(map(str, left))})"


class Solver:
  """True values of all states for one target, remembered as they are found.

  Attributes:
    target: the number to reach.
    integers_only: the rule in force.
  """

  def __init__(self, target: int, integers_only: bool = False):
    self.target = target
    self.integers_only = integers_only
    self._values: dict[State, float] = {}
    self._reach: dict[State, bool] = {}

  def value(self, state: State) -> float:
    """Probability that uniform legal play from here ends at the target."""
    if len(state) == 1:
      return float(state[0] == self.target)
    if state not in self._values:
      values = [self.value(child) for child in self._children(state)]
      self._values[state] = sum(values) / len(values)
    return self._values[state]

  def can_reach(self, state: State) -> bool:
    """Whether some legal play from here ends at the target."""
    if len(state) == 1:
      return state[0] == self.target
    if state not in self._reach:
      self._reach[state] = any(map(self.can_reach, self._children(state)))
    return self._reach[state]

  def solutions(self, numbers: Sequence[Number]) -> list[str]:
    """All distinct solution texts, each sum and product in one order."""
    return list(dict.fromkeys(self._texts(tuple(numbers))))

  def _children(self, state: State) -> Iterator[State]:
    """The states after each legal step, repeats included."""
    for i, j in itertools.combinations(range(len(state)), 2):
      rest = state[:i] + state[i + 1 : j] + state[j + 1 :]
      for result in branch_results(state[i], state[j], self.integers_only):
        if result is not None:
          yield tuple(sorted(rest + (result,))) if rest else (result,)

  def _texts(self, numbers: tuple[Number, ...]) -> Iterator[str]:
    if len(numbers) == 1:
      yield ""
      return
    for a, op, b, result, left in legal_steps(numbers, self.integers_only):
      if self.can_reach(make_state(left)):
        line = step_text(a, op, b, result, left)
        for tail in self._texts(left):
          yield f"{line}\n{tail}" if tail else line


def legal_steps(
  numbers: tuple[Number, ...],
  integers_only: bool = False,
  canonical: bool = False,
) -> Iterator[tuple[Number, str, Number, Number, tuple[Number, ...]]]:
  """Yields (a, op, b, result, numbers left) in the order of the law."""
  for i, j in itertools.combinations(range(len(numbers)), 2):
    rest = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
    pair = numbers[i], numbers[j]
    for (op, is_swapped), result in zip(
      BRANCHES, branch_results(*pair, integers_only), strict=True
    ):
      if result is None:
        continue
      a, b = pair[::-1] if is_swapped else pair
      if canonical:
        if op in "+*":
          a, b = max(a, b), min(a, b)
        # Of two equal numbers one order is as good as the other.
        if a < b or (a == b and is_swapped) or result < 0:
          continue
      yield a, op, b, result, rest + (result,)


def nearness(
  numbers: tuple[Number, ...], target: int, integers_only: bool = False
) -> float:
  """How near one more step can come to the target, in [0, 1].

    max over its results r of 1 / (1 + |r - target|), over the steps left

  Only one step is tried, so that this costs nothing; with three or more
  numbers left it is a guess. At the end it is 1 or 0.
  """
  if len(numbers) == 1:
    return float(numbers[0] == target)
  results = [step[3] for step in legal_steps(numbers, integers_only)]
  distance = min(abs(result - target) for result in results)
  return float(1 / (1 + distance)) / (len(numbers) - 1)


@functools.lru_cache(maxsize=64)
def solver_for(
  numbers: State, target: int, integers_only: bool = False
) -> Solver:
  """A shared solver for one problem, so that its states are computed once.

  `numbers` only keys the cache: it keeps the memory of one problem together,
  to be dropped together.
  """
  del numbers
  return Solver(target, integers_only)
