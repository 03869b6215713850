"""Step-level Monte Carlo tree search, batched over problems.

A simulation descends from the root by the selection rule (select). Where it
meets a candidate for the first time, the candidate's value came with its
parent's expansion, so it only has to be added to the path (backup). Where it
meets a node that was visited before and has no candidates yet, the tree asks
for an expansion. So a round is: `propose` expands one node per tree in one
batched call; `absorb` takes the values in and runs the simulations that need no
further expansion. Visit counts are those of the usual search that expands a
node at its first visit (mctx), at fewer network calls. A simulation that ends
at a finished solution, or at a node without valid candidates, adds its return
once more.

With several parallel leaves a tree also expands, in the same call, nodes that
the search is likely to want next: it plays simulations on a copy of the
statistics, in which a path to a node that waits for its expansion gets a
virtual loss (Chaslot et al., 2008), and throws the copy away. The simulations
proper still run one after another on true values, so that looking ahead changes
the cost and the number of rounds, and no visit count.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from o1jax.search import expansion as expansion_lib
from o1jax.search.contracts import SearchState, StepModel, Strategy
from o1jax.search.selection import SelectionRule, choose, make_rule, named
from o1jax.search.tree import (
  NO_NODE,
  ROOT,
  UNEXPANDED,
  Candidates,
  Tree,
  backup,
  one_node,
  read,
  write,
)

# A round of expansions starts when this share of the unfinished trees waits
# for one: waiting for the last of them would leave the others idle, and rows
# evaluated stay within 1 / 0.8 of the live ones.
_ROUND_FILL = 0.8

# Looking ahead gives up after this many simulations per leaf it looks for:
# they may end at leaves already found, or at no leaf at all.
_TRIES_PER_LEAF = 4


def mcts(
  step_model: StepModel,
  *,
  num_simulations: int,
  capacity: int | None = None,
  rule: str = "puct",
  rule_options: Mapping[str, Any] | None = None,
  num_parallel_leaves: int = 1,
  virtual_loss: float = 1.0,
  discount: float = 1.0,
  rollout_weight: float = 0.0,
  select_by: str = "outcome",
) -> Strategy:
  """Monte Carlo tree search over candidate steps.

  Args:
    step_model: the model; see contracts.py.
    num_simulations: simulations per problem.
    capacity: N, nodes per tree; None gives one expansion per simulation, which
      always suffices with one parallel leaf. A tree that cannot hold the next
      expansion stops, and its cost shows fewer simulations.
    rule: "puct", "uct" or "gumbel"; see selection.py.
    rule_options: keyword options of the rule.
    num_parallel_leaves: W, expansions per tree and round at most.
    virtual_loss: taken from the value at the end of a path that waits.
    discount: per step.
    rollout_weight: weight of `outcome` in the value of an unfinished
      candidate; 0 is the value alone, 1 the rollout alone.
    select_by: "outcome" for `best_finished`, "visits" for `most_visited`.

  Raises:
    ValueError: a number out of range or an unknown name.
  """
  num_candidates = step_model.num_candidates
  if capacity is None:
    capacity = 1 + num_candidates * max(num_simulations, 1)
  _check(
    num_simulations >= 1,
    f"num_simulations={num_simulations}: give at least 1",
  )
  check_capacity(capacity, num_candidates)
  _check(
    num_parallel_leaves >= 1,
    f"num_parallel_leaves={num_parallel_leaves}: give at least 1",
  )
  _check(
    0 <= rollout_weight <= 1,
    f"rollout_weight={rollout_weight}: give a number in [0, 1]",
  )
  _check(0 < discount <= 1, f"discount={discount}: give a number in (0, 1]")
  choose_solution = named("select_by", select_by, SELECTIONS)
  selection = make_rule(
    rule, num_candidates, num_simulations, rule_options or {}
  )

  def init(params, key, problems) -> SearchState:
    return expansion_lib.start(
      step_model,
      params,
      key,
      problems,
      capacity=capacity,
      num_leaves=num_parallel_leaves,
      draw_noise=selection.draw_noise,
    )

  def propose(params, state: SearchState) -> SearchState:
    waits = needs_expansion(state.tree, state.node) & ~is_done(state)
    leaf = jnp.where(waits, state.node, NO_NODE)[:, None]
    if num_parallel_leaves > 1:
      leaf = look_ahead(
        state,
        leaf,
        selection,
        num_leaves=num_parallel_leaves,
        num_simulations=num_simulations,
        virtual_loss=virtual_loss,
        discount=discount,
      )
    return expansion_lib.expand(step_model, params, state, leaf)

  def absorb(state: SearchState, outcome=None) -> SearchState:
    state = expansion_lib.attach(
      state,
      outcome,
      rollout_weight=rollout_weight,
      mix_prior=selection.mix_prior,
    )
    return simulate(
      state, selection, num_simulations=num_simulations, discount=discount
    )

  def is_done(state: SearchState) -> jax.Array:
    return (state.cost.simulations >= num_simulations) | state.is_full

  return Strategy(
    name=f"mcts-{rule}",
    num_candidates=num_candidates,
    capacity=capacity,
    init=init,
    propose=propose,
    absorb=absorb,
    is_done=is_done,
    select=lambda state: choose_solution(state.tree),
  )


def enter(
  tree: Tree,
  node: jax.Array,
  scores_fn: Callable[[Candidates], jax.Array],
  discount: float,
) -> tuple[jax.Array, jax.Array]:
  """One step down in one tree (arrays `[N]`).

  Returns:
    The chosen candidate `[]`, or `node` itself where it has no valid one; and
    whether the simulation can go on from there.
  """
  candidates = one_node(tree, node, discount)
  action = choose(scores_fn(candidates), candidates.is_valid)
  has_child = jnp.any(candidates.is_valid)
  node = jnp.where(has_child, tree.first_child[node] + action, node)
  is_inner = (tree.num_visits[node] > 0) & (
    tree.first_child[node] != UNEXPANDED
  )
  return node, has_child & is_inner


def descend(
  tree: Tree, noise: jax.Array, *, rule: SelectionRule, discount: float
) -> jax.Array:
  """Selects from the root of one tree (arrays `[N]`) down.

  Returns:
    `[]` the node where the simulation ends: an unvisited candidate, a finished
    solution, a node without valid candidates, or a node to be expanded.
  """
  node, _ = jax.lax.while_loop(
    lambda carry: carry[1],
    lambda carry: enter(tree, carry[0], rule.scores, discount),
    enter(
      tree,
      jnp.int32(ROOT),
      lambda candidates: rule.root_scores(candidates, noise),
      discount,
    ),
  )
  return node


def resume(
  tree: Tree,
  node: jax.Array,
  noise: jax.Array,
  *,
  rule: SelectionRule,
  discount: float,
) -> jax.Array:
  """The end `[]` of a simulation that waited at `node`, expanded since.

  Its candidates are all unvisited, so one step down ends it.
  """

  def scores_fn(candidates):
    if rule.root_scores is rule.scores:
      return rule.scores(candidates)
    at_root = rule.root_scores(candidates, noise)
    return jnp.where(node == ROOT, at_root, rule.scores(candidates))

  child, _ = enter(tree, node, scores_fn, discount)
  return child


def needs_expansion(tree: Tree, node: jax.Array) -> jax.Array:
  """True `[B]` where a simulation cannot end at `node` `[B]` nor go on."""
  return (
    (read(tree.num_visits, node) > 0)
    & (read(tree.first_child, node) == UNEXPANDED)
    & ~read(tree.is_terminal, node)
  )


def simulate(
  state: SearchState,
  rule: SelectionRule,
  *,
  num_simulations: int,
  discount: float,
) -> SearchState:
  """Runs the simulations that need no expansion, until most trees wait.

  A tree that is left behind goes on in the next round from where it stands:
  which round a simulation falls into changes nothing in its tree.
  """
  options = {"rule": rule, "discount": discount}
  descend_all = jax.vmap(functools.partial(descend, **options))
  resume_all = jax.vmap(functools.partial(resume, **options))

  def is_worthwhile(carry):
    _, simulations, _, is_ready = carry
    is_live = (simulations < num_simulations) & ~state.is_full
    num_live = jnp.sum(is_live, dtype=jnp.int32)
    num_waiting = jnp.sum(is_live & ~is_ready, dtype=jnp.int32)
    return jnp.any(is_ready) & (num_waiting < _ROUND_FILL * num_live)

  def one_simulation(carry):
    tree, simulations, node, is_ready = carry
    tree = backup(
      tree, node, read(tree.value, node), is_ready, discount=discount
    )
    simulations = simulations + is_ready.astype(jnp.int32)
    is_next = is_ready & (simulations < num_simulations)
    node = jnp.where(is_next, descend_all(tree, state.root_noise), node)
    return tree, simulations, node, is_next & ~needs_expansion(tree, node)

  simulations = state.cost.simulations
  is_live = (simulations < num_simulations) & ~state.is_full
  node = jnp.where(
    state.is_expanding[:, 0],
    resume_all(state.tree, state.node, state.root_noise),
    state.node,
  )
  tree, simulations, node, is_ready = jax.lax.while_loop(
    is_worthwhile,
    one_simulation,
    (state.tree, simulations, node, is_live),
  )
  waits = is_live & ~is_ready & (simulations < num_simulations)
  has_room = tree.next_free + tree.num_candidates <= tree.parent.shape[-1]
  return state.replace(
    tree=tree,
    node=node,
    cost=state.cost.replace(simulations=simulations),
    is_full=state.is_full | (waits & ~has_room),
  )


def look_ahead(
  state: SearchState,
  leaf: jax.Array,
  rule: SelectionRule,
  *,
  num_leaves: int,
  num_simulations: int,
  virtual_loss: float,
  discount: float,
) -> jax.Array:
  """Leaves `[B, W]`: `leaf` `[B, 1]` and up to W - 1 more; see the head."""
  num_problems, capacity = state.tree.parent.shape
  num_candidates = state.tree.num_candidates
  descend_all = jax.vmap(
    functools.partial(descend, rule=rule, discount=discount)
  )

  def is_looking(leaf, num_found, num_tries):
    used = state.tree.next_free + num_candidates * num_found
    return (
      (leaf[:, 0] != NO_NODE)
      & (num_found < num_leaves)
      & (used + num_candidates <= capacity)
      & (state.cost.simulations + num_tries < num_simulations)
      & (num_tries < _TRIES_PER_LEAF * num_leaves)
    )

  def one_try(carry):
    tree, leaf, num_found, num_tries = carry
    is_active = is_looking(leaf, num_found, num_tries)
    # The first try finds the leaf that the tree waits for once more.
    node = descend_all(tree, state.root_noise)
    waits = needs_expansion(tree, node)
    is_known = jnp.any(leaf == node[:, None], axis=-1)
    is_new = is_active & waits & ~is_known
    leaf = write(leaf, jnp.where(is_new, num_found, num_leaves), node)
    value = read(tree.value, node) - jnp.where(waits, virtual_loss, 0.0)
    tree = backup(
      tree, node, value.astype(tree.value.dtype), is_active, discount=discount
    )
    return tree, leaf, num_found + is_new.astype(jnp.int32), num_tries + 1

  nothing = jnp.full((num_problems, num_leaves - 1), NO_NODE, jnp.int32)
  _, leaf, _, _ = jax.lax.while_loop(
    lambda carry: jnp.any(is_looking(*carry[1:])),
    one_try,
    (
      state.tree,
      jnp.concatenate([leaf, nothing], axis=-1),
      jnp.ones((num_problems,), jnp.int32),
      jnp.int32(0),
    ),
  )
  return leaf


def best_finished(tree: Tree) -> jax.Array:
  """The finished solution `[B]` with the highest outcome; else NO_NODE.

  Every finished candidate that an expansion made counts, visited or not: its
  outcome is known. Ties go to more visits, then to the higher prior among its
  siblings, then to the lower index.
  """
  remaining = tree.is_terminal & tree.is_valid
  for score in (tree.reward, tree.num_visits, tree.prior_logits):
    score = score.astype(tree.value.dtype)
    score = jnp.where(remaining, score, -jnp.inf)
    best = jnp.max(score, axis=-1, keepdims=True)
    remaining = remaining & (score == best)
  first = jnp.argmax(remaining, axis=-1).astype(jnp.int32)
  return jnp.where(jnp.any(remaining, axis=-1), first, NO_NODE)


def most_visited(tree: Tree) -> jax.Array:
  """The end of the path of most visits, where that is a finished solution.

  Follows the most visited child ("robust child") from the root, of equally
  visited ones that of the higher return, then the first. A path that ends
  elsewhere gives `best_finished`.
  """

  def one_down(node):
    seen = jax.vmap(one_node, (0, 0, None))(tree, node, 1.0)
    visits = jnp.where(seen.is_valid, seen.num_visits, 0)
    most = jnp.max(visits, axis=-1, keepdims=True)
    returns = jnp.where(visits == most, seen.q_values, -jnp.inf)
    action = jnp.argmax(returns, axis=-1).astype(jnp.int32)
    has_child = most[:, 0] > 0
    child = read(tree.first_child, node) + action
    return jnp.where(has_child, child, node), has_child

  node, _ = jax.lax.while_loop(
    lambda carry: jnp.any(carry[1]),
    lambda carry: one_down(carry[0]),
    one_down(jnp.full_like(tree.next_free, ROOT)),
  )
  return jnp.where(read(tree.is_terminal, node), node, best_finished(tree))


SELECTIONS = {"outcome": best_finished, "visits": most_visited}


def check_capacity(capacity: int, num_candidates: int) -> None:
  """A tree must hold its root and one expansion."""
  _check(
    capacity >= 1 + num_candidates,
    f"capacity={capacity} cannot hold the root and its {num_candidates}"
    f" candidates; give at least {1 + num_candidates}",
  )


def _check(holds: bool, message: str) -> None:
  if not holds:
    raise ValueError(message)
