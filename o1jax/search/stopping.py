"""Stop rules: a search ends before its budget does, against overthinking.

A rule is a budget that may end early. Once it holds, a problem can afford no
further candidate, so that every strategy that keeps to a budget keeps to the
rule, and other problems of the batch go on. What was searched until then is
the same as without the rule.

Patience counts generated tokens: they are what a budget is made of and mean the
same for all strategies, where a simulation may cost nothing and a round expands
one node or many.
"""

import jax
import jax.numpy as jnp

from o1jax.search.contracts import SearchState, StopRule, Strategy
from o1jax.search.tree import scores


def stop_early(
  strategy: Strategy,
  *,
  stop_threshold: float | None = None,
  stop_patience: int | None = None,
) -> Strategy:
  """The strategy, ended for a problem as soon as one of the rules holds.

  The rules are looked at after every round. Before there is a finished solution
  none of them holds.

  Args:
    strategy: any that expands more than once.
    stop_threshold: ends with a finished solution of this score or above; None:
      no such rule. Where the checker is the reward, 1.0 is oracle stopping: it
      ends with the first right solution, as no search can that does without.
    stop_patience: ends when this many generated tokens brought no finished
      solution of a higher score than those before; None: no such rule.

  Raises:
    ValueError: a patience below 1, or nothing to stop.
  """
  if stop_patience is not None and stop_patience < 1:
    raise ValueError(f"stop_patience={stop_patience}: give at least 1 token")
  if strategy.capacity <= 1 + strategy.num_candidates:
    raise ValueError(
      f"stop_threshold={stop_threshold} and stop_patience={stop_patience}: "
      f"{strategy.name} expands once and has nothing to stop; leave them out, "
      "or give best_of_n more num_rounds"
    )

  def init(params, key, problems) -> SearchState:
    state = strategy.init(params, key, problems)
    root_value = state.tree.value[:, 0]
    rule = StopRule(
      best_score=jnp.full_like(root_value, -jnp.inf),
      best_tokens=jnp.zeros_like(state.cost.generated_tokens),
      threshold=stop_threshold,
      patience=stop_patience,
    )
    return state.replace(stop=rule)

  return strategy._replace(init=init)


def observe(state: SearchState) -> SearchState:
  """Takes note of the best finished solution, after nodes were added."""
  if state.stop is None:
    return state
  tree = state.tree
  is_finished = tree.is_solution & tree.is_valid
  score = jnp.where(is_finished, scores(tree), -jnp.inf)
  best = jnp.max(score, axis=-1)
  is_better = best > state.stop.best_score
  tokens = jnp.where(
    is_better, state.cost.generated_tokens, state.stop.best_tokens
  )
  return state.replace(
    stop=state.stop.replace(best_score=best, best_tokens=tokens)
  )


def is_stopped(state: SearchState) -> jax.Array:
  """True `[B]` where a rule holds; False where there is none."""
  rule, spent = state.stop, state.cost.generated_tokens
  stopped = jnp.zeros(spent.shape, bool)
  if rule is None:
    return stopped
  if rule.threshold is not None:
    stopped |= rule.best_score >= rule.threshold
  if rule.patience is not None:
    is_stale = spent - rule.best_tokens >= rule.patience
    stopped |= is_stale & (rule.best_score > -jnp.inf)
  return stopped
