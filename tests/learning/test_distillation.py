"""Distillation of best-of-N on worlds whose draws can all be enumerated.

The policy is a table of logits over six answers, some of equal reward; the
expectations of the losses are taken exactly, with probabilities as weights.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from differences import assert_gradient_is_the_slope
from o1jax.learning import distillation

REFERENCE = np.array([0.3, 0.1, 0.25, 0.05, 0.2, 0.1])
REWARDS = np.array([0.0, 1.0, 0.5, 2.0, 0.5, 1.0])
NUM_DRAWS = 4


def brute_force(probs, rewards, num_draws):
  """Best of all tuples of draws; tied draws are chosen alike."""
  found = np.zeros(len(probs))
  for draws in itertools.product(range(len(probs)), repeat=num_draws):
    best = max(rewards[i] for i in draws)
    winners = [i for i in draws if rewards[i] == best]
    for i in winners:
      found[i] += np.prod(probs[list(draws)]) / len(winners)
  return found


BEST = brute_force(REFERENCE, REWARDS, NUM_DRAWS)


def quantiles():
  """Exact F and F_< of each answer."""
  at_most = [REFERENCE[r >= REWARDS].sum() for r in REWARDS]
  below = [REFERENCE[r > REWARDS].sum() for r in REWARDS]
  return np.array(at_most), np.array(below)


def as_array(values):
  return jnp.asarray(values, jnp.float32)


@pytest.mark.parametrize("num_draws", [1, 2, 4])
def test_best_of_n_is_what_all_tuples_of_draws_give(num_draws):
  found = distillation.best_of_n_probs(
    as_array(REFERENCE), as_array(REWARDS), num_draws=num_draws
  )
  expected = brute_force(REFERENCE, REWARDS, num_draws)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  if num_draws == 1:
    np.testing.assert_allclose(found, REFERENCE, rtol=1e-6)


def test_best_of_n_at_the_ends():
  """All tied: the reference itself; rare best answers keep their digits."""
  tied = distillation.best_of_n_probs(
    as_array(REFERENCE), jnp.zeros(6), num_draws=64
  )
  np.testing.assert_allclose(tied, REFERENCE, rtol=1e-4)
  probs = np.array([1.0 - 2.0**-30, 2.0**-30, 0.0])
  rare = distillation.best_of_n_probs(
    as_array(probs), jnp.array([0.0, 1.0, 2.0]), num_draws=8
  )
  np.testing.assert_allclose(rare, [1.0, 8 * 2.0**-30, 0.0], rtol=1e-5)


def bond_of(logits, jeffreys_weight, is_exact):
  """The loss with every expectation taken over all answers."""
  log_probs = jax.nn.log_softmax(logits)
  probs = jax.lax.stop_gradient(jnp.exp(log_probs))
  at_most, below = quantiles()
  rewards = distillation.vbon_rewards(
    as_array(np.log(at_most)),
    log_probs,
    as_array(np.log(REFERENCE)),
    jnp.ones(6),
    num_draws=NUM_DRAWS,
    strict_shares=as_array(below / at_most) if is_exact else None,
  )
  sums = distillation.bond_loss(
    log_probs,
    as_array(BEST),
    log_probs,
    rewards,
    probs,
    jeffreys_weight=jeffreys_weight,
  )
  return (
    sums.forward_sum / sums.forward_weight
    + sums.backward_sum / sums.backward_weight
  )


def descend(jeffreys_weight, is_exact):
  gradient = jax.grad(bond_of)

  def move(logits, _):
    return logits - 2 * gradient(logits, jeffreys_weight, is_exact), None

  run = jax.jit(lambda x: jax.lax.scan(move, x, None, 1000)[0])
  return jax.nn.softmax(run(jnp.zeros(6)))


@pytest.mark.parametrize("jeffreys_weight", [0.0, 0.5, 1.0])
def test_bond_reaches_the_enumerated_best_of_n(jeffreys_weight):
  found = descend(jeffreys_weight, is_exact=True)
  np.testing.assert_allclose(found, BEST, atol=1e-4)
  assert np.abs(BEST - REFERENCE).max() > 0.15


def vbon_optimum():
  tilted = REFERENCE * quantiles()[0] ** (NUM_DRAWS - 1)
  return tilted / tilted.sum()


def vbon_objective(probs):
  """E[(N - 1) log F] - KL(p || reference), as the paper writes it."""
  value = (NUM_DRAWS - 1) * np.log(quantiles()[0])
  return (probs * value - probs * np.log(probs / REFERENCE)).sum(axis=-1)


def test_vbon_reaches_the_greatest_of_its_objective():
  found = descend(jeffreys_weight=0.0, is_exact=False)
  np.testing.assert_allclose(found, vbon_optimum(), atol=1e-4)
  # No other policy does better: on a grid of all policies, and close by.
  grid = np.array(list(itertools.product(range(1, 7), repeat=6)), float)
  grid /= grid.sum(axis=1, keepdims=True)
  rng = np.random.default_rng(0)
  near = vbon_optimum() * np.exp(0.01 * rng.normal(size=(1000, 6)))
  near /= near.sum(axis=1, keepdims=True)
  greatest = vbon_objective(vbon_optimum())
  assert greatest > vbon_objective(grid).max()
  assert greatest > vbon_objective(near).max()
  # The bound is not best-of-N where answers have mass of their own.
  assert np.abs(vbon_optimum() - BEST).max() > 0.02


def test_mean_of_vbon_rewards_is_the_objective():
  probs = np.array([0.1, 0.1, 0.2, 0.3, 0.1, 0.2])
  rewards = distillation.vbon_rewards(
    as_array(np.log(quantiles()[0])),
    as_array(np.log(probs)),
    as_array(np.log(REFERENCE)),
    jnp.ones(6),
    num_draws=NUM_DRAWS,
  )
  found = float((as_array(probs) * rewards).sum())
  np.testing.assert_allclose(found, vbon_objective(probs), rtol=1e-5)


def test_backward_gradient_is_that_of_the_divergence():
  """At a policy that is no optimum, against KL(p || best) itself."""
  logits = as_array([0.2, -0.5, 1.0, 0.3, 0.0, -1.0])

  def divergence(logits):
    log_probs = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_probs) * (log_probs - as_array(np.log(BEST))))

  expected = jax.grad(divergence)(logits)
  found = jax.grad(bond_of)(logits, 0.0, True)
  np.testing.assert_allclose(found, expected, atol=1e-6)
  assert float(jnp.abs(expected).max()) > 0.1


def test_quantiles_are_counts_with_the_draw_itself_among_them():
  rewards = jnp.array([0.5, -3.0, 9.0, 0.5, jnp.nan])
  reference_rewards = jnp.array(
    [
      [0.0, 0.5, 1.0, jnp.nan],
      [0.0, 0.5, 1.0, 0.5],
      [0.0, 0.5, 1.0, 0.5],
      [jnp.nan, jnp.nan, jnp.inf, 0.0],
      [0.0, 0.5, 1.0, 0.5],
    ]
  )
  mask = jnp.array(
    [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]
  )
  found = distillation.log_quantiles(rewards, reference_rewards, mask)
  expected = np.log([3 / 4, 1 / 5, 5 / 5, 1 / 1, 1 / 5])
  np.testing.assert_allclose(found, expected, atol=1e-6)
  shares = distillation.strict_shares(rewards, reference_rewards, mask)
  expected = [1 / 3, 0 / 1, 4 / 5, 0 / 1, 0 / 1]
  np.testing.assert_allclose(shares, expected, atol=1e-6)


def test_quantiles_tend_to_those_of_the_reference():
  """Rewards in the proportions of the reference, forty of each twentieth."""
  copies = np.repeat(REWARDS, np.rint(REFERENCE * 800).astype(int))
  rows = as_array(np.broadcast_to(copies, (6, 800)))
  arguments = as_array(REWARDS), rows, jnp.ones((6, 800))
  at_most, below = quantiles()
  found = distillation.log_quantiles(*arguments)
  np.testing.assert_allclose(found, np.log(at_most), atol=3e-3)
  found = distillation.strict_shares(*arguments)
  np.testing.assert_allclose(found, below / at_most, atol=5e-3)


def make_rows(dtype=np.float32):
  rng = np.random.default_rng(0)
  rows = {
    "best_log_probs": -rng.exponential(size=4),
    "best_weights": np.array([1.0, 0.0, 2.0, 1.0]),
    "log_probs": -rng.exponential(size=6),
    "advantages": rng.normal(size=6),
    "weights": np.array([1.0, 0.5, 0.0, 1.0, 0.0, 2.0]),
  }
  return {name: value.astype(dtype) for name, value in rows.items()}


FLOATS = ("best_log_probs", "log_probs", "advantages")


@jax.jit
def sums_and_gradient(rows):
  def loss(learned):
    sums = distillation.bond_loss(**rows | learned, jeffreys_weight=0.3)
    return sums.forward_sum + sums.backward_sum, sums

  learned = {name: rows[name] for name in FLOATS}
  gradient, sums = jax.grad(loss, has_aux=True)(learned)
  return sums, gradient


def test_bond_sums_are_loops_over_the_weighted_rows():
  rows = make_rows()
  sums, gradient = sums_and_gradient(rows)
  forward = sum(
    -w * x
    for w, x in zip(rows["best_weights"], rows["best_log_probs"], strict=True)
  )
  backward = sum(
    -w * a * x
    for w, a, x in zip(
      rows["weights"], rows["advantages"], rows["log_probs"], strict=True
    )
  )
  np.testing.assert_allclose(sums.forward_sum, 0.3 * forward, rtol=1e-5)
  np.testing.assert_allclose(sums.backward_sum, 0.7 * backward, rtol=1e-5)
  assert (float(sums.forward_weight), float(sums.backward_weight)) == (4, 4.5)
  np.testing.assert_allclose(
    gradient["log_probs"], -0.7 * rows["weights"] * rows["advantages"]
  )
  np.testing.assert_array_equal(gradient["advantages"], np.zeros(6))


def test_gradient_equals_finite_differences_in_float64():
  rows = make_rows(np.float64)

  def loss(log_probs):
    arrays = {name: jnp.asarray(value) for name, value in rows.items()}
    arrays |= {"best_log_probs": log_probs[:4], "log_probs": log_probs[4:]}
    sums = distillation.bond_loss(**arrays, jeffreys_weight=0.3)
    return sums.forward_sum / sums.forward_weight + (
      sums.backward_sum / sums.backward_weight
    )

  assert_gradient_is_the_slope(
    loss, np.concatenate([rows["best_log_probs"], rows["log_probs"]])
  )


def test_rows_of_weight_zero_are_never_read():
  rows = make_rows()
  expected = sums_and_gradient(rows)
  dirty = dict(rows)
  for name in FLOATS:
    weights = rows["best_weights" if "best" in name else "weights"]
    dirty[name] = np.where(weights == 0, np.float32(np.nan), rows[name])
  found = sums_and_gradient(dirty)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  dirty |= {name: 0 * rows[name] for name in ("best_weights", "weights")}
  for leaf in jax.tree.leaves(sums_and_gradient(dirty)):
    np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_the_order_of_rows_does_not_matter():
  rows = make_rows()
  orders = {4: np.array([2, 0, 3, 1]), 6: np.array([3, 5, 0, 1, 4, 2])}
  moved_rows = {name: x[orders[len(x)]] for name, x in rows.items()}
  sums, gradient = sums_and_gradient(rows)
  moved_sums, moved = sums_and_gradient(moved_rows)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6), moved_sums, sums
  )
  for name, slopes in gradient.items():
    np.testing.assert_array_equal(moved[name], slopes[orders[len(slopes)]])


def test_vbon_rewards_of_rows_without_a_draw_are_zero():
  """And no gradient passes: rewards are numbers to the policy."""
  nan = jnp.nan
  mask = jnp.array([1, 0])

  def total(log_probs):
    rewards = distillation.vbon_rewards(
      jnp.array([-0.5, nan]),
      log_probs,
      jnp.array([-2.0, nan]),
      mask,
      num_draws=3,
      strict_shares=jnp.array([0.5, nan]),
    )
    return jnp.sum(rewards), rewards

  gradient, rewards = jax.grad(total, has_aux=True)(jnp.array([-1.0, nan]))
  np.testing.assert_allclose(rewards, [-1 - 1 + np.log(1.75), 0], rtol=1e-6)
  np.testing.assert_array_equal(gradient, [0, 0])


def test_options_without_a_meaning_are_refused():
  one = jnp.ones(1)
  with pytest.raises(ValueError, match="num_draws=0 is below 1"):
    distillation.best_of_n_probs(one, one, num_draws=0)
  with pytest.raises(ValueError, match="num_draws=0 is below 1"):
    distillation.vbon_rewards(one, one, one, one, num_draws=0)
  with pytest.raises(ValueError, match=r"jeffreys_weight=1.5 is not in \[0"):
    distillation.bond_loss(one, one, one, one, one, jeffreys_weight=1.5)
