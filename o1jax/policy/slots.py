"""Rows of a program, and how they come and go while it runs.

`generate` drives programs of fixed size from the host. Here are the moves: rows
start, run for a while, get longer caches, move together into a smaller program
when half of them have finished, and give their slots to rows that wait.

On a mesh every device decodes its own rows in a loop of its own: nothing is
exchanged before the host's next turn.

Rows that start together share their problem's prefix and write at one slot.
Where rows wait, a slot belongs to a single row: it holds a copy of the prefix
of the row's problem (a prompt is read once all the same), and each row writes
at its own length. So a slot is free as soon as its row has finished, whatever
the other rows of the problem do.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from o1jax import mesh as mesh_lib
from o1jax.policy.cache import grow, make_cache, prefix_from_prompt
from o1jax.policy.sample import RowState, row_uniforms, run_rows, start_rows

SMALLEST = 8  # rows below which a smaller program gains nothing
ROW_FIELDS = ("tokens", "behavior_log_probs", "policy_log_probs")


@dataclasses.dataclass
class Run:
  """Rows on the device, and where they come from.

  `problem` `[B']` and `row` `[B', G']` name the place of each row in the
  result; rows that only fill a power of two are never alive.
  """

  state: RowState
  uniforms: jax.Array
  next_positions: jax.Array
  problem: np.ndarray
  row: np.ndarray

  @property
  def is_full(self) -> bool:
    """Whether a row that goes on has no slot left in the cache."""
    state = self.state
    used = np.where(np.asarray(state.is_alive), np.asarray(state.lengths), 0)
    return int(used.max()) >= state.cache.capacity


# Programs of the module, not of a generator: two generators of one network
# that differ in what stops a row share what is compiled.


@functools.partial(
  jax.jit, static_argnames=("network", "cache_dtype", "prefill_chunk")
)
def read_prompts(network, params, tokens, lengths, cache_dtype, prefill_chunk):
  """See `cache.prefix_from_prompt`."""
  return prefix_from_prompt(
    network,
    params,
    tokens,
    lengths,
    cache_dtype=cache_dtype,
    prefill_chunk=prefill_chunk,
  )


@functools.partial(
  jax.jit,
  static_argnames=(
    "num_rows",
    "capacity",
    "max_new_tokens",
    "pad_id",
    "is_ragged",
  ),
)
def _blank_state(
  prefix, last_hidden, num_rows, capacity, max_new_tokens, pad_id, is_ragged
):
  rows = (last_hidden.shape[0], num_rows)
  cache = make_cache(prefix, num_rows=num_rows, capacity=capacity)
  hidden = jnp.broadcast_to(
    last_hidden[:, None], (*rows, last_hidden.shape[-1])
  )
  alive = jnp.full(rows, not is_ragged)
  return start_rows(cache, hidden, alive, max_new_tokens, pad_id, is_ragged)


_uniforms_of = jax.jit(row_uniforms, static_argnums=1)


@functools.partial(
  jax.jit,
  static_argnames=(
    "network",
    "capacity",
    "max_new_tokens",
    "pad_id",
    "cache_dtype",
    "prefill_chunk",
    "mesh",
  ),
)
def _read_and_start(
  network,
  params,
  keys,
  tokens,
  lengths,
  capacity,
  max_new_tokens,
  pad_id,
  cache_dtype,
  prefill_chunk,
  mesh=None,
):
  def run(params, keys, tokens, lengths):
    prompts = read_prompts(
      network, params, tokens, lengths, cache_dtype, prefill_chunk
    )
    state = _blank_state(
      *prompts, keys.shape[1], capacity, max_new_tokens, pad_id, False
    )
    return state, row_uniforms(keys, max_new_tokens)

  given = (params, keys, tokens, lengths)
  if mesh is None:
    return run(*given)
  batch, whole = mesh_lib.batch_sharding(mesh).spec, PartitionSpec()
  state_specs = _state_specs(jax.eval_shape(run, *given)[0], batch)
  return jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(whole, batch, batch, batch),
    out_specs=(state_specs, batch),
    check_vma=False,
  )(*given)


def start_together(network, params, keys, tokens, lengths, **sizes) -> Run:
  """All rows of all problems, in one program.

  Args:
    network: the network.
    params: its parameters.
    keys: `[B, G]`.
    tokens: `[B, P]` prompts.
    lengths: `[B]`.
    **sizes: capacity, max_new_tokens and pad_id, how prompts are read (see
      `read_prompts`), and the mesh or None.
  """
  batch, num_rows = keys.shape
  state, uniforms = _read_and_start(
    network, params, keys, tokens, lengths, **sizes
  )
  return Run(
    state,
    uniforms,
    jnp.asarray(lengths),
    np.arange(batch),
    np.tile(np.arange(num_rows), (batch, 1)),
  )


@functools.partial(
  jax.jit,
  static_argnames=("network", "eos_id", "pad_id", "mesh"),
)
def advance(
  network,
  params,
  state,
  uniforms,
  next_positions,
  end,
  controls,
  min_alive,
  eos_id,
  pad_id,
  mesh=None,
):
  """See `sample.run_rows`; on a mesh `min_alive` is of each device's rows."""

  def run(params, state, uniforms, next_positions, end, controls, min_alive):
    state = run_rows(
      network,
      params,
      state,
      uniforms,
      next_positions,
      end=end,
      stop_ids=(),
      eos_id=eos_id,
      pad_id=pad_id,
      controls=controls,
      min_alive=min_alive,
    )
    if mesh is None:
      return state
    # Devices whose rows have all ended are behind; nothing is written there.
    index = jax.lax.pmax(state.index, mesh_lib.TABLE["batch"])
    return state.replace(index=index)

  run_fn = run
  if mesh is not None:
    batch, whole = mesh_lib.batch_sharding(mesh).spec, PartitionSpec()
    specs = _state_specs(state, batch)
    run_fn = jax.shard_map(
      run,
      mesh=mesh,
      in_specs=(whole, specs, batch, batch, whole, whole, whole),
      out_specs=specs,
      check_vma=False,
    )
  return run_fn(
    params, state, uniforms, next_positions, end, controls, min_alive
  )


def _state_specs(state, batch):
  """All arrays of a state begin with the problems, but for its counter."""
  return jax.tree.map(lambda _: batch, state).replace(index=PartitionSpec())


def placed(run: Run, mesh: Mesh | None) -> Run:
  """The run with its problems shared out over the mesh, if there is one."""
  if mesh is None:
    return run
  batch = mesh_lib.batch_sharding(mesh)
  shardings = jax.tree.map(
    lambda spec: NamedSharding(mesh, spec), _state_specs(run.state, batch.spec)
  )
  return dataclasses.replace(
    run,
    state=jax.device_put(run.state, shardings),
    uniforms=jax.device_put(run.uniforms, batch),
    next_positions=jax.device_put(run.next_positions, batch),
  )


_grow = jax.jit(grow, static_argnums=1)


def grown(run: Run, capacity: int) -> Run:
  """The run with room for `capacity` tokens a row."""
  cache = _grow(run.state.cache, capacity)
  return dataclasses.replace(run, state=run.state.replace(cache=cache))


class Queue:
  """Rows that wait for a slot, problem by problem.

  Prompts are read as they are due, as many at a time as there are slots, each
  once; `num_waiting` counts the rows left.
  """

  def __init__(
    self, read_fn, keys, tokens, lengths, *, num_slots, max_new_tokens, pad_id
  ):
    self._read_fn = read_fn
    self._prompts = np.asarray(tokens), np.asarray(lengths)
    self._uniforms = _uniforms_of(keys, max_new_tokens)
    self._num_slots = num_slots
    self._group_size = min(num_slots, len(tokens))
    self._max_new_tokens, self._pad_id = max_new_tokens, pad_id
    self._places = np.indices(keys.shape).reshape(2, -1).T
    self._group = None  # of the problems whose prompts are at hand
    self._read = None

  @property
  def num_waiting(self) -> int:
    """Rows that have no slot yet."""
    return len(self._places)

  def start(self, capacity: int) -> Run:
    """A run of empty slots."""
    self._read_group(0)
    nobody = np.zeros(self._num_slots, np.int32)
    anything = jax.tree.map(lambda x: x[nobody], self._read[:2])
    state = _blank_state(
      *anything, 1, capacity, self._max_new_tokens, self._pad_id, True
    )
    return Run(
      state,
      self._uniforms[nobody, nobody][:, None],
      jnp.zeros(self._num_slots, jnp.int32),
      nobody,
      nobody[:, None],
    )

  def fill(self, run: Run, is_free: np.ndarray) -> Run:
    """Gives slots where `is_free` `[W]` to rows that wait, first come first."""
    free = np.nonzero(is_free)[0]
    while free.size and self.num_waiting:
      self._read_group(self._places[0, 0] // self._group_size)
      same = self._places[:, 0] // self._group_size == self._group
      count = min(free.size, int(same.sum()))
      problem, row = self._places[:count].T
      self._places = self._places[count:]
      run = self._put(run, free[:count], problem, row)
      free = free[count:]
    return run

  def _read_group(self, group):
    """Reads the prompts of a group of problems; the last is filled up."""
    if group == self._group:
      return
    tokens, lengths = self._prompts
    index = group * self._group_size + np.arange(self._group_size)
    index = np.minimum(index, len(tokens) - 1)
    own = jnp.asarray(lengths[index])
    self._read = (*self._read_fn(jnp.asarray(tokens[index]), own), own)
    self._group = group

  def _put(self, run, slots, problem, row):
    """Rows `(problem, row)` begin in `slots`."""
    source = np.full(self._num_slots, -1, np.int32)
    source[slots] = problem % self._group_size
    run = dataclasses.replace(
      run, problem=run.problem.copy(), row=run.row.copy()
    )
    run.problem[slots], run.row[slots, 0] = problem, row
    place = (run.problem[:, None], run.row)
    run.state, run.uniforms, run.next_positions = _begin_in(
      (run.state, run.uniforms, run.next_positions),
      self._read,
      self._uniforms,
      source,
      place,
      self._pad_id,
    )
    return run


@jax.jit
def _begin_in(arrays, read, all_uniforms, source, place, pad_id):
  """Slots with `source >= 0` begin the row `place` behind prompt `source`."""
  is_new = source >= 0

  def choose(new, old):
    shape = (source.size,) + (1,) * (old.ndim - 1)
    return jnp.where(is_new.reshape(shape), new, old)

  def from_prompt(new, old):
    return choose(new[source], old)

  state, uniforms, next_positions = arrays
  prefix, last_hidden, lengths = read
  state = state.replace(
    cache=state.cache.replace(
      prefix=jax.tree.map(from_prompt, prefix, state.cache.prefix),
      suffix_lengths=choose(0, state.cache.suffix_lengths),
    ),
    hidden=from_prompt(last_hidden[:, None], state.hidden),
    is_alive=choose(True, state.is_alive),
    ended=choose(False, state.ended),
    stopped=choose(False, state.stopped),
    lengths=choose(0, state.lengths),
    tokens=choose(pad_id, state.tokens),
    behavior_log_probs=choose(0.0, state.behavior_log_probs),
    policy_log_probs=choose(0.0, state.policy_log_probs),
  )
  return (
    state,
    choose(all_uniforms[place], uniforms),
    from_prompt(lengths, next_positions),
  )


def shrunk(run: Run, alive: np.ndarray, num_ways: int) -> Run | None:
  """The run with only the rows alive, if that fits half the size; or None.

  Problems divide over `num_ways` devices, before and after.
  """
  counts = alive.sum(1)
  keep = np.nonzero(counts)[0]
  num_problems = num_ways * power_of_two(-(-len(keep) // num_ways))
  num_rows = min(power_of_two(counts.max()), alive.shape[1])
  if num_problems * num_rows * 2 > alive.size or alive.size <= SMALLEST:
    return None
  # Rows that only fill the shape copy row 0 and are not alive.
  problem = np.zeros(num_problems, np.int32)
  row = np.zeros((num_problems, num_rows), np.int32)
  is_alive = np.zeros(row.shape, bool)
  for i, b in enumerate(keep):
    found = np.nonzero(alive[b])[0]
    problem[i] = b
    row[i, : len(found)] = found
    is_alive[i, : len(found)] = True
  state, uniforms, next_positions = _take(
    (run.state, run.uniforms, run.next_positions), problem, row, is_alive
  )
  return Run(
    state,
    uniforms,
    next_positions,
    run.problem[problem],
    run.row[problem[:, None], row],
  )


@jax.jit
def _take(arrays, problem, row, is_alive):
  """Rows `row` `[B', G']` of problems `problem` `[B']`."""
  state, uniforms, next_positions = arrays

  def rows(tree):
    return jax.tree.map(lambda x: x[problem[:, None], row], tree)

  cache = state.cache
  flat = cache.keys[0].shape[1:]

  def suffix(x):
    whole = x.reshape(*cache.suffix_lengths.shape, *flat)
    return rows(whole).reshape(-1, *flat)

  taken = rows(state.replace(index=None, cache=None)).replace(
    index=state.index,
    cache=cache.replace(
      prefix=jax.tree.map(lambda x: x[problem], cache.prefix),
      keys=tuple(map(suffix, cache.keys)),
      values=tuple(map(suffix, cache.values)),
      suffix_lengths=rows(cache.suffix_lengths),
    ),
    is_alive=is_alive,
  )
  return taken, rows(uniforms), next_positions[problem]


def power_of_two(count: int) -> int:
  """The least power of two that is not below `count`."""
  return 1 << max(0, int(count) - 1).bit_length()


def store(result: dict[str, np.ndarray], run: Run) -> None:
  """Copies what the rows have so far to their places.

  A row that only fills the shape carries an earlier row's tokens, so nothing
  wrong is written; where a live row goes to the same place, the longer wins.
  """
  place = (run.problem[:, None], run.row)
  names = (*ROW_FIELDS, "lengths", "ended")
  rows = jax.device_get({name: getattr(run.state, name) for name in names})
  lengths = rows["lengths"]
  order = np.argsort(lengths, axis=None, kind="stable")
  place = tuple(
    np.broadcast_to(p, lengths.shape).reshape(-1)[order] for p in place
  )
  for name, array in rows.items():
    result[name][place] = array.reshape(-1, *array.shape[2:])[order]
