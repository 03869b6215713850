"""Best-of-N that gives up early on what looks bad.

Solutions are sampled step by step, side by side. After each round those not
finished are scored and the lowest share is dropped, so that their budget goes
to the others and to new starts. Sun et al., arXiv 2410.20290: there the batch
starts large, is cut whenever memory runs out and is not refilled, which is
`num_starts=None` here, with cuts after every step.
"""

import jax
import jax.numpy as jnp
import numpy as np

from o1jax.search.chains import chains
from o1jax.search.contracts import StepModel, Strategy
from o1jax.search.tree import NO_NODE, Tree, read, scores


def speculative_rejection(
  step_model: StepModel,
  *,
  num_rows: int,
  capacity: int,
  rejection_rate: float = 0.5,
  num_starts: int | None = None,
  max_tokens: int | None = None,
) -> Strategy:
  """The finished solution of highest outcome among those that were let finish.

  With rejection_rate 0 it is best-of-N, sampled step by step.

  Args:
    step_model: a step model of steps with one candidate.
    num_rows: W, solutions that grow side by side.
    capacity: N; a solution takes a node for each of its steps.
    rejection_rate: share of the unfinished solutions dropped after a round,
      those of lowest score, of equal ones the shortest; rounded down, so that
      the last is kept. In [0, 1).
    num_starts: solutions begun in all, `num_rows` of them at once and the
      others in the places of those dropped or finished; None for `num_rows`.
    max_tokens: the budget of a problem in generated tokens, never exceeded.

  Raises:
    ValueError: a number out of range, or a step model that branches.
  """
  if not 0 <= rejection_rate < 1:
    raise ValueError(f"rejection_rate={rejection_rate}: give a share in [0, 1)")
  # Rounded here: a product in float32 may fall below a whole number.
  num_rejected = np.array(
    [int(rejection_rate * rows + 1e-9) for rows in range(num_rows + 1)]
  )

  def stops(tree: Tree, tips: jax.Array) -> jax.Array:
    is_live = tips != NO_NODE
    num_live = jnp.sum(is_live, axis=-1, keepdims=True)
    score = jnp.where(is_live, read(scores(tree), tips), jnp.inf)
    shortest_first = jnp.flip(score, axis=-1)
    order = jnp.argsort(shortest_first, axis=-1, stable=True)
    rank = jnp.flip(jnp.argsort(order, axis=-1), axis=-1)
    return rank < jnp.asarray(num_rejected)[num_live]

  return chains(
    "speculative_rejection",
    step_model,
    num_chains=num_rows,
    num_starts=num_starts,
    capacity=capacity,
    max_tokens=max_tokens,
    stops=stops,
  )
