"""Stop rules against the same searches without them, cut off by hand."""

import jax
import numpy as np
import pytest

from o1jax.search.strategies import make_strategy
from o1jax.search.tree import NO_NODE
from worlds import (
  TOKENS_PER_STEP,
  chain_search,
  problems,
  random_graph,
  table_model,
  table_search,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

BATCH = 8
ROOTS = np.array([3, 0, 11, 7, 20, 15, 31, 4])
RULE = dict(stop_threshold=0.8, stop_patience=10 * TOKENS_PER_STEP)
TREE = dict(num_simulations=40, capacity=1 + 4 * 16)
# Searches with and without a rule: how they are made, with what options.
CASES = {
  "mcts": (table_search, TREE),
  "ahead": (
    table_search,
    dict(num_simulations=40, capacity=1 + 4 * 40, num_parallel_leaves=4),
  ),
  "reroot": (table_search, dict(num_simulations=8, capacity=1 + 4 * 16)),
  "best_of_n": (chain_search, dict(num_rounds=30)),
  "beam": (table_search, dict(width=3, max_depth=5)),
  "treebon": (table_search, dict(num_roots=4, max_depth=5)),
  "best_first": (table_search, dict(num_expansions=12)),
  "a_star": (table_search, dict(num_expansions=12, stop_at_solution=False)),
  "depth_first": (table_search, dict(num_expansions=12)),
  "speculative_rejection": (
    chain_search,
    dict(num_rows=12, capacity=60, rejection_rate=0.25),
  ),
  "revision": (
    chain_search,
    dict(num_revisions=5, num_chains=3, are_answers=True),
  ),
  "mctsr": (chain_search, dict(num_simulations=20, are_answers=True)),
}
NAMES = {"ahead": "mcts"}
# Made of the same parts as others here.
SLOW = ("ahead", "treebon", "a_star", "depth_first")
FIELDS = ("parent", "depth", "value", "reward", "is_solution", "is_valid")


def world():
  return random_graph(11, terminal_rate=0.2)


def search(case, **rule):
  make, options = CASES[case]
  return make(name=NAMES.get(case, case), **options, **rule)


def rounds_of(case, tree, row):
  """Where each round of a search ends, as numbers of nodes."""
  num_nodes = int(tree.next_free[row])
  if case in ("beam", "treebon", "speculative_rejection", "revision"):
    depth = tree.depth[row, :num_nodes]
    assert np.all(np.diff(depth) >= 0)  # Layer by layer.
    return [int(np.sum(depth <= d)) for d in range(1, depth[-1] + 1)]
  return list(range(1, num_nodes + 1, tree.num_candidates))[1:]


def cut_by_hand(tree, row, rounds, *, stop_threshold=None, stop_patience=None):
  """Nodes after the first round at whose end a rule holds, and the answer."""
  best, answer, found_at = -np.inf, NO_NODE, 0
  start = 1
  for end in rounds:
    # In these worlds only what is valid costs tokens.
    tokens = TOKENS_PER_STEP * (int(np.sum(tree.is_valid[row, :end])) - 1)
    for node in range(start, end):
      score = float(tree.value[row, node] + tree.reward[row, node])
      if tree.is_solution[row, node] and score > best:
        best, answer, found_at = score, node, tokens
    start = end
    if answer == NO_NODE:
      continue
    if stop_threshold is not None and best >= np.float32(stop_threshold):
      break
    if stop_patience is not None and tokens - found_at >= stop_patience:
      break
  return end, answer


@pytest.mark.parametrize(
  "case",
  [
    pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else [])
    for c in CASES
  ],
)
def test_a_rule_cuts_the_search_at_the_end_of_a_round(case):
  """What is left is what the search without it had then, and its best."""
  params, key, batch = world().params, jax.random.key(2), problems(ROOTS)
  whole = search(case)[1](params, key, batch)
  strategy, run = search(case, **RULE)
  state = run(params, key, batch)
  assert np.all(strategy.is_done(state))
  chosen = np.asarray(strategy.select(state))
  tree, full = (jax.tree.map(np.asarray, s.tree) for s in (state, whole))
  num_cut = 0
  for row in range(BATCH):
    end, answer = cut_by_hand(full, row, rounds_of(case, full, row), **RULE)
    left = int(tree.next_free[row])
    if case == "ahead":
      # Its rounds expand up to four nodes.
      assert end <= left <= end + 3 * 4
    else:
      assert left == end
    for field in FIELDS:
      cut, uncut = getattr(tree, field)[row], getattr(full, field)[row]
      np.testing.assert_array_equal(cut[:left], uncut[:left], err_msg=field)
    spent = TOKENS_PER_STEP * (int(np.sum(tree.is_valid[row])) - 1)
    assert int(state.cost.generated_tokens[row]) == spent
    assert spent <= int(whole.cost.generated_tokens[row])
    num_cut += left < int(full.next_free[row])
    if case not in ("a_star", "ahead"):
      assert (chosen[row] == NO_NODE) == (answer == NO_NODE)
      score = tree.value[row] + tree.reward[row]
      assert score[chosen[row]] == score[answer]  # Equal ones may be several.
  assert 0 < num_cut


@pytest.mark.parametrize("case", ["mcts", "speculative_rejection"])
def test_a_problem_that_stopped_waits_unchanged_for_the_others(case):
  params, key = world().params, jax.random.key(2)
  _, run = search(case, **RULE)
  together = run(params, key, problems(ROOTS)).tree
  for row in range(BATCH):
    alone = run(params, key, problems(np.full(BATCH, ROOTS[row]))).tree
    for one, other in zip(
      jax.tree.leaves(together), jax.tree.leaves(alone), strict=True
    ):
      np.testing.assert_array_equal(one[row], other[3])


def test_either_rule_stands_alone():
  """Neither holds before a solution is found."""
  params, key, batch = world().params, jax.random.key(2), problems(ROOTS)
  whole = search("best_first")[1](params, key, batch)
  full = jax.tree.map(np.asarray, whole.tree)
  for rule in ({"stop_threshold": 0.5}, {"stop_patience": 1}):
    state = search("best_first", **rule)[1](params, key, batch)
    for row in range(BATCH):
      rounds = rounds_of("best_first", full, row)
      end, _ = cut_by_hand(full, row, rounds, **rule)
      assert int(state.tree.next_free[row]) == end
  never = search("best_first", stop_threshold=2.0)[1](params, key, batch)
  np.testing.assert_array_equal(never.tree.next_free, full.next_free)


@pytest.mark.parametrize(
  "name, options, message",
  [
    ("best_first", {"stop_patience": 0}, "stop_patience=0: give at least 1"),
    ("best_first", {"stop_patience": 1.5}, "'stop_patience' .* takes int"),
    ("best_of_n", {"stop_patience": 9}, "best_of_n expands once"),
    ("greedy", {"stop_threshold": 0.5}, "greedy expands once and has nothing"),
  ],
)
def test_rules_that_mean_nothing_are_refused(name, options, message):
  more = {"num_expansions": 4} if name == "best_first" else {}
  with pytest.raises(ValueError, match=message):
    make_strategy(name, table_model(1), **more, **options)
  # A config may name a rule without setting it.
  make_strategy(name, table_model(1), **more, **dict.fromkeys(options))
