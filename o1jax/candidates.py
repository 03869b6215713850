"""The candidates of nodes, on their way into a tree.

Their keys, the context that they are written behind and that what follows them
is written behind, their priors once equal ones are merged, and what the store
keeps of them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from o1jax.node_store import NodeStore, merge_rows
from o1jax.policy import cache as cache_lib
from o1jax.policy import sample
from o1jax.search.expansion import fold_in_all
from o1jax.search.tree import NO_NODE

# Log ratios of probabilities are rounded to one part in so many of a nat: above
# the last bits of float32, below the 1e-5 that trees are compared with.
_PRIOR_STEPS = 2**17


class Context(NamedTuple):
  """What the candidates of each node are written behind; B * W rows.

  Attributes:
    prefix: `Prefix` of the prompt and the path.
    last_hidden: `[B * W, D]` at its last token.
    end: `[B * W]` position of the token that follows.
    read_tokens: `[B, W]` tokens that were read again for it, or 0.
    text: tokens `[B * W, P + R * S]` of prompt and path and how many they are,
      where a draft reads them; else None.
  """

  prefix: cache_lib.Prefix
  last_hidden: jax.Array
  end: jax.Array
  read_tokens: jax.Array | int
  text: tuple[jax.Array, jax.Array] | None = None


def sampled_priors(
  rows: sample.DecodedRows, merge_duplicates: bool
) -> tuple[jax.Array, jax.Array]:
  """Priors of candidates that were sampled, equal ones merged.

  A candidate drawn n times of A has the prior (n / A) p / q, p the policy's
  probability and q that of the distribution it was drawn from: Sampled MuZero,
  arXiv 2104.06303, Eq. 5. log p / q is rounded, so that where p is q but for
  the last bits, ties between priors are ties on every device.

  Returns:
    `(is_valid, prior_logits)`, both `[rows, A]`; of equal candidates the first
    is the valid one.
  """
  ratio = (rows.policy_log_probs - rows.behavior_log_probs).sum(-1)
  ratio = jnp.round(ratio * _PRIOR_STEPS) / _PRIOR_STEPS
  is_written = rows.lengths > 0
  if not merge_duplicates:
    return is_written, ratio
  is_equal = (rows.tokens[:, :, None] == rows.tokens[:, None, :]).all(-1)
  index = jnp.arange(rows.tokens.shape[1])
  is_later = index[:, None] > index[None, :]
  is_first = ~(is_equal & is_later[None]).any(-1)
  return is_written & is_first, ratio + jnp.log(is_equal.sum(-1))


def merge_blocks(
  node: jax.Array,
  tokens: jax.Array,
  is_valid: jax.Array,
  prior_logits: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Merges candidates that several blocks of one node drew in the same call.

  Args:
    node: `[B, W]` nodes that are expanded, each as often as it gets blocks.
    tokens: `[B, W, A, S]` of the new candidates.
    is_valid: `[B, W, A]`.
    prior_logits: `[B, W, A]`, relative to one another over all blocks of a
      node.

  Returns:
    `is_valid`, where of equal candidates the first is left, and `prior_logits`,
    where it weighs as much as all of them.
  """
  shape = is_valid.shape
  flat = (shape[0], -1)
  node = jnp.repeat(node, shape[-1], axis=-1)
  tokens = tokens.reshape(*node.shape, -1)
  is_valid, prior_logits = is_valid.reshape(flat), prior_logits.reshape(flat)
  is_equal = (tokens[:, :, None] == tokens[:, None]).all(-1)
  is_equal &= node[:, :, None] == node[:, None]
  is_equal &= is_valid[:, :, None] & is_valid[:, None]
  index = jnp.arange(node.shape[1])
  is_later = index[:, None] > index[None, :]
  is_first = is_valid & ~(is_equal & is_later[None]).any(-1)
  lowest = jnp.finfo(prior_logits.dtype).min
  mass = jnp.where(is_equal, prior_logits[:, None], lowest)
  mass = jnp.where(is_first, jax.nn.logsumexp(mass, axis=-1), prior_logits)
  return is_first.reshape(shape), mass.reshape(shape)


def merge_into_siblings(
  store: NodeStore,
  node: jax.Array,
  siblings: jax.Array,
  tokens: jax.Array,
  is_valid: jax.Array,
  prior_logits: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Merges candidates that an earlier expansion of their node drew already.

  Args:
    store: the nodes.
    node: `[B, W]`, see `merge_blocks`, whose work is done.
    siblings: `[B, W, E]`, see `contracts.Request`.
    tokens: `[B, W, A, S]` of the new candidates.
    is_valid: `[B, W, A]`.
    prior_logits: `[B, W, A]`.

  Returns:
    `is_valid` without the merged ones, and `Expansion.sibling_logits`.
  """
  lowest = jnp.finfo(prior_logits.dtype).min
  row = jnp.arange(siblings.shape[0])[:, None, None]
  old = store.tokens[row, jnp.maximum(siblings, 0)]
  is_equal = (tokens[:, :, :, None] == old[:, :, None]).all(-1)
  is_equal &= is_valid[..., None] & (siblings != NO_NODE)[:, :, None]
  more = jnp.where(is_equal, prior_logits[..., None], lowest)
  more = jax.nn.logsumexp(more, axis=2)
  # All blocks of a node say the same of its siblings, whichever drew them.
  is_same = node[:, :, None] == node[:, None]
  more = jnp.where(is_same[..., None], more[:, None], lowest).max(2)
  return is_valid & ~is_equal.any(-1), more


def named_keys(keys: jax.Array, num_candidates: int):
  """Keys of steps and of rollouts, `[rows, A]` each, from `[rows]`.

  A row's key is folded with 0 for the steps and with 1 for the rollouts, then
  with the candidate's index.
  """
  shape = (keys.shape[0], num_candidates)
  index = jnp.broadcast_to(jnp.arange(num_candidates, dtype=jnp.uint32), shape)
  # Flat: XLA:CPU writes out loops over short axes, which takes time to compile.
  each = jnp.broadcast_to(keys[:, None], shape).reshape(-1)

  def keys_for(purpose):
    ids = jnp.stack([jnp.full_like(index, purpose), index], axis=-1)
    return jax.vmap(fold_in_all)(each, merge_rows(ids)).reshape(shape)

  return keys_for(0), keys_for(1)


def new_nodes(store, node, end, rows):
  """Fields of the store for the candidates of each node, `[B * W, A, ...]`."""
  tree = jnp.arange(node.shape[0])[:, None]

  def per_row(x):
    return jnp.broadcast_to(x.reshape(-1, 1), rows.lengths.shape)

  def so_far(name):
    return per_row(getattr(store, name)[tree, node])

  new = dict(
    tokens=rows.tokens,
    lengths=rows.lengths,
    parent=per_row(node),
    depth=so_far("depth") + 1,
    end_positions=per_row(end) + rows.lengths,
    is_finished=rows.ended,
    behavior_log_probs=rows.behavior_log_probs,
    policy_log_probs=rows.policy_log_probs,
    log_prob=so_far("log_prob") + rows.policy_log_probs.sum(-1),
  )
  if rows.confidence is not None:
    new["confidence"] = so_far("confidence") + rows.confidence
    new["entropy"] = so_far("entropy") + rows.entropy
  return new


def behind_candidates(context: Context, rows, lengths) -> Context:
  """The context of what follows the first `lengths` tokens of each candidate.

  `B * W * A` rows; `last_hidden` is at the candidate's own last token.
  """
  num_candidates, slots = rows.tokens.shape[1:]
  repeat = functools.partial(jnp.repeat, repeats=num_candidates, axis=0)
  index = jnp.arange(slots)[None]
  own = cache_lib.Prefix(
    keys=tuple(map(merge_rows, rows.keys)),
    values=tuple(map(merge_rows, rows.values)),
    positions=repeat(context.end)[:, None] + index,
    mask=index < merge_rows(lengths)[:, None],
  )
  return Context(
    prefix=cache_lib.join([jax.tree.map(repeat, context.prefix), own]),
    last_hidden=merge_rows(rows.last_hidden),
    end=merge_rows(context.end[:, None] + lengths),
    read_tokens=0,
  )
