"""Texts of trees, drawn by hand and searched."""

import jax
import numpy as np
import pytest

from o1jax import behaviors, learned_texts
from o1jax import mesh as mesh_lib
from o1jax.linearize import linearize, linearized
from o1jax.searched import FoundSolution, Searched, path_of
from o1jax.solver import Solver
from o1jax.tasks import make_task
from o1jax.types import Verdict
from policies import ToyTask, tiny_params, tiny_policy

TASK = make_task("countdown", num_numbers=3, min_number=1, max_number=9)
PROBLEM = TASK.make_problem([3, 7, 2], 13)
# Node -> parent, step, visits. 2, 3, 5 and 8 are wrong ends, 7 is right.
STEPS = {
  1: (0, "3 + 7 = 10 (left: 2 10)\n", 9),
  2: (1, "10 - 2 = 8 (left: 8)", 2),
  3: (1, "10 + 2 = 12 (left: 12)", 5),
  4: (0, "3 * 2 = 6 (left: 7 6)\n", 8),
  5: (4, "7 - 6 = 1 (left: 1)", 3),
  6: (0, "3 - 2 = 1 (left: 7 1)\n", 4),  # never followed to an end
  7: (4, "7 + 6 = 13 (left: 13)", 4),
  8: (4, "7 * 6 = 42 (left: 42)", 1),
}
RIGHT = "3 * 2 = 6 (left: 7 6)\n7 + 6 = 13 (left: 13)"


def tree(steps=STEPS, selected=None, is_finished=True):
  count = len(steps) + 1
  parent = np.full(count, -1)
  texts = [""] * count
  for node, (above, text, _) in steps.items():
    parent[node], texts[node] = above, text
  nodes = {"parent": parent, "texts": texts}
  nothing = np.zeros(1, np.float32)
  solutions = [
    FoundSolution(
      node=node,
      text="".join(texts[n] for n in path_of(parent, node)),
      path=path_of(parent, node),
      tokens=np.ones(1, np.int32),
      behavior_log_probs=nothing,
      policy_log_probs=nothing,
      is_finished=is_finished,
      outcome=0.5,
      num_visits=visits,
    )
    for node, (_, text, visits) in steps.items()
    if not text.endswith("\n")
  ]
  return Searched(PROBLEM, solutions, selected, nodes, {})


def judge(searched):
  return [TASK.check(PROBLEM, one.text) for one in searched.solutions]


def verdicts_of(searched):
  nodes = [one.node for one in searched.solutions]
  return dict(zip(nodes, judge(searched), strict=True))


def text_of(searched, **limits):
  limits = {"max_dead_ends": 9} | limits
  pair = linearize(searched, verdicts_of(searched), **limits)
  return None if pair is None else pair[1]


def test_a_tree_is_walked_depth_first_to_the_right_solution():
  problem, text = linearize(tree(), verdicts_of(tree()), max_dead_ends=9)
  assert problem is PROBLEM
  assert text.split("\n") == [
    "3 + 7 = 10 (left: 2 10)",
    "10 - 2 = 8 (left: 8)",
    "reaches 8, not 13",
    "no good, back to 2 10",
    "10 + 2 = 12 (left: 12)",
    "reaches 12, not 13",
    "no good, back to the start",
    "3 * 2 = 6 (left: 7 6)",
    "7 - 6 = 1 (left: 1)",
    "reaches 1, not 13",
    "no good, back to 7 6",
    "7 * 6 = 42 (left: 42)",
    "reaches 42, not 13",
    "no good, back to 7 6",
    "7 + 6 = 13 (left: 13)",
    "<answer>",
    *RIGHT.split("\n"),
    "</answer>",
  ]
  assert TASK.final_solution(text) == RIGHT
  assert TASK.check(PROBLEM, text).is_correct
  counts = behaviors.count_behaviors(text)
  assert counts["self_evaluation"] == counts["self_correction"] == 4


def test_the_right_branch_comes_last_and_others_in_the_order_they_were_made():
  steps = {
    1: (0, "3 * 2 = 6 (left: 7 6)\n", 9),
    2: (0, "3 + 7 = 10 (left: 2 10)\n", 9),
    3: (0, "3 - 2 = 1 (left: 7 1)\n", 9),
    4: (3, "7 * 1 = 7 (left: 7)", 1),
    5: (1, "7 - 6 = 1 (left: 1)", 1),
    6: (2, "10 + 2 = 12 (left: 12)", 1),
    7: (1, "7 + 6 = 13 (left: 13)", 1),
  }
  told = [line for line in text_of(tree(steps)).split("\n") if "left" in line]
  order = [2, 6, 3, 4, 1, 5, 7, 1, 7]
  assert told == [steps[node][1].rstrip("\n") for node in order]


def test_the_most_visited_dead_ends_are_kept():
  ends = {
    line
    for count in range(5)
    for line in text_of(tree(), max_dead_ends=count).split("\n")
    if line.startswith("reaches")
  }
  assert len(ends) == 4
  one = text_of(tree(), max_dead_ends=1)
  assert one.count("reaches") == 1 and "reaches 12" in one
  two = text_of(tree(), max_dead_ends=2)
  assert two.count("reaches") == 2 and "reaches 1, not" in two
  none = text_of(tree(), max_dead_ends=0)
  assert none == f"{RIGHT}\n<answer>\n{RIGHT}\n</answer>"


def test_dead_ends_are_left_out_until_the_text_fits():
  lengths = {
    count: len(text_of(tree(), max_dead_ends=count)) for count in range(5)
  }
  for count, length in lengths.items():
    text = text_of(tree(), max_tokens=length, count_fn=len)
    assert text == text_of(tree(), max_dead_ends=count)
  assert text_of(tree(), max_tokens=lengths[0] - 1, count_fn=len) is None


def test_only_trees_with_a_right_solution_are_told():
  wrong = {node: step for node, step in STEPS.items() if node < 4}
  assert text_of(tree(wrong)) is None
  assert text_of(tree({})) is None
  assert text_of(tree(is_finished=False)) is None
  assert linearize(tree(), {}, max_dead_ends=3) is None
  pairs = linearized([tree(wrong), tree(), tree({})], judge, max_dead_ends=1)
  assert pairs == [(PROBLEM, text_of(tree(), max_dead_ends=1))]


def test_the_right_solution_is_the_one_answered_with():
  other = "7 - 2 = 5 (left: 3 5)\n", "3 + 5 = 13 (left: 13)"
  steps = STEPS | {9: (0, other[0], 7), 10: (9, other[1], 6)}
  searched = tree(steps)
  verdicts = verdicts_of(searched) | {10: Verdict(True, "correct", "13")}
  index = [one.node for one in searched.solutions].index(10)
  # The most visited one, where none or a wrong one was answered with.
  for selected, wanted in ((None, 10), (0, 10), (index, 10)):
    text = linearize(tree(steps, selected), verdicts, max_dead_ends=0)[1]
    assert TASK.final_solution(text) == "".join(other), (selected, wanted)
  index = [one.node for one in searched.solutions].index(7)
  text = linearize(tree(steps, index), verdicts, max_dead_ends=0)[1]
  assert TASK.final_solution(text) == RIGHT


@pytest.mark.parametrize(
  "line",
  ["check:", "again:", "and:", "<answer>", "1 \\boxed{7} 2", "same:"],
)
def test_dead_ends_with_marks_are_left_out(line):
  steps = STEPS | {1: (0, line + "\n", 9)}
  text = text_of(tree(steps))
  assert line not in text.removesuffix(f"<answer>\n{RIGHT}\n</answer>")
  # No thought is told inside another one.
  verdicts = {7: Verdict(True, "correct", "13")}
  marked = STEPS | {4: (0, line + "\n", 8)}
  assert linearize(tree(marked), verdicts, max_dead_ends=0) is None
  assert TASK.final_solution(text) == RIGHT
  assert TASK.check(PROBLEM, text).is_correct


def test_whole_solutions_are_told_as_their_steps_are():
  """Best-of-N draws them whole: lines that they share are shared steps."""
  whole = {}
  for one in tree().solutions:
    whole[len(whole) + 1] = (0, one.text, one.num_visits)
  assert text_of(tree(whole)) == text_of(tree())
  # The same one twice is one dead end.
  twice = whole | {len(whole) + 1: whole[1]}
  assert text_of(tree(twice)) == text_of(tree())


def test_wrong_ones_may_stop_on_the_way_but_not_go_on_behind_the_right_one():
  steps = STEPS | {
    9: (0, "3 * 2 = 6 (left: 7 6)", 1),
    10: (0, RIGHT + "\n13 + 1 = 14 (left: 14)", 1),
  }
  text = text_of(tree(steps))
  assert "3 * 2 = 6 (left: 7 6)\nunfinished, 2 numbers left\n7 - 6" in text
  assert "14" not in text and TASK.final_solution(text) == RIGHT


def test_places_without_numbers_are_counted():
  steps = {
    1: (0, "one\n", 9),
    2: (1, "two\n", 9),
    3: (2, "bad", 9),
    4: (2, "good", 9),
  }
  verdicts = {3: Verdict(False, "so\nbad", None), 4: Verdict(True, "", None)}
  _, text = linearize(tree(steps), verdicts, max_dead_ends=1)
  head = "one\ntwo\nbad\nso bad\nno good, back to step 2\ngood\n<answer>\n"
  assert text == head + "one\ntwo\ngood\n</answer>"


@pytest.mark.parametrize(
  "limits, message",
  [
    ({"max_dead_ends": -1}, "max_dead_ends=-1 must be 0 or more"),
    ({"max_dead_ends": 1, "max_tokens": 5}, "go together: give both or none"),
    ({"max_dead_ends": 1, "count_fn": len}, "go together: give both or none"),
  ],
)
def test_limits_out_of_range_are_refused(limits, message):
  with pytest.raises(ValueError, match=message):
    linearize(tree(), verdicts_of(tree()), **limits)


@pytest.mark.usefixtures("quick_programs")
def test_a_real_search_becomes_demonstrations():
  toy = ToyTask(num_numbers=3, min_number=1, max_number=9)
  policy = tiny_policy()
  solver = Solver(
    policy,
    strategy="best_first",
    mesh=mesh_lib.make_mesh({"data": 1}),
    task=toy,
    batch_size=8,
    num_candidates=3,
    num_expansions=6,
  )
  problems = toy.sample_problems(np.random.default_rng(0), 8)
  trees = solver(tiny_params(), jax.random.key(3), problems)

  def judge_toy(searched):
    return [toy.check(searched.problem, one.text) for one in searched.solutions]

  def count_fn(text):
    return len(policy.tokenizer.encode(text))

  limits = dict(max_dead_ends=2, max_tokens=60, count_fn=count_fn)
  pairs = linearized(trees, judge_toy, **limits)
  assert len(pairs) > 4 and pairs == linearized(trees, judge_toy, **limits)
  num_dead_ends = 0
  right = {
    (one.problem.id, solution.text.rstrip("\n"))
    for one in trees
    for solution, verdict in zip(one.solutions, judge_toy(one), strict=True)
    if verdict.is_correct
  }
  for problem, text in pairs:
    assert (problem.id, toy.final_solution(text)) in right
    tokens = policy.tokenizer.encode(text)
    assert len(tokens) <= 60
    num_dead_ends += text.count("no good, back to")
    # What rows of an update are made of.
    entry = learned_texts.demonstration(policy, problem, text, tokens)
    assert entry.text == text and len(entry.tokens) == len(tokens) + 1
  assert num_dead_ends > 2
