"""Attention over whole sequences: every way gives what `full_attention` gives.

Value and gradient, for lengths that are no multiple of a block, grouped
queries, windows with sinks, segments and caps.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.policy import attention

pytestmark = pytest.mark.usefixtures("quick_programs")

B, J, Q, E = 2, 2, 3, 8
CASES = {
  "plain": {},
  "window": {"window": 5},
  "sinks": {"window": 5, "num_sinks": 2},
  "segments": {"num_segments": 3},
  "cap": {"cap": 0.7},
}


def random_arrays(length, seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  shapes = ((B, length, J, Q, E), *((B, J, length, E),) * 2)
  queries, ks, vs = (
    jax.random.normal(k, s) for k, s in zip(keys[:3], shapes, strict=True)
  )
  return (queries, ks, vs), jax.random.normal(keys[3], (B, length, J * Q * E))


def mask_of(length, window=None, num_sinks=0, num_segments=0):
  index = jnp.broadcast_to(jnp.arange(length)[None], (B, length))
  segments = index * num_segments // length if num_segments else None
  return attention.causal_mask(index, window, num_sinks, segments)


def value_and_gradient(attend, arrays, cotangent, mask, cap):
  def total(*arrays):
    return jnp.sum(attend(*arrays, mask, cap=cap) * cotangent)

  mixed = attend(*arrays, mask, cap=cap)
  return mixed, *jax.jit(jax.grad(total, (0, 1, 2)))(*arrays)


@pytest.mark.parametrize("length", [1, 7, 10, 33])
@pytest.mark.parametrize("name", CASES)
def test_blocks_are_the_whole(monkeypatch, name, length):
  monkeypatch.setattr(attention, "_BLOCK", 4)
  case = dict(CASES[name])
  cap = case.pop("cap", None)
  arrays, cotangent = random_arrays(length)
  mask = mask_of(length, **case)
  expected, found = (
    value_and_gradient(attend, arrays, cotangent, mask, cap)
    for attend in (attention.full_attention, attention.block_attention)
  )
  for x, y in zip(expected, found, strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


def test_what_is_later_is_not_multiplied(monkeypatch):
  """Of 4 blocks 10 / 16 of the scores are left."""
  monkeypatch.setattr(attention, "_BLOCK", 4)
  (queries, keys, values), _ = random_arrays(16)
  text = str(
    jax.make_jaxpr(attention.block_attention)(
      queries, keys, values, mask_of(16)
    )
  )
  for end in (4, 8, 12, 16):
    assert f"f32[{B},{J},{4 * Q},{end}] = dot_general" in text
  assert f"f32[{B},{J},{16 * Q},16]" not in text


def test_a_gpu_takes_flash_attention_where_it_can(monkeypatch):
  """The arguments, with XLA in cuDNN's place, which is not here."""
  plain, taken = jax.nn.dot_product_attention, []

  def without_cudnn(*arrays, implementation, **options):
    taken.append(implementation)
    return plain(*arrays, **options)

  monkeypatch.setattr(jax.nn, "dot_product_attention", without_cudnn)
  arrays, _ = random_arrays(9)
  arrays = [x.astype(jnp.bfloat16) for x in arrays]
  attend = functools.partial(attention.causal_attention, *arrays, mask_of(9))
  on_cpu = attend(is_plain=True)
  assert not taken
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  with jax.numpy_rank_promotion("allow"):
    found = attend(is_plain=True)
  assert taken == ["cudnn"] and found.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    found.astype(jnp.float32), on_cpu.astype(jnp.float32), atol=0.03
  )
  attend(is_plain=False)
  attend(is_plain=True, cap=1.0)
  assert taken == ["cudnn"]
