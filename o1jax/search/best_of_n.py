"""Best-of-N: N whole solutions from the root, the one with the best outcome.

One round: the step model, at solution granularity, proposes A = N candidates of
the root. With N = 1 it is greedy or plain sampling; majority vote is the same
search with `vote` over the answers in place of `select`.
"""

import jax
import jax.numpy as jnp

from o1jax.search import expansion as expansion_lib
from o1jax.search.contracts import SearchState, StepModel, Strategy
from o1jax.search.mcts import best_finished
from o1jax.search.tree import NO_NODE, ROOT, UNEXPANDED


def best_of_n(step_model: StepModel) -> Strategy:
  """One expansion of the root; the finished candidate of highest outcome.

  A candidate that is not finished (cut off) is never chosen. Each valid
  candidate counts as one simulation and gets one visit.

  Args:
    step_model: its `num_candidates` is N.
  """
  return _one_expansion(step_model, "best_of_n")


def greedy(step_model: StepModel) -> Strategy:
  """The one solution that the step model proposes.

  Raises:
    ValueError: the step model proposes more than one candidate.
  """
  if step_model.num_candidates != 1:
    raise ValueError(
      "greedy takes a step model with 1 candidate, not"
      f" {step_model.num_candidates}; use best_of_n"
    )
  return _one_expansion(step_model, "greedy")


def _one_expansion(step_model: StepModel, name: str) -> Strategy:
  num_candidates = step_model.num_candidates
  capacity = 1 + num_candidates

  def init(params, key, problems) -> SearchState:
    return expansion_lib.start(
      step_model,
      params,
      key,
      problems,
      capacity=capacity,
      num_leaves=1,
      draw_noise=lambda key, dtype: jnp.zeros((num_candidates,), dtype),
    )

  def propose(params, state: SearchState) -> SearchState:
    is_open = state.tree.first_child[:, ROOT] == UNEXPANDED
    leaf = jnp.where(is_open, jnp.int32(ROOT), NO_NODE)[:, None]
    return expansion_lib.expand(step_model, params, state, leaf)

  def absorb(state: SearchState, outcome=None) -> SearchState:
    was_active = state.is_expanding
    state = expansion_lib.attach(state, outcome, rollout_weight=0.0)
    tree = state.tree
    is_child = tree.is_valid.at[:, ROOT].set(False) & was_active
    num_children = jnp.sum(is_child, axis=-1, dtype=jnp.int32)
    returns = jnp.where(is_child, tree.reward + tree.value, 0.0)
    total = tree.value[:, ROOT] + jnp.sum(returns, axis=-1)
    mean = total / (1 + num_children).astype(total.dtype)
    mean_value = jnp.where(is_child, tree.value, tree.mean_value)
    num_visits = tree.num_visits + is_child.astype(jnp.int32)
    root_mean = jnp.where(was_active[:, 0], mean, mean_value[:, ROOT])
    tree = tree.replace(
      num_visits=num_visits.at[:, ROOT].add(num_children),
      mean_value=mean_value.at[:, ROOT].set(root_mean),
    )
    cost = state.cost.replace(simulations=state.cost.simulations + num_children)
    return state.replace(tree=tree, cost=cost)

  def is_done(state: SearchState) -> jax.Array:
    return state.tree.first_child[:, ROOT] != UNEXPANDED

  return Strategy(
    name=name,
    num_candidates=num_candidates,
    capacity=capacity,
    init=init,
    propose=propose,
    absorb=absorb,
    is_done=is_done,
    select=lambda state: best_finished(state.tree),
  )
