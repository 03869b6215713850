"""Slopes by central differences, to hold gradients against."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def assert_gradient_is_the_slope(
  loss: Callable[[jax.Array], jax.Array], x: np.ndarray, *, size: float = 1e-5
) -> None:
  """Compares `jax.grad(loss)` with finite differences, both in float64.

  `loss` is built of NumPy float64 constants; all entries of `x` are moved, and
  a gradient that is 0 everywhere fails.
  """
  with jax.enable_x64(True):
    x = jnp.asarray(x)
    assert x.dtype == jnp.float64
    moves = size * jnp.eye(x.size).reshape(x.size, *x.shape)

    def both(x):
      above = jax.vmap(lambda move: loss(x + move))(moves)
      below = jax.vmap(lambda move: loss(x - move))(moves)
      return (above - below) / (2 * size), jax.grad(loss)(x)

    slopes, gradient = jax.jit(both)(x)
    assert gradient.dtype == jnp.float64
    assert float(jnp.abs(gradient).max()) > 1e-3
    np.testing.assert_allclose(gradient.ravel(), slopes, atol=1e-8)


def slopes_of(
  loss: Callable[[np.ndarray], float], x: np.ndarray, *, size: float = 1e-5
) -> np.ndarray:
  """Slopes of a loss in NumPy at the vector `x`, one entry after the other."""
  slopes = np.zeros(len(x))
  for i in range(len(x)):
    move = np.zeros(len(x))
    move[i] = size
    slopes[i] = (loss(x + move) - loss(x - move)) / (2 * size)
  return slopes
