"""Behaviour cloning: imitate the tokens of given solutions.

The policy term of every loss in this package has one form, a sum of weighted
negative log-probs; a method is the choice of the weights. For cloning they are
1 on the tokens of the solution and 0 on the prompt and the padding. Numerator
and denominator stay apart, because a mean may only be taken once the
microbatches and devices are added.
"""

import chex
import jax
import jax.numpy as jnp


def cloning_loss(
  log_probs: jax.Array, policy_weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the weighted cross entropy as numerator and denominator.

    loss = sum_t w_t * -log p(x_{t+1} | x_{<=t}) / sum_t w_t

  Section 3 of the roadmap (arXiv 2412.14135), policy initialization; with
  correct solutions found by search it is the cloning of section 6 (expert
  iteration).

  Args:
    log_probs: `[B, T]` log-prob of the token that follows position t, natural
      log. Positions of weight 0 may hold anything, NaN included.
    policy_weights: `[B, T]`, 0 or more.

  Returns:
    `(weighted sum, sum of weights)`, scalars.
  """
  chex.assert_rank([log_probs, policy_weights], 2)
  chex.assert_equal_shape([log_probs, policy_weights])
  # The inner `where` keeps a NaN at a masked position out of the gradient too.
  learned = jnp.where(policy_weights != 0, log_probs, 0)
  return -jnp.sum(policy_weights * learned), jnp.sum(policy_weights)
