"""Returns and advantages against their sums written out.

The oracles know no masks: they see the valid positions as a list, look forward
from each, and the results are put back where they belong.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.learning import returns

DISCOUNT, LAMBDA = 0.9, 0.7
MAX_RHO, MAX_C = 1.2, 0.8

# Holes, a late start, an early end, one position, everything, nothing.
MASK = np.array(
  [
    [1, 0, 1, 1, 0, 1],
    [0, 0, 1, 1, 1, 1],
    [1, 1, 1, 0, 0, 0],
    [0, 0, 0, 1, 0, 0],
    [1, 1, 1, 1, 1, 1],
    [0, 0, 0, 0, 0, 0],
  ],
  bool,
)

pytestmark = pytest.mark.usefixtures("quick_programs")


@jax.jit
@jax.vmap
def all_returns(rewards, values, weights, mask, discount, lambda_, after):
  """Every function of the module on each row, by name."""
  plain = {"discount": discount, "bootstrap_value": after}
  mixed = plain | {"lambda_": lambda_}
  advantages, targets = returns.generalized_advantages(
    rewards, values, mask, **mixed
  )
  v_advantages, v_targets = returns.vtrace(
    rewards, values, weights, mask, **mixed, max_rho=MAX_RHO, max_c=MAX_C
  )
  return {
    "discounted_returns": returns.discounted_returns(rewards, mask, **plain),
    "advantages": advantages,
    "returns": targets,
    "lambda_returns": returns.lambda_returns(rewards, values, mask, **mixed),
    "vtrace_advantages": v_advantages,
    "vtrace_targets": v_targets,
  }


def run(case, discount=DISCOUNT, lambda_=LAMBDA):
  rewards, values, weights, mask, after = case
  rows = np.ones(len(mask), np.float32)
  arrays = [np.float32(x) for x in (rewards, values, weights)]
  found = all_returns(
    *arrays, mask, discount * rows, lambda_ * rows, np.float32(after)
  )
  return jax.tree.map(np.asarray, found)


def make_case():
  """Rewards, values and weights, NaN where the mask is 0."""
  rng = np.random.default_rng(3)
  rewards, values = rng.normal(size=(2, *MASK.shape))
  weights = rng.exponential(size=MASK.shape)
  arrays = [np.where(MASK, x, np.nan) for x in (rewards, values, weights)]
  return *arrays, MASK, rng.normal(size=len(MASK))


def sums_written_out(rewards, values, weights, after):
  """The oracle: what each name means for a list without holes."""
  length = len(rewards)
  following = [*values[1:], after]
  found = {name: [] for name in NAMES}
  rho = [min(MAX_RHO, w) for w in weights]
  c = [LAMBDA * min(MAX_C, w) for w in weights]
  delta = [
    rewards[t] + DISCOUNT * following[t] - values[t] for t in range(length)
  ]

  def n_step(t, n):
    total = sum(DISCOUNT**k * rewards[t + k] for k in range(n))
    return total + DISCOUNT**n * following[t + n - 1]

  def corrected(t):
    if t == length:
      return after
    total = values[t]
    for s in range(t, length):
      passed = np.prod([c[i] for i in range(t, s)])
      total += DISCOUNT ** (s - t) * passed * rho[s] * delta[s]
    return total

  for t in range(length):
    left = length - t
    advantage = sum(
      (DISCOUNT * LAMBDA) ** k * delta[t + k] for k in range(left)
    )
    mixture = LAMBDA ** (left - 1) * n_step(t, left)
    for n in range(1, left):
      mixture += (1 - LAMBDA) * LAMBDA ** (n - 1) * n_step(t, n)
    found["discounted_returns"].append(n_step(t, left))
    found["advantages"].append(advantage)
    found["returns"].append(advantage + values[t])
    found["lambda_returns"].append(mixture)
    found["vtrace_targets"].append(corrected(t))
    found["vtrace_advantages"].append(
      rho[t] * (rewards[t] + DISCOUNT * corrected(t + 1) - values[t])
    )
  return found


NAMES = (
  "discounted_returns",
  "advantages",
  "returns",
  "lambda_returns",
  "vtrace_advantages",
  "vtrace_targets",
)


@pytest.mark.parametrize("name", NAMES)
def test_each_is_its_sum_written_out(name):
  rewards, values, weights, mask, after = case = make_case()
  found = run(case)[name]
  for row in range(len(mask)):
    valid = mask[row]
    expected = np.zeros(mask.shape[1])
    expected[valid] = sums_written_out(
      rewards[row][valid], values[row][valid], weights[row][valid], after[row]
    )[name]
    np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-6)


def following_values(values, mask, after):
  """Value of the next valid position of each, `after` behind the last."""
  found = np.zeros(mask.shape)
  for row in range(len(mask)):
    value = after[row]
    for t in reversed(range(mask.shape[1])):
      found[row, t] = value
      value = values[row, t] if mask[row, t] else value
  return found


def test_lambda_0_is_the_error_of_one_step():
  rewards, values, _, mask, after = case = make_case()
  following = following_values(values, mask, after)
  target = rewards + DISCOUNT * following
  found = run(case, lambda_=0.0)
  for name, expected in [
    ("advantages", target - values),
    ("returns", target),
    ("lambda_returns", target),
  ]:
    expected = np.where(mask, expected, 0)
    np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)


def test_lambda_1_is_the_return_minus_the_value():
  _, values, _, mask, _ = case = make_case()
  found = run(case, lambda_=1.0)
  totals = found["discounted_returns"]
  for name, expected in [
    ("advantages", np.where(mask, totals - values, 0)),
    ("returns", totals),
    ("lambda_returns", totals),
  ]:
    np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
def test_vtrace_of_the_policys_own_data_is_the_lambda_return(lambda_):
  """At lambda 1 that is the return to the end; weights of 1 pass max_c."""
  rewards, values, _, mask, after = make_case()
  ones = np.ones(mask.shape, np.float32)
  found = jax.jit(
    jax.vmap(
      lambda r, v, w, m, b: returns.vtrace(
        r, v, w, m, discount=DISCOUNT, lambda_=lambda_, bootstrap_value=b
      )
    )
  )(*map(np.float32, (rewards, values, ones)), mask, np.float32(after))
  expected = run((rewards, values, ones, mask, after), lambda_=lambda_)
  advantages, targets = map(np.asarray, found)
  np.testing.assert_allclose(
    targets, expected["lambda_returns"], rtol=1e-5, atol=1e-6
  )
  if lambda_ == 1:
    np.testing.assert_allclose(
      advantages, expected["advantages"], rtol=1e-5, atol=1e-6
    )


def test_vtrace_learns_nothing_from_what_the_policy_never_does():
  rewards, values, weights, mask, after = make_case()
  found = run((rewards, values, 0 * weights, mask, after))
  np.testing.assert_array_equal(found["vtrace_advantages"], 0 * mask)
  np.testing.assert_allclose(
    found["vtrace_targets"], np.where(mask, values, 0), rtol=1e-6
  )


def test_a_truncated_solution_continues_with_its_bootstrap_value():
  """Cut in two, with the rest's worth as bootstrap, nothing changes."""
  rewards, values, weights, _, after = make_case()
  rewards, values, weights = (
    np.nan_to_num(x[:1]) for x in (rewards, values, weights)
  )
  whole, head = np.ones((2, 1, 6), bool)
  head = head & (np.arange(6) < 3)
  full = run((rewards, values, weights, whole, after[:1]))
  cut = (rewards, values, weights, head)
  rest = full["discounted_returns"][:, 3]
  np.testing.assert_allclose(
    run((*cut, rest))["discounted_returns"],
    np.where(head, full["discounted_returns"], 0),
    rtol=1e-5,
  )
  full = run((rewards, values, weights, whole, after[:1]), lambda_=0.0)
  np.testing.assert_allclose(
    run((*cut, values[:, 3]), lambda_=0.0)["advantages"],
    np.where(head, full["advantages"], 0),
    rtol=1e-5,
  )


def test_a_solution_that_ended_is_followed_by_nothing():
  """The bootstrap value is 0 unless given."""
  ones = jnp.ones(3)
  args = {"discount": 0.5}
  np.testing.assert_allclose(
    returns.discounted_returns(ones, ones, **args), [1.75, 1.5, 1.0]
  )
  for found in (
    returns.generalized_advantages(ones, ones, ones, **args, lambda_=1.0)[1],
    returns.lambda_returns(ones, ones, ones, **args, lambda_=1.0),
    returns.vtrace(ones, ones, ones, ones, **args)[1],
  ):
    np.testing.assert_allclose(found, [1.75, 1.5, 1.0])


def test_no_gradient_reaches_masked_positions_or_comes_from_them():
  rewards, values, weights, mask, after = make_case()
  rows = np.ones(len(mask), np.float32)

  def total(arrays):
    found = all_returns(
      *arrays, mask, DISCOUNT * rows, LAMBDA * rows, np.float32(after)
    )
    return sum(jnp.sum(x) for x in found.values())

  arrays = tuple(map(np.float32, (rewards, values, weights)))
  for gradient in jax.jit(jax.grad(total))(arrays):
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[~mask], 0)
    assert np.abs(gradient[mask]).max() > 0.1


def test_narrow_rewards_are_summed_in_float32():
  rewards = jnp.ones(1000, jnp.bfloat16)
  found = returns.discounted_returns(rewards, jnp.ones(1000, bool))
  assert found.dtype == jnp.float32 and float(found[0]) == 1000


def test_arrays_of_different_shape_are_refused():
  three, four = jnp.ones(3), jnp.ones(4)
  with pytest.raises(AssertionError):
    returns.discounted_returns(three, four)
  with pytest.raises(AssertionError):
    returns.generalized_advantages(three, three, four)
  with pytest.raises(AssertionError):
    returns.lambda_returns(three, four, three)
  with pytest.raises(AssertionError):
    returns.vtrace(three, three, jnp.ones((3, 1)), three)
  with pytest.raises(AssertionError):
    returns.discounted_returns(three, three, bootstrap_value=three)
