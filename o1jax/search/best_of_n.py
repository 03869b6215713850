"""Best-of-N: N whole solutions from the root, the one with the best outcome.

The step model, at solution granularity, proposes A candidates of the root in a
round, N in all. With N = 1 it is greedy or plain sampling; majority vote is the
same search with `vote` over the answers in place of `select`.
"""

import jax
import jax.numpy as jnp

from o1jax.search import expansion as expansion_lib
from o1jax.search.contracts import SearchState, StepModel, Strategy
from o1jax.search.mcts import best_finished, check_budget
from o1jax.search.tree import NO_NODE, ROOT, scores


def best_of_n(
  step_model: StepModel,
  *,
  num_rounds: int = 1,
  max_tokens: int | None = None,
) -> Strategy:
  """Expansions of the root alone; the finished candidate of highest outcome.

  A candidate that is not finished (cut off) is never chosen. Each valid
  candidate counts as one simulation and gets one visit.

  Args:
    step_model: its `num_candidates` times `num_rounds` is N.
    num_rounds: expansions of the root, one after another: what the first ones
      leave of the budget pays for the next.
    max_tokens: the budget of a problem in generated tokens, never exceeded;
      None for all N.

  Raises:
    ValueError: a number out of range.
  """
  if num_rounds < 1:
    raise ValueError(f"num_rounds={num_rounds}: give at least 1")
  check_budget(max_tokens, step_model)
  num_candidates = step_model.num_candidates
  capacity = 1 + num_candidates * num_rounds

  def init(params, key, problems) -> SearchState:
    return expansion_lib.start(
      step_model,
      params,
      key,
      problems,
      capacity=capacity,
      num_leaves=1,
      max_blocks=num_rounds,
    )

  def propose(params, state: SearchState) -> SearchState:
    leaf = jnp.where(is_done(state), NO_NODE, jnp.int32(ROOT))[:, None]
    return expansion_lib.expand(
      step_model, params, state, leaf, max_tokens=max_tokens
    )

  def absorb(state: SearchState, outcome=None) -> SearchState:
    old = state.tree
    state = expansion_lib.attach(state, outcome, rollout_weight=0.0)
    tree = state.tree
    is_new = tree.is_valid & ~old.is_valid
    num_new = jnp.sum(is_new, axis=-1, dtype=jnp.int32)
    visits, mean = tree.num_visits[:, ROOT], tree.mean_value[:, ROOT]
    total = mean * visits + jnp.sum(jnp.where(is_new, scores(tree), 0.0), -1)
    new_mean = total / (visits + num_new).astype(total.dtype)
    # A search that is done keeps its bits while others go on.
    mean = jnp.where(num_new > 0, new_mean, mean)
    mean_value = jnp.where(is_new, tree.value, tree.mean_value)
    num_visits = tree.num_visits + is_new.astype(jnp.int32)
    tree = tree.replace(
      num_visits=num_visits.at[:, ROOT].add(num_new),
      mean_value=mean_value.at[:, ROOT].set(mean),
    )
    cost = state.cost.replace(simulations=state.cost.simulations + num_new)
    return state.replace(tree=tree, cost=cost)

  def is_done(state: SearchState) -> jax.Array:
    drawn = state.tree.num_blocks[:, ROOT] == num_rounds
    return drawn | ~expansion_lib.has_room(step_model, state, max_tokens)

  return Strategy(
    name="best_of_n",
    num_candidates=num_candidates,
    capacity=capacity,
    init=init,
    propose=propose,
    absorb=absorb,
    is_done=is_done,
    select=lambda state: best_finished(state.tree),
  )


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
  return best_of_n(step_model)._replace(name="greedy")
