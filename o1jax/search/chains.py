"""Chains: paths from the root that grow side by side, one node a round.

Speculative rejection and sequential revisions differ only in what ends a chain.
A chain is live while its last node, the tip, can be followed. It ends at a
terminal node, where the step model finds nothing valid to add, or where the
strategy stops it; the freed place goes to a new chain from the root, while
there are starts left. A chain that ended is one simulation: the score of its
last node is backed up, so that tips are the unexpanded nodes without visits.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from o1jax.search import expansion as expansion_lib
from o1jax.search.contracts import SearchState, StepModel, Strategy
from o1jax.search.mcts import best_finished, check_budget, check_capacity
from o1jax.search.tree import (
  NO_NODE,
  ROOT,
  UNEXPANDED,
  Tree,
  backup,
  read,
)


def chains(
  name: str,
  step_model: StepModel,
  *,
  num_chains: int,
  num_starts: int | None,
  capacity: int,
  max_tokens: int | None,
  stops: Callable[[Tree, jax.Array], jax.Array],
) -> Strategy:
  """The search of which strategies of chains are made; see the head.

  Under a budget the longest chains are served first, and what they leave pays
  for new ones.

  Args:
    name: of the strategy.
    step_model: with one candidate.
    num_chains: W, live at a time.
    num_starts: M, chains in all; None for `num_chains`.
    capacity: N.
    max_tokens: the budget of a problem, never exceeded; None for no limit.
    stops: `(tree, tips [B, W]) -> [B, W]` after a round, True for the chains
      to end. The deepest tips come first, of equally deep ones those made
      first; NO_NODE, where there is none, stands to their right.

  Raises:
    ValueError: a number out of range.
  """
  if step_model.num_candidates != 1:
    raise ValueError(
      f"{name} takes a step model with 1 candidate, not"
      f" {step_model.num_candidates}: its chains do not branch"
    )
  if num_starts is None:
    num_starts = num_chains
  if not 1 <= num_chains <= num_starts:
    raise ValueError(
      f"{num_chains} chains at a time of {num_starts} in all: give at least 1"
      " and no fewer in all than at a time"
    )
  check_capacity(capacity, 1)
  check_budget(max_tokens, step_model)

  def init(params, key, problems) -> SearchState:
    return expansion_lib.start(
      step_model,
      params,
      key,
      problems,
      capacity=capacity,
      num_leaves=num_chains,
      max_blocks=num_starts,
    )

  def propose(params, state: SearchState) -> SearchState:
    tree = state.tree
    tips = live_tips(tree, num_chains)
    num_live = jnp.sum(tips != NO_NODE, axis=-1, keepdims=True)
    starts_left = num_starts - tree.num_blocks[:, ROOT, None]
    index = jnp.arange(num_chains, dtype=jnp.int32)[None]
    is_start = (index >= num_live) & (index - num_live < starts_left)
    leaf = jnp.where(is_start, ROOT, tips)
    fits = tree.next_free[:, None] + index < capacity
    leaf = jnp.where(fits & ~is_done(state)[:, None], leaf, NO_NODE)
    return expansion_lib.expand(
      step_model, params, state, leaf, max_tokens=max_tokens
    )

  def absorb(state: SearchState, outcome=None) -> SearchState:
    state = expansion_lib.attach(state, outcome, rollout_weight=0.0)
    tree = state.tree
    tips = live_tips(tree, num_chains)
    # A search that is full keeps its chains while others go on.
    is_going = ~state.is_full[:, None]
    stopped = jnp.where(stops(tree, tips) & is_going, tips, NO_NODE)
    ends = jnp.concatenate([_natural_ends(state), stopped], axis=-1)
    # A start without a valid step is no chain.
    ends = jnp.where(ends == ROOT, NO_NODE, ends)
    num_ended = jnp.sum(ends != NO_NODE, axis=-1, dtype=jnp.int32)
    cost = state.cost.replace(simulations=state.cost.simulations + num_ended)
    state = state.replace(tree=_back_up_all(tree, ends), cost=cost)
    room = expansion_lib.has_room(step_model, state, max_tokens)
    return state.replace(is_full=has_work(state) & ~room)

  def has_work(state: SearchState) -> jax.Array:
    is_live = jnp.any(_is_live(state.tree), axis=-1)
    return is_live | (state.tree.num_blocks[:, ROOT] < num_starts)

  def is_done(state: SearchState) -> jax.Array:
    return state.is_full | ~has_work(state)

  return Strategy(
    name=name,
    num_candidates=1,
    capacity=capacity,
    init=init,
    propose=propose,
    absorb=absorb,
    is_done=is_done,
    select=lambda state: best_finished(state.tree),
  )


def live_tips(tree: Tree, num_tips: int) -> jax.Array:
  """The tips `[B, num_tips]` of live chains, see `stops` of `chains`."""

  def one(is_live, depth):
    tips = jnp.nonzero(is_live, size=num_tips, fill_value=NO_NODE)[0]
    depth = jnp.where(tips == NO_NODE, 0, depth[tips])
    return tips[jnp.argsort(-depth, stable=True)]

  return jax.vmap(one)(_is_live(tree), tree.depth).astype(jnp.int32)


def _is_live(tree: Tree) -> jax.Array:
  """True `[B, N]` for the tips of live chains."""
  is_open = tree.is_valid & ~tree.is_terminal
  return is_open & (tree.first_child == UNEXPANDED) & (tree.num_visits == 0)


def _natural_ends(state: SearchState) -> jax.Array:
  """Where chains `[B, W]` ended for want of anything to follow, or NO_NODE."""
  tree, child = state.tree, state.first_child
  is_valid = read(tree.is_valid, child)
  end = jnp.where(is_valid, child, state.leaf)
  has_ended = ~is_valid | read(tree.is_terminal, child)
  return jnp.where(state.is_expanding & has_ended, end, NO_NODE)


def _back_up_all(tree: Tree, ends: jax.Array) -> Tree:
  """Backs up the scores of `ends` `[B, E]`, one after another."""

  def one(i, tree):
    end = ends[:, i]
    value = read(tree.value, end)
    return backup(tree, end, value, end != NO_NODE, discount=1.0)

  return jax.lax.fori_loop(0, ends.shape[1], one, tree)
