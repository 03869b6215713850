"""Beam search over steps, and its relatives of one engine.

A round expands the K best open nodes of the deepest layer (W is K) and the next
layer is their candidates. Where a budget cannot pay for all K at once, a layer
is completed in further rounds, while there is money, before the next is begun.
Solutions that are finished are kept aside: they take no place in the beam, and
the best of them is the answer. A beam whose layer has no open node is over; it
does not go back up.

  beam                      Snell et al., arXiv 2408.03314, Section 5.1
  with `num_subtrees`       diverse verifier tree search (DVTS), as in Hugging
                            Face's search-and-learn: independent beams
  treebon                   TreeBoN, arXiv 2410.16033
  "breadth_first"           Tree of Thoughts' breadth-first search with pruning
                            (arXiv 2305.10601, Algorithm 1) is `beam` itself

By what a beam compares nodes (likelihood, value, reward) is the step model's
guidance; a step model over tokens makes it a beam over tokens.
"""

import jax
import jax.numpy as jnp

from o1jax.search.contracts import StepModel, Strategy
from o1jax.search.frontier import (
  check_counts,
  frontier_search,
  open_nodes,
)
from o1jax.search.tree import NO_NODE, Tree, best_nodes, read, scores


def beam(
  step_model: StepModel,
  *,
  width: int,
  max_depth: int,
  num_subtrees: int = 1,
  num_root_blocks: int = 1,
  max_tokens: int | None = None,
) -> Strategy:
  """Expands the best K nodes of each layer, best first, ties by lower index.

  Args:
    step_model: the model; see contracts.py.
    width: K.
    max_depth: layers of the tree at most.
    num_subtrees: D, beams of K / D each. The valid candidates of the root are
      dealt to them in turn, and no beam takes another's place.
    num_root_blocks: expansions of the root, all in the first round: this many
      times A candidates form the first layer. K of them make all layers alike.
    max_tokens: the budget of a problem in generated tokens, never exceeded.
      A round pays in advance, each candidate at its longest, and the beams'
      last places wait for what it leaves; a node that got fewer than A
      candidates keeps those, and so does a root that got fewer blocks. None:
      no limit.

  Raises:
    ValueError: a number out of range, or numbers that do not go together.
  """
  check_counts(
    width=width,
    max_depth=max_depth,
    num_subtrees=num_subtrees,
    num_root_blocks=num_root_blocks,
  )
  if width % num_subtrees:
    raise ValueError(
      f"width={width} does not divide into num_subtrees={num_subtrees} beams"
    )
  if num_root_blocks > width:
    raise ValueError(
      f"num_root_blocks={num_root_blocks} is more than the width={width} nodes"
      " that a round expands; lower it or raise width"
    )
  num_roots = num_root_blocks * step_model.num_candidates
  if num_subtrees > num_roots:
    raise ValueError(
      f"num_subtrees={num_subtrees} is more than the root's {num_roots}"
      " candidates; lower it or raise num_root_blocks"
    )
  return frontier_search(
    "beam" if num_subtrees == 1 else "dvts",
    step_model,
    lambda tree: best_of_layer(tree, width, num_subtrees, max_depth),
    num_expansions=num_root_blocks + width * (max_depth - 1),
    num_leaves=width,
    num_root_blocks=num_root_blocks,
    max_tokens=max_tokens,
  )


def treebon(
  step_model: StepModel,
  *,
  num_roots: int,
  max_depth: int,
  max_tokens: int | None = None,
) -> Strategy:
  """Layers of `num_roots` nodes, of which each keeps the best share of 1 / A.

  The first layer is drawn from the root and every kept node has A children:
  TreeBoN, arXiv 2410.16033, Algorithm 1. A beam of num_roots / A. The paper
  keeps equal first steps; a step model that merges duplicates leaves one of
  each, so that no two of the beam's places go to the same step.

  Raises:
    ValueError: a number out of range, or numbers that do not go together.
  """
  width, rest = divmod(num_roots, step_model.num_candidates)
  if rest or width < 1:
    raise ValueError(
      f"num_roots={num_roots} is no multiple of the"
      f" {step_model.num_candidates} candidates of an expansion"
    )
  strategy = beam(
    step_model,
    width=width,
    max_depth=max_depth,
    num_root_blocks=width,
    max_tokens=max_tokens,
  )
  return strategy._replace(name="treebon")


def best_of_layer(
  tree: Tree, width: int, num_subtrees: int, max_depth: int
) -> jax.Array:
  """The nodes `[B, K]` that are expanded next, NO_NODE behind them.

  They are the open ones among the K best of the layer above the deepest, which
  a budget left over, and only where there are none those of the deepest layer.

  The best of each subtree come first, then the second best, and so on, so that
  a budget that ends within a layer ends for all subtrees alike.
  """
  # Candidates that are not valid have a depth too: they end the layer above.
  deepest = jnp.max(tree.depth, axis=-1, keepdims=True)
  # Those that are expanded keep their places.
  goes_on = tree.is_valid & ~tree.is_terminal & (tree.depth < max_depth)
  is_open = open_nodes(tree)
  if num_subtrees == 1:
    subtree = jnp.zeros_like(tree.depth)
  else:
    subtree = deal(tree, num_subtrees)

  def open_places(layer):
    is_here = goes_on & (tree.depth == layer)

    def best_of_subtree(index):
      is_own = is_here & (subtree == index)
      return best_nodes([scores(tree)], is_own, width // num_subtrees)

    found = jax.vmap(best_of_subtree)(jnp.arange(num_subtrees))
    found = jnp.moveaxis(found, 0, -1).reshape(-1, width)
    found = jnp.where(read(is_open, found), found, NO_NODE)
    order = jnp.argsort(found == NO_NODE, axis=-1, stable=True)
    return jnp.take_along_axis(found, order, axis=-1)

  rest, places = jax.vmap(open_places)(jnp.stack([deepest - 1, deepest]))
  return jnp.where(rest[:, :1] == NO_NODE, places, rest)


def deal(tree: Tree, num_subtrees: int) -> jax.Array:
  """The subtree `[B, N]` of each node: the number of its first step, modulo D.

  First steps are numbered from 0 in their order, invalid ones left out.
  """
  is_first = tree.is_valid & (tree.depth == 1)
  number = jnp.cumsum(is_first, axis=-1, dtype=jnp.int32) - 1

  def is_below(jump):
    return jnp.any(read(tree.depth, jump) > 1)

  index = jnp.arange(tree.depth.shape[1], dtype=jnp.int32)[None]
  first_step = jax.lax.while_loop(
    is_below,
    lambda jump: read(jump, jump),
    jnp.where(tree.depth > 1, tree.parent, index),
  )
  return read(number, first_step) % num_subtrees
