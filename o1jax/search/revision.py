"""Answers revised one after another, in one chain or in several.

The nodes are whole answers: the children of the root are first answers, and the
child of an answer is its revision. One chain is Self-Refine (Madaan et al.,
arXiv 2303.17651); chains without revisions are best-of-N; between the two lie
the combinations of parallel and sequential sampling under one budget (Snell et
al., arXiv 2408.03314, section 6). What is answered is the best of all answers,
so that a revision never replaces a better one. Who criticises an answer before
its revision, the policy or the checker, is the step model's: see `Solver`.
"""

import jax
import jax.numpy as jnp

from o1jax.search.chains import chains
from o1jax.search.contracts import StepModel, Strategy
from o1jax.search.tree import NO_NODE, Tree, read, scores


def revision(
  step_model: StepModel,
  *,
  num_revisions: int,
  num_chains: int = 1,
  num_starts: int | None = None,
  threshold: float | None = None,
  patience: int | None = None,
  max_tokens: int | None = None,
) -> Strategy:
  """Chains of revisions; the answer of highest outcome.

  Args:
    step_model: one candidate; its nodes are answers that may be revised.
    num_revisions: R, most revisions of a first answer.
    num_chains: W, chains that grow side by side.
    num_starts: first answers in all; those beyond `num_chains` begin where a
      chain has ended. None for `num_chains`.
    threshold: a chain ends with an answer of this score or above; None: no
      such rule.
    patience: a chain ends when this many revisions in a row were no better
      than the best answer before them; None: no such rule.
    max_tokens: the budget of a problem in generated tokens, never exceeded.

  Raises:
    ValueError: a number out of range, or a step model that branches.
  """
  if num_revisions < 0:
    raise ValueError(f"num_revisions={num_revisions}: give at least 0")
  if patience is not None and patience < 1:
    raise ValueError(f"patience={patience}: give at least 1, or None")

  def stops(tree: Tree, tips: jax.Array) -> jax.Array:
    is_over = read(tree.depth, tips) > num_revisions
    if threshold is not None:
      is_over |= read(scores(tree), tips) >= threshold
    if patience is not None:
      is_over |= is_stuck(tree, tips, patience, num_revisions + 1)
    return is_over & (tips != NO_NODE)

  return chains(
    "revision",
    step_model,
    num_chains=num_chains,
    num_starts=num_starts,
    capacity=1 + (num_starts or num_chains) * (1 + num_revisions),
    max_tokens=max_tokens,
    stops=stops,
  )


def is_stuck(
  tree: Tree, tips: jax.Array, patience: int, max_answers: int
) -> jax.Array:
  """True `[B, W]` where a chain's last answers beat none of those before.

  Args:
    tree: the trees.
    tips: `[B, W]` last answers of chains.
    patience: how many the last answers are; a chain must have more.
    max_answers: in a chain.
  """
  score = scores(tree)

  def one_up(i, carry):
    node, recent, earlier = carry
    here = jnp.where(read(tree.depth, node) > 0, read(score, node), -jnp.inf)
    recent = jnp.where(i < patience, jnp.maximum(recent, here), recent)
    earlier = jnp.where(i < patience, earlier, jnp.maximum(earlier, here))
    return read(tree.parent, node), recent, earlier

  lowest = jnp.full(tips.shape, -jnp.inf, score.dtype)
  _, recent, earlier = jax.lax.fori_loop(
    0, max_answers, one_up, (tips, lowest, lowest)
  )
  return recent <= earlier
