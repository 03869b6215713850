"""The checker: what it accepts, what it must refuse, and untrusted text."""

import json
import time

import hypothesis
import pytest
from hypothesis import strategies as st

from o1jax.tasks import numbers_text
from o1jax.tasks.numbers_text import check_text

FUZZ = hypothesis.settings(
  max_examples=200, deadline=None, derandomize=True, database=None
)

RIGHT = "3 * 2 = 6 (left: 7 6)\n7 + 6 = 13 (left: 13)"


@pytest.mark.parametrize(
  "text",
  [
    RIGHT,
    RIGHT + "\n",
    "3 * 2 = 6 (left: 6 7)\n7 + 6 = 13 (left: 13)",  # any order
    "3 / 2 = 3/2 (left: 7 3/2)\nback (left: 2 7 3)\n"
    "2 * 3 = 6 (left: 7 6)\n6 + 7 = 13 (left: 13)",
    "3 * 2 + 7",
    "7 + 3*2 = 13",
    "(7 + (2*3))",
    "7 + 3 \\times 2",
    "7 + 3 \u00d7 2",
    "thinking...\n<answer>7 + 3 * 2</answer>",
    "First 5, then \\boxed{7 + 3 \\cdot 2}.\n</answer><|eot_id|>",
    "$\\boxed{7 + 3 * 2 = 13}$",
    f"<answer>\n{RIGHT}\n</answer>",
    "\\boxed{1} no: \\boxed{7 + 3 * 2}\n</",
  ],
)
def test_accepts(text):
  verdict = check_text([3, 7, 2], 13, text)
  assert verdict.is_correct, verdict
  assert verdict.reason == "correct" and verdict.answer == "7 + (2 * 3)"


@pytest.mark.parametrize(
  "text, reason, answer",
  [
    ("", "empty", None),
    ("3 + 7 = 10 (left: 2 10)", "unfinished, 2 numbers left", None),
    (
      "3 + 7 = 10 (left: 2 10)\n10 + 2 = 12 (left: 12)",
      "reaches 12, not 13",
      "2 + 3 + 7",
    ),
    (
      "3 + 8 = 11 (left: 7 11)\n2 + 11 = 13 (left: 13)",
      "illegal number 8",
      "2 + 3 + 8",
    ),
    (
      "3 + 3 = 6 (left: 7 6)\n7 + 6 = 13 (left: 13)",
      "illegal number 3",
      "3 + 3 + 7",
    ),
    (
      "3 + 7 = 11 (left: 2 11)\n11 + 2 = 13 (left: 13)",
      "wrong result 3 + 7 = 11",
      "2 + 3 + 7",
    ),
    (
      "3 * 2 = 6 (left: 6)\n6 + 7 = 13 (left: 13)",
      "wrong remaining numbers",
      "7 + (2 * 3)",
    ),
    (
      "3 * 2 = 6 (left: 7 6 7)\n6 + 7 = 13 (left: 13)",
      "wrong remaining numbers",
      "7 + (2 * 3)",
    ),
    (RIGHT[:-1], "unreadable step", None),
    (RIGHT[:30], "unreadable step", None),
    (
      RIGHT + "\n13 * 1 = 13 (left: 13)",
      "text after the answer",
      "1 * (7 + (2 * 3))",
    ),
    (RIGHT + "\nback (left: 3 7 2)", "text after the answer", None),
    (RIGHT + "\nso 13", "text after the answer", None),
    (RIGHT + " yes", "unreadable step", None),
    (
      "3  * 2 = 6 (left: 7 6)\n7 + 6 = 13 (left: 13)",
      "unreadable step",
      "6 + 7",
    ),
    (
      "3 * 2 = 6 (left: 7 6)\nback (left: 3 6)",
      "back to numbers that never stood there",
      None,
    ),
    ("back (left: 3 7 2)", "back to numbers that never stood there", None),
    ("7 - 7 = 0 (left: 3 2)", "illegal number 7", None),
    ("3 + 7 = 10", "number 2 not used", "3 + 7"),
    ("13", "illegal number 13", "13"),
    ("7 + 3 + 3", "illegal number 3", "3 + 3 + 7"),
    ("7 + 3 * 2 = 14", "wrong result 7 + 3 * 2 = 14", "7 + (2 * 3)"),
    ("7 + 3 - 2", "reaches 8, not 13", "3 + 7 - 2"),
    ("7 / 3 * 2", "reaches 14/3, not 13", "2 * 7 / 3"),
    ("7 / (3 - 3)", "illegal step 7 / 0", "7 / (3 - 3)"),
    ("7 + 3 * 2 = 13 = 13", "unreadable result", None),
    ("7 + 3 * 2 = 13.0", "unreadable result", None),
    ("13 = 7 + 3 * 2", "unreadable result", None),
    ("7 + 3 ** 2", "unreadable expression", None),
    ("7 + 3 // 2", "unreadable expression", None),
    ("7 + 3(2)", "unreadable expression", None),
    ("-2 + 15", "unreadable expression", None),
    ("7 + 3 * 2 # yes", "unreadable expression", None),
    ("7 + 03 * 2", "unreadable number 03", None),
    ("(7 + 3 * 2", "unreadable expression", None),
    ("7 + 3 * 2)", "unreadable expression", None),
    ("7 + 3 * \u0662", "unreadable expression", None),
    ("7 + 1e0*6", "unreadable expression", None),
    ("__import__('os')", "unreadable expression", None),
    ("\\boxed{7 + 3 * 2} or 7", "text after the answer", None),
    ("<answer>7 + 3 * 2</answer> or not", "text after the answer", None),
    ("\\boxed{7 + 3 * 2", "empty", None),
    ("<answer>7 + 3 * 2", "empty", None),
    ("<answer>7 + 3 * 2</answ", "empty", None),
    ("\\boxed{}", "empty", None),
    ("x" * 200_000, "too long", None),
    ("(" * 300, "too many brackets", None),
    ("1" * 300, "unreadable expression", None),
    ("1+" * 1000 + "1", "too long", None),
  ],
)
def test_refuses(text, reason, answer):
  verdict = check_text([3, 7, 2], 13, text)
  assert not verdict.is_correct
  assert (verdict.reason, verdict.answer) == (reason, answer)


def test_refuses_what_only_floats_believe():
  # (1/49) * 49 is 1 in fractions and not in floats; 1e16 + 1 is not 1e16.
  assert check_text([1, 49, 49], 1, "1 / 49 * 49").is_correct
  big = 10**11
  text = f"{big} * 10 + 1 - 1"
  assert check_text([big, 10, 1, 1], 10**12, text).is_correct
  text = f"({big} * {big} + 1) / {big}"
  assert not check_text([big, big, 1, big], big, text).is_correct
  near = "333333333333 / 999999999999 * 3"
  assert check_text([333333333333, 999999999999, 3], 1, near).is_correct
  near = "333333333334 / 999999999999 * 3"
  numbers = [333333333334, 999999999999, 3]
  assert not check_text(numbers, 1, near).is_correct


@pytest.mark.parametrize(
  "numbers, target, text, is_correct",
  [
    ([3, 7, 2], 13, RIGHT, True),
    ([3, 7, 2], 6, "3 - 7 = -4 (left: 2 -4)\n2 - -4 = 6 (left: 6)", False),
    ([6, 4, 2], 3, "6 / 4 = 3/2 (left: 2 3/2)\n2 * 3/2 = 3 (left: 3)", False),
    ([6, 4, 2], 3, "6 / 4 * 2", False),
    ([6, 4, 2], 3, "6 * 2 / 4", True),
    ([3, 7, 2], 6, "2 - (3 - 7)", False),
  ],
)
def test_integers_only(numbers, target, text, is_correct):
  assert check_text(numbers, target, text).is_correct
  verdict = check_text(numbers, target, text, integers_only=True)
  assert verdict.is_correct == is_correct
  assert is_correct or verdict.reason.startswith("illegal step")


@pytest.mark.parametrize(
  "text, value",
  [("7", 7), ("-4", -4), ("7/3", "7/3"), ("0", 0)],
)
def test_reads_normal_forms(text, value):
  assert str(numbers_text.read_number(text)) == str(value)


@pytest.mark.parametrize(
  "text", ["07", "14/6", "4/2", "-0", "3/0", "3/00", "7/-3", "+7", "", "1.0"]
)
def test_reads_no_other_form(text):
  assert numbers_text.read_number(text) is None


def test_lines_after_a_wrong_one_are_judged_by_what_it_claims():
  text = "3 + 7 = 11 (left: 2 11)\n11 + 2 = 13 (left: 13)"
  steps = numbers_text.judge_lines([3, 7, 2], 13, text, False)
  assert [step.reason for step in steps] == ["wrong result 3 + 7 = 11", ""]
  text = "what\n3 * 2 = 6 (left: 7 6)"
  steps = numbers_text.judge_lines([3, 7, 2], 13, text, False)
  assert [step.reason for step in steps] == ["unreadable step", ""]


@pytest.mark.parametrize(
  "prefix, left",
  [
    ("", (3, 7, 2)),
    ("3 + 7 = 10 (left: 2 10)\n", (2, 10)),
    ("3 + 7 = 10 (left: 10 2)", (10, 2)),
    ("3 + 7 = 10 (left: 2 10)\nback (left: 3 7 2)\n", (3, 7, 2)),
    ("3 + 7 = 11 (left: 2 11)\n", None),
    ("3 + 7 = 10 (left", None),
  ],
)
def test_state_after(prefix, left):
  assert numbers_text.state_after([3, 7, 2], prefix, False) == left


PIECES = st.sampled_from(
  "3 7 2 13 6 + - * / = ( ) (left: back \n 3/2 0 ** \\boxed{ } <answer> "
  "</answer> \\times \\left( 99999999999999999999999999".split(" ")
)


@FUZZ
@hypothesis.given(st.lists(PIECES, max_size=40), st.booleans())
def test_never_raises_on_pieces(pieces, integers_only):
  check_text([3, 7, 2], 13, " ".join(pieces), integers_only)
  check_text([3, 7, 2], 13, "".join(pieces), integers_only)


@FUZZ
@hypothesis.given(st.text(max_size=200))
def test_never_raises_on_text(text):
  verdict = check_text([3, 7, 2], 13, text)
  assert verdict.is_correct in (True, False) and verdict.reason
  list(numbers_text.judge_lines([3, 7, 2], 13, text, False))


@FUZZ
@hypothesis.given(st.data())
def test_one_changed_character_is_not_accepted(data):
  place = data.draw(st.integers(0, len(RIGHT) - 1))
  character = data.draw(st.sampled_from("0123456789+-*/=() \nx"))
  text = RIGHT[:place] + character + RIGHT[place + 1 :]
  hypothesis.assume(text != RIGHT)
  assert not check_text([3, 7, 2], 13, text).is_correct


@pytest.mark.parametrize(
  "text",
  [
    "(left: 1 " * 11_000,
    "\\boxed{" * 14_000,
    "\\boxed{7}" + "</" * 49_000,
    "\\boxed{7}" + " $" * 49_000 + "x",
    "1/" * 49_000 + "(left: 1)",
    "3 * 2 = 6 (left: 7 6)\nback (left: 3 7 2)\n" * 2_300,
    "9" * 24 + " * " + "9" * 24 + " = 1 (left: " + "9 " * 40_000 + ")",
  ],
)
def test_hostile_texts_cost_little(text):
  start = time.process_time()
  assert not check_text([3, 7, 2], 13, text).is_correct
  assert time.process_time() - start < 1.0  # about 0.01 in fact


def test_agrees_with_labels_of_model_outputs(test_data):
  path = test_data / "model_outputs" / "countdown_llada_dev.jsonl"
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert len(rows) == 378
  for row in rows:
    problem = row["nums"], row["target"]
    raw = check_text(*problem, row["output"])
    assert raw.is_correct == bool(row["label_here"]), row["id"]
    if row["extracted_here"] is not None:
      extracted = check_text(*problem, row["extracted_here"])
      assert extracted.is_correct == bool(row["label_here"]), row["id"]
  assert sum(row["label_here"] is True for row in rows) == 75


@pytest.mark.parametrize(
  "text, number",
  [
    (RIGHT, "13"),
    (RIGHT.replace("= 13 (left: 13)", "= 14 (left: 14)"), "14"),
    ("3 / 7 = 3/7 (left: 2 3/7)\n3/7 - 2 = -11/7 (left: -11/7)", "-11/7"),
    ("<answer>7 / 3 * 2 = 5</answer>", "14/3"),
    ("3 + 7 = 10 (left: 2 10)", None),
    (RIGHT[:-1], None),
    ("7 / (3 - 3)", None),
    ("7 +", None),
    ("", None),
    ("\\boxed{7} or not", None),
    ("x" * 200_000, None),
  ],
)
def test_claimed_number(text, number):
  assert numbers_text.claimed_number(text) == number
