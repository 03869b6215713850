"""The update program: two ways to the same parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from o1jax import mesh as meshes
from o1jax.learning import update as updates
from o1jax.learning.objective import Objective
from toy_learner import (
  LENGTH,
  ROWS,
  VOCAB,
  assert_close,
  log_probs_fn,
  make_batch,
  make_optimizer,
  make_params,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

HALF = Objective(value_coefficient=0.5)


@functools.cache
def make_plain():
  """An optimizer and, for two updates by it, the rows one by one.

  The gradient of each row is taken alone and summed in float64: the oracle of
  every arrangement of rows over microbatches and devices.
  """
  optimizer = make_optimizer(weight_decay=0.1)

  def row_loss(params, tokens, weights, targets, value_weights):
    log_probs, logits = log_probs_fn(params, tokens[None], None)
    v = jax.nn.sigmoid(logits[0])
    errors = -targets * jnp.log(v) - (1 - targets) * jnp.log(1 - v)
    return -jnp.sum(weights * log_probs[0]) + 0.5 * jnp.sum(
      value_weights * errors
    )

  grad_fn = jax.jit(jax.value_and_grad(row_loss))
  apply_fn = jax.jit(optimizer.update)
  params = make_params()
  opt_state = optimizer.init(params)
  expected = []
  for seed in (3, 4):
    batch = make_batch(seed)
    policy_weight = np.sum(batch.policy_weights, dtype=np.float64)
    value_weight = np.sum(batch.value_weights, dtype=np.float64)
    loss = 0.0
    gradient = jax.tree.map(lambda x: np.zeros(x.shape, np.float64), params)
    for row in range(ROWS):
      row_value, row_gradient = grad_fn(
        params,
        batch.tokens[row],
        np.float32(batch.policy_weights[row] / policy_weight),
        batch.value_targets[row],
        np.float32(batch.value_weights[row] / value_weight),
      )
      loss += float(row_value)
      gradient = jax.tree.map(lambda x, y: x + y, gradient, row_gradient)
    gradient = jax.tree.map(np.float32, gradient)
    norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(gradient)))
    changes, opt_state = apply_fn(gradient, opt_state, params)
    params = jax.tree.map(lambda x, y: np.asarray(x + y), params, changes)
    expected.append((params, loss, norm))
  return optimizer, expected


@functools.cache
def make_shared(num_microbatches=1):
  """A fresh state's maker and an update, compiled once for many tests."""
  optimizer = make_optimizer()
  update = updates.make_update(
    log_probs_fn,
    optimizer,
    num_microbatches=num_microbatches,
    objective=HALF,
  )
  return lambda: updates.make_state(make_params(), optimizer), update


def in_two_widths(batch):
  """Half of the rows stand in a group of their own, with wider padding."""
  is_wide = np.arange(ROWS) % 4 < 2
  narrow = jax.tree.map(lambda x: x[~is_wide], batch)

  def widen(x):
    return np.pad(x[is_wide], [(0, 0), (0, 3)][: x.ndim])

  return narrow, jax.tree.map(widen, batch)


@pytest.mark.parametrize(
  ("num_microbatches", "mesh_shape", "arrange"),
  [
    (1, None, None),
    (4, None, None),
    (1, {"data": 2}, None),
    (2, {"data": 2, "fsdp": 2}, None),
    (1, {"data": 2, "fsdp": 2, "tensor": 2}, None),
    (2, {"data": 2}, in_two_widths),
    (1, {"data": 2, "fsdp": 2}, in_two_widths),
  ],
)
def test_every_arrangement_equals_the_rows_one_by_one(
  num_microbatches, mesh_shape, arrange
):
  mesh = None if mesh_shape is None else meshes.make_mesh(mesh_shape)
  optimizer, expected = make_plain()
  num_traces = 0

  def counting_fn(*arguments):
    nonlocal num_traces
    num_traces += 1
    return log_probs_fn(*arguments)

  update = updates.make_update(
    counting_fn,
    optimizer,
    num_microbatches=num_microbatches,
    objective=HALF,
    mesh=mesh,
  )
  state = updates.make_state(make_params(), optimizer, mesh)
  for seed, (params, loss, norm) in zip((3, 4), expected, strict=True):
    batch = make_batch(seed)
    state, metrics = update(state, arrange(batch) if arrange else batch)
    if seed == 3:
      num_first, num_traces = num_traces, 0
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    assert_close(jax.device_get(state.params), params, atol=2e-5)
  assert int(state.num_updates) == 2
  # The second update is the first one's program.
  assert num_first > 0 and num_traces == 0


def test_a_mesh_shares_out_weights_and_moments_alike():
  mesh = meshes.make_mesh({"fsdp": 2})
  optimizer = make_optimizer()
  state = updates.make_state(make_params(), optimizer, mesh)
  update = updates.make_update(
    log_probs_fn, optimizer, objective=HALF, mesh=mesh
  )
  state, _ = update(state, make_batch())
  split = [
    jax.tree_util.keystr(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    if not leaf.sharding.is_fully_replicated
  ]
  # Each weight of the table with its average and its two moments.
  assert len(split) == 8
  assert all("embedding" in name or "kernel" in name for name in split)


def test_a_state_leaves_an_update_placed_as_it_came():
  """Also where the update itself leans towards another place."""
  mesh = meshes.make_mesh({"fsdp": 2})
  other = NamedSharding(mesh, PartitionSpec("fsdp"))

  def change_fn(gradient, opt_state, params):
    del params
    change = jax.lax.with_sharding_constraint(-gradient["hidden"], other)
    return gradient | {"hidden": change}, opt_state

  optimizer = make_optimizer()._replace(update=change_fn)
  state = updates.make_state(make_params(), optimizer, mesh)
  before = jax.tree.map(lambda x: x.sharding, state)
  state, _ = updates.make_update(
    log_probs_fn, optimizer, objective=HALF, mesh=mesh
  )(state, make_batch())
  for leaf, sharding in zip(
    jax.tree.leaves(state), jax.tree.leaves(before), strict=True
  ):
    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_k_updates_in_one_call_equal_k_calls():
  batches = [make_batch(seed) for seed in range(3)]
  make_state, update = make_shared(2)
  state = make_state()
  rows = []
  for batch in batches:
    state, metrics = update(state, batch)
    rows.append(metrics)
  stacked = jax.tree.map(lambda *x: np.stack(x), *batches)
  for mesh in (None, meshes.make_mesh({"data": 2})):
    optimizer = make_optimizer()
    run = updates.make_updates(
      log_probs_fn,
      optimizer,
      num_microbatches=2,
      objective=HALF,
      mesh=mesh,
    )
    fresh = updates.make_state(make_params(), optimizer, mesh)
    found, metrics = run(fresh, stacked)
    assert_close(jax.device_get(found), jax.device_get(state), atol=2e-5)
    for name in metrics:
      expected = [row[name] for row in rows]
      np.testing.assert_allclose(metrics[name], expected, rtol=1e-4)


def test_metrics_tell_the_parts_and_the_rate():
  make_state, update = make_shared()
  state, first = update(make_state(), make_batch())
  _, second = update(state, make_batch())
  np.testing.assert_allclose(
    first["loss"], first["policy_loss"] + 0.5 * first["value_loss"], rtol=1e-6
  )
  rates = [float(first["learning_rate"]), float(second["learning_rate"])]
  np.testing.assert_allclose(rates, [0.05 / 3, 0.1 / 3], rtol=1e-6)
  assert float(first["is_finite"]) == 1
  assert set(first) == {
    "loss",
    "policy_loss",
    "value_loss",
    "grad_norm",
    "learning_rate",
    "is_finite",
  }


def test_padding_gets_no_gradient():
  """Token 0 stands in the padding only: its embedding must not move."""
  batch = make_batch()
  assert (batch.tokens == 0).sum() > 6
  params = make_params()
  make_state, update = make_shared()
  state, _ = update(make_state(), batch)
  embedding = np.asarray(state.params["trunk"]["embedding"])
  before = np.asarray(params["trunk"]["embedding"])
  np.testing.assert_array_equal(embedding[0], before[0])
  assert np.all(embedding[1:VOCAB] != before[1:VOCAB])


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_a_batch_without_weight_moves_nothing(num_microbatches):
  nothing = np.zeros((ROWS, LENGTH), np.float32)
  batch = make_batch().replace(policy_weights=nothing, value_weights=nothing)
  make_state, update = make_shared(num_microbatches)
  state, metrics = update(make_state(), batch)
  assert float(metrics["loss"]) == 0 and float(metrics["is_finite"]) == 1
  jax.tree.map(np.testing.assert_array_equal, state.params, make_params())


def test_a_gradient_that_is_not_finite_leaves_the_state_as_it_was():
  make_state, update = make_shared()
  state, _ = update(make_state(), make_batch())
  before = jax.device_get(state)
  batch = make_batch(4)
  batch.policy_weights[2, 0] = np.inf
  state, metrics = update(state, batch)
  assert float(metrics["is_finite"]) == 0
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
  state, metrics = update(state, make_batch(4))
  assert float(metrics["is_finite"]) == 1 and int(state.num_updates) == 2


def test_state_is_donated_and_owns_its_params():
  optimizer = make_optimizer()
  params = make_params()
  state = updates.make_state(params, optimizer)
  _, update = make_shared()
  update(state, make_batch())
  assert state.params["hidden"].is_deleted()
  assert not params["hidden"].is_deleted()


def test_rows_that_do_not_divide_are_refused_with_the_numbers():
  optimizer = make_optimizer()
  mesh = meshes.make_mesh({"data": 2})
  update = updates.make_update(
    log_probs_fn, optimizer, objective=HALF, num_microbatches=3, mesh=mesh
  )
  state = updates.make_state(make_params(), optimizer, mesh)
  with pytest.raises(ValueError, match="8 rows .* num_microbatches=3 x 2"):
    update(state, make_batch())


def test_learning_a_fixed_batch_brings_the_loss_down():
  make_state, update = make_shared()
  state = make_state()
  losses = []
  for _ in range(40):
    state, metrics = update(state, make_batch())
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.7 * losses[0]
