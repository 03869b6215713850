"""Losses of the value: cross entropy to outcomes, or to labels of steps.

The target is the outcome of a solution (AlphaGo Zero), a return, or the label
of a step (`process_rewards`): a number in [0, 1], and a loss that is least
where the value says it. Heads of one logit and of bins (`value_bins`) are told
apart by the axes of their logits.
"""

import chex
import jax
import jax.numpy as jnp

from o1jax.value_bins import two_hot, value_of


def value_loss(
  value_logits: jax.Array, value_targets: jax.Array, value_weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Sums of the cross entropy between targets and the value head.

    one logit  - z log v(s) - (1 - z) log(1 - v(s))
    bins       - sum_k two_hot(z)_k log p_k(s)

  For a target between two atoms, or between 0 and 1, the least value is its
  entropy. With labels of steps it is the loss of Math-Shepherd, Wang et al.,
  arXiv 2312.08935, section 3.

  Args:
    value_logits: `[B, T]` of the value after position t, or `[B, T, K]` over
      its atoms.
    value_targets: `[B, T]` z, in [0, 1]; they receive no gradient.
    value_weights: `[B, T]`, 0 or more. Where a weight is 0 the other arrays
      may hold anything, NaN included.

  Returns:
    `(weighted sum, sum of weights)`, scalars.
  """
  chex.assert_rank(value_logits, {2, 3})
  chex.assert_rank([value_targets, value_weights], 2)
  chex.assert_equal_shape([value_targets, value_weights])
  chex.assert_equal_shape_prefix([value_logits, value_targets], 2)
  is_known = value_weights != 0
  targets = jax.lax.stop_gradient(jnp.where(is_known, value_targets, 0))
  if value_logits.ndim == 2:
    logits = jnp.where(is_known, value_logits, 0)
    cross_entropy = jax.nn.softplus(logits) - logits * targets
  else:
    logits = jnp.where(is_known[:, :, None], value_logits, 0)
    shares = two_hot(targets, logits.shape[2])
    cross_entropy = -jnp.sum(shares * jax.nn.log_softmax(logits), axis=-1)
  return jnp.sum(value_weights * cross_entropy), jnp.sum(value_weights)


def clipped_two_hot_loss(
  value_logits: jax.Array,
  behavior_values: jax.Array,
  value_targets: jax.Array,
  value_weights: jax.Array,
  *,
  max_change: float,
) -> tuple[jax.Array, jax.Array]:
  """The loss of a value in bins, which gains nothing by a large change.

    near_t = clip(V_t, old_t - max_change, old_t + max_change)
    loss_t = cross entropy  where |V_t - z_t| >= |near_t - z_t|, else 0

  V is the mean of the bins. The same values get no gradient as by
  `ppo.clipped_value_loss`: those that have come nearer to their target than the
  bound allows. Their weights still count.

  Args:
    value_logits: `[B, T, K]` over the atoms of the value after position t.
    behavior_values: `[B, T]` values when the data was made; constants.
    value_targets: `[B, T]`, as for `value_loss`.
    value_weights: `[B, T]`, as for `value_loss`.
    max_change: largest change that may lower the loss.

  Returns:
    `(weighted sum, sum of weights)`, scalars.
  """
  chex.assert_rank(value_logits, 3)
  chex.assert_equal_shape([behavior_values, value_targets, value_weights])
  values = value_of(value_logits, 2)
  near = jnp.clip(
    values, behavior_values - max_change, behavior_values + max_change
  )
  is_beyond = jnp.abs(values - value_targets) < jnp.abs(near - value_targets)
  kept = jnp.where(is_beyond, 0, value_weights)
  total, _ = value_loss(value_logits, value_targets, kept)
  return total, jnp.sum(value_weights)
