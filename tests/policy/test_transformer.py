"""The decoder against a plain NumPy one in float64, for every family.

The oracle reads one sequence, one head at a time, with loops; it knows nothing
of caches. Full forward, prompt with suffix appended at once, and one token at a
time must all agree with it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.policy.cache import (
  Prefix,
  grow,
  join,
  make_cache,
  prefix_from_prompt,
)
from o1jax.policy.config import TransformerConfig, layer_values
from o1jax.policy.network import make_network, next_token_log_probs

LLAMA = TransformerConfig(
  vocab_size=23,
  num_layers=2,
  width=16,
  num_heads=4,
  num_kv_heads=2,
  head_width=8,
  ffn_width=24,
)
change = functools.partial(dataclasses.replace, LLAMA)
# Tiny programs that run once: what they compute matters, not how fast.
fast_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
FAMILIES = {
  "llama": change(rope_llama3=(8.0, 1.0, 4.0, 64.0), rope_base=100.0),
  "qwen2": change(qkv_bias=True, tied_embeddings=True, num_kv_heads=1),
  "qwen3": change(qk_norm="head", rope_base=1e6, num_kv_heads=4),
  "gemma2": change(
    norm_after=True,
    norm_plus_one=True,
    activation="geglu",
    sliding_window=(4, None),
    attention_soft_cap=0.5,
    final_soft_cap=0.7,
    query_scale=0.3,
    embedding_scale=4.0,
    tied_embeddings=True,
  ),
  "gemma3": change(
    norm_after=True,
    norm_plus_one=True,
    activation="geglu",
    qk_norm="head",
    sliding_window=(3, None),
    rope_base=(10.0, 1000.0),
    rope_scale=(1.0, 8.0),
    embedding_scale=4.0,
    tied_embeddings=True,
  ),
  "streaming": change(sliding_window=(3, 2), num_sinks=2),
  "sinks_in_one_layer": change(sliding_window=(None, 1), num_sinks=6),
  "olmo2": change(norm_before=False, norm_after=True, qk_norm="whole"),
  "others": change(
    activation="gelu",
    mlp_bias=True,
    out_bias=True,
    rope_variant="interleaved",
    rotary_width=4,
    norm_eps=1e-2,
    value_hidden_width=5,
  ),
}


def random_params(network, seed=0):
  """Parameters with every leaf drawn, norms and biases too."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(network.init, jax.random.key(0))

  def draw(leaf):
    fan_in = leaf.shape[0] if len(leaf.shape) > 1 else 4
    return jnp.asarray(
      rng.normal(0.3, 1.0, leaf.shape) / math.sqrt(fan_in), jnp.float32
    )

  return jax.tree.map(draw, shapes)


# ---------------------------------------------------------------- the oracle


def oracle_norm(c, x, scale):
  scale = 1 + scale if c.norm_plus_one else scale
  return x / np.sqrt(np.mean(x**2) + c.norm_eps) * scale


def oracle_gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def oracle_rope(c, layer, vector, position):
  """One head's vector at one position, a pair of coordinates at a time."""
  width = c.head_width if c.rotary_width is None else c.rotary_width
  base = layer_values(c.rope_base, c.num_layers)[layer]
  scale = layer_values(c.rope_scale, c.num_layers)[layer]
  out = vector.copy()
  for pair in range(width // 2):
    turn = base ** (-2 * pair / width) / scale
    if c.rope_llama3:
      factor, low, high, length = c.rope_llama3
      wavelength = 2 * math.pi / turn
      if wavelength > length / low:
        turn = turn / factor
      elif wavelength > length / high:
        smooth = (length / wavelength - low) / (high - low)
        turn = (1 - smooth) * turn / factor + smooth * turn
    angle = position * turn
    if c.rope_variant == "half":
      i, k = pair, pair + width // 2
    else:
      i, k = 2 * pair, 2 * pair + 1
    out[i] = vector[i] * math.cos(angle) - vector[k] * math.sin(angle)
    out[k] = vector[k] * math.cos(angle) + vector[i] * math.sin(angle)
  return out


def oracle_attention(c, p, layer, xs):
  """`[T, D]` -> `[T, D]`, causal, one head at a time."""
  group, width = c.num_heads // c.num_kv_heads, c.head_width
  window = layer_values(c.sliding_window, c.num_layers)[layer]
  q, k, v = [], [], []
  for position, x in enumerate(xs):
    y = x @ p["qkv"]["kernel"] + (p["qkv"]["bias"] if c.qkv_bias else 0)
    y = y.reshape(c.num_kv_heads, group + 2, width)
    queries = y[:, :group].reshape(c.num_heads, width)
    keys = y[:, group]
    if c.qk_norm == "head":
      queries = np.stack(
        [oracle_norm(c, h, p["q_norm"]["scale"]) for h in queries]
      )
      keys = np.stack([oracle_norm(c, h, p["k_norm"]["scale"]) for h in keys])
    if c.qk_norm == "whole":
      queries = oracle_norm(c, queries.ravel(), p["q_norm"]["scale"])
      keys = oracle_norm(c, keys.ravel(), p["k_norm"]["scale"])
    queries = queries.reshape(c.num_heads, width)
    keys = keys.reshape(c.num_kv_heads, width)
    q.append([oracle_rope(c, layer, h, position) for h in queries])
    k.append([oracle_rope(c, layer, h, position) for h in keys])
    v.append(y[:, group + 1])
  scale = width**-0.5 if c.query_scale is None else c.query_scale
  out = []
  for t in range(len(xs)):
    heads = []
    for h in range(c.num_heads):
      read = [
        s
        for s in range(t + 1)
        if window is None or t - s < window or s < c.num_sinks
      ]
      scores = np.array([scale * q[t][h] @ k[s][h // group] for s in read])
      if c.attention_soft_cap:
        scores = c.attention_soft_cap * np.tanh(scores / c.attention_soft_cap)
      weights = np.exp(scores - scores.max())
      weights /= weights.sum()
      heads.append(
        sum(w * v[s][h // group] for w, s in zip(weights, read, strict=True))
      )
    y = np.concatenate(heads) @ p["out"]["kernel"]
    out.append(y + (p["out"]["bias"] if c.out_bias else 0))
  return np.stack(out)


def oracle_feed_forward(c, p, x):
  if c.activation == "gelu":
    h = x @ p["up"]["kernel"] + (p["up"]["bias"] if c.mlp_bias else 0)
    h = oracle_gelu(h)
  else:
    gate, up = (x @ p["gate_up"]["kernel"][:, i] for i in (0, 1))
    if c.mlp_bias:
      gate, up = gate + p["gate_up"]["bias"][0], up + p["gate_up"]["bias"][1]
    gate = (
      gate / (1 + np.exp(-gate))
      if c.activation == "swiglu"
      else oracle_gelu(gate)
    )
    h = gate * up
  return h @ p["down"]["kernel"] + (p["down"]["bias"] if c.mlp_bias else 0)


def oracle_forward(c, params, tokens):
  """Tokens `[T]` -> hidden `[T, D]`, logits `[T, V]`, value logits `[T]`."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  trunk = params["trunk"]
  xs = trunk["embedding"][tokens] * c.embedding_scale

  def norm(p, name, rows, wanted):
    if not wanted:
      return rows
    return np.stack([oracle_norm(c, x, p[name]["scale"]) for x in rows])

  for layer in range(c.num_layers):
    p = trunk[f"layer_{layer}"]
    y = norm(p, "attention_norm", xs, c.norm_before)
    y = oracle_attention(c, p, layer, y)
    xs = xs + norm(p, "attention_after_norm", y, c.norm_after)
    y = norm(p, "mlp_norm", xs, c.norm_before)
    y = np.stack([oracle_feed_forward(c, p, x) for x in y])
    xs = xs + norm(p, "mlp_after_norm", y, c.norm_after)
  hidden = norm(trunk, "final_norm", xs, True)
  head = (
    trunk["embedding"].T
    if c.tied_embeddings
    else params["policy_head"]["kernel"]
  )
  logits = hidden @ head
  if c.final_soft_cap:
    logits = c.final_soft_cap * np.tanh(logits / c.final_soft_cap)
  p, x = params["value_head"], hidden
  if c.value_hidden_width:
    x = oracle_gelu(x @ p["up"]["kernel"] + p["up"]["bias"])
  value = (x @ p["out"]["kernel"] + p["out"]["bias"])[:, 0]
  return hidden, logits, value


# ------------------------------------------------------------------ the tests

PROMPT, LENGTH = 7, 12
TOKENS = (
  np.random.default_rng(3).integers(0, 23, (2, 2, LENGTH)).astype("int32")
)
TOKENS[:, 1, :PROMPT] = TOKENS[:, 0, :PROMPT]  # two rows share their prompt
PROMPT_LENGTHS = np.array([PROMPT, PROMPT - 2])


def all_paths(network, params, tokens):
  """Hidden states by a full forward and by a cache.

  tokens `[B, G, LENGTH]`; prompts of problem b end at PROMPT_LENGTHS[b]. The
  cache is filled by three tokens at once (a scatter), grows, and gets one more
  (a slice).
  """
  batch, rows, length = tokens.shape
  flat = tokens.reshape(batch * rows, length)
  index = jnp.broadcast_to(jnp.arange(length)[None], flat.shape)
  full, kept = network.apply(params, flat, index)
  lengths = jnp.asarray(PROMPT_LENGTHS)
  prefix = jax.tree.map(lambda x: x[::rows], kept)
  is_prompt = jnp.arange(length)[None] < lengths[:, None]
  cache = make_cache(prefix.replace(mask=is_prompt), num_rows=rows, capacity=3)

  def new(first, count):
    at = lengths[:, None, None] + first + jnp.arange(count)[None, None, :]
    at = jnp.broadcast_to(at, (batch, rows, count))
    return jnp.take_along_axis(tokens, at, 2), at

  three, cache = network.apply(params, *new(0, 3), cache)
  one, cache = network.apply(params, *new(3, 1), grow(cache, 6), slot=3)
  hidden = full.reshape(batch, rows, length, -1)
  heads = (
    network.policy_logits(params, hidden),
    network.value_logits(params, hidden),
  )
  return hidden, heads, jnp.concatenate([three, one], 2), cache.suffix_lengths


@pytest.mark.parametrize("name", FAMILIES)
def test_family_is_the_plain_decoder_with_and_without_cache(name):
  config = FAMILIES[name]
  network = make_network(config)
  params = random_params(network)
  paths = fast_jit(functools.partial(all_paths, network))
  hidden, (logits, values), cached, lengths = paths(params, jnp.asarray(TOKENS))
  close = functools.partial(np.testing.assert_allclose, atol=3e-5, rtol=1e-4)
  for b in range(2):
    for g in range(2):
      want = oracle_forward(config, params, TOKENS[b, g])
      for found, expected in zip(
        (hidden[b, g], logits[b, g], values[b, g]), want, strict=True
      ):
        close(found, expected)
      start = PROMPT_LENGTHS[b]
      close(cached[b, g], want[0][start : start + 4])
  assert (np.asarray(lengths) == 4).all()


def switched(**fields):
  """What the oracle gives for Llama's parameters with one switch turned."""
  config = change(**fields)
  params = random_params(make_network(LLAMA))
  return oracle_forward(config, params, TOKENS[0, 0])[1]


@pytest.mark.parametrize(
  "fields",
  [
    {"sliding_window": 3},
    {"sliding_window": 3, "num_sinks": 2},
    {"rope_base": 50.0},
    {"rope_scale": 4.0},
    {"rope_variant": "interleaved"},
    {"rotary_width": 4},
    {"rope_llama3": (8.0, 1.0, 4.0, 64.0)},
    {"attention_soft_cap": 0.5},
    {"final_soft_cap": 0.7},
    {"query_scale": 0.7},
    {"embedding_scale": 3.0},
    {"norm_plus_one": True},
    {"norm_eps": 0.1},
    {"activation": "geglu"},
  ],
  ids=lambda fields: " ".join(fields),
)
def test_each_switch_matters_in_this_test(fields):
  """The oracle comparison above could not pass with the switch ignored."""
  without = dict(list(fields.items())[:-1])
  assert np.abs(switched(**fields) - switched(**without)).max() > 1e-3


@pytest.fixture(scope="module")
def llama():
  network = make_network(LLAMA)
  return network, random_params(network)


def test_rows_of_unlike_lengths_append_by_scatter(llama):
  network, params = llama
  tokens = jnp.asarray(TOKENS)

  @fast_jit
  def run(params):
    prefix, _ = prefix_from_prompt(
      network, params, tokens[:, 0, :4], jnp.array([4, 4])
    )
    cache = make_cache(prefix, num_rows=2, capacity=8)
    at = jnp.broadcast_to(jnp.arange(4, 7)[None, None], (2, 2, 3))
    _, cache = network.apply(params, tokens[:, :, 4:7], at, cache)
    # Row 1 takes back two tokens.
    cache = cache.replace(suffix_lengths=jnp.array([[3, 1], [3, 1]], jnp.int32))
    at = 4 + cache.suffix_lengths[..., None] + jnp.arange(2)[None, None]
    new = jnp.take_along_axis(tokens, at, 2)
    return network.apply(params, new, at, cache)[0]

  hidden = run(params)
  for b in range(2):
    for g, first in ((0, 7), (1, 5)):
      want = oracle_forward(LLAMA, params, TOKENS[b, g])[0]
      np.testing.assert_allclose(
        hidden[b, g], want[first : first + 2], atol=3e-5
      )


def test_prefix_with_holes_is_the_sequence_without(llama):
  network, params = llama
  tokens = jnp.asarray(TOKENS[:, 0])
  positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], tokens.shape)

  @fast_jit
  def run(params):
    _, whole = network.apply(params, tokens, positions)

    def part(first, count, room):
      pad = ((0, 0), (0, 0), (0, room - count), (0, 0))

      def cut(arrays):  # waste in the hole, to see that it is not read
        return tuple(
          jnp.pad(a[:, :, first : first + count], pad, constant_values=9.0)
          for a in arrays
        )

      return Prefix(
        keys=cut(whole.keys),
        values=cut(whole.values),
        positions=first + jnp.broadcast_to(jnp.arange(room)[None], (2, room)),
        mask=jnp.broadcast_to(jnp.arange(room)[None] < count, (2, room)),
      )

    prefix = join([part(0, 4, 6), part(4, 2, 3), part(6, 3, 3)])
    cache = make_cache(prefix, num_rows=1, capacity=2)
    return network.apply(
      params, tokens[:, None, 9:11], positions[:, None, 9:11], cache
    )[0]

  hidden = run(params)
  for b in range(2):
    want = oracle_forward(LLAMA, params, TOKENS[b, 0])[0]
    np.testing.assert_allclose(hidden[b, 0], want[9:11], atol=3e-5)


def test_packed_segments_do_not_see_each_other(llama):
  network, params = llama
  a, b = TOKENS[0, 0, :5], TOKENS[1, 0, :6]
  packed = jnp.asarray(np.concatenate([a, b]))[None]
  segments = jnp.asarray([[0] * 5 + [1] * 6])
  positions = jnp.asarray(np.concatenate([np.arange(5), np.arange(6)]))[None]
  hidden, _ = fast_jit(network.apply)(
    params, packed, positions, segment_ids=segments
  )
  want = [oracle_forward(LLAMA, params, t)[0] for t in (a, b)]
  np.testing.assert_allclose(hidden[0], np.concatenate(want), atol=3e-5)


def test_next_token_log_probs(llama):
  network, params = llama
  tokens, lengths = TOKENS[:, 0], np.array([12, 8])
  run = fast_jit(functools.partial(next_token_log_probs, network))
  log_probs, values = run(params, tokens, lengths)
  for b in range(2):
    _, logits, value = oracle_forward(LLAMA, params, tokens[b])
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    n = lengths[b]
    want = want[np.arange(n - 1), tokens[b, 1:n]]
    np.testing.assert_allclose(log_probs[b, : n - 1], want, atol=3e-5)
    assert (np.asarray(log_probs[b, n - 1 :]) == 0).all()
    np.testing.assert_allclose(values[b, :n], value[:n], atol=3e-5)


def test_bfloat16_computes_short_and_keeps_long(llama):
  _, params = llama
  network = make_network(change(dtype="bfloat16"))
  tokens = jnp.asarray(TOKENS[:, 0])
  positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], tokens.shape)
  hidden, prefix = fast_jit(network.apply)(params, tokens, positions)
  assert hidden.dtype == prefix.keys[0].dtype == jnp.bfloat16
  logits = network.policy_logits(params, hidden)
  assert logits.dtype == network.value(params, hidden).dtype == jnp.float32
  started = jax.eval_shape(network.init, jax.random.key(0))
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(started))
  want = oracle_forward(LLAMA, params, TOKENS[0, 0])[1]
  error = np.abs(np.asarray(logits[0]) - want)
  assert 1e-4 < error.max() < 0.2


@pytest.fixture(scope="module")
def trained_rows():
  return jnp.asarray(TOKENS[:, 0]), jnp.asarray([12, 8])


def gradient(network, params, rows, **options):
  tokens, lengths = rows

  def total(params):
    log_probs, values, entropies = next_token_log_probs(
      network, params, tokens, lengths, with_entropy=True, **options
    )
    sums = jnp.sum(log_probs), jnp.sum(jnp.square(values)), jnp.sum(entropies)
    return sum(sums), (log_probs, entropies)

  return fast_jit(jax.grad(total, has_aux=True))(params)


def assert_close(found, expected, atol):
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
  for a, b in pairs:
    np.testing.assert_allclose(a, b, atol=atol)


# Groups of two positions: all of them full, and the last one not.
@pytest.mark.parametrize("length", [LENGTH, LENGTH - 1])
def test_logits_by_groups_are_those_at_once(llama, trained_rows, length):
  network, params = llama
  tokens, lengths = trained_rows
  rows = tokens[:, :length], jnp.minimum(lengths, length)
  expected = gradient(network, params, rows)
  # Room for 2 positions of both rows.
  options = {"max_logits": 2 * 2 * LLAMA.vocab_size + 1}
  assert_close(gradient(network, params, rows, **options), expected, 5e-5)
  text = str(
    jax.make_jaxpr(functools.partial(next_token_log_probs, network, **options))(
      params, *rows
    )
  )
  assert f"[2,2,{LLAMA.vocab_size}]" in text
  assert f"[2,{length},{LLAMA.vocab_size}]" not in text


def test_remade_blocks_give_the_same_and_only_they_are_remade(
  llama, trained_rows
):
  network, params = llama
  remade = make_network(change(remat=True))
  expected = gradient(network, params, trained_rows)
  assert_close(gradient(remade, params, trained_rows), expected, 5e-5)
  structures = (
    jax.tree.structure(jax.eval_shape(n.init, jax.random.key(0)))
    for n in (network, remade)
  )
  assert len(set(structures)) == 1
  texts = [
    str(
      jax.make_jaxpr(functools.partial(next_token_log_probs, n))(
        params, *trained_rows
      )
    )
    for n in (network, remade)
  ]
  assert [text.count("prevent_cse=True") for text in texts] == [
    0,
    LLAMA.num_layers,
  ]


def test_gradients_of_bfloat16_are_float32(llama, trained_rows):
  _, params = llama
  network = make_network(change(dtype="bfloat16"))
  found, _ = gradient(network, params, trained_rows)
  assert {x.dtype.name for x in jax.tree.leaves(found)} == {"float32"}
  expected, _ = gradient(make_network(LLAMA), params, trained_rows)
  largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
  assert_close(found, expected, 0.1 * largest)
