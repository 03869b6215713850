"""What is read off the trunk: the next token's logits and the value."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from o1jax.policy import attention
from o1jax.policy.config import TransformerConfig
from o1jax.policy.products import project_to_float32


class PolicyHead(nn.Module):
  """Hidden states `[..., D]` to float32 logits `[..., V]`."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, hidden: jax.Array, embedding: jax.Array) -> jax.Array:
    """`embedding` `[V, D]` is used where the config ties it."""
    c = self.config
    if c.tied_embeddings:
      kernel = embedding
    else:
      start = nn.initializers.constant(c.width**-0.5)
      shape = (c.width, c.vocab_size)
      kernel = self.param("kernel", start, shape, jnp.float32)
    logits = project_to_float32(hidden, kernel, c.tied_embeddings)
    return attention.soft_cap(logits, c.final_soft_cap)


class ValueHead(nn.Module):
  """Hidden states `[..., D]` to the value's logits, float32.

  `[...]`, or `[..., K]` in bins (`value_bins`). The last layer starts at zero:
  an untrained value is one half everywhere.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(self, hidden: jax.Array) -> jax.Array:
    x = hidden.astype(jnp.float32)
    if self.config.value_hidden_width:
      start = nn.initializers.constant(self.config.width**-0.5)
      width = self.config.value_hidden_width
      x = jax.nn.gelu(nn.Dense(width, kernel_init=start, name="up")(x))
    num_bins = self.config.value_bins
    last = nn.Dense(
      num_bins or 1, kernel_init=nn.initializers.zeros, name="out"
    )
    return last(x) if num_bins else last(x)[..., 0]
