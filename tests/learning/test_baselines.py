"""Baselines against loops over groups, and where a group tells nothing.

Whether they leave the policy gradient unbiased is in test_policy_gradient.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.learning import baselines

# All there, holes, a pair, one alone, nobody.
MASK = np.array(
  [[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]], bool
)

pytestmark = pytest.mark.usefixtures("quick_programs")


def make_rewards(seed=0):
  rewards = np.random.default_rng(seed).normal(size=MASK.shape)
  return np.where(MASK, rewards, np.nan).astype(np.float32)


def mean_baseline(rewards):
  return [r - np.mean(rewards) for r in rewards]


def scaled_mean_baseline(rewards):
  if len(rewards) == 1:
    return [0.0]
  mean = sum(rewards) / len(rewards)
  std = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
  return [(r - mean) / std for r in rewards]


def others_baseline(rewards):
  if len(rewards) == 1:
    return [0.0]
  found = []
  for i, reward in enumerate(rewards):
    others = [r for j, r in enumerate(rewards) if j != i]
    found.append(reward - sum(others) / len(others))
  return found


@jax.jit
def by_group_mean(rewards, mask):
  return baselines.group_advantages(rewards, mask, scale_by_std=False)


@jax.jit
def by_group_mean_and_std(rewards, mask):
  return baselines.group_advantages(rewards, mask, scale_by_std=True)


by_the_others = jax.jit(baselines.leave_one_out_advantages)
by_earlier_batches = jax.jit(
  baselines.moving_advantages, static_argnames="decay"
)

BASELINES = {
  "Dr. GRPO": (by_group_mean, mean_baseline),
  "GRPO": (by_group_mean_and_std, scaled_mean_baseline),
  "RLOO": (by_the_others, others_baseline),
}


@pytest.mark.parametrize("name", BASELINES)
def test_advantages_equal_a_loop_over_the_groups(name):
  advantages_fn, oracle = BASELINES[name]
  rewards = make_rewards()
  found = np.asarray(advantages_fn(rewards, MASK))
  for group in range(len(MASK)):
    valid = MASK[group]
    expected = np.zeros(MASK.shape[1])
    if valid.any():
      expected[valid] = oracle(np.float64(rewards[group][valid]))
    np.testing.assert_allclose(found[group], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BASELINES)
def test_a_group_that_tells_nothing_has_no_advantage(name):
  """Nobody, one, or several of one reward, whose mean is not always theirs."""
  advantages_fn, _ = BASELINES[name]
  rewards = np.repeat(np.linspace(0.01, 1, 64, dtype=np.float32), 7)
  mask = np.arange(7) < np.arange(64)[:, None] % 8
  rewards = np.where(mask, rewards.reshape(64, 7), np.nan)
  found = advantages_fn(rewards, mask)
  np.testing.assert_array_equal(found, np.zeros((64, 7)))


@pytest.mark.parametrize("name", BASELINES)
def test_slopes_are_finite_and_pass_by_what_is_not_there(name):
  advantages_fn, _ = BASELINES[name]
  rewards = make_rewards()
  rewards[0] = 1.0

  def energy(rewards):
    return jnp.sum(
      jnp.arange(20.0).reshape(5, 4) * advantages_fn(rewards, MASK)
    )

  slopes = jax.jit(jax.grad(energy))(rewards)
  assert np.isfinite(slopes).all()
  np.testing.assert_array_equal(slopes[~MASK], 0)
  assert np.abs(slopes[1]).max() > 0.1


@pytest.mark.parametrize("name", BASELINES)
def test_counted_rewards_have_fractional_advantages(name):
  advantages_fn, oracle = BASELINES[name]
  found = advantages_fn(np.array([[1, 0, 0]]), np.ones((1, 3), bool))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found[0], oracle(np.array([1, 0, 0])), rtol=1e-5)


def test_only_grpo_forgets_the_unit_of_the_rewards():
  rewards = make_rewards()
  for advantages_fn, factor in [
    (by_group_mean_and_std, 1),
    (by_group_mean, 100),
    (by_the_others, 100),
  ]:
    before = advantages_fn(rewards, MASK)
    after = advantages_fn(100 * rewards + 7, MASK)
    np.testing.assert_allclose(after, factor * before, rtol=2e-4, atol=1e-4)


def test_epsilon_bounds_the_advantage_of_a_nearly_flat_group():
  scaled = functools.partial(baselines.group_advantages, scale_by_std=True)
  rewards = np.array([[0.0, 2e-3]], np.float32)
  mask = np.ones((1, 2), bool)
  found = jax.jit(functools.partial(scaled, epsilon=1e-3))(rewards, mask)
  np.testing.assert_allclose(found, [[-0.5, 0.5]], rtol=1e-5)
  # Rewards so near that their variance is 0 in float32, and no epsilon.
  rewards = np.array([[0.0, 1e-30]], np.float32)
  found = jax.jit(functools.partial(scaled, epsilon=0.0))(rewards, mask)
  assert np.isfinite(found).all()


def test_moving_baseline_equals_a_loop_over_the_batches():
  baseline = baselines.empty_baseline()
  means = []
  for seed in range(4):
    rewards = make_rewards(seed)
    baseline, found = by_earlier_batches(baseline, rewards, MASK, decay=0.8)
    # The newest weighs 1, the one before 0.8, and so on; none of it is known
    # before the first batch.
    weights = [0.8**age for age in reversed(range(len(means)))]
    expected = np.average(means, weights=weights) if means else 0.0
    np.testing.assert_allclose(
      found, np.where(MASK, rewards - expected, 0), rtol=1e-5, atol=1e-6
    )
    means.append(np.mean(rewards[MASK]))


def test_a_batch_without_solutions_leaves_the_moving_baseline():
  baseline, _ = by_earlier_batches(
    baselines.empty_baseline(), make_rewards(), MASK, decay=0.8
  )
  nothing = np.full(MASK.shape, np.nan, np.float32)
  same, found = by_earlier_batches(
    baseline, nothing, np.zeros_like(MASK), decay=0.8
  )
  np.testing.assert_array_equal(found, np.zeros(MASK.shape))
  assert float(same.reward_sum) == float(baseline.reward_sum) != 0
  assert float(same.weight) == float(baseline.weight) != 0


def test_rewards_and_mask_must_be_groups_of_one_shape():
  for rewards, mask in [
    (jnp.ones(3), jnp.ones(3)),
    (jnp.ones((2, 3)), jnp.ones((2, 1))),
  ]:
    for advantages_fn, _ in BASELINES.values():
      with pytest.raises(AssertionError):
        advantages_fn(rewards, mask)
    with pytest.raises(AssertionError):
      baselines.moving_advantages(baselines.empty_baseline(), rewards, mask)
