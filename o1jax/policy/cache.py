"""Keys and values of what was read already: a shared prefix, private suffixes.

Every sampler here continues one context in G ways: N samples of one prompt, A
candidate steps of one node. So the context is kept once per problem (Prefix,
`[B, J, C, E]` a layer) and each row keeps only its own tokens (`[B, G, J, S,
E]` a layer). Heads come before time: the products of attention want it so, and
the other order halves the speed on CPU.

Within a loop the suffixes lie as `[B * G, J, S, E]`, without J where it is 1:
XLA:CPU writes a token in place only if the loop carries the very shape that
attention multiplies, without axes of size 1; else it copies the whole cache
several times at every token (measured: half the speed).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Params = Any
LayerArrays = tuple[jax.Array, ...]


@struct.dataclass
class Prefix:
  """A context read by all rows of a problem.

  Attributes:
    keys: one `[B, J, C, E]` per layer, rotated already.
    values: one `[B, J, C, E]` per layer.
    positions: `[B, C]` int32 position of each slot in its sequence.
    mask: `[B, C]` True where the slot holds a token; holes are allowed.
  """

  keys: LayerArrays
  values: LayerArrays
  positions: jax.Array
  mask: jax.Array


@struct.dataclass
class Cache:
  """A shared prefix and what every row wrote behind it.

  Attributes:
    prefix: the shared part.
    keys: one `[B * G, J, S, E]` per layer, without J where it is 1; see
      `suffix_arrays` for them as `[B, G, J, S, E]`.
    values: the same.
    suffix_lengths: `[B, G]` int32 slots in use; the next token goes there.
  """

  prefix: Prefix
  keys: LayerArrays
  values: LayerArrays
  suffix_lengths: jax.Array

  @property
  def capacity(self) -> int:
    """Slots of each suffix."""
    return self.keys[0].shape[-2]

  def suffix_arrays(self) -> tuple[LayerArrays, LayerArrays]:
    """Keys and values of the suffixes, one `[B, G, J, S, E]` per layer."""
    heads, slots = self.prefix.keys[0].shape[1], self.capacity

    def rows(x):
      return x.reshape(*self.suffix_lengths.shape, heads, slots, x.shape[-1])

    return tuple(map(rows, self.keys)), tuple(map(rows, self.values))


def make_cache(prefix: Prefix, *, num_rows: int, capacity: int) -> Cache:
  """An empty suffix of `capacity` slots for each of `num_rows` rows."""
  batch, heads, _, head_width = prefix.keys[0].shape
  axes = (batch * num_rows,) if heads == 1 else (batch * num_rows, heads)
  shape = (*axes, capacity, head_width)
  return Cache(
    prefix=prefix,
    keys=tuple(jnp.zeros(shape, k.dtype) for k in prefix.keys),
    values=tuple(jnp.zeros(shape, v.dtype) for v in prefix.values),
    suffix_lengths=jnp.zeros((batch, num_rows), jnp.int32),
  )


def grow(cache: Cache, capacity: int) -> Cache:
  """The same cache with room for `capacity` tokens per row.

  Attention reads every slot, used or not, so a cache starts short and grows
  between segments of decoding; slicing a long one to its live part would copy
  it at every token.
  """
  extra = capacity - cache.capacity
  if extra < 0:
    raise ValueError(
      f"capacity={capacity} is less than the present {cache.capacity}"
    )

  def pad(x):
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 2), (0, extra), (0, 0)))

  return cache.replace(
    keys=tuple(map(pad, cache.keys)), values=tuple(map(pad, cache.values))
  )


def join(prefixes: Sequence[Prefix]) -> Prefix:
  """One prefix from several, side by side (a prompt and a tree path)."""
  layers = range(len(prefixes[0].keys))
  return Prefix(
    keys=tuple(
      jnp.concatenate([p.keys[i] for p in prefixes], 2) for i in layers
    ),
    values=tuple(
      jnp.concatenate([p.values[i] for p in prefixes], 2) for i in layers
    ),
    positions=jnp.concatenate([p.positions for p in prefixes], 1),
    mask=jnp.concatenate([p.mask for p in prefixes], 1),
  )


def prefix_from_prompt(
  network: Any, params: Params, tokens: jax.Array, lengths: jax.Array
) -> tuple[Prefix, jax.Array]:
  """Reads prompts once.

  Args:
    network: a `policy.network.Network`.
    params: its parameters.
    tokens: `[B, P]` int32, padded on the right.
    lengths: `[B]` int32, at least 1.

  Returns:
    The prefix of P slots, and the hidden state `[B, D]` at each last token,
    from which the first new token is drawn.
  """
  batch, width = tokens.shape
  index = jnp.arange(width, dtype=jnp.int32)
  positions = jnp.broadcast_to(index[None, :], (batch, width))
  hidden, prefix = network.apply(params, tokens, positions)
  last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
  is_prompt = index[None, :] < lengths[:, None]
  return prefix.replace(mask=is_prompt), last[:, 0]
