"""Products with weights, with gradients in the order that suits the CPU.

JAX's own gradient of a weight is the product of the outputs' gradient with the
inputs, turned over: XLA:CPU copies one side first and then takes its slower
kernel. Here inputs come first, nothing is turned over, and the sum over tokens
is kept in float32 whatever the activations are.
"""

import functools
import math

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x: jax.Array, kernel: jax.Array, is_turned: bool) -> jax.Array:
  """`x @ kernel` over the last axis of x.

  Args:
    x: `[..., in]`.
    kernel: float32 `[in, *features]`, or `[out, in]` where `is_turned`; it is
      read in the dtype of x.
    is_turned: static.

  Returns:
    `[..., *features]` in the dtype of x.
  """
  return _forward(x, kernel, is_turned, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project_to_float32(
  x: jax.Array, kernel: jax.Array, is_turned: bool
) -> jax.Array:
  """As `project`, but the result is float32, as it was summed."""
  return _forward(x, kernel, is_turned, jnp.float32)


def _forward(x, kernel, is_turned, dtype):
  axis = 1 if is_turned else 0
  y = jax.lax.dot_general(
    _flat(x),
    kernel.astype(x.dtype),
    (((1,), (axis,)), ((), ())),
    preferred_element_type=dtype,
  )
  return y.reshape(*x.shape[:-1], *y.shape[1:])


def _save(x, kernel, is_turned, *, dtype=None):
  return _forward(x, kernel, is_turned, dtype or x.dtype), (x, kernel)


def _gradients(is_turned, saved, gradient):
  x, kernel = saved
  rows = _flat(x)
  gradient = gradient.reshape(rows.shape[0], -1).astype(x.dtype)
  weights = kernel.astype(x.dtype)
  if not is_turned:
    weights = weights.reshape(weights.shape[0], -1)
  wide = 0 if is_turned else 1
  dx = jax.lax.dot_general(gradient, weights, (((1,), (wide,)), ((), ())))
  pair = (gradient, rows) if is_turned else (rows, gradient)
  dw = jax.lax.dot_general(
    *pair, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
  )
  return dx.reshape(x.shape), dw.reshape(kernel.shape).astype(kernel.dtype)


def _flat(x):
  return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


project.defvjp(_save, _gradients)
project_to_float32.defvjp(
  functools.partial(_save, dtype=jnp.float32), _gradients
)
