"""The policy gradient against enumeration of a world of seven solutions.

A softmax policy writes tokens 0, 1 and 2; token 0 ends a solution, and so does
its second token. All solutions, and all groups of two or three of them, can be
listed with their probabilities, so that expectations are sums and "unbiased"
is an equality in float64.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.learning import baselines, policy_gradient, returns

VOCAB = 3
SOLUTIONS = np.array([[0, 0], *itertools.product((1, 2), range(VOCAB))])
MASK = np.array([[1, 0], *[[1, 1]] * 6], bool)
REWARDS = np.array([0.3, 0.0, 1.0, 0.2, 0.9, 0.0, 0.5])

pytestmark = pytest.mark.usefixtures("quick_programs")


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def make_params(seed=0):
  """Logits of the first token, and of the second by the first."""
  rng = np.random.default_rng(seed)
  return {
    "first": rng.normal(size=VOCAB),
    "second": rng.normal(size=(VOCAB, VOCAB)),
  }


@jax.jit
def log_probs_of(params):
  """`[7, 2]` log-probs of the tokens, NaN behind an end."""
  first = jax.nn.log_softmax(params["first"])[SOLUTIONS[:, 0]]
  second = jax.nn.log_softmax(params["second"])[tuple(SOLUTIONS.T)]
  log_probs = jnp.stack([first, second], axis=1)
  return jnp.where(MASK, log_probs, jnp.nan)


@jax.jit
def probs_of(params):
  """`[7]` probability of each solution."""
  return jnp.exp(jnp.sum(jnp.where(MASK, log_probs_of(params), 0), axis=1))


@jax.jit
@jax.grad
def exact_gradient(params):
  """Of the expected reward itself."""
  return jnp.sum(probs_of(params) * REWARDS)


@jax.jit
@jax.grad
def loss_gradient(params, rows, advantages, row_probs, weights):
  """Expected gradient: every row stands with its probability as mask."""
  mask = row_probs[:, None] * jnp.asarray(MASK)[rows]
  numerator, _ = policy_gradient.reinforce_loss(
    log_probs_of(params)[rows], advantages, mask, importance_weights=weights
  )
  return numerator


def expected_gradient(params, advantages, rows=None, row_probs=None, weights=1):
  """Ascent direction of `reinforce_loss` over all rows; by default all seven.

  Advantages and weights may be one number, one per row, or one per token.
  """
  rows = np.arange(7) if rows is None else rows
  row_probs = probs_of(params)[rows] if row_probs is None else row_probs

  def per_token(array):
    array = np.asarray(array, float)
    array = array[:, None] if array.ndim == 1 else array
    return np.where(MASK[rows], array, np.nan)

  gradient = loss_gradient(
    params, rows, per_token(advantages), row_probs, per_token(weights)
  )
  return jax.tree.map(lambda x: -np.asarray(x), gradient)


def distance(gradient, other):
  """Largest difference of two gradients."""
  return max(np.abs(gradient[name] - other[name]).max() for name in other)


@pytest.mark.parametrize("constant", [0.0, 0.6])
def test_expected_gradient_is_that_of_the_expected_reward(constant):
  """With a baseline that does not know the solution, whatever it is."""
  params = make_params()
  exact = exact_gradient(params)
  found = expected_gradient(params, REWARDS - constant)
  assert distance(found, exact) < 1e-14
  assert float(jnp.abs(exact["second"]).max()) > 0.01


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize("name", ["RLOO", "Dr. GRPO", "moving"])
def test_baseline_of_a_group_in_expectation_over_all_groups(name, group_size):
  """Leave-one-out is unbiased; the group's own mean shrinks by (G - 1) / G."""
  params = make_params()
  groups = np.array(list(itertools.product(range(7), repeat=group_size)))
  rewards = jnp.asarray(REWARDS[groups])
  mask = jnp.ones(groups.shape, bool)
  shrinking = 1.0
  if name == "RLOO":
    advantages = baselines.leave_one_out_advantages(rewards, mask)
  elif name == "Dr. GRPO":
    advantages = baselines.group_advantages(rewards, mask, scale_by_std=False)
    shrinking = (group_size - 1) / group_size
  else:
    baseline, _ = baselines.moving_advantages(
      baselines.empty_baseline(), rewards[:5], mask[:5]
    )
    _, advantages = baselines.moving_advantages(baseline, rewards, mask)
  group_probs = np.prod(np.asarray(probs_of(params))[groups], axis=1)
  found = expected_gradient(
    params,
    np.asarray(advantages).ravel(),
    groups.ravel(),
    # A group's loss is the mean over its solutions.
    jnp.asarray(np.repeat(group_probs / group_size, group_size)),
  )
  exact = exact_gradient(params)
  expected = jax.tree.map(lambda x: shrinking * x, exact)
  assert distance(found, expected) < 1e-14


def true_values(params):
  """`[7, 2]` expected reward before each token."""
  probs, tokens = np.asarray(probs_of(params)), SOLUTIONS[:, 0]
  second = [
    np.average(REWARDS[tokens == x], weights=probs[tokens == x]) for x in tokens
  ]
  return np.stack([np.full(7, probs @ REWARDS), second], axis=1)


# The outcome is received behind the last token.
LAST_REWARDS = np.stack(
  [np.where(MASK[:, 1], 0, REWARDS), np.where(MASK[:, 1], REWARDS, 0)], axis=1
)


def actor_critic_gradient(params, values, lambda_):
  return expected_gradient(params, all_advantages(values, lambda_))


@jax.jit
def all_advantages(values, lambda_):
  def advantages_of(rewards, values, mask):
    return returns.generalized_advantages(
      rewards, values, mask, lambda_=lambda_
    )[0]

  return jax.vmap(advantages_of)(LAST_REWARDS, values, MASK)


def test_actor_critic_is_unbiased_where_theory_says_so():
  """At lambda 1 for any values of prefixes, else only for the true ones."""
  params = make_params()
  exact = exact_gradient(params)
  np.testing.assert_array_equal(LAST_REWARDS.sum(axis=1), REWARDS)
  wrong = np.array([0.4, 0.1, -0.7])[SOLUTIONS[:, :1]] * [0, 1] + [0.3, 0.2]
  assert distance(actor_critic_gradient(params, wrong, 1.0), exact) < 1e-14
  assert distance(actor_critic_gradient(params, wrong, 0.5), exact) > 0.01
  for lambda_ in (0.0, 0.5):
    found = actor_critic_gradient(params, true_values(params), lambda_)
    assert distance(found, exact) < 1e-14


def weights_between(params, behavior_params, **options):
  weights_fn = functools.partial(policy_gradient.importance_weights, **options)
  return jax.jit(weights_fn)(
    log_probs_of(params), log_probs_of(behavior_params), MASK
  )


def test_weights_of_sequences_make_the_data_of_another_policy_unbiased():
  params, behavior_params = make_params(), make_params(seed=1)
  exact = exact_gradient(params)

  def found(**options):
    weights = weights_between(params, behavior_params, **options)
    return expected_gradient(
      params, REWARDS, row_probs=probs_of(behavior_params), weights=weights
    )

  assert distance(found(level="sequence"), exact) < 1e-14
  # The bias that is bought with the other ways.
  assert distance(found(level="token"), exact) > 0.01
  assert distance(found(level="sequence", max_weight=1.0), exact) > 0.01
  unweighted = expected_gradient(
    params, REWARDS, row_probs=probs_of(behavior_params)
  )
  assert distance(unweighted, exact) > 0.01


def test_vtrace_corrects_what_follows_and_not_how_it_got_there():
  """Without truncation the gradient at a prefix is exact, given the prefix."""
  params, behavior_params = make_params(), make_params(seed=1)
  weights = weights_between(params, behavior_params, level="token")
  values = np.array([[0.3, 0.2]] * 7)
  vtrace = functools.partial(returns.vtrace, max_rho=math.inf, max_c=math.inf)
  advantages, _ = jax.jit(jax.vmap(vtrace))(LAST_REWARDS, values, weights, MASK)
  found = expected_gradient(
    params, advantages, row_probs=probs_of(behavior_params)
  )
  first, behavior_first = (
    np.exp(p["first"]) / np.exp(p["first"]).sum()
    for p in (params, behavior_params)
  )
  exact = exact_gradient(params)
  visits = (behavior_first / first)[:, None]
  expected = exact | {"second": visits * exact["second"]}
  assert distance(found, expected) < 1e-14


def test_importance_weights_equal_a_loop():
  rng = np.random.default_rng(2)
  log_probs, behavior = rng.normal(size=(2, 3, 5))
  mask = np.array([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0]])
  holes = np.where(mask, 0, np.nan)
  for level, max_weight in itertools.product(
    policy_gradient.LEVELS, (None, 1.5)
  ):
    expected = np.zeros((3, 5))
    for row, t in itertools.product(range(3), range(5)):
      if not mask[row, t]:
        continue
      used = [t] if level == "token" else [i for i in range(5) if mask[row, i]]
      weight = 1.0
      for i in used:
        weight *= math.exp(log_probs[row, i]) / math.exp(behavior[row, i])
      expected[row, t] = min(weight, max_weight or math.inf)
    found = jax.jit(
      functools.partial(
        policy_gradient.importance_weights, level=level, max_weight=max_weight
      )
    )(log_probs + holes, behavior + holes, mask)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_truncation_holds_where_the_ratio_overflows():
  found = policy_gradient.importance_weights(
    jnp.array([[-1.0]]), jnp.array([[-1e4]]), jnp.ones((1, 1)), max_weight=2.0
  )
  assert float(found[0, 0]) == 2.0


@pytest.mark.parametrize("level", policy_gradient.LEVELS)
def test_weights_are_constants_to_the_gradient(level):
  def total(log_probs, behavior):
    return jnp.sum(
      policy_gradient.importance_weights(
        log_probs, behavior, np.ones((1, 2)), level=level
      )
    )

  gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
  for slopes in gradient(np.array([[-1.0, -2.0]]), np.array([[-2.0, -1.5]])):
    np.testing.assert_array_equal(slopes, np.zeros((1, 2)))


def test_an_unknown_level_names_the_choices():
  ones = jnp.ones((1, 1))
  with pytest.raises(ValueError, match="'word'.*token.*sequence"):
    policy_gradient.importance_weights(ones, ones, ones, level="word")


sample_size = jax.jit(policy_gradient.effective_sample_size)


@pytest.mark.parametrize(
  "weights, mask, expected",
  [
    ([2.0, 2.0, 2.0, 2.0], [1, 1, 1, 1], 4.0),
    ([2.0, 2.0, math.nan, 2.0], [1, 1, 0, 1], 3.0),
    ([0.0, 5.0, 0.0, 9.0], [1, 1, 1, 0], 1.0),
    ([1.0, 2.0, 3.0, 0.0], [1, 1, 1, 1], 36 / 14),
    ([1e200, 1e200, 1.0, 1.0], [1, 1, 1, 1], 2.0),
    ([1e-200, 1e-200, 0.0, 0.0], [1, 1, 1, 1], 2.0),
    ([0.0, 0.0, 0.0, 0.0], [1, 1, 1, 1], 0.0),
    ([math.nan] * 4, [0, 0, 0, 0], 0.0),
  ],
)
def test_effective_sample_size(weights, mask, expected):
  found = sample_size(np.array(weights), np.array(mask))
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_what_earns_nothing_may_be_impossible():
  """A log-prob of -inf with advantage 0 counts 0, not NaN."""

  def loss(log_probs):
    advantages = jnp.array([[0.0, 2.0]])
    return policy_gradient.reinforce_loss(
      log_probs, advantages, jnp.ones((1, 2))
    )[0]

  value, gradient = jax.value_and_grad(loss)(jnp.array([[-jnp.inf, -1.0]]))
  assert float(value) == 2.0
  np.testing.assert_array_equal(gradient, [[0.0, -2.0]])


def test_entropy_is_its_sum_and_knows_impossible_tokens():
  rng = np.random.default_rng(4)
  logits = rng.normal(size=(2, 3, 4))
  logits[0, 1, 2] = -np.inf
  mask = np.array([[1.0, 0.5, 0.0], [0.0, 0.0, 2.0]])
  expected = 0.0
  for row, t in itertools.product(range(2), range(3)):
    numbers = [math.exp(x) for x in logits[row, t]]
    probs = [x / sum(numbers) for x in numbers]
    entropy = -sum(p * math.log(p) for p in probs if p > 0)
    expected += mask[row, t] * entropy
  logits[mask == 0] = np.nan

  def bonus(logits):
    return policy_gradient.entropy_bonus(logits, jnp.asarray(mask))

  (found, weight), gradient = jax.jit(
    lambda x: (bonus(x), jax.grad(lambda x: bonus(x)[0])(x))
  )(logits)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  assert float(weight) == 3.5
  assert np.isfinite(gradient).all() and float(gradient[0, 1, 2]) == 0
  uniform = policy_gradient.entropy_bonus(
    jnp.zeros((1, 1, 5)), jnp.ones((1, 1))
  )
  np.testing.assert_allclose(uniform[0], math.log(5), rtol=1e-12)


def test_length_penalties_rise_between_the_two_lengths():
  found = policy_gradient.length_penalties(
    jnp.array([[0, 10], [11, 15], [20, 99]]), free_length=10, max_length=20
  )
  np.testing.assert_allclose(found, [[0, 0], [-0.1, -0.5], [-1, -1]])
  with pytest.raises(ValueError, match="free_length=20.*max_length=20"):
    policy_gradient.length_penalties(jnp.ones(3), free_length=20, max_length=20)
