"""The tree as a struct of arrays, and the arithmetic of one node.

Node-centred: every array is `[B, N]`, a node's statistics belong to the node,
and the A children of one expansion have consecutive indices, a block, so that
reading a node's candidates is one slice. A node that was expanded again has
several blocks, at most M. A node is visited when
a simulation passes through it, its own evaluation included: `num_visits[n]` is
1 plus the visits of its children, as in mctx. Functions without "one" in their
name work on a batch.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

ROOT = 0
NO_NODE = -1
NO_PARENT = -1
UNEXPANDED = -1

# Levels that `backup` takes at once: small arrays take as long as there are
# operations, and these are as many for some levels as for one.
_NUM_LEVELS = 4


@struct.dataclass
class Tree:
  """B trees of at most N nodes.

  | field        | shape  | meaning                                          |
  |--------------|--------|--------------------------------------------------|
  | parent       | [B, N] | int32 index of the parent, NO_PARENT at the root |
  | depth        | [B, N] | int32 steps from the root                        |
  | first_child  | [B, N] | int32 first of A children, or UNEXPANDED         |
  | more_blocks  | [B, N, | int32 first child of its further blocks, or      |
  |              |  M - 1]| UNEXPANDED                                       |
  | num_blocks   | [B, N] | int32 expansions of the node                     |
  | log_mass     | [B, N] | log of what its candidates' priors sum to before |
  |              |        | they are normalised; kept where M > 1            |
  | num_visits   | [B, N] | int32 simulations that passed or ended here      |
  | mean_value   | [B, N] | mean return from here over those; 0 if unvisited |
  | value        | [B, N] | the model's estimate, 0 where terminal           |
  | reward       | [B, N] | on entering: the outcome where terminal, else 0  |
  | prior_logits | [B, N] | log prior among the valid siblings: exp sums to 1|
  | is_terminal  | [B, N] | True where nothing can follow                    |
  | is_solution  | [B, N] | True where an answer is complete                 |
  | is_valid     | [B, N] | False for unused slots and merged candidates     |
  | next_free    | [B]    | int32 first unused index                         |

  `num_candidates` is A and `max_blocks` is M, both static.
  """

  parent: jax.Array
  depth: jax.Array
  first_child: jax.Array
  more_blocks: jax.Array
  num_blocks: jax.Array
  log_mass: jax.Array
  num_visits: jax.Array
  mean_value: jax.Array
  value: jax.Array
  reward: jax.Array
  prior_logits: jax.Array
  is_terminal: jax.Array
  is_solution: jax.Array
  is_valid: jax.Array
  next_free: jax.Array
  num_candidates: int = struct.field(pytree_node=False)
  max_blocks: int = struct.field(pytree_node=False, default=1)


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
  root_value: jax.Array,
  *,
  capacity: int,
  num_candidates: int,
  max_blocks: int = 1,
) -> Tree:
  """Trees that hold the root only, visited once and not yet expanded.

  Args:
    root_value: `[B]` estimate of each problem; its dtype is the tree's.
    capacity: N.
    num_candidates: A.
    max_blocks: M.
  """
  shape = (*root_value.shape, capacity)
  zeros = jnp.zeros(shape, root_value.dtype)
  counts = jnp.zeros(shape, jnp.int32)
  no = jnp.zeros(shape, bool)
  unexpanded = jnp.full(shape, UNEXPANDED, jnp.int32)
  return Tree(
    parent=jnp.full(shape, NO_PARENT, jnp.int32),
    depth=counts,
    first_child=unexpanded,
    more_blocks=jnp.full((*shape, max_blocks - 1), UNEXPANDED, jnp.int32),
    num_blocks=counts,
    log_mass=zeros,
    num_visits=counts.at[:, ROOT].set(1),
    mean_value=zeros.at[:, ROOT].set(root_value),
    value=zeros.at[:, ROOT].set(root_value),
    reward=zeros,
    prior_logits=zeros,
    is_terminal=no,
    is_solution=no,
    is_valid=no.at[:, ROOT].set(True),
    next_free=jnp.ones(root_value.shape, jnp.int32),
    num_candidates=num_candidates,
    max_blocks=max_blocks,
  )


def scores(tree: Tree) -> jax.Array:
  """What a search thinks of each node `[B, N]`: outcome where known, or value.

  Of a terminal node it is the outcome, of any other the estimate.
  """
  return tree.reward + tree.value


def best_nodes(
  keys: Sequence[jax.Array], is_eligible: jax.Array, count: int
) -> jax.Array:
  """The first `count` eligible nodes `[B, count]`, NO_NODE behind them.

  Args:
    keys: `[B, N]` each; higher comes first, ties go to the next key, ties of
      the last one to the lower index.
    is_eligible: `[B, N]`.
    count: how many.
  """

  def take_one(remaining, _):
    is_best = remaining
    for key in keys:
      key = jnp.where(is_best, key, -jnp.inf)
      is_best &= key == jnp.max(key, axis=-1, keepdims=True)
    node = jnp.argmax(is_best, axis=-1).astype(jnp.int32)
    node = jnp.where(jnp.any(is_best, axis=-1), node, NO_NODE)
    return write(remaining, node, jnp.zeros_like(node)), node

  _, nodes = jax.lax.scan(take_one, is_eligible, length=count)
  return nodes.T


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
  is_solution: jax.Array,
  is_valid: jax.Array,
  sibling_logits: jax.Array | None = None,
) -> Tree:
  """Writes the candidates of `node` `[B, W]` as nodes; they are unvisited.

  Args:
    tree: the trees.
    node: `[B, W]` nodes that were expanded; where a node stands several times,
      each of its blocks follows the one before.
    first_child: `[B, W]` where the candidates go; consecutive over W from
      `tree.next_free` on for the active ones.
    is_active: `[B, W]`; nothing is written where False.
    prior_logits: `[B, W, A]`, normalised here over the node's valid candidates.
    value: `[B, W, A]`.
    reward: `[B, W, A]`.
    is_terminal: `[B, W, A]`.
    is_solution: `[B, W, A]`.
    is_valid: `[B, W, A]`.
    sibling_logits: see `Expansion`; None adds nothing.
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
  if tree.max_blocks == 1:
    prior_logits = normalize_logits(prior_logits, is_valid)
  else:
    prior_logits = prior_logits - read(tree.log_mass, node)[:, :, None]

  def write_children(array, update):
    return write(array, child, jnp.broadcast_to(update, shape).reshape(flat))

  tree = tree.replace(
    parent=write_children(tree.parent, node[:, :, None]),
    depth=write_children(tree.depth, depth[:, :, None]),
    value=write_children(tree.value, value),
    reward=write_children(tree.reward, reward),
    prior_logits=write_children(tree.prior_logits, prior_logits),
    is_terminal=write_children(tree.is_terminal, is_terminal & is_valid),
    is_solution=write_children(tree.is_solution, is_solution & is_valid),
    is_valid=write_children(tree.is_valid, is_valid),
    next_free=tree.next_free
    + num_candidates * jnp.sum(is_active, axis=-1, dtype=jnp.int32),
  )
  if tree.max_blocks == 1:
    return tree.replace(
      first_child=write(tree.first_child, node, first_child),
      num_blocks=write(tree.num_blocks, node, jnp.ones_like(node)),
    )
  return _renormalize(_link(tree, node, first_child), node, sibling_logits)


def _link(tree: Tree, node: jax.Array, first_child: jax.Array) -> Tree:
  """Hangs new blocks `[B, W]` behind the ones that their nodes have."""
  block = read(tree.num_blocks, node) + num_earlier(node)
  is_first = (block == 0) & (node != NO_NODE)

  def write_more(row, at, place, new):
    return row.at[at, place].set(new, mode="drop", wrap_negative_indices=False)

  # The place of a first block is -1, which writes nothing.
  more_blocks = jax.vmap(write_more)(
    tree.more_blocks, node, block - 1, first_child
  )
  is_same = node[:, :, None] == node[:, None, :]
  num_new = jnp.sum(is_same, axis=-1, dtype=jnp.int32)
  return tree.replace(
    first_child=write(
      tree.first_child, jnp.where(is_first, node, NO_NODE), first_child
    ),
    more_blocks=more_blocks,
    num_blocks=write(
      tree.num_blocks, node, read(tree.num_blocks, node) + num_new
    ),
  )


def num_earlier(node: jax.Array) -> jax.Array:
  """How often each of `node` `[B, W]` stands to its left already."""
  index = jnp.arange(node.shape[1])
  is_earlier = index[:, None] > index[None, :]
  is_same = node[:, :, None] == node[:, None, :]
  return jnp.sum(is_same & is_earlier[None], axis=-1, dtype=jnp.int32)


def _renormalize(
  tree: Tree, node: jax.Array, sibling_logits: jax.Array | None
) -> Tree:
  """Priors of all candidates of `node` `[B, W]`, so that they sum to 1."""
  child = candidate_nodes(tree, node)
  shape = child.shape
  child = child.reshape(node.shape[0], -1)
  logits = read(tree.prior_logits, child).reshape(shape)
  is_valid = (read(tree.is_valid, child) & (child != NO_NODE)).reshape(shape)
  log_mass = read(tree.log_mass, node)
  if sibling_logits is not None:
    more = sibling_logits.astype(logits.dtype) - log_mass[:, :, None]
    num_old = more.shape[-1]
    old = jnp.logaddexp(logits[..., :num_old], more)
    logits = jnp.concatenate([old, logits[..., num_old:]], axis=-1)
  lowest = jnp.finfo(logits.dtype).min
  mass = jax.nn.logsumexp(jnp.where(is_valid, logits, lowest), axis=-1)
  logits = jnp.where(is_valid, logits - mass[:, :, None], lowest)
  # A node without valid candidates keeps its mass, which is then never read.
  log_mass = jnp.where(jnp.any(is_valid, axis=-1), log_mass + mass, log_mass)
  return tree.replace(
    prior_logits=write(tree.prior_logits, child, logits.reshape(child.shape)),
    log_mass=write(tree.log_mass, node, log_mass),
  )


def candidate_nodes(tree: Tree, node: jax.Array) -> jax.Array:
  """The M * A candidates `[B, W, M * A]` of `node` `[B, W]`, else NO_NODE."""
  first = read(tree.first_child, node)[..., None]
  start = jnp.concatenate([first, read(tree.more_blocks, node)], axis=-1)
  start = jnp.where((node == NO_NODE)[..., None], UNEXPANDED, start)[..., None]
  within = jnp.arange(tree.num_candidates, dtype=jnp.int32)
  child = start + within[None, None, None]
  child = jnp.where(start == UNEXPANDED, NO_NODE, child)
  return child.reshape(*node.shape, -1)


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
  invalid; so are those of blocks that it does not have.
  """
  starts = block_starts(tree, node)
  exists = jnp.repeat(starts != UNEXPANDED, tree.num_candidates)
  within = jnp.arange(tree.num_candidates, dtype=jnp.int32)
  nodes = (starts[:, None] + within[None]).reshape(-1)

  def children(array):
    if tree.max_blocks == 1:
      return jax.lax.dynamic_slice_in_dim(array, starts[0], tree.num_candidates)
    return array.at[nodes].get(mode="clip", wrap_negative_indices=False)

  num_visits = children(tree.num_visits)
  if tree.max_blocks > 1:
    # What was read for blocks that are not there must not look visited.
    num_visits = jnp.where(exists, num_visits, 0)
  return Candidates(
    num_visits=num_visits,
    q_values=children(tree.reward) + discount * children(tree.mean_value),
    prior_logits=children(tree.prior_logits),
    is_valid=children(tree.is_valid) & exists,
    node_visits=tree.num_visits[node],
    node_mean=tree.mean_value[node],
    node_value=tree.value[node],
  )


def block_starts(tree: Tree, node: jax.Array) -> jax.Array:
  """First children `[M]` of the blocks of a node of one tree, or UNEXPANDED."""
  return jnp.append(tree.first_child[node], tree.more_blocks[node])


def child_at(tree: Tree, node: jax.Array, action: jax.Array) -> jax.Array:
  """The node behind a candidate (action in `[0, M * A)`) of one tree."""
  if tree.max_blocks == 1:
    return tree.first_child[node] + action
  block, within = jnp.divmod(action, tree.num_candidates)
  return block_starts(tree, node)[block] + within


def lineage(tree: Tree, node: jax.Array, count: int) -> jax.Array:
  """`node` `[B]` and those above it, `[B, count]`; NO_NODE above the root."""
  nodes = [node]
  for _ in range(count - 1):
    above = read(tree.parent, nodes[-1])
    nodes.append(jnp.where(nodes[-1] == NO_NODE, NO_NODE, above))
  return jnp.stack(nodes, axis=-1)


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
  num_turns = (num_levels + _NUM_LEVELS - 1) // _NUM_LEVELS

  def some_levels(_, carry):
    node, returned, num_visits, mean_value = carry
    nodes = lineage(tree, node, _NUM_LEVELS + 1)
    nodes, node = nodes[:, :-1], nodes[:, -1]
    # Both reads before both writes, or XLA copies the arrays at each turn.
    count, mean = jax.lax.optimization_barrier(
      (read(num_visits, nodes), read(mean_value, nodes))
    )
    reward = read(tree.reward, nodes)
    returns = [returned]
    for level in range(_NUM_LEVELS):
      returns.append(reward[:, level] + discount * returns[-1])
    total = mean * count.astype(mean.dtype) + jnp.stack(returns[:-1], axis=-1)
    mean = total / (count + 1).astype(mean.dtype)
    # Above the root is NO_NODE, which writes nothing.
    num_visits = write(num_visits, nodes, count + 1)
    mean_value = write(mean_value, nodes, mean)
    return node, returns[-1], num_visits, mean_value

  _, _, num_visits, mean_value = jax.lax.fori_loop(
    0,
    num_turns,
    some_levels,
    (leaf, leaf_value, tree.num_visits, tree.mean_value),
  )
  return tree.replace(num_visits=num_visits, mean_value=mean_value)


def child_visits(tree: Tree, node: jax.Array) -> jax.Array:
  """Visits `[B, M * A]` of the children of `node` `[B]`; 0 where unexpanded."""

  def one(tree, node):
    seen = one_node(tree, node, 1.0)
    return jnp.where(seen.is_valid, seen.num_visits, 0)

  return jax.vmap(one)(tree, node)


def visit_probs(tree: Tree, node: jax.Array) -> jax.Array:
  """Normalised child visits `[B, M * A]` of `node` `[B]`.

  AlphaGo Zero's policy target (Silver et al., 2017). All zeros where no child
  was visited, so that such a node teaches nothing.
  """
  visits = child_visits(tree, node).astype(tree.value.dtype)
  total = jnp.sum(visits, axis=-1, keepdims=True)
  return visits / jnp.maximum(total, 1)
