"""Searches back on the host: trees as arrays, finished solutions as texts.

What learning and reports read of a tree is here too: the weights of its steps
and its record in a file.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from o1jax import jsonl
from o1jax.search import contracts
from o1jax.search.tree import ROOT
from o1jax.types import Problem

TREE_FIELDS = (
  "parent",
  "depth",
  "first_child",
  "num_visits",
  "mean_value",
  "value",
  "reward",
  "prior_logits",
  "is_terminal",
  "is_solution",
  "is_valid",
)
STORE_FIELDS = (
  "tokens",
  "lengths",
  "is_finished",
  "behavior_log_probs",
  "policy_log_probs",
)


def host_fields(state: contracts.SearchState) -> dict[str, jax.Array]:
  """What the host reads of a search; keys and values stay on the device."""
  num_nodes = state.tree.parent.shape[1]
  fields = {name: getattr(state.tree, name) for name in TREE_FIELDS}
  for name in STORE_FIELDS:
    fields[name] = getattr(state.node_state, name)[:, :num_nodes]
  return fields


@dataclasses.dataclass(frozen=True)
class FoundSolution:
  """One finished solution of a search.

  In a tree of revisions tokens and log-probs are those of all answers on the
  path, and `text` is the last one's.

  Attributes:
    node: index of its last step in the tree.
    text: without the end mark; of revisions the last answer alone.
    path: indices of its steps, first step first.
    tokens: `[T]`, end mark included where there is one.
    behavior_log_probs: `[T]` under the distribution drawn from.
    policy_log_probs: `[T]` under the policy itself.
    is_finished: True where it ends with the end mark.
    outcome: the search's own estimate: checked reward, or value.
    num_visits: visits of the last node.
  """

  node: int
  text: str
  path: tuple[int, ...]
  tokens: np.ndarray
  behavior_log_probs: np.ndarray
  policy_log_probs: np.ndarray
  is_finished: bool
  outcome: float
  num_visits: int


@dataclasses.dataclass(frozen=True)
class Searched:
  """What a search did for one problem.

  Attributes:
    problem: the problem.
    solutions: every finished solution of the tree, by node.
    selected: index in `solutions` of the one answered with; None if there is
      none.
    nodes: arrays `[N]` of the tree and `[N, S]` of its steps by name, and
      `texts`, the steps as text.
    cost: generated_tokens, forward_tokens, simulations, verifier_requests,
      verifier_distinct.
  """

  problem: Problem
  solutions: Sequence[FoundSolution]
  selected: int | None
  nodes: Mapping[str, Any]
  cost: Mapping[str, int]


def read_solutions(
  nodes: dict[str, Any],
  decode_fn: Callable[[list[int]], str],
  answer_fn: Callable[[str], str],
) -> list[FoundSolution]:
  """Every finished solution of one tree, by node.

  Args:
    nodes: what `host_fields` names, of one tree; the steps as `texts` are
      added to it.
    decode_fn: from tokens to text.
    answer_fn: from the text of a path to the solution that it ends with.
  """
  lengths = nodes["lengths"]
  spans = [nodes["tokens"][n, : lengths[n]] for n in range(len(lengths))]
  nodes["texts"] = [decode_fn(span.tolist()) for span in spans]
  is_end = nodes["is_terminal"] | nodes["is_solution"]
  solutions = []
  for node in np.flatnonzero(is_end & nodes["is_valid"]).tolist():
    path = path_of(nodes["parent"], node)
    logs = {
      name: np.concatenate([nodes[name][n, : lengths[n]] for n in path])
      for name in ("behavior_log_probs", "policy_log_probs")
    }
    solutions.append(
      FoundSolution(
        node=node,
        text=answer_fn("".join(nodes["texts"][n] for n in path)),
        path=path,
        tokens=np.concatenate([spans[n] for n in path]),
        is_finished=bool(nodes["is_finished"][node]),
        outcome=float(nodes["reward"][node] + nodes["value"][node]),
        num_visits=int(nodes["num_visits"][node]),
        **logs,
      )
    )
  return solutions


def path_of(parent: np.ndarray, node: int) -> tuple[int, ...]:
  """Indices of the steps from below the root to `node`, first step first."""
  path = []
  while node != ROOT:
    path.append(node)
    node = int(parent[node])
  return tuple(reversed(path))


def step_weights(searched: Searched) -> dict[int, np.ndarray]:
  """Weights of the AlphaGo Zero loss for each finished solution, by node.

  The weight of a step is its share of its siblings' visits. A step that several
  finished solutions share is carried by the first of them, so that each edge of
  the tree counts once. Steps that were visited but lead to no finished solution
  are in no row; their share is left out.
  """
  nodes = searched.nodes
  visits, parent = nodes["num_visits"], nodes["parent"]
  totals: dict[int, int] = {}
  for child in np.flatnonzero(nodes["is_valid"] & (nodes["depth"] > 0)):
    above = int(parent[child])
    totals[above] = totals.get(above, 0) + int(visits[child])
  carried: set[int] = set()
  weights = {}
  for solution in searched.solutions:
    if not solution.is_finished:
      continue  # It was cut off and is not learned from.
    spans = []
    for node in solution.path:
      share = 0.0
      if node not in carried:
        share = int(visits[node]) / max(totals[int(parent[node])], 1)
        carried.add(node)
      spans.append(np.full(nodes["lengths"][node], share, np.float32))
    weights[solution.node] = np.concatenate(spans)
  return weights


def tree_record(
  searched: Searched, is_correct: Mapping[int, bool], iteration: int
) -> dict[str, Any]:
  """A tree as `jsonl.write_trees` takes it, without unused and merged nodes.

  Args:
    searched: the search.
    is_correct: the checker's judgement by node, where there is one.
    iteration: written along.
  """
  nodes = searched.nodes
  kept = np.flatnonzero(nodes["is_valid"]).tolist()
  new_index = {old: new for new, old in enumerate(kept)}
  rows = []
  for old in kept:
    rows.append(
      {
        "parent": new_index[int(nodes["parent"][old])] if old != ROOT else -1,
        "text": nodes["texts"][old].rstrip("\n"),
        "num_visits": int(nodes["num_visits"][old]),
        "value": float(nodes["mean_value"][old] + nodes["reward"][old]),
        "prior": float(np.exp(nodes["prior_logits"][old])) if old else 1.0,
        "reward": float(nodes["reward"][old]),
        "is_terminal": bool(nodes["is_terminal"][old]),
        "is_correct": is_correct[old] if old in is_correct else None,
      }
    )
  return {
    "problem": jsonl.problem_row(searched.problem),
    "iteration": iteration,
    "nodes": rows,
  }
