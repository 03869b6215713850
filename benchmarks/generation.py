"""Tokens per second of generation: ours beside a straightforward JAX loop.

  python benchmarks/generation.py --batch=16 --rows=1 --repeats=9

The naive loop is what one writes first: layers in one scan with the cache as
its output, cache `[B, T, heads, E]`, attention over the full length, one
Gumbel number for every token of the vocabulary. Both decode the same number of
tokens with the same shape of network, interleaved; the figures are medians of
CPU seconds and of the pairwise ratio. Pinned to one core where the system can.
"""

import argparse
import functools
import json
import os
import time

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import jax.numpy as jnp
import numpy as np

from o1jax.policy import (
  TransformerConfig,
  make_controls,
  make_network,
)
from o1jax.policy.generate import make_generate

CONFIG = TransformerConfig(
  vocab_size=512,
  num_layers=4,
  width=128,
  num_heads=4,
  num_kv_heads=4,
  head_width=32,
  ffn_width=352,
)


def naive_params(key):
  """Stacked weights of CONFIG's shape."""
  c = CONFIG

  def draw(i, *shape):
    noise = jax.random.normal(jax.random.fold_in(key, i), shape)
    return noise * shape[-2] ** -0.5

  layers, inner = c.num_layers, c.num_heads * c.head_width
  return {
    "embedding": draw(0, c.vocab_size, c.width),
    "head": draw(1, c.width, c.vocab_size),
    "blocks": {
      "qkv": draw(2, layers, c.width, 3 * inner),
      "out": draw(3, layers, inner, c.width),
      "gate_up": draw(4, layers, c.width, 2 * c.ffn_width),
      "down": draw(5, layers, c.ffn_width, c.width),
    },
  }


def norm(x):
  return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def rotate(x, position):
  half = x.shape[-1] // 2
  angle = position * 10000.0 ** (-jnp.arange(half) / half)
  a, b = x[..., :half], x[..., half:]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


@functools.partial(jax.jit, static_argnames="total")
def naive_generate(params, prompt, key, total):
  """Decodes a prompt `[B, P]` up to `total` tokens, one position at a time."""
  c = CONFIG
  batch, width = prompt.shape
  shape = (c.num_layers, batch, total, c.num_heads, c.head_width)

  def body(carry, position):
    tokens, keys, values = carry
    x = params["embedding"][tokens[:, position]]

    def block(x, layer):
      p, k, v = layer
      qkv = (norm(x) @ p["qkv"]).reshape(batch, 3, c.num_heads, c.head_width)
      q, new_k = rotate(qkv[:, 0], position), rotate(qkv[:, 1], position)
      k, v = k.at[:, position].set(new_k), v.at[:, position].set(qkv[:, 2])
      scores = jnp.einsum("bhe,bthe->bht", q, k) * c.head_width**-0.5
      seen = jnp.arange(total) <= position
      weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), -1)
      y = jnp.einsum("bht,bthe->bhe", weights, v).reshape(batch, -1)
      x = x + y @ p["out"]
      gate, up = jnp.split(norm(x) @ p["gate_up"], 2, -1)
      return x + (jax.nn.silu(gate) * up) @ p["down"], (k, v)

    x, (keys, values) = jax.lax.scan(block, x, (params["blocks"], keys, values))
    drawn = jax.random.categorical(
      jax.random.fold_in(key, position), norm(x) @ params["head"]
    )
    known = position + 1 < width
    following = jnp.where(known, tokens[:, position + 1], drawn)
    tokens = tokens.at[:, position + 1].set(following)
    return (tokens, keys, values), None

  tokens = jnp.pad(prompt, ((0, 0), (0, total + 1 - width)))
  carry = (tokens, jnp.zeros(shape), jnp.zeros(shape))
  (tokens, _, _), _ = jax.lax.scan(body, carry, jnp.arange(total))
  return tokens


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--batch", type=int, default=16, help="prompts")
  parser.add_argument("--rows", type=int, default=1, help="samples of each")
  parser.add_argument("--prompt", type=int, default=8, help="prompt tokens")
  parser.add_argument("--new", type=int, default=128, help="new tokens")
  parser.add_argument("--repeats", type=int, default=9)
  args = parser.parse_args()
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  total = args.batch * args.rows
  prompt = jax.random.randint(
    jax.random.key(1), (args.batch, args.prompt), 0, CONFIG.vocab_size
  )
  network = make_network(CONFIG)
  params = network.init(jax.random.key(0))
  generate = make_generate(
    network,
    num_rows=args.rows,
    max_new_tokens=args.new,
    eos_id=-1,  # no token: every row runs to its full length
    pad_id=0,
  )
  lengths = jnp.full((args.batch,), args.prompt)
  stacked = naive_params(jax.random.key(0))

  def ours(i):
    keys = jax.random.split(jax.random.key(i), (args.batch, args.rows))
    generate(params, keys, prompt, lengths, make_controls())

  def naive(i):
    rows = jnp.repeat(prompt, args.rows, 0)
    key = jax.random.key(i)
    naive_generate(
      stacked, rows, key, args.prompt + args.new
    ).block_until_ready()

  seconds = {ours: [], naive: []}
  for repeat in range(args.repeats + 1):
    for run, times in seconds.items():
      start = time.process_time()
      run(repeat)
      times.append(time.process_time() - start)
  a, b = (np.array(times[1:]) for times in seconds.values())
  new = total * args.new
  print(
    json.dumps(
      {
        "rows": total,
        "ours_tokens_per_s": round(new / np.median(a)),
        "naive_tokens_per_s": round(new / np.median(b)),
        "ratio_median": round(float(np.median(b / a)), 2),
        "load": os.getloadavg()[0],
      }
    )
  )


if __name__ == "__main__":
  main()
