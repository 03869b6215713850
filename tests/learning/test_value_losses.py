"""Two-hot values and process rewards against their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from differences import assert_gradient_is_the_slope
from o1jax.learning import value_losses

SUPPORT = np.array([-1.0, 0.0, 0.5, 2.0])


def support():
  return jnp.asarray(SUPPORT)


def two_hot_by_hand(target):
  weights = np.zeros(len(SUPPORT))
  target = min(max(target, SUPPORT[0]), SUPPORT[-1])
  for k in range(len(SUPPORT) - 1):
    lower, upper = SUPPORT[k], SUPPORT[k + 1]
    if lower <= target <= upper:
      weights[:] = 0
      weights[k] = (upper - target) / (upper - lower)
      weights[k + 1] = 1 - weights[k]
  return weights


def test_two_hot_is_the_two_atoms_around_the_target():
  targets = np.array([[-1.0, -0.25, 0.0, 0.2], [0.5, 1.9, 2.0, 0.49]])
  weights = value_losses.two_hot(jnp.asarray(targets, jnp.float32), support())
  expected = [[two_hot_by_hand(target) for target in row] for row in targets]
  np.testing.assert_allclose(weights, expected, atol=1e-6)
  assert ((np.asarray(weights) > 0).sum(axis=-1) <= 2).all()
  np.testing.assert_allclose(
    jnp.einsum("btk,k->bt", weights, support()), targets, atol=1e-6
  )


def test_targets_outside_the_support_are_clipped_to_its_ends():
  weights = value_losses.two_hot(jnp.array([-7.0, 3.0, jnp.inf]), support())
  np.testing.assert_array_equal(
    weights, [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
  )


def test_two_hot_mean_reads_what_two_hot_wrote():
  logits = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]))
  values = value_losses.two_hot_mean(logits, support())
  np.testing.assert_allclose(values, [0.85, 0.375], rtol=1e-6)


def test_least_two_hot_loss_is_at_the_target():
  targets = jnp.array([[-0.3, 0.3, 1.4]])

  def loss(logits):
    return value_losses.two_hot_value_loss(
      logits, targets, jnp.ones((1, 3)), support()
    )[0]

  def descend(logits, _):
    return logits - 4.0 * jax.grad(loss)(logits), None

  start = jnp.zeros((1, 3, 4))
  descent = jax.jit(lambda x: jax.lax.scan(descend, x, None, 400)[0])
  logits = descent(start)
  found = value_losses.two_hot_mean(logits, support())
  np.testing.assert_allclose(found, targets, atol=5e-3)
  entropy = sum(
    -p * np.log(p)
    for target in targets[0]
    for p in two_hot_by_hand(float(target))
    if p > 0
  )
  np.testing.assert_allclose(loss(logits), entropy, atol=2e-2)


def make_case():
  """Logits, targets and weights with holes, in float64."""
  rng = np.random.default_rng(0)
  mask = rng.uniform(size=(3, 5)) * (rng.uniform(size=(3, 5)) < 0.6)
  assert (mask == 0).any() and (mask > 0).sum() > 4
  logits, targets = rng.normal(size=(3, 5, 4)), 2 * rng.normal(size=(3, 5))
  return logits, targets, mask


def two_hot_loss(logits, targets, mask):
  return value_losses.two_hot_value_loss(
    logits, jnp.asarray(targets), jnp.asarray(mask), support()
  )


def process_loss(logits, targets, mask):
  """The process head sees the first logit, labels are targets in [0, 1]."""
  labels = jax.nn.sigmoid(jnp.asarray(targets))
  return value_losses.process_reward_loss(
    logits[:, :, 0], labels, jnp.asarray(mask)
  )


LOSSES = {"two-hot": two_hot_loss, "process": process_loss}
each_loss = pytest.mark.parametrize("name", LOSSES)


def value_and_gradient(name, logits, targets, mask):
  def loss(logits, targets):
    return LOSSES[name](logits, targets, mask)

  total = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  arrays = (jnp.asarray(array, jnp.float32) for array in (logits, targets))
  (value, weight), gradient = jax.jit(total)(*arrays)
  return value, weight, gradient


@each_loss
def test_gradient_equals_finite_differences_in_float64(name):
  logits, targets, mask = make_case()

  def loss(logits):
    total, weight = LOSSES[name](logits, targets, mask)
    return total / weight

  assert_gradient_is_the_slope(loss, logits)


@each_loss
def test_sums_equal_a_loop_over_the_weighted_positions(name):
  logits, targets, mask = make_case()
  total, weight, (_, target_gradient) = value_and_gradient(
    name, logits, targets, mask.astype(np.float32)
  )
  expected = 0.0
  for index in np.ndindex(*mask.shape):
    if name == "two-hot":
      log_probs = logits[index] - np.log(np.exp(logits[index]).sum())
      error = -two_hot_by_hand(targets[index]) @ log_probs
    else:
      label = 1 / (1 + np.exp(-targets[index]))
      right = 1 / (1 + np.exp(-logits[index][0]))
      error = -label * np.log(right) - (1 - label) * np.log(1 - right)
    expected += mask[index] * error
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  np.testing.assert_allclose(weight, mask.sum(), rtol=1e-6)
  np.testing.assert_array_equal(target_gradient, np.zeros(targets.shape))


@each_loss
def test_what_stands_at_masked_positions_is_never_read(name):
  logits, targets, mask = make_case()
  mask = mask.astype(np.float32)
  value, weight, gradient = value_and_gradient(name, logits, targets, mask)
  is_absent = mask == 0
  dirty_logits = np.where(is_absent[:, :, None], np.nan, logits)
  dirty_targets = np.where(is_absent, np.nan, targets)
  found = value_and_gradient(name, dirty_logits, dirty_targets, mask)
  jax.tree.map(np.testing.assert_array_equal, found, (value, weight, gradient))
  assert not np.asarray(gradient[0])[is_absent].any()
  nothing = value_and_gradient(name, dirty_logits, dirty_targets, 0 * mask)
  for leaf in jax.tree.leaves(nothing):
    np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


@each_loss
def test_padding_and_the_order_of_rows_do_not_matter(name):
  logits, targets, mask = make_case()
  mask = mask.astype(np.float32)
  value, weight, gradient = value_and_gradient(name, logits, targets, mask)
  order = np.array([2, 0, 1])
  shape = ((0, 1), (0, 2))
  moved = value_and_gradient(
    name,
    np.pad(logits[order], (*shape, (0, 0)), constant_values=np.nan),
    np.pad(targets[order], shape, constant_values=np.nan),
    np.pad(mask[order], shape),
  )
  np.testing.assert_allclose(moved[0], value, rtol=1e-6)
  np.testing.assert_allclose(moved[1], weight, rtol=1e-6)
  np.testing.assert_allclose(moved[2][0][:3, :5], gradient[0][order], rtol=1e-6)
  assert float(jnp.abs(moved[2][0]).sum()) == pytest.approx(
    float(jnp.abs(gradient[0]).sum())
  )


def test_process_labels_are_the_shares_of_right_rollouts():
  num_correct = jnp.array([[8, 3, 0, 0]])
  num_rollouts = jnp.array([[8, 4, 8, 0]])
  soft, mask = value_losses.process_labels(num_correct, num_rollouts)
  np.testing.assert_array_equal(soft, [[1, 0.75, 0, 0]])
  np.testing.assert_array_equal(mask, [[1, 1, 1, 0]])
  hard, mask = value_losses.process_labels(
    num_correct, num_rollouts, estimate="hard"
  )
  np.testing.assert_array_equal(hard, [[1, 1, 0, 0]])
  np.testing.assert_array_equal(mask, [[1, 1, 1, 0]])
  assert soft.dtype == hard.dtype == jnp.float32
  with pytest.raises(ValueError, match="'mean' is none of soft, hard"):
    value_losses.process_labels(num_correct, num_rollouts, estimate="mean")


def test_process_loss_is_least_where_the_logit_says_the_label():
  label = 0.3

  def loss(logits):
    one = jnp.ones((1, 1))
    return value_losses.process_reward_loss(logits, label * one, one)[0]

  best = jnp.full((1, 1), np.log(label / (1 - label)))
  entropy = -label * np.log(label) - (1 - label) * np.log(1 - label)
  np.testing.assert_allclose(loss(best), entropy, rtol=1e-6)
  np.testing.assert_allclose(jax.grad(loss)(best), [[0.0]], atol=1e-6)
  extreme = jnp.full((1, 1), 200.0)
  np.testing.assert_allclose(loss(extreme), 0.7 * 200, rtol=1e-6)
