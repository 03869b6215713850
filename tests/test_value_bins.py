"""Values in bins against the two atoms around each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax import value_bins


def two_hot_by_hand(target, num_bins):
  """Weights of the two atoms around it, which are looked for."""
  atoms = [k / (num_bins - 1) for k in range(num_bins)]
  target = min(max(target, 0.0), 1.0)
  for k, (lower, upper) in enumerate(zip(atoms, atoms[1:], strict=False)):
    if lower <= target <= upper:
      weights = np.zeros(num_bins)
      weights[k] = (upper - target) / (upper - lower)
      weights[k + 1] = 1 - weights[k]
      return weights
  raise AssertionError(target)


@pytest.mark.parametrize("num_bins", [2, 5, 21])
def test_two_hot_is_the_two_atoms_around_the_target(num_bins):
  targets = np.array([[-7.0, 0.0, 0.01, 0.3], [0.5, 0.99, 1.0, 3.0]])
  weights = value_bins.two_hot(jnp.asarray(targets, jnp.float32), num_bins)
  expected = [[two_hot_by_hand(x, num_bins) for x in row] for row in targets]
  np.testing.assert_allclose(weights, expected, atol=2e-6)
  means = weights @ np.linspace(0, 1, num_bins)
  np.testing.assert_allclose(means, np.clip(targets, 0, 1), atol=1e-6)
  np.testing.assert_array_equal(
    value_bins.two_hot(jnp.array([jnp.inf, -jnp.inf]), 3),
    [[0, 0, 1], [1, 0, 0]],
  )


def test_a_value_is_read_from_one_logit_or_from_bins():
  logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
  values = value_bins.value_of(logits, 2)
  for index in np.ndindex(2, 3):
    p = np.exp(logits[index]) / np.exp(logits[index]).sum()
    mean = sum(p[k] * k / 4 for k in range(5))
    np.testing.assert_allclose(values[index], mean, rtol=1e-6)
  np.testing.assert_array_equal(
    value_bins.value_of(logits, 3), jax.nn.sigmoid(logits)
  )
  extreme = value_bins.value_of(jnp.array([[200.0, -200.0, 0.0]]), 1)
  np.testing.assert_array_equal(extreme, [0])
  with pytest.raises(AssertionError):
    value_bins.value_of(logits, 1)


def test_two_bins_are_one_logit():
  logits = jnp.array([[0.3, 1.5], [-2.0, 0.7]])
  np.testing.assert_allclose(
    value_bins.value_of(logits, 1),
    value_bins.value_of(logits[:, 1] - logits[:, 0], 1),
    rtol=1e-6,
  )
