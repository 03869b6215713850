"""Best-of-N without the N: distil what search by sampling finds into a policy.

Drawing N solutions from a reference and keeping the one of largest reward is
itself a distribution over solutions, and it has a formula: with F(r) the
probability that a draw of the reference has reward at most r and F_<(r) that it
has less,

  best(y) = reference(y) * F^(N-1) * sum_{i=0}^{N-1} (F_< / F)^i,  F = F(r(y)).

(`best_of_n_probs`; Sessa et al., arXiv 2407.14622, theorem 1.) The policy is
drawn towards it from two sides: it clones the best of N draws, and it is
rewarded for its own draws by log best - log policy (`vbon_rewards`), where F is
read off rewards of the reference (`log_quantiles`). `bond_loss` adds the two.
"""

import chex
import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class BondSums:
  """Numerators and denominators of `bond_loss`; they add over row groups.

  The loss is forward_sum / forward_weight + backward_sum / backward_weight:
  the weight between the two is in the numerators.

  Attributes:
    forward_sum: share of the forward divergence, up to a constant.
    forward_weight: sum of the weights of the best draws.
    backward_sum: surrogate whose gradient is that of the backward divergence.
    backward_weight: sum of the weights of the policy's own draws.
  """

  forward_sum: jax.Array
  forward_weight: jax.Array
  backward_sum: jax.Array
  backward_weight: jax.Array


def best_of_n_probs(
  probs: jax.Array, rewards: jax.Array, *, num_draws: int
) -> jax.Array:
  """Returns the distribution of the best of N draws from a finite one.

  The head's formula. The answers of one reward have together the probability
  F^N - F_<^N and share it in proportion to `probs`, which is what choosing any
  of the tied draws does. Exact; for worlds that can be enumerated.

  Args:
    probs: `[Y]` probabilities of all Y answers.
    rewards: `[Y]` their rewards; equal rewards are tied.
    num_draws: N, at least 1.

  Returns:
    `[Y]` probabilities.

  Raises:
    ValueError: for num_draws below 1.
  """
  _check_num_draws(num_draws)
  chex.assert_rank([probs, rewards], 1)
  chex.assert_equal_shape([probs, rewards])
  draws = probs[None, :]
  at_most = jnp.sum(draws * (rewards[None, :] <= rewards[:, None]), axis=1)
  below = jnp.sum(draws * (rewards[None, :] < rewards[:, None]), axis=1)
  # The sum of products keeps small differences F^N - F_<^N that powers lose.
  powers = jnp.arange(num_draws)[None, :]
  terms = at_most[:, None] ** (num_draws - 1 - powers)
  return probs * jnp.sum(terms * below[:, None] ** powers, axis=1)


def log_quantiles(
  rewards: jax.Array, reference_rewards: jax.Array, mask: jax.Array
) -> jax.Array:
  """Estimates log F(r), the log quantile of each reward under the reference.

    log F(r) = log( (1 + #{m: r_m <= r}) / (1 + M) )

  The draw counts as one more draw of the reference, which is at most as good
  as itself: so the estimate lies in [-log(1 + M), 0], is never -inf and tends
  to F as M grows. The authors' code of vBoN counts so too, with r_m < r. A draw
  worse than all M is punished by -log(1 + M) only, so M should not be small
  beside N. The order of rewards matters, not their scale.

  Args:
    rewards: `[B]` of the draws to be judged.
    reference_rewards: `[B, M]` of draws of the reference for the same problem,
      other draws than those judged.
    mask: `[B, M]` nonzero where there is such a draw; elsewhere rewards may
      hold anything, NaN included. A row without any yields 0, no preference.

  Returns:
    `[B]`, without gradient; a row whose reward is NaN is finite too.
  """
  at_most, _, total = _counts(rewards, reference_rewards, mask)
  return jnp.log((1 + at_most) / (1 + total))


def strict_shares(
  rewards: jax.Array, reference_rewards: jax.Array, mask: jax.Array
) -> jax.Array:
  """Estimates F_<(r) / F(r), the share of strictly worse draws.

    #{m: r_m < r} / (1 + #{m: r_m <= r})

  in [0, 1), with the counts of `log_quantiles`; arguments as there. It is
  small where many draws tie with r, as rewards of 0 and 1 do.

  Returns:
    `[B]`, without gradient.
  """
  at_most, below, _ = _counts(rewards, reference_rewards, mask)
  return below / (1 + at_most)


def vbon_rewards(
  log_quantiles: jax.Array,
  log_probs: jax.Array,
  reference_log_probs: jax.Array,
  mask: jax.Array,
  *,
  num_draws: int,
  strict_shares: jax.Array | None = None,
) -> jax.Array:
  """Rewards of the policy's own draws for being drawn as best-of-N draws.

    reward(y) = (N - 1) * log F(r(y)) - (log p(y) - log reference(y))

  Their mean under the policy is the objective of variational best-of-N (Amini,
  Vieira, Ash and Cotterell, arXiv 2407.06057, section 3, its lower bound) and
  of the backward term of BOND (Sessa et al., arXiv 2407.14622, section 4):
  E[(N - 1) log F] - KL(p || reference). It is greatest at reference * F^(N-1),
  normalised. That is below log best by the log of the head's sum, between 0
  (all tied) and log N (no answer has mass of its own); given `strict_shares`
  that log is added, and the optimum is best-of-N itself. Where rewards tie in
  masses, as 0 and 1 do, the difference is not small.

  Args:
    log_quantiles: `[B]` log F(r(y)), from the function of that name or exact.
    log_probs: `[B]` of whole solutions under the policy they were drawn from.
    reference_log_probs: `[B]` of the same under the reference.
    mask: `[B]` nonzero where the row holds a draw; elsewhere the other arrays
      may hold anything, NaN included, and the reward is 0.
    num_draws: N, at least 1; 1 leaves the pull to the reference alone.
    strict_shares: `[B]` F_<(r(y)) / F(r(y)) in [0, 1], None for the bound.

  Returns:
    `[B]` rewards without gradient. They are what REINFORCE takes as returns;
    a baseline may be subtracted.

  Raises:
    ValueError: for num_draws below 1.
  """
  _check_num_draws(num_draws)
  arrays = [log_quantiles, log_probs, reference_log_probs]
  if strict_shares is not None:
    arrays.append(strict_shares)
  chex.assert_rank([*arrays, mask], 1)
  chex.assert_equal_shape([*arrays, mask])
  rewards = (num_draws - 1) * log_quantiles - (log_probs - reference_log_probs)
  if strict_shares is not None:
    powers = strict_shares[:, None] ** jnp.arange(num_draws)[None, :]
    rewards += jnp.log(jnp.sum(powers, axis=1))
  return jax.lax.stop_gradient(jnp.where(mask != 0, rewards, 0))


def bond_loss(
  best_log_probs: jax.Array,
  best_weights: jax.Array,
  log_probs: jax.Array,
  advantages: jax.Array,
  weights: jax.Array,
  *,
  jeffreys_weight: float,
) -> BondSums:
  """Sums of a loss that draws the policy to the best-of-N distribution.

    loss = w * KL(best || p) + (1 - w) * KL(p || best),  w = jeffreys_weight

    forward   KL(best || p) = - E_best[ log p(y) ] + constant
    backward  gradient of KL(p || best)
                = - E_p[ (reward(y) - baseline) * gradient of log p(y) ]

  BOND, Sessa et al., arXiv 2407.14622, section 4; its beta weighs the backward
  term, beta = 1 - w. The forward term clones the best of N draws of the
  reference; the backward term is the policy gradient of `vbon_rewards`. With w
  = 0 this is variational best-of-N, with w = 1 cloning of best-of-N. The two
  sets of draws are apart and may differ in size (B and B').

  Args:
    best_log_probs: `[B]` under the policy, of the best of N draws.
    best_weights: `[B]`, 0 or more.
    log_probs: `[B']` under the policy, of its own fresh draws.
    advantages: `[B']` `vbon_rewards` of these draws, minus a baseline if one is
      wanted; they receive no gradient.
    weights: `[B']`, 0 or more. Where a weight is 0 the other arrays may hold
      anything, NaN included.
    jeffreys_weight: of the forward term, in [0, 1].

  Returns:
    The sums, not yet divided.

  Raises:
    ValueError: for jeffreys_weight outside [0, 1].
  """
  if not 0 <= jeffreys_weight <= 1:
    raise ValueError(f"jeffreys_weight={jeffreys_weight} is not in [0, 1]")
  chex.assert_rank([best_log_probs, best_weights], 1)
  chex.assert_equal_shape([best_log_probs, best_weights])
  chex.assert_rank([log_probs, advantages, weights], 1)
  chex.assert_equal_shape([log_probs, advantages, weights])
  # Inner `where`: a NaN at weight 0 must not reach the gradient either.
  best = jnp.where(best_weights != 0, best_log_probs, 0)
  own = jnp.where(weights != 0, log_probs, 0)
  advantages = jnp.where(weights != 0, advantages, 0)
  surrogate = jax.lax.stop_gradient(advantages) * own
  return BondSums(
    forward_sum=-jeffreys_weight * jnp.sum(best_weights * best),
    forward_weight=jnp.sum(best_weights),
    backward_sum=-(1 - jeffreys_weight) * jnp.sum(weights * surrogate),
    backward_weight=jnp.sum(weights),
  )


def _counts(rewards, reference_rewards, mask):
  """Reference draws of reward at most, and below, each reward; and all."""
  chex.assert_rank([rewards, reference_rewards, mask], [1, 2, 2])
  chex.assert_equal_shape([reference_rewards, mask])
  chex.assert_equal_shape_prefix([rewards, reference_rewards], 1)
  is_drawn = mask != 0
  at_most = is_drawn & (reference_rewards <= rewards[:, None])
  below = is_drawn & (reference_rewards < rewards[:, None])
  return tuple(
    jnp.sum(flags, axis=1).astype(rewards.dtype)
    for flags in (at_most, below, is_drawn)
  )


def _check_num_draws(num_draws):
  if num_draws < 1:
    raise ValueError(f"num_draws={num_draws} is below 1")
