"""The AlphaGo Zero loss: imitate the search, predict the outcome.

Search returns at each node a visit distribution over candidate steps that is
better than the policy that proposed them; the policy learns that distribution
and the value head learns how the solution ended. A step is several tokens and
its log-prob is the sum of theirs, so the visit probability of a step stands as
the weight of each of its tokens and the policy term is cloning with weights.
Cloning rows, search rows and rows for the value alone differ only in their
weights and may share a batch.
"""

import chex
import jax
from flax import struct

from o1jax.learning import cloning
from o1jax.learning.value_losses import value_loss


@struct.dataclass
class LossSums:
  """Numerators and denominators of a loss; scalars that add over row groups.

  Attributes:
    policy_sum: sum of weighted negative log-probs.
    policy_weight: sum of the policy weights.
    value_sum: sum of weighted cross entropies of the value.
    value_weight: sum of the value weights.
  """

  policy_sum: jax.Array
  policy_weight: jax.Array
  value_sum: jax.Array
  value_weight: jax.Array


def alphazero_loss(
  log_probs: jax.Array,
  policy_weights: jax.Array,
  value_logits: jax.Array,
  value_targets: jax.Array,
  value_weights: jax.Array,
) -> LossSums:
  """Sums of the two terms of the AlphaGo Zero loss.

    policy = - sum_a visit_probs(a) * log p(a | s),  log p(a | s) summed over
               the tokens of step a
    value  = - z log v(s) - (1 - z) log(1 - v(s))

  Silver et al., Nature 550 (2017), "Mastering the game of Go without human
  knowledge", equation 1, with its squared error replaced by the cross entropy
  that belongs to outcomes in [0, 1]; weight decay is the optimizer's.

  Args:
    log_probs: `[B, T]` log-prob of the token that follows position t.
    policy_weights: `[B, T]`, 0 or more; visit probability of the step that
      holds the following token.
    value_logits: `[B, T]` of the value after position t, or in bins `[B, T,
      K]`; see `value_losses.value_loss`.
    value_targets: `[B, T]` outcome z, in [0, 1].
    value_weights: `[B, T]`, 0 or more. Where a weight is 0 the other arrays
      may hold anything, NaN included.

  Returns:
    The sums, not yet divided.
  """
  chex.assert_equal_shape([log_probs, value_targets])
  policy_sum, policy_weight = cloning.cloning_loss(log_probs, policy_weights)
  value_sum, value_weight = value_loss(
    value_logits, value_targets, value_weights
  )
  return LossSums(
    policy_sum=policy_sum,
    policy_weight=policy_weight,
    value_sum=value_sum,
    value_weight=value_weight,
  )
