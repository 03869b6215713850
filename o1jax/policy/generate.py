"""Whole continuations of prompts, driven from the host.

`decode_rows` is one program of fixed size. Long solutions of uneven length want
more: the cache grows from segment to segment, because attention reads every
slot, used or not; and when half of the rows have finished, the others move
together into a program of half the size (sizes are powers of two, so there are
few). With more rows than a program should have, `num_slots` lets the others
wait: a row that finishes gives its slot to the next. Rows keep the numbers they
draw with, so the tokens are those that `decode_rows` would give.

`make_speculative_generate` is for the other end, few rows whose network calls
cost more than their tokens: a draft proposes, see `speculative`.

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
from jax.sharding import Mesh

from o1jax import mesh as mesh_lib
from o1jax.policy import slots
from o1jax.policy.cache import check_cache_dtype, prefix_from_prompt
from o1jax.policy.network import Network
from o1jax.policy.speculative import check_draft, speculate_rows

Params = Any
REFILL = 8  # slots are filled again when one in so many is free
FEW_ROWS = 16  # of a device, up to which its cache grows by larger segments


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
    rows_evaluated: rows of the program, summed over its steps.
    rows_live: those of them that wrote tokens: one each, or in speculation
      `lengths.sum() / rows_live`.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  behavior_log_probs: np.ndarray
  policy_log_probs: np.ndarray
  ended: np.ndarray
  stopped: np.ndarray
  rows_evaluated: int
  rows_live: int


def make_generate(
  network: Network,
  *,
  num_rows: int,
  max_new_tokens: int,
  eos_id: int,
  pad_id: int,
  stop_texts: Sequence[str] = (),
  pieces: Sequence[bytes] | None = None,
  segment: int | None = None,
  num_slots: int | None = None,
  cache_dtype: str = "network",
  prefill_chunk: int | None = None,
  mesh: Mesh | None = None,
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
    segment: slots by which the cache grows. None: 32, or 64 where rows are so
      few that a turn of the host costs more than slots that are read unused.
    num_slots: W, rows decoded at a time; the other rows wait for a slot, and
      prompts are read W at a time. With four times as many rows as slots or
      more, rows evaluated stay within 1.25 times the live ones. None: all rows
      start together.
    cache_dtype: see `cache.prefix_from_prompt`.
    prefill_chunk: see `cache.prefix_from_prompt`.
    mesh: problems, or slots, are shared out over its data and fsdp axes, and
      every device decodes its own; parameters are whole on each.

  Raises:
    ValueError: stop strings without pieces, a size below 1, an unknown
      cache_dtype, or problems or slots that do not divide over the mesh.
  """
  for name, size in (
    ("num_rows", num_rows),
    ("max_new_tokens", max_new_tokens),
    ("segment", segment),
    ("num_slots", num_slots),
    ("prefill_chunk", prefill_chunk),
  ):
    if size is not None and size < 1:
      raise ValueError(f"{name}={size} must be 1 or more")
  ways = 1 if mesh is None else mesh_lib.batch_ways(mesh)
  if num_slots is not None and mesh is not None:
    mesh_lib.check_divides("num_slots", num_slots, mesh)
  stops = tuple(text.encode() for text in stop_texts if text)
  if stops and pieces is None:
    raise ValueError("stop_texts needs pieces: pass the tokenizer's pieces")
  find_stop = _make_find_stop(stops, pieces) if stops else None
  check_cache_dtype(cache_dtype)

  def num_together(keys):
    return keys.size if num_slots is None else num_slots

  def start(params, keys, tokens, lengths, first_capacity):
    """The first rows, and the queue of the others."""
    sizes = {"max_new_tokens": max_new_tokens, "pad_id": pad_id}
    reading = {"cache_dtype": cache_dtype, "prefill_chunk": prefill_chunk}
    if num_slots is None:
      return slots.start_together(
        network,
        params,
        keys,
        tokens,
        lengths,
        capacity=first_capacity,
        mesh=mesh,
        **sizes,
        **reading,
      ), None
    read_fn = functools.partial(slots.read_prompts, network, params, **reading)
    queue = slots.Queue(
      read_fn, keys, tokens, lengths, num_slots=num_slots, **sizes
    )
    run = queue.fill(queue.start(first_capacity), np.ones(num_slots, bool))
    return slots.placed(run, mesh), queue

  def generate(params, keys, tokens, lengths, controls):
    _check_keys(keys, tokens, num_rows)
    if mesh is not None:
      if num_slots is None:
        mesh_lib.check_divides("number of prompts", len(keys), mesh)
        given = (keys, tokens, lengths)
        keys, tokens, lengths = mesh_lib.shard_batch(given, mesh)
      params = mesh_lib.replicate(params, mesh)
    by = segment or (64 if num_together(keys) <= FEW_ROWS * ways else 32)
    run, queue = start(params, keys, tokens, lengths, min(by, max_new_tokens))
    result = _blank(keys.shape, max_new_tokens, pad_id)
    can_shrink, rows_evaluated = True, 0
    while True:
      rows, step = run.row.size, int(run.state.index)
      capacity = run.state.cache.capacity
      is_waiting = queue is not None and queue.num_waiting > 0
      least = 1
      if is_waiting:
        least = (rows - rows // REFILL) // ways
      elif can_shrink and rows > slots.SMALLEST and mesh is None:
        # Devices have no common count: they are seen to at the segment's end.
        least = rows // 2 + 1
      run.state = slots.advance(
        network,
        params,
        run.state,
        run.uniforms,
        run.next_positions,
        capacity if queue is None else step + by,
        controls,
        least,
        eos_id,
        pad_id,
        mesh,
      )
      rows_evaluated += (int(run.state.index) - step) * rows
      alive = _still_alive(run, find_stop)
      if not alive.any() and not is_waiting:
        break
      if run.is_full:
        run = slots.grown(run, min(capacity + by, max_new_tokens))
      if is_waiting:
        slots.store(result, run)
        run = slots.placed(queue.fill(run, ~alive[:, 0]), mesh)
        continue
      smaller = slots.shrunk(run, alive, ways)
      can_shrink = smaller is not None or alive.sum() >= least
      if smaller is not None:
        slots.store(result, run)
        run = slots.placed(smaller, mesh)
    slots.store(result, run)
    rows_live = int(result["lengths"].sum())
    return Generated(
      **_cut(result, find_stop, pad_id),
      rows_evaluated=rows_evaluated,
      rows_live=rows_live,
    )

  return generate


def _check_keys(keys, tokens, num_rows):
  if keys.shape != (tokens.shape[0], num_rows):
    raise ValueError(
      f"keys of shape {keys.shape} for {tokens.shape[0]} prompts of "
      f"{num_rows} rows: give one key per row"
    )


def make_speculative_generate(
  network: Network,
  *,
  num_rows: int,
  max_new_tokens: int,
  eos_id: int,
  pad_id: int,
  num_proposals: int = 4,
  cache_dtype: str = "network",
  prefill_chunk: int | None = None,
) -> Callable[..., Generated]:
  """Builds `(params, draft, keys, tokens, lengths, controls)`, see above.

  All rows start together in one program; texts are distributed as those of
  `make_generate`, with fewer calls of the network.

  Args:
    network: the network.
    num_rows: G, samples of each prompt.
    max_new_tokens: S.
    eos_id: the token that ends a row.
    pad_id: fills rows after their end.
    num_proposals: K, tokens that the draft proposes for each call.
    cache_dtype: see `cache.prefix_from_prompt`.
    prefill_chunk: see `cache.prefix_from_prompt`.

  Raises:
    ValueError: when called, with a draft that does not fit; see
      `speculative.check_draft`.
  """

  @jax.jit
  def run(params, draft, keys, tokens, lengths, controls):
    prefix, last = prefix_from_prompt(
      network,
      params,
      tokens,
      lengths,
      cache_dtype=cache_dtype,
      prefill_chunk=prefill_chunk,
    )
    rows = speculate_rows(
      network,
      params,
      keys,
      last,
      lengths,
      prefix,
      num_rows=num_rows,
      max_new_tokens=max_new_tokens,
      stop_ids=(),
      eos_id=eos_id,
      pad_id=pad_id,
      controls=controls,
      draft=draft,
      num_proposals=num_proposals,
      context_tokens=tokens,
      context_lengths=lengths,
    )
    kept = (*slots.ROW_FIELDS, "lengths", "ended", "stopped", "num_calls")
    return {name: getattr(rows, name) for name in kept}

  def generate(params, draft, keys, tokens, lengths, controls):
    _check_keys(keys, tokens, num_rows)
    check_draft(network, draft, num_proposals)
    rows = run(params, draft, keys, tokens, lengths, controls)
    rows = {name: np.asarray(x) for name, x in rows.items()}
    num_calls = rows.pop("num_calls")
    return Generated(
      **rows,
      rows_evaluated=int(num_calls.max()) * num_calls.size,
      rows_live=int(num_calls.sum()),
    )

  return generate


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


def _blank(rows, max_new_tokens, pad_id):
  return {
    "tokens": np.full((*rows, max_new_tokens), pad_id, np.int32),
    "behavior_log_probs": np.zeros((*rows, max_new_tokens), np.float32),
    "policy_log_probs": np.zeros((*rows, max_new_tokens), np.float32),
    "lengths": np.zeros(rows, np.int32),
    "ended": np.zeros(rows, bool),
  }


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


def _cut(result, find_stop, pad_id):
  """Cuts rows back to their stop strings and says which."""
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
  return result | {"stopped": stopped}
