"""Drafts: cheap guesses of the next tokens, for `speculative` to test.

A draft reads the context (`start`) and then, round by round, proposes K tokens
behind what each row has written (`propose`). `ModelDraft` samples them from a
smaller policy; `NgramDraft` has no network and repeats what followed the last
tokens where they stood before (prompt lookup decoding), which pays where
solutions quote their problem and themselves.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from o1jax.policy.cache import Cache, make_cache, prefix_from_prompt
from o1jax.policy.network import Network
from o1jax.policy.sample import (
  SamplingControls,
  at_slots,
  inverse_cdf,
  probabilities,
)

Params = Any


@struct.dataclass
class Proposals:
  """Tokens proposed behind each row.

  Attributes:
    tokens: `[B, G, K]`.
    counts: `[B, G]` how many of them count.
    probs: `[B, G, K, V]` the distribution each was drawn from; None where they
      were not drawn, so that each had probability 1.
  """

  tokens: jax.Array
  counts: jax.Array
  probs: jax.Array | None


class Draft(Protocol):
  """What `speculative.speculate_rows` needs of a draft; a pytree."""

  def start(
    self, tokens: jax.Array, lengths: jax.Array, num_rows: int, room: int
  ) -> Any:
    """Reads contexts `[B, C]` of `lengths` `[B]`; G rows of `room` tokens."""

  def propose(
    self,
    state: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    uniforms: jax.Array,
    controls: SamplingControls,
  ) -> tuple[Proposals, Any]:
    """Proposes behind rows `[B, G, S]` of `lengths`; uniforms `[B, G, K]`."""


@struct.dataclass
class NgramDraft:
  """Repeats what followed the longest, then latest, earlier match.

  Attributes:
    max_ngram: static; tokens at a row's end that are looked for.
  """

  max_ngram: int = struct.field(pytree_node=False, default=3)

  def start(self, tokens, lengths, num_rows, room):
    """See `Draft`."""
    return tokens, lengths

  def propose(self, state, tokens, lengths, uniforms, controls):
    """See `Draft`."""
    text, ends = _texts(*state, tokens, lengths)
    starts = _latest_match(text, ends, self.max_ngram)
    num = uniforms.shape[2]
    at = starts[..., None] + jnp.arange(num, dtype=jnp.int32)[None, None]
    counts = jnp.where(starts > 0, jnp.clip(ends - starts, 0, num), 0)
    return Proposals(at_slots(text, at), counts, None), state


def _texts(context, context_lengths, tokens, lengths):
  """Context and row in one piece: `[B, G, C + S]` and lengths `[B, G]`."""
  batch, rows, room = tokens.shape
  width = context.shape[1]
  index = jnp.arange(width + room, dtype=jnp.int32)[None, None]
  first = context_lengths[:, None, None]
  shape = (batch, rows, width + room)
  old = at_slots(
    jnp.broadcast_to(context[:, None], (batch, rows, width)),
    jnp.broadcast_to(index, shape),
  )
  new = at_slots(tokens, jnp.broadcast_to(index - first, shape))
  return jnp.where(index < first, old, new), context_lengths[:, None] + lengths


def _latest_match(text, ends, max_ngram):
  """Where the tokens behind the best match begin, `[B, G]`; 0 for no match."""
  size = text.shape[2]
  index = jnp.arange(size, dtype=jnp.int32)[None, None]
  goes_on = (index > 0) & (index < ends[..., None])
  matched = jnp.zeros(text.shape, jnp.int32)
  for back in range(1, max_ngram + 1):
    wanted = at_slots(text, ends[..., None] - back)
    goes_on &= (jnp.roll(text, back, axis=2) == wanted) & (index >= back)
    matched += goes_on
  score = jnp.where(matched > 0, matched * size + index, 0)
  return jnp.where(score.max(-1) > 0, jnp.argmax(score, -1), 0)


@struct.dataclass
class ModelDraft:
  """A smaller policy over the same tokens.

  Attributes:
    params: its parameters.
    network: static.
  """

  params: Params
  network: Network = struct.field(pytree_node=False)

  def start(self, tokens, lengths, num_rows, room):
    """See `Draft`; the context's last token comes to slot 0 of the rows."""
    prefix, _ = prefix_from_prompt(
      self.network, self.params, tokens, lengths - 1
    )
    cache = make_cache(prefix, num_rows=num_rows, capacity=room + 1)
    return cache, at_slots(tokens, lengths[:, None] - 1), lengths

  def propose(self, state, tokens, lengths, uniforms, controls):
    """See `Draft`.

    The last two tokens are read, for the one before the last is new where the
    round before accepted all that was proposed; else it is written again.
    """
    cache, last_of_context, context_lengths = state
    before = at_slots(tokens, lengths[..., None] - 2)
    before = jnp.where(
      lengths[..., None] >= 2, before, last_of_context[:, :, None]
    )
    pending = at_slots(tokens, lengths[..., None] - 1)
    cache = cache.replace(suffix_lengths=jnp.maximum(lengths - 1, 0))
    read = self._reader(context_lengths, controls)
    first, probs, cache = read(
      jnp.concatenate([before, pending], 2), cache, uniforms[:, :, 0]
    )

    def step(carry, uniform):
      token, cache = carry
      token, probs, cache = read(token[..., None], cache, uniform)
      return (token, cache), (token, probs)

    later = jnp.moveaxis(uniforms[:, :, 1:], 2, 0)
    (_, cache), (others, other_probs) = jax.lax.scan(
      step, (first, cache), later
    )
    drawn = jnp.concatenate([first[None], others])
    probs = jnp.concatenate([probs[None], other_probs])
    proposals = Proposals(
      tokens=jnp.moveaxis(drawn, 0, 2),
      counts=jnp.full(lengths.shape, uniforms.shape[2]),
      probs=jnp.moveaxis(probs, 0, 2),
    )
    return proposals, (cache, last_of_context, context_lengths)

  def _reader(self, context_lengths, controls):
    """Builds (tokens `[B, G, T]`, cache, uniform) -> token, probs, cache."""

    def read(tokens, cache: Cache, uniform):
      offset = jnp.arange(tokens.shape[2], dtype=jnp.int32)[None, None]
      slots = cache.suffix_lengths[..., None] + offset
      positions = context_lengths[:, None, None] - 1 + slots
      hidden, cache = self.network.apply(self.params, tokens, positions, cache)
      logits = self.network.policy_logits(self.params, hidden[:, :, -1])
      probs = probabilities(logits, controls)
      token, _ = inverse_cdf(probs, uniform)
      return token, probs, cache

    return read
