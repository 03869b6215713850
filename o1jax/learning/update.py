"""The one update program: rows in, better parameters out.

The denominators of the masked means are sums of weights, and weights are data:
they are taken from the whole batch first. Each microbatch then adds its share
of the numerators already divided, so that the gradients of the microbatches
add up to the gradient of the batch exactly, however uneven the rows are.
Under a mesh the rows are shared out over devices and the same sums run across
them. A batch may have groups of rows of another width: then it is a tuple, and
the sums run over its groups too. The state is donated: the arrays passed in are
gone afterwards.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from o1jax.learning import alphazero
from o1jax.learning.optimizer import Optimizer
from o1jax.mesh import batch_ways, params_sharding, partition_spec
from o1jax.types import LearnerBatch

DATA = "data"

Batch = LearnerBatch | tuple[LearnerBatch, ...]
LogProbsFn = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@struct.dataclass
class TrainState:
  """Everything an update changes.

  Attributes:
    params: parameters of the network.
    average_params: their moving average; what searches and is evaluated.
    opt_state: the optimizer's moments and counts.
    num_updates: scalar int32, updates applied.
  """

  params: Any
  average_params: Any
  opt_state: Any
  num_updates: jax.Array


def make_state(
  params: Any, optimizer: Optimizer, mesh: Mesh | None = None
) -> TrainState:
  """Returns a fresh state that owns copies of `params`.

  Copies, because an update donates its state and the caller may still need
  the parameters it passed in. With a mesh the state is placed on it by the
  sharding table, moments like their weights.
  """
  state = TrainState(
    params=jax.tree.map(jnp.copy, params),
    average_params=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
    num_updates=jnp.zeros((), jnp.int32),
  )
  if mesh is None:
    return state
  return jax.device_put(state, params_sharding(state, mesh))


def make_update(
  log_probs_fn: LogProbsFn,
  optimizer: Optimizer,
  *,
  num_microbatches: int = 1,
  value_coefficient: float = 1.0,
  average_decay: float = 0.0,
  mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
  """Builds the jitted `update(state, batch) -> (state, metrics)`.

  A gradient that is not finite leaves the whole state as it was, `num_updates`
  included, and shows as `is_finite` 0.

  Args:
    log_probs_fn: `(params, tokens [B, T], lengths [B]) -> (log_probs [B, T],
      value_logits [B, T])`; position t holds the log-prob of the token at
      t + 1, and the value after the token at t.
    optimizer: from `make_optimizer`.
    num_microbatches: groups of rows worked off one after the other, which
      bounds the memory of activations.
    value_coefficient: weight of the value loss beside the policy loss.
    average_decay: of the moving average of the parameters; after n updates it
      is at most (1 + n) / (10 + n), so that the start is forgotten. 0 makes
      the average the parameters themselves.
    mesh: where given, rows and state lie on it by the sharding table.

  Returns:
    `update`. Its metrics are float32 scalars: loss, policy_loss, value_loss,
    grad_norm (before clipping), learning_rate, is_finite. It raises ValueError
    where the rows do not divide over microbatches and devices.
  """
  step = _make_step(
    log_probs_fn,
    optimizer,
    num_microbatches,
    value_coefficient,
    average_decay,
    mesh,
  )
  return _jit(step, mesh, ("batch",))


def make_updates(
  log_probs_fn: LogProbsFn,
  optimizer: Optimizer,
  *,
  num_microbatches: int = 1,
  value_coefficient: float = 1.0,
  average_decay: float = 0.0,
  mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
  """As `make_update`, for K updates in one call.

  Batch and metrics carry a leading axis K; the state is that after the last.
  """
  step = _make_step(
    log_probs_fn,
    optimizer,
    num_microbatches,
    value_coefficient,
    average_decay,
    mesh,
  )

  def steps(state, batches):
    return jax.lax.scan(step, state, batches)

  return _jit(steps, mesh, (None, "batch"))


def _jit(fn, mesh, logical_axes):
  if mesh is None:
    return jax.jit(fn, donate_argnums=0)
  rows = NamedSharding(mesh, partition_spec(logical_axes))
  # None: the state lies on the mesh already (`make_state`).
  return jax.jit(fn, donate_argnums=0, in_shardings=(None, rows))


def _make_step(
  log_probs_fn,
  optimizer,
  num_microbatches,
  value_coefficient,
  average_decay,
  mesh,
):
  """The update as a pure function; arguments as in `make_update`."""
  num_ways = 1 if mesh is None else batch_ways(mesh)
  # Where weights are whole on every device, each works off its own microbatches
  # and the sums meet once; XLA would let them meet at every microbatch.
  is_whole = mesh is not None and mesh.shape["data"] == mesh.size

  def split(array):
    # Microbatch m takes rows m, m + M, ...: each device keeps its own rows.
    rows = array.reshape(-1, num_microbatches, *array.shape[1:])
    rows = jnp.swapaxes(rows, 0, 1)
    if mesh is None or is_whole:
      return rows
    sharding = NamedSharding(mesh, partition_spec((None, "batch")))
    return jax.lax.with_sharding_constraint(rows, sharding)

  def loss_sums(params, rows):
    log_probs, value_logits = log_probs_fn(params, rows.tokens, rows.lengths)
    return alphazero.alphazero_loss(
      log_probs,
      rows.policy_weights,
      value_logits,
      rows.value_targets,
      rows.value_weights,
    )

  def scaled_loss(params, rows, policy_scale, value_scale):
    sums = [loss_sums(params, group) for group in _groups(rows)]
    policy_loss = policy_scale * _summed(s.policy_sum for s in sums)
    value_loss = value_scale * _summed(s.value_sum for s in sums)
    loss = policy_loss + value_coefficient * value_loss
    return loss, (policy_loss, value_loss)

  grad_fn = jax.grad(scaled_loss, has_aux=True)

  def gradient(params, batch, *scales):
    """Of the rows at hand, one microbatch after the other."""
    if num_microbatches == 1:
      return grad_fn(params, batch, *scales)

    def add_microbatch(total, rows):
      return jax.tree.map(jnp.add, total, grad_fn(params, rows, *scales)), None

    microbatches = jax.tree.map(split, batch)
    first = jax.tree.map(lambda rows: rows[0], microbatches)
    shapes = jax.eval_shape(grad_fn, params, first, *scales)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add_microbatch, nothing, microbatches)[0]

  def whole_gradient(params, batch):
    scales = [
      _inverse(_summed(getattr(group, name).sum() for group in _groups(batch)))
      for name in ("policy_weights", "value_weights")
    ]
    if not is_whole:
      return gradient(params, batch, *scales)

    def shared(params, batch, *scales):
      return jax.lax.psum(gradient(params, batch, *scales), DATA)

    whole, rows = PartitionSpec(), PartitionSpec(DATA)
    return jax.shard_map(
      shared,
      mesh=mesh,
      in_specs=(whole, rows, whole, whole),
      out_specs=whole,
      check_vma=False,
    )(params, batch, *scales)

  def step(state, batch):
    for group in _groups(batch):
      num_rows = group.tokens.shape[0]
      if num_rows % (num_microbatches * num_ways):
        raise ValueError(
          f"a batch of {num_rows} rows does not divide over "
          f"num_microbatches={num_microbatches} x {num_ways} devices"
        )
    grads, (policy_loss, value_loss) = whole_gradient(state.params, batch)
    loss = policy_loss + value_coefficient * value_loss
    grad_norm = optax.tree.norm(grads)
    is_finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, changes)
    count = state.num_updates.astype(jnp.float32)
    kept = jnp.minimum(average_decay, (1 + count) / (10 + count))
    moved = TrainState(
      params=params,
      average_params=jax.tree.map(
        lambda old, new: (kept * old + (1 - kept) * new).astype(new.dtype),
        state.average_params,
        params,
      ),
      opt_state=opt_state,
      num_updates=state.num_updates + 1,
    )
    metrics = {
      "loss": loss,
      "policy_loss": policy_loss,
      "value_loss": value_loss,
      "grad_norm": grad_norm,
      "learning_rate": optimizer.schedule(state.num_updates),
      "is_finite": is_finite.astype(jnp.float32),
    }
    state = jax.tree.map(
      lambda new, old: jnp.where(is_finite, new, old), moved, state
    )
    if mesh is not None:
      # Out as it came in: else the next call would compile once more.
      state = jax.lax.with_sharding_constraint(
        state, params_sharding(state, mesh)
      )
    return state, metrics

  return step


def _groups(batch: Batch) -> tuple[LearnerBatch, ...]:
  """The groups of a batch, which may be one."""
  return batch if isinstance(batch, tuple) else (batch,)


def _summed(numbers: Iterable[jax.Array]) -> jax.Array:
  """Their sum; that of one number is that number itself."""
  return functools.reduce(jnp.add, numbers)


def _inverse(total):
  """1 / total weight, or 0 where nothing has weight: the loss is then 0."""
  return jnp.where(total == 0, 0, 1 / jnp.where(total == 0, 1, total))
