"""The verifier against a plain loop over the checker."""

import os

import pytest

from o1jax.reward import outcome
from o1jax.types import Problem, Verdict


def make_problem(name):
  return Problem(id=name, task="toy", prompt=f"{name}?", data={"answer": name})


def check(problem, text):
  """Correct where the text is the problem's answer; dislikes "bad"."""
  if text == "bad":
    raise KeyError("left")
  if text == "die":
    os._exit(1)
  is_correct = text == problem.data["answer"]
  return Verdict(is_correct, "correct" if is_correct else "wrong", text)


class CountingChecker:
  def __init__(self):
    self.calls = []

  def __call__(self, problem, text):
    self.calls.append((problem.id, text))
    return check(problem, text)


ASKED = [("a", "a"), ("b", "a"), ("a", "a"), ("a", "b"), ("b", "b")]


def pairs(asked):
  return [make_problem(name) for name, _ in asked], [text for _, text in asked]


def test_verdicts_are_the_checkers_and_each_text_is_checked_once():
  checker = CountingChecker()
  verifier = outcome.Verifier(checker)
  problems, texts = pairs(ASKED)
  expected = [check(p, text) for p, text in zip(problems, texts, strict=True)]
  assert verifier.check(problems, texts) == expected
  assert checker.calls == [("a", "a"), ("b", "a"), ("a", "b"), ("b", "b")]
  assert verifier.check(problems[::-1], texts[::-1]) == expected[::-1]
  assert len(checker.calls) == 4


def test_a_checker_that_raises_gives_a_verdict():
  verifier = outcome.Verifier(check)
  problems, texts = pairs([("a", "bad"), ("a", "a"), ("a", "bad")])
  verdicts = verifier.check(problems, texts)
  assert [v.is_correct for v in verdicts] == [False, True, False]
  assert verdicts[0].reason == "checker error: KeyError: 'left'"
  assert verdicts[0].answer is None


def test_memory_is_bounded_and_forgets_the_oldest_first():
  checker = CountingChecker()
  verifier = outcome.Verifier(checker, max_verdicts=2)
  problems, texts = pairs([("a", "x"), ("a", "y"), ("a", "z"), ("a", "a")])
  verdicts = verifier.check(problems, texts)
  assert [v.answer for v in verdicts] == ["x", "y", "z", "a"]
  checker.calls.clear()
  assert verifier.check(problems, texts) == verdicts
  assert checker.calls == [("a", "x"), ("a", "y")]


def test_unequal_lists_and_bad_limits_are_refused():
  with pytest.raises(ValueError, match="2 problems but 1 texts"):
    outcome.Verifier(check).check([make_problem("a")] * 2, ["a"])
  with pytest.raises(ValueError, match="num_workers=-1"):
    outcome.Verifier(check, num_workers=-1)


def test_processes_give_the_verdicts_of_one_process_in_order():
  asked = [(f"p{i % 7}", f"p{i % 11}") for i in range(60)] + [("p1", "bad")]
  problems, texts = pairs(asked)
  expected = outcome.Verifier(check).check(problems, texts)
  with outcome.Verifier(check, num_workers=2) as verifier:
    assert verifier.check(problems, texts) == expected
    with pytest.raises(RuntimeError, match="process died .* num_workers=0"):
      verifier.check([make_problem("a")], ["die"])
