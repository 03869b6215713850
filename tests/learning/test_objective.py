"""Terms of the update against loops over tokens, kind of rows by kind.

Gradients are read off the update program itself: its optimizer adds the
gradient to the parameters.
"""

import functools

import jax
import numpy as np
import pytest

from differences import slopes_of
from o1jax import mesh as meshes
from o1jax.learning import update as updates
from o1jax.learning.objective import (
  Objective,
  PolicyGradient,
  Preference,
  weights,
)
from oracles import LossInLoops, value_by_hand
from toy_learner import (
  LENGTH,
  ROWS,
  assert_close,
  log_probs_fn,
  make_batch,
  make_drawn,
  make_optimizer,
  make_pairs,
  make_params,
  next_log_probs,
  numpy_forward,
  with_entropy_fn,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

DRAWN = {
  "reinforce": dict(loss="reinforce"),
  "token": dict(loss="reinforce", importance="token"),
  "sequence": dict(loss="reinforce", importance="sequence"),
  "truncated": dict(loss="reinforce", importance="token", max_weight=1.1),
  "ppo": dict(coefficient=0.7),
  "ppo_clips": dict(clip_low=0.1, clip_high=0.3, dual_clip=1.2),
  "k2": dict(kl_coefficient=0.5, kl_estimator="k2"),
  "k3_entropy": dict(kl_coefficient=0.5, entropy_coefficient=0.3),
  "clipped_values": dict(max_value_change=0.1),
}
PAIRED = {
  "dpo": dict(beta=0.7),
  "ipo": dict(variant="ipo", beta=0.4, coefficient=0.3),
  "conservative": dict(variant="conservative", label_noise=0.2, beta=0.7),
  "normalized": dict(is_length_normalized=True, beta=2.0),
}
MIXED = Objective(
  value_coefficient=0.5,
  policy_gradient=PolicyGradient(
    clip_low=0.1, kl_coefficient=0.5, entropy_coefficient=0.3
  ),
  preference=Preference(beta=0.7, coefficient=0.4),
)
BINNED = {
  "values": dict(),
  "clipped_values": dict(max_value_change=0.1),
}
NUM_BINS = 4
CASES = [
  *(("drawn", name) for name in DRAWN),
  *(("pairs", name) for name in PAIRED),
  *(("binned", name) for name in BINNED),
  ("mixed", "all"),
]


@functools.cache
def case(kind, name):
  """Objective, groups of rows, and the loops over them."""
  if kind == "binned":
    options = PolicyGradient(**BINNED[name])
    objective = Objective(value_coefficient=0.5, policy_gradient=options)
    groups = (make_batch(), make_drawn())
  elif kind == "drawn":
    options = PolicyGradient(**DRAWN[name])
    objective = Objective(value_coefficient=0.5, policy_gradient=options)
    groups = (make_drawn(),)
  elif kind == "pairs":
    objective = Objective(preference=Preference(**PAIRED[name]))
    groups = (make_pairs(),)
  else:
    objective, groups = MIXED, (make_batch(), make_drawn(), make_pairs())
  loops = LossInLoops(objective, numpy_forward, groups)
  loops.weigh(wide(start(kind)))
  return objective, groups, loops


@functools.cache
def slopes(kind, name):
  """The slopes of the loss in loops, `[parameters]`."""
  loops = case(kind, name)[2]
  x, unravel = ravel(start(kind))
  return slopes_of(lambda x: loops(unravel(x))["loss"], x)


def start(kind):
  """The parameters of a case."""
  return make_params(NUM_BINS if kind == "binned" else 0)


def ravel(params):
  """The parameters as one vector of float64, and the way back."""
  leaves, structure = jax.tree.flatten(wide(params))
  ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

  def unravel(x):
    parts = np.split(x, ends)
    shaped = [p.reshape(v.shape) for p, v in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, shaped)

  return np.concatenate([leaf.ravel() for leaf in leaves]), unravel


def wide(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def in_float64(group):
  return jax.tree.map(lambda x: wide(x) if x.dtype == np.float32 else x, group)


def adding_gradients():
  """An optimizer whose change is the gradient."""
  return make_optimizer()._replace(
    init=lambda params: (),
    update=lambda gradient, state, params: (gradient, ()),
  )


def network_of(objective):
  has_entropy = objective.policy_gradient.entropy_coefficient > 0
  return with_entropy_fn if has_entropy else log_probs_fn


def step(objective, groups, *, params=None, mesh=None, **options):
  """`(gradient as one vector, metrics)` of one update."""
  params = make_params() if params is None else params
  optimizer = adding_gradients()
  update = updates.make_update(
    network_of(objective), optimizer, objective=objective, mesh=mesh, **options
  )
  state = updates.make_state(params, optimizer, mesh)
  batch = groups if len(groups) > 1 else groups[0]
  state, metrics = jax.device_get(update(state, batch))
  assert int(state.num_updates) == 1
  change = jax.tree.map(lambda x, y: x - y, wide(state.params), wide(params))
  return ravel(change)[0], metrics


@pytest.mark.parametrize("kind, name", CASES)
def test_the_gradient_is_the_slope_of_the_loss_in_loops(kind, name):
  objective, groups, loops = case(kind, name)
  with jax.enable_x64(True):
    params = jax.tree.map(jax.numpy.asarray, wide(start(kind)))
    found, metrics = step(
      objective, tuple(map(in_float64, groups)), params=params
    )
  assert np.abs(found).max() > 1e-2
  np.testing.assert_allclose(found, slopes(kind, name), atol=1e-7)
  expected = loops(wide(start(kind)))
  if kind != "pairs":
    expected |= loops.ratio_numbers()
  for number, value in expected.items():
    np.testing.assert_allclose(
      metrics[number], value, rtol=1e-6, err_msg=number
    )
  others = {"grad_norm", "learning_rate", "is_finite"}
  assert set(metrics) == set(expected) | others


@pytest.mark.parametrize(
  "kind, name, num_microbatches, mesh_shape",
  [
    ("drawn", "sequence", 4, None),
    ("drawn", "sequence", 1, {"data": 8}),
    ("pairs", "normalized", 4, None),
    ("pairs", "normalized", 1, {"data": 8}),
    ("mixed", "all", 1, None),
    ("mixed", "all", 4, {"data": 2}),
    ("mixed", "all", 2, {"data": 2, "fsdp": 2}),
    ("mixed", "all", 1, {"data": 2, "fsdp": 2, "tensor": 2}),
  ],
)
def test_every_arrangement_equals_the_rows_one_by_one(
  kind, name, num_microbatches, mesh_shape
):
  objective, groups, loops = case(kind, name)
  mesh = None if mesh_shape is None else meshes.make_mesh(mesh_shape)
  found, metrics = step(
    objective, groups, num_microbatches=num_microbatches, mesh=mesh
  )
  np.testing.assert_allclose(found, slopes(kind, name), atol=5e-6)
  expected = loops(wide(make_params())) | loops.ratio_numbers()
  for number in set(metrics) & set(expected):
    np.testing.assert_allclose(
      metrics[number], expected[number], rtol=1e-4, atol=1e-6
    )


@functools.cache
def mixed_update():
  """One program for the tests of rows: the mixed groups, without an optimizer.

  `(groups) -> (gradient by name, metrics)`.
  """
  optimizer = adding_gradients()
  update = updates.make_update(with_entropy_fn, optimizer, objective=MIXED)

  def gradient_of(groups):
    state = updates.make_state(make_params(), optimizer)
    state, metrics = jax.device_get(update(state, groups))
    change = jax.tree.map(lambda x, y: x - y, state.params, make_params())
    return change, metrics

  return gradient_of


def test_the_order_of_rows_does_not_matter():
  groups = case("mixed", "all")[1]
  order = np.random.default_rng(0).permutation(ROWS)
  found, metrics = mixed_update()(groups)
  turned, other = mixed_update()(jax.tree.map(lambda x: x[order], groups))
  assert_close(turned, found)
  assert_close(other, metrics)


def test_padding_gets_no_gradient():
  """Token 0 stands in the padding only."""
  groups = case("mixed", "all")[1]
  gradient, _ = mixed_update()(groups)
  embedding = gradient["trunk"]["embedding"]
  assert not embedding[0].any() and embedding[1:-1].all(1).all()
  # What stands there does not matter either.
  filled = []
  for group in groups:
    index = np.arange(LENGTH)
    is_padding = index >= group.lengths[..., None]
    filled.append(group.replace(tokens=np.where(is_padding, 3, group.tokens)))
  other, _ = mixed_update()(tuple(filled))
  assert_close(other, gradient)


def emptied(groups):
  """No row has a weight, and everything else is NaN."""
  found = []
  for group in groups:
    fields = {}
    for name, array in vars(group).items():
      if "weights" in name:
        fields[name] = np.zeros_like(array)
      elif array.dtype == np.float32:
        fields[name] = np.full_like(array, np.nan)
    found.append(group.replace(**fields))
  return tuple(found)


@pytest.mark.parametrize("has_tokens", [True, False])
def test_rows_without_weight_move_nothing_and_are_never_nan(has_tokens):
  groups = emptied(case("mixed", "all")[1])
  if not has_tokens:
    groups = tuple(
      g.replace(tokens=0 * g.tokens, lengths=0 * g.lengths) for g in groups
    )
  gradient, metrics = mixed_update()(groups)
  assert not ravel(gradient)[0].any()
  assert np.isfinite(list(metrics.values())).all()
  assert metrics["loss"] == 0 and metrics["max_ratio"] == 1
  assert metrics["min_ratio"] == 1 and metrics["effective_share"] == 0


def test_empty_groups_leave_the_others_as_they_are():
  cloned, drawn, pairs = case("mixed", "all")[1]
  others = emptied((drawn, pairs))
  found, _ = mixed_update()((cloned, *others))
  expected, _ = step(Objective(value_coefficient=0.5), (cloned,))
  np.testing.assert_allclose(ravel(found)[0], expected, atol=1e-6)


@pytest.mark.parametrize("loss", ["reinforce", "ppo"])
def test_without_advantages_nothing_moves(loss):
  objective = Objective(
    value_coefficient=0.0, policy_gradient=PolicyGradient(loss=loss)
  )
  drawn = make_drawn()
  drawn = drawn.replace(advantages=0 * np.nan_to_num(drawn.advantages))
  gradient, metrics = step(objective, (drawn,))
  assert not gradient.any() and metrics["grad_norm"] == 0
  # Nor do the parameters by the optimizer that runs take.
  optimizer = make_optimizer()
  update = updates.make_update(log_probs_fn, optimizer, objective=objective)
  state, _ = update(updates.make_state(make_params(), optimizer), drawn)
  jax.tree.map(np.testing.assert_array_equal, state.params, make_params())


def test_at_ratio_one_ppo_is_reinforce():
  drawn = make_drawn()
  own = next_log_probs(make_params(), drawn.tokens).astype(np.float32)
  drawn = drawn.replace(behavior_log_probs=own)
  found = []
  for options in (
    dict(loss="reinforce"),
    dict(loss="reinforce", importance="sequence"),
    dict(loss="ppo", dual_clip=3.0),
  ):
    objective = Objective(policy_gradient=PolicyGradient(**options))
    gradient, metrics = step(objective, (drawn,))
    found.append(gradient)
    assert metrics["effective_share"] == pytest.approx(1)
    assert metrics["kl_to_behavior"] == pytest.approx(0, abs=1e-6)
  np.testing.assert_allclose(found[1], found[0], atol=1e-6)
  np.testing.assert_allclose(found[2], found[0], atol=1e-6)
  assert metrics["clip_share"] == 0


def test_a_reference_is_left_alone_and_moves_when_told():
  optimizer = make_optimizer()
  update = updates.make_update(
    log_probs_fn, optimizer, objective=Objective(), average_decay=0.9
  )
  state = updates.make_state(make_params(), optimizer, has_reference=True)
  for _ in range(2):
    state, _ = update(state, make_pairs())
  jax.tree.map(
    np.testing.assert_array_equal, state.reference_params, make_params()
  )
  state = updates.with_reference(state)
  jax.tree.map(
    np.testing.assert_array_equal, state.reference_params, state.average_params
  )
  average = jax.device_get(state.average_params)
  # A copy: the update gives its arrays away, and the reference stays.
  state, _ = update(state, make_pairs())
  jax.tree.map(np.testing.assert_array_equal, state.reference_params, average)
  assert np.any(state.average_params["hidden"] != average["hidden"])


def test_the_rate_is_scaled():
  optimizer = make_optimizer(weight_decay=0.1)
  changes, rates = [], []
  for scale in (1.0, 0.25, 0.0):
    update = updates.make_update(
      log_probs_fn,
      optimizer,
      objective=Objective(),
      learning_rate_scale=scale,
    )
    state = updates.make_state(make_params(), optimizer)
    state, metrics = update(state, make_batch())
    change = jax.tree.map(lambda x, y: x - y, state.params, make_params())
    changes.append(ravel(change)[0])
    rates.append(float(metrics["learning_rate"]))
  np.testing.assert_allclose(changes[1], 0.25 * changes[0], atol=1e-6)
  np.testing.assert_allclose(rates, np.array([1, 0.25, 0]) * rates[0])
  assert np.abs(changes[0]).max() > 1e-2 and not changes[2].any()


@pytest.mark.parametrize(
  "mesh_shape, num_bins",
  [(None, 0), (None, NUM_BINS), ({"data": 3}, NUM_BINS), ({"fsdp": 2}, 0)],
)
def test_any_number_of_rows_is_scored(mesh_shape, num_bins):
  mesh = None if mesh_shape is None else meshes.make_mesh(mesh_shape)
  optimizer = make_optimizer()
  start = make_params(num_bins)
  params = updates.make_state(start, optimizer, mesh).params
  score_fn = updates.make_score(with_entropy_fn, mesh=mesh)
  batch = make_batch()
  for count in (ROWS, 5):
    log_probs, values = score_fn(
      params, batch.tokens[:count], batch.lengths[:count]
    )
    assert log_probs.shape == values.shape == (count, LENGTH)
    for row in range(count):
      _, logits = numpy_forward(start, batch.tokens[row])
      expected = list(map(value_by_hand, logits))
      np.testing.assert_allclose(values[row], expected, rtol=1e-5)
    own = next_log_probs(start, batch.tokens[:count])
    np.testing.assert_allclose(log_probs, own, atol=1e-6)


def test_groups_of_a_kind_share_their_denominators():
  cloned, drawn, pairs = case("mixed", "all")[1]
  total = weights(drawn)
  assert set(total) == {"policy_gradient", "kl", "entropy", "value"}
  # Two halves, of which one has no value, are the whole.
  halves = [jax.tree.map(lambda x, i=i: x[i::2], drawn) for i in range(2)]
  apart, numbers = mixed_update()((cloned, *halves, pairs))
  whole, metrics = mixed_update()((cloned, drawn, pairs))
  assert_close(apart, whole)
  assert_close(numbers, metrics)


@pytest.mark.parametrize(
  "make, options, words",
  [
    (PolicyGradient, dict(loss="pp0"), "loss='pp0' is unknown"),
    (PolicyGradient, dict(importance="row"), "importance='row' is unknown"),
    (PolicyGradient, dict(kl_estimator="k1"), "='k1' is unknown; .* k2, k3"),
    (PolicyGradient, dict(coefficient=-1.0), "coefficient=-1.0 must be 0"),
    (PolicyGradient, dict(clip_low=-0.1), "clip_low=-0.1 must be 0 or more"),
    (PolicyGradient, dict(clip_high=-0.1), "clip_high=-0.1 must be 0 or more"),
    (PolicyGradient, dict(max_weight=-1.0), "max_weight=-1.0 must be 0"),
    (PolicyGradient, dict(kl_coefficient=-1.0), "kl_coefficient=-1.0 must"),
    (PolicyGradient, dict(entropy_coefficient=-1.0), "entropy_coefficient=-1"),
    (PolicyGradient, dict(max_value_change=-1.0), "max_value_change=-1.0"),
    (PolicyGradient, dict(dual_clip=1.0), "dual_clip=1.0 must be above 1"),
    (PolicyGradient, dict(dual_clip=-3.0), "dual_clip=-3.0 must be above 1"),
    (
      PolicyGradient,
      dict(importance="token"),
      "set it to 'none', or loss to 'reinforce'",
    ),
    (
      PolicyGradient,
      dict(loss="reinforce", max_weight=2.0),
      "set it to 0, or importance to 'token' or 'sequence'",
    ),
    (
      PolicyGradient,
      dict(loss="reinforce", dual_clip=2.0),
      "set it to 0, or loss to 'ppo'",
    ),
    (
      PolicyGradient,
      dict(loss="reinforce", clip_high=0.3),
      "clip_high=0.3 is not read by loss='reinforce': set it to 0.2, or loss",
    ),
    (Preference, dict(variant="dp0"), "variant='dp0' is none of dpo, ipo"),
    (Preference, dict(coefficient=-1.0), "coefficient=-1.0 must be 0 or more"),
    (Preference, dict(beta=0.0), "beta=0.0 is not above 0"),
    (Preference, dict(label_noise=0.1), "set it to 0 or choose conservative"),
    (
      Preference,
      dict(variant="conservative", label_noise=0.5),
      r"label_noise=0.5 is not in \[0, 0.5\)",
    ),
  ],
)
def test_bad_options_are_refused(make, options, words):
  with pytest.raises(ValueError, match=words) as raised:
    make(**options)
  assert "\n" not in str(raised.value)
