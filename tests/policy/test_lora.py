"""Adapters: the start is the base, the product is W + AB, the base stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.policy import TransformerConfig, make_network, next_token_log_probs
from o1jax.policy.lora import make_lora

NETWORK = make_network(
  TransformerConfig(
    vocab_size=17,
    num_layers=2,
    width=8,
    num_heads=2,
    num_kv_heads=1,
    head_width=4,
    ffn_width=12,
  )
)
TOKENS = jnp.asarray([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
LENGTHS = jnp.asarray([5, 4])


@pytest.fixture(scope="module")
def base():
  return NETWORK.init(jax.random.key(0))


def loss(params):
  log_probs, values = next_token_log_probs(NETWORK, params, TOKENS, LENGTHS)
  return jnp.sum(jnp.square(values)) - jnp.sum(log_probs)


def test_the_start_is_the_base_and_only_b_has_a_gradient(base):
  lora = make_lora(NETWORK, rank=3, alpha=6.0)
  adapters = lora.init(jax.random.key(1))
  merged = lora.merge(base, adapters)
  for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(base), strict=True):
    np.testing.assert_array_equal(a, b)
  grads = jax.grad(lambda a: loss(lora.merge(base, a)))(adapters)
  for products in grads.values():
    for factors in products.values():
      assert not np.asarray(factors["a"]).any()
      assert np.asarray(factors["b"]).any()
  # The base has none.
  of_base = jax.grad(lambda p: loss(lora.merge(p, adapters)))(base)
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(of_base))


def test_merging_adds_the_scaled_product(base):
  lora = make_lora(NETWORK, rank=2, alpha=3.0, targets=("qkv", "gate_up"))
  adapters = lora.init(jax.random.key(1))
  assert {*adapters["layer_1"]} == {"qkv", "gate_up"}
  adapters = jax.tree.map(lambda x: x + 0.5, adapters)
  merged = lora.merge(base, adapters)
  for name in ("qkv", "gate_up"):
    factors = adapters["layer_1"][name]
    a, b = np.asarray(factors["a"]), np.asarray(factors["b"])
    old = np.asarray(base["trunk"]["layer_1"][name]["kernel"])
    want = old + 1.5 * np.tensordot(a, b, 1)
    found = merged["trunk"]["layer_1"][name]["kernel"]
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
  for name in ("out", "down"):
    np.testing.assert_array_equal(
      merged["trunk"]["layer_1"][name]["kernel"],
      base["trunk"]["layer_1"][name]["kernel"],
    )


def test_the_spread_of_the_start():
  wide = make_network(
    TransformerConfig(
      vocab_size=4,
      num_layers=1,
      width=256,
      num_heads=1,
      num_kv_heads=1,
      head_width=2,
      ffn_width=2,
    )
  )
  factors = make_lora(wide, rank=64).init(jax.random.key(0))["layer_0"]
  assert np.std(factors["qkv"]["a"]) == pytest.approx(1 / 16, rel=0.05)
  first, second = factors["qkv"]["a"], factors["gate_up"]["a"]
  assert not np.array_equal(first, second)


def test_a_few_steps_lower_the_loss(base):
  lora = make_lora(NETWORK, rank=2)
  adapters = lora.init(jax.random.key(2))
  step = jax.jit(jax.value_and_grad(lambda a: loss(lora.merge(base, a))))
  losses = []
  for _ in range(6):
    value, grads = step(adapters)
    losses.append(float(value))
    adapters = jax.tree.map(lambda a, g: a - 0.02 * g, adapters, grads)
  assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"rank": 0}, "rank=0"),
    ({"rank": 1, "targets": ("qvk",)}, "qvk are unknown"),
    ({"rank": 1, "targets": ("up",)}, "the network has"),
  ],
)
def test_bad_arguments_are_refused(options, words):
  with pytest.raises(ValueError, match=words):
    make_lora(NETWORK, **options)
