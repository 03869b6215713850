"""PPO: several updates from one batch, as long as the policy stays near.

The surrogate weights an advantage by the ratio of the present policy to the one
that drew the tokens, and stops pushing a token once its ratio has left a range
around 1 on the side that the advantage asks for. Value clipping and a penalty
on the divergence from a reference policy belong to it. Numerators and
denominators stay apart until every microbatch and device is added.

Log-probs and masks are those of `policy_gradient`.
"""

import chex
import jax
import jax.numpy as jnp
from flax import struct

ESTIMATORS = ("k2", "k3")


@struct.dataclass
class PPOMetrics:
  """How far the policy has gone; scalars without a gradient.

  Attributes:
    clipped_sum: sum of the mask where the token no longer gets a gradient
      because of its ratio; add it up and divide as the loss.
    max_ratio: largest ratio, at least 1; groups of rows merge by the maximum.
    min_ratio: smallest ratio, at most 1; groups of rows merge by the minimum.
  """

  clipped_sum: jax.Array
  max_ratio: jax.Array
  min_ratio: jax.Array


def ppo_loss(
  log_probs: jax.Array,
  behavior_log_probs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float | None = None,
) -> tuple[jax.Array, jax.Array, PPOMetrics]:
  """The clipped surrogate, as numerator and denominator.

    u_t  = exp(log_probs - behavior_log_probs)
    s_t  = min(u_t A_t, clip(u_t, 1 - clip_low, 1 + clip_high) A_t)
    s_t  = max(s_t, dual_clip A_t)  where A_t < 0, if asked for
    loss = - sum_t m_t s_t / sum_t m_t

  Schulman et al., arXiv 1707.06347, equation 7. Two different clips are from
  DAPO (Yu et al., arXiv 2503.14476, section 3.1), where a higher upper one lets
  rare tokens rise; the dual clip is from Ye et al., arXiv 1912.09729, and
  bounds the loss of a bad token that has become far likelier. At ratio 1 the
  gradient is that of `reinforce_loss`.

  Args:
    log_probs: `[B, T]` under the policy.
    behavior_log_probs: `[B, T]` under what drew the tokens; a constant.
    advantages: `[B, T]`; constants.
    mask: `[B, T]`, 0 or more; where it is 0 the other arrays may hold
      anything, NaN included.
    clip_low: how far a ratio may fall below 1.
    clip_high: how far it may rise above 1.
    dual_clip: largest ratio that counts where the advantage is negative, above
      1; None for no such bound.

  Returns:
    `(weighted sum, sum of the mask, metrics)`; the first two are scalars.

  Raises:
    ValueError: `dual_clip` of 1 or less.
  """
  if dual_clip is not None and dual_clip <= 1:
    raise ValueError(f"dual_clip={dual_clip} must be above 1, or None")
  arrays = [log_probs, behavior_log_probs, advantages, mask]
  chex.assert_rank(arrays, 2)
  chex.assert_equal_shape(arrays)
  is_valid = mask != 0
  weights = mask.astype(log_probs.dtype)
  advantages = jax.lax.stop_gradient(jnp.where(is_valid, advantages, 0))
  behavior_log_probs = jax.lax.stop_gradient(behavior_log_probs)
  log_ratios = jnp.where(is_valid, log_probs - behavior_log_probs, 0)
  ratios = jax.lax.stop_gradient(jnp.exp(log_ratios))

  # The minimum and the maximum of the equations, told by the side on which a
  # ratio is out of bounds: through them a ratio of infinity would come back as
  # NaN although its token is clipped.
  bounds = jnp.where(advantages > 0, 1 + clip_high, 1 - clip_low)
  is_clipped = (advantages > 0) & (ratios > 1 + clip_high)
  is_clipped |= (advantages < 0) & (ratios < 1 - clip_low)
  if dual_clip is not None:
    is_beyond = (advantages < 0) & (ratios > dual_clip)
    bounds = jnp.where(is_beyond, dual_clip, bounds)
    is_clipped |= is_beyond
  is_pushed = ~is_clipped & (advantages != 0)
  pushed = jnp.exp(jnp.where(is_pushed, log_ratios, 0))
  surrogate = jnp.where(is_clipped, bounds, pushed) * advantages

  metrics = PPOMetrics(
    clipped_sum=jnp.sum(weights * is_clipped),
    max_ratio=jnp.max(ratios, initial=1),
    min_ratio=jnp.min(ratios, initial=1),
  )
  return -jnp.sum(weights * surrogate), jnp.sum(weights), metrics


def clipped_value_loss(
  values: jax.Array,
  behavior_values: jax.Array,
  returns: jax.Array,
  mask: jax.Array,
  *,
  max_change: float | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Squared error of the value, which gains nothing by a large change.

    near_t = clip(V_t, old_t - max_change, old_t + max_change)
    loss   = sum_t m_t / 2 * max((V_t - G_t)^2, (near_t - G_t)^2) / sum_t m_t

  The value clipping of PPO's first implementation, described by Engstrom et
  al., arXiv 2005.12729.

  Args:
    values: `[B, T]` estimates at position t.
    behavior_values: `[B, T]` the same when the data was made; constants.
    returns: `[B, T]` targets; constants.
    mask: `[B, T]`, 0 or more; where it is 0 the other arrays may hold
      anything, NaN included.
    max_change: largest change that may lower the loss; None for the plain
      squared error.

  Returns:
    `(weighted sum, sum of the mask)`, scalars.
  """
  chex.assert_rank([values, behavior_values, returns, mask], 2)
  chex.assert_equal_shape([values, behavior_values, returns, mask])
  weights = mask.astype(values.dtype)
  values, behavior_values, returns = (
    jnp.where(mask != 0, array, 0)
    for array in (values, behavior_values, returns)
  )
  old = jax.lax.stop_gradient(behavior_values)
  returns = jax.lax.stop_gradient(returns)
  errors = jnp.square(values - returns)
  if max_change is not None:
    near = jnp.clip(values, old - max_change, old + max_change)
    errors = jnp.maximum(errors, jnp.square(near - returns))
  return jnp.sum(weights * errors) / 2, jnp.sum(weights)


def kl_penalty(
  log_probs: jax.Array,
  reference_log_probs: jax.Array,
  mask: jax.Array,
  *,
  estimator: str,
) -> jax.Array:
  """Estimates KL(policy | reference) from tokens that the policy drew.

    d  = log_probs - reference_log_probs
    k2 = d^2 / 2             biased, small variance
    k3 = exp(-d) - 1 + d     unbiased, never negative

  Schulman, "Approximating KL divergence" (2020),
  http://joschu.net/blog/kl-approx.html. What is said of bias is said of the
  value. As a term of a loss only k2 has the gradient of the divergence; the
  expected gradient of k3 belongs to KL(reference | policy). His k1, which is d
  itself, has an expected gradient of 0: it belongs into rewards, not here.

  Args:
    log_probs: `[...]` of the tokens under the policy.
    reference_log_probs: `[...]` the same under the reference; constants.
    mask: `[...]`, True (not 0) where a token counts; elsewhere the other arrays
      may hold anything, NaN included.
    estimator: "k2" or "k3".

  Returns:
    `[...]` penalties, 0 where the mask is 0.

  Raises:
    ValueError: unknown estimator.
  """
  if estimator not in ESTIMATORS:
    raise ValueError(
      f"estimator={estimator!r} is unknown; take one of {ESTIMATORS}"
    )
  chex.assert_equal_shape([log_probs, reference_log_probs, mask])
  reference_log_probs = jax.lax.stop_gradient(reference_log_probs)
  difference = jnp.where(mask != 0, log_probs - reference_log_probs, 0)
  if estimator == "k2":
    return jnp.square(difference) / 2
  return jnp.expm1(-difference) + difference
