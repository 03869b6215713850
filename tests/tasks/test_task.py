"""What all tasks have in common, and making them by name."""

import copy
import dataclasses
import json
from fractions import Fraction

import numpy as np
import pytest

from o1jax import tasks
from o1jax.tasks import long_thought, make_task, reflection, task

# Texts that are more than the steps of one solution.
WRITTEN = {*reflection.KINDS, *long_thought.KINDS, "retrying"}


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_every_task_keeps_the_interface(name):
  made = make_task(name)
  assert isinstance(made, tasks.Task) and made.name == name
  rng = np.random.default_rng(0)
  for split in tasks.SPLITS:
    for problem in made.sample_problems(rng, 5, split):
      assert problem.task == name and problem.id.startswith(f"{name}/")
      assert problem.prompt.endswith("\n")
      assert made.parse(problem.prompt).prompt == problem.prompt
      assert made.is_train(problem) == (split == "train")
      assert made.unlike_training(problem) is None
  assert made.corpus(rng, 9)
  for kind in made.demonstration_kinds:
    assert made.demonstrations(kind, rng, 0) == []
  for kind in set(made.demonstration_kinds) - WRITTEN:
    for problem, text in made.demonstrations(kind, rng, 5):
      assert all(made.judge_steps(problem, text)) or kind == "random_play"
      assert made.check(problem, text).answer is not None
      assert not text.endswith("\n")
  _assert_consequences(made)
  # The way it travels to worker processes.
  assert copy.deepcopy(made) == made


def _assert_consequences(made):
  """What follows the mark in a line is a function of what precedes it."""
  rng, tails, seen = np.random.default_rng(1), {}, []
  for kind in made.demonstration_kinds:
    if kind in WRITTEN:
      continue
    for problem, text in made.demonstrations(kind, rng, 500):
      # The prompt and the lines above count by the numbers left, so that many
      # lines share what precedes them.
      has_left = "(left: " in text
      left = problem.prompt.split(" =")[0] if has_left else ""
      for line in text.split("\n"):
        head, mark, tail = line.partition(made.consequence_mark)
        assert bool(mark) != line.startswith("back")
        if len(set(left.split(" "))) < len(left.split(" ")):
          tail = sorted(tail.split(" "))  # equal numbers: order is free
        if mark:
          seen.append((left, head) in tails)
          assert tails.setdefault((left, head), tail) == tail
        left = line.rpartition("(left: ")[2].rstrip(")") if has_left else ""
  assert sum(seen) > 20


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
@pytest.mark.parametrize(
  "change",
  [
    lambda data: {},
    lambda data: {"x": 1},
    lambda data: data | {"more": 1},
    lambda data: data | dict.fromkeys(("numbers", "terms")),
    lambda data: dict.fromkeys(data, "ab"),
    lambda data: dict.fromkeys(data, {}),
    lambda data: dict.fromkeys(data, [[1, 2], 3]),
    lambda data: {key: [10**30] * (3 - (key == "ops")) for key in data},
  ],
)
def test_data_of_no_problem_is_refused(name, change):
  made = make_task(name)
  (problem,) = made.sample_problems(np.random.default_rng(0), 1)
  foreign = dataclasses.replace(problem, data=change(dict(problem.data)))
  with pytest.raises(ValueError, match=f"is not of task '{name}'") as raised:
    made.is_train(foreign)
  assert "problem.data={" in str(raised.value)


@pytest.mark.parametrize(
  "name, options, text, message",
  [
    (
      "countdown",
      {},
      "3 7 2 1 = 13",
      "training problems have 3 numbers from 1 to 20 and targets from 10 to 99",
    ),
    ("countdown", {"max_number": 6}, "3 7 2 = 13", "from 1 to 6"),
    ("countdown", {"min_number": 3}, "3 7 2 = 13", "from 3 to 20"),
    ("countdown", {"max_target": 12}, "3 7 2 = 13", "targets from 10 to 12"),
    ("countdown", {"min_target": 14}, "3 7 2 = 13", "targets from 14 to 99"),
    ("countdown", {}, "3 7 2 = 13", None),
    ("game24", {}, "1 1 24 1", "training problems have numbers from 1 to 13"),
    ("game24", {}, "1 1 4 6", None),
    (
      "arithmetic",
      {},
      "1 + 2",
      "training problems have 3 numbers of at most 2 digits, joined by + or -",
    ),
    ("arithmetic", {}, "1 + 2 - 100", "at most 2 digits"),
    ("arithmetic", {"ops": "+"}, "1 + 2 - 3", "joined by +"),
    ("arithmetic", {}, "1 + 2 - 99", None),
  ],
)
def test_problems_unlike_training_are_told(name, options, text, message):
  made = make_task(name, **options)
  unlike = made.unlike_training(made.parse(text))
  assert (unlike is None) == (message is None)
  assert message is None or message in unlike


@pytest.mark.parametrize(
  "name, options, message",
  [
    ("countdwn", {}, "unknown task 'countdwn': did you mean 'countdown'"),
    ("chess", {}, "unknown task 'chess': known: arithmetic, countdown"),
    ("countdown", {"heldot": 0.1}, "did you mean 'heldout'"),
    ("countdown", {"num_numbers": "3"}, "countdown.num_numbers='3' is not"),
    ("countdown", {"num_numbers": 3.0}, "is not of type int"),
    ("countdown", {"num_numbers": True}, "is not of type int"),
    ("countdown", {"integers_only": 1}, "is not of type bool"),
    ("countdown", {"canonical_play": 1}, "is not of type bool"),
    ("countdown", {"balanced_hindsight": "yes"}, "is not of type bool"),
    ("countdown", {"balanced_hindsigh": True}, "did you mean 'balanced_hinds"),
    ("game24", {"canonical_play": True}, "unknown option of task game24"),
    ("game24", {"games_file": None}, "is not of type str"),
  ],
)
def test_make_task_refuses(name, options, message):
  with pytest.raises(ValueError, match=message):
    make_task(name, **options)


def test_whole_numbers_are_accepted_for_fractions():
  assert make_task("countdown", heldout=0).heldout == 0


def test_success_rate():
  made = make_task("countdown")
  problem = made.make_problem([3, 7, 2], 12)
  right = "3 + 7 = 10 (left: 2 10)\n10 + 2 = 12 (left: 12)"
  wrong = "3 + 7 = 11 (left: 2 11)\n11 + 2 = 13 (left: 13)"
  problems, texts = [problem] * 4, [right, wrong, "", "oh"]
  assert tasks.success_rate(made, problems, texts) == 0.25
  assert tasks.success_rate(made, [], []) == 0.0


def test_the_hash_never_changes():
  # The splits are made of these numbers: a change would mix held-out problems
  # into the training problems of everybody's earlier runs.
  rows = np.array([[2, 3, 7], [2, 3, 8], [0, 0, 0]])
  np.testing.assert_array_equal(task.hash_rows(rows), HASHES)
  assert not np.isin(task.hash_rows(rows, seed=1), HASHES).any()


HASHES = [0.9672367243924499, 0.7906518129594187, 0.13870941014555427]


def test_the_hash_is_uniform():
  rows = np.stack(np.meshgrid(*[np.arange(40)] * 3), -1).reshape(-1, 3)
  values = np.sort(task.hash_rows(rows))
  gap = np.abs(values - (np.arange(len(values)) + 0.5) / len(values)).max()
  assert gap < 1.95 / np.sqrt(len(values))  # Kolmogorov-Smirnov, 0.1%
  assert len(np.unique(values)) == len(values)


@pytest.mark.parametrize("name", ["countdown", "game24"])
def test_sorted_numbers_change_how_problems_read_and_nothing_else(name):
  plain, made = make_task(name), make_task(name, sorted_numbers=True)
  others, problems = plain.heldout_problems(50), made.heldout_problems(50)
  assert [p.id for p in problems] == [p.id for p in others]
  assert [p.prompt for p in problems] != [p.prompt for p in others]
  for problem, other in zip(problems, others, strict=True):
    assert problem.data["numbers"] == sorted(other.data["numbers"])
    # What a user types reads like what was trained on.
    assert made.parse(other.prompt) == problem
    assert made.solutions(problem) and not made.is_train(problem)
  for kind in made.demonstration_kinds:
    for problem, _ in made.demonstrations(kind, np.random.default_rng(0), 20):
      numbers = problem.data["numbers"]
      assert numbers == sorted(numbers)
      assert problem.prompt.startswith(" ".join(map(str, numbers)) + " = ")
      assert made.is_train(problem) or kind == "random_play"


@pytest.mark.parametrize("name", ["countdown", "game24", "game24 of a file"])
def test_play_of_sorted_numbers_keeps_their_order(name, tmp_path):
  options = {"num_numbers": 4} if name == "countdown" else {}
  if name == "game24 of a file":
    options["games_file"] = str(tmp_path / "games.jsonl")
    rows = [{"puzzle": f"{i} {i + 1} {i + 2} {i + 3}"} for i in range(1, 10)]
    (tmp_path / "games.jsonl").write_text("\n".join(map(json.dumps, rows)))
  made = make_task(name.split()[0], sorted_numbers=True, **options)
  pairs = made.demonstrations("random_play", np.random.default_rng(0), 50)
  for _, text in pairs:
    *others, _ = text.split("(left: ")[1].split(")")[0].split(" ")
    assert list(map(Fraction, others)) == sorted(map(Fraction, others))
