"""Best-first, A* and depth-first search against lists in plain Python."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from o1jax.search.best_first import a_star, best_first, depth_first
from o1jax.search.tree import NO_NODE, ROOT, read
from oracles import (
  best_first_in_lists,
  nodes_in_order,
  recursive_depth_first,
)
from worlds import (
  NUM_ROOTS,
  TOKENS_PER_STEP,
  World,
  detour,
  drawn_tree,
  problems,
  random_graph,
  table_model,
  table_search,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

COST_WEIGHT = 0.1


@pytest.fixture(autouse=True)
def float64():
  """Two roundings of one sum may flip a tie in float32."""
  with jax.enable_x64(True):
    yield


def run(world, roots, **options):
  strategy, search = table_search(**options)
  state = search(world.params, jax.random.key(0), problems(roots))
  return strategy, state


def ragged_world(seed: int) -> World:
  """Ties among all scores, dead ends, and solutions at every depth."""
  world = random_graph(seed, terminal_rate=0.3, invalid_rate=0.4)
  world.value[:] = np.round(world.value, 1)
  world.outcome[:] = np.round(world.outcome, 1)
  return world


@pytest.mark.parametrize(
  "num_leaves, stop_at_solution", [(1, True), (3, False)]
)
def test_best_first_is_a_sorted_list(num_leaves, stop_at_solution):
  options = dict(
    num_expansions=14,
    num_leaves=num_leaves,
    stop_at_solution=stop_at_solution,
  )
  num_stopped = 0
  for seed in range(4):
    world = ragged_world(seed)
    strategy, state = run(world, range(NUM_ROOTS), name="best_first", **options)
    assert np.all(strategy.is_done(state))
    for row in range(NUM_ROOTS):
      oracle = best_first_in_lists(
        world, row, priority=lambda w, path: w.score[path], **options
      )
      assert nodes_in_order(state.tree, row) == oracle.made
      num_stopped += bool(oracle.finished) and len(oracle.expanded) < 14
  assert (num_stopped > 16) == stop_at_solution


@pytest.mark.parametrize("min_score", [-np.inf, 0.4])
def test_depth_first_is_the_recursion(min_score):
  for seed in range(4):
    world = ragged_world(seed)
    _, state = run(
      world,
      range(NUM_ROOTS),
      name="depth_first",
      num_expansions=14,
      min_score=min_score,
    )
    for row in range(NUM_ROOTS):
      oracle = recursive_depth_first(
        world, row, num_expansions=14, min_score=min_score
      )
      assert nodes_in_order(state.tree, row) == oracle.made


def layered_world(seed: int) -> World:
  """Five layers of eight states; the last leads to solutions only."""
  world = random_graph(seed, terminal_rate=0.2)
  rng = np.random.default_rng(seed)
  layer = np.arange(40)[:, None] // 8
  child = 8 * np.minimum(layer + 1, 4) + rng.integers(8, size=(40, 4))
  return dataclasses.replace(
    world,
    child=child.astype(np.int32),
    is_terminal=world.is_terminal | (layer == 4),
  )


def best_return(world: World, cost: str) -> np.ndarray:
  """The best outcome less the cost of the steps to it, of each state `[M]`."""
  norm = np.log(np.sum(np.exp(world.prior_logits), axis=-1, keepdims=True))
  step = norm - world.prior_logits if cost == "prior" else np.ones((40, 4))
  best = np.zeros(40)
  for state in reversed(range(40)):
    below = np.where(
      world.is_terminal[state], world.outcome[state], best[world.child[state]]
    )
    best[state] = np.max(below - COST_WEIGHT * step[state])
  return best


@pytest.mark.parametrize("cost", ["prior", "steps"])
def test_a_star_is_optimal_where_the_heuristic_is_admissible(cost):
  options = dict(cost=cost, cost_weight=COST_WEIGHT, num_expansions=120)
  num_wrong = 0
  for seed in range(3):
    world = layered_world(seed)
    best = best_return(world, cost)
    noise = np.random.default_rng(seed).uniform(size=world.value.shape)
    for is_admissible in (True, False):
      slack = 0.05 * noise if is_admissible else -0.6 * noise
      guided = dataclasses.replace(world, value=best[world.child] + slack)
      strategy, state = run(guided, range(NUM_ROOTS), name="a_star", **options)
      # It stopped because it was sure.
      assert np.all(state.tree.next_free < 1 + 4 * 120)
      chosen = np.asarray(strategy.select(state))
      for row in range(NUM_ROOTS):
        oracle = best_first_in_lists(
          guided,
          row,
          priority=functools.partial(less_cost, cost=cost),
          num_expansions=120,
          stop_at_solution=True,
        )
        assert nodes_in_order(state.tree, row) == oracle.made
        ranks = {p: less_cost(oracle, p, cost) for p in oracle.finished}
        found = float(state.tree.reward[row, chosen[row]])
        assert found == oracle.score[max(ranks, key=ranks.get)]
        is_best = np.isclose(max(ranks.values()), best[row])
        assert is_best or not is_admissible
        num_wrong += not is_best
  assert num_wrong > 3


def less_cost(walker, path, cost) -> float:
  """Score less cost, summed step by step."""
  paid = -walker.log_prior[path] if cost == "prior" else len(path)
  return walker.score[path] - COST_WEIGHT * paid


def test_depth_first_stops_at_a_solution_that_is_good_enough():
  """Leaves of .1 under c and d do not end it, .9 under e does."""
  _, state = run(
    detour(),
    [0] * NUM_ROOTS,
    num_candidates=2,
    name="depth_first",
    num_expansions=7,
    min_score=0.15,
    stop_at_solution=True,
  )
  assert int(state.tree.num_blocks[0].sum()) == 6


def test_a_budget_is_spent_and_never_exceeded():
  """Three leaves a round; the last expansion is cut to one candidate."""
  world = random_graph(5)
  strategy, state = run(
    world,
    range(NUM_ROOTS),
    name="best_first",
    num_expansions=20,
    num_leaves=3,
    max_tokens=13 * TOKENS_PER_STEP + 2,
  )
  assert np.all(strategy.is_done(state))
  np.testing.assert_array_equal(
    state.cost.generated_tokens, 13 * TOKENS_PER_STEP
  )
  np.testing.assert_array_equal(np.sum(state.tree.is_valid, axis=-1), 14)
  # The root, then three in a call.
  np.testing.assert_array_equal(state.node_state[1], 2)


def test_dead_ends_are_left_behind():
  strategy, state = run(
    drawn_tree(),
    [3, 2, 0, 1] * 2,
    num_candidates=2,
    name="best_first",
    num_expansions=6,
  )
  chosen = strategy.select(state)
  assert int(chosen[0]) == NO_NODE
  assert int(state.cost.simulations[0]) == 0
  np.testing.assert_array_equal(state.tree.next_free[:4], [3, 5, 9, 3])
  np.testing.assert_allclose(read(state.tree.reward, chosen)[1:4], [1, 1, 0.4])
  # The root's mean is that of its own value and of all valid candidates.
  mean = np.mean([0.5, 0.6, 0.5, 0.2, 0.4, 1.0, 0.1])
  np.testing.assert_allclose(state.tree.mean_value[2, ROOT], mean, rtol=1e-12)


@pytest.mark.parametrize(
  "make, options, message",
  [
    (best_first, {"num_expansions": 0}, "num_expansions=0: give at least 1"),
    (best_first, {"num_leaves": 0}, "num_leaves=0: give at least 1"),
    (best_first, {"max_tokens": 2}, "max_tokens=2 does not pay for one"),
    (depth_first, {"num_leaves": 0}, "num_leaves=0: give at least 1"),
    (a_star, {"cost": "step"}, "unknown cost 'step'; did you mean 'steps'?"),
    (a_star, {"cost_weight": -1.0}, "cost_weight=-1.0: give 0 or more"),
  ],
)
def test_bad_options_say_what_to_change(make, options, message):
  with pytest.raises(ValueError, match=message):
    make(table_model(4), **{"num_expansions": 3, **options})
