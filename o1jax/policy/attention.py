"""Rotary positions and attention, as plain functions of arrays.

Two attentions of the same meaning. `causal_attention` reads a whole sequence at
once (training, prompts), in one of three ways of which `full_attention` is the
obvious one. `cached_attention` reads a shared prefix and private suffixes: two
blocks of scores under one softmax, nothing concatenated, and the prefix is
multiplied once with the queries of all its rows (Hydragen, arXiv 2402.05099).
Queries are grouped by the key/value head they share.

Letters: B problems, G rows of one problem, T tokens, J key/value heads, Q query
heads sharing one, E head width, C prefix slots, S suffix slots.
"""

import math

import jax
import jax.numpy as jnp

from o1jax.policy.quantize import Quantized, factors

MASKED = -1e30  # finite, so that a row with nothing to read gives no NaN

# Queries of a block, and blocks at most: more save little and cost compiling.
_BLOCK = 64
_MAX_BLOCKS = 8


def rope_frequencies(
  rotary_width: int,
  base: float,
  scale: float = 1.0,
  llama3: tuple[float, float, float, float] | None = None,
) -> jax.Array:
  """Angle per position of each coordinate pair, `[rotary_width / 2]`.

  RoFormer, arXiv 2104.09864. With `llama3` = (factor, low, high, length) slow
  frequencies are divided by factor, as Llama 3.1 does to read further than it
  was trained to: pairs that turn fewer than `low` times in `length` positions
  wholly, those above `high` times not at all.
  """
  exponent = jnp.arange(0, rotary_width, 2, dtype=jnp.float32) / rotary_width
  frequency = 1.0 / (scale * base**exponent)
  if llama3 is None:
    return frequency
  factor, low, high, length = llama3
  turns = length * frequency / (2 * math.pi)
  keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
  return frequency * (keep + (1.0 - keep) / factor)


def rope_tables(
  positions: jax.Array, frequency: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of every angle: `[..., T]` -> two `[..., T, pairs]`."""
  angle = jnp.expand_dims(positions.astype(jnp.float32), -1) * jnp.reshape(
    frequency, (1,) * positions.ndim + (-1,)
  )
  return jnp.cos(angle), jnp.sin(angle)


def rotate(
  x: jax.Array, tables: tuple[jax.Array, jax.Array], variant: str
) -> jax.Array:
  """Rotates the leading coordinates of each head.

  Args:
    x: `[..., T, N, E]`, N heads of any kind.
    tables: from `rope_tables`, `[..., T, pairs]`.
    variant: "half" or "interleaved".
  """
  cos, sin = (jnp.expand_dims(t, -2).astype(x.dtype) for t in tables)
  # A split is put together again by its gradient; slices would be padded.
  turned, rest = jnp.split(x, (2 * cos.shape[-1],), -1)
  if variant == "half":
    a, b = jnp.split(turned, 2, -1)
    parts = [a * cos - b * sin, b * cos + a * sin]
  else:
    a, b = turned[..., ::2], turned[..., 1::2]
    pair = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1)
    parts = [pair.reshape(turned.shape)]
  if rest.shape[-1]:
    parts.append(rest)
  return jnp.concatenate(parts, -1) if len(parts) > 1 else parts[0]


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
  """cap * tanh(x / cap): bounds x smoothly; None leaves it."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def causal_mask(
  positions: jax.Array,
  window: int | None,
  num_sinks: int = 0,
  segment_ids: jax.Array | None = None,
) -> jax.Array:
  """Who may read whom in a full forward, `[B or 1, T, T]` (reader first).

  Later tokens are those with a greater index; segments do not read each other;
  see `in_window` for the window.
  """
  index = jnp.arange(positions.shape[1])
  mask = (index[:, None] >= index[None, :])[None]
  if window is not None:
    mask = mask & in_window(
      positions[:, :, None], positions[:, None, :], window, num_sinks
    )
  if segment_ids is not None:
    mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
  return mask


def in_window(
  reader: jax.Array, read: jax.Array, window: int, num_sinks: int
) -> jax.Array:
  """Whether a window lets position `reader` read position `read`.

  It counts positions back, the reader included. The first `num_sinks`
  positions are read from everywhere: what attention has no use for goes there,
  and without them the window spoils the rest. StreamingLLM, arXiv 2309.17453;
  unlike there, tokens keep their positions in the text.
  """
  near = reader - read < window
  return near | (read < num_sinks) if num_sinks else near


def causal_attention(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  *,
  cap: float | None = None,
  is_plain: bool = False,
) -> jax.Array:
  """Attention within whole sequences, in the way that suits the device.

  cuDNN's flash attention (arXiv 2205.14135) on GPUs, where it takes the case:
  bfloat16, heads of at most 128 in steps of 8, a plain mask, no cap. Else
  `block_attention`, of which a short sequence is one block.

  Args:
    queries: `[B, T, J, Q, E]`, scaled already.
    keys: `[B, J, T, E]`.
    values: `[B, J, T, E]`.
    mask: `[B or 1, T, T]` from `causal_mask`.
    cap: soft cap of the scores.
    is_plain: whether everyone reads all that is not later.

  Returns:
    `[B, T, J * Q * E]`.
  """
  batch, length, heads, group, width = queries.shape
  is_flash = (
    jax.default_backend() == "gpu"
    and queries.dtype == jnp.bfloat16
    and width % 8 == 0
    and width <= 128
    and is_plain
    and cap is None
  )
  if not is_flash:
    return block_attention(queries, keys, values, mask, cap=cap)
  mixed = jax.nn.dot_product_attention(
    queries.reshape(batch, length, heads * group, width),
    keys.swapaxes(1, 2),
    values.swapaxes(1, 2),
    scale=1.0,
    is_causal=True,
    implementation="cudnn",
  )
  return mixed.reshape(batch, length, heads * group * width)


def block_attention(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  *,
  cap: float | None = None,
) -> jax.Array:
  """As `full_attention`, without the scores of what is later.

  Queries are split into blocks, each reads only keys up to its own end: of N
  blocks (N + 1) / 2N of the scores are left. Heads come before time, so that
  every product is one of plain matrices, and the sum of the weights divides
  what they mixed rather than the weights.
  """
  batch, length, heads, group, width = queries.shape
  num_blocks = min(max(length // _BLOCK, 1), _MAX_BLOCKS)
  block = -(-length // num_blocks)
  queries = queries.transpose(0, 2, 3, 1, 4)  # [B, J, Q, T, E]
  batched = ((0, 1), (0, 1))
  mixed = []
  for begin in range(0, length, block):
    end = min(begin + block, length)
    own = queries[:, :, :, begin:end].reshape(batch, heads, -1, width)
    scores = jax.lax.dot_general(
      own,
      keys[:, :, :end],
      (((3,), (3,)), batched),
      preferred_element_type=jnp.float32,
    )
    seen = mask[:, None, begin:end, :end]
    if group > 1:
      seen = jnp.tile(seen, (1, 1, group, 1))
    scores = jnp.where(seen, soft_cap(scores, cap), MASKED)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    y = jax.lax.dot_general(
      weights.astype(values.dtype),
      values[:, :, :end],
      (((3,), (2,)), batched),
      preferred_element_type=jnp.float32,
    )
    y = (y / total).astype(values.dtype)
    mixed.append(y.reshape(batch, heads, group, end - begin, width))
  mixed = jnp.concatenate(mixed, 3) if len(mixed) > 1 else mixed[0]
  mixed = mixed.transpose(0, 3, 1, 2, 4)
  return mixed.reshape(batch, length, heads * group * width)


def full_attention(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  *,
  cap: float | None = None,
) -> jax.Array:
  """As `causal_attention`, all scores at once; any mask."""
  batch, length, heads, group, width = queries.shape
  scores = jnp.einsum(
    "btjqe,bjse->bjqts", queries, keys, preferred_element_type=jnp.float32
  )
  scores = jnp.where(mask[:, None, None], soft_cap(scores, cap), MASKED)
  weights = jax.nn.softmax(scores, -1).astype(values.dtype)
  mixed = jnp.einsum("bjqts,bjse->btjqe", weights, values)
  return mixed.reshape(batch, length, heads * group * width)


def cached_attention(
  queries: jax.Array,
  prefix: tuple[jax.Array | Quantized, jax.Array | Quantized],
  suffix: tuple[jax.Array, jax.Array],
  prefix_mask: jax.Array,
  suffix_mask: jax.Array,
  *,
  cap: float | None = None,
) -> jax.Array:
  """Attention over a shared prefix and private suffixes.

  Args:
    queries: `[B, G, T, J, Q, E]`, scaled already.
    prefix: keys and values `[B, J, C, E]`, plain or quantized.
    suffix: keys and values `[B * G, J, S, E]`, without J where it is 1.
    prefix_mask: `[B, G or 1, T or 1, C]`.
    suffix_mask: `[B or 1, G or 1, T, S]`.
    cap: soft cap of the scores.

  Returns:
    `[B, G, T, J * Q * E]`.
  """
  b, g, t, j, q, e = queries.shape
  shared = queries.transpose(0, 3, 1, 2, 4, 5).reshape(b, j, g * t * q, e)
  own_keys, own_values = suffix
  axes = own_keys.shape[:-2]
  private = queries.transpose(0, 1, 3, 2, 4, 5).reshape(*axes, t * q, e)

  def dot(spec, x, y):
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)

  keys, key_scales = factors(prefix[0], queries.dtype)
  values, value_scales = factors(prefix[1], queries.dtype)
  s1 = dot("bjre,bjce->bjrc", shared, keys)
  if key_scales is not None:
    s1 = s1 * key_scales[:, :, None, :]
  s1 = soft_cap(s1, cap)
  s1 = s1.reshape(b, j, g, t, q, -1)
  s1 = jnp.where(prefix_mask[:, None, :, :, None, :], s1, MASKED)
  s2 = soft_cap(dot("...re,...se->...rs", private, own_keys), cap)
  s2 = s2.reshape(b, g, j, t, q, -1)
  s2 = jnp.where(suffix_mask[:, :, None, :, None, :], s2, MASKED)

  # Only maxima, sums and mixed values change places, never the scores.
  top = jnp.maximum(s1.max(-1).swapaxes(1, 2), s2.max(-1))
  w1 = jnp.exp(s1 - top.swapaxes(1, 2)[..., None])
  w2 = jnp.exp(s2 - top[..., None])
  total = w1.sum(-1).swapaxes(1, 2) + w2.sum(-1)
  w1 = w1.reshape(b, j, g * t * q, -1)
  if value_scales is not None:
    w1 = w1 * value_scales[:, :, None, :]
  w1 = w1.astype(queries.dtype)
  w2 = w2.astype(queries.dtype).reshape(*axes, t * q, -1)
  y1 = dot("bjrc,bjce->bjre", w1, values).reshape(b, j, g, t, q, e)
  y2 = dot("...rs,...se->...re", w2, own_values).reshape(b, g, j, t, q, e)
  mixed = (y1.swapaxes(1, 2) + y2) / total[..., None]
  mixed = mixed.transpose(0, 1, 3, 2, 4, 5).astype(queries.dtype)
  return mixed.reshape(b, g, t, j * q * e)
