"""Other people's generators and trainers, at the shapes of common.py.

A generator takes `(config, prompts [B, P], num_new, one_core)` and returns a
call that samples `num_new` tokens for every prompt and blocks. A trainer takes
`(config, tokens [B, T], one_core)` and returns a call that makes one step of
AdamW on the cross entropy of the tokens and blocks. Both raise ImportError
where their package is absent.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from on_policy_peers import Numbers, tunix_config

from o1jax.policy import TransformerConfig

Run = Callable[[], Any]


def naive_jax(
  config: TransformerConfig, prompts: jax.Array, num_new: int, one_core: bool
) -> Run:
  """What one writes first in JAX.

  Layers in one scan with the cache as its output, cache `[B, T, heads, E]`,
  attention over the full length, one Gumbel number for every token of the
  vocabulary.
  """
  params = naive_params(config, jax.random.key(0))
  calls = [0]

  def run():
    calls[0] += 1
    key = jax.random.key(calls[0])
    jax.block_until_ready(naive_tokens(config, params, prompts, key, num_new))

  return run


def naive_params(c, key):
  def draw(i, *shape):
    noise = jax.random.normal(jax.random.fold_in(key, i), shape)
    return noise * shape[-2] ** -0.5

  layers, inner = c.num_layers, c.num_heads * c.head_width
  columns = (c.num_heads + 2 * c.num_kv_heads) * c.head_width
  return {
    "embedding": draw(0, c.vocab_size, c.width),
    "head": draw(1, c.width, c.vocab_size),
    "blocks": {
      "qkv": draw(2, layers, c.width, columns),
      "out": draw(3, layers, inner, c.width),
      "gate_up": draw(4, layers, c.width, 2 * c.ffn_width),
      "down": draw(5, layers, c.ffn_width, c.width),
    },
  }


def norm(x):
  return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def _rotate(x, position):
  """x `[B, T, heads, E]` at positions `[T]`."""
  half = x.shape[-1] // 2
  angle = position[:, None] * 10000.0 ** (-jnp.arange(half) / half)[None]
  cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def block(c, x, layer, begin):
  """One layer on x `[B, T, D]` from position `begin` on, and its caches."""
  p, k, v = layer
  batch, length, _ = x.shape
  position = begin + jnp.arange(length)
  seen = jnp.arange(k.shape[1])[None] <= position[:, None]
  group = c.num_heads // c.num_kv_heads
  inner, kv = c.num_heads * c.head_width, c.num_kv_heads * c.head_width
  q, new_k, new_v = jnp.split(norm(x) @ p["qkv"], [inner, inner + kv], -1)

  def heads(y, n):
    return y.reshape(batch, length, n, c.head_width)

  q = _rotate(heads(q, c.num_heads), position)
  new_k = _rotate(heads(new_k, c.num_kv_heads), position)
  start = (0, begin, 0, 0)
  k = jax.lax.dynamic_update_slice(k, new_k, start)
  v = jax.lax.dynamic_update_slice(v, heads(new_v, c.num_kv_heads), start)
  q = q.reshape(batch, length, c.num_kv_heads, group, c.head_width)
  scores = jnp.einsum("bqjge,btje->bjgqt", q, k) * c.head_width**-0.5
  weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), -1)
  y = jnp.einsum("bjgqt,btje->bqjge", weights, v)
  x = x + y.reshape(batch, length, inner) @ p["out"]
  gate, up = jnp.split(norm(x) @ p["gate_up"], 2, -1)
  return x + (jax.nn.silu(gate) * up) @ p["down"], (k, v)


def _forward(c, params, tokens, begin, keys, values):
  """Tokens `[B, T]` from position `begin` on; caches `[L, B, total, J, E]`."""

  def body(x, layer):
    return block(c, x, layer, begin)

  x = params["embedding"][tokens]
  x, (keys, values) = jax.lax.scan(body, x, (params["blocks"], keys, values))
  return norm(x[:, -1]) @ params["head"], keys, values


@functools.partial(jax.jit, static_argnames=("c", "num_new"))
def naive_tokens(c, params, prompts, key, num_new):
  """Tokens `[num_new, B]`: the prompts at once, then one token at a time."""
  batch, width = prompts.shape
  room = (c.num_layers, batch, width + num_new, c.num_kv_heads, c.head_width)
  carry = _forward(c, params, prompts, 0, jnp.zeros(room), jnp.zeros(room))

  def body(carry, index):
    logits, keys, values = carry
    token = jax.random.categorical(jax.random.fold_in(key, index), logits)
    return _forward(
      c, params, token[:, None], width + index, keys, values
    ), token

  return jax.lax.scan(body, carry, jnp.arange(num_new))[1]


def hf_model(config: TransformerConfig, one_core: bool):
  """A random Llama of `transformers`."""
  import torch
  import transformers

  if one_core:
    torch.set_num_threads(1)
  torch.manual_seed(0)
  shape = transformers.LlamaConfig(
    vocab_size=config.vocab_size,
    hidden_size=config.width,
    intermediate_size=config.ffn_width,
    num_hidden_layers=config.num_layers,
    num_attention_heads=config.num_heads,
    num_key_value_heads=config.num_kv_heads,
    head_dim=config.head_width,
    max_position_embeddings=4096,
    tie_word_embeddings=config.tied_embeddings,
  )
  model = transformers.LlamaForCausalLM(shape)
  return model.train(False)


# Pure sampling at temperature 1, to the full length.
HF_SAMPLING = dict(
  do_sample=True,
  temperature=1.0,
  top_k=0,
  top_p=1.0,
  pad_token_id=0,
  eos_token_id=None,
)


def hf(
  config: TransformerConfig,
  prompts: jax.Array,
  num_new: int,
  one_core: bool,
  *,
  kind: str,
) -> Run:
  """`transformers` generate: kind "eager", "static" cache, or "compiled"."""
  import torch

  model = hf_model(config, one_core)
  tokens = torch.tensor(np.asarray(prompts), dtype=torch.long)
  options = dict(HF_SAMPLING, disable_compile=kind != "compiled")
  if kind != "eager":
    options["cache_implementation"] = "static"
  if kind == "compiled":
    model.forward = torch.compile(model.forward)

  def run():
    with torch.inference_mode():
      out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=num_new,
        **options,
      )
    assert out.shape == (len(tokens), tokens.shape[1] + num_new)

  return run


def tunix(
  config: TransformerConfig, prompts: jax.Array, num_new: int, one_core: bool
) -> Run:
  """The sampler of `google-tunix` on its own random Llama, in float32."""
  del one_core
  from flax import nnx
  from tunix.generate import sampler as tunix_sampler
  from tunix.models.llama3 import model as llama

  c, width = config, prompts.shape[1]
  sampler = tunix_sampler.Sampler(
    llama.Llama3(tunix_config(c), rngs=nnx.Rngs(0)),
    Numbers(c.vocab_size),
    tunix_sampler.CacheConfig(
      cache_size=width + num_new,
      num_layers=c.num_layers,
      num_kv_heads=c.num_kv_heads,
      head_dim=c.head_width,
    ),
  )
  # It puts a token before the text by itself.
  texts = [" ".join(map(str, row[1:])) for row in np.asarray(prompts).tolist()]
  calls = [0]

  def run():
    calls[0] += 1
    out = sampler(
      texts,
      max_generation_steps=num_new,
      max_prompt_length=width,
      temperature=1.0,
      top_p=1.0,
      seed=calls[0],
    )
    jax.block_until_ready(out.tokens)
    assert all(len(row) == num_new for row in out.tokens)

  return run


GENERATORS = {
  "tunix": tunix,
  "naive_jax": naive_jax,
  "hf_eager": functools.partial(hf, kind="eager"),
  "hf_static": functools.partial(hf, kind="static"),
  "hf_compiled": functools.partial(hf, kind="compiled"),
}


def plain_trainer(
  config: TransformerConfig, tokens: jax.Array, one_core: bool
) -> Run:
  """What one writes first in JAX and optax: layers unrolled, whole scores.

  The embedding is never tied: that is one product more in its favour.
  """
  del one_core
  c = config
  params = naive_params(c, jax.random.key(0))
  stack = params["blocks"]
  params["blocks"] = [
    jax.tree.map(lambda x, i=i: x[i], stack) for i in range(c.num_layers)
  ]
  rule = optax.adamw(1e-4)

  def loss(params, tokens):
    batch, length = tokens.shape
    empty = jnp.zeros((batch, length, c.num_kv_heads, c.head_width))
    x = params["embedding"][tokens]
    for layer in params["blocks"]:
      x, _ = block(c, x, (layer, empty, empty), 0)
    logits = norm(x) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(
      logits[:, :-1], tokens[:, 1:]
    ).mean()

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, tokens):
    value, grads = jax.value_and_grad(loss)(params, tokens)
    changes, state = rule.update(grads, state, params)
    return optax.apply_updates(params, changes), state, value

  held = [params, rule.init(params)]

  def run():
    *held[:], value = step(*held, tokens)
    jax.block_until_ready((held, value))

  return run


def torch_trainer(
  config: TransformerConfig,
  tokens: jax.Array,
  one_core: bool,
  *,
  is_compiled: bool,
) -> Run:
  """`transformers` Llama with torch's fused AdamW."""
  import torch

  model = hf_model(config, one_core)
  model.train()
  model.config.use_cache = False
  rule = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  rows = torch.tensor(np.asarray(tokens), dtype=torch.long)
  forward = torch.compile(model) if is_compiled else model

  def run():
    rule.zero_grad(set_to_none=True)
    forward(input_ids=rows, labels=rows, use_cache=False).loss.backward()
    rule.step()

  return run


TRAINERS = {
  "plain_jax": plain_trainer,
  "torch_eager": functools.partial(torch_trainer, is_compiled=False),
  "torch_compiled": functools.partial(torch_trainer, is_compiled=True),
}
