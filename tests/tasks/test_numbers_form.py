"""Normal forms: which texts vote together, and what is read of wrong ones."""

import itertools
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from o1jax.tasks import numbers_form, numbers_play, numbers_text

FUZZ = hypothesis.settings(
  max_examples=100, deadline=None, derandomize=True, database=None
)


def read(text, numbers=(3, 7, 2)):
  """The answer of a text; the target must not matter to it."""
  answers = {
    numbers_text.check_text(numbers, target, text).answer
    for target in (12, 13, 999)
  }
  assert len(answers) == 1
  return answers.pop()


# Trees are numbers or (a, op, b).


def form(tree):
  if isinstance(tree, int):
    return numbers_form.leaf(tree)
  return numbers_form.join(form(tree[0]), tree[1], form(tree[2]))


def trees(numbers):
  if len(numbers) == 1:
    yield numbers[0]
  for cut in range(1, len(numbers)):
    parts = trees(numbers[:cut]), trees(numbers[cut:])
    for a, b in itertools.product(*map(list, parts)):
      yield from ((a, op, b) for op in "+-*/")


def rewritten(tree):
  """All trees one law away, at the root or below it."""
  if isinstance(tree, int):
    return
  a, op, b = tree
  for plus, minus in ("+-", "*/"):
    if op == plus:
      yield b, plus, a
      if isinstance(a, tuple) and a[1] == plus:  # (x + y) + b
        yield a[0], plus, (a[2], plus, b)
      if isinstance(a, tuple) and a[1] == minus:  # (x - y) + b
        yield (a[0], plus, b), minus, a[2]
    if op == minus and isinstance(b, tuple):
      if b[1] == plus:  # a - (x + y)
        yield (a, minus, b[0]), minus, b[2]
      if b[1] == minus:  # a - (x - y)
        yield (a, plus, b[2]), minus, b[0]
  yield from ((other, op, b) for other in rewritten(a))
  yield from ((a, op, other) for other in rewritten(b))


# 6 and 68 expressions of two and three operands have different values (OEIS
# A140606); of four, some have one value by laws of signs, which are no laws
# here.
@pytest.mark.parametrize(
  "numbers, count", [((3, 7), 6), ((3, 7, 2), 68), ((3, 7, 2, 12), None)]
)
def test_forms_are_the_classes_of_the_laws(numbers, count):
  everything = [
    tree for row in itertools.permutations(numbers) for tree in trees(row)
  ]
  leader = {tree: tree for tree in everything}

  def find(tree):
    while leader[tree] != tree:
      tree = leader[tree]
    return tree

  for tree in everything:
    for other in rewritten(tree):
      leader[find(other)] = find(tree)
  texts = {tree: form(tree).text() for tree in everything}
  classes = {(find(tree), text) for tree, text in texts.items()}
  assert len(classes) == len(set(texts.values()))  # no law changes the form
  assert len(classes) == len({find(tree) for tree in everything})  # all shown
  assert count is None or len(classes) == count
  # A form is an expression whose form it is.
  for text in set(texts.values()):
    assert read(text, numbers) == text


@pytest.mark.parametrize(
  "text, answer",
  [
    ("3 + (7 + 2)", "2 + 3 + 7"),
    ("7 - 2 + 3", "3 + 7 - 2"),
    ("3 - (2 - 7) = 99", "3 + 7 - 2"),
    ("7 * 2 / 3", "2 * 7 / 3"),
    ("7 / (3 / 2)", "2 * 7 / 3"),
    ("7 / (3 - 3)", "7 / (3 - 3)"),  # has no value and is an answer
    ("7 / 3 / 2", "7 / 2 / 3"),
    ("((7))", "7"),
    ("12 + 3 * 7 + 2", "2 + 12 + (3 * 7)"),
    ("(3 + 7) * (3 - 7)", "(3 + 7) * (3 - 7)"),
    ("(3 - 7) * (2 - 5)", "(2 - 5) * (3 - 7)"),  # signs are left alone
    ("(7 - 3) * (5 - 2)", "(5 - 2) * (7 - 3)"),
    ("7 +", None),
    ("", None),
  ],
)
def test_expressions(text, answer):
  assert read(text) == answer


@pytest.mark.parametrize(
  "text, answer",
  [
    ("3 + 7 = 10 (left: 2 10)\n10 + 2 = 12 (left: 12)", "2 + 3 + 7"),
    ("2 + 7 = 9 (left: 3 9)\n3 + 9 = 12 (left: 12)", "2 + 3 + 7"),
    ("3 - 7 = -4 (left: 2 -4)\n2 - -4 = 6 (left: 6)", "2 + 7 - 3"),
    ("7 / 2 = 7/2 (left: 3 7/2)\n3 * 7/2 = 21/2 (left: 21/2)", "3 * 7 / 2"),
    # False arithmetic: the claims are followed.
    ("3 + 7 = 11 (left: 2 11)\n11 + 2 = 13 (left: 13)", "2 + 3 + 7"),
    ("3 + 7 = 10 (left: 2 10)\n10 + 2 = 13 (left: 13)", "2 + 3 + 7"),
    # Numbers from nowhere are leaves, as are those that a line left out.
    ("3 + 8 = 11 (left: 7 11)\n2 + 11 = 13 (left: 13)", "2 + 3 + 8"),
    ("3 + 7 = 10 (left: 10)\n10 + 2 = 12 (left: 12)", "2 + 3 + 7"),
    ("3 + 7 = 10 (left: 2 9)\n9 + 2 = 11 (left: 11)", "2 + 9"),
    ("3 + 7 = 10 (left: 2 10)\n9 + 7/2 = 5 (left: 5)", "9 + 7/2"),
    ("3 * 2 = 6 (left: 7 6 7)\n6 + 7 = 13 (left: 13)", "7 + (2 * 3)"),
    ("3 + 7 = 10 (left: 10)", "3 + 7"),
    ("3 + 7 = 10 (left: 4)", "4"),
    # Lines that cannot be read are stepped over, but not the last one.
    ("so\n3 + 7 = 10 (left: 2 10)\nand\n10 - 2 = 8 (left: 8)", "3 + 7 - 2"),
    ("3 + 7 = 10 (left: 2 10)\n10 + 2 = 12", None),
    ("3 + 7 = 10 (left: 2 10)\n10 + 2 = 12 (left: 12)\nso 12", None),
    ("3 + 7 = 10 (left: 2 10)", None),
    ("3 + 7 = 10 (left: 2 10)\n10 + 2 = 12 (left: 012)", None),
    # Traces: the last path.
    (
      "3 / 2 = 3/2 (left: 7 3/2)\n7 - 3/2 = 11/2 (left: 11/2)\n"
      "back (left: 2 7 3)\n2 * 3 = 6 (left: 7 6)\n6 + 7 = 13 (left: 13)",
      "7 + (2 * 3)",
    ),
    (
      "2 * 3 = 6 (left: 7 6)\n7 - 6 = 1 (left: 1)\n"
      "back (left: 7 6)\n6 + 7 = 13 (left: 13)",
      "7 + (2 * 3)",
    ),
    (
      "2 * 3 = 6 (left: 7 6)\nback (left: 5 5)\n6 + 7 = 13 (left: 13)",
      "7 + (2 * 3)",
    ),
    ("2 * 3 = 6 (left: 7 6)\n6 + 7 = 13 (left: 13)\nback (left: 7 6)", None),
  ],
)
def test_steps(text, answer):
  assert read(text) == answer
  assert read(f"<answer>{text}</answer>") == answer


def test_equal_numbers_are_told_apart_by_their_forms():
  # Either 10 may be the one that is doubled; the order left does not matter.
  end = "2 * 10 = 20 (left: 10 20)\n10 + 20 = 30 (left: 30)"
  for left in ("10 2 10", "10 10 2"):
    text = f"3 + 7 = 10 (left: {left})\n{end}"
    assert read(text, (3, 7, 10, 2)) == "3 + 7 + (2 * 10)"
  # One 10 more than there can be: the smallest form is that number itself.
  text = f"3 + 7 = 10 (left: 10 10 2)\n{end}"
  assert read(text) == "3 + 7 + (2 * 10)"
  # A dead end takes nothing from the state it goes back to.
  text = "2 * 2 = 4 (left: 3 4)\nback (left: 2 2 3)\n2 + 2 = 4 (left: 3 4)\n"
  assert read(text + "3 + 4 = 7 (left: 7)", (2, 2, 3)) == "2 + 2 + 3"


def as_expression(numbers, text):
  """One expression for a text of right steps; equal numbers are not allowed."""
  written = {str(number): str(number) for number in numbers}
  for line in text.split("\n"):
    a, op, b, _, result, *_ = line.split(" ")
    expression = f"({written.pop(a)} {op} {written.pop(b)})"
    assert result not in written
    written[result] = expression
  (expression,) = written.values()
  return expression


def test_steps_and_expressions_vote_together():
  rng = np.random.default_rng(0)
  numbers = rng.permuted(np.tile([101, 1009, 31, 7], (300, 1)), axis=1)
  texts = numbers_play.random_plays(rng, numbers, False).texts()
  found = set()
  for row, text in zip(numbers.tolist(), texts, strict=True):
    answer = read(text, row)
    assert answer == read(as_expression(row, text), row)
    found.add(answer)
  assert 100 < len(found) < 300


def test_a_path_without_end_has_no_answer():
  assert numbers_form.Path([3, 7]).answer() is None
  assert numbers_form.Path([3]).answer() == "3"
  dead_end = "3 + 7 = 10 (left: 2 10)\nback (left: 3 7 2)\n"
  end = "3 * 2 = 6 (left: 7 6)\n7 + 6 = 13 (left: 13)"
  most = numbers_text.MAX_LINES // 2
  assert read(dead_end * (most - 1) + end) == "7 + (2 * 3)"
  assert read(dead_end * most + end) is None
  dead_end = dead_end.replace("2 10", "10")  # the last line read is an end
  assert read("so\n" + dead_end * most + end) is None


def test_large_forms_are_no_answers():
  most = numbers_form.MAX_OPERANDS
  assert read(" + ".join(["1"] * most)) == " + ".join(["1"] * most)
  assert read(" + ".join(["1"] * (most + 1))) is None
  lines = ["1 + 1 = 1 (left: 1)"] * most
  assert read("\n".join(lines[:-1])) == " + ".join(["1"] * most)
  assert read("\n".join(lines)) is None


@pytest.mark.parametrize(
  "text",
  [
    "1 + 2 = 3 (left: 3)\n3 * 2 = 3 (left: 3)\n" * 495 + "1 + 1 = 1 (left: 1)",
    "1 + 1 = 1 (left: 1" + " 1" * 9_000 + ")\n"
    "1 + 1 = 1 (left: 1" + " 1" * 9_000 + ")\n1 + 1 = 1 (left: 1)",
    "1 + 1 = 1 (left: 1" + " 1" * 9_000 + ")\n1 + 1 = 1 (left: 5 6)\n"
    + "back (left: 5 7)\n" * 900 + "1 + 1 = 1 (left: 1)",
    ("1 + 1 = 1 (left: 5" + " 1" * 10 + ")\n") * 490
    + ("back (left: 6" + " 1" * 10 + ")\n") * 490 + "1 + 1 = 1 (left: 1)",
    "(" * 39 + "1" + "+1)" * 39 + "*1" * 90,
  ],
)  # fmt: skip
def test_hostile_texts_cost_little(text):
  start = time.process_time()
  verdict = numbers_text.check_text([3, 7, 2], 13, text)
  assert time.process_time() - start < 1.0  # about 0.02 in fact
  assert verdict.answer is None or len(verdict.answer) < 2_000


NUMBERS = st.sampled_from(["3", "7", "2", "5", "-4", "7/3", "10", "07"])
LINES = st.one_of(
  st.tuples(
    NUMBERS, st.sampled_from("+-*/"), NUMBERS, NUMBERS, st.lists(NUMBERS)
  ).map(lambda p: f"{p[0]} {p[1]} {p[2]} = {p[3]} (left: {' '.join(p[4])})"),
  st.lists(NUMBERS).map(lambda left: f"back (left: {' '.join(left)})"),
)


@FUZZ
@hypothesis.given(st.lists(LINES, max_size=12), NUMBERS)
def test_any_claims_are_read(lines, last):
  text = "\n".join([*lines, f"3 + 7 = {last} (left: {last})"])
  answer = read(text)
  assert (answer is None) == (last == "07")
