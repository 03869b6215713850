"""What the logits of a value head mean: one logit, or bins.

A head gives one logit of a value in [0, 1], or K of them: a distribution over
K atoms, evenly spaced from 0 to 1, whose mean is the value. `value_of` reads
both, so that what searches or scores need not know which it is. A target is
written in bins as weights of the two atoms around it.

MuZero (Schrittwieser et al., arXiv 1911.08265, appendix F); why cross entropy
on it scales better than regression: Farebrother et al., arXiv 2403.03950.
"""

import chex
import jax
import jax.numpy as jnp


def value_of(logits: jax.Array, num_axes: int) -> jax.Array:
  """Values in [0, 1] from what a value head gives.

  Args:
    logits: `[...]`, one of each value, or `[..., K]` over the atoms.
    num_axes: static; axes of the values. With bins the logits have one more.
  """
  if logits.ndim == num_axes:
    return jax.nn.sigmoid(logits)
  chex.assert_rank(logits, num_axes + 1)
  return two_hot_mean(logits)


def two_hot(targets: jax.Array, num_bins: int) -> jax.Array:
  """Writes each target as weights of the two atoms around it.

    weight_k = max(0, 1 - |(K - 1) target - k|)

  The mean of the atoms k / (K - 1) under the weights is the target.

  Args:
    targets: `[...]`; those outside [0, 1] are clipped to its ends.
    num_bins: K, 2 or more.

  Returns:
    `[..., K]` weights of sum 1.
  """
  places = (num_bins - 1) * jnp.clip(targets, 0, 1)
  distances = jnp.abs(places[..., None] - _along(jnp.arange(num_bins), places))
  return jnp.maximum(0, 1 - distances)


def two_hot_mean(logits: jax.Array) -> jax.Array:
  """The value that the logits stand for: `[..., K]` to `[...]`."""
  atoms = jnp.linspace(0, 1, logits.shape[-1], dtype=logits.dtype)
  return jnp.sum(jax.nn.softmax(logits) * _along(atoms, logits[..., 0]), -1)


def _along(line: jax.Array, values: jax.Array) -> jax.Array:
  """`[K]` with axes of size 1 before it, one per axis of the values."""
  return line.reshape((1,) * values.ndim + (-1,))
