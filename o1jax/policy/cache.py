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

A prefix can be smaller than the text it stands for: in int8 (`quantize`), and
without what no window of the network reaches any more (`keep_window`).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from o1jax.policy.attention import in_window
from o1jax.policy.config import TransformerConfig
from o1jax.policy.quantize import Quantized, quantize

Params = Any
LayerArrays = tuple[jax.Array | Quantized, ...]
CACHE_DTYPES = ("network", "int8")
PROMPT_BLOCK = 16  # slots of a prompt that share a scale
# Tokens of prompts read together on CPU. With more, what a layer hands on falls
# out of the caches: 128 prompts of 64 tokens take 1.6 times as long at once.
PROMPT_TOKENS = 2048


@struct.dataclass
class Prefix:
  """A context read by all rows of a problem.

  Attributes:
    keys: one `[B, J, C, E]` per layer, rotated already; plain or quantized.
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
  """One prefix from several, side by side (a prompt and a tree path).

  Where one of them is quantized, the whole is, with a scale per slot.
  """
  return Prefix(
    keys=tuple(map(_beside, *(p.keys for p in prefixes))),
    values=tuple(map(_beside, *(p.values for p in prefixes))),
    positions=jnp.concatenate([p.positions for p in prefixes], 1),
    mask=jnp.concatenate([p.mask for p in prefixes], 1),
  )


def _beside(*parts):
  """Arrays `[B, J, C, E]` of one layer, joined along C."""
  if not any(isinstance(part, Quantized) for part in parts):
    return jnp.concatenate(parts, 2)
  parts = [p if isinstance(p, Quantized) else quantize(p, 1) for p in parts]
  return Quantized(
    jnp.concatenate([p.values for p in parts], 2),
    jnp.concatenate([p.slot_scales() for p in parts], 2),
    parts[0].dtype,
  )


def quantize_prefix(prefix: Prefix, block: int = PROMPT_BLOCK) -> Prefix:
  """The same context in int8, a scale for `block` slots of a head.

  Slots are added, empty, until they are whole blocks.
  """
  extra = -prefix.mask.shape[1] % block

  def pad(x, axis):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, extra)
    return jnp.pad(x, widths)

  mask = pad(prefix.mask, 1)

  def compress(x):
    return quantize(pad(x, 2), block, mask[:, None])

  return Prefix(
    keys=tuple(map(compress, prefix.keys)),
    values=tuple(map(compress, prefix.values)),
    positions=pad(prefix.positions, 1),
    mask=mask,
  )


def keep_window(
  prefix: Prefix, next_positions: jax.Array, config: TransformerConfig
) -> Prefix:
  """Leaves out the slots that no token from `next_positions` `[B]` on reads.

  What stays are at most the sinks and the widest window; a network with a layer
  that reads everything keeps everything.
  """
  window = config.widest_window
  if window is None:
    return prefix
  room = max(config.num_sinks + window - 1, 1)
  if room >= prefix.mask.shape[1]:
    return prefix
  is_read = in_window(
    next_positions[:, None], prefix.positions, window, config.num_sinks
  )
  order = jnp.argsort(~(is_read & prefix.mask), axis=1, stable=True)[:, :room]

  def take(x):
    if isinstance(x, Quantized):
      scales = jnp.take_along_axis(x.slot_scales(), order[:, None], 2)
      return Quantized(take(x.values), scales, x.dtype)
    return jnp.take_along_axis(x, order[:, None, :, None], 2)

  return Prefix(
    keys=tuple(map(take, prefix.keys)),
    values=tuple(map(take, prefix.values)),
    positions=jnp.take_along_axis(prefix.positions, order, 1),
    mask=jnp.take_along_axis(is_read & prefix.mask, order, 1),
  )


def prefix_from_prompt(
  network: Any,
  params: Params,
  tokens: jax.Array,
  lengths: jax.Array,
  *,
  cache_dtype: str = "network",
  prefill_chunk: int | None = None,
) -> tuple[Prefix, jax.Array]:
  """Reads prompts once.

  Args:
    network: a `policy.network.Network`.
    params: its parameters.
    tokens: `[B, P]` int32, padded on the right.
    lengths: `[B]` int32, at least 1.
    cache_dtype: "network" keeps keys and values as they were computed, "int8"
      quantizes them by blocks of PROMPT_BLOCK positions.
    prefill_chunk: positions read at a time, so that the scores of a long prompt
      need room for `prefill_chunk * P` numbers and not for P * P; None reads
      all at once.

  Returns:
    The prefix of P slots (fewer where windows reach less far, whole blocks in
    int8), and the hidden state `[B, D]` at each last token, from which the
    first new token is drawn.

  Raises:
    ValueError: an unknown cache_dtype, or a chunk below 1.
  """
  check_cache_dtype(cache_dtype)
  if prefill_chunk is not None and prefill_chunk < 1:
    raise ValueError(
      f"prefill_chunk={prefill_chunk} must be 1 or more, or None"
    )
  width = tokens.shape[1]
  if prefill_chunk is None or prefill_chunk >= width:
    prefix, last = _read_whole(network, params, tokens, lengths)
  else:
    prefix, last = _read_chunks(network, params, tokens, lengths, prefill_chunk)
  prefix = keep_window(prefix, lengths, network.config)
  return (quantize_prefix(prefix) if cache_dtype == "int8" else prefix), last


def check_cache_dtype(name: str) -> None:
  """Raises ValueError for a name that is none of CACHE_DTYPES."""
  if name not in CACHE_DTYPES:
    raise ValueError(
      f"cache_dtype={name!r} is not one of {', '.join(CACHE_DTYPES)}"
    )


def _read_whole(network, params, tokens, lengths):
  """All positions at once; on CPU a group of prompts after the other."""
  size = _group_size(*tokens.shape)
  if size == tokens.shape[0]:
    return _read_together(network, params, tokens, lengths)
  groups = tokens.reshape(-1, size, tokens.shape[1]), lengths.reshape(-1, size)
  found = jax.lax.map(
    lambda group: _read_together(network, params, *group), groups
  )
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def _group_size(batch, width):
  """Prompts read together: the most that divide the batch and fit, or all."""
  if jax.default_backend() != "cpu":
    return batch
  sizes = [n for n in range(1, batch + 1) if batch % n == 0]
  fitting = [n for n in sizes if n * width <= PROMPT_TOKENS]
  # Of a batch that divides badly only small groups would fit.
  return max(
    (n for n in fitting if 2 * n * width > PROMPT_TOKENS), default=batch
  )


def _read_together(network, params, tokens, lengths):
  batch, width = tokens.shape
  index = jnp.arange(width, dtype=jnp.int32)
  positions = jnp.broadcast_to(index[None, :], (batch, width))
  hidden, prefix = network.apply(params, tokens, positions)
  last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
  is_prompt = index[None, :] < lengths[:, None]
  return prefix.replace(mask=is_prompt), last[:, 0]


def _read_chunks(network, params, tokens, lengths, chunk):
  """Each chunk is appended to a cache that has an empty prefix."""
  batch, width = tokens.shape
  starts = jnp.arange(0, width, chunk, dtype=jnp.int32)
  padded = jnp.pad(tokens, ((0, 0), (0, starts.size * chunk - width)))
  one = jnp.zeros((batch, 1), jnp.int32)
  shapes = jax.eval_shape(network.apply, params, one, one)
  last, nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  cache = make_cache(nothing, num_rows=1, capacity=starts.size * chunk)

  def read(carry, start):
    cache, last = carry
    new = jax.lax.dynamic_slice_in_dim(padded, start, chunk, axis=1)
    positions = start + jnp.arange(chunk, dtype=jnp.int32)
    positions = jnp.broadcast_to(positions[None, None], (batch, 1, chunk))
    hidden, cache = network.apply(
      params, new[:, None], positions, cache, slot=start
    )
    place = lengths - 1 - start
    ends_here = (place >= 0) & (place < chunk)
    inside = jnp.clip(place, 0, chunk - 1)[:, None, None]
    found = jnp.take_along_axis(hidden[:, 0], inside, axis=1)
    return (cache, jnp.where(ends_here[:, None, None], found, last)), None

  (cache, last), _ = jax.lax.scan(read, (cache, last), starts)
  index = jnp.broadcast_to(jnp.arange(width)[None], tokens.shape)
  keys, values = cache.suffix_arrays()
  prefix = Prefix(
    keys=tuple(k[:, 0, :, :width] for k in keys),
    values=tuple(v[:, 0, :, :width] for v in values),
    positions=index,
    mask=index < lengths[:, None],
  )
  return prefix, last[:, 0]
