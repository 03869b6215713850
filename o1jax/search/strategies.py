"""Strategies by name, as configs spell them."""

import inspect
from typing import Any

from o1jax.search.beam import beam, treebon
from o1jax.search.best_first import a_star, best_first, depth_first
from o1jax.search.best_of_n import best_of_n, greedy
from o1jax.search.contracts import StepModel, Strategy
from o1jax.search.mcts import mcts
from o1jax.search.mctsr import mctsr
from o1jax.search.reroot import reroot
from o1jax.search.revision import revision
from o1jax.search.selection import check_options, named
from o1jax.search.speculative_rejection import speculative_rejection
from o1jax.search.stopping import stop_early

STRATEGIES = {
  "mcts": mcts,
  "best_of_n": best_of_n,
  "greedy": greedy,
  "beam": beam,
  "breadth_first": beam,
  "treebon": treebon,
  "best_first": best_first,
  "a_star": a_star,
  "depth_first": depth_first,
  "speculative_rejection": speculative_rejection,
  "revision": revision,
  "mctsr": mctsr,
  "reroot": reroot,
}


# Options that every strategy takes beside its own: those of `stop_early`.
STOP_OPTIONS = ("stop_threshold", "stop_patience")


def option_names(name: str) -> list[str]:
  """The keyword options that a strategy takes."""
  parameters = inspect.signature(named("strategy", name, STRATEGIES)).parameters
  return [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY]


def make_strategy(name: str, step_model: StepModel, **options: Any) -> Strategy:
  """The strategy of that name with its keyword options.

  Any takes `stop_threshold` and `stop_patience` too; see stopping.py.

  Raises:
    ValueError: unknown name or option, an option that is missing or out of
      range; the message says what to change.
  """
  make = named("strategy", name, STRATEGIES)
  rules = {n: options.pop(n) for n in STOP_OPTIONS if n in options}
  check_options("a stop rule", stop_early, rules)
  check_options(f"strategy {name!r}", make, options)
  for option, parameter in inspect.signature(make).parameters.items():
    if (
      parameter.kind is parameter.KEYWORD_ONLY
      and parameter.default is parameter.empty
      and option not in options
    ):
      raise ValueError(f"strategy {name!r} needs the option {option!r}")
  strategy = make(step_model, **options)
  if all(rule is None for rule in rules.values()):
    return strategy
  return stop_early(strategy, **rules)
