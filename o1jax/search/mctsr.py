"""Monte Carlo tree self-refine: a tree of answers and their revisions.

Zhang et al., arXiv 2406.07394. The root stands for the answer not given yet,
with the model's value of the problem as its score; every other node is a whole
answer, and expanding one draws revisions of it. A simulation

  selects the answer of highest UCT among those not fully expanded, wherever
  in the tree it stands:
    UCT(a) = Q(a) + c sqrt((ln N(father of a) + 1) / (N(a) + eps));
  expands it;
  scores the new answers: R(a) = (min + mean) / 2 of the rewards sampled for a;
  backs up, from the new answers to the root:
    Q(a) = (R(a) + max of Q over the children of a) / 2, or R(a) without any.

An answer is fully expanded when it has drawn `max_children` children and one of
them has a higher Q. N counts visits: one when an answer is made and one each
time it is selected; the root, which has no father, counts as its own. Our
differences: an answer is scored once, as the seam does, so that min and mean
are that score; one is also fully expanded when none of its draws was valid; and
the search does not ask a checker when to stop, as the authors' code does.
"""

import jax
import jax.numpy as jnp

from o1jax.search import expansion as expansion_lib
from o1jax.search.contracts import SearchState, StepModel, Strategy
from o1jax.search.mcts import best_finished, check_budget
from o1jax.search.tree import NO_NODE, Tree, read, scores, write

_EPSILON = 1e-5


def mctsr(
  step_model: StepModel,
  *,
  num_simulations: int,
  max_children: int = 3,
  exploration: float = 0.007,
  max_blocks: int | None = None,
  max_tokens: int | None = None,
) -> Strategy:
  """Search over revisions; the answer of highest outcome.

  In the tree `num_visits` is N and `mean_value` is Q.

  Args:
    step_model: its nodes are answers that may be revised.
    num_simulations: simulations, one expansion each.
    max_children: see the head.
    exploration: c. The authors' 1.4 is for scores between -100 and 100, which
      is 0.007 for scores in [0, 1].
    max_blocks: M, most expansions of one answer, which the published rule does
      not limit; None for num_simulations. A lower one compiles sooner.
    max_tokens: the budget of a problem in generated tokens, never exceeded.

  Raises:
    ValueError: a number out of range.
  """
  for name, number in (
    ("num_simulations", num_simulations),
    ("max_children", max_children),
    ("max_blocks", 1 if max_blocks is None else max_blocks),
  ):
    if number < 1:
      raise ValueError(f"{name}={number}: give at least 1")
  if exploration < 0:
    raise ValueError(f"exploration={exploration}: give at least 0")
  if max_blocks is None:
    max_blocks = num_simulations
  capacity = 1 + step_model.num_candidates * num_simulations
  check_budget(max_tokens, step_model)

  def init(params, key, problems) -> SearchState:
    return expansion_lib.start(
      step_model,
      params,
      key,
      problems,
      capacity=capacity,
      num_leaves=1,
      max_blocks=max_blocks,
    )

  def propose(params, state: SearchState) -> SearchState:
    leaf = jnp.where(is_done(state), NO_NODE, state.node)[:, None]
    return expansion_lib.expand(
      step_model, params, state, leaf, max_tokens=max_tokens
    )

  def absorb(state: SearchState, outcome=None) -> SearchState:
    had_node = state.tree.is_valid
    state = expansion_lib.attach(state, outcome, rollout_weight=0.0)
    tree, leaf = state.tree, state.leaf[:, 0]
    is_new = (tree.is_valid & ~had_node).astype(jnp.int32)
    visits = tree.num_visits + is_new
    tree = tree.replace(num_visits=write(visits, leaf, read(visits, leaf) + 1))
    tree = tree.replace(mean_value=qualities(tree))
    done = state.cost.simulations + (leaf != NO_NODE).astype(jnp.int32)
    node = select_answer(
      tree, max_children=max_children, exploration=exploration
    )
    cost = state.cost.replace(simulations=done)
    state = state.replace(tree=tree, node=node, cost=cost)
    room = expansion_lib.has_room(step_model, state, max_tokens)
    return state.replace(is_full=(done < num_simulations) & ~room)

  def is_done(state: SearchState) -> jax.Array:
    is_over = state.cost.simulations >= num_simulations
    return is_over | state.is_full | (state.node == NO_NODE)

  return Strategy(
    name="mctsr",
    num_candidates=step_model.num_candidates,
    capacity=capacity,
    init=init,
    propose=propose,
    absorb=absorb,
    is_done=is_done,
    select=lambda state: best_finished(state.tree),
  )


def best_children(tree: Tree, quality: jax.Array) -> jax.Array:
  """Highest `quality` `[B, N]` among each node's children; -inf without."""
  parent = jnp.where(tree.is_valid & (tree.depth > 0), tree.parent, NO_NODE)
  lowest = jnp.full_like(quality, -jnp.inf)

  def one(lowest, parent, quality):
    at = lowest.at[parent]
    return at.max(quality, mode="drop", wrap_negative_indices=False)

  return jax.vmap(one)(lowest, parent, quality)


def qualities(tree: Tree) -> jax.Array:
  """Q `[B, N]` of every answer; see the head."""
  own = scores(tree)

  def one_level(_, quality):
    best = best_children(tree, quality)
    return jnp.where(best == -jnp.inf, own, (own + best) / 2)

  # A turn makes the nodes right whose longest way down is one longer.
  return jax.lax.fori_loop(0, jnp.max(tree.depth), one_level, own)


def select_answer(
  tree: Tree, *, max_children: int, exploration: float
) -> jax.Array:
  """The answer `[B]` to revise next, NO_NODE where none is left.

  Of equal UCT it is the first.
  """
  quality = tree.mean_value
  best = best_children(tree, quality)
  num_drawn = tree.num_blocks * tree.num_candidates
  is_settled = (best == -jnp.inf) | (best > quality)
  is_expanded = (num_drawn >= max_children) & is_settled
  is_open = (
    tree.is_valid
    & ~tree.is_terminal
    & ~is_expanded
    & (tree.num_blocks < tree.max_blocks)
  )
  visits = tree.num_visits.astype(quality.dtype)
  father_visits = read(visits, tree.parent)
  explore = jnp.sqrt((jnp.log(father_visits) + 1) / (visits + _EPSILON))
  uct = jnp.where(is_open, quality + exploration * explore, -jnp.inf)
  node = jnp.argmax(uct, axis=-1).astype(jnp.int32)
  return jnp.where(jnp.any(is_open, axis=-1), node, NO_NODE)
