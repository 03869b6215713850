"""Proposals move to where half of the solutions are right."""

import time

import numpy as np
import pytest

from o1jax import question_generator, tasks
from o1jax.question_generator import QuestionGenerator
from o1jax.types import Problem

COUNTDOWN = tasks.make_task("countdown", max_number=9)


class Levels:
  """Problems of a level from 0 to 99; every seventh is held out.

  The second feature says nothing, the third is always the same.
  """

  name = "levels"

  def __init__(self, leaks=False, num_features=3):
    self.leaks = leaks
    self.num_features = num_features

  def make(self, level, salt=0):
    data = {"level": level, "salt": salt}
    return Problem(f"levels/{level}/{salt}", self.name, f"{level}", data)

  def sample_problems(self, rng, n, split="train"):
    assert split == "train"
    levels, salts = rng.integers(0, 100, 8 * n), rng.integers(0, 50, 8 * n)
    made = [self.make(*pair) for pair in zip(levels, salts, strict=True)]
    return [one for one in made if self.leaks or self.is_train(one)][:n]

  def is_train(self, problem):
    return problem.data["level"] % 7 != 0

  def problem_features(self, problem):
    values = [problem.data["level"], problem.data["salt"], 3.0, 1.0]
    return np.array(values[: self.num_features])


def success_of(problems, middle):
  """A policy that solves half of the problems of the middle level."""
  levels = np.array([problem.data["level"] for problem in problems])
  return 1 / (1 + np.exp((levels - middle) / 6))


def train(generator, rng, middle, rounds=6, n=64):
  """Searches what is proposed; four solutions a problem."""
  for _ in range(rounds):
    problems, _ = generator.propose(rng, n)
    rates = rng.binomial(4, success_of(problems, middle)) / 4
    numbers = generator.learn(problems, rates)
  return numbers


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype and a[name].size
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_before_anything_is_learned_proposals_are_those_of_the_sampler():
  generator = QuestionGenerator(Levels())
  rng = np.random.default_rng(0)
  problems, report = generator.propose(rng, 400)
  levels = [problem.data["level"] for problem in problems]
  assert 30 < np.mean(levels) < 70 and np.std(levels) > 20
  assert report["predicted_success"] == report["pool_predicted_success"] == 0.5
  assert report["frontier"] == report["pool_frontier"] == 1
  assert len(set(p.id for p in problems)) == 400 and report["repeated"] == 0


@pytest.mark.parametrize("middle", [25, 80])
def test_proposals_move_to_the_frontier(middle):
  task, rng = Levels(), np.random.default_rng(1)
  generator = QuestionGenerator(task)
  numbers = train(generator, rng, middle)
  problems, report = generator.propose(rng, 200)
  success = success_of(problems, middle)
  overall = success_of(task.sample_problems(rng, 2000), middle)
  on_frontier = np.mean(np.abs(success - 0.5) < 0.25)
  assert on_frontier > 3 * np.mean(np.abs(overall - 0.5) < 0.25) > 0.2
  assert abs(success.mean() - 0.5) < 0.1
  assert abs(report["predicted_success"] - success.mean()) < 0.1
  assert report["frontier"] > 2 * report["pool_frontier"]
  # Four solutions alone have 1/16 of a problem at one half.
  assert numbers["brier"] < 0.09
  # They stay diverse.
  levels = [problem.data["level"] for problem in problems]
  assert len(set(levels)) > 10 and len(set(p.id for p in problems)) == 200
  easy, hard = task.make(middle - 20), task.make(middle + 19)
  low, high = generator.predict([hard, easy])
  assert low < 0.2 and high > 0.8


def test_what_is_hard_may_lie_in_the_middle():
  task, rng = Levels(), np.random.default_rng(11)
  problems = task.sample_problems(rng, 500)
  levels = np.array([problem.data["level"] for problem in problems])
  generator = QuestionGenerator(task, temperature=0.02)
  generator.learn(problems, (np.abs(levels - 50) > 20) * 0.9)
  low, high, middle = generator.predict([task.make(i) for i in (3, 97, 50)])
  assert middle < 0.15 and low > 0.8 and high > 0.8
  chosen, _ = generator.propose(rng, 100)
  levels = np.array([problem.data["level"] for problem in chosen])
  assert np.mean(np.abs(np.abs(levels - 50) - 20) < 12) > 0.9


def test_a_problem_far_outside_is_not_extrapolated():
  task = Levels()
  generator = QuestionGenerator(task)
  generator.learn([task.make(40), task.make(60)], [0.4, 0.6])
  far, farther = generator.predict([task.make(10**3), task.make(10**6)])
  assert 0.5 < far == farther < 0.99


def test_the_frontier_follows_the_policy():
  rng = np.random.default_rng(2)
  generator = QuestionGenerator(Levels())
  for middle in (20, 35, 50, 65, 80):
    train(generator, rng, middle, rounds=4)
    problems, _ = generator.propose(rng, 200)
    levels = [problem.data["level"] for problem in problems]
    assert abs(np.mean(levels) - middle) < 8, middle


def test_what_is_old_fades_and_memory_keeps_it():
  def end(memory):
    rng = np.random.default_rng(3)
    generator = QuestionGenerator(Levels(), memory=memory)
    problems = Levels().sample_problems(rng, 300)
    for _ in range(5):
      generator.learn(problems, success_of(problems, 20))
    generator.learn(problems, success_of(problems, 80))
    (success,) = generator.predict([Levels().make(50)])
    return success

  assert end(0.1) > 0.8 > 0.5 > end(1.0)


def test_temperature_trades_promise_for_diversity():
  chosen = []
  task = Levels()
  for temperature in (0.0, 0.05, 0.5, 50.0):
    generator = QuestionGenerator(task, temperature=temperature)
    problems = task.sample_problems(np.random.default_rng(4), 600)
    generator.learn(problems, success_of(problems, 50))
    found = generator.choose(np.random.default_rng(5), problems, 60)
    assert len(set(problem.id for problem in found)) <= 60 == len(found)
    levels = np.array([problem.data["level"] for problem in found])
    chosen.append(np.abs(levels - 50).mean())
  assert sorted(chosen) == chosen and chosen[0] < 3 and chosen[-1] > 20
  few = generator.choose(np.random.default_rng(5), problems[:3], 60)
  assert len(few) == 3


def test_the_model_is_the_one_that_its_equation_asks_for():
  rng = np.random.default_rng(6)
  problems = Levels().sample_problems(rng, 200)
  rates = rng.uniform(size=200)
  generator = QuestionGenerator(Levels(), ridge=3.0, memory=0.5)
  generator.learn(problems[:50], rates[:50])
  first = generator.to_arrays()
  generator.learn(problems[50:], rates[50:])
  second = generator.to_arrays()
  x = generator._features(problems[50:])
  old, new = first["question_weights"], second["question_weights"]
  prior = 0.5 * first["question_precision"] + 0.5 * 3.0 * np.eye(7)
  p = 1 / (1 + np.exp(-x @ new))
  gradient = prior @ (new - old) + x.T @ (p - rates[50:])
  np.testing.assert_allclose(gradient, 0, atol=1e-6)
  expected = prior + (x * (p * (1 - p))[:, None]).T @ x
  np.testing.assert_allclose(second["question_precision"], expected)
  assert generator.num_learned == 200
  # Scaled, the constant feature left alone.
  np.testing.assert_allclose(x.mean(axis=0), [1, 0, 0, 0, 1, 1, 0], atol=0.3)
  np.testing.assert_allclose(x[:, 1:4].std(axis=0), [1, 1, 0], atol=0.2)
  np.testing.assert_array_equal(x[:, 4:], x[:, 1:4] ** 2)


def test_the_options_are_in_the_model():
  generator = QuestionGenerator(Levels(), ridge=3.0, frontier=0.2)
  precision = generator.to_arrays()["question_precision"]
  np.testing.assert_array_equal(precision, 3 * np.eye(7))
  problems = Levels().sample_problems(np.random.default_rng(0), 200)
  generator.learn(problems, success_of(problems, 50))
  chosen, report = generator.propose(np.random.default_rng(0), 50)
  near = np.abs(generator.predict(chosen) - 0.5) <= 0.2
  assert report["frontier"] == near.mean() < 1
  generator = QuestionGenerator(Levels(), pool_factor=2)
  _, report = generator.propose(np.random.default_rng(0), 50)
  assert 90 < report["pool"] <= 100


def test_rates_of_one_side_only_do_not_run_away():
  generator = QuestionGenerator(Levels(), memory=1.0)
  problems = Levels().sample_problems(np.random.default_rng(0), 300)
  for _ in range(20):
    generator.learn(problems, np.ones(300))
  assert np.all(generator.predict(problems) > 0.99)
  assert np.abs(generator.to_arrays()["question_weights"]).max() < 20
  # From there one step of Newton would overshoot.
  numbers = generator.learn(problems * 50, np.zeros(300 * 50))
  assert np.all(generator.predict(problems) < 0.4)
  assert numbers["predicted"] > 0.99 > 0.9 < numbers["brier"]
  assert numbers["success"] == 0


def test_what_is_held_out_never_comes_out():
  task = Levels(leaks=True)
  generator, rng = QuestionGenerator(task), np.random.default_rng(7)
  for _ in range(5):
    problems, report = generator.propose(rng, 100)
    assert all(map(task.is_train, problems)) and len(problems) == 100
    # A seventh of the levels.
    assert 50 < report["heldout"] < 200
    assert report["pool"] + report["heldout"] <= 800
    generator.learn(problems, success_of(problems, 49))
  task.is_train = lambda problem: False
  with pytest.raises(ValueError, match="none of 8 problems that levels drew"):
    generator.propose(rng, 1)


def test_too_small_a_task_repeats_its_problems():
  generator = QuestionGenerator(Levels(), pool_factor=1)
  generator._task.sample_problems = lambda rng, n: [
    Levels().make(1 + i % 4) for i in range(n)
  ]
  problems, report = generator.propose(np.random.default_rng(0), 10)
  counts = [sum(p.data["level"] == i for p in problems) for i in range(1, 5)]
  assert sorted(counts) == [2, 2, 3, 3]
  assert (report["pool"], report["repeated"]) == (4, 0.6)


def test_a_resumed_generator_goes_on_with_the_same_bits():
  task = Levels()
  whole = QuestionGenerator(task)
  train(whole, np.random.default_rng(8), 40, rounds=2)
  arrays = {"other": np.ones(2)} | whole.to_arrays()
  resumed = QuestionGenerator.from_arrays(arrays, task)
  assert_same(resumed.to_arrays(), whole.to_arrays())
  found = []
  for generator in (whole, resumed):
    rng = np.random.default_rng(9)
    train(generator, rng, 40, rounds=2)
    problems, report = generator.propose(rng, 30)
    found.append(([problem.id for problem in problems], report))
  assert found[0] == found[1]
  assert_same(resumed.to_arrays(), whole.to_arrays())
  # What was handed out is a copy.
  arrays = whole.to_arrays()
  arrays["question_weights"][:] = 7
  assert whole.to_arrays()["question_weights"][0] != 7
  empty = QuestionGenerator(task)
  again = QuestionGenerator.from_arrays(empty.to_arrays(), task)
  assert_same(again.to_arrays(), empty.to_arrays())


def test_texts_are_screened_and_counted_before_the_filter():
  made = COUNTDOWN
  (known, new) = made.sample_problems(np.random.default_rng(10), 2)
  (heldout,) = made.heldout_problems(1)
  texts = [
    new.prompt,
    new.prompt.strip(),  # Written before.
    known.prompt,
    heldout.prompt,
    "1 1 1 = 99",  # Not solvable.
    "3 + 7 = 10",
    "",
    "12 13 14 = 39",  # Numbers that training problems do not have;
    "3 7 2 = 1",  # a target, which is not trained on either,
    "1 2 = 3",  # and as here too few of them.
  ]
  generator = QuestionGenerator(made)
  problems, report = generator.screen(texts, {known.id})
  assert [problem.id for problem in problems] == [new.id]
  assert report == pytest.approx(
    {
      "well_formed": 0.8,
      "solvable": 0.7,
      "trainable": 0.4,
      "like_training": 0.4,
      "new": 0.5,
      "frontier": 0.7,
      "kept": 0.1,
    }
  )
  # What is predicted to be solved always is not on the frontier.
  sampled = made.sample_problems(np.random.default_rng(0), 200)
  generator.learn(sampled, np.ones(200))
  assert generator.screen(texts)[1]["frontier"] < 0.3
  assert set(generator.screen([])[1].values()) == {0.0}


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_texts_of_any_kind_are_read_or_refused_in_no_time(name):
  made = tasks.make_task(name)
  many = 50_000
  texts = [
    text
    for part in ("1", " ", "1 ", "1+", "\n", ",", "=", "1 1", "1+1 ", "\0", "é")
    for text in (part * many, part * many + "x", "1 1 = 1" + part * many)
  ]
  texts += [
    "__import__('os')",
    "{0}",
    "%s",
    "١ ٢ ٣ = ٦",
    "\ud800",
    "-1 2 3 = 4",
  ]
  texts += [good + " " * many + "x" for good in ("1+1", "1 2 = 3", "1 1 4 6")]
  texts += ["0 0 0 = 0", "1e9 2 3 = 6", "999999 999998 999997 999996 3 = 7"]
  start = time.process_time()
  problems, report = QuestionGenerator(made).screen(texts)
  assert time.process_time() - start < 3
  assert not problems and report["well_formed"] < 0.2


def test_heldout_texts_never_pass_the_screen():
  for name in sorted(tasks.TASKS):
    made = tasks.make_task(name)
    heldout = made.heldout_problems(50)
    generator = QuestionGenerator(made)
    texts = [problem.prompt for problem in heldout]
    problems, report = generator.screen(texts)
    assert not problems and report["trainable"] == report["kept"] == 0
    assert report["solvable"] == 1


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_every_task_has_features(name):
  made = tasks.make_task(name)
  assert isinstance(made, tasks.Featured)
  problems = made.sample_problems(np.random.default_rng(0), 40)
  features = np.array([made.problem_features(one) for one in problems])
  assert features.dtype == np.float64 and np.isfinite(features).all()
  assert len(np.unique(features, axis=0)) > 30
  generator = QuestionGenerator(made)
  chosen, _ = generator.propose(np.random.default_rng(0), 16)
  assert len(chosen) == 16
  # The smaller half by the middle feature is learned to be easier.
  middle = features[:, 5 if name == "arithmetic" else 4]
  rates = (middle < np.median(middle)).astype(float)
  for _ in range(5):
    generator.learn(problems, rates)
  predicted = generator.predict(problems)
  assert predicted[rates == 1].mean() > predicted[rates == 0].mean() + 0.5


def test_a_problem_without_a_solution_is_told_apart():
  with pytest.raises(tasks.Unsolvable, match="no solution: 1 1 1 = 99"):
    COUNTDOWN.parse("1 1 1 = 99")
  with pytest.raises(ValueError, match="not a countdown problem") as raised:
    COUNTDOWN.parse("1 1 1")
  assert not isinstance(raised.value, tasks.Unsolvable)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"pool_factor": 0}, "pool_factor=0 must be at least 1"),
    ({"temperature": -1.0}, "temperature=-1.0 must be 0 or more"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"frontier": 0.5}, "frontier=0.5 is not between"),
    ({"memory": 0.0}, r"memory=0.0 is not in \(0, 1\]"),
    ({"ridge": 0.0}, "ridge=0.0 must be above 0"),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    QuestionGenerator(Levels(), **options)


def test_bad_input_is_refused_and_changes_nothing():
  generator = QuestionGenerator(Levels())
  before = generator.to_arrays()
  problems = Levels().sample_problems(np.random.default_rng(0), 2)
  with pytest.raises(ValueError, match=r"2 problems but .* shape \(1,\)"):
    generator.learn(problems, [0.5])
  for rate in (1.5, float("nan")):
    with pytest.raises(ValueError, match=f"success rate {rate} is not in"):
      generator.learn(problems, [0.5, rate])
  assert generator.learn([], []) == {}
  assert_same(generator.to_arrays(), before)
  with pytest.raises(ValueError, match="n=0 must be at least 1"):
    generator.propose(np.random.default_rng(0), 0)
  with pytest.raises(ValueError, match="has no question_weights"):
    QuestionGenerator.from_arrays({}, Levels())
  with pytest.raises(ValueError, match=r"has shape \(7,\), not \(9,\)"):
    QuestionGenerator.from_arrays(before, Levels(num_features=4))

  class Plain:
    name = "plain"

  with pytest.raises(ValueError, match="'plain' has no problem_features"):
    QuestionGenerator(Plain())


def test_the_score_is_highest_at_one_half():
  scores = question_generator.variance_score(np.array([0, 0.25, 0.5, 0.75, 1]))
  np.testing.assert_allclose(scores, [0, 0.75, 1, 0.75, 0])
