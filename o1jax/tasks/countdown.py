"""Countdown: combine all given numbers by + - * / to reach a target.

The prompt `3 7 2 = 13` is solved by one operation a line with the numbers that
remain:

  3 + 7 = 10 (left: 2 10)
  10 + 2 = 12 (left: 12)

(this one fails: it reaches 12). The rules, and what uniform legal play means,
are in `numbers_game`; what the checker reads is in `numbers_text`.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from o1jax.tasks import (
  long_thought,
  numbers_game,
  numbers_play,
  reflection,
  task,
)
from o1jax.tasks.numbers_task import NumbersTask
from o1jax.types import Problem

_PROBLEM = re.compile(r"\s*([0-9]+(?:[\s,]+[0-9]+)*)\s*=\s*([0-9]+)\s*")
# Longer numbers a user types are refused, so that solving stays quick.
_MAX_TYPED_DIGITS = 6
_MAX_TARGETS = 100_000


@dataclasses.dataclass(frozen=True)
class Countdown(NumbersTask):
  """Countdown with k numbers.

  A problem is in the training split when its numbers and its target are; it is
  held out when each of the two that has held-out members (share above 0) is.
  A problem held out by one of two criteria is in neither split.

  Attributes:
    num_numbers: numbers of a problem, 2 to 5.
    min_number, max_number: range of the numbers, both ends included.
    min_target, max_target: range of the targets, both ends included.
    integers_only: the rule of Stream of Search: every intermediate result is a
      non-negative whole number. Without it fractions are legal.
    sorted_numbers: prompts give the numbers in ascending order, those that a
      user types too: problems that mean the same read the same.
    canonical_play: random play (that of random_play and hindsight, and the dead
      ends of search_trace) takes canonical steps only: a + b, a * b, a - b and
      a / b with a >= b, uniform over those that are legal. Demonstrations
      only: the checker, optimal solutions and true_value keep the full law.
    balanced_hindsight: hindsight plays each row of numbers 64 times and keeps
      one play, random among them, for each training target reached; they go
      out one after another, in random order. So the targets beside a row of
      numbers are equally likely, as in problems, where one play a row favours
      those that many plays reach. What 64 plays miss stays out: of a target
      that one play in a hundred reaches, about half.
    heldout: share of the multisets of numbers that is held out, by hash.
    heldout_targets: share of the targets that is held out (Stream of Search
      holds out a tenth), the nearest whole number of them, chosen by hash.
    heldout_seed: another seed holds out others.
  """

  num_numbers: int = 3
  min_number: int = 1
  max_number: int = 20
  min_target: int = 10
  max_target: int = 99
  integers_only: bool = False
  sorted_numbers: bool = False
  canonical_play: bool = False
  balanced_hindsight: bool = False
  heldout: float = 0.1
  heldout_targets: float = 0.0
  heldout_seed: int = 0

  name: ClassVar[str] = "countdown"
  demonstration_kinds: ClassVar[tuple[str, ...]] = (
    "random_play",
    "optimal",
    "hindsight",
    "search_trace",
    "retrying",
    *reflection.KINDS,
    *long_thought.KINDS,
  )

  def __post_init__(self):
    low, high = numbers_game.MIN_NUMBERS, numbers_game.MAX_NUMBERS
    if not low <= self.num_numbers <= high:
      raise ValueError(
        f"num_numbers={self.num_numbers} is not in {low} to {high}"
      )
    _require_range("number", self.min_number, self.max_number)
    _require_range("target", self.min_target, self.max_target)
    if self.max_target - self.min_target >= _MAX_TARGETS:
      raise ValueError(f"more than {_MAX_TARGETS} targets; narrow the range")
    task.require_fraction("heldout", self.heldout)
    task.require_fraction("heldout_targets", self.heldout_targets)
    numbers_play.require_exact(
      self.max_number, self.num_numbers, self.max_target
    )

  def draw_numbers(
    self, rng: np.random.Generator, n: int, split: str
  ) -> np.ndarray:
    """Rows of uniform numbers, those of the other split taken out."""
    if split == "heldout" and not (self.heldout or self.heldout_targets):
      raise ValueError(
        "nothing is held out: set heldout or heldout_targets above 0"
      )
    is_wanted = split == "heldout" and self.heldout > 0
    # Drawn in plenty, so that about n rows are left.
    share = self.heldout if is_wanted else 1.0 - self.heldout
    shape = (int(np.ceil(n / share)), self.num_numbers)
    numbers = rng.integers(self.min_number, self.max_number + 1, shape)
    kept = numbers[self._is_heldout(numbers) == is_wanted][:n]
    return self._arranged(kept)

  def targets(self, split: str) -> np.ndarray:
    """The targets of a split, ascending."""
    heldout, train = self._target_split
    return heldout if split == "heldout" and heldout.size else train

  def allows(self, numbers: Sequence[int], target: int) -> bool:
    """Whether the problem of these may be trained on."""
    if self._is_heldout(np.array([numbers]))[0]:
      return False
    return bool(np.isin(target, self.targets("train")))

  def unlike_training(self, problem: Problem) -> str | None:
    """What training problems are, where this one is outside their ranges."""
    numbers, target = problem.data["numbers"], problem.data["target"]
    if (
      len(numbers) == self.num_numbers
      and self.min_number <= min(numbers) <= max(numbers) <= self.max_number
      and self.min_target <= target <= self.max_target
    ):
      return None
    return (
      f"training problems have {self.num_numbers} numbers from "
      f"{self.min_number} to {self.max_number} and targets from "
      f"{self.min_target} to {self.max_target}"
    )

  def make_problem(self, numbers: list[int], target: int) -> Problem:
    """The record of a problem; its id ignores the order of the numbers."""
    return self._record(numbers, target, ending=f"={target}")

  def parse(self, text: str) -> Problem:
    """Reads `3 7 2 = 13`: 2 to 5 numbers in any range, and a target.

    Raises:
      ValueError: the text is not of that form, or has no solution.
    """
    match = _PROBLEM.fullmatch(text)
    if match is None:
      raise ValueError(
        f"not a countdown problem: {text!r}; write it as '3 7 2 = 13'"
      )
    words = [*re.split(r"[\s,]+", match.group(1)), match.group(2)]
    if max(map(len, words)) > _MAX_TYPED_DIGITS:
      raise ValueError(
        f"numbers of more than {_MAX_TYPED_DIGITS} digits: {text!r}"
      )
    *numbers, target = map(int, words)
    low, high = numbers_game.MIN_NUMBERS, numbers_game.MAX_NUMBERS
    if not low <= len(numbers) <= high:
      raise ValueError(
        f"{len(numbers)} numbers in {text!r}; countdown takes {low} to {high}"
      )
    problem = self.make_problem(numbers, target)
    self.require_solvable(problem)
    return problem

  def _is_heldout(self, numbers: np.ndarray) -> np.ndarray:
    ordered = np.sort(numbers, axis=1)
    return task.hash_rows(ordered, self.heldout_seed) < self.heldout

  @functools.cached_property
  def _target_split(self) -> tuple[np.ndarray, np.ndarray]:
    """Held-out targets and training targets, each ascending."""
    targets = np.arange(self.min_target, self.max_target + 1)
    order = np.argsort(task.hash_rows(targets[:, None], self.heldout_seed))
    count = round(self.heldout_targets * len(targets))
    return np.sort(targets[order[:count]]), np.sort(targets[order[count:]])


def _require_range(what: str, low: int, high: int) -> None:
  if not 0 <= low <= high:
    raise ValueError(
      f"min_{what}={low}, max_{what}={high} is not a range of whole numbers"
    )
