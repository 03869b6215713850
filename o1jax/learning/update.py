"""The one update program: rows in, better parameters out.

The denominators of the masked means are sums of weights, and weights are data:
they are taken from the whole batch first. Each microbatch then adds its share
of the numerators already divided, so that the gradients of the microbatches
add up to the gradient of the batch exactly, however uneven the rows are.
Under a mesh the rows are shared out over devices and the same sums run across
them. A batch may have groups of rows of another width or kind: then it is a
tuple, and the sums run over its groups too; `objective` says what each kind is
learned from. The state is donated: the arrays passed in are gone afterwards.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from o1jax.learning import objective as objective_lib
from o1jax.learning.objective import Group, LogProbsFn, Objective
from o1jax.learning.optimizer import Optimizer
from o1jax.mesh import batch_ways, params_sharding, partition_spec
from o1jax.value_bins import value_of

DATA = "data"

Batch = Group | tuple[Group, ...]


@struct.dataclass
class TrainState:
  """Everything an update changes.

  Attributes:
    params: parameters of the network.
    average_params: their moving average; what searches and is evaluated.
    opt_state: the optimizer's moments and counts.
    num_updates: scalar int32, updates applied.
    reference_params: what divergences and preferences are measured against; an
      update leaves them alone. None where nothing reads them.
  """

  params: Any
  average_params: Any
  opt_state: Any
  num_updates: jax.Array
  reference_params: Any = None


def make_state(
  params: Any,
  optimizer: Optimizer,
  mesh: Mesh | None = None,
  *,
  has_reference: bool = False,
) -> TrainState:
  """Returns a fresh state that owns copies of `params`.

  With `has_reference` they are the first reference too.

  Copies, because an update donates its state and the caller may still need
  the parameters it passed in. With a mesh the state is placed on it by the
  sharding table, moments like their weights.
  """
  state = TrainState(
    params=jax.tree.map(jnp.copy, params),
    average_params=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
    num_updates=jnp.zeros((), jnp.int32),
    reference_params=jax.tree.map(jnp.copy, params) if has_reference else None,
  )
  if mesh is None:
    return state
  return jax.device_put(state, params_sharding(state, mesh))


def with_reference(state: TrainState) -> TrainState:
  """The state whose reference is its moving average, what searches."""
  return state.replace(
    reference_params=jax.tree.map(jnp.copy, state.average_params)
  )


def make_update(
  log_probs_fn: LogProbsFn,
  optimizer: Optimizer,
  *,
  objective: Objective,
  num_microbatches: int = 1,
  average_decay: float = 0.0,
  learning_rate_scale: float = 1.0,
  mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
  """Builds the jitted `update(state, batch) -> (state, metrics)`.

  A gradient that is not finite leaves the whole state as it was, `num_updates`
  included, and shows as `is_finite` 0.

  Args:
    log_probs_fn: `(params, tokens [B, T], lengths [B]) -> (log_probs [B, T],
      value_logits [B, T])`; position t holds the log-prob of the token at
      t + 1, and the value after the token at t. In bins the value's logits are
      `[B, T, K]`. With an entropy bonus it returns the entropy of the next
      token, `[B, T]`, as well. Of groups of packed rows it is told more, see
      `objective.sums`.
    optimizer: from `make_optimizer`.
    objective: what each kind of rows is learned from.
    num_microbatches: groups of rows worked off one after the other, which
      bounds the memory of activations.
    average_decay: of the moving average of the parameters; after n updates it
      is at most (1 + n) / (10 + n), so that the start is forgotten. 0 makes
      the average the parameters themselves.
    learning_rate_scale: what the schedule's rate is multiplied by.
    mesh: where given, rows and state lie on it by the sharding table.

  Returns:
    `update`. Its metrics are float32 scalars: loss, NAME_loss of each term that
    the groups have, grad_norm (before clipping), learning_rate, is_finite; of
    rows with advantages max_ratio, min_ratio, effective_share (Kong's effective
    sample size over the number of tokens), kl_to_reference, kl_to_behavior,
    entropy and clip_share or truncated_share; of pairs preference_accuracy,
    preference_margin and the two rewards. It raises ValueError where the rows
    do not divide over microbatches and devices.
  """
  step = _make_step(
    log_probs_fn,
    optimizer,
    objective,
    num_microbatches,
    average_decay,
    learning_rate_scale,
    mesh,
  )
  return _jit(step, mesh, ("batch",))


def make_updates(
  log_probs_fn: LogProbsFn,
  optimizer: Optimizer,
  *,
  objective: Objective,
  num_microbatches: int = 1,
  average_decay: float = 0.0,
  learning_rate_scale: float = 1.0,
  mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
  """As `make_update`, for K updates in one call.

  Batch and metrics carry a leading axis K; the state is that after the last.
  """
  step = _make_step(
    log_probs_fn,
    optimizer,
    objective,
    num_microbatches,
    average_decay,
    learning_rate_scale,
    mesh,
  )

  def steps(state, batches):
    return jax.lax.scan(step, state, batches)

  return _jit(steps, mesh, (None, "batch"))


def make_score(
  log_probs_fn: LogProbsFn, *, mesh: Mesh | None = None
) -> Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """Builds the jitted `score(params, tokens, lengths) -> (log_probs, values)`.

  What the trainer itself says of rows, `[B, T]` each, before it learns from
  them: log-probs of the tokens that follow, and values in [0, 1]. Rows are
  shared out over the mesh, if any; any number of them, for empty ones fill up
  what the devices lack.
  """

  def score(params, tokens, lengths):
    log_probs, value_logits, *_ = log_probs_fn(params, tokens, lengths)
    return log_probs, value_of(value_logits, tokens.ndim)

  if mesh is None:
    return jax.jit(score)
  num_ways = batch_ways(mesh)
  rows = NamedSharding(mesh, partition_spec(("batch",)))
  shared = jax.jit(score, in_shardings=(None, rows, rows), out_shardings=rows)

  def padded(params, tokens, lengths):
    count = tokens.shape[0]
    missing = -count % num_ways
    if not missing:
      return shared(params, tokens, lengths)
    tokens = jnp.pad(tokens, ((0, missing), (0, 0)))
    found = shared(params, tokens, jnp.pad(lengths, (0, missing)))
    return jax.tree.map(lambda array: array[:count], found)

  return padded


def make_gradient(
  log_probs_fn: LogProbsFn, *, objective: Objective, mesh: Mesh | None = None
) -> Callable[[Any, Batch], jax.Array]:
  """Builds the jitted `gradient(params, batch)`: one flat array, `[params]`.

  What an update would follow, before clipping; for measuring its variance.
  """
  whole_gradient = _make_gradient(log_probs_fn, objective, 1, mesh)

  def gradient(params, batch):
    (grads, _), _ = whole_gradient(params, batch)
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads)])

  if mesh is None:
    return jax.jit(gradient)
  rows = NamedSharding(mesh, partition_spec(("batch",)))
  return jax.jit(gradient, in_shardings=(None, rows))


def _jit(fn, mesh, logical_axes):
  if mesh is None:
    return jax.jit(fn, donate_argnums=0)
  rows = NamedSharding(mesh, partition_spec(logical_axes))
  # None: the state lies on the mesh already (`make_state`).
  return jax.jit(fn, donate_argnums=0, in_shardings=(None, rows))


def _make_gradient(log_probs_fn, objective, num_microbatches, mesh):
  """`(params, batch) -> ((gradient, numbers), maxima)`, all of them whole."""
  # Where weights are whole on every device, each works off its own microbatches
  # and the sums meet once; XLA would let them meet at every microbatch.
  is_whole = mesh is not None and mesh.shape["data"] == mesh.size
  coefficients = objective.coefficients()

  def split(array):
    # Microbatch m takes rows m, m + M, ...: each device keeps its own rows.
    rows = array.reshape(-1, num_microbatches, *array.shape[1:])
    rows = jnp.swapaxes(rows, 0, 1)
    if mesh is None or is_whole:
      return rows
    sharding = NamedSharding(mesh, partition_spec((None, "batch")))
    return jax.lax.with_sharding_constraint(rows, sharding)

  def scaled_loss(params, rows, scales):
    sums = [
      objective_lib.sums(objective, log_probs_fn, params, group)
      for group in _groups(rows)
    ]
    terms = _scaled(_added(s.terms for s in sums), scales)
    loss = _summed(coefficients[name] * term for name, term in terms.items())
    metrics = _added(
      _scaled(values, dict.fromkeys(values, scales[term]))
      for s in sums
      for term, values in s.metrics.items()
    )
    maxima = _merged(jnp.maximum, (s.maxima for s in sums))
    return loss, ((terms, metrics), jax.lax.stop_gradient(maxima))

  grad_fn = jax.grad(scaled_loss, has_aux=True)

  def gradient(params, batch, scales):
    """Of the rows at hand, one microbatch after the other.

    Returns:
      `(sums, maxima)`; sums are the gradient and the scaled numbers.
    """

    def of_rows(rows):
      grads, (numbers, maxima) = grad_fn(params, rows, scales)
      return (grads, numbers), maxima

    if num_microbatches == 1:
      return of_rows(batch)

    def add_microbatch(total, rows):
      sums, maxima = of_rows(rows)
      total_sums, total_maxima = total
      sums = jax.tree.map(jnp.add, total_sums, sums)
      return (sums, jax.tree.map(jnp.maximum, total_maxima, maxima)), None

    microbatches = jax.tree.map(split, batch)
    first = jax.tree.map(lambda rows: rows[0], microbatches)
    sums, maxima = jax.eval_shape(of_rows, first)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    lowest = jax.tree.map(
      lambda x: jnp.full(x.shape, -jnp.inf, x.dtype), maxima
    )
    return jax.lax.scan(add_microbatch, (nothing, lowest), microbatches)[0]

  def whole_gradient(params, batch):
    totals = _added(objective_lib.weights(group) for group in _groups(batch))
    scales = jax.tree.map(_inverse, totals)
    if not is_whole:
      return gradient(params, batch, scales)

    def shared(params, batch, scales):
      sums, maxima = gradient(params, batch, scales)
      return jax.lax.psum(sums, DATA), jax.lax.pmax(maxima, DATA)

    whole, rows = PartitionSpec(), PartitionSpec(DATA)
    return jax.shard_map(
      shared,
      mesh=mesh,
      in_specs=(whole, rows, whole),
      out_specs=whole,
      check_vma=False,
    )(params, batch, scales)

  return whole_gradient


def _make_step(
  log_probs_fn,
  optimizer,
  objective,
  num_microbatches,
  average_decay,
  learning_rate_scale,
  mesh,
):
  """The update as a pure function; arguments as in `make_update`."""
  num_ways = 1 if mesh is None else batch_ways(mesh)
  coefficients = objective.coefficients()
  whole_gradient = _make_gradient(
    log_probs_fn, objective, num_microbatches, mesh
  )

  def step(state, batch):
    for group in _groups(batch):
      num_rows = group.tokens.shape[0]
      if num_rows % (num_microbatches * num_ways):
        raise ValueError(
          f"a batch of {num_rows} rows does not divide over "
          f"num_microbatches={num_microbatches} x {num_ways} devices"
        )
    (grads, (terms, means)), maxima = whole_gradient(state.params, batch)
    loss = _summed(coefficients[name] * term for name, term in terms.items())
    grad_norm = optax.tree.norm(grads)
    is_finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)

    def moved(state):
      changes, opt_state = optimizer.update(
        grads, state.opt_state, state.params
      )
      if learning_rate_scale != 1:
        changes = optax.tree.scale(learning_rate_scale, changes)
      params = optax.apply_updates(state.params, changes)
      count = state.num_updates.astype(jnp.float32)
      kept = jnp.minimum(average_decay, (1 + count) / (10 + count))
      return state.replace(
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
      **_named(terms, means, maxima),
      "grad_norm": grad_norm,
      "learning_rate": learning_rate_scale
      * optimizer.schedule(state.num_updates),
      "is_finite": is_finite.astype(jnp.float32),
    }
    # A branch, not a choice between two whole states: XLA then writes each
    # array once and in place, and computes no moment again for who reads it.
    state = jax.lax.cond(is_finite, moved, lambda same: same, state)
    if mesh is not None:
      # Out as it came in: else the next call would compile once more.
      state = jax.lax.with_sharding_constraint(
        state, params_sharding(state, mesh)
      )
    return state, metrics

  return step


def _groups(batch: Batch) -> tuple[Group, ...]:
  """The groups of a batch, which may be one."""
  return batch if isinstance(batch, tuple) else (batch,)


def _summed(numbers: Iterable[jax.Array]) -> jax.Array:
  """Their sum; that of one number is that number itself."""
  return functools.reduce(operator.add, numbers)


def _merged(merge: Callable, dicts: Iterable[Mapping[str, Any]]) -> dict:
  """One dict, in which what stands under one name is merged."""
  found: dict[str, Any] = {}
  for numbers in dicts:
    for name, number in numbers.items():
      found[name] = merge(found[name], number) if name in found else number
  return found


_added = functools.partial(_merged, jnp.add)


def _scaled(numbers: Mapping[str, jax.Array], scales) -> dict[str, jax.Array]:
  return {name: scales[name] * number for name, number in numbers.items()}


def _named(terms, means, maxima) -> dict[str, jax.Array]:
  """The numbers of all groups under the names that are reported."""
  named = {f"{name}_loss": term for name, term in terms.items()}
  named |= means
  if "ratio" in means:
    # (sum w)^2 / sum w^2 over the number of tokens (Kong, 1992).
    square = named.pop("ratio_square")
    share = jnp.square(named.pop("ratio")) / jnp.where(square == 0, 1, square)
    named["effective_share"] = share
    named["max_ratio"] = maxima["max_ratio"]
    named["min_ratio"] = -maxima["negative_min_ratio"]
  return named


def _inverse(total):
  """1 / total weight, or 0 where nothing has weight: the loss is then 0."""
  return jnp.where(total == 0, 0, 1 / jnp.where(total == 0, 1, total))
