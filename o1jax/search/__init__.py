"""Search: compiled, batched tree search over candidate steps.

The search does not know the policy. It sees a `StepModel` (contracts.py), keeps
a struct of arrays (tree.py) and chooses candidates by a rule (selection.py). A
`Strategy` (mcts.py, best_of_n.py) is run by a driver (driver.py), in one
compiled loop or from the host with a checker between the halves of a round.
"""

from o1jax.search.contracts import (
  Expansion,
  SearchState,
  StepModel,
  Strategy,
)
from o1jax.search.driver import Told, run_on_device, run_with_host
from o1jax.search.strategies import make_strategy
from o1jax.search.tree import (
  NO_NODE,
  NO_PARENT,
  ROOT,
  UNEXPANDED,
  Tree,
  read,
  visit_probs,
  write,
)
from o1jax.search.voting import vote

__all__ = [
  "Expansion",
  "NO_NODE",
  "NO_PARENT",
  "ROOT",
  "SearchState",
  "Told",
  "StepModel",
  "Strategy",
  "Tree",
  "UNEXPANDED",
  "make_strategy",
  "read",
  "run_on_device",
  "run_with_host",
  "visit_probs",
  "vote",
  "write",
]
