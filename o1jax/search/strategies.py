"""Strategies by name, as configs spell them."""

from typing import Any

from o1jax.search.best_of_n import best_of_n, greedy
from o1jax.search.contracts import StepModel, Strategy
from o1jax.search.mcts import mcts
from o1jax.search.mctsr import mctsr
from o1jax.search.revision import revision
from o1jax.search.selection import check_options, named
from o1jax.search.speculative_rejection import speculative_rejection

STRATEGIES = {
  "mcts": mcts,
  "best_of_n": best_of_n,
  "greedy": greedy,
  "speculative_rejection": speculative_rejection,
  "revision": revision,
  "mctsr": mctsr,
}


def make_strategy(name: str, step_model: StepModel, **options: Any) -> Strategy:
  """The strategy of that name with its keyword options.

  Raises:
    ValueError: unknown name or option, or an option out of range; the message
      says what to change.
  """
  make = named("strategy", name, STRATEGIES)
  check_options(f"strategy {name!r}", make, options)
  return make(step_model, **options)
