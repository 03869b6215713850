"""Keys of an expansion."""

import jax
import jax.numpy as jnp

from o1jax.search.expansion import fold_in_all


def test_folding_in_turn_is_splitting_in_turn():
  found = fold_in_all(jax.random.key(5), jnp.array([1, 3], jnp.uint32))
  first = jax.random.split(jax.random.key(5))[1]
  expected = jax.random.split(first, 5)[3]
  assert jnp.array_equal(
    jax.random.key_data(found), jax.random.key_data(expected)
  )
