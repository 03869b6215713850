"""The same solution of the numbers game in other words.

Two texts say the same where what they write has one normal form (see
`numbers_form`): sums and products are chains whose members may be joined in any
order, and of `3 + 7 - 2` any two numbers may be taken first. Here a play is
written anew, in an order drawn at random.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from o1jax.tasks import numbers_text
from o1jax.tasks.numbers_game import Number, combine, step_text

_OPERATORS = {"+": ("+", "-"), "*": ("*", "/")}


class _Chain(NamedTuple):
  """Parts joined by + and -, or by * and /.

  Attributes:
    sign: "+" or "*".
    members: whether each is added (or multiplied), and the part: a number or a
      chain of the other sign.
  """

  sign: str
  members: list[tuple[bool, Number | _Chain]]


def reworded(
  rng: np.random.Generator,
  numbers: Sequence[int],
  solution: str,
  *,
  integers_only: bool,
  canonical: bool,
) -> str:
  """Writes a play again, its steps and their operands in another order.

  Args:
    rng: draws the order.
    numbers: of the problem.
    solution: steps, one a line, whatever they reach.
    integers_only: the rule in force.
    canonical: the larger operand stands first, as in `numbers_game`; else sums
      and products are written in either order.

  Returns:
    The text; the solution itself where it is no whole legal play, or where the
    order drawn ends before a step that is not legal.
  """
  tree = _read(numbers, solution, integers_only)
  left, lines = list(numbers), []
  while isinstance(tree, _Chain):
    joins = list(_joins(tree, integers_only, canonical))
    if not joins:
      return solution
    members, places, (a, op, b, result), is_front = joins[
      rng.integers(len(joins))
    ]
    for place in reversed(places):
      del members[place]
    members.append((is_front, result))
    if op in "+*" and (a < b if canonical else rng.random() < 0.5):
      a, b = b, a
    left.remove(a)
    left.remove(b)
    left.append(result)
    lines.append(step_text(a, op, b, result, left))
    tree = _without_single(tree)
  return "\n".join(lines) if lines else solution


def _read(
  numbers: Sequence[int], solution: str, integers_only: bool
) -> Number | _Chain | None:
  """What a whole legal play writes; None for other texts."""
  left = numbers_text.state_after(numbers, solution, integers_only)
  if left is None or len(left) > 1:
    return None
  parts: list[tuple[Number, Number | _Chain]] = [(n, n) for n in numbers]
  for line in solution.strip("\n").split("\n"):
    a, op, b = numbers_text.read_operation(line)
    members = [*_members(_take(parts, a), op, True)]
    members += _members(_take(parts, b), op, op in "+*")
    chain = _Chain("+" if op in "+-" else "*", members)
    parts.append((combine(a, op, b), chain))
  return parts[0][1]


def _take(parts: list, number: Number) -> Number | _Chain:
  """Takes the first part of this value out."""
  place = [value for value, _ in parts].index(number)
  return parts.pop(place)[1]


def _members(
  part: Number | _Chain, op: str, is_front: bool
) -> list[tuple[bool, Number | _Chain]]:
  """A part as members of the chain that `op` makes."""
  if isinstance(part, _Chain) and op in _OPERATORS[part.sign]:
    return [(front == is_front, one) for front, one in part.members]
  return [(is_front, part)]


def _joins(tree: _Chain, integers_only: bool, canonical: bool) -> Iterator:
  """Members, places of two, the step that joins them, the side it stands on."""
  for _, part in tree.members:
    if isinstance(part, _Chain):
      yield from _joins(part, integers_only, canonical)
  ready = [
    (place, *member)
    for place, member in enumerate(tree.members)
    if not isinstance(member[1], _Chain)
  ]
  forward, inverse = _OPERATORS[tree.sign]
  num_front = sum(is_front for is_front, _ in tree.members)
  for (i, is_first, a), (j, is_second, b) in itertools.combinations(ready, 2):
    if is_first == is_second:
      steps = [(a, forward, b, is_first)]
    else:
      # 2 - 7 is added, or 7 - 2 is subtracted from something.
      steps = [(a, inverse, b, is_first), (b, inverse, a, is_second)]
    for x, op, y, is_front in steps:
      result = combine(x, op, y, integers_only)
      is_turned = canonical and op in "-/" and x < y
      if result is not None and not is_turned and (is_front or num_front > 1):
        yield tree.members, (i, j), (x, op, y, result), is_front


def _without_single(tree: _Chain) -> Number | _Chain:
  """Puts what is left of finished chains in their place."""
  for place, (is_front, part) in enumerate(tree.members):
    if isinstance(part, _Chain):
      tree.members[place] = (is_front, _without_single(part))
  return tree if len(tree.members) > 1 else tree.members[0][1]
