"""Texts in which a policy judges solutions and revises them, for every task.

A judgement follows a solution and the judge mark. It recomputes the solution
line by line, up to the first wrong line, says what is wrong in one line of
criticism ("correct" where nothing is), and ends with the verdict:

  3 + 7 = 10 (left: 2 10)
  10 + 2 = 12 (left: 12)
  check:
  3 + 7 = 10 ok
  10 + 2 = 12 ok
  reaches 12, not 13
  no

A revision follows a solution and the revision mark: the same line of criticism
and then a new solution, which may be revised in its turn:

  10 + 2 = 12 (left: 12)
  again:
  reaches 12, not 13
  3 * 2 = 6 (left: 7 6)
  7 + 6 = 13 (left: 13)

A comparison follows two solutions, with a mark behind each, and asks whether
the second says the same as the first. It writes down what each of them answers
("none" where that cannot be read) and ends with the verdict:

  3 + 7 = 10 (left: 2 10)
  10 + 2 = 12 (left: 12)
  and:
  7 + 2 = 9 (left: 3 9)
  9 + 3 = 12 (left: 12)
  same:
  2 + 3 + 7
  2 + 3 + 7
  yes

A chain of thought is the same as a revision, but that it begins with the
thinking mark, and that the policy itself goes on where a solution is wrong and
ends where it is right:

  think:
  10 + 2 = 12 (left: 12)
  again:
  reaches 12, not 13
  3 * 2 = 6 (left: 7 6)
  7 + 6 = 13 (left: 13)

A problem is written behind the question mark, with no prompt before it, as its
own prompt without the newline:

  question:
  3 7 2 = 13

So criticism is the last line but one of a judgement, and the first line after a
revision mark; there, the policy may write it itself, or be given that of the
checker (`feedback`). A mark is a whole line, and a solution by itself ends
without a newline: `marked` joins the two.

Self-Refine is Madaan et al., arXiv 2303.17651; solutions that are revised are
the nodes of MCTSr, arXiv 2406.07394. What says the same is asked for semantic
entropy, Kuhn et al., arXiv 2302.09664; see o1jax/entailment.py.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from o1jax.types import Problem, Verdict

KINDS = ("judging", "revising", "revised", "comparing")
# Share of judged solutions that are right; of revising texts with two
# revisions; of those whose last revision finds a right solution and keeps it,
# so that the mark alone does not say that something is wrong.
_RIGHT, _TWICE, _KEPT = 0.5, 0.25, 0.25
# Share of compared solutions whose second is the first in other words.
_SAME = 0.5
_MAX_CRITICISM = 80  # characters, whatever the solution is
# A thought before an answer, such as `long_thought` writes, ends with these.
_ANSWER, _ANSWER_END = "<answer>\n", "\n</answer>"


def with_answer(thought: str, solution: str) -> str:
  """A thought, and the solution that it comes to between marks."""
  return f"{thought}\n{_ANSWER}{solution}{_ANSWER_END}"


def marked(text: str, mark: str) -> str:
  """A solution and the mark after it, on a line of its own."""
  return text.rstrip("\n") + "\n" + mark


class Reflection:
  """Base of tasks whose solutions can be judged and revised in writing.

  A subclass says how a solution is recomputed, how it goes wrong, and how it is
  put in other words.
  """

  judge_mark: ClassVar[str] = "check:\n"
  revision_mark: ClassVar[str] = "again:\n"
  thinking_mark: ClassVar[str] = "think:\n"
  other_mark: ClassVar[str] = "and:\n"
  same_mark: ClassVar[str] = "same:\n"
  question_mark: ClassVar[str] = "question:\n"
  verdict_words: ClassVar[tuple[str, str]] = ("yes", "no")

  def check(self, problem: Problem, text: str) -> Verdict:
    """Judges a solution text; never raises, whatever the text."""
    raise NotImplementedError

  def first_fault(self, problem: Problem, text: str) -> str:
    """The checker's reason, with the number of the wrong step if it is one.

    Never raises, and gives one line, whatever the text.
    """
    raise NotImplementedError

  def recompute(self, problem: Problem, solution: str) -> list[str]:
    """A line for each step of a readable solution, up to the first wrong one.

    It ends with "ok" or "wrong".
    """
    raise NotImplementedError

  def right_solutions(
    self, rng: np.random.Generator, n: int
  ) -> list[tuple[Problem, str]]:
    """Draws n training problems, each with a right solution."""
    raise NotImplementedError

  def wrong_solution(
    self, rng: np.random.Generator, problem: Problem, solution: str
  ) -> str:
    """Draws a wrong solution that begins like a right one."""
    raise NotImplementedError

  def reworded(
    self, rng: np.random.Generator, problem: Problem, solution: str
  ) -> str:
    """Draws a solution, right or wrong, that has the answer of another one."""
    raise NotImplementedError

  def other_solution(
    self, rng: np.random.Generator, problem: Problem, solution: str
  ) -> str:
    """Draws a solution that, as a rule, has another answer."""
    return self.wrong_solution(rng, problem, solution)

  def feedback(self, problem: Problem, text: str) -> str:
    """The checker's criticism of a solution, one line with its newline.

    It is what stands after the revision mark in demonstrations. Never raises,
    whatever the text.
    """
    return self.first_fault(problem, text)[:_MAX_CRITICISM] + "\n"

  def final_solution(self, text: str) -> str:
    """The last solution of a text that may hold revisions and a judgement.

    It begins after the line of criticism that follows the last revision mark,
    or after the thinking mark at the start, and ends before a judge mark, or
    the mark of another solution that it is compared with. Of a thought that
    ends with an answer it is the answer. A text without marks is returned as it
    is; never raises, whatever the text.
    """
    if not isinstance(text, str):
      return ""
    _, mark, after = f"\n{text}".rpartition(f"\n{self.revision_mark}")
    solution = after.partition("\n")[2] if mark else text
    solution = solution.removeprefix(self.thinking_mark)
    for end in (self.judge_mark, self.other_mark):
      solution = f"\n{solution}".partition(f"\n{end}")[0][1:]
    thought, mark, answer = f"\n{solution}".rpartition(f"\n{_ANSWER}")
    if mark and answer.rstrip("\n").endswith(_ANSWER_END):
      return answer.rstrip("\n").removesuffix(_ANSWER_END)
    return solution

  def judging(
    self, rng: np.random.Generator, n: int
  ) -> list[tuple[Problem, str]]:
    """Solutions and their judgements; about half of them are right."""
    pairs = []
    for problem, solution in self.right_solutions(rng, n):
      if rng.random() >= _RIGHT:
        solution = self.wrong_solution(rng, problem, solution)
      text = marked(solution, self.judge_mark)
      pairs.append((problem, text + self._judgement(problem, solution)))
    return pairs

  def revising(
    self, rng: np.random.Generator, n: int
  ) -> list[tuple[Problem, str]]:
    """Wrong solutions, criticism, and right ones after one or two rounds."""
    pairs = []
    for problem, solution in self.right_solutions(rng, n):
      attempts = [
        self.wrong_solution(rng, problem, solution)
        for _ in range(1 + (rng.random() < _TWICE))
      ]
      if rng.random() < _KEPT:
        attempts[-1] = solution
      rounds = [
        marked(attempt, self.revision_mark) + self.feedback(problem, attempt)
        for attempt in attempts
      ]
      pairs.append((problem, "".join(rounds) + solution))
    return pairs

  def revised(
    self, rng: np.random.Generator, n: int
  ) -> list[tuple[Problem, str]]:
    """Texts of `revising`, but half of their last solutions are wrong.

    They teach to tell what a revised answer is worth, and are not for cloning.
    """
    pairs = []
    for problem, text in self.revising(rng, n):
      if rng.random() >= _RIGHT:
        solution = self.final_solution(text)
        wrong = self.wrong_solution(rng, problem, solution)
        text = text.removesuffix(solution) + wrong
      pairs.append((problem, text))
    return pairs

  def chain(
    self, problem: Problem, attempts: Sequence[str], solution: str
  ) -> str:
    """A chain of thought: wrong attempts, criticism of each, a solution."""
    rounds = [
      marked(attempt, self.revision_mark) + self.feedback(problem, attempt)
      for attempt in attempts
    ]
    return self.thinking_mark + "".join(rounds) + solution

  def comparing(
    self, rng: np.random.Generator, n: int
  ) -> list[tuple[Problem, str]]:
    """Pairs of solutions and their comparison; of about half it is yes."""
    pairs = []
    for problem, right in self.right_solutions(rng, n):
      first = right
      if rng.random() >= _RIGHT:
        first = self.wrong_solution(rng, problem, right)
      if rng.random() < _SAME:
        second = self.reworded(rng, problem, first)
      else:
        second = self.other_solution(rng, problem, right)
      both = [first, second]
      rng.shuffle(both)
      text = marked(marked(both[0], self.other_mark) + both[1], self.same_mark)
      pairs.append((problem, text + self._comparison(problem, *both)))
    return pairs

  def _comparison(self, problem: Problem, first: str, second: str) -> str:
    yes, no = self.verdict_words
    answers = [self.check(problem, text).answer for text in (first, second)]
    is_same = answers[0] is not None and answers[0] == answers[1]
    lines = ["none" if answer is None else answer for answer in answers]
    return "\n".join([*lines, yes if is_same else no])

  def _judgement(self, problem: Problem, solution: str) -> str:
    right, wrong = self.verdict_words
    is_correct = self.check(problem, solution).is_correct
    criticism = self.feedback(problem, solution)
    lines = self.recompute(problem, solution)
    return "\n".join([*lines, criticism + (right if is_correct else wrong)])
