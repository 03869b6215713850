"""The AlphaGo Zero loss against finite differences and against its equation.

The model is a table: logits and value logit of a token depend on the token
alone, so that the whole of it fits in two small arrays.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from o1jax.learning import alphazero

VOCAB = 4


def table_log_probs(params, tokens):
  log_probs = jax.nn.log_softmax(params["logits"][tokens])
  following = jnp.roll(tokens, -1, axis=1)
  log_probs = jnp.take_along_axis(log_probs, following[:, :, None], axis=2)
  return log_probs[:, :, 0], params["value"][tokens]


def make_case():
  rng = np.random.default_rng(1)
  is_learned = rng.uniform(size=(2, 6)) < 0.6
  is_known = rng.uniform(size=(2, 6)) < 0.5
  params = {
    "logits": rng.normal(size=(VOCAB, VOCAB)),
    "value": rng.normal(size=VOCAB),
  }
  batch = {
    "tokens": rng.integers(VOCAB, size=(2, 6)),
    "policy_weights": rng.uniform(size=(2, 6)) * is_learned,
    "value_targets": rng.uniform(size=(2, 6)),
    "value_weights": 1.0 * is_known,
  }
  return params, batch


def table_sums(params, batch):
  log_probs, value_logits = table_log_probs(params, batch["tokens"])
  return alphazero.alphazero_loss(
    log_probs,
    batch["policy_weights"],
    value_logits,
    batch["value_targets"],
    batch["value_weights"],
  )


def mean_loss(sums, value_coefficient):
  """Of what the update adds up: means over the weights, 0 over none."""
  policy = sums.policy_sum / jnp.where(
    sums.policy_weight == 0, 1, sums.policy_weight
  )
  value = sums.value_sum / jnp.where(
    sums.value_weight == 0, 1, sums.value_weight
  )
  return policy + value_coefficient * value


def total(params, batch):
  return mean_loss(table_sums(params, batch), 0.7)


def test_gradient_equals_finite_differences_in_float64():
  params, batch = make_case()
  with jax.enable_x64(True):
    params = jax.tree.map(jnp.asarray, params)
    batch = jax.tree.map(jnp.asarray, batch)
    assert params["logits"].dtype == jnp.float64
    loss_fn = jax.jit(total)
    gradient = jax.jit(jax.grad(total))(params, batch)
    for name in params:
      for index in itertools.product(*map(range, params[name].shape)):
        sides = []
        for change in (1e-5, -1e-5):
          moved = params | {name: params[name].at[index].add(change)}
          sides.append(float(loss_fn(moved, batch)))
        slope = (sides[0] - sides[1]) / 2e-5
        assert abs(slope - float(gradient[name][index])) < 1e-9
    assert all(float(jnp.abs(leaf).max()) > 0.01 for leaf in gradient.values())


def test_loss_is_the_equation_written_out():
  """Cross entropy to the visits a step, and to the outcome at its end."""
  params, batch = make_case()
  policy, value = 0.0, 0.0
  for row, position in itertools.product(range(2), range(6)):
    token = batch["tokens"][row, position]
    following = batch["tokens"][row, (position + 1) % 6]
    logits = params["logits"][token]
    log_prob = logits[following] - math.log(sum(map(math.exp, logits)))
    policy -= batch["policy_weights"][row, position] * log_prob
    v = 1 / (1 + math.exp(-params["value"][token]))
    z = batch["value_targets"][row, position]
    error = -z * math.log(v) - (1 - z) * math.log(1 - v)
    value += batch["value_weights"][row, position] * error
  sums = table_sums(params, batch)
  np.testing.assert_allclose(sums.policy_sum, policy, rtol=1e-5)
  np.testing.assert_allclose(sums.value_sum, value, rtol=1e-5)
  policy_mean = policy / batch["policy_weights"].sum()
  value_mean = value / batch["value_weights"].sum()
  np.testing.assert_allclose(
    mean_loss(sums, 0.7), policy_mean + 0.7 * value_mean, rtol=1e-5
  )


def test_least_policy_loss_is_the_visit_distribution():
  """The policy that minimises the loss at a node is the search's."""
  visit_probs = np.array([0.5, 0.2, 0.3, 0.0])
  weights = jnp.asarray(visit_probs, jnp.float32)[:, None]

  def loss(logits):
    log_probs = jax.nn.log_softmax(logits)[:, None]
    nothing = jnp.zeros((4, 1))
    sums = alphazero.alphazero_loss(
      log_probs, weights, nothing, nothing, nothing
    )
    return mean_loss(sums, 1.0)

  gradient = jax.jit(jax.grad(loss))
  logits = jnp.array([0.3, -0.2, 0.1, 0.5])
  for _ in range(300):
    logits = logits - 2.0 * gradient(logits)
  np.testing.assert_allclose(jax.nn.softmax(logits), visit_probs, atol=5e-3)


def test_value_at_masked_positions_is_never_read():
  weights = jnp.array([[1.0, 0.0, 0.0]])
  targets = jnp.array([[1.0, jnp.nan, 0.5]])
  ones = jnp.ones((1, 3))

  def loss(logits):
    sums = alphazero.alphazero_loss(ones, ones, logits, targets, weights)
    return sums.value_sum

  logits = jnp.array([[0.0, 1.0, jnp.nan]])
  value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
  np.testing.assert_allclose(value, math.log(2), rtol=1e-6)
  np.testing.assert_allclose(gradient, [[-0.5, 0.0, 0.0]], rtol=1e-6)


def test_an_empty_batch_loses_nothing():
  params, batch = make_case()
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  batch = batch | {
    "policy_weights": np.zeros((2, 6), np.float32),
    "value_weights": np.zeros((2, 6), np.float32),
    "value_targets": np.full((2, 6), np.nan, np.float32),
  }
  loss, gradient = jax.jit(jax.value_and_grad(total))(params, batch)
  assert float(loss) == 0.0
  for leaf in jax.tree.leaves(gradient):
    np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_value_loss_is_finite_and_exact_for_extreme_logits():
  logits = jnp.array([[200.0, -200.0, 200.0]])
  targets = jnp.array([[1.0, 0.0, 0.0]])
  ones = jnp.ones((1, 3))
  sums = alphazero.alphazero_loss(ones, ones, logits, targets, ones)
  np.testing.assert_allclose(sums.value_sum, 200.0)
