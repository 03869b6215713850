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

With several blocks a node widens (progressive widening, Coulom 2007, Chaslot et
al. 2008): it is expanded again, up to M times, when a simulation comes by and
it has drawn fewer than `widening_rate * visits ** widening_exponent`
candidates. So a budget goes on being spent where few distinct steps were drawn.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
  best_nodes,
  child_at,
  one_node,
  read,
  scores,
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
  max_tokens: int | None = None,
  max_blocks: int = 1,
  widening_rate: float = 1.0,
  widening_exponent: float = 0.5,
) -> Strategy:
  """Monte Carlo tree search over candidate steps.

  Args:
    step_model: the model; see contracts.py.
    num_simulations: simulations per problem.
    capacity: N, nodes per tree; None gives one expansion per simulation, which
      suffices with one parallel leaf and one block. A tree that cannot hold the
      next expansion stops, and its cost shows fewer simulations.
    rule: "puct", "uct" or "gumbel"; see selection.py.
    rule_options: keyword options of the rule.
    num_parallel_leaves: W, expansions per tree and round at most.
    virtual_loss: taken from the value at the end of a path that waits.
    discount: per step.
    rollout_weight: weight of `outcome` in the value of an unfinished
      candidate; 0 is the value alone, 1 the rollout alone.
    select_by: "outcome" for `best_finished`, "visits" for `most_visited`.
    max_tokens: the budget of a problem in generated tokens, never exceeded; a
      search stops when it cannot pay for one more candidate. None: no limit.
    max_blocks: M, expansions of a node; 1 for no widening. Not with rules that
      draw noise for the root's candidates: they take these to be all.
    widening_rate: see the head.
    widening_exponent: see the head.

  Raises:
    ValueError: a number out of range or an unknown name.
  """
  num_candidates = step_model.num_candidates
  if capacity is None:
    capacity = 1 + num_candidates * max(num_simulations, 1)
  check_budget(max_tokens, step_model)
  _check(max_blocks >= 1, f"max_blocks={max_blocks}: give at least 1")
  _check(
    widening_rate > 0 and 0 < widening_exponent <= 1,
    f"widening_rate={widening_rate} and widening_exponent={widening_exponent}:"
    " give a rate above 0 and an exponent in (0, 1]",
  )
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
  _check(
    max_blocks == 1 or selection.draw_noise is None,
    f"max_blocks={max_blocks}: rule={rule!r} with root noise takes the root's"
    " first candidates to be all; set max_blocks=1, or the rule to uct or to"
    " puct with dirichlet_fraction=0",
  )
  widening = Widening(widening_rate, widening_exponent)
  options = {"rule": selection, "widening": widening, "discount": discount}

  def init(params, key, problems) -> SearchState:
    return expansion_lib.start(
      step_model,
      params,
      key,
      problems,
      capacity=capacity,
      num_leaves=num_parallel_leaves,
      max_blocks=max_blocks,
      draw_noise=selection.draw_noise,
    )

  def has_room(state: SearchState) -> jax.Array:
    return expansion_lib.has_room(step_model, state, max_tokens)

  def propose(params, state: SearchState) -> SearchState:
    room = has_room(state)
    waits = needs_expansion(state.tree, state.node, room, widening)
    leaf = jnp.where(waits & ~is_done(state), state.node, NO_NODE)[:, None]
    if num_parallel_leaves > 1:
      leaf = look_ahead(
        state,
        leaf,
        num_leaves=num_parallel_leaves,
        num_simulations=num_simulations,
        virtual_loss=virtual_loss,
        **options,
      )
    return expansion_lib.expand(
      step_model, params, state, leaf, max_tokens=max_tokens
    )

  def absorb(state: SearchState, outcome=None) -> SearchState:
    state = expansion_lib.attach(
      state,
      outcome,
      rollout_weight=rollout_weight,
      mix_prior=selection.mix_prior,
    )
    return simulate(
      state, has_room(state), num_simulations=num_simulations, **options
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


class Widening(NamedTuple):
  """When a node is expanded again; see the head."""

  rate: float
  exponent: float


def enter(
  tree: Tree,
  node: jax.Array,
  scores_fn: Callable[[Candidates], jax.Array],
  discount: float,
) -> tuple[jax.Array, jax.Array]:
  """One step down in one tree (arrays `[N]`).

  Returns:
    The chosen candidate `[]`, or `node` itself where it has no valid one; and
    whether it is a visited node with candidates.
  """
  candidates = one_node(tree, node, discount)
  action = choose(scores_fn(candidates), candidates.is_valid)
  has_child = jnp.any(candidates.is_valid)
  node = jnp.where(has_child, child_at(tree, node, action), node)
  is_inner = (tree.num_visits[node] > 0) & (
    tree.first_child[node] != UNEXPANDED
  )
  return node, has_child & is_inner


def descend(
  tree: Tree,
  noise: jax.Array,
  root: jax.Array,
  start: jax.Array,
  can_widen: jax.Array,
  *,
  rule: SelectionRule,
  widening: Widening,
  discount: float,
) -> jax.Array:
  """Selects from `start` of one tree (arrays `[N]`) down, one step at least.

  Returns:
    `[]` the node where the simulation ends or waits: an unvisited candidate, a
    finished solution, a node without valid candidates, or one to be expanded.
  """

  def first_scores(candidates):
    at_root = rule.root_scores(candidates, noise)
    return jnp.where(start == root, at_root, rule.scores(candidates))

  def one_step(node, scores_fn):
    node, is_inner = enter(tree, node, scores_fn, discount)
    if tree.max_blocks == 1:
      return node, is_inner
    return node, is_inner & ~(can_widen & is_narrow(tree, node, widening))

  # A rule without scores of its own for the root takes the first step in the
  # loop as well: a step outside would be compiled once more.
  begin = start, jnp.array(True)
  if rule.root_scores is not rule.scores:
    begin = one_step(start, first_scores)
  node, _ = jax.lax.while_loop(
    lambda carry: carry[1],
    lambda carry: one_step(carry[0], rule.scores),
    begin,
  )
  return node


def is_narrow(tree: Tree, node: jax.Array, widening: Widening) -> jax.Array:
  """True `[]` where an expanded node of one tree is due for another block."""
  visits = tree.num_visits[node].astype(tree.value.dtype)
  due = widening.rate * visits**widening.exponent
  num_blocks = tree.num_blocks[node]
  return (
    (num_blocks > 0)
    & (num_blocks < tree.max_blocks)
    & (tree.num_candidates * num_blocks < due)
  )


def needs_expansion(
  tree: Tree, node: jax.Array, can_widen: jax.Array, widening: Widening
) -> jax.Array:
  """True `[B]` where a simulation cannot end at `node` `[B]` nor go on."""
  is_leaf = (
    (read(tree.num_visits, node) > 0)
    & (read(tree.first_child, node) == UNEXPANDED)
    & ~read(tree.is_terminal, node)
  )
  if tree.max_blocks == 1:
    return is_leaf
  narrow = jax.vmap(functools.partial(is_narrow, widening=widening))(tree, node)
  return is_leaf | (can_widen & narrow)


def start_simulation(
  tree: Tree,
  noise: jax.Array,
  root: jax.Array,
  can_widen: jax.Array,
  *,
  rule: SelectionRule,
  widening: Widening,
  discount: float,
  resumed: jax.Array | None = None,
) -> jax.Array:
  """Where a simulation from `root` `[B]` ends or waits, `[B]`.

  That may be the root itself, which has no candidates yet or is to be widened.
  `resumed` `[B]` holds the nodes where simulations that waited go on, NO_NODE
  for new ones; None for new ones alone.
  """
  descend_all = jax.vmap(
    functools.partial(descend, rule=rule, widening=widening, discount=discount)
  )
  is_new = jnp.array([True]) if resumed is None else resumed == NO_NODE
  start = root if resumed is None else jnp.where(is_new, root, resumed)
  node = descend_all(tree, noise, root, start, can_widen)
  if tree.max_blocks == 1:
    return node
  waits = needs_expansion(tree, root, can_widen, widening)
  return jnp.where(is_new & waits, root, node)


def simulate(
  state: SearchState,
  room: jax.Array,
  *,
  num_simulations: int,
  rule: SelectionRule,
  widening: Widening,
  discount: float,
) -> SearchState:
  """Runs the simulations that need no expansion, until most trees wait.

  A tree that is left behind goes on in the next round from where it stands:
  which round a simulation falls into changes nothing in its tree.

  Args:
    state: after `attach`.
    room: `[B]` True where one more expansion can be had.
    num_simulations: of a problem.
    rule: selection rule.
    widening: see `Widening`.
    discount: per step.
  """
  options = {"rule": rule, "widening": widening, "discount": discount}
  # Simulations that waited at a node go on from there before any other ends.
  # That is a turn of the loop which ends none, so that the descent is compiled
  # once.
  is_resumed = state.is_expanding[:, 0]
  is_live = (state.cost.simulations < num_simulations) & ~state.is_full

  def is_worthwhile(carry):
    _, simulations, _, is_ready, is_first = carry
    is_live = (simulations < num_simulations) & ~state.is_full
    num_live = jnp.sum(is_live, dtype=jnp.int32)
    num_waiting = jnp.sum(is_live & ~is_ready, dtype=jnp.int32)
    return is_first | (
      jnp.any(is_ready) & (num_waiting < _ROUND_FILL * num_live)
    )

  def one_simulation(carry):
    tree, simulations, node, is_ready, is_first = carry
    is_ended = is_ready & ~is_first
    tree = backup(
      tree, node, read(tree.value, node), is_ended, discount=discount
    )
    simulations = simulations + is_ended.astype(jnp.int32)
    is_new = is_ended & (simulations < num_simulations)
    moves = jnp.where(is_first, is_resumed, is_new)
    below = start_simulation(
      tree,
      state.root_noise,
      state.root,
      room,
      resumed=jnp.where(is_first, node, NO_NODE),
      **options,
    )
    node = jnp.where(moves, below, node)
    waits = needs_expansion(tree, node, room, widening)
    goes_on = jnp.where(is_first, is_live, is_new)
    return tree, simulations, node, goes_on & ~waits, jnp.array(False)

  tree, simulations, node, is_ready, _ = jax.lax.while_loop(
    is_worthwhile,
    one_simulation,
    (
      state.tree,
      state.cost.simulations,
      state.node,
      is_live,
      jnp.array(True),
    ),
  )
  waits = is_live & ~is_ready & (simulations < num_simulations)
  return state.replace(
    tree=tree,
    node=node,
    cost=state.cost.replace(simulations=simulations),
    is_full=state.is_full | (waits & ~room),
  )


def look_ahead(
  state: SearchState,
  leaf: jax.Array,
  *,
  num_leaves: int,
  num_simulations: int,
  virtual_loss: float,
  rule: SelectionRule,
  widening: Widening,
  discount: float,
) -> jax.Array:
  """Leaves `[B, W]`: `leaf` `[B, 1]` and up to W - 1 more; see the head.

  Nodes are not widened ahead of time: that would change what is chosen there.
  """
  num_problems, capacity = state.tree.parent.shape
  can_widen = jnp.zeros((num_problems,), bool)
  num_candidates = state.tree.num_candidates
  descend_all = jax.vmap(
    functools.partial(descend, rule=rule, widening=widening, discount=discount)
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
    # The first try may find the leaf that the tree waits for once more.
    node = descend_all(
      tree, state.root_noise, state.root, state.root, can_widen
    )
    waits = needs_expansion(tree, node, can_widen, widening)
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


def best_finished(tree: Tree, score: jax.Array | None = None) -> jax.Array:
  """The finished solution `[B]` with the highest outcome; else NO_NODE.

  Every complete answer that an expansion made counts, visited or not: its
  outcome is known. Ties go to more visits, then to the higher prior among its
  siblings, then to the lower index. `score` `[B, N]` takes the outcome's place.
  """
  score = scores(tree) if score is None else score
  keys = (score, tree.num_visits, tree.prior_logits)
  return best_nodes(keys, tree.is_solution & tree.is_valid, 1)[:, 0]


def most_visited_child(
  tree: Tree, node: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The most visited child `[B]` of `node` `[B]`, and whether there is one.

  Of equally visited ones that of the higher return, then the first. A node
  without visited children gives itself.
  """
  seen = jax.vmap(one_node, (0, 0, None))(tree, node, 1.0)
  visits = jnp.where(seen.is_valid, seen.num_visits, 0)
  most = jnp.max(visits, axis=-1, keepdims=True)
  returns = jnp.where(visits == most, seen.q_values, -jnp.inf)
  action = jnp.argmax(returns, axis=-1).astype(jnp.int32)
  has_child = most[:, 0] > 0
  child = jax.vmap(child_at)(tree, node, action)
  return jnp.where(has_child, child, node), has_child


def most_visited(tree: Tree) -> jax.Array:
  """The end of the path of most visits, where that is a finished solution.

  Follows the most visited child ("robust child") from the root. A path that
  ends elsewhere gives `best_finished`.
  """
  node, _ = jax.lax.while_loop(
    lambda carry: jnp.any(carry[1]),
    lambda carry: most_visited_child(tree, carry[0]),
    most_visited_child(tree, jnp.full_like(tree.next_free, ROOT)),
  )
  return jnp.where(read(tree.is_solution, node), node, best_finished(tree))


SELECTIONS = {"outcome": best_finished, "visits": most_visited}


def check_capacity(capacity: int, num_candidates: int) -> None:
  """A tree must hold its root and one expansion."""
  _check(
    capacity >= 1 + num_candidates,
    f"capacity={capacity} cannot hold the root and its {num_candidates}"
    f" candidates; give at least {1 + num_candidates}",
  )


def check_budget(max_tokens: int | None, step_model: StepModel) -> None:
  """A budget must pay for one candidate."""
  least = step_model.max_candidate_tokens
  _check(
    max_tokens is None or max_tokens >= least,
    f"max_tokens={max_tokens} does not pay for one candidate of up to {least}"
    f" tokens; give at least {least}, or lower the tokens of a step",
  )


def _check(holds: bool, message: str) -> None:
  if not holds:
    raise ValueError(message)
