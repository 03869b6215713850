"""What a task is, and what all tasks share.

A task is a source of problems with checkable answers. It draws problems of two
splits that share nothing, writes prompts, judges texts written by anybody, and
writes demonstrations. `Task` below is the whole interface that search,
learning and the commands use: to add a task, write one file with a class that
has these methods, and name the class in `tasks/__init__.py`. The base class in
`reflection` brings those for texts that judge, revise and compare.

A task with an exact solver also has `solutions(problem)`, `can_reach(problem,
prefix)` and `true_value(problem, prefix)`. They serve labels, demonstrations
and tests only: candidates in search always come from the policy.
"""

import difflib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from o1jax.types import Problem, Verdict

SPLITS = ("train", "heldout")

# Seed of the fixed list behind `heldout_problems`; a change of it changes what
# every reported accuracy means.
HELDOUT_SEED = 20241218

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@runtime_checkable
class Task(Protocol):
  """A source of problems with its checker.

  Attributes:
    name: key of the task in `make_task`; begins the id of each problem.
    demonstration_kinds: names that `demonstrations` accepts.
    consequence_mark: what follows its first occurrence in a line of a right
      solution, as demonstrations write it, is determined by what precedes it,
      the prompt and the lines above included: it is calculated, not chosen.
      (Where equal numbers are left either may be used, which may show in the
      order of the others.) A line without the mark has no such part.
    judge_mark: a line that follows a solution where it is judged in writing.
    revision_mark: a line that follows a solution where it is revised.
    thinking_mark: a line that begins a chain of thought.
    other_mark: a line between two solutions that are compared.
    same_mark: a line that follows the second of them. No mark stands in a
      solution; `reflection` has the forms of such texts.
    question_mark: a line behind which a problem is written, see `parse`.
    verdict_words: the last line of a judgement, for right and for wrong, and of
      a comparison, for the same and for another.
  """

  name: str
  demonstration_kinds: tuple[str, ...]
  consequence_mark: str
  judge_mark: str
  revision_mark: str
  thinking_mark: str
  other_mark: str
  same_mark: str
  question_mark: str
  verdict_words: tuple[str, str]

  def sample_problems(
    self, rng: np.random.Generator, n: int, split: str = "train"
  ) -> list[Problem]:
    """Draws n problems of a split ("train" or "heldout"), all solvable."""
    ...

  def heldout_problems(self, n: int) -> list[Problem]:
    """The first n of one fixed list of distinct held-out problems."""
    ...

  def parse(self, text: str) -> Problem:
    """Reads a problem as a user types it, or a policy writes it.

    What is read is a prompt of the task, its newline left out or not.

    Raises:
      Unsolvable: the text is of that form, and has no solution.
      ValueError: it is of another form, whatever the text.
    """
    ...

  def is_train(self, problem: Problem) -> bool:
    """Whether a problem may be trained on: none that is held out may.

    Raises:
      ValueError: the data of the problem is not of this task.
    """
    ...

  def unlike_training(self, problem: Problem) -> str | None:
    """What training problems are, as a sentence, where this one is unlike.

    None for a problem of the kind that the policy learned. A held-out problem
    is of that kind.
    """
    ...

  def check(self, problem: Problem, text: str) -> Verdict:
    """Judges a solution text; never raises, whatever the text."""
    ...

  def relabel(self, problem: Problem, text: str) -> Problem | None:
    """The training problem that a text solves, where it is not `problem`.

    None where the text has a wrong step, or solves `problem` itself, or what
    it solves is outside the task or outside the training split.
    """
    ...

  def judge_steps(self, problem: Problem, text: str) -> list[bool]:
    """For each step of a text: is it legal and correct where it stands?"""
    ...

  def feedback(self, problem: Problem, text: str) -> str:
    """The checker's criticism of a solution: one line with its newline.

    It is what follows the revision mark in demonstrations; "correct" for a
    right solution. Never raises, whatever the text.
    """
    ...

  def chain(
    self, problem: Problem, attempts: Sequence[str], solution: str
  ) -> str:
    """A chain of thought: wrong attempts, criticism of each, a solution."""
    ...

  def final_solution(self, text: str) -> str:
    """The last solution of a text with revisions, the one to be checked.

    The whole of a text without marks. Never raises, whatever the text.
    """
    ...

  def heuristic(self, problem: Problem, prefix: str) -> float:
    """A cheap guess, in [0, 1], of how good the steps of a prefix are.

    For search that is guided by a heuristic: no solver is asked. 0 after a
    wrong step; never raises, whatever the text.
    """
    ...

  def demonstrations(
    self, kind: str, rng: np.random.Generator, n: int
  ) -> list[tuple[Problem, str]]:
    """Writes n (training problem, solution text) pairs of a kind.

    Raises:
      ValueError: the task has no demonstrations of that kind.
    """
    ...

  def corpus(
    self, rng: np.random.Generator, n: int, kind: str | None = None
  ) -> list[str]:
    """n texts, prompt and solution, to train a tokenizer on."""
    ...


@runtime_checkable
class Featured(Protocol):
  """A task that describes its problems in numbers, to learn what is hard.

  Apart from `Task`: no search and no learning needs it, only the choice of
  problems in `question_generator`.
  """

  def problem_features(self, problem: Problem) -> np.ndarray:
    """What a problem looks like, `[k]` float64, of one length for the task.

    Sizes and counts read off the problem alone: no solver is asked.
    """
    ...


class Unsolvable(ValueError):
  """A problem of the right form that has no solution; raised by `parse`."""


def success_rate(
  task: Task, problems: Sequence[Problem], texts: Sequence[str]
) -> float:
  """Share of texts that solve their problems; 0 for no texts."""
  pairs = list(zip(problems, texts, strict=True))
  right = sum(task.check(*pair).is_correct for pair in pairs)
  return right / max(len(pairs), 1)


def hash_rows(rows: np.ndarray, seed: int = 0) -> np.ndarray:
  """Maps rows of integers to fixed pseudo-random numbers in [0, 1).

  The splits are made of this: it depends on nothing but the integers and the
  seed, on no process, platform or library version. (splitmix64, Steele et al.,
  OOPSLA 2014.)

  Args:
    rows: `[n, k]` integers; sort each row first to ignore order.
    seed: another seed gives an unrelated hash.

  Returns:
    `[n]` float64.
  """
  rows = np.asarray(rows, np.int64).astype(np.uint64)
  state = np.full(rows.shape[0], seed, np.uint64)
  for column in rows.T:
    state = (state ^ column) + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    state = state ^ (state >> np.uint64(31))
  return (state >> np.uint64(11)).astype(np.float64) / 2.0**53


def suggest(name: str, known: Sequence[str]) -> str:
  """The tail of an error about an unknown name: nearest name, known names."""
  near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
  hint = f"did you mean {near[0]!r}? " if near else ""
  return f"{hint}known: {', '.join(known)}"


def require_known(what: str, name: str, known: Sequence[str]) -> None:
  """Raises ValueError, with the nearest name, where `name` is not known."""
  if name not in known:
    raise ValueError(f"unknown {what} {name!r}: {suggest(name, known)}")


def require_fraction(name: str, value: float) -> None:
  """Raises ValueError where an option is not in [0, 1)."""
  if not 0.0 <= value < 1.0:
    raise ValueError(f"{name}={value} is not in [0, 1)")


def foreign_data(problem: Problem, name: str) -> ValueError:
  """The error about a problem whose data is not of the task `name`."""
  return ValueError(
    f"problem.data={dict(problem.data)} is not of task {name!r}"
  )


def distinct_heldout(task: Task, n: int) -> list[Problem]:
  """The first n distinct problems of a fixed stream of held-out problems.

  Raises:
    ValueError: the stream does not show n distinct problems.
  """
  rng = np.random.default_rng(HELDOUT_SEED)
  found: dict[str, Problem] = {}
  stale = 0
  while len(found) < n and stale < 50:
    before = len(found)
    # A fixed batch, so that the list for a smaller n is a prefix of this one.
    for problem in task.sample_problems(rng, 64, "heldout"):
      found.setdefault(problem.id, problem)
    stale = stale + 1 if len(found) == before else 0
  if len(found) < n:
    raise ValueError(
      f"{task.name} has only about {len(found)} held-out problems, "
      f"{n} were asked for; widen its ranges or its held-out share"
    )
  return list(found.values())[:n]
