"""The policy gradient: make tokens likelier that earned more than expected.

REINFORCE and actor-critic are one loss and differ in where their advantages
come from: `baselines` compares whole solutions, `returns` follows one along its
positions. Data that another policy drew is weighted by the ratio of the two
probabilities. Numerators and denominators stay apart until every microbatch and
device is added.

In all of them `[B, T]` log-probs are of the token that follows position t,
natural log. The mask is 1 on the tokens of the solution and 0 on prompt and
padding, where every other array may hold anything, NaN included; a loss also
takes weights of 0 or more for it (1 / length of its row counts every solution
alike).
"""

import chex
import jax
import jax.numpy as jnp

LEVELS = ("token", "sequence")


def reinforce_loss(
  log_probs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  importance_weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Surrogate whose gradient is the policy gradient.

    loss = - sum_t m_t * w_t * A_t * log p(x_{t+1} | x_{<=t}) / sum_t m_t

  Williams, Machine Learning 8 (1992), "Simple statistical gradient-following
  algorithms", theorem 1; with weights Degris et al., "Off-policy actor-critic",
  arXiv 1205.4839. Advantages and weights are constants to the gradient.

  Args:
    log_probs: `[B, T]`.
    advantages: `[B, T]` return minus baseline; an outcome's advantage stands at
      every token of its solution.
    mask: `[B, T]`, as in the head of this file.
    importance_weights: `[B, T]` as from `importance_weights`; None for data of
      the policy itself. They do not enter the denominator, which keeps the
      estimate unbiased.

  Returns:
    `(weighted sum, sum of the mask)`, scalars.
  """
  chex.assert_rank([log_probs, advantages, mask], 2)
  chex.assert_equal_shape([log_probs, advantages, mask])
  is_valid = mask != 0
  weights = mask.astype(log_probs.dtype)
  scale = jnp.where(is_valid, advantages, 0)
  if importance_weights is not None:
    chex.assert_equal_shape([log_probs, importance_weights])
    scale = scale * jnp.where(is_valid, importance_weights, 0)
  scale = jax.lax.stop_gradient(scale)
  # Where nothing is to be learned a log-prob of -inf must not become NaN.
  learned = jnp.where(is_valid & (scale != 0), log_probs, 0)
  return -jnp.sum(weights * scale * learned), jnp.sum(weights)


def importance_weights(
  log_probs: jax.Array,
  behavior_log_probs: jax.Array,
  mask: jax.Array,
  *,
  level: str = "token",
  max_weight: float | None = None,
) -> jax.Array:
  """Probability under the policy over that under what drew the tokens.

    token     w_t = p(x_{t+1} | x_{<=t}) / b(x_{t+1} | x_{<=t})
    sequence  w   = product of w_t over the valid t of the row
    truncated min(w, max_weight)

  Truncated importance sampling: Ionides, Journal of Computational and Graphical
  Statistics 17 (2008). The weight of the sequence makes the estimate unbiased;
  that of the token has less variance and leaves out how likely the rest was.

  Args:
    log_probs: `[B, T]` under the policy.
    behavior_log_probs: `[B, T]` under what drew the tokens; its density must
      exist, which it does not for steps chosen by argmax.
    mask: `[B, T]`, as in the head of this file.
    level: "token" or "sequence".
    max_weight: the largest weight; None to truncate none.

  Returns:
    `[B, T]` weights, 0 where the mask is 0; at level "sequence" one number
    along the valid positions of a row. No gradient passes.

  Raises:
    ValueError: unknown level.
  """
  if level not in LEVELS:
    raise ValueError(f"level={level!r} is unknown; take one of {LEVELS}")
  chex.assert_rank([log_probs, behavior_log_probs, mask], 2)
  chex.assert_equal_shape([log_probs, behavior_log_probs, mask])
  is_valid = mask != 0
  log_ratios = jnp.where(is_valid, log_probs - behavior_log_probs, 0)
  if level == "sequence":
    log_ratios = jnp.broadcast_to(
      jnp.sum(log_ratios, axis=1, keepdims=True), log_ratios.shape
    )
  weights = jnp.where(is_valid, jnp.exp(log_ratios), 0)
  if max_weight is not None:
    weights = jnp.minimum(weights, max_weight)
  return jax.lax.stop_gradient(weights)


def effective_sample_size(weights: jax.Array, mask: jax.Array) -> jax.Array:
  """How many equally weighted samples the weighted ones are worth.

    (sum w)^2 / sum w^2

  Kong, "A note on importance sampling using standardized weights" (1992).

  Args:
    weights: `[...]`, 0 or more. Of whole sequences pass one weight per row, as
      `weights.max(1)` and `mask.any(1)`.
    mask: `[...]` True (not 0) where a sample is.

  Returns:
    A scalar between 1 and the number of samples; 0 without weights.
  """
  chex.assert_equal_shape([weights, mask])
  weights = jnp.where(mask != 0, weights, 0)
  # Only ratios matter; the square of a large weight would overflow.
  largest = jnp.max(weights, initial=0)
  weights = weights / jnp.where(largest == 0, 1, largest)
  squares = jnp.sum(jnp.square(weights))
  return jnp.square(jnp.sum(weights)) / jnp.where(squares == 0, 1, squares)


def entropy_bonus(
  policy_logits: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Entropy of the next token, as numerator and denominator.

    H_t = - sum_v p(v | x_{<=t}) * log p(v | x_{<=t}),  in nats

  Williams and Peng, Connection Science 3 (1991), "Function optimization using
  connectionist reinforcement learning algorithms". It is a bonus: subtract it
  from a loss.

  Args:
    policy_logits: `[B, T, V]`; -inf for a token that cannot come.
    mask: `[B, T]`, as in the head of this file.

  Returns:
    `(weighted sum, sum of the mask)`, scalars.
  """
  chex.assert_rank([policy_logits, mask], [3, 2])
  chex.assert_equal_shape_prefix([policy_logits, mask], 2)
  weights = mask.astype(policy_logits.dtype)
  logits = jnp.where(mask[:, :, None] != 0, policy_logits, 0)
  log_probs = jax.nn.log_softmax(logits)
  is_possible = log_probs > -jnp.inf
  surprise = -jnp.where(is_possible, log_probs, 0)
  entropies = jnp.sum(jnp.exp(log_probs) * surprise, axis=2)
  return jnp.sum(weights * entropies), jnp.sum(weights)


def length_penalties(
  lengths: jax.Array, *, free_length: int, max_length: int
) -> jax.Array:
  """Penalties to add to outcome rewards, before their baseline.

    0                                               n <= free_length
    (free_length - n) / (max_length - free_length)  between
    -1                                              n >= max_length

  DAPO (Yu et al., arXiv 2503.14476), section 3.4, soft overlong punishment.

  Args:
    lengths: `[...]` tokens of each solution.
    free_length: tokens that cost nothing.
    max_length: tokens from which the whole penalty is due.

  Raises:
    ValueError: nothing lies between the two lengths.
  """
  if free_length >= max_length:
    raise ValueError(
      f"free_length={free_length} must be below max_length={max_length}"
    )
  excess = (lengths - free_length) / (max_length - free_length)
  return -jnp.clip(excess, 0, 1)
