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

from o1jax.tasks import reflection, task
from o1jax.types import Problem, Verdict

MAX_TERMS = 20
MAX_DIGITS = 9
_MAX_CHARACTERS = 10_000
_MAX_EMPTY_DRAWS = 1_000  # draws in a row without a problem of the split

# Of wrong solutions: false results, false operations, unfinished ones.
_FAULT_SHARES = (0.7, 0.2, 0.1)

_PROBLEM = re.compile(r"\s*([0-9]+(?:\s*[-+*]\s*[0-9]+)+)\s*(?:=\s*)?")
_LINE = re.compile(r"(-?[0-9]{1,200}) ([-+*]) ([0-9]{1,20}) = (-?[0-9]{1,200})")
_NUMBER = re.compile(r"-?[0-9]{1,200}")


@dataclasses.dataclass(frozen=True)
class Arithmetic(reflection.Reflection):
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
  demonstration_kinds: ClassVar[tuple[str, ...]] = (
    "optimal",
    *reflection.KINDS,
  )
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
    _, reason = _first_fault(text, _chain(problem))
    return Verdict(not reason, reason or "correct", answer)

  def first_fault(self, problem: Problem, text: str) -> str:
    """The checker's reason, with the number of the wrong step if it is one."""
    verdict = self.check(problem, text)
    if verdict.is_correct or verdict.reason == "too long":
      return verdict.reason
    place, reason = _first_fault(text.strip(), _chain(problem))
    return f"step {place}: {reason}" if place else reason

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

  def recompute(self, problem: Problem, solution: str) -> list[str]:
    """A line for each step of a solution, up to the first wrong one."""
    lines = []
    for line, right in zip(solution.split("\n"), _chain(problem), strict=False):
      a, op, b, _ = _LINE.fullmatch(line).groups()
      word = "ok" if line == right else "wrong"
      lines.append(f"{a} {op} {b} = {_result(int(a), op, int(b))} {word}")
      if line != right:
        break
    return lines

  def problem_features(self, problem: Problem) -> np.ndarray:
    """Counts of terms, digits and operators: `[6]`."""
    terms, ops = problem.data["terms"], problem.data["ops"]
    digits = [len(str(term)) for term in terms]
    return np.array(
      [
        len(terms),
        sum(digits),
        max(digits),
        ops.count("-"),
        ops.count("*"),
        np.log1p(np.array(terms, np.float64)).mean(),
      ],
      np.float64,
    )

  def heuristic(self, problem: Problem, prefix: str) -> float:
    """The share of the lines written, where they bear a look; else 0.

      (1 + lines of the prefix) / (1 + lines of the chain)

    Each line must go on from the result above it, with the problem's next
    operation, and pass the test of casting out nines: that finds most slips
    without calculating, and not all.
    """
    terms, ops = problem.data["terms"], problem.data["ops"]
    lines = prefix.strip("\n").split("\n") if prefix.strip("\n") else []
    before = str(terms[0])
    for place, line in enumerate(lines):
      match = _LINE.fullmatch(line)
      if match is None or place >= len(ops):
        return 0.0
      a, op, b, result = match.groups()
      if (a, op, b) != (before, ops[place], str(terms[place + 1])):
        return 0.0
      if (_result(int(a) % 9, op, int(b) % 9) - int(result)) % 9:
        return 0.0
      before = result
    return (1 + len(lines)) / (1 + len(ops))

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
    """Writes n demonstrations on training problems.

    Kinds: `optimal` is the true chain; `judging`, `revising`, `revised` and
    `comparing` are in `reflection`.
    """
    task.require_known("kind of demonstration", kind, self.demonstration_kinds)
    makers = {
      "optimal": self.right_solutions,
      "judging": self.judging,
      "revising": self.revising,
      "revised": self.revised,
      "comparing": self.comparing,
    }
    return makers[kind](rng, n)

  def right_solutions(
    self, rng: np.random.Generator, n: int
  ) -> list[tuple[Problem, str]]:
    """The true chains of n training problems."""
    problems = self.sample_problems(rng, n)
    return [(problem, "\n".join(_chain(problem))) for problem in problems]

  def wrong_solution(
    self, rng: np.random.Generator, problem: Problem, solution: str
  ) -> str:
    """A chain that stops early, or goes on from a slip of digits or copying."""
    lines = solution.split("\n")
    place = int(rng.integers(len(lines)))
    fault = rng.choice(["result", "operation", "unfinished"], p=_FAULT_SHARES)
    if fault == "unfinished" and place:
      return "\n".join(lines[:place])
    a, op, b, _ = _LINE.fullmatch(lines[place]).groups()
    if fault == "operation":
      b = str(int(b) + 10 ** rng.integers(len(b)))
    result = _result(int(a), op, int(b))
    if fault != "operation":
      result = _slip(rng, result)
    wrong = f"{a} {op} {b} = {result}"
    terms, ops = problem.data["terms"], problem.data["ops"]
    rest = _lines(result, terms[place + 2 :], ops[place + 1 :])
    return "\n".join([*lines[:place], wrong, *rest])

  def reworded(
    self, rng: np.random.Generator, problem: Problem, solution: str
  ) -> str:
    """The chain again, half the time with a slip before its last line."""
    *lines, last = solution.split("\n")
    if lines and rng.random() < 0.5:
      place = int(rng.integers(len(lines)))
      head, result = lines[place].split(" = ")
      lines[place] = f"{head} = {_slip(rng, int(result))}"
    return "\n".join([*lines, last])

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
  return _lines(terms[0], terms[1:], ops)


def _lines(total: int, terms: list[int], ops: list[str]) -> list[str]:
  """The lines from a total on."""
  lines = []
  for op, term in zip(ops, terms, strict=True):
    before, total = total, _result(total, op, term)
    lines.append(f"{before} {op} {term} = {total}")
  return lines


def _slip(rng: np.random.Generator, number: int) -> int:
  """A number that differs by 1 in one of its places."""
  slip = 10 ** int(rng.integers(len(str(abs(number)))))
  return number + slip if rng.random() < 0.5 else number - slip


def _result(a: int, op: str, b: int) -> int:
  if op == "*":
    return a * b
  return a + b if op == "+" else a - b


def _first_fault(text: str, expected: list[str]) -> tuple[int, str]:
  """The number of the first wrong line, 0 for none, and what is wrong.

  What is wrong is "" for a right text.
  """
  result = expected[-1].rpartition(" ")[2]
  if _NUMBER.fullmatch(text):
    return 0, "" if text == result else f"{text}, not {result}"
  lines = text.split("\n") if text else []
  pairs = zip(lines, expected, strict=False)
  for place, (line, right) in enumerate(pairs, start=1):
    if line == right:
      continue
    if _LINE.fullmatch(line) is None:
      return place, "unreadable step"
    same_step = line.rpartition(" = ")[0] == right.rpartition(" = ")[0]
    what = "wrong result" if same_step else "illegal step"
    return place, f"{what} {line}"
  if len(lines) > len(expected):
    return len(expected) + 1, "text after the answer"
  missing = len(expected) - len(lines)
  return 0, f"unfinished, {missing} steps missing" if missing else ""


def _claimed_number(text: str) -> str | None:
  """The number that the last line ends at, None where it cannot be read."""
  last = text[text.rfind("\n") + 1 :]
  if _LINE.fullmatch(last) or _NUMBER.fullmatch(last):
    return last.rpartition(" ")[2]
  return None
