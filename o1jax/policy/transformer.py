"""The decoder: embedding, blocks, final norm.

One module for all families (see `config`). A block is attention and a
feed-forward layer, each normed before and/or after and added to the stream:

  x <- x + after(attend(before(x)));  x <- x + after(mlp(before(x)))

Layers are unrolled and every layer has its own parameters: a slice of a stack
inside a decoding loop is a copy on CPU. Queries, keys and values come from one
product, gate and up from another. Weights are stored [in, out]. Modules start
a weight at its standard deviation; `network` multiplies in the noise.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from o1jax.policy import attention
from o1jax.policy.cache import Cache, Prefix
from o1jax.policy.config import TransformerConfig, layer_values
from o1jax.policy.products import project

# How a block attends is given to it: (queries, keys, values) of its tokens ->
# mixed values and the keys and values to keep.
AttendFn = Callable[
  [jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]
]


class RMSNorm(nn.Module):
  """x / rms(x) * scale in float32 over the last axes. arXiv 1910.07467."""

  config: TransformerConfig
  num_axes: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    plus_one = self.config.norm_plus_one
    start = nn.initializers.zeros if plus_one else nn.initializers.ones
    axes = tuple(range(-self.num_axes, 0))
    shape = tuple(x.shape[a] for a in axes)
    scale = self.param("scale", start, (_size(shape),), jnp.float32)
    scale = (1.0 + scale if plus_one else scale).reshape(
      (1,) * (x.ndim - self.num_axes) + shape
    )
    y = x.astype(jnp.float32)
    square = jnp.mean(jnp.square(y), axes, keepdims=True)
    y = y * jax.lax.rsqrt(square + self.config.norm_eps)
    return (y * scale).astype(x.dtype)


class Linear(nn.Module):
  """x @ kernel + bias over the last axis; `[..., in] -> [..., *features]`.

  With adapters, x W + (alpha / rank) (x A) B: A `[in, rank]` is random and B
  `[rank, *features]` zero, so that the start is the product without them.
  """

  config: TransformerConfig
  features: tuple[int, ...]
  use_bias: bool
  gain: float = 1.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    spread, rank = x.shape[-1] ** -0.5, self.config.lora_rank
    start = nn.initializers.constant(self.gain * spread)
    shape = (x.shape[-1], *self.features)
    kernel = self.param("kernel", start, shape, jnp.float32)
    y = project(x, kernel, False)
    if rank:
      start = nn.initializers.constant(spread)
      a = self.param("lora_a", start, (x.shape[-1], rank), jnp.float32)
      start = nn.initializers.zeros
      b = self.param("lora_b", start, (rank, *self.features), jnp.float32)
      scale = self.config.lora_alpha / rank
      y = y + scale * project(project(x, a, False), b, False)
    if self.use_bias:
      bias = self.param(
        "bias", nn.initializers.zeros, self.features, jnp.float32
      )
      lead = (1,) * (y.ndim - len(self.features))
      y = y + bias.astype(x.dtype).reshape(lead + self.features)
    return y


class Block(nn.Module):
  """One layer: attention and feed-forward, with the norms around them."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x, tables, attend: AttendFn):
    c = self.config

    def normed(name, y, wanted):
      return RMSNorm(c, name=name)(y) if wanted else y

    y, keys, values = self._attention(
      normed("attention_norm", x, c.norm_before), tables, attend
    )
    x = x + normed("attention_after_norm", y, c.norm_after)
    y = self._feed_forward(normed("mlp_norm", x, c.norm_before))
    return x + normed("mlp_after_norm", y, c.norm_after), keys, values

  def _attention(self, x, tables, attend):
    c = self.config
    heads, group, width = c.num_kv_heads, c.group, c.head_width
    # Columns run by key/value head: its queries, its key, its value. So a
    # split over heads keeps what belongs together on one device.
    qkv = Linear(c, (heads * (group + 2) * width,), c.qkv_bias, name="qkv")(x)
    qkv = qkv.reshape(*x.shape[:-1], heads, group + 2, width)
    # A split is put together again by its gradient; slices would be padded.
    q, k, v = jnp.split(qkv, (group, group + 1), -2)
    k, v = k[..., 0, :], v[..., 0, :]
    if c.qk_norm == "head":
      q, k = RMSNorm(c, name="q_norm")(q), RMSNorm(c, name="k_norm")(k)
    elif c.qk_norm == "whole":
      q = RMSNorm(c, 3, name="q_norm")(q)
      k = RMSNorm(c, 2, name="k_norm")(k)
    flat = q.reshape(*x.shape[:-1], heads * group, width)
    q = attention.rotate(flat, tables, c.rope_variant).reshape(q.shape)
    k = attention.rotate(k, tables, c.rope_variant)
    scale = width**-0.5 if c.query_scale is None else c.query_scale
    y, keys, values = attend(q * scale, k, v)
    gain = (2 * c.num_layers) ** -0.5
    y = Linear(c, (c.width,), c.out_bias, gain, name="out")(y)
    return y, keys, values

  def _feed_forward(self, x):
    c = self.config
    gain = (2 * c.num_layers) ** -0.5
    if c.activation == "gelu":
      h = jax.nn.gelu(Linear(c, (c.ffn_width,), c.mlp_bias, name="up")(x))
    else:
      h = Linear(c, (2, c.ffn_width), c.mlp_bias, name="gate_up")(x)
      act = jax.nn.silu if c.activation == "swiglu" else jax.nn.gelu
      gate, up = jnp.split(h, 2, -2)
      h = (act(gate) * up)[..., 0, :]
    return Linear(c, (c.width,), c.mlp_bias, gain, name="down")(h)


class Decoder(nn.Module):
  """Tokens to hidden states; see `network.Network.apply` for the contract."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, tokens, positions, cache, slot, segment_ids):
    c = self.config
    std = c.width**-0.5 if c.tied_embeddings else 1.0
    embedding = self.param(
      "embedding",
      nn.initializers.constant(std),
      (c.vocab_size, c.width),
      jnp.float32,
    )
    x = embedding[tokens].astype(c.dtype) * c.embedding_scale
    if cache is None:
      attends = _full_attends(c, positions, segment_ids)
    else:
      attends = _cached_attends(c, positions, cache, slot)
    # Only whole sequences have gradients. `attend` is a function, not an array.
    is_remade = c.remat and cache is None
    block = nn.remat(Block, static_argnums=(3,)) if is_remade else Block
    keys, values = [], []
    tables = _rope_tables(c, positions)
    for i in range(c.num_layers):
      x, k, v = block(c, name=f"layer_{i}")(x, tables[i], attends[i])
      keys.append(k)
      values.append(v)
    hidden = RMSNorm(c, name="final_norm")(x)
    if cache is not None:
      return hidden, cache.replace(
        keys=tuple(keys),
        values=tuple(values),
        suffix_lengths=cache.suffix_lengths + tokens.shape[2],
      )
    mask = jnp.ones(tokens.shape, bool)
    return hidden, Prefix(tuple(keys), tuple(values), positions, mask)


def _rope_tables(c: TransformerConfig, positions):
  """One pair of tables per layer; layers of one base share theirs."""
  rotary = c.head_width if c.rotary_width is None else c.rotary_width
  bases = layer_values(c.rope_base, c.num_layers)
  scales = layer_values(c.rope_scale, c.num_layers)
  made = {}
  for pair in zip(bases, scales, strict=True):
    if pair not in made:
      frequency = attention.rope_frequencies(rotary, *pair, c.rope_llama3)
      made[pair] = attention.rope_tables(positions, frequency)
  return [made[pair] for pair in zip(bases, scales, strict=True)]


def _full_attends(c: TransformerConfig, positions, segment_ids):
  """Each layer's attention within the sequences given."""

  def make(window):
    mask = attention.causal_mask(positions, window, c.num_sinks, segment_ids)
    is_plain = window is None and segment_ids is None

    def attend(q, k, v):
      k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
      y = attention.causal_attention(
        q, k, v, mask, cap=c.attention_soft_cap, is_plain=is_plain
      )
      return y, k, v

    return attend

  return [make(w) for w in layer_values(c.sliding_window, c.num_layers)]


def _cached_attends(c: TransformerConfig, positions, cache: Cache, slot):
  """Each layer's attention over the cache, to which it first writes."""
  num_tokens = positions.shape[2]
  # [B, G, T] slot of every new token; rank 1 where all rows write alike.
  start = cache.suffix_lengths[:, :, None] if slot is None else slot
  offset = jnp.arange(num_tokens, dtype=jnp.int32)[None, None, :]
  slots = start + offset
  index = jnp.arange(cache.capacity, dtype=jnp.int32)[None, None, None, :]
  distance = slots[..., None] - index

  def make(layer, window):
    prefix_mask = cache.prefix.mask[:, None, None, :]
    suffix_mask = distance >= 0
    if window is not None:
      reader = positions[..., None]
      read = cache.prefix.positions[:, None, None, :]
      prefix_mask = prefix_mask & attention.in_window(
        reader, read, window, c.num_sinks
      )
      suffix_mask = suffix_mask & attention.in_window(
        reader, reader - distance, window, c.num_sinks
      )

    def attend(q, k, v):
      k = _write(cache.keys[layer], k, slots, slot)
      v = _write(cache.values[layer], v, slots, slot)
      y = attention.cached_attention(
        q,
        (cache.prefix.keys[layer], cache.prefix.values[layer]),
        (k, v),
        prefix_mask,
        suffix_mask,
        cap=c.attention_soft_cap,
      )
      return y, k, v

    return attend

  windows = layer_values(c.sliding_window, c.num_layers)
  return [make(i, w) for i, w in enumerate(windows)]


def _write(buffer, new, slots, slot):
  """New `[B, G, T, J, E]` into suffixes `[B * G, (J,) S, E]` at its slots.

  Slots of single rows may lie past the last: those are dropped.
  """
  b, g, t, j, e = new.shape
  if slot is not None:
    new = new.swapaxes(2, 3).reshape(*buffer.shape[:-2], t, e)
    start = (*(0 for _ in buffer.shape[:-2]), slot, 0)
    return jax.lax.dynamic_update_slice(buffer, new, start)
  row = jnp.arange(b * g)[:, None]
  slots = jnp.broadcast_to(slots, (b, g, t)).reshape(b * g, t)
  new = new.reshape(b * g, t, j, e)
  if buffer.ndim == 3:
    return buffer.at[row, slots].set(new[:, :, 0], mode="drop")
  return buffer.at[row, :, slots].set(new, mode="drop")


def _size(shape):
  size = 1
  for n in shape:
    size *= n
  return size
