"""One text from a search tree: a right solution after its dead ends.

The tree is walked depth-first, as in O1 Journey (Qin et al., arXiv 2410.18982,
Section 3.4): at each node the wrong branches come first, in the order in which
the search made them, each down to its end; then what the judge says of it, and
a line that goes back. Last comes the branch to the right solution, and the
solution once more as the answer:

  3 + 7 = 10 (left: 2 10)
  10 + 2 = 12 (left: 12)
  reaches 12, not 13
  no good, back to the start
  3 * 2 = 6 (left: 7 6)
  7 + 6 = 13 (left: 13)
  <answer>
  3 * 2 = 6 (left: 7 6)
  7 + 6 = 13 (left: 13)
  </answer>

Lines that two branches share are written once. The form is that of
`tasks/long_thought.py`; `Task.final_solution` finds the answer.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from o1jax.searched import FoundSolution, Searched
from o1jax.tasks.reflection import with_answer
from o1jax.types import Problem, Verdict

Lines = tuple[str, ...]

# What a step of the numbers game leaves.
_LEFT = re.compile(r".*\(left: ([^()]*)\)")
# Lines that could be taken for the marks of an answer or of a reflection.
_MARKS = re.compile(r"<answer>|\\boxed\{|:$", re.M)


def linearize(
  searched: Searched,
  verdicts: Mapping[int, Verdict],
  *,
  max_dead_ends: int,
  max_tokens: int | None = None,
  count_fn: Callable[[str], int] | None = None,
) -> tuple[Problem, str] | None:
  """Writes a tree as one text.

  The right solution is the one answered with, where it is right, else the right
  one with the most visits. The dead ends are finished wrong solutions; those
  with the most visits are kept, which the search was drawn to most. Left out
  are those that go on behind the right one, and all with a mark in them.

  Args:
    searched: a search, whatever its steps are: the tree that is walked is that
      of the lines of its solutions.
    verdicts: by node, of finished solutions; others are left out.
    max_dead_ends: how many wrong solutions are told at most.
    max_tokens: of the text; dead ends with the fewest visits are left out until
      it fits.
    count_fn: tokens of a text, where max_tokens is given.

  Returns:
    The problem and the text; None where the tree holds no right solution, or
    none that fits.

  Raises:
    ValueError: a limit that is out of range.
  """
  if type(max_dead_ends) is not int or max_dead_ends < 0:
    raise ValueError(f"max_dead_ends={max_dead_ends} must be 0 or more")
  if (max_tokens is None) != (count_fn is None):
    raise ValueError("max_tokens and count_fn go together: give both or none")
  judged = [
    one
    for one in searched.solutions
    if one.is_finished and one.node in verdicts and not _MARKS.search(one.text)
  ]
  judged.sort(key=lambda one: (-one.num_visits, one.node))
  right = _right(searched, judged, verdicts)
  if right is None:
    return None
  lines = _lines(right)
  wrong: dict[Lines, FoundSolution] = {}
  for one in judged:
    is_apart = _lines(one)[: len(lines)] != lines
    if not verdicts[one.node].is_correct and is_apart:
      wrong.setdefault(_lines(one), one)
  for count in range(min(max_dead_ends, len(wrong)), -1, -1):
    # Paths in order are a tree depth-first, steps in the order they were made.
    kept = sorted([*wrong.values()][:count], key=lambda one: one.path)
    reasons = {_lines(one): verdicts[one.node].reason for one in kept}
    text = with_answer("\n".join(_walk(lines, reasons)), "\n".join(lines))
    if count_fn is None or count_fn(text) <= max_tokens:
      return searched.problem, text
  return None


def _lines(solution: FoundSolution) -> Lines:
  return tuple(solution.text.rstrip("\n").split("\n"))


def _right(
  searched: Searched,
  judged: Sequence[FoundSolution],
  verdicts: Mapping[int, Verdict],
) -> FoundSolution | None:
  found = [one for one in judged if verdicts[one.node].is_correct]
  if searched.selected is not None:
    selected = searched.solutions[searched.selected]
    if any(one is selected for one in found):
      return selected
  return found[0] if found else None


def _walk(right: Lines, reasons: Mapping[Lines, str]) -> Iterator[str]:
  """The lines of a tree of lines, depth-first.

  Args:
    right: the solution that comes last.
    reasons: by the lines of each dead end, in order, what is wrong with it.
  """
  below: dict[Lines, list[str]] = {}
  for lines in [*reasons, right]:
    for depth, line in enumerate(lines):
      known = below.setdefault(lines[:depth], [])
      if line not in known:
        known.append(line)
  # Where the walk is, and where it goes; the last of these comes first.
  here: Lines = ()
  waiting: list[Lines] = [()]
  while waiting:
    place = waiting.pop()
    if place:
      if here != place[:-1]:
        yield f"no good, back to {_name(place[:-1])}"
      yield place[-1]
    if place in reasons:
      yield " ".join(reasons[place].split())
    here = place
    branches = [(*place, line) for line in below.get(place, ())]
    branches.sort(key=lambda branch: branch == right[: len(branch)])
    waiting += reversed(branches)


def _name(place: Lines) -> str:
  """A place by what is left there, or by the number of its step."""
  if not place:
    return "the start"
  left = _LEFT.fullmatch(place[-1])
  return left.group(1) if left else f"step {len(place)}"


def linearized(
  trees: Sequence[Searched],
  judge_fn: Callable[[Searched], Sequence[Verdict]],
  **limits: Any,
) -> list[tuple[Problem, str]]:
  """The texts of those trees that hold a right solution, as demonstrations.

  Args:
    trees: searches.
    judge_fn: verdicts on the solutions of one of them, in their order.
    **limits: of `linearize`.
  """
  pairs = []
  for searched in trees:
    nodes = [one.node for one in searched.solutions]
    verdicts = dict(zip(nodes, judge_fn(searched), strict=True))
    pairs.append(linearize(searched, verdicts, **limits))
  return [pair for pair in pairs if pair is not None]
