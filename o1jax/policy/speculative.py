"""Speculative sampling: several tokens a network call, exact in distribution.

A draft proposes K tokens; the network reads the last token written and all K in
one call; each proposal d in turn is accepted with probability min(1, p(d) /
q(d)), p and q the distributions of policy and draft, and the first that is not
is replaced by a draw from max(p - q, 0), normalised. What is written then
follows p exactly, whatever the draft: Leviathan et al., arXiv 2211.17192,
Theorem 3.5; Chen et al., arXiv 2302.01318. If all are accepted, the last
position of the call gives one token more.

Every slot of a row has three numbers from the row's key: to propose with, to
test with, to draw with. A slot is tested and drawn once, so they stay
independent, and a row does not depend on what else is in the batch.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from o1jax.policy.cache import Prefix, make_cache
from o1jax.policy.drafts import Draft, ModelDraft, Proposals
from o1jax.policy.network import Network, selected_log_probs
from o1jax.policy.sample import (
  DecodedRows,
  SamplingControls,
  at_slots,
  inverse_cdf,
  probabilities,
  sample_tokens,
  token_confidence,
  token_entropy,
)

Params = Any
LEAST = 1e-30  # keeps the logarithm of what was not drawn finite


@struct.dataclass(kw_only=True)
class SpeculatedRows(DecodedRows):
  """`DecodedRows` with their cost.

  Attributes:
    num_calls: `[B, G]` calls of the network that a row took part in. Plain
      decoding needs one a token: `lengths / num_calls` is the gain.
  """

  num_calls: jax.Array


def check_draft(network: Network, draft: Draft, num_proposals: int) -> None:
  """Refuses what cannot propose for this network.

  Raises:
    ValueError: no proposals, or a draft policy of another vocabulary.
  """
  if num_proposals < 1:
    raise ValueError(f"num_proposals={num_proposals} must be 1 or more")
  if isinstance(draft, ModelDraft):
    size, other = network.config.vocab_size, draft.network.config.vocab_size
    if size != other:
      raise ValueError(
        f"the draft has a vocabulary of {other} tokens and the policy one of "
        f"{size}: take a draft that was trained with the policy's tokenizer"
      )


class _Forced(NamedTuple):
  """Tokens `[B, G, F]` that rows begin with, and how many count `[B, G]`."""

  tokens: jax.Array
  lengths: jax.Array

  def over(self, tokens, slots):
    """Drawn `[B, G, K]` with the given ones in their slots, and where."""
    is_forced = slots < self.lengths[..., None]
    return jnp.where(is_forced, at_slots(self.tokens, slots), tokens), is_forced


@struct.dataclass
class _Rows:
  """Rows while they are decoded: the fields of SpeculatedRows so far.

  The last token of a row that is alive is recorded and not yet read by the
  network.
  """

  cache: Any
  draft: Any
  is_alive: jax.Array
  last_hidden: jax.Array
  tokens: jax.Array
  lengths: jax.Array
  behavior_log_probs: jax.Array
  policy_log_probs: jax.Array
  ended: jax.Array
  stopped: jax.Array
  num_calls: jax.Array
  confidence: jax.Array | None
  entropy: jax.Array | None


def speculate_rows(
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
  draft: Draft,
  num_proposals: int,
  context_tokens: jax.Array,
  context_lengths: jax.Array,
  is_active: jax.Array | None = None,
  forced_tokens: jax.Array | None = None,
  forced_lengths: jax.Array | None = None,
  with_certainty: bool = False,
) -> SpeculatedRows:
  """Does what `sample.decode_rows` does in fewer calls of the network.

  Arguments and results are those of `decode_rows`, where forced tokens are
  given text. With the same keys the tokens are others, but of the same
  distribution; at temperature 0 they are the same.

  Args:
    network: the policy.
    params: its parameters.
    keys: `[B, G]`.
    last_hidden: `[B, D]`.
    next_positions: `[B]`.
    prefix: the context as the policy remembers it.
    num_rows: G.
    max_new_tokens: S.
    stop_ids: tokens that end a row.
    eos_id: the token that ends a row and its solution.
    pad_id: fills rows after their end.
    controls: how to draw; a draft policy draws in the same way.
    draft: proposes.
    num_proposals: K, tokens proposed a call.
    context_tokens: `[B, C]` the context as text, padded on the right.
    context_lengths: `[B]`, at least 1.
    is_active: `[B, G]`.
    forced_tokens: `[B, G, F]`. A draft policy may miss some of them, which
      costs acceptance and nothing else.
    forced_lengths: `[B, G]`.
    with_certainty: also sum up confidence and entropy.

  Raises:
    ValueError: see `check_draft`.
  """
  check_draft(network, draft, num_proposals)
  batch = last_hidden.shape[0]
  if is_active is None:
    is_active = jnp.ones((batch, num_rows), bool)
  if forced_tokens is None:
    forced_tokens = jnp.zeros((batch, num_rows, 1), jnp.int32)
    forced_lengths = jnp.zeros((batch, num_rows), jnp.int32)
  forced = _Forced(forced_tokens, forced_lengths)
  uniforms = _uniforms(keys, max_new_tokens)
  drafting = draft.start(
    context_tokens, context_lengths, num_rows, max_new_tokens
  )
  rows = _blank(
    make_cache(prefix, num_rows=num_rows, capacity=max_new_tokens),
    drafting,
    jnp.broadcast_to(
      last_hidden[:, None], (*is_active.shape, last_hidden.shape[1])
    ),
    is_active,
    max_new_tokens,
    pad_id,
  )
  if with_certainty:
    nothing = jnp.zeros(is_active.shape, jnp.float32)
    rows = rows.replace(confidence=nothing, entropy=nothing)
  is_stop = _make_is_stop(stop_ids, eos_id)
  rows = _first_token(
    network, params, rows, uniforms, forced, is_stop, controls
  )

  def body(rows):
    slots = rows.lengths[..., None] + jnp.arange(num_proposals)[None, None]
    proposals, drafting = draft.propose(
      rows.draft,
      rows.tokens,
      rows.lengths,
      at_slots(uniforms[:, :, 0], slots),
      controls,
    )
    rows = rows.replace(draft=drafting)
    return _round(
      network,
      params,
      rows,
      proposals,
      slots,
      uniforms,
      next_positions,
      forced,
      is_stop,
      controls,
    )

  rows = jax.lax.while_loop(lambda rows: rows.is_alive.any(), body, rows)
  keys, values = rows.cache.suffix_arrays()
  fields = {
    name: getattr(rows, name)
    for name in _Rows.__dataclass_fields__
    if name not in ("cache", "draft", "is_alive")
  }
  return SpeculatedRows(keys=keys, values=values, **fields)


def _uniforms(keys, room):
  """To propose, to test and to draw with in every slot: `[B, G, 3, S]`."""
  one = lambda key: jax.random.uniform(key, (3, room))  # noqa: E731
  return jax.vmap(jax.vmap(one))(keys)


def _make_is_stop(stop_ids, eos_id):
  """Builds tokens -> (is an end, is a stop)."""

  def is_stop(tokens):
    is_any = jnp.zeros(tokens.shape, bool)
    for stop in stop_ids:
      is_any = is_any | (tokens == stop)
    return tokens == eos_id, is_any

  return is_stop


def _blank(cache, drafting, hidden, is_active, room, pad_id):
  rows = is_active.shape
  return _Rows(
    cache=cache,
    draft=drafting,
    is_alive=is_active,
    last_hidden=hidden,
    tokens=jnp.full((*rows, room), pad_id, jnp.int32),
    lengths=jnp.zeros(rows, jnp.int32),
    behavior_log_probs=jnp.zeros((*rows, room), jnp.float32),
    policy_log_probs=jnp.zeros((*rows, room), jnp.float32),
    ended=jnp.zeros(rows, bool),
    stopped=jnp.zeros(rows, bool),
    num_calls=jnp.zeros(rows, jnp.int32),
    confidence=None,
    entropy=None,
  )


def _first_token(network, params, rows, uniforms, forced, is_stop, controls):
  """The token after the context, from a hidden state that is there already."""
  logits = network.policy_logits(params, rows.last_hidden)
  tokens, behavior, _ = sample_tokens(logits, uniforms[:, :, 2, 0], controls)
  slots = jnp.zeros((*tokens.shape, 1), jnp.int32)
  tokens, is_forced = forced.over(tokens[..., None], slots)
  behavior = jnp.where(is_forced, 0.0, behavior[..., None])
  policy = selected_log_probs(logits, tokens[..., 0])[..., None]
  policy = jnp.where(is_forced, 0.0, policy)
  is_end, is_step_end = (x & ~is_forced for x in is_stop(tokens))
  alive = rows.is_alive
  counts = alive[..., None] & ~is_forced
  rows = _with_certainty(rows, logits[:, :, None], tokens, counts)
  return _write(
    rows, slots, alive[..., None], tokens, behavior, policy
  ).replace(
    lengths=alive.astype(jnp.int32),
    ended=alive & is_end[..., 0],
    stopped=alive & is_step_end[..., 0],
  )


def _round(
  network,
  params,
  rows,
  proposals,
  slots,
  uniforms,
  next_positions,
  forced,
  is_stop,
  controls,
):
  """One call of the network: what was proposed is tested, one token drawn."""
  alive, room = rows.is_alive, rows.tokens.shape[2]
  proposed, is_forced = forced.over(proposals.tokens, slots)
  hidden, cache = _read(network, params, rows, proposed, next_positions)
  logits = network.policy_logits(params, hidden)
  probs = probabilities(logits, controls)

  # A row whose last token, now read, was an end accepts nothing more.
  is_over = rows.ended | rows.stopped
  ends = [x & ~is_forced for x in is_stop(proposed)]
  passed = is_forced | _passes(probs, proposed, proposals, slots, uniforms)
  behind_end = _before(ends[0] | ends[1])
  passed &= (slots < room) & ~behind_end & ~is_over[..., None]
  is_accepted = jnp.cumprod(passed, axis=-1).astype(bool)
  num_accepted = is_accepted.sum(-1)
  ended, stopped = ((is_accepted & x).any(-1) for x in ends)
  last_slot = rows.lengths + num_accepted
  is_over = is_over | ended | stopped | (last_slot >= room)

  drawn = _draw(probs, proposals, num_accepted, last_slot, uniforms)
  drawn, drawn_forced = forced.over(drawn[..., None], last_slot[..., None])
  tokens = _append(proposed, is_accepted, drawn)
  all_forced = _append(is_forced, is_accepted, drawn_forced)
  behavior = jnp.log(jnp.maximum(at_slots(probs, tokens[..., None]), LEAST))
  is_given = all_forced | (controls.temperature <= 0)
  behavior = jnp.where(is_given, 0.0, behavior[..., 0])
  drawn_ends = [(x & ~drawn_forced)[..., 0] & ~is_over for x in is_stop(drawn)]

  index = jnp.arange(tokens.shape[-1])[None, None]
  num_written = num_accepted + ~is_over
  is_written = alive[..., None] & (index < num_written[..., None])
  rows = _with_certainty(rows, logits, tokens, is_written & ~all_forced)
  rows = _write(
    rows,
    rows.lengths[..., None] + index,
    is_written,
    tokens,
    behavior,
    jnp.where(all_forced, 0.0, selected_log_probs(logits, tokens)),
  )
  last = jnp.take_along_axis(hidden, num_accepted[..., None, None], 2)
  return rows.replace(
    cache=cache,
    is_alive=alive & ~is_over,
    last_hidden=jnp.where(alive[..., None], last[:, :, 0], rows.last_hidden),
    lengths=rows.lengths + jnp.where(alive, num_written, 0),
    ended=rows.ended | (alive & (ended | drawn_ends[0])),
    stopped=rows.stopped | (alive & (stopped | drawn_ends[1])),
    num_calls=rows.num_calls + alive,
  )


def _read(network, params, rows, proposed, next_positions):
  """Runs the last token written and those proposed: hidden `[B, G, K+1, D]`.

  Rows that are not alive write the same again, and waste behind their end; what
  goes past the last slot is dropped.
  """
  pending = at_slots(rows.tokens, rows.lengths[..., None] - 1)
  start = jnp.maximum(rows.lengths - 1, 0)
  tokens = jnp.concatenate([pending, proposed], 2)
  offset = jnp.arange(tokens.shape[2], dtype=jnp.int32)[None, None]
  positions = next_positions[:, None, None] + start[..., None] + offset
  cache = rows.cache.replace(suffix_lengths=start)
  return network.apply(params, tokens, positions, cache)


def _passes(probs, proposed, proposals: Proposals, slots, uniforms):
  """Which proposals pass on their own, `[B, G, K]`: u < p / q."""
  place = proposed[..., None]
  p = at_slots(probs[:, :, :-1], place)[..., 0]
  q = (
    1.0 if proposals.probs is None else at_slots(proposals.probs, place)[..., 0]
  )
  counts = (
    jnp.arange(proposed.shape[2])[None, None] < proposals.counts[..., None]
  )
  return counts & (at_slots(uniforms[:, :, 1], slots) * q < p)


def _before(mask):
  """True behind the first True of each row, `[..., K]`."""
  return (jnp.cumsum(mask, -1) - mask) > 0


def _draw(probs, proposals: Proposals, num_accepted, slot, uniforms):
  """The token `[B, G]` behind those accepted: from max(p - q, 0) if one was
  refused there, from p if none was proposed."""
  p = jnp.take_along_axis(probs, num_accepted[..., None, None], 2)[:, :, 0]
  if proposals.probs is None:
    token = at_slots(proposals.tokens, num_accepted[..., None])[..., 0]
    q = jax.nn.one_hot(token, p.shape[-1])
  else:
    last = proposals.tokens.shape[2] - 1
    place = jnp.minimum(num_accepted, last)[..., None, None]
    q = jnp.take_along_axis(proposals.probs, place, 2)[:, :, 0]
  left = jnp.maximum(p - q, 0.0)
  # Rounding can refuse where p and q are the same: nothing is left then.
  is_refused = (num_accepted < proposals.counts) & (left.sum(-1) > 0)
  mass = jnp.where(is_refused[..., None], left, p)
  uniform = at_slots(uniforms[:, :, 2], slot[..., None])[..., 0]
  return inverse_cdf(mass, uniform)[0]


def _append(proposed, is_accepted, drawn):
  """`[B, G, K + 1]`: what was accepted, and what was drawn from there on."""
  wide = jnp.concatenate([proposed, drawn], 2)
  is_old = jnp.pad(is_accepted, ((0, 0), (0, 0), (0, 1)))
  return jnp.where(is_old, wide, drawn)


def _with_certainty(rows, logits, tokens, counts):
  """Adds up confidence and entropy of tokens `[B, G, K]`, if asked for."""
  if rows.confidence is None:
    return rows

  def total(x):
    return jnp.where(counts, x, 0.0).sum(-1)

  return rows.replace(
    confidence=rows.confidence + total(token_confidence(logits, tokens)),
    entropy=rows.entropy + total(token_entropy(logits)),
  )


def _write(rows, slots, mask, tokens, behavior, policy):
  """Puts `[B, G, K]` at slots `[B, G, K]` where the mask says so."""
  batch, num_rows, room = rows.tokens.shape
  b = jnp.arange(batch)[:, None, None]
  g = jnp.arange(num_rows)[None, :, None]
  at = jnp.where(mask, slots, room)  # outside: dropped

  def put(array, new):
    return array.at[b, g, at].set(new, mode="drop")

  return rows.replace(
    tokens=put(rows.tokens, tokens),
    behavior_log_probs=put(rows.behavior_log_probs, behavior),
    policy_log_probs=put(rows.policy_log_probs, policy),
  )
