"""Baselines: from outcome rewards of groups of solutions to advantages.

A baseline is what a solution could be expected to earn; subtracting it lowers
the variance of the policy gradient, and as long as it does not depend on the
solution itself it leaves the expectation alone. The group's mean does depend on
it, which shrinks the gradient by (G - 1) / G; the mean of the others does not;
dividing by the standard deviation changes the weight of problems.

In all of them rewards are `[B, G]`, one per solution, and the mask is True (not
0) where there is a solution; elsewhere rewards may hold anything, NaN included,
and the advantage is 0. A group of one, a group without a solution and a group
of equal rewards have advantage 0 exactly: round-off in their mean would become
whole updates, because the optimizer divides by the size of the gradient.
"""

import chex
import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class MovingBaseline:
  """Average reward of earlier batches.

  Attributes:
    reward_sum: scalar, decayed sum of the batches' mean rewards.
    weight: scalar, the same sum of ones; 0 before the first batch.
  """

  reward_sum: jax.Array
  weight: jax.Array


def group_advantages(
  rewards: jax.Array,
  mask: jax.Array,
  *,
  scale_by_std: bool,
  epsilon: float = 1e-6,
) -> jax.Array:
  """Reward minus the mean of the group, in units of its deviation if asked.

    A_i = (r_i - mean(r)) / (std(r) + epsilon)

  GRPO (Shao et al., arXiv 2402.03300, section 4.1.2) divides, by the standard
  deviation over all G; Dr. GRPO (Liu et al., arXiv 2503.20783, section 3.2)
  does not, so that problems nearly always or nearly never solved do not weigh
  more.

  Args:
    rewards: `[B, G]` outcome rewards.
    mask: `[B, G]`, as in the head of this file.
    scale_by_std: True for GRPO, False for Dr. GRPO.
    epsilon: added to the deviation; not read without it.

  Returns:
    `[B, G]` advantages.
  """
  rewards, is_valid, num_valid = _groups(rewards, mask)
  mean = jnp.sum(rewards, axis=1, keepdims=True) / jnp.maximum(num_valid, 1)
  centred = jnp.where(is_valid, rewards - mean, 0)
  if scale_by_std:
    squares = jnp.sum(jnp.square(centred), axis=1, keepdims=True)
    variance = squares / jnp.maximum(num_valid, 1)
    # The square root has no slope at 0.
    std = jnp.sqrt(jnp.where(variance == 0, 1, variance))
    centred = centred / (std + epsilon)
  return jnp.where(_is_flat(rewards, is_valid), 0, centred)


def leave_one_out_advantages(rewards: jax.Array, mask: jax.Array) -> jax.Array:
  """Reward minus the mean of the group's other solutions.

    A_i = r_i - sum_{j != i} r_j / (G - 1) = G / (G - 1) * (r_i - mean(r))

  RLOO (Ahmadian et al., arXiv 2402.14740); the policy gradient stays unbiased.
  G counts the valid solutions of the group.

  Args:
    rewards: `[B, G]` outcome rewards.
    mask: `[B, G]`, as in the head of this file.

  Returns:
    `[B, G]` advantages.
  """
  rewards, is_valid, num_valid = _groups(rewards, mask)
  others = jnp.sum(rewards, axis=1, keepdims=True) - rewards
  advantages = rewards - others / jnp.maximum(num_valid - 1, 1)
  is_silent = _is_flat(rewards, is_valid) | ~is_valid
  return jnp.where(is_silent, 0, advantages)


def empty_baseline() -> MovingBaseline:
  """Returns the moving baseline before the first batch."""
  return MovingBaseline(reward_sum=jnp.zeros(()), weight=jnp.zeros(()))


def moving_advantages(
  baseline: MovingBaseline,
  rewards: jax.Array,
  mask: jax.Array,
  *,
  decay: float = 0.9,
) -> tuple[MovingBaseline, jax.Array]:
  """Reward minus the average of earlier batches, which then takes these in.

    A_i  = r_i - reward_sum / weight
    reward_sum <- decay * reward_sum + (1 - decay) * mean(r)
    weight     <- decay * weight + (1 - decay)

  Williams, Machine Learning 8 (1992), "Simple statistical gradient-following
  algorithms": reinforcement comparison. The batch at hand is not in its own
  baseline, so the gradient stays unbiased. Before the first batch the baseline
  is 0.

  Args:
    baseline: of the earlier batches.
    rewards: `[B, G]` outcome rewards.
    mask: `[B, G]`, as in the head of this file. A batch without a solution
      leaves the baseline as it is.
    decay: in [0, 1), per batch.

  Returns:
    `(baseline, advantages [B, G])`.
  """
  rewards, is_valid, num_valid = _groups(rewards, mask)
  is_empty = baseline.weight == 0
  mean = baseline.reward_sum / jnp.where(is_empty, 1, baseline.weight)
  advantages = jnp.where(is_valid, rewards - mean, 0)
  count = jnp.sum(num_valid)
  batch_mean = jnp.sum(rewards) / jnp.maximum(count, 1)
  moved = MovingBaseline(
    reward_sum=decay * baseline.reward_sum + (1 - decay) * batch_mean,
    weight=decay * baseline.weight + (1 - decay),
  )
  moved = jax.tree.map(
    lambda new, old: jnp.where(count == 0, old, new).astype(old.dtype),
    moved,
    baseline,
  )
  return moved, advantages


def _groups(rewards, mask):
  """Rewards with 0 for what is not there, the mask, and `[B, 1]` counts."""
  chex.assert_rank([rewards, mask], 2)
  chex.assert_equal_shape([rewards, mask])
  is_valid = mask != 0
  # Rewards of 0 and 1 may be whole numbers; advantages never are.
  dtype = jnp.result_type(jnp.float32, rewards)
  rewards = jnp.where(is_valid, rewards, 0).astype(dtype)
  return rewards, is_valid, jnp.sum(is_valid, axis=1, keepdims=True)


def _is_flat(rewards, is_valid):
  """`[B, 1]` True where no two solutions of the group differ in reward."""
  highest = jnp.max(
    rewards, axis=1, keepdims=True, where=is_valid, initial=-jnp.inf
  )
  lowest = jnp.min(
    rewards, axis=1, keepdims=True, where=is_valid, initial=jnp.inf
  )
  return highest <= lowest
