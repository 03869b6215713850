"""The Game of 24: the public list of games, drawn games, bad files."""

import json

import numpy as np
import pytest

from o1jax.tasks import make_task, success_rate


def rng(seed=0):
  return np.random.default_rng(seed)


@pytest.fixture
def public(test_data):
  path = test_data / "game24" / "games_dev.jsonl"
  return make_task("game24", games_file=str(path))


def test_public_games_are_solvable(public):
  assert public.games.shape == (1200, 4)
  problems = list(map(public.make_problem, public.games.tolist()))
  assert len({problem.id for problem in problems}) == 1200
  assert all(map(public.can_reach, problems))


@pytest.mark.slow
def test_solutions_of_public_games_are_correct(public):
  for numbers in public.games.tolist():
    problem = public.make_problem(numbers)
    texts = public.solutions(problem)
    assert texts and success_rate(public, [problem] * len(texts), texts) == 1
    assert 0 < public.true_value(problem) < 1


def test_problems_come_from_the_file(public):
  games = set(map(tuple, public.games.tolist()))
  train = public.sample_problems(rng(), 300)
  heldout = public.heldout_problems(80)
  found = [
    {tuple(sorted(problem.data["numbers"])) for problem in problems}
    for problems in (train, heldout)
  ]
  assert found[0] <= games and found[1] <= games
  assert not found[0] & found[1]
  assert any(p.data["numbers"] != sorted(p.data["numbers"]) for p in train)


def test_drawn_games_are_solvable_and_split():
  task = make_task("game24")
  train = task.sample_problems(rng(), 200)
  heldout = task.sample_problems(rng(1), 100, "heldout")
  assert all(task.can_reach(problem) for problem in train + heldout)
  assert not {p.id for p in train} & {p.id for p in heldout}
  numbers = np.array([problem.data["numbers"] for problem in train])
  assert numbers.min() == 1 and numbers.max() == 13
  assert all(problem.data["target"] == 24 for problem in train)


@pytest.mark.parametrize("integers_only", [False, True])
def test_demonstrations(integers_only):
  task = make_task("game24", integers_only=integers_only)
  for kind in task.demonstration_kinds:
    pairs = task.demonstrations(kind, rng(), 100)
    problems, texts = zip(*pairs, strict=True)
    rate = success_rate(task, problems, map(task.final_solution, texts))
    if kind == "random_play":
      assert rate < 0.1
    elif kind in ("judging", "revised", "comparing"):
      assert 0.2 < rate < 0.8  # Of what is judged, valued or compared.
    elif kind == "long_thought_wrong":
      assert rate == 0.0
    else:
      assert rate == 1.0
  with pytest.raises(ValueError, match="known: random_play, optimal, sea"):
    task.demonstrations("hindsight", rng(), 1)
  assert len(task.corpus(rng(), 20)) == 20


def test_relabel_finds_nothing():
  task = make_task("game24", heldout=0.0)
  problem = task.make_problem([1, 1, 4, 6])
  assert task.check(problem, "1 * 1 * 4 * 6").is_correct
  assert task.relabel(problem, "1 * 1 * 4 * 6") is None
  assert task.relabel(problem, "1 + 1 + 4 + 6") is None


def test_parse():
  task = make_task("game24")
  problem = task.make_problem([1, 1, 4, 6])
  assert problem.prompt == "1 1 4 6 = 24\n"
  assert task.parse("1 1 4 6") == task.parse("1 1 4 6 = 24\n") == problem
  for text in ("1 1 4", "1 1 4 6 = 25", "a b c d", "1 1 4 6 7"):
    with pytest.raises(ValueError, match="not a game of 24"):
      task.parse(text)
  with pytest.raises(ValueError, match="no solution: 1 1 1 1 = 24"):
    task.parse("1 1 1 1")


@pytest.mark.parametrize(
  "content, message",
  [
    ("", "has no games"),
    ('{"puzzle": "1 1 4 6"}\n{"puzzle"', "line 2: no field 'puzzle'"),
    ('{"game": "1 1 4 6"}', "line 1: no field 'puzzle'"),
    ('{"puzzle": [1, 1, 4, 6]}', "line 1: no field 'puzzle' of text"),
    ("7", "line 1: no field 'puzzle'"),
    ('{"puzzle": "1 1 4"}', "line 1: '1 1 4' is not four numbers"),
    ('{"puzzle": "1 1 4 6 9"}', "is not four numbers"),
  ],
)
def test_bad_files(tmp_path, content, message):
  path = tmp_path / "games.jsonl"
  path.write_text(content)
  with pytest.raises(ValueError, match=message):
    make_task("game24", games_file=str(path))


def test_training_problems_of_a_file_have_its_numbers(public):
  low, high = public.games.min(), public.games.max()
  made = public.make_problem
  assert public.unlike_training(made([int(low)] * 3 + [int(high)])) is None
  unlike = public.unlike_training(made([1, 1, 1, int(high) + 1]))
  assert unlike == f"training problems have numbers from {low} to {high}"


def test_missing_file_and_empty_split(tmp_path):
  with pytest.raises(ValueError, match="No such file"):
    make_task("game24", games_file=str(tmp_path / "none.jsonl"))
  path = tmp_path / "games.jsonl"
  path.write_text(json.dumps({"puzzle": "1 1 4 6"}))
  task = make_task("game24", games_file=str(path), heldout=0.0)
  assert len(task.sample_problems(rng(), 3)) == 3
  with pytest.raises(ValueError, match="nothing is held out"):
    task.sample_problems(rng(), 3, "heldout")
  path.write_text(json.dumps({"puzzle": "1 1 1 1"}))
  task = make_task("game24", games_file=str(path), heldout=0.0)
  with pytest.raises(ValueError, match="nothing solvable"):
    task.sample_problems(rng(), 3)
