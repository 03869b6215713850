"""A sick run is told apart from a well one, in words."""

import dataclasses
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from o1jax import health
from o1jax.searched import FoundSolution, Searched
from o1jax.types import LearnerBatch, Problem, Verdict

WELL = {
  "kind": "iteration",
  "learn/policy_loss": 0.5,
  "learn/grad_norm": 1.25,
  "learn/entropy": 0.7,
  "learn/kl_to_reference": 0.1,
  "search/truncated": 0.3,
  "search/distinct": 3.5,
  "eval/greedy_accuracy": 0.5,
}
STRICT = health.Limits(
  patience=2, min_entropy=0.2, max_divergence=2.0, max_truncated=0.9
)


def rows_of(*changes):
  rows = enumerate(changes, 10)
  return [{"iteration": i, **WELL, **change} for i, change in rows]


@pytest.mark.parametrize("limits", [health.Limits(), STRICT])
def test_a_run_that_is_well_is_left_alone(limits):
  assert health.diagnose([], limits) is None
  health.check(rows_of({}, {}, {}, {}), limits)
  # Where nothing was measured nothing is wrong; other numbers may be anything.
  other = {"eval/loss": math.nan, "kind": "iteration", "learn/none": None}
  health.check([{"iteration": i, **other} for i in range(5)], limits)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, "nan", np.float32("inf")])
def test_what_is_not_finite_is_told_at_once(bad):
  history = rows_of({}, {"learn/grad_norm": 9.0}, {"learn/grad_norm": bad})
  report = health.diagnose(history, health.Limits())
  assert report == (
    f"iteration 12: learn/grad_norm is {float(bad)} (9 in iteration 11); lower "
    "learn.optimizer.learning_rate or learn.optimizer.clip_norm and start "
    "again from the last checkpoint"
  )
  with pytest.raises(health.Unhealthy, match="learn/grad_norm is"):
    health.check(history, health.Limits())
  # An old one is over; the first of all has nothing before it.
  assert health.diagnose([*history, *rows_of({})], health.Limits()) is None
  assert "is nan;" in health.diagnose(
    rows_of({"learn/policy_loss": math.nan}), health.Limits()
  )


@pytest.mark.parametrize(
  "change, words",
  [
    ({"learn/entropy": 0.19}, "learn/entropy=0.19 is below 0.2: the policy"),
    (
      {"learn/kl_to_reference": 2.5},
      "learn/kl_to_reference=2.5 is above 2: the policy has left",
    ),
    ({"search/truncated": 0.9}, "search/truncated=0.9 has reached 0.9: sol"),
    ({"search/distinct": 0.0}, "search/distinct=0 is not above 0: searches"),
  ],
)
def test_a_collapse_is_told_once_it_has_lasted(change, words):
  report = health.diagnose(rows_of({}, change, change), STRICT)
  assert report.startswith("iteration 12: " + words)
  assert " for 2 iterations; " in report and "\n" not in report
  for history in ((change,), ({}, change), (change, {}), (change, {}, change)):
    assert health.diagnose(rows_of(*history), STRICT) is None
  name = next(iter(change))
  missing = [*rows_of(change), {"iteration": 11, "kind": "initialize"}]
  assert health.diagnose([*missing, *rows_of(change)], STRICT) is None
  missing[-1][name] = None
  assert health.diagnose([*missing, *rows_of(change)], STRICT) is None
  one = dataclasses.replace(STRICT, patience=1)
  assert " for " not in health.diagnose(rows_of(change), one).split(";")[0]


def test_all_that_is_wrong_is_told():
  change = {"search/distinct": 0, "search/truncated": 1, "learn/entropy": "nan"}
  report = health.diagnose(rows_of(change, change, change), health.Limits())
  assert report.count("; also: ") == 2
  # The default asks for nothing of entropy and divergence.
  change = {"learn/entropy": 0.0, "learn/kl_to_reference": 1e9}
  assert (
    health.diagnose(rows_of(change, change, change), health.Limits()) is None
  )


@pytest.mark.parametrize(
  "options",
  [
    {"patience": 0},
    {"min_entropy": -1.0},
    {"max_divergence": 0.0},
    {"max_divergence": math.nan},
    {"max_truncated": 0.0},
    {"max_truncated": 1.5},
    {"min_distinct": math.nan},
  ],
)
def test_bad_limits_are_refused(options):
  with pytest.raises(ValueError, match=f"^{next(iter(options))}="):
    health.Limits(**options)


def test_a_batch_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
  shape = (2, 3)
  rows = LearnerBatch(
    tokens=np.arange(6, dtype=np.int32).reshape(shape),
    lengths=np.array([3, 2], np.int32),
    policy_weights=jnp.full(shape, 0.1, jnp.bfloat16),
    value_targets=np.full(shape, np.nan, np.float32),
    value_weights=np.ones(shape, np.float32),
  )
  path = tmp_path / "bad.npz"
  health.save_batch(path, {"cloning": rows, "more": [np.ones(2), jnp.zeros(1)]})
  with np.load(path, allow_pickle=False) as file:
    found = dict(file)
  assert sorted(found) == [
    "cloning.lengths",
    "cloning.policy_weights",
    "cloning.tokens",
    "cloning.value_targets",
    "cloning.value_weights",
    "more.0",
    "more.1",
  ]
  np.testing.assert_array_equal(found["cloning.tokens"], rows.tokens)
  assert np.isnan(found["cloning.value_targets"]).all()
  weights = found["cloning.policy_weights"]
  assert weights.dtype == np.float32
  np.testing.assert_array_equal(weights, np.asarray(rows.policy_weights, float))
  before = path.read_bytes()

  def fail(file, **arrays):
    file.write(b"half")
    raise OSError("no space")

  monkeypatch.setattr(np, "savez", fail)
  with pytest.raises(OSError, match="no space"):
    health.save_batch(path, rows)
  assert path.read_bytes() == before
  assert [file.name for file in tmp_path.iterdir()] == ["bad.npz"]
  with pytest.raises(ValueError, match="holds no arrays"):
    health.save_batch(path, {})


@pytest.mark.parametrize("n", range(6))
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(n):
  for c, k in itertools.product(range(n + 1), (1, 2, 3, 8)):
    draws = list(itertools.combinations(range(n), min(k, n)))
    expected = np.mean([any(i < c for i in draw) for draw in draws])
    (found,) = health.pass_at_k([n], [c], k)
    assert found == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_of_many_stays_in_range_and_bad_counts_are_refused():
  found = health.pass_at_k([10**6, 4000, 0], [1, 3999, 0], 2000)
  np.testing.assert_allclose(found, [0.002, 1, 0], rtol=1e-9)
  for arguments in (([2], [3], 1), ([2], [-1], 1), ([2, 3], [1], 1)):
    with pytest.raises(ValueError, match="must be 0 to num_solutions"):
      health.pass_at_k(*arguments)
  with pytest.raises(ValueError, match="k=0 must be at least 1"):
    health.pass_at_k([2], [1], 0)


def make_searched(*solutions):
  """A search with these (text, is_finished); texts are as long as tokens."""
  found = [
    FoundSolution(
      node=i,
      text=text,
      path=(i,),
      tokens=np.zeros(len(text), np.int32),
      behavior_log_probs=np.zeros(len(text)),
      policy_log_probs=np.zeros(len(text)),
      is_finished=is_finished,
      outcome=0.0,
      num_visits=1,
    )
    for i, (text, is_finished) in enumerate(solutions)
  ]
  return Searched(Problem("p", "toy", "p", {}), found, None, {}, {})


def test_searches_are_measured():
  searched = [
    make_searched(("right", True), ("right", True), ("wr", True), ("r", False)),
    make_searched(("right", True), ("rig", True)),
    make_searched(("wrong....", False)),
    make_searched(),
  ]
  verdicts = [
    [Verdict(s.text.startswith("r"), "", None) for s in one.solutions]
    for one in searched
  ]
  assert health.search_metrics(searched, verdicts, ks=(1, 2)) == pytest.approx(
    {
      "search/coverage_at_1": (2 / 4 + 1) / 4,
      "search/coverage_at_2": (1 - 1 / 6 + 1) / 4,
      "search/distinct": (2 + 2) / 4,
      "search/distinct_correct": (1 + 2) / 4,
      "search/length_mean": (5 + 5 + 2 + 1 + 5 + 3 + 9) / 7,
      "search/length_max": 9,
      "search/truncated": 2 / 7,
    }
  )
  nothing = health.search_metrics(searched[3:], verdicts[3:])
  assert set(nothing.values()) == {0.0} and "search/coverage_at_8" in nothing
  with pytest.raises(ValueError, match="no searches"):
    health.search_metrics([], [])
  with pytest.raises(ValueError):
    health.search_metrics(searched, [verdicts[0][:1], *verdicts[1:]])
