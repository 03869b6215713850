"""The numbers game for many problems at once, in NumPy.

Plays are arrays of choices: choice `6 * pair + branch` takes the pair of
positions number `pair` (of `itertools.combinations`) and one of `BRANCHES`.
The numbers left keep their order and the result comes last. n counts problems,
k numbers of a problem, r numbers left, M plays of a problem.

A number is numerator over denominator in int64, denominator positive. While
all plays are enumerated nothing is reduced: whatever the order of the steps,
both parts stay below `(2 * max)**k`, and `require_exact` refuses ranges for
which that leaves 63 bits.
"""

import itertools
from typing import NamedTuple

import numpy as np

from o1jax.tasks.numbers_game import BRANCHES

_SYMBOLS = [op for op, _ in BRANCHES]
_IS_SWAPPED = np.array([is_swapped for _, is_swapped in BRANCHES])
_COMMUTES = np.array([op in "+*" for op, _ in BRANCHES])
# One branch for each operator; where it is swapped, that is the next branch.
_UNSWAPPED = np.flatnonzero(~_IS_SWAPPED)
# Elements of the largest array while plays are enumerated; about what fits in
# the caches of one core.
_CHUNK = 2**18


class Exact(NamedTuple):
  """Numbers as two arrays of one shape, and where they came by legal steps."""

  num: np.ndarray
  den: np.ndarray
  legal: np.ndarray


def require_exact(max_number: int, num_numbers: int, max_target: int) -> None:
  """Raises ValueError where int64 cannot hold the numbers of a play."""
  largest = (2 * max(max_number, 1)) ** num_numbers
  if max(largest, max_target) * 2 > 2**62:
    raise ValueError(
      f"{num_numbers} numbers up to {max_number} and targets up to "
      f"{max_target} do not fit in 64 bits; lower max_number or num_numbers"
    )


def num_choices(num_left: int) -> int:
  """Steps that the law offers at r numbers, illegal ones included."""
  return len(BRANCHES) * num_left * (num_left - 1) // 2


def num_plays(num_numbers: int) -> int:
  """Plays of k numbers, illegal ones included: 108 for three."""
  return int(np.prod([num_choices(r) for r in range(num_numbers, 1, -1)]))


def chunk_rows(num_numbers: int) -> int:
  """Problems to enumerate at once."""
  return max(1, _CHUNK // num_plays(num_numbers))


def _pairs(num_left: int) -> tuple[np.ndarray, np.ndarray]:
  """Positions of each pair `[C, 2]` and of the others `[C, r - 2]`."""
  pairs = list(itertools.combinations(range(num_left), 2))
  others = [[p for p in range(num_left) if p not in pair] for pair in pairs]
  shape = (len(pairs), num_left - 2)
  return np.array(pairs), np.array(others, np.int64).reshape(shape)


def _branch(a: Exact, b: Exact, integers_only: bool) -> Exact:
  """All branches on pairs of numbers: shapes `[...]` to `[..., 6]`."""
  a_over, b_over, den = a.num * b.den, b.num * a.den, a.den * b.den
  products = a.num * b.num
  b_sign, a_sign = np.sign(b_over), np.sign(a_over)
  num = np.stack(
    [
      a_over + b_over,
      products,
      a_over - b_over,
      b_over - a_over,
      a_over * b_sign,
      b_over * a_sign,
    ],
    axis=-1,
  )
  dens = [den, den, den, den, np.abs(b_over), np.abs(a_over)]
  den = np.stack(dens, axis=-1)
  legal = (a.legal & b.legal)[..., None] & (den != 0)
  den = np.where(den == 0, 1, den)
  if integers_only:
    legal &= (num >= 0) & (num % den == 0)
    num, den = num // den, np.ones_like(den)
  return Exact(num, den, legal)


def enumerate_plays(numbers: np.ndarray, integers_only: bool) -> Exact:
  """The number that each play ends at.

  Args:
    numbers: `[n, k]` non-negative integers.
    integers_only: the rule in force.

  Returns:
    Exact arrays `[n, M]`, not reduced; play m has the mixed-radix digits that
    `play_choices` gives. Where a play is not legal its number means nothing.
  """
  num = np.asarray(numbers, np.int64)[:, None, :]
  state = Exact(num, np.ones_like(num), np.ones(num.shape, bool))
  for num_left in range(num.shape[-1], 1, -1):
    state = _expand(state, *_pairs(num_left), integers_only)
  return Exact(*(part[..., 0] for part in state))


def _expand(state: Exact, pairs, others, integers_only: bool) -> Exact:
  """`[n, m, r]` to `[n, m * C * 6, r - 1]`."""
  n, m, num_left = state.num.shape
  a = Exact(*(part[..., pairs[:, 0]] for part in state))
  b = Exact(*(part[..., pairs[:, 1]] for part in state))
  grown = []
  for part, result in zip(state, _branch(a, b, integers_only), strict=True):
    shape = (*result.shape, num_left - 2)
    rest = np.broadcast_to(part[..., others][..., None, :], shape)
    both = np.concatenate([rest, result[..., None]], axis=-1)
    grown.append(both.reshape(n, m * num_choices(num_left), num_left - 1))
  return Exact(*grown)


def whole_values(ends: Exact) -> np.ndarray:
  """`[n, M]` the whole number each play ends at, -1 for none or negative."""
  is_whole = ends.legal & (ends.num % ends.den == 0) & (ends.num >= 0)
  return np.where(is_whole, ends.num // ends.den, -1)


def pick_true(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
  """`[n]` index of a uniformly drawn True in each row; rows need one."""
  counts = np.cumsum(mask, axis=1)
  wanted = rng.integers(0, counts[:, -1])
  return np.argmax(counts > wanted[:, None], axis=1)


def play_choices(plays: np.ndarray, num_numbers: int) -> np.ndarray:
  """`[n, k - 1]` choices of the plays with these indices `[n]`."""
  digits = []
  for num_left in range(2, num_numbers + 1):
    plays, digit = np.divmod(plays, num_choices(num_left))
    digits.append(digit)
  return np.stack(digits[::-1], axis=1)


class Plays:
  """Plays of n problems, step by step, and their texts.

  Attributes:
    num, den: `[n, r]` numbers left, reduced.
  """

  def __init__(
    self, numbers: np.ndarray, integers_only: bool, canonical: bool = False
  ):
    """Starts n plays.

    Args:
      numbers: `[n, k]` non-negative integers.
      integers_only: the rule in force.
      canonical: steps are drawn from canonical ones, and sums and products are
        written with the larger operand first (else either order, by a coin).
    """
    self.num = np.asarray(numbers, np.int64)
    self.den = np.ones_like(self.num)
    self._integers_only = integers_only
    self._canonical = canonical
    # All numbers of a play, given and made, stand in one table; what is left
    # and what a step combines are columns of it.
    self._table = [
      (self.num[:, c], self.den[:, c]) for c in range(self.num.shape[1])
    ]
    self._left = np.tile(np.arange(self.num.shape[1]), (len(self.num), 1))
    self._steps: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

  def step_randomly(self, rng: np.random.Generator) -> None:
    """One step in every play, uniform over its legal (canonical) steps."""
    choices = self._draw(rng, np.arange(len(self.num)))
    redraw = np.flatnonzero(~self._is_legal(np.arange(len(choices)), choices))
    while redraw.size:  # a sum is always legal, so this ends
      drawn = self._draw(rng, redraw)
      choices[redraw] = drawn
      redraw = redraw[~self._is_legal(redraw, drawn)]
    self.step(rng, choices)

  def step(self, rng: np.random.Generator, choices: np.ndarray) -> None:
    """Takes one chosen legal step in every play."""
    pairs, others = _pairs(self.num.shape[1])
    pair, branch = np.divmod(choices, len(BRANCHES))
    rows = np.arange(len(choices))
    num, den, _ = self._results(rows, choices)
    divisor = np.gcd(num, den)
    num, den = num // divisor, den // divisor
    if self._canonical:
      is_turned = self._is_ascending(rows, pair)
    else:
      is_turned = rng.random(len(choices)) < 0.5
    swap = _IS_SWAPPED[branch] | (_COMMUTES[branch] & is_turned)
    operands = self._left[rows[:, None], pairs[pair]]
    operands = np.where(swap[:, None], operands[:, ::-1], operands)
    keep = rows[:, None], others[pair]
    self.num = np.concatenate([self.num[keep], num[:, None]], axis=1)
    self.den = np.concatenate([self.den[keep], den[:, None]], axis=1)
    made = np.full((len(rows), 1), len(self._table))
    self._left = np.concatenate([self._left[keep], made], axis=1)
    self._table.append((num, den))
    self._steps.append((operands, branch, self._left))

  def texts(self, rows: np.ndarray | None = None) -> list[str]:
    """The lines so far, as one text for each play (or for these rows)."""
    rows = np.arange(len(self.num)) if rows is None else rows
    columns = [_strings(num[rows], den[rows]) for num, den in self._table]
    names = np.stack(columns, axis=1)
    here = np.arange(len(rows))[:, None]
    lines = []
    for place, (operands, branch, left) in enumerate(self._steps):
      made = columns[len(columns) - len(self._steps) + place].tolist()
      parts = (
        *names[here, operands[rows]].T.tolist(),
        branch[rows].tolist(),
        made,
        names[here, left[rows]].tolist(),
      )
      lines.append(
        [
          f"{a} {_SYMBOLS[op]} {b} = {c} (left: {' '.join(rest)})"
          for a, b, op, c, rest in zip(*parts, strict=True)
        ]
      )
    return ["\n".join(lines_of) for lines_of in zip(*lines, strict=True)]

  def whole_values(self) -> np.ndarray:
    """`[n]` the whole number each finished play ends at, -1 for others."""
    is_whole = (self.den[:, 0] == 1) & (self.num[:, 0] >= 0)
    return np.where(is_whole, self.num[:, 0], -1)

  def _draw(self, rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
    """Uniform choices for these rows, some of them not legal."""
    num_left = self.num.shape[1]
    if not self._canonical:
      return rng.integers(0, num_choices(num_left), len(rows))
    num_pairs = num_left * (num_left - 1) // 2
    pair, op = np.divmod(
      rng.integers(0, len(_UNSWAPPED) * num_pairs, len(rows)), len(_UNSWAPPED)
    )
    is_turned = ~_COMMUTES[_UNSWAPPED[op]] & self._is_ascending(rows, pair)
    return len(BRANCHES) * pair + _UNSWAPPED[op] + is_turned

  def _operands(
    self, rows: np.ndarray, pair: np.ndarray
  ) -> tuple[Exact, Exact]:
    """The two numbers of a pair, in the order they stand."""
    pairs, _ = _pairs(self.num.shape[1])
    legal = np.ones(len(rows), bool)
    first, second = (
      Exact(self.num[rows, place], self.den[rows, place], legal)
      for place in pairs[pair].T
    )
    return first, second

  def _is_ascending(self, rows: np.ndarray, pair: np.ndarray) -> np.ndarray:
    """Whether the first number of a pair is the smaller one."""
    a, b = self._operands(rows, pair)
    return a.num * b.den < b.num * a.den

  def _results(self, rows: np.ndarray, choices: np.ndarray) -> Exact:
    pair, branch = np.divmod(choices, len(BRANCHES))
    results = _branch(*self._operands(rows, pair), self._integers_only)
    return Exact(*(part[np.arange(len(rows)), branch] for part in results))

  def _is_legal(self, rows: np.ndarray, choices: np.ndarray) -> np.ndarray:
    return self._results(rows, choices).legal


def _strings(num: np.ndarray, den: np.ndarray) -> np.ndarray:
  """`[n]` object array of the numbers in normal form."""
  texts = [
    str(p) if q == 1 else f"{p}/{q}"
    for p, q in zip(num.tolist(), den.tolist(), strict=True)
  ]
  # Filled in place: np.array(texts) would make fixed-width strings.
  array = np.empty(len(texts), object)
  array[:] = texts
  return array


def random_plays(
  rng: np.random.Generator,
  numbers: np.ndarray,
  integers_only: bool,
  canonical: bool = False,
) -> Plays:
  """Finished plays of rows of numbers `[n, k]`, drawn by the (canonical) law.

  Only the texts that are asked for afterwards are written.
  """
  plays = Plays(numbers, integers_only, canonical)
  for _ in range(numbers.shape[1] - 1):
    plays.step_randomly(rng)
  return plays


def chosen_plays(
  rng: np.random.Generator,
  numbers: np.ndarray,
  choices: np.ndarray,
  integers_only: bool,
) -> list[str]:
  """Texts of the plays with these choices `[n, k - 1]`."""
  plays = Plays(numbers, integers_only)
  for choice in choices.T:
    plays.step(rng, choice)
  return plays.texts()


def one_play_per_end(
  rng: np.random.Generator, ends: np.ndarray, num_plays: int
) -> np.ndarray:
  """Picks a random play for each end that the plays of a set reach.

  Args:
    ends: `[n * num_plays]` where each play ends, the plays of a set in
      succession and independent of each other; negative ends do not count.
    num_plays: plays of a set.

  Returns:
    Indices of the picked plays: set after set, in random order within one.
  """
  rows = np.flatnonzero(ends >= 0)
  keys = np.stack([rows // num_plays, ends[rows]], axis=1)
  # Plays of a set are independent, so the first to reach an end is as good as
  # a drawn one.
  _, first = np.unique(keys, axis=0, return_index=True)
  picked = rows[first]
  return picked[np.lexsort([rng.random(len(picked)), picked // num_plays])]
