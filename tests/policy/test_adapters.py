"""Adapters: the start is the base, the product is W + (alpha / rank) A B."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.policy import (
  TransformerConfig,
  decode_rows,
  make_controls,
  make_network,
  next_token_log_probs,
  prefix_from_prompt,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

BASE = TransformerConfig(
  vocab_size=17,
  num_layers=2,
  width=8,
  num_heads=2,
  num_kv_heads=1,
  head_width=4,
  ffn_width=12,
  value_hidden_width=4,
)
ADAPTED = dataclasses.replace(BASE, lora_rank=3, lora_alpha=6.0)
SCALE = 2.0
TOKENS = jnp.asarray([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
LENGTHS = jnp.asarray([5, 4])


def names_of(params):
  """Leaves by their place."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {jax.tree_util.keystr(place): leaf for place, leaf in leaves}


def is_adapter(name):
  return "lora_a" in name or "lora_b" in name


def drawn(config):
  """A network whose parameters are all away from their start."""
  network = make_network(config)
  leaves, structure = jax.tree.flatten(network.init(jax.random.key(0)))
  rng = np.random.default_rng(0)
  moved = [
    np.asarray(x) + rng.normal(0, 0.2, x.shape).astype(x.dtype) for x in leaves
  ]
  return network, jax.tree.unflatten(structure, moved)


def merged(params):
  """The oracle: adapters added to their kernels, and gone."""
  if "lora_a" not in params:
    return {
      name: merged(part) if isinstance(part, dict) else part
      for name, part in params.items()
    }
  rest = {k: x for k, x in params.items() if not is_adapter(k)}
  change = SCALE * np.tensordot(params["lora_a"], params["lora_b"], 1)
  return rest | {"kernel": params["kernel"] + change.astype(np.float32)}


@functools.partial(jax.jit, static_argnums=0)
def read(network, params, tokens, lengths):
  return next_token_log_probs(network, params, tokens, lengths)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(network, params):
  def loss(params):
    log_probs, values = read(network, params, TOKENS, LENGTHS)
    return jnp.sum(jnp.square(values)) - jnp.sum(log_probs)

  return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_start_is_the_base(dtype):
  networks = [
    make_network(dataclasses.replace(config, dtype=dtype))
    for config in (BASE, ADAPTED)
  ]
  base, adapted = (network.init(jax.random.key(1)) for network in networks)
  old, new = names_of(base), names_of(adapted)
  for name, leaf in old.items():
    np.testing.assert_array_equal(new[name], leaf)
  # Two factors for each of four products of two layers, and nothing else.
  others = new.keys() - old.keys()
  assert len(others) == 16 and all(map(is_adapter, others))
  found = [
    read(network, params, TOKENS, LENGTHS)
    for network, params in zip(networks, (base, adapted), strict=True)
  ]
  jax.tree.map(np.testing.assert_array_equal, *found)
  grads = names_of(loss_and_grads(networks[1], adapted)[1])
  assert all(
    np.any(x) == ("lora_b" in k) for k, x in grads.items() if k in others
  )


def test_the_spread_of_the_start():
  wide = dataclasses.replace(ADAPTED, width=256, lora_rank=64, num_layers=1)
  layer = make_network(wide).init(jax.random.key(0))["trunk"]["layer_0"]
  first, second = layer["qkv"]["lora_a"], layer["gate_up"]["lora_a"]
  assert np.std(first) == pytest.approx(1 / 16, rel=0.05)
  assert not np.array_equal(first, second)


@pytest.mark.parametrize(
  "change", [{}, {"activation": "gelu", "mlp_bias": True, "qkv_bias": True}]
)
def test_the_product_and_its_gradients_are_those_of_the_sum(change):
  network, params = drawn(dataclasses.replace(ADAPTED, **change))
  dense = make_network(dataclasses.replace(BASE, **change))
  value, grads = loss_and_grads(network, params)
  want, dense_grads = loss_and_grads(dense, merged(params))
  assert float(value) == pytest.approx(float(want), rel=1e-5)
  for layer, products in params["trunk"].items():
    for name in products if layer.startswith("layer_") else ():
      if "kernel" not in products[name]:
        continue
      own, found = products[name], grads["trunk"][layer][name]
      of_kernel = np.asarray(dense_grads["trunk"][layer][name]["kernel"])
      np.testing.assert_allclose(found["kernel"], of_kernel, atol=2e-4)
      # By the chain rule through W + scale A B.
      axes = range(1, of_kernel.ndim)
      of_a = SCALE * np.tensordot(of_kernel, own["lora_b"], (axes, axes))
      of_b = SCALE * np.tensordot(own["lora_a"], of_kernel, (0, 0))
      np.testing.assert_allclose(found["lora_a"], of_a, atol=2e-4)
      np.testing.assert_allclose(found["lora_b"], of_b, atol=2e-4)
      assert np.abs(of_a).max() > 0.05 and np.abs(of_b).max() > 0.05


def test_rows_are_sampled_with_the_adapters():
  network, params = drawn(ADAPTED)
  prompts, lengths = TOKENS[:, :3], jnp.asarray([3, 2])

  @jax.jit
  def decode(params, keys):
    prefix, last = prefix_from_prompt(network, params, prompts, lengths)
    return decode_rows(
      network,
      params,
      keys,
      last,
      lengths,
      prefix,
      num_rows=3,
      max_new_tokens=6,
      stop_ids=(),
      eos_id=16,
      pad_id=0,
      controls=make_controls(temperature=1.0),
    )

  rows = decode(params, jax.random.split(jax.random.key(5), (2, 3)))
  texts, total = np.zeros((6, 10), np.int32), np.zeros(6, np.int32)
  for i, (b, g) in enumerate(np.ndindex(2, 3)):
    n, m = int(lengths[b]), int(rows.lengths[b, g])
    total[i] = n + m
    texts[i, :n], texts[i, n : n + m] = prompts[b, :n], rows.tokens[b, g, :m]
  for pair in ((network, params), (make_network(BASE), merged(params))):
    log_probs, _ = read(*pair, texts, total)
    for i, (b, g) in enumerate(np.ndindex(2, 3)):
      n, m = int(lengths[b]), int(rows.lengths[b, g])
      sampled = rows.policy_log_probs[b, g, :m]
      np.testing.assert_allclose(sampled, log_probs[i, n - 1 :][:m], atol=1e-5)
