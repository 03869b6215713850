"""What beam search and best-first search share: a frontier of open nodes.

A node is open when it is valid, may be followed by something and has no
candidates yet. The root comes first; from then on a strategy says which open
nodes it expands next (`choose`), and everything else is here. A round expands
at most W nodes in one call and counts every valid candidate as one simulation,
which backs its score up: the visits of a node are 1 plus the candidates
evaluated below it, its mean value is the mean of their scores and of its own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from o1jax.search import expansion as expansion_lib
from o1jax.search.contracts import SearchState, StepModel, Strategy
from o1jax.search.mcts import best_finished, check_budget
from o1jax.search.tree import (
  NO_NODE,
  ROOT,
  UNEXPANDED,
  Tree,
  read,
  scores,
  write,
)


def frontier_search(
  name: str,
  step_model: StepModel,
  choose: Callable[[Tree], jax.Array],
  *,
  num_expansions: int,
  num_leaves: int,
  num_root_blocks: int = 1,
  max_tokens: int | None = None,
  select: Callable[[Tree], jax.Array] = best_finished,
) -> Strategy:
  """A strategy that expands what `choose` says until that is nothing.

  Args:
    name: what the tables call it.
    step_model: the model; see contracts.py.
    choose: `tree -> [B, W]` open nodes to expand, NO_NODE behind them; none at
      all where the search is over.
    num_expansions: expansions of a tree at most; bounds its memory.
    num_leaves: W.
    num_root_blocks: expansions of the root, all in the first round.
    max_tokens: the budget of a problem in generated tokens, never exceeded;
      None: no limit.
    select: `tree -> [B]`, the answer.

  Raises:
    ValueError: a number below 1, or a budget below one candidate.
  """
  check_counts(num_expansions=num_expansions, num_leaves=num_leaves)
  check_budget(max_tokens, step_model)
  num_candidates = step_model.num_candidates
  places = jnp.arange(num_leaves, dtype=jnp.int32)[None]
  capacity = 1 + num_candidates * num_expansions

  def init(params, key, problems) -> SearchState:
    state = expansion_lib.start(
      step_model,
      params,
      key,
      problems,
      capacity=capacity,
      num_leaves=num_leaves,
      max_blocks=num_root_blocks,
    )
    roots = jnp.where(places < num_root_blocks, jnp.int32(ROOT), NO_NODE)
    return state.replace(leaf=jnp.broadcast_to(roots, state.leaf.shape))

  def propose(params, state: SearchState) -> SearchState:
    return expansion_lib.expand(
      step_model, params, state, state.leaf, max_tokens=max_tokens
    )

  def absorb(state: SearchState, outcome=None) -> SearchState:
    state = expansion_lib.attach(state, outcome, rollout_weight=0.0)
    tree, num_new = count_candidates(
      state.tree, state.leaf, state.first_child, state.is_expanding
    )
    cost = state.cost.replace(simulations=state.cost.simulations + num_new)
    state = state.replace(tree=tree, cost=cost)
    room = expansion_lib.has_room(step_model, state, max_tokens)
    num_fitting = (capacity - tree.next_free) // num_candidates
    num_fitting = jnp.where(room, num_fitting, 0)[:, None]
    leaf = jnp.where(places < num_fitting, choose(tree), NO_NODE)
    return state.replace(leaf=leaf)

  return Strategy(
    name=name,
    num_candidates=num_candidates,
    capacity=capacity,
    init=init,
    propose=propose,
    absorb=absorb,
    is_done=lambda state: state.leaf[:, 0] == NO_NODE,
    select=lambda state: select(state.tree),
  )


def open_nodes(tree: Tree) -> jax.Array:
  """True `[B, N]` where a node can be expanded for the first time."""
  return tree.is_valid & ~tree.is_terminal & (tree.first_child == UNEXPANDED)


def count_candidates(
  tree: Tree, leaf: jax.Array, first_child: jax.Array, is_active: jax.Array
) -> tuple[Tree, jax.Array]:
  """Counts new candidates as simulations, each of which returns its score.

  Args:
    tree: with the candidates attached, not yet visited.
    leaf: `[B, W]` nodes that were expanded.
    first_child: `[B, W]` their new blocks.
    is_active: `[B, W]`.

  Returns:
    The tree, and the number of valid new candidates `[B]`.
  """
  num_problems, num_leaves = leaf.shape
  within = jnp.arange(tree.num_candidates, dtype=jnp.int32)[None, None]
  child = (first_child[:, :, None] + within).reshape(num_problems, -1)
  is_new = jnp.repeat(is_active, tree.num_candidates, axis=-1)
  is_new = is_new & read(tree.is_valid, child)
  blocks = (num_problems, num_leaves, -1)
  count = jnp.sum(is_new.reshape(blocks), axis=-1, dtype=jnp.int32)
  score = jnp.where(is_new, read(scores(tree), child), 0.0)
  total = jnp.sum(score.reshape(blocks), axis=-1)
  child = jnp.where(is_new, child, NO_NODE)
  tree = tree.replace(
    num_visits=write(tree.num_visits, child, jnp.ones_like(child)),
    mean_value=write(tree.mean_value, child, read(tree.value, child)),
  )
  node = jnp.where(is_active, leaf, NO_NODE)
  num_new = jnp.sum(count, axis=-1, dtype=jnp.int32)
  return add_returns(tree, node, count, total), num_new


def add_returns(
  tree: Tree, node: jax.Array, count: jax.Array, total: jax.Array
) -> Tree:
  """Adds `count` returns that sum to `total` to `node` and all above it.

  All are `[B, W]`; NO_NODE adds nothing. The nodes may have common ancestors.
  """
  deepest = jnp.max(jnp.where(node == NO_NODE, -1, read(tree.depth, node)))

  def one_level(_, carry):
    node, num_visits, mean_value = carry
    # Where paths have met, all write the same sum: exact on every device.
    is_same = node[:, :, None] == node[:, None, :]
    added = jnp.where(is_same, count[:, None], 0)
    added = jnp.sum(added, axis=-1, dtype=jnp.int32)
    more = jnp.sum(jnp.where(is_same, total[:, None], 0.0), axis=-1)
    old = read(num_visits, node)
    new = old + added
    mean = read(mean_value, node) * old.astype(more.dtype) + more
    num_visits = write(num_visits, node, new)
    mean_value = write(mean_value, node, mean / new.astype(more.dtype))
    # Above the root is NO_PARENT, which writes nothing.
    node = jnp.where(node == NO_NODE, NO_NODE, read(tree.parent, node))
    return node, num_visits, mean_value

  _, num_visits, mean_value = jax.lax.fori_loop(
    0, deepest + 1, one_level, (node, tree.num_visits, tree.mean_value)
  )
  return tree.replace(num_visits=num_visits, mean_value=mean_value)


def check_counts(**counts: int) -> None:
  """Refuses options below 1."""
  for name, count in counts.items():
    if count < 1:
      raise ValueError(f"{name}={count}: give at least 1")
