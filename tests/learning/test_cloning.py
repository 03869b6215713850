"""Cloning against a loop in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np

from o1jax.learning import cloning


def test_sums_equal_a_loop_over_the_weighted_positions():
  rng = np.random.default_rng(0)
  log_probs = -rng.exponential(size=(3, 5))
  weights = rng.uniform(size=(3, 5)) * (rng.uniform(size=(3, 5)) < 0.6)
  total, weight = cloning.cloning_loss(
    jnp.asarray(log_probs, jnp.float32), jnp.asarray(weights, jnp.float32)
  )
  expected_total, expected_weight = 0.0, 0.0
  for row in range(3):
    for position in range(5):
      expected_total -= weights[row, position] * log_probs[row, position]
      expected_weight += weights[row, position]
  np.testing.assert_allclose(total, expected_total, rtol=1e-6)
  np.testing.assert_allclose(weight, expected_weight, rtol=1e-6)


def test_what_stands_at_masked_positions_is_never_read():
  weights = jnp.array([[1.0, 0.0, 0.0, 2.0]])
  log_probs = jnp.array([[-1.0, jnp.nan, -jnp.inf, -0.5]])

  def loss(log_probs):
    return cloning.cloning_loss(log_probs, weights)[0]

  value, gradient = jax.value_and_grad(loss)(log_probs)
  assert float(value) == 2.0
  np.testing.assert_array_equal(gradient, [[-1.0, 0.0, 0.0, -2.0]])
