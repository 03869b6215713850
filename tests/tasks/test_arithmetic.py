"""Chains of sums and differences."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from o1jax.tasks import make_task, success_rate

RIGHT = "47 + 85 = 132\n132 - 19 = 113"


def rng(seed=0):
  return np.random.default_rng(seed)


@pytest.fixture
def problem():
  return make_task("arithmetic").make_problem([47, 85, 19], ["+", "-"])


def test_problem(problem):
  assert problem.prompt == "47 + 85 - 19 =\n"
  assert problem.id == "arithmetic/47+85-19"


@pytest.mark.parametrize("ops", ["+", "-", "+-", "*"])
def test_demonstrations_are_right(ops):
  task = make_task("arithmetic", ops=ops, num_terms=5, max_digits=4)
  pairs = task.demonstrations("optimal", rng(), 200)
  assert success_rate(task, *zip(*pairs, strict=True)) == 1.0
  assert all(all(task.judge_steps(*pair)) for pair in pairs)
  for problem, text in pairs:
    total = problem.data["terms"][0]
    for op, term in zip(
      problem.data["ops"], problem.data["terms"][1:], strict=True
    ):
      assert op in ops
      total = {"+": total + term, "-": total - term, "*": total * term}[op]
    assert text.endswith(f" = {total}")
    assert task.check(problem, str(total)).is_correct
    assert task.solutions(problem) == [text]


@pytest.mark.parametrize(
  "text, reason, answer",
  [
    ("", "unfinished, 2 steps missing", None),
    ("47 + 85 = 132", "unfinished, 1 steps missing", "132"),
    (RIGHT[:-1], "wrong result 132 - 19 = 11", "11"),
    (RIGHT + "3", "wrong result 132 - 19 = 1133", "1133"),
    (RIGHT + "\n113", "text after the answer", "113"),
    (RIGHT + " yes", "unreadable step", None),
    (
      "47 + 85 = 122\n122 - 19 = 113",
      "wrong result 47 + 85 = 122",
      "113",
    ),
    ("47 + 86 = 133\n133 - 20 = 113", "illegal step 47 + 86 = 133", "113"),
    ("112", "112, not 113", "112"),
    ("0113", "0113, not 113", "0113"),
    ("47 + 85 - 19 = 113", "unreadable step", None),
    ("1" * 20_000, "too long", None),
  ],
)
def test_refuses(problem, text, reason, answer):
  verdict = make_task("arithmetic").check(problem, text)
  assert not verdict.is_correct
  assert (verdict.reason, verdict.answer) == (reason, answer)


def test_accepts(problem):
  task = make_task("arithmetic")
  for text in (RIGHT, RIGHT + "\n", "113"):
    verdict = task.check(problem, text)
    assert verdict.is_correct and verdict.answer == "113"


@hypothesis.settings(deadline=None, derandomize=True, database=None)
@hypothesis.given(st.text(max_size=100) | st.text("0123456789+-= \n"))
def test_never_raises(text):
  task = make_task("arithmetic")
  problem = task.make_problem([47, 85, 19], ["+", "-"])
  assert not task.check(problem, text).is_correct or text.strip() == "113"
  task.judge_steps(problem, text)


def test_judge_steps_and_reach(problem):
  task = make_task("arithmetic")
  assert task.judge_steps(problem, RIGHT) == [True, True]
  wrong = "47 + 85 = 122\n122 - 19 = 103\n103 + 1 = 104"
  assert task.judge_steps(problem, wrong) == [False, False, False]
  assert task.can_reach(problem, "47 + 85 = 132\n")
  assert not task.can_reach(problem, "47 + 85 = 122\n")
  assert task.true_value(problem, "47 + 85 = 132\n") == 1.0
  assert task.true_value(problem, wrong) == 0.0
  assert task.relabel(problem, wrong) is None


def test_splits_share_no_terms():
  task = make_task("arithmetic", max_digits=1, num_terms=3)
  train = task.sample_problems(rng(), 2000)
  train += [problem for problem, _ in task.demonstrations("optimal", rng(), 99)]
  heldout = task.heldout_problems(50)
  found = [
    {tuple(sorted(problem.data["terms"])) for problem in problems}
    for problems in (train, heldout)
  ]
  assert not found[0] & found[1]
  assert len(found[1]) > 5


def test_digit_counts_are_uniform():
  task = make_task("arithmetic", max_digits=3, heldout=0.0)
  terms = np.array([p.data["terms"] for p in task.sample_problems(rng(), 2000)])
  for low, high in ((0, 9), (10, 99), (100, 999)):
    share = np.mean((terms >= low) & (terms <= high))
    assert abs(share - 1 / 3) < 0.04
  assert terms.min() == 0 and terms.max() > 990


def test_parse(problem):
  task = make_task("arithmetic")
  assert task.parse("47 + 85 - 19 =\n") == task.parse("47+85-19") == problem
  for text in ("", "47", "47 +", "47 / 2", "47 + x", "47 + 85 = 132"):
    with pytest.raises(ValueError, match="not an arithmetic problem"):
      task.parse(text)
  with pytest.raises(ValueError, match="mixes"):
    task.parse("2 * 3 + 4")
  with pytest.raises(ValueError, match="at most 20 numbers of at most 9"):
    task.parse("1 + 1234567890")


@pytest.mark.parametrize(
  "options, message",
  [
    ({"num_terms": 1}, "num_terms=1"),
    ({"max_digits": 10}, "max_digits=10"),
    ({"ops": "+*"}, "ops="),
    ({"ops": ""}, "ops="),
    ({"heldout": 1.5}, "heldout=1.5"),
  ],
)
def test_refuses_options(options, message):
  with pytest.raises(ValueError, match=message):
    make_task("arithmetic", **options)


def test_refuses_kinds_it_does_not_have():
  with pytest.raises(ValueError, match="known: optimal"):
    make_task("arithmetic").demonstrations("random_play", rng(), 1)
  with pytest.raises(ValueError, match="nothing is held out"):
    make_task("arithmetic", heldout=0.0).heldout_problems(1)


def test_refuses_a_split_without_problems():
  task = make_task("arithmetic", heldout=1e-9)
  with pytest.raises(ValueError, match="the heldout split has no problems"):
    task.sample_problems(rng(), 1, "heldout")
