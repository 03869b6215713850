"""Measures of guidance, against loops over pairs and bins filled by hand."""

import itertools

import numpy as np
import pytest

from o1jax import calibration
from o1jax.calibration import (
  auroc,
  bootstrap,
  brier_score,
  calibration_error,
  pair_wins,
  reliability,
)


def drawn(seed, n=60, num_levels=7):
  """Scores with many ties, labels that lean towards the high ones."""
  rng = np.random.default_rng(seed)
  scores = rng.integers(0, num_levels, n) / num_levels
  labels = rng.random(n) < 0.2 + 0.6 * scores
  return scores, labels, rng.integers(0, 4, n).astype(float)


def brute_wins(scores, labels, weights):
  wins = pairs = 0.0
  for i, j in itertools.product(range(len(scores)), repeat=2):
    if labels[i] and not labels[j]:
      pair = weights[i] * weights[j]
      pairs += pair
      wins += pair * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
  return wins, pairs


@pytest.mark.parametrize("seed", range(4))
def test_auroc_is_the_share_of_ordered_pairs(seed):
  scores, labels, weights = drawn(seed)
  ones = np.ones(len(scores))
  for given in (None, weights):
    wins, pairs = brute_wins(scores, labels, ones if given is None else given)
    assert auroc(scores, labels, given) == pytest.approx(
      wins / pairs, rel=1e-12
    )
  # A weight is a number of copies.
  copies = np.repeat(np.arange(len(scores)), weights.astype(int))
  assert auroc(scores[copies], labels[copies]) == pytest.approx(
    auroc(scores, labels, weights), rel=1e-12
  )


def test_auroc_knows_order_alone():
  scores, labels, _ = drawn(5)
  area = auroc(scores, labels)
  assert auroc(np.exp(9 * scores), labels) == area
  assert auroc(-scores, labels) == pytest.approx(1 - area)
  assert auroc(labels, labels) == 1.0
  assert auroc(np.zeros(60), labels) == 0.5
  assert auroc([-np.inf, 0.0, np.inf], [False, True, True]) == 1.0
  assert np.isnan(auroc([0.5, 0.7], [True, True]))
  assert np.isnan(auroc([], []))


def test_pairs_within_groups_are_those_of_each_group_alone():
  scores, labels, _ = drawn(6)
  groups = np.random.default_rng(0).integers(0, 9, len(scores)) * 3
  wins, pairs = pair_wins(scores, labels, groups)
  expected = []
  for group in sorted(set(groups)):
    own = groups == group
    expected.append(brute_wins(scores[own], labels[own], np.ones(own.sum())))
  np.testing.assert_allclose(np.stack([wins, pairs], 1), expected)
  assert 0 < pairs.sum() < brute_wins(scores, labels, np.ones(60))[1]
  assert [len(x) for x in pair_wins([], [], [])] == [0, 0]


def test_bins_have_equal_mass_and_hold_ties_together():
  # Two bins of four: 0.1 0.2 0.2 0.4 | 0.6 0.8 0.9 1.0.
  values = np.array([0.9, 0.2, 0.6, 0.1, 1.0, 0.2, 0.4, 0.8])
  labels = np.array([1, 0, 1, 0, 1, 1, 0, 0], bool)
  mean, right, mass = reliability(values, labels, num_bins=2)
  np.testing.assert_allclose(mean, [0.225, 0.825])
  np.testing.assert_allclose(right, [0.25, 0.75])
  np.testing.assert_allclose(mass, [0.5, 0.5])
  error = calibration_error(values, labels, num_bins=2)
  assert error == pytest.approx(0.5 * 0.025 + 0.5 * 0.075)
  # Three equal values around the middle share the bin of their middle rank.
  values = np.array([0.1, 0.5, 0.5, 0.5, 0.9, 0.9])
  labels = np.array([0, 1, 1, 0, 1, 0], bool)
  mean, right, mass = reliability(values, labels, num_bins=2)
  np.testing.assert_allclose(mean, [1.6 / 4, 0.9])
  np.testing.assert_allclose(right, [0.5, 0.5])
  np.testing.assert_allclose(mass, [4 / 6, 2 / 6])
  # Here that rank is in the upper half, though the first of them is not.
  values = np.array([0.1, 0.2, 0.5, 0.5, 0.5, 0.5])
  mean, _, mass = reliability(values, labels, num_bins=2)
  np.testing.assert_allclose(mean, [0.15, 0.5])
  np.testing.assert_allclose(mass, [2 / 6, 4 / 6])


def test_calibration_does_not_depend_on_the_order_of_the_solutions():
  scores, labels, weights = drawn(7)
  order = np.random.default_rng(1).permutation(len(scores))
  for measure in (calibration_error, brier_score):
    assert measure(scores, labels, weights) == pytest.approx(
      measure(scores[order], labels[order], weights[order]), rel=1e-12
    )
    copies = np.repeat(np.arange(len(scores)), weights.astype(int))
    assert measure(scores[copies], labels[copies]) == pytest.approx(
      measure(scores, labels, weights), rel=1e-12
    )
    assert np.isnan(measure([], []))


def test_calibrated_scores_have_no_error_and_certain_wrong_ones_all():
  values = np.repeat([0.25, 0.75], 400)
  labels = np.r_[np.arange(400) < 100, np.arange(400) < 300]
  assert calibration_error(values, labels) == pytest.approx(0.0, abs=1e-12)
  assert brier_score(values, labels) == pytest.approx(0.25 * 0.75)
  assert calibration_error(np.ones(9), np.zeros(9)) == 1.0
  assert brier_score(np.ones(9), np.zeros(9)) == 1.0


def test_intervals_resample_problems_and_repeat_themselves():
  labels = np.random.default_rng(3).random(40) < 0.6

  def mean(values):
    return lambda weights: weights @ values / weights.sum()

  alone = bootstrap(mean(labels), np.arange(40))
  assert alone == bootstrap(mean(labels), np.arange(40))
  assert alone[0] < labels.mean() < alone[1]
  # Ten copies of a solution say no more than one: the interval stays.
  copies = np.repeat(labels, 10)
  assert bootstrap(mean(copies), np.repeat(np.arange(40), 10)) == pytest.approx(
    alone
  )
  low, high = bootstrap(mean(copies), np.arange(400))
  assert high - low < 0.5 * (alone[1] - alone[0])


def test_the_interval_is_the_percentiles_of_resampled_copies(monkeypatch):
  monkeypatch.setattr(calibration, "NUM_RESAMPLES", 40)
  scores, labels, _ = drawn(8, n=24)
  groups = np.repeat(np.arange(8), 3)
  rng = np.random.default_rng(calibration.BOOTSTRAP_SEED)
  areas = []
  for _ in range(40):
    rows = (3 * rng.integers(0, 8, 8)[:, None] + np.arange(3)).reshape(-1)
    areas.append(auroc(scores[rows], labels[rows]))
  found = bootstrap(lambda w: auroc(scores, labels, w), groups, level=0.8)
  np.testing.assert_allclose(found, np.nanpercentile(areas, [10, 90]))


def test_resamples_without_a_value_are_left_out():
  nothing = bootstrap(lambda w: np.nan, np.arange(3))
  assert np.isnan(nothing).all()
  assert np.isnan(bootstrap(lambda w: 1.0, np.arange(0))).all()
  # Two problems, one right and one wrong: half of the resamples are one-sided.
  found = bootstrap(lambda w: auroc([0.9, 0.1], [1, 0], w), np.arange(2))
  assert found == (1.0, 1.0)


def test_bad_scores_are_refused():
  with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
    auroc([0.5, np.nan], [True, False])
  with pytest.raises(ValueError, match="2 scores, 1 labels and 2 weights"):
    auroc([0.5, 0.6], [True], [1, 1])
  for measure in (brier_score, calibration_error):
    with pytest.raises(ValueError, match="-3.0 is no probability"):
      measure([0.5, -3.0], [True, False])
