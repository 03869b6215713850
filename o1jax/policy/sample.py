"""Drawing tokens, and decoding rows until they stop.

A draw needs one uniform number. Without truncation it is a two-level inverse
CDF: exponentials, their sums over blocks, the block that holds the number, the
token within it; noise for every token of the vocabulary would cost a fifth of
the decoding speed. The log-prob of the token under the distribution it was
really drawn from comes from the same pass.

`decode_rows` continues each context in G rows in one loop that ends as soon as
every row has. A row's numbers come from its own key before the loop starts, so
its tokens do not depend on what else is in the batch.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from o1jax.policy.cache import Cache, LayerArrays, Prefix, make_cache
from o1jax.policy.network import Network

Params = Any
COLD = 1e30  # inverse temperature that leaves only the likeliest tokens
BELOW_ONE = 1.0 - 1e-6  # keeps a draw inside a sum that was rounded
NOTHING = -1e30
NUM_ALTERNATIVES = 5  # that a token's confidence is measured against


@struct.dataclass
class SamplingControls:
  """How to draw; made by `make_controls`, scalars float32 or int32.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: draw among so many likeliest tokens; 0 for all.
    top_p: draw among the fewest likeliest tokens that hold this probability,
      after top_k; 1 for all. arXiv 1904.09751.
    min_p: draw among tokens at least this likely, relative to the likeliest; 0
      for all. arXiv 2407.01082.
    is_truncated: static; False compiles a sampler without the last three.
  """

  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  min_p: jax.Array
  is_truncated: bool = struct.field(pytree_node=False, default=False)


def make_controls(
  *,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  min_p: float = 0.0,
) -> SamplingControls:
  """Checks the settings; tokens with equal logits stay or go together.

  Raises:
    ValueError: a setting out of range.
  """
  if temperature < 0:
    raise ValueError(f"temperature={temperature} must be 0 (greedy) or more")
  if top_k < 0:
    raise ValueError(f"top_k={top_k} must be 0 (off) or more")
  if not 0 < top_p <= 1:
    raise ValueError(f"top_p={top_p} must be above 0 and at most 1 (off)")
  if not 0 <= min_p <= 1:
    raise ValueError(f"min_p={min_p} must be between 0 (off) and 1")
  return SamplingControls(
    temperature=jnp.float32(temperature),
    top_k=jnp.int32(top_k),
    top_p=jnp.float32(top_p),
    min_p=jnp.float32(min_p),
    is_truncated=top_k > 0 or top_p < 1 or min_p > 0,
  )


def shape_logits(logits: jax.Array, controls: SamplingControls) -> jax.Array:
  """Logits of the distribution to draw from, up to a constant a row.

  `[..., V]` -> `[..., V]` with the largest at 0; tokens cut off get NOTHING.
  """
  is_greedy = controls.temperature <= 0
  warm = jnp.where(is_greedy, 1.0, controls.temperature)
  inverse = jnp.where(is_greedy, COLD, 1.0 / warm)
  scaled = (logits - logits.max(-1, keepdims=True)) * inverse
  if not controls.is_truncated:
    return scaled
  return jnp.where(scaled >= _cutoff(scaled, controls), scaled, NOTHING)


def probabilities(logits: jax.Array, controls: SamplingControls) -> jax.Array:
  """The distribution to draw from, `[..., V]`; greedy has one token."""
  shaped = shape_logits(logits, controls)
  first = jax.nn.one_hot(jnp.argmax(shaped, -1), logits.shape[-1])
  return jnp.where(controls.temperature <= 0, first, jax.nn.softmax(shaped))


def _cutoff(scaled, controls):
  """The least logit that stays, `[..., 1]`."""
  size = scaled.shape[-1]
  falling = -jnp.sort(-scaled, axis=-1)
  k = jnp.where(controls.top_k > 0, controls.top_k, size)
  rank = jnp.arange(size).reshape((1,) * (scaled.ndim - 1) + (size,))
  mass = jnp.where(rank < k, jnp.exp(falling), 0.0)
  above = jnp.cumsum(mass, -1) - mass
  stays = (rank < k) & (above < controls.top_p * mass.sum(-1, keepdims=True))
  stays = stays | (rank == 0)
  least = jnp.min(jnp.where(stays, falling, jnp.inf), -1, keepdims=True)
  return jnp.maximum(least, jnp.log(controls.min_p))


def sample_tokens(
  logits: jax.Array, uniforms: jax.Array, controls: SamplingControls
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Draws one token per row.

  Args:
    logits: `[..., V]` float32.
    uniforms: `[...]` in [0, 1), one per row.
    controls: temperature and truncation.

  Returns:
    `(tokens, behavior_log_probs, policy_log_probs)`, all `[...]`: the first
    log-prob is that of the distribution drawn from (after temperature and
    truncation, renormalised; 0 at temperature 0), the second the policy's own.
  """
  shaped = shape_logits(logits, controls)
  mass = jnp.exp(shaped)
  is_greedy = controls.temperature <= 0
  # Greedy rows take the first of the likeliest tokens.
  tokens, total = inverse_cdf(mass, jnp.where(is_greedy, 0.0, uniforms))
  drawn = _pick(shaped, tokens) - jnp.log(total)
  behavior = jnp.where(is_greedy, 0.0, drawn)
  policy = _pick(logits, tokens) - jax.nn.logsumexp(logits, -1)
  return tokens, behavior, policy


def inverse_cdf(
  mass: jax.Array, uniforms: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Index where the sums of `[..., V]` pass uniforms * total; the total."""
  size = mass.shape[-1]
  block = 1 << max(3, round(math.log2(size) / 2))
  blocks = -(-size // block)
  pad = [(0, 0)] * (mass.ndim - 1) + [(0, blocks * block - size)]
  mass = jnp.pad(mass, pad).reshape(*mass.shape[:-1], blocks, block)
  sums = mass.sum(-1)
  reached = jnp.cumsum(sums, -1)
  total = reached[..., -1]
  target = jnp.minimum(uniforms, BELOW_ONE) * total
  which = _first((reached > target[..., None]) & (sums > 0))
  before = _pick(reached - sums, which)
  row = jnp.take_along_axis(mass, which[..., None, None], -2)[..., 0, :]
  within = jnp.cumsum(row, -1)
  rest = jnp.clip(target - before, 0.0, BELOW_ONE * within[..., -1])
  inside = _first((within > rest[..., None]) & (row > 0))
  return which * block + inside, total


def _first(mask):
  """Index of the first True along the last axis; the last index if none."""
  size = mask.shape[-1]
  index = jnp.arange(size, dtype=jnp.int32).reshape(
    (1,) * (mask.ndim - 1) + (size,)
  )
  return jnp.min(jnp.where(mask, index, size - 1), -1)


def _pick(array, index):
  return jnp.take_along_axis(array, index[..., None], -1)[..., 0]


def at_slots(array: jax.Array, index: jax.Array) -> jax.Array:
  """Entries `[..., K]` of `[..., S]`; an index outside takes the nearest."""
  index = jnp.clip(index, 0, array.shape[-1] - 1)
  return jnp.take_along_axis(array, index, -1)


@struct.dataclass
class DecodedRows:
  """What `decode_rows` wrote. G rows of each of B problems, S slots a row.

  Attributes:
    tokens: `[B, G, S]` int32, pad after the end.
    lengths: `[B, G]` int32 tokens written, stop or end token included.
    behavior_log_probs: `[B, G, S]` under the distribution drawn from.
    policy_log_probs: `[B, G, S]` under the policy itself.
    last_hidden: `[B, G, D]` at the last token written; the value after it and
      the first token of what follows are read from here.
    ended: `[B, G]` True where the last token is the end token.
    stopped: `[B, G]` True where it is a stop token. Neither: out of room.
    keys: one `[B, G, J, S, E]` per layer; slots from `lengths` on are waste.
    values: one `[B, G, J, S, E]` per layer.
    confidence: `[B, G]` sum over the tokens of `token_confidence`; None where
      it was not asked for.
    entropy: `[B, G]` sum over the tokens of the policy's entropy, or None.
    watched: `[B, G, K]` the policy's log-probs of the watched tokens where the
      last token of each row was drawn, or None.
  """

  tokens: jax.Array
  lengths: jax.Array
  behavior_log_probs: jax.Array
  policy_log_probs: jax.Array
  last_hidden: jax.Array
  ended: jax.Array
  stopped: jax.Array
  keys: LayerArrays
  values: LayerArrays
  confidence: jax.Array | None = None
  entropy: jax.Array | None = None
  watched: jax.Array | None = None


def row_uniforms(keys: jax.Array, max_new_tokens: int) -> jax.Array:
  """All numbers a row will draw with: keys `[B, G]` -> `[B, G, S]`."""

  def one(key):
    return jax.random.uniform(key, (max_new_tokens,))

  # Flat: XLA:CPU writes out loops over short axes, which takes time to compile.
  return jax.vmap(one)(keys.reshape(-1)).reshape(*keys.shape, max_new_tokens)


def decode_rows(
  network: Network,
  params: Params,
  keys: jax.Array,
  last_hidden: jax.Array,
  next_positions: jax.Array,
  prefix: Prefix,
  *,
  num_rows: int,
  max_new_tokens: int,
  stop_ids: tuple[int, ...],
  eos_id: int,
  pad_id: int,
  controls: SamplingControls,
  is_active: jax.Array | None = None,
  forced_tokens: jax.Array | None = None,
  forced_lengths: jax.Array | None = None,
  chosen: bool = False,
  with_certainty: bool = False,
  watched_ids: tuple[int, ...] = (),
) -> DecodedRows:
  """Continues each context in G rows until each has stopped.

  The last token of a row is itself run through the network, so that its value
  can be read and decoding can go on from it with nothing computed again.

  Args:
    network: the network.
    params: its parameters.
    keys: `[B, G]` typed keys, one per row.
    last_hidden: `[B, D]` hidden state the first token is drawn from.
    next_positions: `[B]` position of the first new token.
    prefix: the context; holes are allowed.
    num_rows: G.
    max_new_tokens: S, slots of a row.
    stop_ids: tokens that end a row (the end of a step).
    eos_id: the token that ends a row and its solution.
    pad_id: fills rows after their end.
    controls: how to draw.
    is_active: `[B, G]`; False writes nothing in the row (length 0). None: all
      are active.
    forced_tokens: `[B, G, F]` tokens that rows begin with, in place of drawn
      ones. None: nothing is forced.
    forced_lengths: `[B, G]` how many tokens of each row are forced.
    chosen: True where the forced tokens are somebody's choice among the
      policy's tokens: they have its log-prob (and behavior log-prob 0), and
      stop a row. False where they are given text, with log-probs 0, in which
      no stop or end is seen.
    with_certainty: also sum up confidence and entropy of the drawn tokens.
    watched_ids: K tokens whose log-probs are kept beside the last token's.
  """
  batch, width = last_hidden.shape
  if is_active is None:
    is_active = jnp.ones((batch, num_rows), bool)
  state = start_rows(
    make_cache(prefix, num_rows=num_rows, capacity=max_new_tokens),
    jnp.broadcast_to(last_hidden[:, None], (batch, num_rows, width)),
    is_active,
    max_new_tokens,
    pad_id,
  )
  if with_certainty:
    nothing = jnp.zeros((batch, num_rows), jnp.float32)
    state = state.replace(confidence=nothing, entropy=nothing)
  if watched_ids:
    shape = (batch, num_rows, len(watched_ids))
    state = state.replace(watched=jnp.zeros(shape, jnp.float32))
  state = run_rows(
    network,
    params,
    state,
    row_uniforms(keys, max_new_tokens),
    next_positions,
    end=max_new_tokens,
    stop_ids=stop_ids,
    eos_id=eos_id,
    pad_id=pad_id,
    controls=controls,
    forced_tokens=forced_tokens,
    forced_lengths=forced_lengths,
    chosen=chosen,
    watched_ids=watched_ids,
  )
  suffix_keys, suffix_values = state.cache.suffix_arrays()
  return DecodedRows(
    tokens=state.tokens,
    lengths=state.lengths,
    behavior_log_probs=state.behavior_log_probs,
    policy_log_probs=state.policy_log_probs,
    last_hidden=state.hidden,
    ended=state.ended,
    stopped=state.stopped,
    keys=suffix_keys,
    values=suffix_values,
    confidence=state.confidence,
    entropy=state.entropy,
    watched=state.watched,
  )


@struct.dataclass
class RowState:
  """Rows while they are decoded.

  Attributes:
    index: scalar count of steps; the slot the next tokens go to, but where rows
      are ragged.
    cache: prefix (not changed) and suffixes, written at `index`.
    hidden: `[B, G, D]` at each row's last token.
    is_alive: `[B, G]` rows that go on.
    ended: `[B, G]` rows that drew the end token.
    stopped: `[B, G]` rows that drew a stop token.
    lengths: `[B, G]` tokens written.
    tokens: `[B, G, S]`, written at the slot.
    behavior_log_probs: `[B, G, S]`, written at the slot.
    policy_log_probs: `[B, G, S]`, written at the slot.
    confidence: `[B, G]` summed so far, or None.
    entropy: `[B, G]` summed so far, or None.
    watched: `[B, G, K]` log-probs at each row's last token, or None.
    is_ragged: static; True where rows began at different steps, so that each
      writes at its own length.
  """

  index: jax.Array
  cache: Cache
  hidden: jax.Array
  is_alive: jax.Array
  ended: jax.Array
  stopped: jax.Array
  lengths: jax.Array
  tokens: jax.Array
  behavior_log_probs: jax.Array
  policy_log_probs: jax.Array
  confidence: jax.Array | None = None
  entropy: jax.Array | None = None
  watched: jax.Array | None = None
  is_ragged: bool = struct.field(pytree_node=False, default=False)


def start_rows(
  cache: Cache,
  hidden: jax.Array,
  is_alive: jax.Array,
  max_new_tokens: int,
  pad_id: int,
  is_ragged: bool = False,
) -> RowState:
  """Rows that have written nothing yet."""
  rows = is_alive.shape
  return RowState(
    index=jnp.int32(0),
    cache=cache,
    hidden=hidden,
    is_alive=is_alive,
    ended=jnp.zeros(rows, bool),
    stopped=jnp.zeros(rows, bool),
    lengths=jnp.zeros(rows, jnp.int32),
    tokens=jnp.full((*rows, max_new_tokens), pad_id, jnp.int32),
    behavior_log_probs=jnp.zeros((*rows, max_new_tokens), jnp.float32),
    policy_log_probs=jnp.zeros((*rows, max_new_tokens), jnp.float32),
    is_ragged=is_ragged,
  )


def run_rows(
  network: Network,
  params: Params,
  state: RowState,
  uniforms: jax.Array,
  next_positions: jax.Array,
  *,
  end: int,
  stop_ids: tuple[int, ...],
  eos_id: int,
  pad_id: int,
  controls: SamplingControls,
  min_alive: int = 1,
  forced_tokens: jax.Array | None = None,
  forced_lengths: jax.Array | None = None,
  chosen: bool = False,
  watched_ids: tuple[int, ...] = (),
) -> RowState:
  """Decodes up to step `end`, or until fewer than `min_alive` rows go on.

  `uniforms` `[B, G, S]`, `next_positions` `[B]` and `forced_tokens` `[B, G, F]`
  are indexed by slot from the start of the rows, so a run may be cut anywhere
  and taken up again. Ragged rows also stop where one has filled its suffix, and
  take no forced tokens.
  """

  def goes_on(state):
    going = (state.index < end) & (state.is_alive.sum() >= min_alive)
    if state.is_ragged:
      longest = jnp.max(jnp.where(state.is_alive, state.lengths, 0))
      going = going & (longest < state.cache.capacity)
    return going

  def body(state):
    logits = network.policy_logits(params, state.hidden)
    if state.is_ragged:
      u = at_slots(uniforms, state.lengths[..., None])[..., 0]
    else:
      u = jax.lax.dynamic_index_in_dim(uniforms, state.index, 2, keepdims=False)
    drawn, behavior, policy = sample_tokens(logits, u, controls)
    is_forced = jnp.zeros((1, 1), bool)
    if forced_tokens is not None:
      # Past the last forced token the slot is clamped, and not read.
      given = jax.lax.dynamic_index_in_dim(
        forced_tokens, state.index, 2, keepdims=False
      )
      is_forced = state.index < forced_lengths
      drawn = jnp.where(is_forced, given, drawn)
      behavior = jnp.where(is_forced, 0.0, behavior)
      policy = _pick(logits, drawn) - jax.nn.logsumexp(logits, -1)
      if not chosen:
        policy = jnp.where(is_forced, 0.0, policy)
    stops = _stops(drawn, stop_ids, eos_id)
    if not chosen:
      stops = tuple(stop & ~is_forced for stop in stops)
    if state.confidence is not None:
      counts = state.is_alive & (chosen | ~is_forced)
      state = state.replace(
        confidence=state.confidence
        + jnp.where(counts, token_confidence(logits, drawn), 0.0),
        entropy=state.entropy + jnp.where(counts, token_entropy(logits), 0.0),
      )
    if watched_ids:
      log_probs = jax.nn.log_softmax(logits)[..., np.array(watched_ids)]
      is_alive = state.is_alive[..., None]
      state = state.replace(
        watched=jnp.where(is_alive, log_probs, state.watched)
      )
    state = _record(state, drawn, behavior, policy, stops, pad_id)
    return _advance(network, params, state, next_positions, drawn, pad_id)

  return jax.lax.while_loop(goes_on, body, state)


def token_confidence(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Probability of each token over that of the five likeliest, `[...]`.

  Marco-o1, arXiv 2411.14405, Eq. 1.

  Args:
    logits: `[..., V]`.
    tokens: `[...]`.
  """
  best, _ = jax.lax.top_k(logits, min(NUM_ALTERNATIVES, logits.shape[-1]))
  return jnp.exp(_pick(logits, tokens) - jax.nn.logsumexp(best, -1))


def token_entropy(logits: jax.Array) -> jax.Array:
  """Entropy of the policy `[..., V] -> [...]`, in nats."""
  log_probs = jax.nn.log_softmax(logits, -1)
  return -jnp.sum(jnp.exp(log_probs) * log_probs, -1)


def _stops(drawn, stop_ids, eos_id):
  """Where a solution ends, and where a row stops at a stop token."""
  is_stop = jnp.zeros(drawn.shape, bool)
  for stop in stop_ids:
    is_stop = is_stop | (drawn == stop)
  return drawn == eos_id, is_stop


def _record(state, drawn, behavior, policy, stops, pad_id):
  """Writes the tokens drawn where rows are alive, and notes who stops."""
  alive = state.is_alive
  is_end, is_stop = stops

  def put(array, new, blank):
    if state.is_ragged:
      b, g = jnp.arange(alive.shape[0]), jnp.arange(alive.shape[1])
      slot = jnp.where(alive, state.lengths, array.shape[2])  # outside: dropped
      return array.at[b[:, None], g[None], slot].set(new, mode="drop")
    new = jnp.where(alive, new, blank)[:, :, None]
    return jax.lax.dynamic_update_slice(array, new, (0, 0, state.index))

  return state.replace(
    ended=state.ended | (alive & is_end),
    stopped=state.stopped | (alive & is_stop),
    lengths=state.lengths + alive,
    tokens=put(state.tokens, drawn, pad_id),
    behavior_log_probs=put(state.behavior_log_probs, behavior, 0.0),
    policy_log_probs=put(state.policy_log_probs, policy, 0.0),
  )


def _advance(network, params, state, next_positions, drawn, pad_id):
  """Runs the tokens just written through the network."""
  alive, cache = state.is_alive, state.cache
  token = jnp.where(alive, drawn, pad_id)[:, :, None]
  if state.is_ragged:
    # Where they were just written; rows that ended write behind their end.
    slot, own = None, state.lengths - alive
    cache = cache.replace(suffix_lengths=own)
  else:
    slot = own = state.index
  positions = jnp.broadcast_to(
    (next_positions[:, None] + own)[:, :, None], token.shape
  )
  hidden, cache = network.apply(params, token, positions, cache, slot=slot)
  return state.replace(
    index=state.index + 1,
    cache=cache.replace(suffix_lengths=state.lengths),
    hidden=jnp.where(alive[:, :, None], hidden[:, :, 0], state.hidden),
    is_alive=alive
    & ~state.ended
    & ~state.stopped
    & (state.lengths < state.tokens.shape[2]),
  )
