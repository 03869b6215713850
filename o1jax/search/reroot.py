"""Monte Carlo tree search that commits to one step after another.

After `num_simulations` from where it stands, the search commits to the most
visited step, as AlphaZero does to a move (Silver et al., 2018): that node
becomes the root of the simulations to come. Its subtree keeps its statistics
and memory, and what was not chosen is not visited again. The search ends where
it has committed to a finished solution. A solution that an expansion came by
elsewhere counts too, unless `select_by` is "visits".
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from o1jax.search import expansion as expansion_lib
from o1jax.search.contracts import SearchState, StepModel, Strategy
from o1jax.search.mcts import (
  Widening,
  mcts,
  most_visited_child,
  needs_expansion,
  start_simulation,
)
from o1jax.search.selection import SelectionRule, make_rule
from o1jax.search.tree import (
  NO_NODE,
  Tree,
  candidate_nodes,
  normalize_logits,
  read,
  write,
)


def reroot(
  step_model: StepModel,
  *,
  num_simulations: int,
  max_commits: int | None = None,
  capacity: int | None = None,
  rule: str = "puct",
  rule_options: Mapping[str, Any] | None = None,
  num_parallel_leaves: int = 1,
  virtual_loss: float = 1.0,
  discount: float = 1.0,
  rollout_weight: float = 0.0,
  select_by: str = "outcome",
  max_tokens: int | None = None,
  max_blocks: int = 1,
  widening_rate: float = 1.0,
  widening_exponent: float = 0.5,
) -> Strategy:
  """MCTS with commitments; see `mcts` for what is not said here.

  Args:
    step_model: the model; see contracts.py.
    num_simulations: simulations before each commitment, beside those that the
      committed subtree brings along.
    max_commits: most commitments, after the last of which `num_simulations`
      follow once more; None to commit down to a finished solution.
    capacity: N; None for one expansion a simulation where `max_commits` bounds
      them.
    rule: "puct" or "uct"; where it draws noise for the root's candidates, each
      new root gets noise of its own.
    rule_options: of the rule.
    num_parallel_leaves: see `mcts`.
    virtual_loss: see `mcts`.
    discount: see `mcts`.
    rollout_weight: see `mcts`.
    select_by: see `mcts`; "visits" gives the committed solution.
    max_tokens: the budget of a problem, all commitments together.
    max_blocks: see `mcts`.
    widening_rate: see `mcts`.
    widening_exponent: see `mcts`.

  Raises:
    ValueError: a number out of range, an unknown name, or a rule that plans the
      visits of its root.
  """
  num_candidates = step_model.num_candidates
  if max_commits is not None and max_commits < 0:
    raise ValueError(f"max_commits={max_commits}: give at least 0, or None")
  if capacity is None:
    if max_commits is None:
      raise ValueError("capacity=None: give it, or max_commits to bound it")
    capacity = 1 + num_candidates * num_simulations * (max_commits + 1)
  inner = mcts(
    step_model,
    num_simulations=num_simulations,
    capacity=capacity,
    rule=rule,
    rule_options=rule_options,
    num_parallel_leaves=num_parallel_leaves,
    virtual_loss=virtual_loss,
    discount=discount,
    rollout_weight=rollout_weight,
    select_by=select_by,
    max_tokens=max_tokens,
    max_blocks=max_blocks,
    widening_rate=widening_rate,
    widening_exponent=widening_exponent,
  )
  selection = make_rule(
    rule, num_candidates, num_simulations, rule_options or {}
  )
  if selection.root_scores is not selection.scores:
    raise ValueError(
      f"rule={rule!r} plans the visits of a root without any, and a committed"
      " one has some already: set it to puct or uct"
    )
  widening = Widening(widening_rate, widening_exponent)

  def spent_before(state: SearchState) -> jax.Array:
    """Simulations `[B]` from earlier roots: as many commits as its depth."""
    return num_simulations * read(state.tree.depth, state.root)

  def is_done(state: SearchState) -> jax.Array:
    # A search that can commit does so at once.
    is_over = state.cost.simulations - spent_before(state) >= num_simulations
    return is_over | state.is_full | read(state.tree.is_terminal, state.root)

  def from_root(state: SearchState) -> SearchState:
    """As the inner search sees it: simulations from the present root."""
    simulations = state.cost.simulations - spent_before(state)
    simulations = jnp.where(is_done(state), num_simulations, simulations)
    return _with_simulations(state, simulations)

  def propose(params, state: SearchState) -> SearchState:
    proposed = inner.propose(params, from_root(state))
    return _with_simulations(proposed, state.cost.simulations)

  def absorb(state: SearchState, outcome=None) -> SearchState:
    before = from_root(state)
    after = inner.absorb(before, outcome)
    new = after.cost.simulations - before.cost.simulations
    return commit(_with_simulations(after, state.cost.simulations + new))

  def commit(state: SearchState) -> SearchState:
    """Moves the roots whose simulations are spent down by one step."""
    child, has_child = most_visited_child(state.tree, state.root)
    spent = state.cost.simulations - spent_before(state)
    is_due = (spent >= num_simulations) & has_child & ~state.is_full
    if max_commits is not None:
      is_due &= read(state.tree.depth, state.root) < max_commits
    state = state.replace(root=jnp.where(is_due, child, state.root))
    if selection.draw_noise is not None:
      state = renew_noise(state, is_due, selection)
    room = expansion_lib.has_room(step_model, state, max_tokens)
    node = start_simulation(
      state.tree,
      state.root_noise,
      state.root,
      room,
      rule=selection,
      widening=widening,
      discount=discount,
    )
    # What filled up with the last simulation of a root shows only here.
    waits = needs_expansion(state.tree, node, room, widening)
    return state.replace(
      node=jnp.where(is_due, node, state.node),
      is_full=state.is_full | (is_due & waits & ~room),
    )

  return inner._replace(
    name=f"reroot-{rule}", propose=propose, absorb=absorb, is_done=is_done
  )


def _with_simulations(state: SearchState, simulations: jax.Array):
  return state.replace(cost=state.cost.replace(simulations=simulations))


def renew_noise(
  state: SearchState, is_new: jax.Array, rule: SelectionRule
) -> SearchState:
  """Noise for new roots `[B]`, mixed into the prior where they are expanded.

  `attach` mixes it into that of the others when they are.
  """
  tree = state.tree
  # No expansion has the key of the block behind the last.
  path_id = read(state.path_ids, state.root)
  noise_id = expansion_lib.extend_path(path_id, jnp.int32(-tree.max_blocks))
  keys = jax.vmap(jax.random.fold_in)(state.tree_keys, noise_id)
  dtype = state.root_noise.dtype
  noise = jax.vmap(lambda key: rule.draw_noise(key, dtype))(keys)
  noise = jnp.where(is_new[:, None], noise, state.root_noise)
  root = jnp.where(is_new, state.root, NO_NODE)
  tree = _mix_into_children(tree, root, noise, rule)
  return state.replace(tree=tree, root_noise=noise)


def _mix_into_children(
  tree: Tree, node: jax.Array, noise: jax.Array, rule: SelectionRule
) -> Tree:
  """Priors of the candidates of `node` `[B]` with the rule's noise in them."""
  child = candidate_nodes(tree, node[:, None])[:, 0]
  is_valid = read(tree.is_valid, child)
  mixed = jax.vmap(rule.mix_prior)(
    read(tree.prior_logits, child), is_valid, noise
  )
  mixed = normalize_logits(mixed, is_valid)
  return tree.replace(prior_logits=write(tree.prior_logits, child, mixed))
