"""One round's two halves as every strategy uses them: expand, then attach.

Keys: a tree's key is fold_in(key, seed of its problem), split for the root's
noise and the expansions; an expansion's is fold_in(tree key, path id). Path ids
are kept rather than keys because the checker of key reuse cannot follow keys
through a gather.
"""

import jax
import jax.numpy as jnp

from o1jax.search.contracts import Expansion, SearchState, StepModel
from o1jax.search.tree import (
  NO_NODE,
  ROOT,
  add_children,
  make_tree,
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
  draw_noise,
) -> SearchState:
  """A search that is about to expand its root.

  Args:
    step_model: the model.
    params: its parameters.
    key: one typed key for the batch, consumed.
    problems: B problems.
    capacity: N.
    num_leaves: W.
    draw_noise: `(key, dtype) -> [A]` of the selection rule.
  """
  root_value, forward_tokens, node_state = step_model.root_fn(
    params, problems, capacity
  )
  tree = make_tree(
    root_value, capacity=capacity, num_candidates=step_model.num_candidates
  )
  num_problems = root_value.shape[0]
  tree_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, problems.seeds)
  keys = jax.vmap(jax.random.split)(tree_keys)
  noise = jax.vmap(lambda key: draw_noise(key, root_value.dtype))(keys[:, 0])
  zeros = jnp.zeros((num_problems,), jnp.int32)
  shape = (num_problems, num_leaves)
  return SearchState(
    tree=tree,
    node_state=node_state,
    tree_keys=keys[:, 1],
    path_ids=jnp.zeros((num_problems, capacity), jnp.uint32),
    root_noise=noise,
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


def expand(
  step_model: StepModel, params, state: SearchState, leaf: jax.Array
) -> SearchState:
  """Gives slots to the candidates of `leaf` and calls `step_fn` once.

  Args:
    step_model: the model.
    params: its parameters.
    state: the search.
    leaf: `[B, W]` distinct unexpanded nodes, NO_NODE only to the right of them;
      their candidates must fit into the tree.
  """
  tree = state.tree
  num_problems, capacity = tree.parent.shape
  num_leaves = leaf.shape[-1]
  num_candidates = step_model.num_candidates

  is_active = leaf != NO_NODE
  node = jnp.where(is_active, leaf, ROOT)
  # Leaves fill their row from the left, so the w-th gets the w-th block.
  offset = num_candidates * jnp.arange(num_leaves, dtype=jnp.int32)[None]
  first_child = jnp.where(is_active, tree.next_free[:, None] + offset, capacity)

  path_id = read(state.path_ids, node)
  fold_in = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
  keys = fold_in(state.tree_keys, path_id)
  actions = jnp.arange(num_candidates, dtype=jnp.int32)
  flat = (num_problems, num_leaves * num_candidates)
  child = first_child[:, :, None] + actions[None, None]
  path_ids = write(
    state.path_ids,
    child.reshape(flat),
    extend_path(path_id[:, :, None], actions[None, None]).reshape(flat),
  )

  expansion, node_state = step_model.step_fn(
    params, keys, node, first_child, is_active, state.node_state
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
  return; any other candidate has reward 0 and the value
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
  prior_logits = expansion.prior_logits.astype(dtype)
  if mix_prior is not None:
    # The root is expanded alone in its round, as the first leaf.
    noisy = jax.vmap(mix_prior)(
      prior_logits[:, 0], expansion.is_valid[:, 0], state.root_noise
    )
    is_root = (state.leaf[:, :1] == ROOT) & state.is_expanding[:, :1]
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
    is_valid=expansion.is_valid,
  )
  return state.replace(tree=tree, expansion=None)
