"""What a step model remembers of the nodes of its trees.

A node keeps its own step: tokens, log-probs, and in the tree memory keys and
values. The context of a node is the prompt and the steps of its ancestors,
gathered from their blocks, or read anew from their tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from o1jax.policy import cache as cache_lib
from o1jax.search.tree import ROOT


@struct.dataclass
class NodeStore:
  """Tokens and memory of every node of B trees.

  N counts the slots for nodes; A spare slots behind them take the writes of
  trees that are not active in an expansion.

  Attributes:
    prompt_tokens: `[B, P]`, padded on the right.
    prompt_lengths: `[B]`.
    prompt: `Prefix` of the prompts (tree memory), else None.
    tokens: `[B, N + A, S]` tokens of each node's own step, pad after its end.
    lengths: `[B, N + A]` tokens of each step; 0 at the root.
    parent: `[B, N + A]` slot of the parent.
    depth: `[B, N + A]` steps from the root.
    end_positions: `[B, N + A]` position of the token that would follow.
    is_finished: `[B, N + A]` True where the step ends with the end mark.
    behavior_log_probs: `[B, N + A, S]` of the distribution drawn from.
    policy_log_probs: `[B, N + A, S]` of the model itself.
    log_prob: `[B, N + A]` of the solution up to each node under the policy.
    confidence, entropy: `[B, N + A]` sums over its tokens, see
      policy/sample.py; None where no guidance reads them.
    last_hidden: `[B, N + A, D]` hidden state at the last token (tree memory).
    keys, values: per layer `[B, N + A, J, S, E]` (tree memory), else ().
    rollout_tokens: `[B, N + A, M, T]` rollouts from each node; M may be 0.
  """

  prompt_tokens: jax.Array
  prompt_lengths: jax.Array
  prompt: Any
  tokens: jax.Array
  lengths: jax.Array
  parent: jax.Array
  depth: jax.Array
  end_positions: jax.Array
  is_finished: jax.Array
  behavior_log_probs: jax.Array
  policy_log_probs: jax.Array
  log_prob: jax.Array
  confidence: jax.Array | None
  entropy: jax.Array | None
  last_hidden: jax.Array | None
  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  rollout_tokens: jax.Array


def path_to(store: NodeStore, node: jax.Array, max_depth: int) -> jax.Array:
  """Slots on the way from below the root to `node`.

  Args:
    store: the nodes.
    node: `[B, W]` slots.
    max_depth: length of the result.

  Returns:
    `[B, W, max_depth]` slots, first step first; 0 (the root, which holds no
    tokens) past the node's depth.
  """
  row = jnp.arange(node.shape[0])[:, None]
  steps = []
  for level in range(max_depth, 0, -1):
    on_path = store.depth[row, node] >= level
    steps.append(jnp.where(on_path, node, 0))
    node = jnp.where(on_path, store.parent[row, node], node)
  if not steps:
    return jnp.zeros((*node.shape, 0), node.dtype)
  return jnp.stack(steps[::-1], axis=-1)


def path_tokens(
  store: NodeStore, path: jax.Array, *, with_ends: bool = True
) -> tuple[jax.Array, jax.Array]:
  """Tokens of the steps on a path `[B, W, R]`, as `[B, W, R * S]` and mask.

  Without ends the end marks of finished solutions are masked.
  """
  row = jnp.arange(path.shape[0])[:, None, None]
  tokens = store.tokens[row, path]
  steps = jnp.arange(tokens.shape[-1])
  lengths = store.lengths[row, path]
  if not with_ends:
    lengths = lengths - store.is_finished[row, path]
  mask = steps[None, None, None, :] < lengths[..., None]
  flat = (*path.shape[:2], -1)
  return tokens.reshape(flat), mask.reshape(flat)


def empty_store(
  problems, num_slots, max_step_tokens, rollout_shape, pad_id
) -> NodeStore:
  """A store that holds the roots, without keys and values."""
  per_node = (problems.tokens.shape[0], num_slots)
  per_token = (*per_node, max_step_tokens)
  none = jnp.zeros(per_node, jnp.int32)
  return NodeStore(
    prompt_tokens=problems.tokens,
    prompt_lengths=problems.lengths,
    prompt=None,
    tokens=jnp.full(per_token, pad_id, jnp.int32),
    lengths=none,
    parent=none,
    depth=none,
    end_positions=none.at[:, ROOT].set(problems.lengths),
    is_finished=jnp.zeros(per_node, bool),
    behavior_log_probs=jnp.zeros(per_token, jnp.float32),
    policy_log_probs=jnp.zeros(per_token, jnp.float32),
    log_prob=jnp.zeros(per_node, jnp.float32),
    confidence=None,
    entropy=None,
    last_hidden=None,
    keys=(),
    values=(),
    rollout_tokens=jnp.full((*per_node, *rollout_shape), pad_id, jnp.int32),
  )


def with_memory(store, prompt, last_hidden) -> NodeStore:
  """Adds room for the keys and values of every node."""
  trees, slots, step_tokens = store.tokens.shape

  def block(x):
    return jnp.zeros(
      (trees, slots, x.shape[1], step_tokens, x.shape[3]), x.dtype
    )

  hidden = jnp.zeros((trees, slots, last_hidden.shape[-1]), last_hidden.dtype)
  return store.replace(
    prompt=prompt,
    keys=tuple(block(k) for k in prompt.keys),
    values=tuple(block(v) for v in prompt.values),
    last_hidden=hidden.at[:, ROOT].set(last_hidden),
  )


def gathered_context(store, node, path, is_step):
  """Prompt and ancestors' blocks of each node `[B, W]`, `B * W` rows."""
  num_trees, num_leaves, num_steps = path.shape
  rows = num_trees * num_leaves
  tree = jnp.arange(num_trees)[:, None]
  repeat = functools.partial(jnp.repeat, repeats=num_leaves, axis=0)
  prompt = jax.tree.map(repeat, store.prompt)
  last_hidden = store.last_hidden[tree, node].reshape(rows, -1)
  if not num_steps:
    return prompt, last_hidden

  def gather(blocks):
    """`[B, N, J, S, E]` -> `[B * W, J, R * S, E]`, heads before time."""
    _, _, heads, step_tokens, width = blocks.shape
    found = blocks[tree[..., None], path].swapaxes(2, 3)
    return found.reshape(rows, heads, num_steps * step_tokens, width)

  step = (tree[..., None], path)
  start = store.end_positions[step] - store.lengths[step]
  slots = jnp.arange(store.tokens.shape[-1])[None, None, None]
  positions = (start[..., None] + slots).reshape(rows, -1)
  steps = cache_lib.Prefix(
    keys=tuple(gather(k) for k in store.keys),
    values=tuple(gather(v) for v in store.values),
    positions=positions,
    mask=is_step.reshape(rows, -1),
  )
  return cache_lib.join([prompt, steps]), last_hidden


def recomputed_context(network, params, store, steps, is_step):
  """The same by reading prompt and path again, packed without holes."""
  num_leaves = steps.shape[1]
  repeat = functools.partial(jnp.repeat, repeats=num_leaves, axis=0)
  prompt = repeat(store.prompt_tokens)
  index = jnp.arange(prompt.shape[1])[None]
  is_prompt = index < repeat(store.prompt_lengths)[:, None]
  tokens = jnp.concatenate([prompt, merge_rows(steps)], 1)
  mask = jnp.concatenate([is_prompt, merge_rows(is_step)], 1)
  order = jnp.argsort(~mask, axis=1, stable=True)
  tokens = jnp.take_along_axis(tokens, order, axis=1)
  lengths = mask.sum(1)
  prefix, last_hidden = cache_lib.prefix_from_prompt(
    network, params, tokens, lengths
  )
  return prefix, last_hidden, lengths.reshape(steps.shape[:2])


def write_nodes(store, first_child, new) -> NodeStore:
  """Puts candidates `[B, W, A, ...]` at `first_child` `[B, W]`.

  Trees that are not active have first_child = N and write to the spare slots.
  """

  def put_one(array, block, slot):
    start = (slot,) + (0,) * (array.ndim - 1)
    return jax.lax.dynamic_update_slice(array, block, start)

  def put(array, blocks):
    for leaf in range(first_child.shape[1]):
      array = jax.vmap(put_one)(array, blocks[:, leaf], first_child[:, leaf])
    return array

  old = {name: getattr(store, name) for name in new}
  return store.replace(**jax.tree.map(put, old, new))


def merge_rows(x: jax.Array) -> jax.Array:
  """`[B, W, ...] -> [B * W, ...]`."""
  return x.reshape(-1, *x.shape[2:])


def split_rows(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """`[B * W, ...] -> [B, W, ...]`."""
  return x.reshape(*shape, *x.shape[1:])
