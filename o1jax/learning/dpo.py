"""Preferences: raise the better of two solutions above the worse one.

A policy hides a reward, beta * (log p - log reference), and the losses here fit
that reward to pairs of which one is preferred; no reward model is trained and
nothing is sampled. First the tokens of a solution, or of one step, become one
number (`sequence_log_probs`); then the pair becomes a margin between two hidden
rewards (`implicit_rewards`); then the variant says what margin is wanted
(`dpo_loss`). A problem whose solutions are all right or all wrong has no pair:
its row has weight 0 and counts nowhere.
"""

import chex
import jax
import jax.numpy as jnp

VARIANTS = ("dpo", "ipo", "conservative")


def sequence_log_probs(
  log_probs: jax.Array, mask: jax.Array, *, mean: bool = False
) -> jax.Array:
  """Returns the log-prob of each row's masked tokens, `[B]`.

    log p(y | x) = sum_t mask_t * log p(x_{t+1} | x_{<=t}),

  divided by the number of its tokens where `mean` is True: the
  length-normalised log-prob, under which a long solution has no larger margin
  than a short one only for being long (SimPO, arXiv 2405.14734, section 2.2).

  Args:
    log_probs: `[B, T]` log-prob of the token that follows position t.
    mask: `[B, T]` nonzero where that token belongs to the solution, or to the
      one step that is compared. Elsewhere `log_probs` may hold anything, NaN
      included; a row without tokens yields 0.
    mean: whether to divide by the number of tokens.
  """
  chex.assert_rank([log_probs, mask], 2)
  chex.assert_equal_shape([log_probs, mask])
  is_counted = mask != 0
  total = jnp.sum(jnp.where(is_counted, log_probs, 0), axis=1)
  if not mean:
    return total
  count = jnp.sum(is_counted, axis=1).astype(log_probs.dtype)
  return total / jnp.maximum(count, 1)


def implicit_rewards(
  log_probs: jax.Array, reference_log_probs: jax.Array, *, beta: float
) -> jax.Array:
  """Returns the reward that the policy is optimal for, up to a constant.

    reward(y) = beta * (log p(y | x) - log reference(y | x))

  Rafailov et al., arXiv 2305.18290, equation 5 without its partition function,
  which is the same for all solutions of a problem. No gradient reaches the
  reference.

  Args:
    log_probs: `[B]` from `sequence_log_probs`, under the policy.
    reference_log_probs: `[B]` the same under the reference.
    beta: strength of the pull towards the reference, above 0.

  Returns:
    `[B]` rewards.
  """
  chex.assert_equal_shape([log_probs, reference_log_probs])
  return beta * (log_probs - jax.lax.stop_gradient(reference_log_probs))


def dpo_loss(
  preferred_log_probs: jax.Array,
  dispreferred_log_probs: jax.Array,
  reference_preferred_log_probs: jax.Array,
  reference_dispreferred_log_probs: jax.Array,
  pair_mask: jax.Array,
  *,
  beta: float,
  variant: str = "dpo",
  label_noise: float = 0.0,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
  """Sums of a loss over ranked pairs, by the margin of implicit rewards.

  With m = reward(preferred) - reward(dispreferred) of `implicit_rewards`:

    "dpo"           - log sigmoid(m)
    "conservative"  - (1 - label_noise) * log sigmoid(m)
                      - label_noise * log sigmoid(-m)
    "ipo"           (m / beta - 1 / (2 * beta))^2

  "dpo" is the likelihood of the Bradley-Terry model (Rafailov et al., arXiv
  2305.18290, equation 7); its optimum is reference * exp(reward / beta), and
  for a pair that is always ranked alike its margin grows without end.
  "conservative" (Mitchell, "A note on DPO with noisy preferences", 2023) takes
  a share `label_noise` of the labels for flipped and ends at the margin
  log((1 - label_noise) / label_noise). "ipo" (Azar et al., arXiv 2310.12036,
  equation 17, tau written beta) asks for one margin of the log ratios,
  1 / (2 * beta), and no more. Lengths are normalised by `sequence_log_probs`
  with `mean` for policy and reference alike.

  Preferences between single steps (Step-DPO, Lai et al., arXiv 2406.18629,
  section 3) are the same loss: where two steps follow one shared prefix, as
  two children of a tree's node do, log p(step | prompt, prefix) is
  `sequence_log_probs` with a mask over the tokens of that step alone; the
  prefix stands in the row and is not counted.

  Args:
    preferred_log_probs: `[B]` of the better solution, under the policy.
    dispreferred_log_probs: `[B]` of the worse solution of the same problem.
    reference_preferred_log_probs: `[B]`, receives no gradient.
    reference_dispreferred_log_probs: `[B]`, receives no gradient.
    pair_mask: `[B]`, 0 or more, the weight of the pair; 0 where the problem has
      no pair. There the other arrays may hold anything, NaN included.
    beta: strength of the pull towards the reference, above 0.
    variant: one of `VARIANTS`.
    label_noise: share of flipped labels, in [0, 0.5); "conservative" only.

  Returns:
    `(numerator, denominator, metrics)`: the weighted loss, the sum of weights,
    and sums to be divided by it: accuracy (1 where the preferred has the larger
    implicit reward, 1/2 where they are equal), margin, preferred_reward,
    dispreferred_reward.

  Raises:
    ValueError: for an unknown variant, beta not above 0, label_noise outside
      [0, 0.5) or set for a variant that does not read it.
  """
  check_options(beta, variant, label_noise)
  arrays = (
    preferred_log_probs,
    dispreferred_log_probs,
    reference_preferred_log_probs,
    reference_dispreferred_log_probs,
  )
  chex.assert_rank([*arrays, pair_mask], 1)
  chex.assert_equal_shape([*arrays, pair_mask])
  # Before anything is computed, so that a NaN stays out of the gradient too.
  policy, other, policy_reference, other_reference = (
    jnp.where(pair_mask != 0, array, 0) for array in arrays
  )
  preferred = implicit_rewards(policy, policy_reference, beta=beta)
  dispreferred = implicit_rewards(other, other_reference, beta=beta)
  margins = preferred - dispreferred
  if variant == "ipo":
    losses = ((margins - 0.5) / beta) ** 2
  else:
    # -log sigmoid(m) = softplus(-m); `label_noise` is 0 for "dpo".
    losses = (1 - label_noise) * jax.nn.softplus(-margins)
    losses += label_noise * jax.nn.softplus(margins)
  metrics = {
    "accuracy": (jnp.sign(margins) + 1) / 2,
    "margin": margins,
    "preferred_reward": preferred,
    "dispreferred_reward": dispreferred,
  }
  metrics = {
    name: jax.lax.stop_gradient(jnp.sum(pair_mask * values))
    for name, values in metrics.items()
  }
  return jnp.sum(pair_mask * losses), jnp.sum(pair_mask), metrics


def check_options(beta: float, variant: str, label_noise: float) -> None:
  """Raises ValueError for options that `dpo_loss` does not take."""
  if variant not in VARIANTS:
    raise ValueError(f"variant={variant!r} is none of {', '.join(VARIANTS)}")
  if not beta > 0:
    raise ValueError(f"beta={beta} is not above 0")
  if not 0 <= label_noise < 0.5:
    raise ValueError(f"label_noise={label_noise} is not in [0, 0.5)")
  if label_noise and variant != "conservative":
    raise ValueError(
      f"label_noise={label_noise} is not read by variant={variant!r}: "
      "set it to 0 or choose conservative"
    )
