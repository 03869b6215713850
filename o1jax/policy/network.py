"""The network as pure functions: trunk, policy head, value head.

`make_network` is all that the other rooms see of Flax. Parameters are a plain
nested dict: "trunk" (embedding, layer_0 ..., final_norm), "policy_head" and
"value_head".
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from o1jax.policy.config import TransformerConfig
from o1jax.policy.heads import PolicyHead, ValueHead
from o1jax.policy.transformer import Decoder
from o1jax.value_bins import value_of

Params = Any
MAX_LOGITS = 2**26  # a quarter of a GiB in float32
FEATURE_PERIODS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 16, 20, 32, 50, 64, 100)


class Network(NamedTuple):
  """A policy with a value, as functions of parameters.

  Attributes:
    config: what it was made from.
    init: `(key) -> params`.
    apply: `(params, tokens, positions, cache=None, *, slot=None,
      segment_ids=None) -> (hidden, cache)`. Hidden states are those after the
      final norm.
      Without a cache: tokens and positions `[B, T]`, padded on the right; a
      token reads those of its row (and of its segment in `segment_ids` `[B,
      T]`) with a lower or equal index; hidden is `[B, T, D]` and the cache
      returned is a `Prefix` of all T slots.
      With a `Cache`: tokens and positions `[B, G, T]` are appended behind each
      row's suffix (positions of one row are consecutive); hidden is `[B, G, T,
      D]`. Where all rows write at one slot, give it as the scalar `slot`; rows
      that ended earlier then get waste behind their end, and their
      `suffix_lengths` are the caller's to keep. The caller sees to capacity.
    policy_logits: `(params, hidden [..., D]) -> [..., V]` float32.
    value_logits: `(params, hidden [..., D]) -> [...]` float32, in bins `[...,
      K]`.
    value: `(params, hidden [..., D]) -> [...]`, what these stand for, in [0,
      1]: expected return.
  """

  config: TransformerConfig
  init: Callable[[jax.Array], Params]
  apply: Callable[..., tuple[jax.Array, Any]]
  policy_logits: Callable[[Params, jax.Array], jax.Array]
  value_logits: Callable[[Params, jax.Array], jax.Array]
  value: Callable[[Params, jax.Array], jax.Array]


def make_network(
  config: TransformerConfig, number_values: np.ndarray | None = None
) -> Network:
  """Builds the network of a config.

  Args:
    config: see `TransformerConfig`.
    number_values: `[V]` value of every piece that is a number, NaN for the
      others; used by `config.number_features`.

  Raises:
    ValueError: number features without values, or of another vocabulary.
  """
  if config.number_features:
    found = None if number_values is None else np.shape(number_values)
    if found != (config.vocab_size,):
      raise ValueError(
        f"number_features needs number_values of shape ({config.vocab_size},), "
        f"got {found}: pass the tokenizer's number_values()"
      )
  decoder = Decoder(config)
  policy_head, value_head = PolicyHead(config), ValueHead(config)

  def spreads(key):
    """The modules' own start: constants, and spreads of what is random."""
    trunk_key, policy_key, value_key = jax.random.split(key, 3)
    tokens = jnp.zeros((1, 1), jnp.int32)
    hidden = jnp.zeros((1, config.width), config.dtype)
    trunk = decoder.init(trunk_key, tokens, tokens, None, None, None)["params"]
    head = policy_head.init(policy_key, hidden, trunk["embedding"])
    return {
      "trunk": trunk,
      "policy_head": head["params"] if "params" in head else {},
      "value_head": value_head.init(value_key, hidden)["params"],
    }

  @jax.jit
  def init(key):
    spread_key, noise_key, number_key = jax.random.split(key, 3)
    # Nothing is drawn for spreads. The base does not depend on the adapters.
    spread_key, adapter_key = jax.random.split(spread_key)
    params = with_noise(noise_key, spreads(spread_key), ("kernel", "embedding"))
    if config.lora_rank:
      params = with_noise(adapter_key, params, ("lora_a",))
    if config.number_features:
      params["trunk"]["embedding"] = with_number_features(
        number_key, params["trunk"]["embedding"], number_values
      )
    return params

  def apply(
    params, tokens, positions, cache=None, *, slot=None, segment_ids=None
  ):
    return decoder.apply(
      {"params": params["trunk"]}, tokens, positions, cache, slot, segment_ids
    )

  def policy_logits(params, hidden):
    return policy_head.apply(
      {"params": params["policy_head"]}, hidden, params["trunk"]["embedding"]
    )

  def value_logits(params, hidden):
    return value_head.apply({"params": params["value_head"]}, hidden)

  def value(params, hidden):
    return value_of(value_logits(params, hidden), hidden.ndim - 1)

  return Network(config, init, apply, policy_logits, value_logits, value)


def with_noise(
  key: jax.Array, spreads: Params, names: Collection[str]
) -> Params:
  """Draws the weights that have one of the names.

  The modules start these at their standard deviation; here each is multiplied
  by normal noise, drawn for all at once: a draw per weight compiles for
  seconds.
  """
  paths, structure = jax.tree_util.tree_flatten_with_path(spreads)
  is_random = [p[-1].key in names for p, _ in paths]
  leaves = [leaf for _, leaf in paths]
  sizes = [x.size for x, r in zip(leaves, is_random, strict=True) if r]
  noise = jax.random.normal(key, (sum(sizes),), jnp.float32)
  start = 0
  for i, leaf in enumerate(leaves):
    if is_random[i]:
      own = noise[start : start + leaf.size].reshape(leaf.shape)
      leaves[i] = leaf * own
      start += leaf.size
  return jax.tree.unflatten(structure, leaves)


def number_features(values: np.ndarray) -> np.ndarray:
  """What a number is like: its size and its remainders.

  `[N] -> [N, 2 + 2 periods]`: log(1 + v), v / 100, and sine and cosine of v at
  FEATURE_PERIODS, so that both nearness and divisibility are linear in it.
  """
  v = np.asarray(values, np.float64)[:, None]
  angle = 2 * np.pi * v / np.asarray(FEATURE_PERIODS, np.float64)[None, :]
  size = [np.log1p(np.abs(v)), v / 100]
  return np.concatenate([*size, np.cos(angle), np.sin(angle)], 1)


def with_number_features(
  key: jax.Array, embedding: jax.Array, number_values: np.ndarray
) -> jax.Array:
  """Embeddings `[V, D]` whose number rows are a projection of their features.

  Rows keep the scale of the embedding they replace.
  """
  is_number = ~np.isnan(number_values)
  features = number_features(np.where(is_number, number_values, 0.0))
  spread = features[is_number].std(0, keepdims=True)
  features = features / np.where(spread > 1e-6, spread, 1.0)
  projection = jax.random.normal(
    key, (features.shape[1], embedding.shape[1]), jnp.float32
  )
  rows = jnp.asarray(features, jnp.float32) @ projection
  rms = jnp.sqrt(jnp.mean(jnp.square(rows), -1, keepdims=True))
  rows = rows / rms * jnp.std(embedding)
  return jnp.where(jnp.asarray(is_number)[:, None], rows, embedding)


def next_token_log_probs(
  network: Network,
  params: Params,
  tokens: jax.Array,
  lengths: jax.Array,
  *,
  with_entropy: bool = False,
  segment_ids: jax.Array | None = None,
  positions: jax.Array | None = None,
  max_logits: int = MAX_LOGITS,
) -> tuple[jax.Array, ...]:
  """What a loss needs of whole rows.

  Rows may hold several documents (`packing.pack_rows`): then pass their
  `segment_ids` and `positions`; documents do not read each other.

  Args:
    network: the network.
    params: its parameters.
    tokens: `[B, T]` padded on the right.
    lengths: `[B]`.
    with_entropy: static; also return the entropy of the next token.
    segment_ids: `[B, T]` document of each token; None where a row is one.
    positions: `[B, T]` of each token in its document; needed with segments.
    max_logits: static; logits that may stand in memory at once. Where there
      are more they are made by groups of positions, now and once more for
      their gradient: a product more and `[B, T, V]` less.

  Returns:
    `(log_probs, value_logits)`, `[B, T]` float32: position t holds the
    log-prob of token t + 1 (0 at the last token of a document and in padding)
    and the value's logit (in bins `[B, T, K]`) after tokens 0 .. t. With
    entropy a third, `[B, T]` in nats, 0 where the log-prob is.

  Raises:
    ValueError: segments without positions or the reverse.
  """
  if (segment_ids is None) != (positions is None):
    raise ValueError(
      "segment_ids and positions belong together: pass both or neither"
    )
  batch, length = tokens.shape
  index = jnp.arange(length, dtype=jnp.int32)[None, :]
  is_known = index + 1 < lengths[:, None]
  if segment_ids is None:
    positions = jnp.broadcast_to(index, (batch, length))
  else:
    is_known &= segment_ids == jnp.roll(segment_ids, -1, axis=1)
  hidden, _ = network.apply(params, tokens, positions, segment_ids=segment_ids)
  following = jnp.roll(tokens, -1, axis=1)

  def read_off(hidden, following):
    logits = network.policy_logits(params, hidden)
    found = (selected_log_probs(logits, following),)
    return (*found, next_token_entropies(logits)) if with_entropy else found

  found = _in_groups(
    read_off,
    hidden,
    following,
    max(max_logits // (batch * network.config.vocab_size), 1),
  )
  log_probs, *entropies = (jnp.where(is_known, x, 0.0) for x in found)
  return log_probs, network.value_logits(params, hidden), *entropies


def _in_groups(read_off, hidden, following, size):
  """`read_off` of `[B, T, ...]`, by groups of `size` positions.

  Groups run over time, so that rows stay where a mesh has put them.
  """
  batch, length = following.shape
  if length <= size:
    return read_off(hidden, following)
  num_groups = -(-length // size)
  size = -(-length // num_groups)
  spare = num_groups * size - length

  def grouped(x):
    x = jnp.pad(x, ((0, 0), (0, spare), *((0, 0),) * (x.ndim - 2)))
    x = x.reshape(batch, num_groups, size, *x.shape[2:])
    return x.swapaxes(0, 1)

  found = jax.lax.map(
    jax.checkpoint(lambda pair: read_off(*pair)),
    (grouped(hidden), grouped(following)),
  )
  return tuple(x.swapaxes(0, 1).reshape(batch, -1)[:, :length] for x in found)


def next_token_entropies(logits: jax.Array) -> jax.Array:
  """-sum_v p(v) log p(v), in nats: `[..., V]` -> `[...]`."""
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def selected_log_probs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """log softmax(logits)[token]: `[..., V]`, `[...]` -> `[...]`."""
  picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return picked - jax.nn.logsumexp(logits, axis=-1)
