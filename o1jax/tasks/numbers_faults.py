"""Wrong solutions of the numbers game, such as policies write.

A wrong solution begins with the lines of a right one. At a random place a
legal line follows that leads elsewhere, or a line with a fault; then the play
goes on legally from the numbers that this line claims are left.
"""

from collections.abc import Callable, Iterator

import numpy as np

from o1jax.tasks import numbers_text
from o1jax.tasks.numbers_game import Number, combine, legal_steps, step_text

# What is wrong, and how often it is tried; what happens to be right after all
# is to be drawn again.
FAULTS = {
  "another way": 0.4,  # legal, to another number
  "result": 0.2,  # false arithmetic, or the target claimed at the end
  "number": 0.2,  # one that is used up
  "left": 0.1,  # a number left over that is lost or changed
  "unfinished": 0.05,
  "unreadable": 0.05,  # a line that is cut off
}
_SLIPS = (-10, -2, -1, 1, 2, 10)

Step = tuple[Number, str, Number, Number, tuple[Number, ...]]


def faulty_play(
  rng: np.random.Generator,
  numbers: tuple[int, ...],
  target: int,
  solution: str,
  *,
  integers_only: bool,
  canonical: bool,
) -> str:
  """Writes a play with one fault, after some lines of a right solution.

  Args:
    rng: draws the fault, its place and the rest of the play.
    numbers: the numbers of the problem.
    target: what was to be reached; an end is sometimes claimed to be it.
    solution: a right one, in lines.
    integers_only: the rule in force.
    canonical: steps are canonical, as in `numbers_game`; else sums and
      products are written in either order.

  Returns:
    The text. It may be right, by accident or where the fault has no place.
  """
  names, shares = list(FAULTS), list(FAULTS.values())
  fault = names[rng.choice(len(names), p=shares)]
  lines = solution.split("\n")
  place = int(rng.integers(len(lines)))
  if fault == "unfinished":
    return "\n".join(lines[: max(place, 1)])
  kept = lines[:place]
  left = numbers_text.state_after(numbers, "\n".join(kept), integers_only)
  step = _random_step(rng, left, integers_only, canonical)
  if fault in _SPOILERS:
    step = _SPOILERS[fault](rng, step, numbers, target)
  line = step_text(*step)
  if fault == "unreadable":
    line = line.removesuffix(")")
  rest = _random_lines(rng, step[-1], integers_only, canonical)
  return "\n".join([*kept, line, *rest])


def recompute(
  numbers: tuple[int, ...], target: int, solution: str, integers_only: bool
) -> Iterator[str]:
  """Recomputes a solution line by line, up to the first wrong line.

  `3 + 7 = 11 (left: 2 11)` gives `3 + 7 = 10 wrong`, a result that there is
  not is "none", and an unreadable line is only said to be wrong.
  """
  steps = numbers_text.judge_lines(numbers, target, solution, integers_only)
  for line, step in zip(solution.split("\n"), steps, strict=True):
    words = ["wrong" if step.reason else "ok"]
    if operation := numbers_text.read_operation(line):
      result = combine(*operation, integers_only)
      words = [*operation, "=", "none" if result is None else result, *words]
    yield " ".join(map(str, words))
    if step.reason:
      return


def _random_step(
  rng: np.random.Generator,
  left: tuple[Number, ...],
  integers_only: bool,
  canonical: bool,
) -> Step:
  steps = list(legal_steps(left, integers_only, canonical))
  a, op, b, result, left = steps[rng.integers(len(steps))]
  if op in "+*" and not canonical and rng.random() < 0.5:
    a, b = b, a
  return a, op, b, result, left


def _random_lines(rng, left, integers_only, canonical) -> Iterator[str]:
  while len(left) > 1:
    step = _random_step(rng, left, integers_only, canonical)
    yield step_text(*step)
    left = step[-1]


def _slip(rng: np.random.Generator, number: Number) -> Number:
  """Another number near by, and never negative: play can go on with it."""
  return abs(number + _SLIPS[rng.integers(len(_SLIPS))])


def _false_result(rng, step: Step, numbers, target: int) -> Step:
  a, op, b, result, left = step
  is_last = len(left) == 1
  claim = target if is_last and rng.random() < 0.5 else _slip(rng, result)
  return a, op, b, claim, (*left[:-1], claim)


def _used_number(rng, step: Step, numbers, target: int) -> Step:
  """Puts a number in that an earlier step used, or the other one again."""
  a, op, b, _, left = step
  gone = [n for n in numbers if n not in (a, *left[:-1])]
  pool = [*gone, b]
  a = pool[rng.integers(len(pool))]
  result = combine(a, op, b)
  # A sum where the rules may not allow it: play has to go on.
  if not isinstance(result, int) or result < 0:
    op, result = "+", a + b
  return a, op, b, result, (*left[:-1], result)


def _false_left(rng, step: Step, numbers, target: int) -> Step:
  """Loses or changes a number that was not used; none is left at the end."""
  *operation, left = step
  if len(left) == 1:
    return step
  i = int(rng.integers(len(left) - 1))
  changed = (_slip(rng, left[i]),) if rng.random() < 0.5 else ()
  return *operation, (*left[:i], *changed, *left[i + 1 :])


_SPOILERS: dict[str, Callable[..., Step]] = {
  "result": _false_result,
  "number": _used_number,
  "left": _false_left,
}
