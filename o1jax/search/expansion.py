"""One round's two halves as every strategy uses them: expand, then attach.

Keys: a tree's key is fold_in(key, seed of its problem), folded with 0 for the
root's noise and with 1 for the expansions; an expansion's is fold_in(tree key,
path id), where a node's further expansions have ids of their own. Path ids are
kept rather than keys because the checker of key reuse cannot follow keys
through a gather.
"""

import jax
import jax.numpy as jnp

from o1jax.search import stopping
from o1jax.search.contracts import Expansion, Request, SearchState, StepModel
from o1jax.search.tree import (
  NO_NODE,
  ROOT,
  add_children,
  candidate_nodes,
  make_tree,
  num_earlier,
  read,
  write,
)
from o1jax.types import Cost, ProblemBatch


def start(
  step_model: StepModel,
  params,
  key: jax.Array,
  problems: ProblemBatch,
  *,
  capacity: int,
  num_leaves: int,
  max_blocks: int = 1,
  draw_noise=None,
) -> SearchState:
  """A search that is about to expand its root.

  Args:
    step_model: the model.
    params: its parameters.
    key: one typed key for the batch, consumed.
    problems: B problems.
    capacity: N.
    num_leaves: W.
    max_blocks: M, times that a node may be expanded.
    draw_noise: `(key, dtype) -> [A]` of the selection rule; None: no noise.
  """
  root_value, forward_tokens, node_state = step_model.root_fn(
    params, problems, capacity
  )
  tree = make_tree(
    root_value,
    capacity=capacity,
    num_candidates=step_model.num_candidates,
    max_blocks=max_blocks,
  )
  num_problems = root_value.shape[0]
  seeds = problems.seeds.astype(jnp.uint32)

  def keys_for(purpose):
    ids = jnp.stack([seeds, jnp.full_like(seeds, purpose)], axis=-1)
    return jax.vmap(fold_in_all, (None, 0))(key, ids)

  if draw_noise is None:
    noise = jnp.zeros(
      (num_problems, step_model.num_candidates), root_value.dtype
    )
  else:
    noise = jax.vmap(lambda k: draw_noise(k, root_value.dtype))(keys_for(0))
  zeros = jnp.zeros((num_problems,), jnp.int32)
  shape = (num_problems, num_leaves)
  return SearchState(
    tree=tree,
    node_state=node_state,
    tree_keys=keys_for(1),
    path_ids=jnp.zeros((num_problems, capacity), jnp.uint32),
    root_noise=noise,
    root=jnp.full((num_problems,), ROOT, jnp.int32),
    node=jnp.full((num_problems,), ROOT, jnp.int32),
    leaf=jnp.full(shape, NO_NODE, jnp.int32),
    first_child=jnp.full(shape, capacity, jnp.int32),
    is_expanding=jnp.zeros(shape, bool),
    expansion=None,
    cost=Cost(
      generated_tokens=zeros,
      forward_tokens=zeros + forward_tokens.astype(jnp.int32),
      simulations=zeros,
    ),
    is_full=jnp.zeros((num_problems,), bool),
  )


def fold_in_all(key: jax.Array, ids: jax.Array) -> jax.Array:
  """One key folded with each of `ids` `[L]` (uint32) in turn.

  In a loop, so that the cipher is compiled once: it takes 0.1 to 0.3 seconds at
  each place. Folding with i gives the i-th key of a split.
  """

  def fold(key, i):
    return jax.random.fold_in(key, i), None

  return jax.lax.scan(fold, key, ids)[0]


def affordable_rows(
  step_model: StepModel, state: SearchState, max_tokens: int | None
) -> jax.Array:
  """Candidates `[B]` that may still be drawn without passing the budget.

  Each is taken to be as long as it can be, so that the budget holds. There are
  none once a stop rule holds.
  """
  spent = state.cost.generated_tokens
  if max_tokens is None:
    num_rows = step_model.num_candidates * state.leaf.shape[1]
    rows = jnp.full_like(spent, num_rows)
  else:
    left = jnp.maximum(max_tokens - spent, 0)
    rows = left // step_model.max_candidate_tokens
  return jnp.where(stopping.is_stopped(state), 0, rows)


def has_room(
  step_model: StepModel, state: SearchState, max_tokens: int | None
) -> jax.Array:
  """True `[B]` where one more expansion fits into the tree and the budget."""
  tree = state.tree
  fits = tree.next_free + tree.num_candidates <= tree.parent.shape[-1]
  return fits & (affordable_rows(step_model, state, max_tokens) > 0)


def expand(
  step_model: StepModel,
  params,
  state: SearchState,
  leaf: jax.Array,
  *,
  max_tokens: int | None = None,
) -> SearchState:
  """Gives slots to the candidates of `leaf` and calls `step_fn` once.

  Args:
    step_model: the model.
    params: its parameters.
    state: the search.
    leaf: `[B, W]` nodes with less than M blocks each, NO_NODE only to the right
      of them; a node that stands several times gets as many blocks. Their
      candidates must fit into the tree.
    max_tokens: the budget of a problem. The last candidates that it cannot pay
      for are not drawn, and leaves that would get none are not expanded.
  """
  tree = state.tree
  num_problems, capacity = tree.parent.shape
  num_leaves = leaf.shape[-1]
  num_candidates = step_model.num_candidates

  offset = num_candidates * jnp.arange(num_leaves, dtype=jnp.int32)[None]
  num_rows = affordable_rows(step_model, state, max_tokens)[:, None] - offset
  num_rows = jnp.clip(num_rows, 0, num_candidates)
  num_rows = jnp.where(leaf != NO_NODE, num_rows, 0)
  is_active = num_rows > 0
  leaf = jnp.where(is_active, leaf, NO_NODE)
  node = jnp.where(is_active, leaf, ROOT)
  # Leaves fill their row from the left, so the w-th gets the w-th block.
  first_child = jnp.where(is_active, tree.next_free[:, None] + offset, capacity)

  path_id = read(state.path_ids, node)
  block = num_earlier(leaf)
  if tree.max_blocks > 1:
    block += read(tree.num_blocks, node)
  fold_in = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
  keys = fold_in(state.tree_keys, _block_id(path_id, block))
  within = jnp.arange(num_candidates, dtype=jnp.int32)[None, None]
  actions = block[:, :, None] * num_candidates + within
  flat = (num_problems, num_leaves * num_candidates)
  child = first_child[:, :, None] + within
  path_ids = write(
    state.path_ids,
    child.reshape(flat),
    extend_path(path_id[:, :, None], actions).reshape(flat),
  )
  num_siblings = num_candidates * (tree.max_blocks - 1)
  siblings = candidate_nodes(tree, leaf)[..., :num_siblings]
  is_kept = read(tree.is_valid, siblings.reshape(num_problems, -1))
  siblings = jnp.where(is_kept.reshape(siblings.shape), siblings, NO_NODE)

  expansion, node_state = step_model.step_fn(
    params,
    keys,
    Request(node, first_child, num_rows, siblings),
    state.node_state,
  )
  shape = (num_problems, num_leaves, num_candidates)
  assert expansion.prior_logits.shape == shape, expansion.prior_logits.shape
  cost = state.cost
  return state.replace(
    node_state=node_state,
    path_ids=path_ids,
    leaf=leaf,
    first_child=first_child,
    is_expanding=is_active,
    expansion=expansion,
    cost=cost.replace(
      generated_tokens=cost.generated_tokens + expansion.generated_tokens,
      forward_tokens=cost.forward_tokens + expansion.forward_tokens,
    ),
  )


def _block_id(path_id: jax.Array, block: jax.Array) -> jax.Array:
  """What an expansion's key is folded with: the path's id, or a block's own."""
  # Actions count up from 0, so these ids are no child's.
  return jnp.where(block == 0, path_id, extend_path(path_id, -block))


def extend_path(path_id: jax.Array, action: jax.Array) -> jax.Array:
  """Path ids of candidates: a uint32 hash of the parent's id and the action.

  The finalizer of MurmurHash3. Two nodes of one tree share an id, and with it
  their draws, with probability 2^-32.
  """
  mixed = path_id * jnp.uint32(0x9E3779B1) + action.astype(jnp.uint32) + 1
  mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
  return mixed ^ (mixed >> 16)


def read_outcome(expansion: Expansion, outcome: jax.Array | None) -> jax.Array:
  """The outcomes that count, `[B, W, A]`.

  Args:
    expansion: its `outcome` is the device's estimate.
    outcome: `[B, W, A]`, or `[B, A]` where W is 1, from the host; it counts
      where it is not NaN. None leaves all to the device.
  """
  if outcome is None:
    return expansion.outcome
  outcome = jnp.asarray(outcome, expansion.outcome.dtype)
  outcome = outcome.reshape(expansion.outcome.shape)
  return jnp.where(jnp.isnan(outcome), expansion.outcome, outcome)


def attach(
  state: SearchState,
  outcome: jax.Array | None,
  *,
  rollout_weight: float,
  mix_prior=None,
) -> SearchState:
  """Makes the expansion's candidates nodes of the tree and uses it up.

  Entering a terminal candidate is rewarded with its outcome and ends the
  return; any other candidate has reward 0. Its value is the outcome where it
  completes an answer, and elsewhere
  `(1 - rollout_weight) * value + rollout_weight * outcome`.

  Args:
    state: after `expand`.
    outcome: see `read_outcome`.
    rollout_weight: in [0, 1]; at 0 the outcome of unfinished candidates is not
      read, at 1 their value is not.
    mix_prior: the selection rule's, or None.
  """
  expansion = state.expansion
  assert expansion is not None, "absorb needs a state that propose returned"
  dtype = state.tree.value.dtype
  outcome = read_outcome(expansion, outcome).astype(dtype)
  value = expansion.value.astype(dtype)
  if rollout_weight == 1:
    value = outcome
  elif rollout_weight > 0:
    value = (1 - rollout_weight) * value + rollout_weight * outcome
  value = jnp.where(expansion.is_solution, outcome, value)
  prior_logits = expansion.prior_logits.astype(dtype)
  if mix_prior is not None:
    # The root is expanded alone in its round, as the first leaf. (Rules with
    # noise expand it once.)
    noisy = jax.vmap(mix_prior)(
      prior_logits[:, 0], expansion.is_valid[:, 0], state.root_noise
    )
    is_root = (state.leaf[:, :1] == state.root[:, None]) & state.is_expanding[
      :, :1
    ]
    prior_logits = prior_logits.at[:, 0].set(
      jnp.where(is_root, noisy, prior_logits[:, 0])
    )
  is_terminal = expansion.is_terminal
  tree = add_children(
    state.tree,
    state.leaf,
    state.first_child,
    state.is_expanding,
    prior_logits=prior_logits,
    value=jnp.where(is_terminal, 0.0, value),
    reward=jnp.where(is_terminal, outcome, 0.0),
    is_terminal=is_terminal,
    is_solution=expansion.is_solution,
    is_valid=expansion.is_valid,
    sibling_logits=expansion.sibling_logits,
  )
  return stopping.observe(state.replace(tree=tree, expansion=None))
