"""int8 by blocks: the stated bound, and what does not count."""

import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.policy.quantize import dequantize, quantize

X = np.random.default_rng(0).normal(0, 3, (2, 3, 8, 5)).astype(np.float32)


def oracle(x, block):
  """Numbers restored and half a scale, one block at a time, in float64."""
  restored, bound = np.zeros(x.shape), np.zeros(x.shape)
  for b, j in np.ndindex(x.shape[:2]):
    for start in range(0, x.shape[2], block):
      part = x[b, j, start : start + block].astype(np.float64)
      scale = np.abs(part).max() / 127
      restored[b, j, start : start + block] = np.rint(part / scale) * scale
      bound[b, j, start : start + block] = scale / 2
  return restored, bound


@pytest.mark.parametrize("block", [1, 4, 8])
def test_no_number_is_off_by_more_than_half_a_scale(block):
  found = quantize(jnp.asarray(X), block)
  assert found.values.dtype == jnp.int8 and found.shape == X.shape
  assert found.scales.shape == (2, 3, 8 // block)
  restored, bound = oracle(X, block)
  error = np.abs(np.asarray(dequantize(found)) - X)
  assert (error <= bound * (1 + 1e-5)).all()
  assert error.max() > 0.8 * bound.max()  # no finer than it says
  np.testing.assert_allclose(dequantize(found), restored, atol=1e-5)


def test_bfloat16_comes_back_as_bfloat16():
  found = dequantize(quantize(jnp.asarray(X, jnp.bfloat16), 4))
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(found.astype(jnp.float32), X, atol=0.15)


def test_waste_and_nothing_leave_the_scale_alone():
  mask = np.ones((2, 1, 8), bool)
  mask[:, :, 6:] = False
  waste = np.where(mask[..., None], X, 1e4).astype(np.float32)
  clean = np.where(mask[..., None], X, 0).astype(np.float32)
  a, b = quantize(waste, 8, mask), quantize(clean, 8)
  np.testing.assert_array_equal(a.values, b.values)
  np.testing.assert_array_equal(a.scales, b.scales)
  zeros = dequantize(quantize(jnp.zeros((1, 4, 2)), 2))
  np.testing.assert_array_equal(zeros, np.zeros((1, 4, 2)))


def test_a_block_that_does_not_fit_is_refused():
  with pytest.raises(ValueError, match="8 slots are not a multiple of block=3"):
    quantize(X, 3)
