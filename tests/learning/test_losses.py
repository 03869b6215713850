"""One battery for every loss: slopes, padding, order, parts and constants.

A case is a loss with the arrays it reads and the one that it may change. Masks
have holes, a row without anything, and weights that are not 1.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.learning import cloning, policy_gradient, ppo, value_losses

MASK = np.array(
  [
    [0.0, 1.0, 0.5, 0.0, 1.0],
    [1.0, 0.0, 0.0, 2.0, 0.0],
    [0.0, 0.0, 0.0, 0.0, 0.0],
  ]
)
VOCAB = 3

pytestmark = pytest.mark.usefixtures("quick_programs")


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@dataclasses.dataclass(frozen=True)
class Case:
  """A loss `(**arrays, mask) -> (numerator, denominator)`.

  Attributes:
    loss_fn: the loss.
    learned: name of the array that gets the gradient.
    constants: names of the others.
  """

  loss_fn: Callable
  learned: str
  constants: tuple[str, ...] = ()


def reinforce(log_probs, advantages, weights, mask):
  return policy_gradient.reinforce_loss(
    log_probs, advantages, mask, importance_weights=weights
  )


def clipped(log_probs, behavior, advantages, mask, **options):
  return ppo.ppo_loss(log_probs, behavior, advantages, mask, **options)[:2]


def divergence(log_probs, reference, mask, *, estimator):
  penalties = ppo.kl_penalty(log_probs, reference, mask, estimator=estimator)
  return jnp.sum(mask * penalties), jnp.sum(mask)


def ratio_case(**options):
  loss_fn = functools.partial(clipped, **options)
  return Case(loss_fn, "log_probs", ("behavior", "advantages"))


def value_case(max_change):
  def loss_fn(values, behavior, targets, mask):
    return ppo.clipped_value_loss(
      values, behavior, targets, mask, max_change=max_change
    )

  return Case(loss_fn, "values", ("behavior", "targets"))


def outcome_case(learned):
  """A value of one logit, or of as many bins as there are words."""

  def loss_fn(targets, mask, **logits):
    return value_losses.value_loss(logits[learned], targets, mask)

  return Case(loss_fn, learned, ("targets",))


def clipped_bins(logits, behavior, targets, mask):
  return value_losses.clipped_two_hot_loss(
    logits, behavior, targets, mask, max_change=0.3
  )


CASES = {
  "cloning": Case(
    lambda log_probs, mask: cloning.cloning_loss(log_probs, mask), "log_probs"
  ),
  "REINFORCE": Case(
    lambda log_probs, advantages, mask: policy_gradient.reinforce_loss(
      log_probs, advantages, mask
    ),
    "log_probs",
    ("advantages",),
  ),
  "REINFORCE with weights": Case(
    reinforce, "log_probs", ("advantages", "weights")
  ),
  "PPO": ratio_case(clip_low=0.1, clip_high=0.5),
  "PPO with dual clip": ratio_case(dual_clip=1.5),
  "value": value_case(None),
  "clipped value": value_case(0.3),
  "value of one logit": outcome_case("values"),
  "value in bins": outcome_case("logits"),
  "clipped value in bins": Case(
    clipped_bins, "logits", ("behavior", "targets")
  ),
  "k2": Case(
    functools.partial(divergence, estimator="k2"), "log_probs", ("reference",)
  ),
  "k3": Case(
    functools.partial(divergence, estimator="k3"), "log_probs", ("reference",)
  ),
  "entropy": Case(
    lambda logits, mask: policy_gradient.entropy_bonus(logits, mask), "logits"
  ),
}
POLICY_LOSSES = [
  name for name in CASES if "advantages" in CASES[name].constants
]

every_loss = pytest.mark.parametrize("name", CASES)


def make_arrays(case, fill=np.nan):
  """Random arrays with `fill` where the mask is 0, and the mask."""
  rng = np.random.default_rng(0)
  arrays = {}
  for name in (case.learned, *case.constants):
    shape = (*MASK.shape, VOCAB) if name == "logits" else MASK.shape
    array = rng.normal(size=shape)
    array = np.exp(array) if name == "weights" else array
    array[MASK == 0] = fill
    arrays[name] = jnp.asarray(array)
  return arrays, jnp.asarray(MASK)


@functools.cache
def program(case):
  """The sums, and the gradient of their ratio by every array but the mask."""

  def mean(arrays, mask):
    numerator, denominator = sums = case.loss_fn(**arrays, mask=mask)
    return numerator / jnp.where(denominator == 0, 1, denominator), sums

  @jax.jit
  def run(arrays, mask):
    gradient, sums = jax.grad(mean, has_aux=True)(arrays, mask)
    return *sums, gradient

  return run


def assert_same(found, expected):
  """Sums and gradients."""
  leaves = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
  for leaf, other in leaves:
    np.testing.assert_allclose(leaf, other, rtol=1e-12, atol=1e-15)


@every_loss
def test_gradient_equals_finite_differences(name):
  case = CASES[name]
  arrays, mask = make_arrays(case)
  numerator, denominator, gradient = program(case)(arrays, mask)
  assert np.isfinite(numerator) and float(denominator) == MASK.sum()
  learned = arrays[case.learned]
  moves = jnp.eye(learned.size).reshape(-1, *learned.shape)

  @jax.jit
  @jax.vmap
  def losses(move):
    moved = arrays | {case.learned: learned + 1e-6 * move}
    return case.loss_fn(**moved, mask=mask)[0] / denominator

  differences = (losses(moves) - losses(-moves)) / 2e-6
  slopes = gradient[case.learned].ravel()
  np.testing.assert_allclose(differences, slopes, atol=1e-8)
  assert np.abs(slopes).max() > 0.01


@every_loss
def test_what_stands_at_masked_positions_is_never_read(name):
  case = CASES[name]
  found = program(case)(*make_arrays(case))
  assert_same(found, program(case)(*make_arrays(case, fill=0.5)))
  for gradient in found[2].values():
    np.testing.assert_array_equal(gradient[MASK == 0], 0)


@every_loss
def test_padding_changes_nothing(name):
  """One more row and two more positions of NaN."""
  case = CASES[name]
  arrays, mask = make_arrays(case)

  def pad(array, fill):
    widths = [(0, 1), (1, 1), (0, 0)][: array.ndim]
    return jnp.pad(array, widths, constant_values=fill)

  padded = {name: pad(array, np.nan) for name, array in arrays.items()}
  *sums, gradient = program(case)(padded, pad(mask, 0))
  *expected_sums, expected = program(case)(arrays, mask)
  assert_same(sums, expected_sums)
  assert_same(gradient, {name: pad(x, 0) for name, x in expected.items()})


@every_loss
def test_order_of_the_rows_changes_nothing(name):
  case = CASES[name]
  arrays, mask = make_arrays(case)
  order = np.array([2, 0, 1])
  shuffled = {name: array[order] for name, array in arrays.items()}
  *sums, gradient = program(case)(shuffled, mask[order])
  *expected_sums, expected = program(case)(arrays, mask)
  assert_same(sums, expected_sums)
  assert_same(gradient, {name: x[order] for name, x in expected.items()})


@every_loss
def test_sums_of_microbatches_are_those_of_the_batch(name):
  case = CASES[name]
  arrays, mask = make_arrays(case)
  rows = jnp.eye(3)[:, :, None]
  parts = [program(case)(arrays, mask * row)[:2] for row in rows]
  whole = program(case)(arrays, mask)[:2]
  assert_same([sum(numbers) for numbers in zip(*parts, strict=True)], whole)


@every_loss
def test_nothing_to_learn_from_is_a_loss_of_zero(name):
  case = CASES[name]
  arrays, mask = make_arrays(case)
  nothing = {name: jnp.full_like(x, jnp.nan) for name, x in arrays.items()}
  numerator, denominator, gradient = program(case)(nothing, 0 * mask)
  assert float(numerator) == float(denominator) == 0
  for leaf in gradient.values():
    np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


@every_loss
def test_only_the_learned_array_gets_a_gradient(name):
  case = CASES[name]
  *_, gradient = program(case)(*make_arrays(case))
  assert np.abs(gradient[case.learned]).max() > 0.01
  for constant in case.constants:
    np.testing.assert_array_equal(gradient[constant], np.zeros(MASK.shape))


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_zero_advantage_gives_zero_gradient(name):
  case = CASES[name]
  arrays, mask = make_arrays(case)
  arrays["advantages"] = 0 * arrays["advantages"]
  numerator, _, gradient = program(case)(arrays, mask)
  assert float(numerator) == 0
  for leaf in gradient.values():
    np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


@every_loss
def test_another_shape_of_mask_is_refused(name):
  case = CASES[name]
  arrays, mask = make_arrays(case)
  with pytest.raises(AssertionError):
    case.loss_fn(**arrays, mask=mask[:, :1])


def test_true_and_false_are_a_mask_too():
  @jax.jit
  def run(log_probs, mask):
    ones = jnp.ones((1, 3))
    return [
      policy_gradient.reinforce_loss(log_probs, ones, mask),
      ppo.clipped_value_loss(log_probs, ones, ones, mask),
      ppo.ppo_loss(log_probs, ones, ones, mask)[:2],
      policy_gradient.entropy_bonus(jnp.zeros((1, 3, 2)), mask),
    ]

  log_probs = np.array([[-1.0, -2.0, np.nan]])
  for numerator, denominator in run(log_probs, np.array([[True, True, False]])):
    assert denominator.dtype == numerator.dtype == jnp.float64
    assert float(denominator) == 2 and np.isfinite(numerator)
