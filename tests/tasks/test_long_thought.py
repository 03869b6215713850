"""Long thoughts, against the checker, the exact solver and by hand."""

import re
from fractions import Fraction

import numpy as np
import pytest

from o1jax import behaviors
from o1jax.policy.tokenizer import train_tokenizer
from o1jax.tasks import long_thought, make_task, numbers_game
from o1jax.tasks.reflection import with_answer

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
}
each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
EQUATION = re.compile(r"(\S+) ([-+*/]) (\S+) = (-?[0-9/]+)")


def rng(seed=0):
  return np.random.default_rng(seed)


def equations(line):
  """`(claimed result, true result)` of each `a op b = c` in a line."""
  for a, op, b, claim in EQUATION.findall(line):
    a, b = Fraction(a), Fraction(b)
    result = {"+": a + b, "-": a - b, "*": a * b, "/": b and a / b}[op]
    yield Fraction(claim), result


def thought_of(text):
  thought, mark, _ = text.partition("\n<answer>\n")
  assert mark
  return thought.split("\n")


@each_task
def test_every_thought_shows_all_behaviors_and_ends_right(task):
  for problem, text in task.demonstrations("long_thought", rng(), 150):
    counts = behaviors.count_behaviors(text)
    assert all(counts[name] for name in behaviors.BEHAVIORS), (text, counts)
    assert not any(counts[name] for name in behaviors.FAILURES), (text, counts)
    answer = task.final_solution(text)
    assert answer and answer in text and "answer" not in answer
    assert task.check(problem, answer).is_correct
    assert task.check(problem, text).is_correct
    assert task.is_train(problem)
    # No line is a mark of other texts: the whole of a thought is learned.
    lines = text.split("\n")
    assert not {"check:", "again:", "and:", "same:"} & set(lines)


@each_task
def test_all_that_is_said_is_true_but_for_the_slip(task):
  num_slips = num_dead_ends = 0
  for problem, text in task.demonstrations("long_thought", rng(1), 150):
    target = problem.data["target"]
    lines = thought_of(text)
    for place, line in enumerate(lines):
      wrong = [claim for claim, result in equations(line) if claim != result]
      if wrong:
        # The next line finds it out, the one after repairs it.
        num_slips += 1
        assert "(left: " in line
        ((_, result),) = equations(line)
        assert lines[place + 1].endswith(f"= {result}, not {wrong[0]}")
        head, _, _ = lines[place + 2].rpartition(f"= {result} (left: ")
        assert head and not head[0].isdigit()
        left = line.rpartition("(left: ")[2].split()
        assert len(left) == len(
          lines[place + 2].rpartition("(left: ")[2].split()
        )
      missed = re.search(rf"= (\S+), (?:not|but we need) {target}$", line)
      if missed and place < len(lines) - 1 and not wrong:
        num_dead_ends += Fraction(missed[1]) != target
  assert num_slips > 30 and num_dead_ends > 30


@each_task
def test_subgoals_and_dead_ends_are_those_of_the_solver(task):
  num_fatal = 0
  for problem, text in task.demonstrations("long_thought", rng(2), 80):
    numbers, target = problem.data["numbers"], problem.data["target"]
    lines = thought_of(text)
    # The last step that is named is legal play's, and gives the target.
    (sides,) = re.findall(
      rf"\b{target} = (-?[\d/]+) ([-+*/]) (-?[\d/]+)", lines[1]
    )
    a, op, b = sides
    assert numbers_game.combine(Fraction(a), op, Fraction(b)) == target
    used, direct = [], [a, b]
    for made, given in re.findall(r"(-?[\d/]+) from ([-\d/ ]+\d)", lines[1]):
      words = given.split(" ")
      state = numbers_game.make_state(tuple(map(int, words)))
      solver = numbers_game.Solver(Fraction(made))
      assert len(words) > 1 and solver.can_reach(state)
      used += words
      direct.remove(made)
    # All numbers are used, each once.
    assert sorted(used + direct) == sorted(map(str, numbers))
    first = next(line for line in lines if "(left: " in line or ", not" in line)
    if "left" in first and not any(c != r for c, r in equations(first)):
      # On the right path, or fatal and taken back later.
      reaches = task.can_reach(problem, first)
      answer = task.final_solution(text).split("\n")
      assert reaches or first != answer[0]
      num_fatal += not reaches
  if task.name == "countdown" and len(numbers) > 2:
    assert num_fatal > 10


@each_task
def test_wrong_ones_differ_in_their_answer_alone(task):
  for problem, text in task.demonstrations("long_thought_wrong", rng(), 100):
    counts = behaviors.count_behaviors(text)
    assert all(counts[name] for name in behaviors.BEHAVIORS), (text, counts)
    assert not any(counts[name] for name in behaviors.FAILURES), (text, counts)
    assert not task.check(problem, text).is_correct
    answer = task.final_solution(text)
    assert task.check(problem, answer).reason.startswith("reaches ")


def test_the_share_of_wrong_ones_is_an_option():
  task = TASKS["play"]
  pairs = task.long_thoughts(rng(), 400, wrong_share=0.25)
  right = np.mean([task.check(*pair).is_correct for pair in pairs])
  assert 0.68 < right < 0.82
  with pytest.raises(ValueError, match=r"wrong_share=1.5 is not in \[0, 1\]"):
    task.long_thoughts(rng(), 1, wrong_share=1.5)


@pytest.mark.parametrize(
  "name", sorted(set(behaviors.BEHAVIORS) - {"task_completion"})
)
def test_each_behavior_can_be_left_out(name):
  task = TASKS["play"]
  kept = [other for other in behaviors.BEHAVIORS if other != name]
  for problem, text in task.long_thoughts(rng(), 100, behaviors=kept):
    counts = behaviors.count_behaviors(text)
    shown = [other for other in behaviors.BEHAVIORS if counts[other]]
    assert shown == kept, text
    assert task.check(problem, text).is_correct


def test_texts_repeat_and_vary():
  task = TASKS["play"]
  texts = [text for _, text in task.long_thoughts(rng(3), 200)]
  assert texts == [text for _, text in task.long_thoughts(rng(3), 200)]
  assert texts != [text for _, text in task.long_thoughts(rng(4), 200)]
  heads = {re.sub(r"[\d ]+", "#", text.split("\n")[0]) for text in texts}
  assert len(heads) == 5
  both = [("= 1 (" in text, text.count("fix: ")) for text in texts]
  assert len(set(both)) > 2


def test_dead_ends_are_counted():
  task = TASKS["four"]
  for most in (0, 1, 3):
    found = set()
    options = dict(max_dead_ends=most, slip_share=0.0)
    for problem, text in task.long_thoughts(rng(), 60, **options):
      target = problem.data["target"]
      ends = rf", (?:not|but we need) {target}$"
      found.add(len(re.findall(ends, text, re.M)))
      corrections = behaviors.count_behaviors(text)["self_correction"]
      assert corrections == 1
    # Without a dead end it is a slip that is corrected.
    assert found == ({0} if not most else set(range(1, most + 1)))
  for _, text in task.long_thoughts(rng(), 20, max_dead_ends=0):
    assert behaviors.count_behaviors(text)["self_correction"] == 1
    assert not behaviors.count_behaviors(text)["alternative_proposal"]


def test_no_dead_end_is_told_twice():
  task = TASKS["two"]
  for problem, text in task.long_thoughts(rng(), 100, max_dead_ends=3):
    target = problem.data["target"]
    ends = re.findall(
      rf"(\S+) ([-+*/]) (\S+) = \S+, (?:not|but we need) {target}$", text, re.M
    )
    assert len({tuple(sorted(end)) for end in ends}) == len(ends)


def test_length_is_limited():
  task = TASKS["play"]
  free = [text for _, text in task.long_thoughts(rng(), 100, max_dead_ends=3)]
  assert max(map(long_thought.num_pieces, free)) > 170
  pairs = task.long_thoughts(rng(), 100, max_dead_ends=3, max_pieces=120)
  assert max(long_thought.num_pieces(text) for _, text in pairs) <= 120
  assert all(task.check(*pair).is_correct for pair in pairs)
  with pytest.raises(ValueError, match="max_pieces=20: the shortest thought"):
    task.long_thoughts(rng(), 1, max_pieces=20)


def test_three_numbers_take_about_120_tokens():
  task = TASKS["play"]
  texts = [text for _, text in task.long_thoughts(rng(), 400)]
  tokenizer = train_tokenizer(texts, vocab_size=1500, max_number=999)
  lengths = [len(ids) for ids in tokenizer.encode_batch(texts)]
  assert np.median(lengths) < 120, np.median(lengths)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"behaviors": ["self_doubt"]}, "'self_doubt' is none of problem_analysi"),
    ({"behaviors": ["self_evaluation"]}, "lack task_completion: the steps"),
    ({"max_dead_ends": -1}, "max_dead_ends=-1 must be 0 or more"),
    ({"slip_share": 2.0}, r"slip_share=2.0 is not in \[0, 1\]"),
    ({"max_pieces": 0}, "max_pieces=0 must be above 0"),
  ],
)
def test_options_out_of_range_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    TASKS["play"].long_thoughts(rng(), 1, **options)


def test_a_solution_that_is_none_is_refused():
  rules = dict(integers_only=False, canonical=False)
  with pytest.raises(ValueError, match="not a step: 'well'"):
    long_thought.long_thought(rng(), (3, 7), 10, "well", **rules)
  other = "3 + 8 = 11 (left: 2 11)\n11 + 2 = 13 (left: 13)"
  with pytest.raises(ValueError, match="not a solution: 8 is not left"):
    long_thought.long_thought(rng(), (3, 7, 2), 13, other, **rules)
  with pytest.raises(ValueError, match="no play of 0 0 was found that misses"):
    play = "0 + 0 = 0 (left: 0)"
    long_thought.long_thought(rng(), (0, 0), 0, play, is_wrong=True, **rules)


def test_the_answer_of_a_thought_is_its_final_solution():
  task = TASKS["countdown"]
  solution = "3 * 2 = 6 (left: 7 6)\n7 + 6 = 13 (left: 13)"
  text = with_answer("some\nthoughts", solution)
  assert task.final_solution(text) == solution
  # Judged or revised, it is the last one that counts.
  assert task.final_solution(text + "\ncheck:\n3 * 2") == solution
  revised = "3 + 7\nagain:\nunfinished\n" + text
  assert task.final_solution(revised) == solution
  assert task.final_solution(text + "\nagain:\nno\n1 + 1") == "1 + 1"
  # What follows the answer stays: the checker refuses it.
  problem = task.make_problem([3, 7, 2], 13)
  assert task.check(problem, text).is_correct
  more = text + "\n3 + 7 = 10 (left: 2 10)"
  assert task.final_solution(more) == more
  assert not task.check(problem, more).is_correct
  for odd in ("<answer>\n", "<answer>\n</answer>", "\n</answer>", "<answer>"):
    assert task.final_solution(odd) == odd


def scripted(prompt):
  """A policy that does what it is told, and knows one line for each."""
  lines = {
    "restate what is given": "numbers 3 7 2, target 13",
    "name the subgoals": "subgoal 6 from 3 2",
    "carry out the steps": "3 * 2 = 6 (left: 7 6)",
    "propose another way": "instead try 3 * 2",
    "computing them again": "10 + 2 = 12, not 13",
    "and repair it": "that fails, back to 3 7 2",
  }
  told, _, _ = prompt.partition("Problem:")
  thought = [line for words, line in lines.items() if words in told]
  return with_answer("\n".join(thought), "3 * 2 + 7")


def test_behaviors_can_be_asked_for():
  task = TASKS["countdown"]
  problem = task.make_problem([3, 7, 2], 13)
  for name in behaviors.BEHAVIORS:
    text = scripted(long_thought.request(problem, behaviors=[name]))
    counts = behaviors.count_behaviors(text)
    assert [key for key in counts if counts[key]] == [name]
    assert task.check(problem, text).is_correct
  counts = behaviors.count_behaviors(scripted(long_thought.request(problem)))
  assert all(counts[name] == 1 for name in behaviors.BEHAVIORS)
  examples = task.long_thoughts(rng(), 2)
  prompt = long_thought.request(problem, examples)
  for example, text in examples:
    assert f"Problem: {example.prompt.strip()}\n{text}\n" in prompt
  assert prompt.endswith("Problem: 3 7 2 = 13\n")
  with pytest.raises(ValueError, match="'thought' is none of"):
    long_thought.request(problem, behaviors="thought")
