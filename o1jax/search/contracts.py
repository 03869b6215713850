"""What search needs from a model, and what a driver needs from a search.

A `StepModel` turns a node into its A candidate steps; a `Strategy` grows one
tree per problem with it. No host callback runs inside a compiled program, so a
round is cut in two where the host may have to speak:

  propose  chooses the nodes to expand and expands them in one batched call;
  absorb   takes the scores in (the device's, or those of the host; driver.py)
           and does all the bookkeeping that needs no further expansion.

W is the number of leaves that a tree expands in one round (1 unless the search
looks ahead, see mcts.py); the other letters are those of types.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import struct

from o1jax.search.tree import Tree
from o1jax.types import Cost, ProblemBatch


@struct.dataclass
class Expansion:
  """The A candidates of each node that a `step_fn` call expanded.

  Attributes:
    prior_logits: `[B, W, A]` unnormalised log-probs of the candidates.
    is_valid: `[B, W, A]` False where a candidate is absent or merged into an
      equal one; the search never enters it.
    is_terminal: `[B, W, A]` True where nothing can follow the candidate.
    is_solution: `[B, W, A]` True where it completes an answer. In trees of
      revisions an answer may be followed by another; elsewhere it is terminal.
    value: `[B, W, A]` expected return after the candidate; not read where the
      candidate is terminal.
    outcome: `[B, W, A]` the device's estimate of the final outcome: of the
      finished solution where terminal, of a rollout from there otherwise.
    generated_tokens: `[B]` int32 tokens sampled by this call, all W together.
    forward_tokens: `[B]` int32 tokens that the network evaluated.
    sibling_logits: `[B, W, E]` log of the prior weight that candidates which
      were merged into earlier ones add to these (see `Request.siblings`);
      lowest finite where none. None where nothing is merged into them.
  """

  prior_logits: jax.Array
  is_valid: jax.Array
  is_terminal: jax.Array
  is_solution: jax.Array
  value: jax.Array
  outcome: jax.Array
  generated_tokens: jax.Array
  forward_tokens: jax.Array
  sibling_logits: jax.Array | None = None


@struct.dataclass
class Request:
  """Which nodes a `step_fn` call expands.

  Attributes:
    node: `[B, W]` int32; ROOT where there is nothing to expand.
    first_child: `[B, W]` int32 the candidates of `node[b, w]` become nodes
      `first_child[b, w] + a`. N where there is nothing to expand, so that a
      scatter with mode="drop" writes nothing.
    num_rows: `[B, W]` int32 candidates to draw, the first of the A; those left
      out are not valid and cost nothing. 0 where there is nothing to expand:
      `node_state` must not change there and the rest of the row is not read.
    siblings: `[B, W, E]` int32 candidates that earlier expansions of the same
      node made, NO_NODE where none; E is 0 where nodes expand once.
  """

  node: jax.Array
  first_child: jax.Array
  num_rows: jax.Array
  siblings: jax.Array


class StepModel(NamedTuple):
  """Where a policy meets search. All functions are pure and jittable.

  Attributes:
    num_candidates: A, the candidates of one expansion.
    root_fn: `(params, problems, capacity) -> (root_value [B], forward_tokens
      [B], node_state)`; `capacity` is N, the nodes a tree can hold. The dtype
      of `root_value` is the dtype of all statistics.
    step_fn: `(params, keys [B, W], request, node_state) -> (Expansion,
      node_state)`. The result for a node may depend on its key, its problem,
      its path and its siblings only, those of its other blocks in the same
      call included, never on its row or its index.
    max_candidate_tokens: the most tokens that one candidate may cost; what a
      token budget reserves for it before it is drawn.

  `node_state` is an opaque pytree whose leaves start with B.
  """

  num_candidates: int
  root_fn: Callable[..., tuple[jax.Array, jax.Array, Any]]
  step_fn: Callable[..., tuple[Expansion, Any]]
  max_candidate_tokens: int


@struct.dataclass
class StopRule:
  """When a search ends before its budget does; see stopping.py.

  Attributes:
    best_score: `[B]` highest score of a finished solution; -inf without one.
    best_tokens: `[B]` int32 tokens generated when it was found.
    threshold: the score that suffices, or None; static.
    patience: tokens without a better one that suffice, or None; static.
  """

  best_score: jax.Array
  best_tokens: jax.Array
  threshold: float | None = struct.field(pytree_node=False)
  patience: int | None = struct.field(pytree_node=False)


@struct.dataclass
class SearchState:
  """One search per problem, between two halves of a round.

  Attributes:
    tree: the trees; see `Tree`.
    node_state: what the step model remembers of the nodes.
    tree_keys: `[B]` typed keys; a problem's seed gives its key, not its row.
    path_ids: `[B, N]` uint32 hash of the candidates on the path to each node.
      A node expands with fold_in(tree key, path id), so that its candidates
      depend neither on its index nor on the order of expansion.
    root_noise: `[B, A]` the selection rule's noise at the root.
    root: `[B]` int32 the node where simulations start: ROOT, or the step that
      the search has committed to.
    node: `[B]` int32 where the tree's current simulation stands: at its end, or
      at a node that it needs expanded.
    leaf: `[B, W]` int32 nodes that the last `propose` expanded; NO_NODE where
      none. Some strategies put there in `absorb` what the next one expands.
    first_child: `[B, W]` int32 first child of each leaf being expanded; N
      where none.
    is_expanding: `[B, W]` True where the last `propose` expanded a leaf.
    expansion: what `propose` got from the step model; None after `absorb`.
    cost: spent so far.
    is_full: `[B]` True where the search stopped because the next expansion
      fits neither into the tree nor into the budget, or not into one of them,
      or because of a stop rule.
    stop: the stop rule; None where there is none.
  """

  tree: Tree
  node_state: Any
  tree_keys: jax.Array
  path_ids: jax.Array
  root_noise: jax.Array
  root: jax.Array
  node: jax.Array
  leaf: jax.Array
  first_child: jax.Array
  is_expanding: jax.Array
  expansion: Expansion | None
  cost: Cost
  is_full: jax.Array
  stop: StopRule | None = None


class Strategy(NamedTuple):
  """One search algorithm as pure functions; drivers run it.

  Attributes:
    name: what the tables call it.
    num_candidates: A.
    capacity: N, the nodes a tree can hold.
    init: `(params, key, problems) -> state`; consumes the key.
    propose: `(params, state) -> state` with `expansion` filled in.
    absorb: `(state, outcome=None) -> state` with `expansion` used up. `outcome`
      `[B, W, A]` (or `[B, A]` where W is 1) replaces the device's estimate
      where it is not NaN; see `read_outcome`.
    is_done: `state -> [B]`, True where another round would change nothing.
    select: `state -> [B]` int32, the last node of the chosen finished
      solution, NO_NODE where the tree holds none.
  """

  name: str
  num_candidates: int
  capacity: int
  init: Callable[[Any, jax.Array, ProblemBatch], SearchState]
  propose: Callable[[Any, SearchState], SearchState]
  absorb: Callable[..., SearchState]
  is_done: Callable[[SearchState], jax.Array]
  select: Callable[[SearchState], jax.Array]
