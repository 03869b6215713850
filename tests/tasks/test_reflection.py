"""Judgements and revisions of every task, against the checker and by hand."""

import collections
import operator
import re
from fractions import Fraction

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from o1jax.tasks import long_thought, make_task
from o1jax.tasks.reflection import KINDS, marked

TASKS = {
  "countdown": make_task("countdown"),
  "play": make_task(
    "countdown",
    integers_only=True,
    canonical_play=True,
    balanced_hindsight=True,
  ),
  "two": make_task("countdown", num_numbers=2, integers_only=True),
  "four": make_task("countdown", num_numbers=4, canonical_play=True),
  "game24": make_task("game24"),
  "arithmetic": make_task("arithmetic", num_terms=4, max_digits=3),
  "products": make_task("arithmetic", num_terms=20, max_digits=9, ops="*"),
}
OPERATIONS = {
  "+": operator.add,
  "-": operator.sub,
  "*": operator.mul,
  "/": operator.truediv,
}
each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def rng(seed=0):
  return np.random.default_rng(seed)


def by_hand(line):
  """The result of the operation at the head of a line, None for division by 0
  or no operation."""
  match = re.match(r"(\S+) ([-+*/]) (\S+) = ", line)
  if match is None or (match.group(2) == "/" and match.group(3) == "0"):
    return None
  a, op, b = match.groups()
  return OPERATIONS[op](Fraction(a), Fraction(b))


@each_task
def test_judgements_agree_with_the_checker(task):
  verdicts = []
  for problem, text in task.demonstrations("judging", rng(), 150):
    assert task.is_train(problem)
    solution, mark, judgement = text.partition(f"\n{task.judge_mark}")
    assert mark and text == marked(solution, task.judge_mark) + judgement
    assert task.final_solution(text) == solution
    *checks, criticism, word = judgement.split("\n")
    verdict = task.check(problem, solution)
    assert word == task.verdict_words[not verdict.is_correct]
    assert (criticism == "correct") == verdict.is_correct
    assert verdict.reason[:40] in criticism
    assert criticism + "\n" == task.feedback(problem, solution)
    verdicts.append(verdict.is_correct)
    # A line for each step, up to the one that the criticism names.
    right = task.judge_steps(problem, solution)
    num_right = right.index(False) if False in right else len(right)
    words = ["ok"] * num_right + ["wrong"] * (False in right)
    assert [check.rpartition(" ")[2] for check in checks] == words
    if False in right:
      assert criticism.startswith(f"step {num_right + 1}: ")
    else:
      assert not criticism.startswith("step")
    for check, line in zip(checks, solution.split("\n"), strict=False):
      result = by_hand(line)
      if check == "wrong":
        assert criticism.endswith("unreadable step")
      elif result is not None:
        head = line.partition(" = ")[0]
        assert check.startswith(f"{head} = ")
        claim = check.split(" ")[-2]
        assert claim == "none" or Fraction(claim) == result
  assert 0.35 < np.mean(verdicts) < 0.65


@each_task
def test_revisions_end_right_and_say_what_was_wrong(task):
  num_kept, num_revisions = 0, []
  for problem, text in task.demonstrations("revising", rng(), 150):
    lines = text.split("\n")
    places = [i for i, line in enumerate(lines) if line == "again:"]
    assert task.revision_mark == "again:\n"
    num_revisions.append(len(places))
    ends = [*places, len(lines)]
    starts = [0, *(place + 2 for place in places)]
    solutions = [
      "\n".join(lines[start:end])
      for start, end in zip(starts, ends, strict=True)
    ]
    for place, solution in zip(places, solutions, strict=False):
      assert lines[place + 1] + "\n" == task.feedback(problem, solution)
    assert task.final_solution(text) == solutions[-1]
    right = [task.check(problem, solution).is_correct for solution in solutions]
    assert right[-1] and not any(right[:-2])
    if right[-2]:
      assert solutions[-2] == solutions[-1]
      assert lines[places[-1] + 1] == "correct"
      num_kept += 1
    # The checker takes no text for a solution that holds others.
    assert not task.check(problem, text).is_correct
    assert not task.check(problem, marked(solutions[-1], "yes")).is_correct
  assert set(num_revisions) == {1, 2}
  assert 0.12 < np.mean(np.equal(num_revisions, 2)) < 0.4
  assert 0.12 < num_kept / 150 < 0.4


@each_task
def test_revised_answers_are_right_or_wrong(task):
  revising = task.demonstrations("revising", rng(), 150)
  num_right, num_equal = 0, 0
  for problem, text in task.demonstrations("revised", rng(), 150):
    *_, last = text.split("again:\n")
    criticism, _, answer = last.partition("\n")
    num_right += task.check(problem, answer).is_correct
    num_equal += (problem, text) in revising
    attempt = task.final_solution(text.removesuffix(f"\nagain:\n{last}"))
    assert f"{criticism}\n" == task.feedback(problem, attempt)
  assert 0.35 < num_right / 150 < 0.65
  assert num_equal == num_right  # else nothing but the last answer changes


def compared(task, count):
  """`(problem, first, second, lines of the comparison)` of demonstrations."""
  for problem, text in task.demonstrations("comparing", rng(), count):
    first, mark, rest = text.partition("\nand:\n")
    second, other_mark, comparison = rest.partition("\nsame:\n")
    assert mark and other_mark and task.is_train(problem)
    assert task.final_solution(text) == first
    yield problem, first, second, comparison.split("\n")


def symbolic(problem, solution, symbols):
  """What a play makes of other numbers than its own, by its lines alone.

  None where it is no whole play, or which number a line takes is not clear.
  """
  left = {
    str(n): x for n, x in zip(problem.data["numbers"], symbols, strict=False)
  }
  for line in solution.split("\n"):
    match = re.fullmatch(r"(\S+) (\S) (\S+) = (\S+) \(left: .*\)", line)
    if match is None:
      return None
    a, op, b, result = match.groups()
    if a not in left or b not in left or a == b:
      return None
    x, y = left.pop(a), left.pop(b)
    if by_hand(line) != Fraction(result) or result in left:
      return None
    left[result] = OPERATIONS[op](x, y)
  return next(iter(left.values())) if len(left) == 1 else None


@pytest.mark.parametrize("name", ["countdown", "play", "four", "game24"])
def test_plays_that_say_the_same_are_one_function_of_their_numbers(name):
  task, clear, words = TASKS[name], [], []
  for problem, first, second, (*answers, word) in compared(task, 400):
    words.append(word)
    assert answers == [
      task.check(problem, one).answer or "none" for one in (first, second)
    ]
    numbers = problem.data["numbers"]
    if len(set(numbers)) < len(numbers):
      continue
    symbols = [Fraction(n) for n in (1009, 7919, 104729, 15485863)]
    found = [symbolic(problem, one, symbols) for one in (first, second)]
    if None not in found:
      clear.append((word == "yes", found[0] == found[1], first == second))
  assert set(words) == {"yes", "no"} and 0.4 < words.count("yes") / 400 < 0.6
  assert len(clear) > 100
  # Equal values by signs alone, as of 3 - (2 - 7) * 4 and 3 + (7 - 2) * 4, are
  # two forms where such steps are legal.
  wrong = [said for said, is_equal, _ in clear if said != is_equal]
  assert not any(wrong) and len(wrong) <= 3 * (name != "play")
  assert sum(said and not is_copy for said, _, is_copy in clear) > 20


def test_chains_that_say_the_same_end_at_one_number():
  task, kinds = TASKS["arithmetic"], collections.Counter()
  for problem, first, second, (*answers, word) in compared(task, 300):
    kinds["right first"] += task.check(problem, first).is_correct
    kinds["right second"] += task.check(problem, second).is_correct
    assert answers == [one.split(" ")[-1] for one in (first, second)]
    assert (word == "yes") == (answers[0] == answers[1])
    kinds[word, first == second] += 1
  assert min(kinds["yes", True], kinds["yes", False]) > 40
  # The place of a solution says nothing of it.
  assert abs(kinds["right first"] - kinds["right second"]) < 30
  assert not kinds["no", True] and 100 < kinds["no", False] < 200


@each_task
def test_what_cannot_be_read_says_nothing(task):
  words = [
    (word, answers)
    for _, _, _, (*answers, word) in compared(task, 200)
    if "none" in answers
  ]
  assert all(word == "no" for word, _ in words)
  has_unread = task.name != "arithmetic"  # there any last line is read
  assert bool(words) == has_unread


@each_task
def test_marks_stand_in_no_other_text(task):
  own = {
    "judging": ["check:"],
    "comparing": ["and:", "same:"],
    "retrying": ["think:"],
  }
  for kind in task.demonstration_kinds:
    marks = own.get(kind, ["again:"] if kind in KINDS else [])
    for problem, text in task.demonstrations(kind, rng(), 50):
      lines = f"{problem.prompt}{text}".split("\n")
      found = [line for line in lines if line.endswith(":")]
      if kind == "retrying":  # It may be right at once.
        assert found[0] == "think:" and set(found[1:]) <= {"again:"}
      else:
        assert list(dict.fromkeys(found)) == marks
      if not marks and kind not in long_thought.KINDS:
        assert task.final_solution(text) == text


@each_task
def test_reflections_depend_on_the_generator_alone(task):
  for kind in KINDS:
    first = task.demonstrations(kind, rng(3), 20)
    assert first == task.demonstrations(kind, rng(3), 20)
    assert first != task.demonstrations(kind, rng(4), 20)
  assert len(task.corpus(rng(), 12, "judging")) == 12


NUMBER_FAULTS = (
  r"reaches \S+, not \S+",
  r"unfinished, \d numbers left",
  r"step \d: illegal number \S+",
  r"step \d: wrong result \S+ . \S+ = \S+",
  r"step \d: wrong remaining numbers",
  r"step \d: unreadable step",
)
CHAIN_FAULTS = (
  r"unfinished, \d steps missing",
  r"step \d: wrong result \S+ . \S+ = \S+",
  r"step \d: illegal step \S+ . \S+ = \S+",
)


@pytest.mark.parametrize(
  "name, faults",
  [
    ("play", NUMBER_FAULTS),
    ("countdown", NUMBER_FAULTS),
    ("game24", NUMBER_FAULTS),
    ("arithmetic", CHAIN_FAULTS),
  ],
)
def test_solutions_are_wrong_in_many_ways(name, faults):
  pairs = TASKS[name].demonstrations("judging", rng(1), 600)
  criticism = [text.split("\n")[-2] for _, text in pairs]
  found = {
    fault: sum(re.fullmatch(fault, line) is not None for line in criticism)
    for fault in ("correct", *faults)
  }
  assert sum(found.values()) == 600  # and in no other way
  assert min(found.values()) >= 8, found


def test_wrong_solutions_are_written_like_right_ones():
  """Style must not give the verdict away."""
  for problem, text in TASKS["play"].demonstrations("judging", rng(2), 300):
    solution = TASKS["play"].final_solution(text)
    flags = TASKS["play"].judge_steps(problem, solution)
    for line, is_right in zip(solution.split("\n"), flags, strict=True):
      a, _, b, *_ = line.split(" ")
      assert int(a) >= int(b) or not is_right
  # Where either order is written, both are, in right and in wrong solutions:
  # the last step has the result of the first before or behind the number left.
  share = {}
  for _, text in TASKS["countdown"].demonstrations("judging", rng(2), 1000):
    first, second, *_ = text.split("\n")
    if re.match(r"\S+ [+*] ", second):
      is_result_first = f" = {second.split(' ')[0]} " in first
      share.setdefault(text.endswith("yes"), []).append(is_result_first)
  assert all(0.4 < np.mean(flags) < 0.6 for flags in share.values())


@pytest.mark.parametrize("name", ["countdown", "arithmetic"])
@pytest.mark.parametrize(
  "text, final",
  [
    ("", ""),
    ("a\n", "a\n"),
    ("a\nagain:\nb\nc\nd", "c\nd"),
    ("a\nagain:\nb\nc\nagain:\nd\ne\n", "e\n"),
    ("a\nagain:\nb", ""),
    ("a\nagain:\n", ""),
    ("again:\nb\nc", "c"),
    ("a\nagain:", "a\nagain:"),
    ("say again:\nb\nc", "say again:\nb\nc"),
    ("a\ncheck:\nb\nno", "a"),
    ("check:\nb", ""),
    ("a\nand:\nb\nsame:\nc\nyes", "a"),
    ("and:\nb", ""),
    ("a\ncheck:\nb\nno\nagain:\nc\nd\ncheck:\n", "d"),
    (None, ""),
  ],
)
def test_the_final_solution_is_what_stands_last(name, text, final):
  assert TASKS[name].final_solution(text) == final


HOSTILE = (
  st.text(max_size=60)
  | st.text("0123456789+-*/()= \nleft:", max_size=60)
  | st.lists(
    st.sampled_from(
      [
        "3 + 7 = 10 (left: 2 10)",
        "10 + 2 = 12 (left: 12)",
        "47 + 85 = 132",
        "132 - 19 = 113",
        "132 - 19 = 104",
        "back (left: 3 7 2)",
        "again:",
        "check:",
        "step 1: wrong",
        "\\boxed{3 +",
        "9" * 150,
        "9" * 150 + " - 19 = " + "9" * 150,
        "7/0 + 3 = 7/0 (left: 2 7/0)",
        "\ud800\r\x0b\u2028",
      ]
    ),
    max_size=6,
  ).map("\n".join)
)


@hypothesis.settings(
  deadline=None, derandomize=True, database=None, max_examples=150
)
@hypothesis.given(HOSTILE)
def test_nothing_raises(text):
  for task, problem in (
    (TASKS["countdown"], TASKS["countdown"].make_problem([3, 7, 2], 13)),
    (TASKS["play"], TASKS["play"].make_problem([3, 7, 2], 12)),
    (
      TASKS["arithmetic"],
      TASKS["arithmetic"].make_problem([47, 85, 19], ["+", "-"]),
    ),
  ):
    feedback = task.feedback(problem, text)
    assert feedback.endswith("\n") and len(feedback) <= 81
    assert len(feedback.splitlines()) == 1
    verdict = task.check(problem, text)
    assert (feedback == "correct\n") == verdict.is_correct
    assert text.endswith(task.final_solution(text)) or (task.judge_mark in text)
    assert 0 <= task.heuristic(problem, text) <= 1
  assert task.feedback(problem, None) == "too long\n"


def test_the_heuristic_of_numbers_looks_one_step_ahead():
  task = TASKS["play"]
  problem = task.make_problem([3, 7, 2], 13)
  # 7 * 2 = 14 is off by one, and a step more is to be made.
  assert task.heuristic(problem, "") == pytest.approx(1 / 2 / 2)
  # 6 + 7 = 13; from 2 and 10 the nearest is 12.
  assert task.heuristic(problem, "3 * 2 = 6 (left: 7 6)\n") == 1
  assert task.heuristic(problem, "3 + 7 = 10 (left: 2 10)") == 1 / 2
  assert task.heuristic(problem, "3 + 7 = 11 (left: 2 11)") == 0
  done = "3 * 2 = 6 (left: 7 6)\n7 {} (left: {})"
  assert task.heuristic(problem, done.format("+ 6 = 13", 13)) == 1
  assert task.heuristic(problem, done.format("* 6 = 42", 42)) == 0
  assert task.heuristic(problem, done.format("- 6 = 1", 1)) == 0
  assert task.heuristic(problem, done.format("+ 6 = 12", 12)) == 0
  # Illegal results do not count: 3 / 7 is near 0, and 7 - 3 is less so.
  nothing = task.make_problem([3, 7], 0)
  assert TASKS["countdown"].heuristic(nothing, "") == pytest.approx(0.7)
  assert task.heuristic(nothing, "") == pytest.approx(1 / 5)
  for problem, text in task.demonstrations("optimal", rng(), 20):
    first, _ = text.split("\n")
    assert task.heuristic(problem, text) == 1
    assert task.heuristic(problem, first) == 1  # one step from the target


def test_the_heuristic_of_chains_casts_out_nines():
  task = TASKS["arithmetic"]
  problem = task.make_problem([47, 85, 190], ["+", "-"])
  first = "47 + 85 = 132"
  assert task.heuristic(problem, "") == pytest.approx(1 / 3)
  assert task.heuristic(problem, first + "\n") == pytest.approx(2 / 3)
  assert task.heuristic(problem, f"{first}\n132 - 190 = -58") == 1
  wrong = (
    "47 + 85 = 131",
    "47 + 85 = 142",
    "47 + 85 = 135",
    "47 - 85 = -38",
    "47 + 84 = 131",
    "85 + 47 = 132",
    f"{first}\n131 - 190 = -59",
    f"{first}\n132 - 190 = -58\n-58 + 1 = -57",
    "132",
  )
  for text in wrong:
    assert task.heuristic(problem, text) == 0, text
  # It does not calculate: digits that change places go unseen.
  assert task.heuristic(problem, "47 + 85 = 123") == pytest.approx(2 / 3)
