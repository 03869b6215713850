"""PPO by hand, by its equation, and at the two ends where it is known."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.learning import policy_gradient, ppo

pytestmark = pytest.mark.usefixtures("quick_programs")


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def slopes(loss_fn, at):
  """What the loss function returns, and the gradient of its first number."""

  def first(x):
    found = loss_fn(x)
    return found[0], found

  gradient, found = jax.jit(jax.grad(first, has_aux=True))(at)
  return found, np.asarray(gradient)


# Ratio and advantage; surrogate and its slope by the log-prob without dual
# clip; the same with it. Clips are 0.2 below and 0.3 above, the dual one 3.
BY_HAND = np.array(
  [
    [0.5, 2.0, 1.0, 1.0, 1.0, 1.0],
    [1.0, 2.0, 2.0, 2.0, 2.0, 2.0],
    [1.25, 2.0, 2.5, 2.5, 2.5, 2.5],
    [2.0, 2.0, 2.6, 0.0, 2.6, 0.0],
    [4.0, 2.0, 2.6, 0.0, 2.6, 0.0],
    [0.5, -2.0, -1.6, 0.0, -1.6, 0.0],
    [0.75, -2.0, -1.6, 0.0, -1.6, 0.0],
    [0.9, -2.0, -1.8, -1.8, -1.8, -1.8],
    [2.0, -2.0, -4.0, -4.0, -4.0, -4.0],
    [4.0, -2.0, -8.0, -8.0, -6.0, 0.0],
    [0.5, 0.0, 0.0, 0.0, 0.0, 0.0],
    [4.0, 0.0, 0.0, 0.0, 0.0, 0.0],
  ]
)


@pytest.mark.parametrize("dual_clip, columns", [(None, (2, 3)), (3.0, (4, 5))])
def test_regions_of_the_clip_by_hand(dual_clip, columns):
  ratios, advantages = jnp.asarray(BY_HAND[:, :2].T[:, :, None])
  surrogate, slope = BY_HAND[:, columns].T
  # Any log-prob will do, only the ratio counts.
  log_probs = jnp.linspace(-3, -1, len(ratios))[:, None]
  (numerator, denominator, metrics), gradient = slopes(
    lambda x: ppo.ppo_loss(
      x,
      log_probs - jnp.log(ratios),
      advantages,
      jnp.ones_like(ratios),
      clip_low=0.2,
      clip_high=0.3,
      dual_clip=dual_clip,
    ),
    log_probs,
  )
  np.testing.assert_allclose(numerator, -surrogate.sum(), rtol=1e-12)
  np.testing.assert_allclose(gradient[:, 0], -slope, rtol=1e-12)
  assert float(denominator) == len(ratios)
  is_clipped = (advantages[:, 0] != 0) & (slope == 0)
  assert float(metrics.clipped_sum) == is_clipped.sum() > 3
  np.testing.assert_allclose(metrics.max_ratio, 4.0)
  np.testing.assert_allclose(metrics.min_ratio, 0.5)


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_surrogate_is_its_equation_in_a_loop(dual_clip):
  rng = np.random.default_rng(1)
  log_probs, behavior, advantages = rng.normal(size=(3, 4, 6))
  mask = rng.uniform(size=(4, 6)) * (rng.uniform(size=(4, 6)) < 0.6)
  total = 0.0
  for at in itertools.product(range(4), range(6)):
    ratio, advantage = math.exp(log_probs[at] - behavior[at]), advantages[at]
    near = min(max(ratio, 1 - 0.3), 1 + 0.1)
    surrogate = min(ratio * advantage, near * advantage)
    if dual_clip is not None and advantage < 0:
      surrogate = max(surrogate, dual_clip * advantage)
    total -= mask[at] * surrogate
  holes = np.where(mask > 0, 0, np.nan)
  loss_fn = functools.partial(
    ppo.ppo_loss, clip_low=0.3, clip_high=0.1, dual_clip=dual_clip
  )
  numerator, denominator, _ = jax.jit(loss_fn)(
    *(x + holes for x in (log_probs, behavior, advantages)), mask
  )
  np.testing.assert_allclose(numerator, total, rtol=1e-12)
  np.testing.assert_allclose(denominator, mask.sum(), rtol=1e-12)


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_gradient_at_ratio_1_is_that_of_reinforce_with_baseline(dual_clip):
  rng = np.random.default_rng(2)
  log_probs, advantages = jnp.asarray(rng.normal(size=(2, 4, 6)))
  mask = jnp.asarray(
    rng.uniform(size=(4, 6)) * (rng.uniform(size=(4, 6)) < 0.6)
  )
  (_, ppo_weight, metrics), found = slopes(
    lambda x: ppo.ppo_loss(
      x, log_probs, advantages, mask, clip_low=0.0, dual_clip=dual_clip
    ),
    log_probs,
  )
  (_, weight), expected = slopes(
    lambda x: policy_gradient.reinforce_loss(x, advantages, mask), log_probs
  )
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  assert np.abs(expected).max() > 0.1
  assert float(ppo_weight) == float(weight)
  assert float(metrics.clipped_sum) == 0
  assert float(metrics.min_ratio) == float(metrics.max_ratio) == 1


def test_a_clipped_ratio_may_be_infinite():
  log_probs = jnp.array([[-1.0, -1.0, -1.0]])
  (numerator, _, metrics), gradient = slopes(
    lambda x: ppo.ppo_loss(
      x,
      jnp.array([[-1e4, -1e4, -1e4]]),
      jnp.array([[1.0, -1.0, 0.0]]),
      jnp.ones((1, 3)),
      dual_clip=3.0,
    ),
    log_probs,
  )
  np.testing.assert_allclose(numerator, -1.2 + 3.0)
  np.testing.assert_array_equal(gradient, np.zeros((1, 3)))
  assert float(metrics.clipped_sum) == 2
  assert math.isinf(metrics.max_ratio)


def test_metrics_of_row_groups_merge_to_those_of_the_batch():
  rng = np.random.default_rng(5)
  arrays = rng.normal(size=(3, 4, 6))
  mask = rng.uniform(size=(4, 6)) < 0.6
  mask[3] = False
  arrays = np.where(mask, arrays, np.nan)

  loss_fn = jax.jit(ppo.ppo_loss)

  def metrics_of(rows):
    return loss_fn(*arrays[:, rows], mask[rows])[2]

  whole, parts = metrics_of(slice(4)), [metrics_of([i]) for i in range(4)]
  for name, merge in [
    ("clipped_sum", sum),
    ("max_ratio", max),
    ("min_ratio", min),
  ]:
    merged = merge(float(vars(part)[name]) for part in parts)
    np.testing.assert_allclose(vars(whole)[name], merged, rtol=1e-12)
  assert vars(parts[3]) == {"clipped_sum": 0, "max_ratio": 1, "min_ratio": 1}
  # Neither extreme crosses 1, be there padding or not.
  one, two = np.zeros((1, 1)), np.full((1, 1), math.log(2))
  rare, likely = (
    loss_fn(x, y, one, one + 1)[2] for x, y in ((one, two), (two, one))
  )
  np.testing.assert_allclose([rare.min_ratio, rare.max_ratio], [0.5, 1])
  np.testing.assert_allclose([likely.min_ratio, likely.max_ratio], [1, 2])


@pytest.mark.parametrize("dual_clip", [1.0, 0.0, -2.0])
def test_a_dual_clip_that_would_clip_all_is_refused(dual_clip):
  ones = jnp.ones((1, 1))
  with pytest.raises(ValueError, match=f"dual_clip={dual_clip}"):
    ppo.ppo_loss(ones, ones, ones, ones, dual_clip=dual_clip)


# Value, return; half the larger square and its slope at max_change 0.5 around
# an old value of 1; the same without clipping.
VALUES_BY_HAND = np.array(
  [
    [2.0, 3.0, 1.125, 0.0, 0.5, -1.0],
    [2.0, 0.0, 2.0, 2.0, 2.0, 2.0],
    [1.3, 2.0, 0.245, -0.7, 0.245, -0.7],
    [0.0, -1.0, 1.125, 0.0, 0.5, 1.0],
    [0.0, 3.0, 4.5, -3.0, 4.5, -3.0],
  ]
)


@pytest.mark.parametrize("max_change, columns", [(0.5, (2, 3)), (None, (4, 5))])
def test_value_clipping_by_hand(max_change, columns):
  values, targets = jnp.asarray(VALUES_BY_HAND[:, :2].T[:, :, None])
  loss, slope = VALUES_BY_HAND[:, columns].T
  (numerator, denominator), gradient = slopes(
    lambda x: ppo.clipped_value_loss(
      x,
      jnp.ones_like(targets),
      targets,
      jnp.full_like(targets, 2.0),
      max_change=max_change,
    ),
    values,
  )
  np.testing.assert_allclose(numerator, 2 * loss.sum(), rtol=1e-12)
  np.testing.assert_allclose(gradient[:, 0], 2 * slope, rtol=1e-12, atol=1e-12)
  assert float(denominator) == 2 * len(values)


def softmax_pair():
  return np.random.default_rng(6).normal(size=(2, 4))


def divergence(logits, other):
  """KL of the first softmax from the second, written out."""
  log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q))


def estimates(estimator, logits, reference):
  """`[4]` penalty of each token."""
  return ppo.kl_penalty(
    jax.nn.log_softmax(logits),
    jax.nn.log_softmax(reference),
    jnp.ones(4, bool),
    estimator=estimator,
  )


@pytest.mark.parametrize("estimator", ppo.ESTIMATORS)
def test_expected_penalty_and_its_expected_gradient(estimator):
  """k3 has the divergence, k2 has its gradient; k3's is the reverse."""

  @jax.jit
  def run(logits, reference):
    probs = jax.nn.softmax(logits)

    def expected(x):
      return jnp.sum(probs * estimates(estimator, x, reference))

    half_square = jnp.sum(
      probs
      * jnp.square(jax.nn.log_softmax(logits) - jax.nn.log_softmax(reference))
      / 2
    )
    of_divergence = {
      "k2": jax.grad(divergence)(logits, reference),
      "k3": jax.grad(divergence, argnums=1)(reference, logits),
    }
    value = divergence(logits, reference)
    return (
      (expected(logits), jax.grad(expected)(logits)),
      (half_square if estimator == "k2" else value, of_divergence[estimator]),
    )

  (value, slopes), (expected, expected_slopes) = run(*softmax_pair())
  np.testing.assert_allclose(value, expected, rtol=1e-12)
  np.testing.assert_allclose(slopes, expected_slopes, atol=1e-14)


def test_no_penalty_is_negative():
  logits, reference = softmax_pair()
  found = jax.jit(
    lambda x, y: [estimates(name, x, y) for name in ppo.ESTIMATORS]
  )(logits, reference)
  assert not any((x < 0).any() for x in found)
  # Near the reference, where exp(-d) - 1 alone would be round-off.
  near = ppo.kl_penalty(
    np.float32(1e-4), np.float32(0), np.float32(1), estimator="k3"
  )
  np.testing.assert_allclose(near, 5e-9, atol=1e-10)


def test_an_unknown_estimator_names_the_choices():
  ones = jnp.ones(2)
  with pytest.raises(ValueError, match="'k1'.*k2.*k3"):
    ppo.kl_penalty(ones, ones, ones, estimator="k1")
