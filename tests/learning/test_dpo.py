"""Preference losses on a world of few answers, where the optimum is known.

The policy is a table of logits over the answers; every ordered pair of answers
stands in the batch with the Bradley-Terry probability that it is ranked so.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from differences import assert_gradient_is_the_slope
from o1jax.learning import dpo

REWARDS = np.array([0.9, -0.4, 0.0, 0.5, -1.0])
REFERENCE = np.array([0.3, 0.1, 0.25, 0.05, 0.3])
BETA = 0.5


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def log_odds(p):
  return np.log(p / (1 - p))


def optimum(rewards, **options):
  """Probabilities that the loss ends at, by plain gradient descent."""
  n = len(rewards)
  first, second = np.nonzero(~np.eye(n, dtype=bool))
  shares = sigmoid(rewards[first] - rewards[second]).astype(np.float32)
  reference = jnp.log(jnp.asarray(REFERENCE[:n], jnp.float32))

  def loss(logits):
    log_probs = jax.nn.log_softmax(logits)
    total, weight, _ = dpo.dpo_loss(
      log_probs[first],
      log_probs[second],
      reference[first],
      reference[second],
      jnp.asarray(shares),
      beta=BETA,
      **options,
    )
    return total / weight

  def descend(logits, _):
    return logits - rate * jax.grad(loss)(logits), None

  # The squared margin is curved by 2, the others by beta^2 / 4 at most.
  rate = 0.5 if options["variant"] == "ipo" else 10.0
  start = jnp.zeros(n)
  logits, _ = jax.jit(lambda x: jax.lax.scan(descend, x, None, 400))(start)
  return jax.nn.softmax(logits)


def test_dpo_recovers_the_bradley_terry_optimum():
  expected = REFERENCE * np.exp(REWARDS / BETA)
  expected /= expected.sum()
  found = optimum(REWARDS, variant="dpo")
  np.testing.assert_allclose(found, expected, atol=1e-3)
  assert np.abs(expected - REFERENCE).max() > 0.2


def test_ipo_ends_at_its_closed_form():
  """reference * exp(P(preferred to a uniform answer) / beta), normalised."""
  preference = sigmoid(REWARDS[:, None] - REWARDS[None, :]).mean(axis=1)
  expected = REFERENCE * np.exp(preference / BETA)
  expected /= expected.sum()
  found = optimum(REWARDS, variant="ipo")
  np.testing.assert_allclose(found, expected, atol=1e-3)
  assert np.abs(expected - REFERENCE).max() > 0.1


def test_conservative_optimum_is_that_of_the_flipped_labels():
  """Two answers: margin = log odds of a ranking after flips of its label."""
  probs = optimum(REWARDS[:2], variant="conservative", label_noise=0.2)
  ratios = np.log(probs) - np.log(REFERENCE[:2])
  right = sigmoid(REWARDS[0] - REWARDS[1])
  flipped = 0.8 * right + 0.2 * (1 - right)
  margin = BETA * (ratios[0] - ratios[1])
  np.testing.assert_allclose(margin, log_odds(flipped), atol=1e-3)
  assert log_odds(right) - log_odds(flipped) > 0.5


def make_pairs(dtype=np.float32):
  rng = np.random.default_rng(7)
  arrays = -rng.exponential(size=(4, 6)) * 2
  return arrays.astype(dtype), np.array([1, 0, 0.5, 2, 0, 1], dtype)


@functools.partial(jax.jit, static_argnames=("variant", "label_noise"))
def loss_and_gradient(arrays, pair_mask, variant="dpo", label_noise=0.0):
  def loss(arrays):
    total, weight, metrics = dpo.dpo_loss(
      *arrays, pair_mask, beta=BETA, variant=variant, label_noise=label_noise
    )
    return total, (weight, metrics)

  (total, rest), gradient = jax.value_and_grad(loss, has_aux=True)(arrays)
  return total, *rest, gradient


NOISE = {"dpo": 0.0, "ipo": 0.0, "conservative": 0.2}


def losses_of(margins, variant):
  """The equations of the docstring, in NumPy."""
  if variant == "ipo":
    return (margins / BETA - 1 / (2 * BETA)) ** 2
  noise = NOISE[variant]
  return -(1 - noise) * np.log(sigmoid(margins)) - noise * np.log(
    sigmoid(-margins)
  )


@pytest.mark.parametrize("variant", dpo.VARIANTS)
def test_sums_are_the_equations_and_their_gradient(variant):
  arrays, pair_mask = make_pairs()
  total, weight, metrics, gradient = loss_and_gradient(
    arrays, pair_mask, variant, NOISE[variant]
  )
  policy, other, policy_reference, other_reference = arrays
  rewards = BETA * (policy - policy_reference), BETA * (other - other_reference)
  margins = rewards[0] - rewards[1]
  losses = losses_of(margins, variant)
  np.testing.assert_allclose(total, (pair_mask * losses).sum(), rtol=1e-5)
  assert float(weight) == 4.5
  expected = {
    "accuracy": margins > 0,
    "margin": margins,
    "preferred_reward": rewards[0],
    "dispreferred_reward": rewards[1],
  }
  # Else the sign of one reward alone would pass for accuracy.
  assert (pair_mask * (margins > 0)).sum() != (
    pair_mask * (rewards[0] > 0)
  ).sum()
  assert metrics.keys() == expected.keys()
  for name, values in expected.items():
    wanted = (pair_mask * values).sum()
    np.testing.assert_allclose(metrics[name], wanted, rtol=1e-5, atol=1e-5)
  slopes = {
    "dpo": -BETA * sigmoid(-margins),
    "conservative": BETA * (sigmoid(margins) - 0.8),
    "ipo": 2 * (margins / BETA - 1 / (2 * BETA)),
  }[variant]
  np.testing.assert_allclose(gradient[0], pair_mask * slopes, rtol=1e-5)
  np.testing.assert_allclose(gradient[1], -pair_mask * slopes, rtol=1e-5)
  np.testing.assert_array_equal(gradient[2:], np.zeros((2, 6)))


@pytest.mark.parametrize("variant", dpo.VARIANTS)
def test_gradient_equals_finite_differences_in_float64(variant):
  arrays, pair_mask = make_pairs(np.float64)
  mask = np.random.default_rng(1).uniform(size=(2, 6, 4)) < 0.6

  def loss(token_log_probs):
    policy, other = (
      dpo.sequence_log_probs(token_log_probs[i], jnp.asarray(mask[i]), mean=i)
      for i in range(2)
    )
    total, weight, _ = dpo.dpo_loss(
      policy,
      other,
      *map(jnp.asarray, arrays[2:]),
      jnp.asarray(pair_mask),
      beta=BETA,
      variant=variant,
      label_noise=NOISE[variant],
    )
    return total / weight

  token_log_probs = -np.random.default_rng(2).exponential(size=(2, 6, 4))
  assert_gradient_is_the_slope(loss, token_log_probs)


@pytest.mark.parametrize("variant", dpo.VARIANTS)
def test_rows_without_a_pair_are_never_read(variant):
  arrays, pair_mask = make_pairs()
  noise = NOISE[variant]
  expected = loss_and_gradient(arrays, pair_mask, variant, noise)
  is_absent = pair_mask == 0
  dirty = np.where(is_absent[None, :], np.nan, arrays)
  found = loss_and_gradient(dirty, pair_mask, variant, noise)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  for leaf in jax.tree.leaves(loss_and_gradient(dirty, 0 * pair_mask, variant)):
    np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_the_order_of_the_pairs_does_not_matter():
  arrays, pair_mask = make_pairs()
  order = np.array([3, 5, 0, 1, 4, 2])
  *sums, gradient = loss_and_gradient(arrays, pair_mask)
  *moved_sums, moved = loss_and_gradient(arrays[:, order], pair_mask[order])
  np.testing.assert_array_equal(moved, gradient[:, order])
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6), moved_sums, sums
  )


def test_the_untrained_policy_is_at_chance():
  arrays, pair_mask = make_pairs()
  arrays[:2] = arrays[2:]
  total, weight, metrics, _ = loss_and_gradient(arrays, pair_mask)
  np.testing.assert_allclose(total, weight * np.log(2), rtol=1e-6)
  assert float(metrics["accuracy"]) == weight / 2


def test_sequence_log_probs_read_the_masked_tokens_alone():
  nan = jnp.nan
  log_probs = jnp.array(
    [[-1.0, -2.0, nan, -4.0], [nan, -jnp.inf, nan, nan], [nan, -3.0, -1.0, nan]]
  )
  mask = jnp.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]])

  def both(log_probs):
    total = dpo.sequence_log_probs(log_probs, mask)
    mean = dpo.sequence_log_probs(log_probs, mask, mean=True)
    return total.sum() + 2 * mean.sum(), (total, mean)

  gradient, (total, mean) = jax.grad(both, has_aux=True)(log_probs)
  np.testing.assert_array_equal(total, [-5.0, 0.0, -3.0])
  np.testing.assert_array_equal(mean, [-2.5, 0.0, -3.0])
  np.testing.assert_array_equal(
    gradient, [[2, 0, 0, 2], [0, 0, 0, 0], [0, 3, 0, 0]]
  )


def test_a_step_is_compared_given_its_prefix():
  """What two steps share is not counted; padding and its length are not."""
  rng = np.random.default_rng(3)
  prefix, steps = -rng.exponential(size=3), -rng.exponential(size=(2, 2))
  rows = np.full((2, 8), np.nan, np.float32)
  rows[:, :3], rows[:, 3:5] = prefix, steps
  mask = np.zeros((2, 8), bool)
  mask[:, 3:5] = True
  found = dpo.sequence_log_probs(jnp.asarray(rows), jnp.asarray(mask))
  np.testing.assert_allclose(found, steps.sum(axis=1), rtol=1e-6)


@pytest.mark.parametrize(
  "options, words",
  [
    ({"variant": "hinge"}, "none of dpo, ipo, conservative"),
    ({"variant": "dpo", "label_noise": 0.1}, "is not read by variant='dpo'"),
    ({"variant": "conservative", "label_noise": 0.5}, r"not in \[0, 0.5\)"),
    ({"beta": 0.0}, "beta=0.0 is not above 0"),
  ],
)
def test_options_without_a_meaning_are_refused(options, words):
  arrays, pair_mask = make_pairs()
  with pytest.raises(ValueError, match=words):
    dpo.dpo_loss(*arrays, pair_mask, **{"beta": 0.1, **options})
