"""What a step model remembers of the nodes of its trees.

A node keeps its own step: tokens, log-probs, and in the tree memory keys and
values. The context of a node is the prompt and the steps of its ancestors,
gathered from their blocks, or read anew from their tokens.

The blocks and the prompt may be kept in int8, and a window with attention sinks
bounds what of a context is read at all; see `CacheOptions`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from o1jax.policy import cache as cache_lib
from o1jax.policy.network import Network, make_network
from o1jax.policy.quantize import Quantized, quantize
from o1jax.search.tree import ROOT, read


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheOptions:
  """How much of a tree's keys and values is kept and read.

  Attributes:
    dtype: "network" keeps keys and values as they were computed; "int8" rounds
      them, with one scale for a node's step (and for 16 positions of the
      prompt) of each key/value head. None is then off by more than half a
      scale; log-probs of the random policy of the tests move by less than 0.02
      nats.
    window: positions that a token reads back, itself included, whatever the
      policy was trained with; None for all. Where it holds a node's whole text
      nothing changes.
    num_sinks: first positions that are read from beyond the window as well.

  Raises:
    ValueError: an unknown dtype, a window below 1, or sinks without a window.
  """

  dtype: str = "network"
  window: int | None = None
  num_sinks: int = 0

  def __post_init__(self):
    cache_lib.check_cache_dtype(self.dtype)
    if self.window is not None and self.window < 1:
      raise ValueError(f"window={self.window} must be 1 or more, or None")
    if self.num_sinks < 0:
      raise ValueError(f"num_sinks={self.num_sinks} must be 0 or more")
    if self.num_sinks and self.window is None:
      raise ValueError(
        f"num_sinks={self.num_sinks} without a window: set window, or "
        "num_sinks to 0"
      )


def windowed(network: Network, options: CacheOptions) -> Network:
  """The same network where every layer reads through the window.

  Raises:
    ValueError: the network has windows of its own.
  """
  if options.window is None:
    return network
  if network.config.sliding_window is not None:
    raise ValueError(
      f"window={options.window}: the policy has windows of its own "
      f"(sliding_window={network.config.sliding_window}); set window to None"
    )
  config = dataclasses.replace(
    network.config,
    sliding_window=options.window,
    num_sinks=options.num_sinks,
    number_features=False,  # only read where parameters are drawn
  )
  return network._replace(config=config, apply=make_network(config).apply)


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
    keys, values: per layer `[B, N + A, J, S, E]`, plain or `Quantized` with
      one scale for the S slots of a head (tree memory), else ().
    rollout_tokens: `[B, N + A, M, T]` rollouts from each node; M may be 0.
    feedback_tokens: `[B, N + A, F]` what the host says of each node's answer,
      with which its revisions begin; None where the policy says it itself.
    feedback_lengths: `[B, N + A]` how many tokens of it count, or None.
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
  keys: cache_lib.LayerArrays
  values: cache_lib.LayerArrays
  rollout_tokens: jax.Array
  feedback_tokens: jax.Array | None = None
  feedback_lengths: jax.Array | None = None


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

  def step_back(node, level):
    on_path = read(store.depth, node) >= level
    above = jnp.where(on_path, read(store.parent, node), node)
    return above, jnp.where(on_path, node, 0)

  levels = jnp.arange(1, max_depth + 1)
  _, path = jax.lax.scan(step_back, node, levels, reverse=True)
  return jnp.moveaxis(path, 0, -1)


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
    shape = (trees, slots, x.shape[1], step_tokens, x.shape[3])
    if isinstance(x, Quantized):
      scales = jnp.zeros((*shape[:3], 1), jnp.float32)
      return Quantized(jnp.zeros(shape, jnp.int8), scales, x.dtype)
    return jnp.zeros(shape, x.dtype)

  hidden = jnp.zeros((trees, slots, last_hidden.shape[-1]), last_hidden.dtype)
  return store.replace(
    prompt=prompt,
    keys=tuple(block(k) for k in prompt.keys),
    values=tuple(block(v) for v in prompt.values),
    last_hidden=hidden.at[:, ROOT].set(last_hidden),
  )


def with_feedback(store, max_tokens, pad_id) -> NodeStore:
  """Adds room for feedback on every node."""
  slots = store.lengths.shape
  return store.replace(
    feedback_tokens=jnp.full((*slots, max_tokens), pad_id, jnp.int32),
    feedback_lengths=jnp.zeros(slots, jnp.int32),
  )


def step_memory(rows, dtype: str) -> dict[str, Any]:
  """What the tree memory keeps of candidates, `[rows, A, ...]` by field.

  In int8 a step of a head shares a scale; slots behind its end become 0.
  """
  step_tokens = rows.tokens.shape[-1]
  is_token = jnp.arange(step_tokens)[None, None] < rows.lengths[..., None]

  def keep(x):
    if dtype == "int8":
      return quantize(x, step_tokens, is_token[:, :, None])
    return x

  return dict(
    last_hidden=rows.last_hidden,
    keys=tuple(map(keep, rows.keys)),
    values=tuple(map(keep, rows.values)),
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
    """`[B, N, J, S, E]` -> `[B * W, J, R * S, E]`, heads before time.

    Scales, `[B, N, J, 1]`, become `[B * W, J, R]`.
    """
    _, _, heads, slots, *width = blocks.shape
    found = blocks[tree[..., None], path].swapaxes(2, 3)
    return found.reshape(rows, heads, num_steps * slots, *width)

  step = (tree[..., None], path)
  start = store.end_positions[step] - store.lengths[step]
  slots = jnp.arange(store.tokens.shape[-1])[None, None, None]
  positions = (start[..., None] + slots).reshape(rows, -1)
  steps = cache_lib.Prefix(
    keys=jax.tree.map(gather, store.keys),
    values=jax.tree.map(gather, store.values),
    positions=positions,
    mask=is_step.reshape(rows, -1),
  )
  return cache_lib.join([prompt, steps]), last_hidden


def whole_texts(store, steps, is_step) -> tuple[jax.Array, jax.Array]:
  """Prompt and path without holes: `[B * W, P + R * S]`, lengths `[B * W]`."""
  num_leaves = steps.shape[1]
  repeat = functools.partial(jnp.repeat, repeats=num_leaves, axis=0)
  prompt = repeat(store.prompt_tokens)
  index = jnp.arange(prompt.shape[1])[None]
  is_prompt = index < repeat(store.prompt_lengths)[:, None]
  tokens = jnp.concatenate([prompt, merge_rows(steps)], 1)
  mask = jnp.concatenate([is_prompt, merge_rows(is_step)], 1)
  order = jnp.argsort(~mask, axis=1, stable=True)
  return jnp.take_along_axis(tokens, order, axis=1), mask.sum(1)


def recomputed_context(network, params, store, steps, is_step):
  """The context of each node by reading prompt and path again."""
  tokens, lengths = whole_texts(store, steps, is_step)
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
  return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def split_rows(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """`[B * W, ...] -> [B, W, ...]`."""
  return x.reshape(*shape, *x.shape[1:])
