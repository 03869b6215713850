"""Products with weights against einsum: values, gradients and their dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.policy.products import project, project_to_float32


def draw(seed, *shape, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@pytest.mark.parametrize("product", [project, project_to_float32])
@pytest.mark.parametrize(
  ("is_turned", "shape", "spec"),
  [
    (False, (5, 7), "abi,io->abo"),
    (False, (5, 2, 3), "abi,iop->abop"),
    (True, (7, 5), "abi,oi->abo"),
  ],
)
def test_values_and_gradients_are_those_of_einsum(
  product, is_turned, shape, spec
):
  x, kernel = draw(0, 2, 3, 5), draw(1, *shape)
  expected, pull = jax.vjp(lambda x, k: jnp.einsum(spec, x, k), x, kernel)
  found, own_pull = jax.vjp(lambda x, k: product(x, k, is_turned), x, kernel)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  cotangent = draw(2, *expected.shape)
  for a, b in zip(own_pull(cotangent), pull(cotangent), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_of_bfloat16_products_are_summed_in_float32():
  """4,096 tokens of 1: a sum kept in bfloat16 stops at 256."""
  x = jnp.ones((4096, 2), jnp.bfloat16)
  kernel = jnp.full((2, 3), 1 / 3)
  y, pull = jax.vjp(lambda x, k: project(x, k, False), x, kernel)
  assert y.dtype == jnp.bfloat16
  dx, dw = pull(jnp.full(y.shape, 1.001, jnp.bfloat16))
  assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
  np.testing.assert_array_equal(dw, np.full((2, 3), 4096.0))
  # Rounded to bfloat16 and back this sum would not be odd.
  _, pull = jax.vjp(lambda x, k: project(x, k, False), x[:1023], kernel)
  _, dw = pull(jnp.ones((1023, 3), jnp.bfloat16))
  np.testing.assert_array_equal(dw, np.full((2, 3), 1023.0))
