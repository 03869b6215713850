"""Keys and values in int8, with a scale per block of slots.

A block of one head is divided by its largest magnitude / 127 and rounded, so
that no number is off by more than half a scale. Attention never sees the
numbers restored: scores are scaled slot by slot after the product with the
keys, weights before the product with the values, which is the same.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

LARGEST = 127


@struct.dataclass
class Quantized:
  """An array `[..., C, E]` of C slots; stands where a plain one could.

  Attributes:
    values: `[..., C, E]` int8.
    scales: `[..., K]` float32, one for each C / K slots in turn.
    dtype: static; of the array that was quantized.
  """

  values: jax.Array
  scales: jax.Array
  dtype: Any = struct.field(pytree_node=False)

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the array that was quantized."""
    return self.values.shape

  def slot_scales(self) -> jax.Array:
    """A scale for every slot, `[..., C]`."""
    block = self.shape[-2] // self.scales.shape[-1]
    return jnp.repeat(self.scales, block, axis=-1)


def quantize(
  x: jax.Array, block: int, mask: jax.Array | None = None
) -> Quantized:
  """Rounds to int8 by blocks of slots.

  |x - dequantize(quantize(x))| <= scale / 2, with scale the largest |x| of the
  block / 127, in float32 and up to its rounding.

  Args:
    x: `[..., C, E]`.
    block: slots that share a scale; divides C.
    mask: `[..., C]` or what broadcasts to it; False becomes 0, so that waste
      does not widen a scale. None: all slots count.

  Raises:
    ValueError: C is not a multiple of block.
  """
  slots, width = x.shape[-2:]
  if block < 1 or slots % block:
    raise ValueError(
      f"{slots} slots are not a multiple of block={block}: pad the slots or "
      "change block"
    )
  exact = x.astype(jnp.float32)
  if mask is not None:
    exact = jnp.where(mask[..., None], exact, 0.0)
  exact = exact.reshape(*x.shape[:-2], slots // block, block, width)
  scales = jnp.max(jnp.abs(exact), (-2, -1)) / LARGEST
  steps = exact / jnp.where(scales > 0, scales, 1.0)[..., None, None]
  # A scale that was rounded down would give 127.00001, which still rounds well.
  values = jnp.round(steps).astype(jnp.int8).reshape(x.shape)
  return Quantized(values, scales, x.dtype)


def dequantize(quantized: Quantized) -> jax.Array:
  """The array restored, `[..., C, E]` in its dtype."""
  exact = quantized.values * quantized.slot_scales()[..., None]
  return exact.astype(quantized.dtype)


def factors(
  x: jax.Array | Quantized, dtype: Any
) -> tuple[jax.Array, jax.Array | None]:
  """x as numbers of `dtype` times a scale per slot `[..., C]`, or None for 1.

  The integers are exact in bfloat16, which has 8 bits for them.
  """
  if isinstance(x, Quantized):
    return x.values.astype(dtype), x.slot_scales()
  return x, None
