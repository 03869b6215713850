"""The tree as a struct of arrays, and the arithmetic of one node.

Node-centred: every array is `[B, N]`, a node's statistics belong to the node,
and the A children of one expansion have consecutive indices, so that reading a
node's candidates is one slice. A node is visited when a simulation passes
through it, its own evaluation included: `num_visits[n]` is 1 plus the visits of
its children, as in mctx. Functions without "one" in their name work on a batch.
"""

import jax
import jax.numpy as jnp
from flax import struct

ROOT = 0
NO_NODE = -1
NO_PARENT = -1
UNEXPANDED = -1


@struct.dataclass
class Tree:
  """B trees of at most N nodes.

  | field        | shape  | meaning                                          |
  |--------------|--------|--------------------------------------------------|
  | parent       | [B, N] | int32 index of the parent, NO_PARENT at the root |
  | depth        | [B, N] | int32 steps from the root                        |
  | first_child  | [B, N] | int32 first of A children, or UNEXPANDED         |
  | num_visits   | [B, N] | int32 simulations that passed or ended here      |
  | mean_value   | [B, N] | mean return from here over those; 0 if unvisited |
  | value        | [B, N] | the model's estimate, 0 where terminal           |
  | reward       | [B, N] | on entering: the outcome where terminal, else 0  |
  | prior_logits | [B, N] | log prior among the valid siblings: exp sums to 1|
  | is_terminal  | [B, N] | True at the end of a solution                    |
  | is_valid     | [B, N] | False for unused slots and merged candidates     |
  | next_free    | [B]    | int32 first unused index                         |

  `num_candidates` is A, static.
  """

  parent: jax.Array
  depth: jax.Array
  first_child: jax.Array
  num_visits: jax.Array
  mean_value: jax.Array
  value: jax.Array
  reward: jax.Array
  prior_logits: jax.Array
  is_terminal: jax.Array
  is_valid: jax.Array
  next_free: jax.Array
  num_candidates: int = struct.field(pytree_node=False)


def read(array: jax.Array, node: jax.Array) -> jax.Array:
  """`array[b, node[b, ...]]` for `[B, N, ...]` and `[B, ...]`.

  NO_NODE reads the root. Per tree under `vmap`, so that a batch sharded over B
  needs no communication.
  """
  return jax.vmap(
    lambda row, at: row.at[at].get(mode="clip", wrap_negative_indices=False)
  )(array, node)


def write(array: jax.Array, node: jax.Array, update: jax.Array) -> jax.Array:
  """`array` with `array[b, node[b, ...]] = update[b, ...]`.

  NO_NODE and indices from N on write nothing.
  """
  return jax.vmap(
    lambda row, at, new: row.at[at].set(
      new.astype(row.dtype), mode="drop", wrap_negative_indices=False
    )
  )(array, node, update)


def make_tree(
  root_value: jax.Array, *, capacity: int, num_candidates: int
) -> Tree:
  """Trees that hold the root only, visited once and not yet expanded.

  Args:
    root_value: `[B]` estimate of each problem; its dtype is the tree's.
    capacity: N.
    num_candidates: A.
  """
  shape = (*root_value.shape, capacity)
  zeros = jnp.zeros(shape, root_value.dtype)
  counts = jnp.zeros(shape, jnp.int32)
  no = jnp.zeros(shape, bool)
  return Tree(
    parent=jnp.full(shape, NO_PARENT, jnp.int32),
    depth=counts,
    first_child=jnp.full(shape, UNEXPANDED, jnp.int32),
    num_visits=counts.at[:, ROOT].set(1),
    mean_value=zeros.at[:, ROOT].set(root_value),
    value=zeros.at[:, ROOT].set(root_value),
    reward=zeros,
    prior_logits=zeros,
    is_terminal=no,
    is_valid=no.at[:, ROOT].set(True),
    next_free=jnp.ones(root_value.shape, jnp.int32),
    num_candidates=num_candidates,
  )


def normalize_logits(logits: jax.Array, is_valid: jax.Array) -> jax.Array:
  """Log-probs `[..., A]` over the valid entries; lowest finite elsewhere."""
  lowest = jnp.finfo(logits.dtype).min
  masked = jnp.where(is_valid, logits, lowest)
  return jnp.where(is_valid, jax.nn.log_softmax(masked, axis=-1), lowest)


def add_children(
  tree: Tree,
  node: jax.Array,
  first_child: jax.Array,
  is_active: jax.Array,
  *,
  prior_logits: jax.Array,
  value: jax.Array,
  reward: jax.Array,
  is_terminal: jax.Array,
  is_valid: jax.Array,
) -> Tree:
  """Writes the candidates of `node` `[B, W]` as nodes; they are unvisited.

  Args:
    tree: the trees.
    node: `[B, W]` nodes that were expanded.
    first_child: `[B, W]` where the candidates go; consecutive over W from
      `tree.next_free` on for the active ones.
    is_active: `[B, W]`; nothing is written where False.
    prior_logits: `[B, W, A]`, normalised here over the valid candidates.
    value: `[B, W, A]`.
    reward: `[B, W, A]`.
    is_terminal: `[B, W, A]`.
    is_valid: `[B, W, A]`.
  """
  num_candidates = tree.num_candidates
  shape = (*node.shape, num_candidates)
  flat = (node.shape[0], -1)
  node = jnp.where(is_active, node, NO_NODE)
  child = (
    first_child[:, :, None]
    + jnp.arange(num_candidates, dtype=jnp.int32)[None, None]
  )
  child = jnp.where(is_active[:, :, None], child, NO_NODE).reshape(flat)
  depth = read(tree.depth, node) + 1

  def write_children(array, update):
    return write(array, child, jnp.broadcast_to(update, shape).reshape(flat))

  return tree.replace(
    parent=write_children(tree.parent, node[:, :, None]),
    depth=write_children(tree.depth, depth[:, :, None]),
    first_child=write(tree.first_child, node, first_child),
    value=write_children(tree.value, value),
    reward=write_children(tree.reward, reward),
    prior_logits=write_children(
      tree.prior_logits, normalize_logits(prior_logits, is_valid)
    ),
    is_terminal=write_children(tree.is_terminal, is_terminal & is_valid),
    is_valid=write_children(tree.is_valid, is_valid),
    next_free=tree.next_free
    + num_candidates * jnp.sum(is_active, axis=-1, dtype=jnp.int32),
  )


@struct.dataclass
class Candidates:
  """What a selection rule sees: one expanded node and its A candidates.

  Attributes:
    num_visits: `[A]` visits of each child.
    q_values: `[A]` reward + discount * mean value; meaningless if unvisited.
    prior_logits: `[A]` log prior.
    is_valid: `[A]`.
    node_visits: `[]` visits of the node itself.
    node_mean: `[]` its mean return.
    node_value: `[]` the model's estimate of it.
  """

  num_visits: jax.Array
  q_values: jax.Array
  prior_logits: jax.Array
  is_valid: jax.Array
  node_visits: jax.Array
  node_mean: jax.Array
  node_value: jax.Array


def one_node(tree: Tree, node: jax.Array, discount: float) -> Candidates:
  """The candidates of a node of one tree (arrays `[N]`), expanded or not.

  Of an unexpanded node the candidates are some other nodes', all marked
  invalid.
  """
  first = tree.first_child[node]

  def children(array):
    return jax.lax.dynamic_slice_in_dim(array, first, tree.num_candidates)

  return Candidates(
    num_visits=children(tree.num_visits),
    q_values=children(tree.reward) + discount * children(tree.mean_value),
    prior_logits=children(tree.prior_logits),
    is_valid=children(tree.is_valid) & (first != UNEXPANDED),
    node_visits=tree.num_visits[node],
    node_mean=tree.mean_value[node],
    node_value=tree.value[node],
  )


def backup(
  tree: Tree,
  leaf: jax.Array,
  leaf_value: jax.Array,
  is_active: jax.Array,
  *,
  discount: float,
) -> Tree:
  """Adds one return to every node from `leaf` `[B]` up to the root.

    G at the leaf = leaf_value;  G at the parent = reward + discount * G
    mean <- (mean * visits + G) / (visits + 1);  visits <- visits + 1

  Trees that are not active stay as they are.
  """
  # The bound is one number for the whole batch: a bound per tree would make
  # every turn of the loop copy the arrays of the trees that are finished.
  leaf = jnp.where(is_active, leaf, NO_NODE)
  num_levels = jnp.max(jnp.where(is_active, read(tree.depth, leaf) + 1, 0))

  def one_level(_, carry):
    node, returned, num_visits, mean_value = carry
    # Both reads before both writes, or XLA copies the arrays at each level.
    count, mean = jax.lax.optimization_barrier(
      (read(num_visits, node), read(mean_value, node))
    )
    total = mean * count.astype(mean.dtype) + returned
    mean = total / (count + 1).astype(mean.dtype)
    num_visits = write(num_visits, node, count + 1)
    mean_value = write(mean_value, node, mean)
    returned = read(tree.reward, node) + discount * returned
    # Above the root is NO_PARENT, which writes nothing.
    node = jnp.where(node == NO_NODE, NO_NODE, read(tree.parent, node))
    return node, returned, num_visits, mean_value

  _, _, num_visits, mean_value = jax.lax.fori_loop(
    0,
    num_levels,
    one_level,
    (leaf, leaf_value, tree.num_visits, tree.mean_value),
  )
  return tree.replace(num_visits=num_visits, mean_value=mean_value)


def child_visits(tree: Tree, node: jax.Array) -> jax.Array:
  """Visits `[B, A]` of the children of `node` `[B]`; 0 where unexpanded."""

  def one(tree, node):
    seen = one_node(tree, node, 1.0)
    return jnp.where(seen.is_valid, seen.num_visits, 0)

  return jax.vmap(one)(tree, node)


def visit_probs(tree: Tree, node: jax.Array) -> jax.Array:
  """Normalised child visits `[B, A]` of `node` `[B]`.

  AlphaGo Zero's policy target (Silver et al., 2017). All zeros where no child
  was visited, so that such a node teaches nothing.
  """
  visits = child_visits(tree, node).astype(tree.value.dtype)
  total = jnp.sum(visits, axis=-1, keepdims=True)
  return visits / jnp.maximum(total, 1)
