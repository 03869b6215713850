"""The Game of 24: four numbers from 1 to 13, and always 24 to reach.

Played by the rules of Countdown and written the same way: the prompt is
`1 1 4 6 = 24`. Problems come from a file of games, such as the list that Tree
of Thoughts (arXiv 2305.10601) uses, or are drawn.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from o1jax.tasks import long_thought, reflection, task
from o1jax.tasks.numbers_task import NumbersTask
from o1jax.types import Problem

TARGET = 24
NUM_NUMBERS = 4
MAX_NUMBER = 13

_GAME = re.compile(r"\s*([0-9]{1,2}(?:[\s,]+[0-9]{1,2}){3})\s*(?:=\s*24\s*)?")


@dataclasses.dataclass(frozen=True)
class Game24(NumbersTask):
  """The Game of 24.

  Attributes:
    games_file: JSON lines, each with a `puzzle` such as "1 1 4 6"; other
      fields are ignored. Empty: numbers are uniform from 1 to 13.
    integers_only: every intermediate result is a non-negative whole number;
      some games then have no solution and are left out.
    sorted_numbers: as in `Countdown`.
    heldout: share of the games that is held out, by hash of their numbers.
    heldout_seed: another seed holds out others.
  """

  games_file: str = ""
  integers_only: bool = False
  sorted_numbers: bool = False
  heldout: float = 0.1
  heldout_seed: int = 0

  name: ClassVar[str] = "game24"
  demonstration_kinds: ClassVar[tuple[str, ...]] = (
    "random_play",
    "optimal",
    "search_trace",
    *reflection.KINDS,
    *long_thought.KINDS,
  )

  def __post_init__(self):
    task.require_fraction("heldout", self.heldout)
    if self.games_file:
      _ = self.games  # a bad file fails here, before anything starts

  @functools.cached_property
  def games(self) -> np.ndarray:
    """`[n, 4]` the games of the file, ascending numbers, in its order."""
    return read_games(self.games_file)

  def draw_numbers(
    self, rng: np.random.Generator, n: int, split: str
  ) -> np.ndarray:
    """Rows of a split in random order: of the file, or uniform."""
    if split == "heldout" and not self.heldout:
      raise ValueError("nothing is held out: set heldout above 0")
    is_wanted = split == "heldout"
    if self.games_file:
      games = self.games[self._is_heldout(self.games) == is_wanted]
      if not len(games):
        raise ValueError(f"{self.games_file}: no game in the {split} split")
      drawn = rng.permuted(games[rng.integers(0, len(games), n)], axis=1)
      return self._arranged(drawn)
    share = self.heldout if is_wanted else 1.0 - self.heldout
    shape = (int(np.ceil(n / share)), NUM_NUMBERS)
    numbers = rng.integers(1, MAX_NUMBER + 1, shape)
    kept = numbers[self._is_heldout(numbers) == is_wanted][:n]
    return self._arranged(kept)

  def targets(self, split: str) -> np.ndarray:
    """24, in every split."""
    return np.array([TARGET])

  def allows(self, numbers: Sequence[int], target: int) -> bool:
    """Whether the problem of these may be trained on."""
    is_heldout = self._is_heldout(np.array([numbers]))[0]
    return target == TARGET and not is_heldout

  def unlike_training(self, problem: Problem) -> str | None:
    """What training problems are, where this one has other numbers."""
    low, high = 1, MAX_NUMBER
    if self.games_file:
      low, high = int(self.games.min()), int(self.games.max())
    numbers = problem.data["numbers"]
    if low <= min(numbers) <= max(numbers) <= high:
      return None
    return f"training problems have numbers from {low} to {high}"

  def make_problem(self, numbers: list[int], target: int = TARGET) -> Problem:
    """The record of a game; its id ignores the order of the numbers.

    The target is an argument because random play is demonstrated beside it
    like in any game of numbers; it is 24 in all problems of this task.
    """
    return self._record(numbers, target, ending="")

  def parse(self, text: str) -> Problem:
    """Reads `1 1 4 6` or `1 1 4 6 = 24`.

    Raises:
      ValueError: the text is not of that form, or has no solution.
    """
    match = _GAME.fullmatch(text)
    if match is None:
      raise ValueError(f"not a game of 24: {text!r}; write it as '1 1 4 6'")
    problem = self.make_problem(_numbers(match.group(1)))
    self.require_solvable(problem)
    return problem

  def _is_heldout(self, numbers: np.ndarray) -> np.ndarray:
    ordered = np.sort(numbers, axis=1)
    return task.hash_rows(ordered, self.heldout_seed) < self.heldout


def read_games(path: str) -> np.ndarray:
  """Reads a list of games, `[n, 4]` ascending numbers, in the file's order.

  Raises:
    ValueError: the file cannot be read, or a row is not a game; the message
      has the line number.
  """
  try:
    with open(path, encoding="utf-8") as file:
      lines = file.read().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f"games_file {path!r}: {error}") from error
  rows = [
    _read_game(line, f"{path}, line {number}")
    for number, line in enumerate(lines, start=1)
    if line.strip()
  ]
  if not rows:
    raise ValueError(f"games_file {path!r} has no games")
  return np.array(rows)


def _read_game(line: str, where: str) -> list[int]:
  try:
    puzzle = json.loads(line)["puzzle"]
    match = _GAME.fullmatch(puzzle)
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{where}: no field 'puzzle' of text") from error
  if match is None:
    raise ValueError(f"{where}: {puzzle!r} is not four numbers")
  return sorted(_numbers(match.group(1)))


def _numbers(text: str) -> list[int]:
  return [int(word) for word in re.split(r"[\s,]+", text)]
