"""Arithmetic: chains of multi-digit sums and differences, with carries.

The prompt `47 + 85 - 19 =` is solved from left to right, one operation a line:

  47 + 85 = 132
  132 - 19 = 113

There is one true chain, so there is no play to be made: candidates differ in
their digits only. The task is here so that nothing is shaped to Countdown.
"""

import dataclasses
import re
from typing import ClassVar

import numpy as np

from o1jax.tasks import task
from o1jax.types import Problem, Verdict

MAX_TERMS = 20
MAX_DIGITS = 9
_MAX_CHARACTERS = 2_000
_MAX_EMPTY_DRAWS = 1_000  # draws in a row without a problem of the split

_PROBLEM = re.compile(r"\s*([0-9]+(?:\s*[-+*]\s*[0-9]+)+)\s*=?\s*")
_LINE = re.compile(r"(-?[0-9]{1,200}) ([-+*]) ([0-9]{1,20}) = (-?[0-9]{1,200})")
_NUMBER = re.compile(r"-?[0-9]{1,200}")


@dataclasses.dataclass(frozen=True)
class Arithmetic:
  """Chains of operations on whole numbers, read from left to right.

  Attributes:
    num_terms: numbers of a chain.
    max_digits: digits of the longest number; each number's count of digits is
      uniform from 1 to this.
    ops: operators to draw from, of "+" and "-", or "*" alone (mixed with them
      it would have to go first).
    heldout: share of the multisets of terms that is held out, by hash.
    heldout_seed: another seed holds out others.
  """

  num_terms: int = 3
  max_digits: int = 2
  ops: str = "+-"
  heldout: float = 0.1
  heldout_seed: int = 0

  name: ClassVar[str] = "arithmetic"
  demonstration_kinds: ClassVar[tuple[str, ...]] = ("optimal",)
  consequence_mark: ClassVar[str] = " = "

  def __post_init__(self):
    if not 2 <= self.num_terms <= MAX_TERMS:
      raise ValueError(f"num_terms={self.num_terms} is not in 2 to {MAX_TERMS}")
    if not 1 <= self.max_digits <= MAX_DIGITS:
      raise ValueError(
        f"max_digits={self.max_digits} is not in 1 to {MAX_DIGITS}"
      )
    if sorted(self.ops) not in (["+"], ["-"], ["+", "-"], ["*"]):
      raise ValueError(f"ops={self.ops!r} is not '+', '-', '+-' or '*'")
    task.require_fraction("heldout", self.heldout)

  def sample_problems(
    self, rng: np.random.Generator, n: int, split: str = "train"
  ) -> list[Problem]:
    """Draws n problems of a split; repeats are possible."""
    task.require_known("split", split, task.SPLITS)
    if split == "heldout" and not self.heldout:
      raise ValueError("nothing is held out: set heldout above 0")
    problems: list[Problem] = []
    empty = 0
    while len(problems) < n:
      if empty > _MAX_EMPTY_DRAWS:
        raise ValueError(f"{self.name}: the {split} split has no problems")
      terms = self._draw_terms(rng, 2 * n + 16)
      ops = rng.choice(list(self.ops), (len(terms), self.num_terms - 1))
      keep = self._is_heldout(terms) == (split == "heldout")
      pairs = zip(terms[keep].tolist(), ops[keep].tolist(), strict=True)
      problems += [self.make_problem(*pair) for pair in pairs]
      empty = 0 if keep.any() else empty + 1
    return problems[:n]

  def heldout_problems(self, n: int) -> list[Problem]:
    """The first n of one fixed list of distinct held-out problems."""
    return task.distinct_heldout(self, n)

  def is_train(self, problem: Problem) -> bool:
    """Whether a problem may be trained on.

    Raises:
      ValueError: the data of the problem is not of this task.
    """
    try:
      return self._allows(**problem.data)
    except (TypeError, ValueError, OverflowError) as error:
      raise task.foreign_data(problem, self.name) from error

  def unlike_training(self, problem: Problem) -> str | None:
    """What training problems are, where this one is unlike them."""
    terms, ops = problem.data["terms"], problem.data["ops"]
    if (
      len(terms) == self.num_terms
      and max(terms) < 10**self.max_digits
      and set(ops) <= set(self.ops)
    ):
      return None
    return (
      f"training problems have {self.num_terms} numbers of at most "
      f"{self.max_digits} digits, joined by {' or '.join(self.ops)}"
    )

  def make_problem(self, terms: list[int], ops: list[str]) -> Problem:
    """The record of a chain `terms[0] ops[0] terms[1] ...`."""
    words = [str(terms[0])]
    for op, term in zip(ops, terms[1:], strict=True):
      words += [op, str(term)]
    return Problem(
      id=f"{self.name}/{''.join(words)}",
      task=self.name,
      prompt=f"{' '.join(words)} =\n",
      data={"terms": terms, "ops": ops},
    )

  def parse(self, text: str) -> Problem:
    """Reads `47 + 85 - 19`, with or without ` =` behind it.

    Raises:
      ValueError: the text is not of that form.
    """
    match = _PROBLEM.fullmatch(text)
    if match is None:
      raise ValueError(
        f"not an arithmetic problem: {text!r}; write it as '47 + 85 - 19'"
      )
    words = re.findall(r"[0-9]+|[-+*]", match.group(1))
    terms, ops = words[::2], words[1::2]
    if len(terms) > MAX_TERMS or max(map(len, terms)) > MAX_DIGITS:
      raise ValueError(
        f"{text!r}: at most {MAX_TERMS} numbers of at most {MAX_DIGITS} digits"
      )
    if "*" in ops and set(ops) != {"*"}:
      raise ValueError(f"{text!r} mixes * with + or -")
    return self.make_problem(list(map(int, terms)), ops)

  def check(self, problem: Problem, text: str) -> Verdict:
    """Judges a chain of lines, or the bare result.

    The answer in the verdict is read, not checked: the number on the right of
    the last line.
    """
    if not isinstance(text, str) or len(text) > _MAX_CHARACTERS:
      return Verdict(False, "too long", None)
    text = text.strip()
    answer = _claimed_number(text)
    expected = _chain(problem)
    result = expected[-1].rpartition(" ")[2]
    if _NUMBER.fullmatch(text):
      is_correct = text == result
      reason = "correct" if is_correct else f"{text}, not {result}"
      return Verdict(is_correct, reason, answer)
    lines = text.split("\n") if text else []
    reason = _first_fault(lines, expected)
    return Verdict(not reason, reason or "correct", answer)

  def relabel(self, problem: Problem, text: str) -> Problem | None:
    """None: a chain has one result, so a wrong text solves nothing else."""
    return None

  def judge_steps(self, problem: Problem, text: str) -> list[bool]:
    """For each line of a text: is it the right one in its place?"""
    lines = text.strip("\n").split("\n") if text.strip("\n") else []
    expected = _chain(problem)
    return [
      place < len(expected) and line == expected[place]
      for place, line in enumerate(lines)
    ]

  def solutions(self, problem: Problem) -> list[str]:
    """The one true chain."""
    return ["\n".join(_chain(problem))]

  def can_reach(self, problem: Problem, prefix: str = "") -> bool:
    """Whether a prefix is the beginning of the true chain."""
    return all(self.judge_steps(problem, prefix))

  def true_value(self, problem: Problem, prefix: str = "") -> float:
    """1 where the prefix is right, else 0: one step is legal at each place."""
    return float(self.can_reach(problem, prefix))

  def demonstrations(
    self, kind: str, rng: np.random.Generator, n: int
  ) -> list[tuple[Problem, str]]:
    """Writes the true chains ("optimal") of n training problems."""
    task.require_known("kind of demonstration", kind, self.demonstration_kinds)
    problems = self.sample_problems(rng, n)
    return [(problem, "\n".join(_chain(problem))) for problem in problems]

  def corpus(
    self, rng: np.random.Generator, n: int, kind: str | None = None
  ) -> list[str]:
    """n texts, prompt and solution, to train a tokenizer on."""
    pairs = self.demonstrations(kind or "optimal", rng, n)
    return [problem.prompt + text for problem, text in pairs]

  def _draw_terms(self, rng: np.random.Generator, n: int) -> np.ndarray:
    """`[n, num_terms]` numbers, uniform among those of their digit count."""
    digits = rng.integers(1, self.max_digits + 1, (n, self.num_terms))
    low = np.where(digits == 1, 0, 10 ** (digits - 1))
    return rng.integers(low, 10**digits)

  def _allows(self, terms: list[int], ops: list[str]) -> bool:
    if len(terms) != len(ops) + 1:
      raise ValueError(f"{len(terms)} numbers with {len(ops)} operators")
    return not self._is_heldout(np.array([terms]))[0]

  def _is_heldout(self, terms: np.ndarray) -> np.ndarray:
    ordered = np.sort(terms, axis=1)
    return task.hash_rows(ordered, self.heldout_seed) < self.heldout


def _chain(problem: Problem) -> list[str]:
  """The lines of the true chain."""
  terms, ops = problem.data["terms"], problem.data["ops"]
  total, lines = terms[0], []
  for op, term in zip(ops, terms[1:], strict=True):
    before = total
    if op == "*":
      total *= term
    else:
      total += term if op == "+" else -term
    lines.append(f"{before} {op} {term} = {total}")
  return lines


def _first_fault(lines: list[str], expected: list[str]) -> str:
  """The first thing that is wrong with the lines, "" where nothing is."""
  for line, right in zip(lines, expected, strict=False):
    if line == right:
      continue
    if _LINE.fullmatch(line) is None:
      return "unreadable step"
    same_step = line.rpartition(" = ")[0] == right.rpartition(" = ")[0]
    return f"wrong result {line}" if same_step else f"illegal step {line}"
  if len(lines) > len(expected):
    return "text after the answer"
  missing = len(expected) - len(lines)
  return f"unfinished, {missing} steps missing" if missing else ""


def _claimed_number(text: str) -> str | None:
  """The number that the last line ends at, None where it cannot be read."""
  last = text[text.rfind("\n") + 1 :]
  if _LINE.fullmatch(last) or _NUMBER.fullmatch(last):
    return last.rpartition(" ")[2]
  return None
