"""The losses of a value in bins against their equations.

Slopes, masks and sums of parts are in `test_losses`, one logit is in
`test_alphazero`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from o1jax.learning import ppo, value_losses
from o1jax.value_bins import value_of

NUM_BINS = 5
MAX_CHANGE = 0.1


def make_case():
  """Logits, values of before, targets, and weights with holes."""
  rng = np.random.default_rng(0)
  shape = (4, 6)
  weights = rng.uniform(size=shape) * (rng.uniform(size=shape) < 0.7)
  logits = 2 * rng.normal(size=(*shape, NUM_BINS))
  arrays = logits, rng.uniform(size=shape), rng.uniform(size=shape), weights
  return tuple(array.astype(np.float32) for array in arrays)


def cross_entropy_by_hand(logits, target):
  log_probs = logits - np.log(np.exp(logits).sum())
  place = target * (NUM_BINS - 1)
  lower = min(int(place), NUM_BINS - 2)
  share = place - lower
  return -(1 - share) * log_probs[lower] - share * log_probs[lower + 1]


def test_sums_equal_a_loop_over_the_weighted_positions():
  logits, _, targets, weights = make_case()
  total, weight = value_losses.value_loss(logits, targets, weights)
  expected = sum(
    weights[index] * cross_entropy_by_hand(logits[index], targets[index])
    for index in np.ndindex(*weights.shape)
  )
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  np.testing.assert_allclose(weight, weights.sum(), rtol=1e-6)


def test_two_bins_are_learned_as_one_logit():
  logits, _, targets, weights = make_case()
  pair = logits[:, :, :2]
  found = value_losses.value_loss(pair, targets, weights)
  single = pair[:, :, 1] - pair[:, :, 0]
  expected = value_losses.value_loss(single, targets, weights)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_loss_is_least_where_the_mean_is_the_target():
  targets = jnp.array([[0.05, 0.3, 0.9]])

  def loss(logits):
    return value_losses.value_loss(logits, targets, jnp.ones((1, 3)))[0]

  def descend(logits, _):
    return logits - 4.0 * jax.grad(loss)(logits), None

  descent = jax.jit(lambda x: jax.lax.scan(descend, x, None, 400)[0])
  logits = descent(jnp.zeros((1, 3, NUM_BINS)))
  np.testing.assert_allclose(value_of(logits, 2), targets, atol=5e-3)
  entropies = [
    -p * np.log(p) for share in (0.2, 0.2, 0.6) for p in (share, 1 - share)
  ]
  np.testing.assert_allclose(loss(logits), sum(entropies), atol=2e-2)


def clipped(logits, old, targets, weights):
  return value_losses.clipped_two_hot_loss(
    logits, old, targets, weights, max_change=MAX_CHANGE
  )


def test_a_value_beyond_the_bound_is_left_out():
  logits, old, targets, weights = make_case()
  total, weight = clipped(logits, old, targets, weights)
  atoms = np.linspace(0, 1, NUM_BINS)
  expected, num_left_out = 0.0, 0
  for index in np.ndindex(*weights.shape):
    p = np.exp(logits[index]) / np.exp(logits[index]).sum()
    value, target = p @ atoms, targets[index]
    near = min(max(value, old[index] - MAX_CHANGE), old[index] + MAX_CHANGE)
    if abs(value - target) < abs(near - target):
      num_left_out += weights[index] > 0
    else:
      error = cross_entropy_by_hand(logits[index], target)
      expected += weights[index] * error
  assert 2 < num_left_out < (weights > 0).sum() - 2
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  np.testing.assert_allclose(weight, weights.sum(), rtol=1e-6)


def test_bins_are_held_where_the_squared_error_is():
  logits, old, targets, weights = make_case()
  in_bins = jax.grad(lambda x: clipped(x, old, targets, weights)[0])(logits)

  def squared(values):
    return ppo.clipped_value_loss(
      values, old, targets, weights, max_change=MAX_CHANGE
    )[0]

  by_value = jax.grad(squared)(value_of(logits, 2))
  np.testing.assert_array_equal(in_bins.any(axis=2), by_value != 0)
