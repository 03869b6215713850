"""Best-first search, A* and depth-first search: one frontier, three orders.

All open nodes of a tree, whatever their depth, wait in one order; a round
expands the W that come first. With W above 1 the order is that of the rounds:
candidates of a round wait until the next.

  best_first    the highest score first
  a_star        the highest score minus the cost of the path first (Hart et al.,
                1968)
  depth_first   the deepest first, of those the highest score; nodes below a
                threshold are cut (Tree of Thoughts, arXiv 2305.10601,
                Algorithm 2)

A score is the outcome of a finished solution, elsewhere the step model's
estimate of it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from o1jax.search.contracts import StepModel, Strategy
from o1jax.search.frontier import frontier_search, open_nodes
from o1jax.search.mcts import best_finished
from o1jax.search.selection import named
from o1jax.search.tree import NO_NODE, Tree, best_nodes, read, scores


def best_first(
  step_model: StepModel,
  *,
  num_expansions: int,
  num_leaves: int = 1,
  stop_at_solution: bool = False,
  max_tokens: int | None = None,
) -> Strategy:
  """Expands the open node of the highest score.

  Args:
    step_model: the model; see contracts.py.
    num_expansions: expansions of a problem at most.
    num_leaves: W.
    stop_at_solution: True ends the search where a finished solution comes first
      in the order, ties included; False spends the whole budget.
    max_tokens: the budget of a problem in generated tokens, never exceeded;
      None: no limit.

  Raises:
    ValueError: a number out of range.
  """
  choose = in_order(
    lambda tree: (scores(tree),),
    lambda tree: tree.is_valid,
    num_leaves,
    stop_at_solution,
  )
  return frontier_search(
    "best_first",
    step_model,
    choose,
    num_expansions=num_expansions,
    num_leaves=num_leaves,
    max_tokens=max_tokens,
  )


def a_star(
  step_model: StepModel,
  *,
  num_expansions: int,
  cost: str = "prior",
  cost_weight: float = 1.0,
  num_leaves: int = 1,
  stop_at_solution: bool = True,
  max_tokens: int | None = None,
) -> Strategy:
  """Expands the open node of the highest score - cost_weight * cost.

  The best solution has the highest outcome - cost_weight * cost, and is the
  answer. Where the score of no unfinished node is below the best outcome less
  the cost that is still to come (an admissible heuristic) and the candidates
  are all there are, it is found before the search stops.

  Args:
    step_model: the model; see contracts.py.
    num_expansions: expansions of a problem at most.
    cost: of a path, "prior" for minus the sum of its steps' log priors, "steps"
      for their number.
    cost_weight: 0 or more, in units of the score.
    num_leaves: see `best_first`.
    stop_at_solution: see `best_first`.
    max_tokens: see `best_first`.

  Raises:
    ValueError: a number out of range or an unknown name.
  """
  cost_fn = named("cost", cost, COSTS)
  if cost_weight < 0:
    raise ValueError(f"cost_weight={cost_weight}: give 0 or more")

  def priority(tree: Tree) -> jax.Array:
    return scores(tree) - cost_weight * cost_fn(tree)

  choose = in_order(
    lambda tree: (priority(tree),),
    lambda tree: tree.is_valid,
    num_leaves,
    stop_at_solution,
  )
  return frontier_search(
    "a_star",
    step_model,
    choose,
    num_expansions=num_expansions,
    num_leaves=num_leaves,
    max_tokens=max_tokens,
    select=lambda tree: best_finished(tree, priority(tree)),
  )


def depth_first(
  step_model: StepModel,
  *,
  num_expansions: int,
  min_score: float = -jnp.inf,
  num_leaves: int = 1,
  stop_at_solution: bool = False,
  max_tokens: int | None = None,
) -> Strategy:
  """Expands the deepest open node, of the deepest that of the highest score.

  With one leaf this is the order of the recursion that visits a node's
  candidates by falling score and comes back from dead ends.

  Args:
    step_model: the model; see contracts.py.
    num_expansions: expansions of a problem at most.
    min_score: nodes below it are not expanded and do not end the search; the
      root always is.
    num_leaves: see `best_first`.
    stop_at_solution: see `best_first`.
    max_tokens: see `best_first`.

  Raises:
    ValueError: a number out of range.
  """

  choose = in_order(
    lambda tree: (tree.depth.astype(tree.value.dtype), scores(tree)),
    lambda tree: tree.is_valid & (scores(tree) >= min_score),
    num_leaves,
    stop_at_solution,
  )
  return frontier_search(
    "depth_first",
    step_model,
    choose,
    num_expansions=num_expansions,
    num_leaves=num_leaves,
    max_tokens=max_tokens,
  )


def in_order(
  keys: Callable[[Tree], tuple[jax.Array, ...]],
  is_kept: Callable[[Tree], jax.Array],
  num_leaves: int,
  stop_at_solution: bool,
) -> Callable[[Tree], jax.Array]:
  """`tree -> [B, W]`, the open nodes that come first; see `best_nodes`.

  Args:
    keys: of the order.
    is_kept: `tree -> [B, N]`, False for nodes that are cut.
    num_leaves: W.
    stop_at_solution: True for no node where a finished solution that is kept
      comes before every open node or stands level with it.
  """

  def choose(tree: Tree) -> jax.Array:
    kept, order = is_kept(tree), keys(tree)
    is_open = open_nodes(tree) & kept
    leaf = best_nodes(order, is_open, num_leaves)
    if not stop_at_solution:
      return leaf
    is_goal = tree.is_solution & kept
    order = (*order, is_goal.astype(tree.value.dtype))
    first = best_nodes(order, is_open | is_goal, 1)
    return jnp.where(read(is_goal, first), NO_NODE, leaf)

  return choose


def prior_cost(tree: Tree) -> jax.Array:
  """Minus the log prior `[B, N]` of the path to each node.

  Sums over pairs of steps, then over pairs of pairs, and so on up to the root.
  """

  def add_above(carry):
    total, above = carry
    is_below = above != NO_NODE
    more = jnp.where(is_below, read(total, above), 0.0)
    above = jnp.where(is_below, read(above, above), NO_NODE)
    return total + more, above

  cost, _ = jax.lax.while_loop(
    lambda carry: jnp.any(carry[1] != NO_NODE),
    add_above,
    (jnp.where(tree.is_valid, -tree.prior_logits, 0.0), tree.parent),
  )
  return cost


def step_cost(tree: Tree) -> jax.Array:
  """The number of steps `[B, N]` to each node."""
  return tree.depth.astype(tree.value.dtype)


COSTS = {"prior": prior_cost, "steps": step_cost}
