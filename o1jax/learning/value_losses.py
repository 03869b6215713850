"""Losses of the heads that judge: values in bins, and rewards of steps.

A value is learned as a distribution over fixed atoms: the target is written as
a weighting of the two atoms around it (`two_hot`), the head is trained on it by
cross entropy (`two_hot_value_loss`) and read as a mean (`two_hot_mean`). A
process reward is learned as a probability from the share of rollouts through a
step that ended right (`process_labels`, `process_reward_loss`). The value of an
outcome in [0, 1] by one logit is part of the AlphaGo Zero loss (`alphazero`).
"""

import chex
import jax
import jax.numpy as jnp

ESTIMATES = ("soft", "hard")


def two_hot(targets: jax.Array, support: jax.Array) -> jax.Array:
  """Writes each target as weights of the two atoms around it.

    weight(lower) = (upper - target) / (upper - lower),
    weight(upper) = 1 - weight(lower), all others 0,

  so that the mean of the atoms under the weights is the target. MuZero
  (Schrittwieser et al., arXiv 1911.08265, appendix F); why cross entropy on it
  scales better than regression: Farebrother et al., arXiv 2403.03950.

  Args:
    targets: `[...]`; those outside the support are clipped to its ends.
    support: `[K]` atoms, increasing, K at least 2; their gaps may differ.

  Returns:
    `[..., K]` weights of sum 1.
  """
  chex.assert_rank(support, 1)
  chex.assert_axis_dimension_gt(support, 0, 1)
  atoms = _aligned(support, targets.ndim)
  # How far a target has come through each gap; weights are the differences.
  gaps = atoms[..., 1:] - atoms[..., :-1]
  passed = jnp.clip((targets[..., None] - atoms[..., :-1]) / gaps, 0, 1)
  ends = jnp.zeros_like(passed[..., :1])
  return jnp.concatenate([ends + 1, passed], axis=-1) - jnp.concatenate(
    [passed, ends], axis=-1
  )


def two_hot_mean(logits: jax.Array, support: jax.Array) -> jax.Array:
  """Returns the value that the logits stand for: the mean of the atoms.

  Args:
    logits: `[..., K]`.
    support: `[K]` atoms.

  Returns:
    `[...]` values, within the support.
  """
  chex.assert_shape(support, logits.shape[-1:])
  atoms = _aligned(support, logits.ndim - 1)
  return jnp.sum(jax.nn.softmax(logits) * atoms, axis=-1)


def two_hot_value_loss(
  logits: jax.Array, targets: jax.Array, mask: jax.Array, support: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Sums of the cross entropy between two-hot targets and the value head.

    loss = - sum_k two_hot(target)_k * log softmax(logits)_k

  Source as `two_hot`. The least loss of a position is the entropy of its
  two-hot target, 0 only on an atom.

  Args:
    logits: `[B, T, K]` over the atoms, after position t.
    targets: `[B, T]` returns, clipped to the support; they receive no gradient.
    mask: `[B, T]`, 0 or more. Where it is 0 the other arrays may hold anything,
      NaN included.
    support: `[K]` atoms, increasing.

  Returns:
    `(weighted sum, sum of weights)`, scalars.
  """
  chex.assert_rank([logits, targets, mask], [3, 2, 2])
  chex.assert_equal_shape([targets, mask])
  chex.assert_shape(logits, (*targets.shape, *support.shape))
  is_known = mask != 0
  logits = jnp.where(is_known[:, :, None], logits, 0)
  targets = jax.lax.stop_gradient(jnp.where(is_known, targets, 0))
  log_probs = jax.nn.log_softmax(logits)
  cross_entropy = -jnp.sum(two_hot(targets, support) * log_probs, axis=-1)
  return jnp.sum(mask * cross_entropy), jnp.sum(mask)


def process_labels(
  num_correct: jax.Array, num_rollouts: jax.Array, *, estimate: str = "soft"
) -> tuple[jax.Array, jax.Array]:
  """Labels steps by the rollouts that continue them.

    "soft"  num_correct / num_rollouts, the share that ended right
    "hard"  1 where any of them ended right, else 0

  Math-Shepherd, Wang et al., arXiv 2312.08935, section 3: the soft and the hard
  estimation of its process annotation.

  Args:
    num_correct: `[B, R]` rollouts from the end of a step whose answer is right.
    num_rollouts: `[B, R]` rollouts from there; 0 where none were tried.
    estimate: one of `ESTIMATES`.

  Returns:
    `(labels, mask)`, both `[B, R]` float32; label and mask are 0 where there
    are no rollouts.

  Raises:
    ValueError: for an unknown estimate.
  """
  if estimate not in ESTIMATES:
    raise ValueError(f"estimate={estimate!r} is none of {', '.join(ESTIMATES)}")
  chex.assert_rank([num_correct, num_rollouts], 2)
  chex.assert_equal_shape([num_correct, num_rollouts])
  is_known = num_rollouts > 0
  if estimate == "soft":
    labels = num_correct / jnp.where(is_known, num_rollouts, 1)
  else:
    labels = num_correct > 0
  labels = jnp.where(is_known, labels, 0).astype(jnp.float32)
  return labels, is_known.astype(jnp.float32)


def process_reward_loss(
  logits: jax.Array, labels: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Sums of the cross entropy between labels of steps and the process head.

    loss = - y log sigmoid(logit) - (1 - y) log sigmoid(-logit)

  Math-Shepherd, Wang et al., arXiv 2312.08935, section 3. For a soft label y
  the least value is its entropy, at the logit log(y / (1 - y)).

  Args:
    logits: `[B, R]` of the process head at the end of each step.
    labels: `[B, R]` in [0, 1], hard or soft (`process_labels`); they receive no
      gradient.
    mask: `[B, R]`, 0 or more. Where it is 0 the other arrays may hold anything,
      NaN included.

  Returns:
    `(weighted sum, sum of weights)`, scalars.
  """
  chex.assert_rank([logits, labels, mask], 2)
  chex.assert_equal_shape([logits, labels, mask])
  is_known = mask != 0
  logits = jnp.where(is_known, logits, 0)
  labels = jax.lax.stop_gradient(jnp.where(is_known, labels, 0))
  cross_entropy = jax.nn.softplus(logits) - logits * labels
  return jnp.sum(mask * cross_entropy), jnp.sum(mask)


def _aligned(support: jax.Array, num_axes: int) -> jax.Array:
  """The atoms with axes of size 1 before them, one per axis of the values."""
  return support.reshape((1,) * num_axes + (-1,))
