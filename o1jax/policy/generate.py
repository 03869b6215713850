"""Whole continuations of prompts, driven from the host.

`decode_rows` is one program of fixed size. Long solutions of uneven length want
more: the cache grows from segment to segment, because attention reads every
slot, used or not; and when half of the rows have finished, the others move
together into a program of half the size (sizes are powers of two, so there are
few). Rows keep the numbers they draw with, so the tokens are those that
`decode_rows` would give.

Stop strings are looked for in the text, whatever pieces spell them: a table
over the vocabulary tells which pieces can complete one, and only rows that drew
such a piece are read. A row that ran past its stop string, to the end of its
segment at most, is cut back.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from o1jax.policy.cache import grow, make_cache, prefix_from_prompt
from o1jax.policy.network import Network
from o1jax.policy.sample import RowState, row_uniforms, run_rows, start_rows

Params = Any
SMALLEST = 8  # rows below which a smaller program gains nothing
ROW_FIELDS = ("tokens", "behavior_log_probs", "policy_log_probs")


@dataclasses.dataclass(frozen=True)
class Generated:
  """Continuations on the host; NumPy arrays of G rows for each of B prompts.

  Attributes:
    tokens: `[B, G, S]` int32, pad after the end.
    lengths: `[B, G]` int32, with the end token or the piece that completes a
      stop string.
    behavior_log_probs: `[B, G, S]` under the distribution drawn from.
    policy_log_probs: `[B, G, S]` under the policy itself.
    ended: `[B, G]` True where the last token is the end token.
    stopped: `[B, G]` True where a stop string was found.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  behavior_log_probs: np.ndarray
  policy_log_probs: np.ndarray
  ended: np.ndarray
  stopped: np.ndarray


@dataclasses.dataclass
class _Run:
  """Rows on the device, and where they come from.

  `problem` `[B']` and `row` `[B', G']` name the place of each row in the
  result; rows that only fill a power of two are never alive.
  """

  state: RowState
  uniforms: jax.Array
  next_positions: jax.Array
  problem: np.ndarray
  row: np.ndarray


def make_generate(
  network: Network,
  *,
  num_rows: int,
  max_new_tokens: int,
  eos_id: int,
  pad_id: int,
  stop_texts: Sequence[str] = (),
  pieces: Sequence[bytes] | None = None,
  segment: int = 32,
  min_problems: int = 1,
) -> Callable[..., Generated]:
  """Builds `(params, keys [B, G], tokens [B, P], lengths [B], controls)`.

  Args:
    network: the network.
    num_rows: G, samples of each prompt.
    max_new_tokens: S.
    eos_id: the token that ends a row.
    pad_id: fills rows after their end.
    stop_texts: strings that end a row as well.
    pieces: bytes of every token, `[V]`; needed with `stop_texts`.
    segment: slots by which the cache grows.
    min_problems: never fewer problems than this in a program, so that they
      divide over the devices of a mesh.

  Raises:
    ValueError: stop strings without pieces, or a size below 1.
  """
  for name, size in (
    ("num_rows", num_rows),
    ("max_new_tokens", max_new_tokens),
    ("segment", segment),
    ("min_problems", min_problems),
  ):
    if size < 1:
      raise ValueError(f"{name}={size} must be 1 or more")
  stops = tuple(text.encode() for text in stop_texts if text)
  if stops and pieces is None:
    raise ValueError("stop_texts needs pieces: pass the tokenizer's pieces")
  find_stop = _make_find_stop(stops, pieces) if stops else None
  first_capacity = min(segment, max_new_tokens)

  def generate(params, keys, tokens, lengths, controls):
    if keys.shape != (tokens.shape[0], num_rows):
      raise ValueError(
        f"keys of shape {keys.shape} for {tokens.shape[0]} prompts of "
        f"{num_rows} rows: give one key per row"
      )
    batch = tokens.shape[0]
    state, uniforms = _begin(
      network,
      params,
      keys,
      tokens,
      lengths,
      pad_id,
      first_capacity,
      max_new_tokens,
    )
    run = _Run(
      state,
      uniforms,
      jnp.asarray(lengths),
      np.arange(batch),
      np.tile(np.arange(num_rows), (batch, 1)),
    )
    result = _blank((batch, num_rows), max_new_tokens, pad_id)
    can_shrink = True
    while True:
      capacity = run.state.cache.capacity
      rows = run.row.size
      least = rows // 2 + 1 if can_shrink and rows > SMALLEST else 1
      run.state = _advance(
        network,
        params,
        run.state,
        run.uniforms,
        run.next_positions,
        capacity,
        controls,
        least,
        eos_id,
        pad_id,
      )
      alive = _still_alive(run, find_stop)
      index = int(run.state.index)
      if not alive.any() or index >= max_new_tokens:
        break
      if index == capacity:
        longer = min(capacity + segment, max_new_tokens)
        run.state = run.state.replace(cache=_grow(run.state.cache, longer))
      smaller = _shrunk(run, alive, min_problems)
      can_shrink = smaller is not None or index == capacity
      if smaller is not None:
        _store(result, run)
        run = smaller
    _store(result, run)
    return _finish(result, find_stop, pad_id)

  return generate


# Programs of the module, not of a generator: two generators of one network
# that differ in what stops a row share what is compiled.


@functools.partial(
  jax.jit, static_argnames=("network", "pad_id", "capacity", "max_new_tokens")
)
def _begin(
  network, params, keys, tokens, lengths, pad_id, capacity, max_new_tokens
):
  prefix, last = prefix_from_prompt(network, params, tokens, lengths)
  cache = make_cache(prefix, num_rows=keys.shape[1], capacity=capacity)
  hidden = jnp.broadcast_to(last[:, None], (*keys.shape, last.shape[-1]))
  alive = jnp.ones(keys.shape, bool)
  state = start_rows(cache, hidden, alive, max_new_tokens, pad_id)
  return state, row_uniforms(keys, max_new_tokens)


@functools.partial(jax.jit, static_argnames=("network", "eos_id", "pad_id"))
def _advance(
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
):
  return run_rows(
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


_grow = jax.jit(grow, static_argnums=1)


def _still_alive(run, find_stop):
  """Rows that go on, `[B', G']` on the host; stops those with a stop string."""
  alive = np.array(run.state.is_alive)
  if find_stop is not None and alive.any():
    tokens = np.asarray(run.state.tokens)
    lengths = np.asarray(run.state.lengths)
    for place in zip(*np.nonzero(alive), strict=True):
      alive[place] = find_stop(tokens[place][: lengths[place]]) is None
    run.state = run.state.replace(is_alive=jnp.asarray(alive))
  return alive


def _shrunk(run, alive, min_problems):
  """The run with only the rows alive, if that fits half the size; or None."""
  counts = alive.sum(1)
  keep = np.nonzero(counts)[0]
  num_problems = max(_power_of_two(len(keep)), min_problems)
  num_rows = min(_power_of_two(counts.max()), alive.shape[1])
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
  return _Run(
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


def _power_of_two(count):
  return 1 << max(0, int(count) - 1).bit_length()


def _blank(rows, max_new_tokens, pad_id):
  return {
    "tokens": np.full((*rows, max_new_tokens), pad_id, np.int32),
    "behavior_log_probs": np.zeros((*rows, max_new_tokens), np.float32),
    "policy_log_probs": np.zeros((*rows, max_new_tokens), np.float32),
    "lengths": np.zeros(rows, np.int32),
    "ended": np.zeros(rows, bool),
  }


def _store(result, run):
  """Copies what the rows have so far to their places.

  A row that only fills the shape carries an earlier row's tokens, so nothing
  wrong is written; where a live row goes to the same place, the longer wins.
  """
  place = (run.problem[:, None], run.row)
  lengths = np.asarray(run.state.lengths)
  order = np.argsort(lengths, axis=None, kind="stable")
  place = tuple(
    np.broadcast_to(p, lengths.shape).reshape(-1)[order] for p in place
  )
  for name in (*ROW_FIELDS, "lengths", "ended"):
    array = np.asarray(getattr(run.state, name))
    result[name][place] = array.reshape(-1, *array.shape[2:])[order]


def _make_find_stop(stops, pieces):
  """Builds (tokens) -> tokens up to the first stop string, or None."""
  last = {stop[-1] for stop in stops}
  may_complete = np.array([any(b in last for b in p) for p in pieces])

  def find_stop(tokens):
    if not may_complete[tokens].any():
      return None
    parts = [pieces[t] for t in tokens]
    text = b"".join(parts)
    ends = [text.find(s) + len(s) for s in stops if s in text]
    if not ends:
      return None
    reached = np.cumsum([len(p) for p in parts])
    return int(np.searchsorted(reached, min(ends))) + 1

  return find_stop


def _finish(result, find_stop, pad_id):
  """Cuts rows back to their stop strings."""
  stopped = np.zeros(result["lengths"].shape, bool)
  if find_stop is not None:
    for place in np.ndindex(stopped.shape):
      length = result["lengths"][place]
      cut = find_stop(result["tokens"][place][:length])
      if cut is None:
        continue
      stopped[place] = True
      result["ended"][place] = False
      result["lengths"][place] = cut
      result["tokens"][place][cut:] = pad_id
      result["behavior_log_probs"][place][cut:] = 0.0
      result["policy_log_probs"][place][cut:] = 0.0
  return Generated(stopped=stopped, **result)
