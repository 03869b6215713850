"""Behaviours in passages labelled by hand, and in hostile texts.

The passages are half for tuning the meter ("dev"), half held out. All were
written and labelled before the meter was.
"""

import json
import pathlib
import time

import hypothesis
import pytest
from hypothesis import strategies as st

from o1jax import behaviors
from o1jax.behaviors import (
  BEHAVIORS,
  COUNTED,
  count_behaviors,
  count_transitions,
  find_equations,
  summarize,
)

PASSAGES = pathlib.Path(__file__).parent / "data" / "behavior_passages.jsonl"
ROWS = [json.loads(line) for line in PASSAGES.read_text().splitlines()]
# Precision and recall on passages that the meter was not tuned on, rounded
# down. They are of some 15 to 23 passages each.
HELDOUT = {
  "problem_analysis": (0.95, 0.95),
  "task_decomposition": (0.85, 0.95),
  "task_completion": (0.95, 0.95),
  "alternative_proposal": (0.9, 0.95),
  "self_evaluation": (0.9, 0.95),
  "self_correction": (0.9, 0.95),
  "false_evaluation": (0.95, 0.85),
  "empty_evaluation": (0.95, 0.95),
}


def accuracy(rows, name):
  """Precision and recall of one behaviour."""
  labels = [name in row["behaviors"] for row in rows]
  found = [count_behaviors(row["text"])[name] > 0 for row in rows]
  hits = sum(a and b for a, b in zip(labels, found, strict=True))
  return hits / max(sum(found), 1), hits / sum(labels)


def test_the_passages_are_enough():
  assert len(ROWS) >= 210
  for part in ("dev", "heldout"):
    rows = [row for row in ROWS if row["part"] == part]
    assert len(rows) >= 100
    assert sum(not row["behaviors"] for row in rows) >= 20  # decoys
  assert len({row["text"] for row in ROWS}) == len(ROWS)
  named = {name for row in ROWS for name in row["behaviors"]}
  assert named == set(COUNTED)


@pytest.mark.parametrize("name", COUNTED)
def test_precision_and_recall(name):
  heldout = [row for row in ROWS if row["part"] == "heldout"]
  found = accuracy(heldout, name)
  assert all(a >= b for a, b in zip(found, HELDOUT[name], strict=True)), found
  dev = [row for row in ROWS if row["part"] == "dev"]
  assert min(accuracy(dev, name)) > 0.8


@pytest.mark.parametrize(
  "text, name",
  [
    ("Let me verify: 12*4 = 48, yes", "self_evaluation"),
    ("Let me verify: 12*4 = 46, yes", "false_evaluation"),
    ("Let me verify: 12*4 = 46, no", "self_evaluation"),
    ("Let me verify: 12*4 = 48, no", "false_evaluation"),
    ("Let me verify: 12*4, yes", "empty_evaluation"),
    ("check 3 * 2 = 6, 6 + 7 = 13, ok", "self_evaluation"),
    ("check 3 * 2 = 6, 6 + 7 = 14, ok", "false_evaluation"),
    ("10 + 2 = 12, not 13", "self_evaluation"),
    ("10 + 2 = 12, not 12", "false_evaluation"),
    ("10 + 2 = 13, not 14", "false_evaluation"),
    ("Check: 10 + 2 = 12, wrong since we need 13", "self_evaluation"),
    ("Check: 10 + 2 = 12, wrong since we need 12", "false_evaluation"),
    ("21, which is less than 24", "self_evaluation"),
    ("24, which is less than 21", "false_evaluation"),
    ("27 is too large since we need 24", "self_evaluation"),
    ("24 is too large since we need 27", "false_evaluation"),
    ("I check it once more.\n9 * 9 = 81.\nYes, right.", "self_evaluation"),
  ],
)
def test_a_check_counts_only_where_it_computes(text, name):
  found = {key for key, count in count_behaviors(text).items() if count}
  assert found == {name}


def test_what_was_claimed_before_may_be_called_wrong():
  # The judgements of the tasks write the right result and say "wrong".
  before = "3 + 7 = 11 (left: 2 11)\n"
  judged = count_behaviors(before + "3 + 7 = 10 wrong")
  assert judged["self_evaluation"] == 1 and not judged["false_evaluation"]
  alone = count_behaviors("3 + 7 = 10 wrong")
  assert alone["false_evaluation"] == 1 and not alone["self_evaluation"]


def test_a_check_stays_open_for_two_sentences():
  text = "Let me check. {}2 + 2 = 4."
  assert count_behaviors(text.format("Now. "))["self_evaluation"] == 1
  late = count_behaviors(text.format("Well. So. "))
  assert late["empty_evaluation"] == 1 and not late["self_evaluation"]
  # A step of the solution is a step.
  step = count_behaviors("Let me check.\n3 + 7 = 10 (left: 2 10)")
  assert step["task_completion"] == 1 and step["empty_evaluation"] == 1


def test_words_of_others_do_not_count():
  text = 'He said "wait, that is wrong, let me check: 1 + 1 = 2, yes" to me.'
  assert not any(count_behaviors(text).values())
  assert count_behaviors(text.replace('"', ""))["self_correction"] == 1


@pytest.mark.parametrize(
  "text, is_true",
  [
    ("3 + 4 = 7", True),
    ("3 + 4 = 8", False),
    ("2 * (3 + 4) = 14", True),
    ("2 * 3 + 4 = 14", False),
    ("10 - 2 - 3 = 5", True),
    ("(3 + 4) - 2 = 5", True),
    ("(3 + 4) - (6 - 1) = 2", True),
    ("24 / 4 / 2 = 3", True),
    ("0 - -9 = 9", True),
    ("-3 * -4 = 12", True),
    ("4 - 9 = -5", True),
    ("1 / 3 = 1/3", True),
    ("6 / 1/3 = 18", True),
    ("2^10 = 1,024", True),
    ("0.5 * 8 = 4", True),
    ("12 times 4 is 48", True),
    ("17 plus 25 equals 43", False),
    ("96 divided by 8 gives 12", True),
    ("13 = 6 + 7", True),
    ("120 / 2.25 = 53.33", True),
    ("120 / 2.25 = 53.3", True),
    ("120 / 2.25 = 53.35", False),
    ("120 / 2.25 = 53", False),
    ("120 / 2.25 \u2248 53", True),
    ("120 / 2.25 \u2248 55", False),
    ("0.1 + 0.2 = 0.4", False),
    ("6 + 1 = 3 + 4", True),
  ],
)
def test_arithmetic_is_computed(text, is_true):
  (found,) = find_equations(text)
  assert found.is_true == is_true
  assert (found.start, found.end) == (0, len(text))


def test_a_word_before_a_number_is_no_sign():
  # Of a trace that another model wrote.
  text = "wait, let me verify: 23 * 50 = 1150, minus 23 * 3 = 69, so 1150 - 69 "
  found = list(find_equations(text + "= 1081. good."))
  assert [one.is_true for one in found] == [True] * 3
  assert count_behaviors(text + "= 1081. Good.")["self_evaluation"] == 1
  assert count_behaviors(text + "= 1080. Good.")["false_evaluation"] == 1


@pytest.mark.parametrize(
  "text, is_correction",
  [
    ("Hmm, let me reconsider.", True),
    ("No, I don't think that's right.", True),
    ("Wait, that's not quite right either. Let me re-examine.", True),
    ("Wait, is the student's logic wrong? Yes.", False),
  ],
)
def test_corrections_of_traces(text, is_correction):
  assert bool(count_behaviors(text)["self_correction"]) == is_correction


def test_a_chain_is_so_many_equations():
  found = list(find_equations("so 2 + 3 = 5 = 6 - 1 and 7 * 7 = 48 (left: 1)"))
  assert [one.is_true for one in found] == [True, True, False]
  assert [one.left for one in found] == ["2+3", "5", "7*7"]
  assert [one.is_result for one in found] == [True, False, True]


@pytest.mark.parametrize(
  "text",
  [
    "5 / 0 = 1",
    "1/0 + 1 = 2",
    "9 ^ 99 = 3",
    "1 ^ 99 = 1",
    "9 ^ 9 ^ 9 ^ 9 ^ 9 ^ 9 ^ 9 = 3",
    f"{'9' * 50} + 1 = 2",
    "1234567890123 - 1234567890122 = 1",
    "(" * 99 + "1" + ")" * 99 + " + 1 = 2",
    "= 3",
    "x = 3",
    "3 = 3",
    "the 3 is 4",
    "2 ^ 1/2 = 1",
    "- - - 3 + = 4",
  ],
)
def test_what_has_no_value_is_no_equation(text):
  assert not list(find_equations(text))


def test_transitions_follow_the_text():
  text = (
    "numbers 3 7 2, target 13\n3 + 7 = 10 (left: 2 10)\n10 + 2 = 12, not 13\n"
    "that fails, back to 3 7 2\ninstead try 3 * 2\n3 * 2 = 6 (left: 7 6)\n"
    "7 + 6 = 13 (left: 13)\ncheck 3 * 2 = 6, 7 + 6 = 13, ok"
  )
  assert count_transitions(text) == {
    ("problem_analysis", "task_completion"): 1,
    ("task_completion", "failed_check"): 1,
    ("failed_check", "self_correction"): 1,
    ("self_correction", "alternative_proposal"): 1,
    ("alternative_proposal", "task_completion"): 1,
    ("task_completion", "passed_check"): 1,
  }
  again = count_transitions(text + "\n" + text)
  assert again["passed_check", "problem_analysis"] == 1
  assert again["task_completion", "passed_check"] == 2
  assert count_transitions("") == {}


def test_a_summary_is_a_mean_over_texts():
  texts = ["3 + 4 = 7\nOops, wrong.", "3 + 4 = 7\n5 + 5 = 10"]
  found = summarize(iter(texts))
  assert found == {
    **{f"behaviors/{name}": 0.0 for name in COUNTED},
    "behaviors/task_completion": 1.5,
    "behaviors/self_correction": 0.5,
    "transitions/task_completion_to_self_correction": 0.5,
  }
  assert summarize([]) == {f"behaviors/{name}": 0.0 for name in COUNTED}


@hypothesis.given(
  st.one_of(
    st.text(),
    st.lists(
      st.sampled_from(
        [*"0123456789+-*/^=()., \n?!\"", "let me check ", "not ", "is ", "12",
         "wait, ", "that's wrong", "(left: ", "1/0", "²", "٣", "\u201c", "yes"]
      )
    ).map("".join),
  )
)  # fmt: skip
@hypothesis.settings(max_examples=300, deadline=None)
def test_no_text_raises(text):
  counts = count_behaviors(text)
  assert list(counts) == list(COUNTED)
  assert all(count >= 0 for count in counts.values())
  count_transitions(text)


@pytest.mark.parametrize("text", [None, 3, b"Wait, that's wrong", ["x"]])
def test_what_is_no_text_shows_nothing(text):
  assert not any(count_behaviors(text).values())


@pytest.mark.parametrize(
  "unit",
  ["(", "1+", "1 = ", "-", "let me check ", "first ", "wait ", "a", " ", "\n",
   "=", '"', "if i make ", "not 1, ", "1.", "(left: ", "so x = ", "9", "!? "],
)  # fmt: skip
def test_time_is_linear_in_the_text(unit):
  """Nothing to backtrack over; a quadratic pattern would take minutes."""
  start = time.process_time()
  count_behaviors(unit * (behaviors.MAX_TEXT // 4 // len(unit)))
  assert time.process_time() - start < 2.0


def test_a_long_text_is_cut():
  line = "3 + 4 = 7\n"
  fits = behaviors.MAX_TEXT // len(line)
  counts = count_behaviors(line * (fits + 500))
  assert counts["task_completion"] == fits


def test_a_long_sentence_is_read_to_its_end():
  text = "well, " * behaviors.MAX_SENTENCE + "3 + 4 = 7"
  assert count_behaviors(text)["task_completion"] == 1


def test_names_are_those_of_the_paper():
  assert len(BEHAVIORS) == 6 and COUNTED[:6] == BEHAVIORS
