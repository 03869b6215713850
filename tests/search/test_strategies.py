"""Every strategy through one battery."""

import jax
import numpy as np
import pytest

from o1jax.search.best_first import prior_cost
from o1jax.search.driver import Told, run_on_device, run_with_host
from o1jax.search.strategies import make_strategy
from o1jax.search.tree import NO_NODE, ROOT, UNEXPANDED
from oracles import visits_by_path
from worlds import (
  AHEAD,
  SIMULATIONS,
  TOKENS_PER_STEP,
  dice_model,
  problems,
  random_graph,
  rule_search,
  table_model,
  table_search,
  with_noise,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

ROOTS = np.array([3, 0, 11, 7, 20, 15, 31, 4])
STRATEGIES = {
  "puct": lambda: rule_search("puct"),
  "uct": lambda: rule_search("uct"),
  "gumbel": lambda: rule_search("gumbel"),
  "ahead": lambda: rule_search("puct", **AHEAD),
  "best_of_n": lambda: table_search(name="best_of_n"),
  "beam": lambda: table_search(name="beam", width=3, max_depth=5),
  "dvts": lambda: table_search(
    name="beam", width=4, max_depth=5, num_subtrees=2
  ),
  "treebon": lambda: table_search(name="treebon", num_roots=4, max_depth=5),
  # As test_best_first.py has them, whose programs these are then.
  "best_first": lambda: table_search(
    name="best_first", num_expansions=14, num_leaves=3, stop_at_solution=False
  ),
  "a_star": lambda: table_search(name="a_star", num_expansions=12),
  "depth_first": lambda: table_search(name="depth_first", num_expansions=14),
}


@pytest.fixture(params=STRATEGIES)
def named_search(request):
  """Name, strategy and program, in float64 like test_mcts.py."""
  with jax.enable_x64(True):
    yield request.param, *STRATEGIES[request.param]()


# Of mcts.
RULES = ("puct", "uct", "gumbel", "ahead")


def world():
  return random_graph(4, terminal_rate=0.35, invalid_rate=0.2)


def params_of(name):
  """The world as that strategy takes it."""
  return with_noise(world(), 0) if name in RULES else world().params


def test_books_are_in_order(named_search):
  name, strategy, search = named_search
  state = search(params_of(name), jax.random.key(0), problems(ROOTS))
  tree = jax.tree.map(np.asarray, state.tree)
  selected = np.asarray(strategy.select(state))
  cost = np.zeros_like(tree.reward)
  if name == "a_star":
    cost = np.asarray(prior_cost(state.tree))
  assert np.all(strategy.is_done(state))
  for row in range(len(ROOTS)):
    num_nodes = int(tree.next_free[row])
    expanded = np.flatnonzero(tree.first_child[row] != UNEXPANDED)
    assert num_nodes == 1 + 4 * len(expanded)
    assert not np.any(tree.num_visits[row][~tree.is_valid[row]])
    assert not np.any(tree.is_terminal[row][expanded])
    for node in expanded:
      first = int(tree.first_child[row, node])
      children = np.arange(first, first + 4)
      np.testing.assert_array_equal(tree.parent[row, children], node)
      below = int(np.sum(tree.num_visits[row, children]))
      dead = not np.any(tree.is_valid[row, children])
      if not dead and tree.num_visits[row, node]:
        assert tree.num_visits[row, node] == 1 + below
    simulations = int(state.cost.simulations[row])
    assert tree.num_visits[row, ROOT] == 1 + simulations
    if name in RULES:
      assert simulations == SIMULATIONS
    else:
      assert simulations == int(np.sum(tree.is_valid[row])) - 1
    tokens = TOKENS_PER_STEP * (int(np.sum(tree.is_valid[row])) - 1)
    assert int(state.cost.generated_tokens[row]) == tokens
    assert int(state.cost.forward_tokens[row]) == tokens + 1
    chosen = selected[row]
    finished = tree.is_terminal[row] & tree.is_valid[row]
    if not np.any(finished):
      assert chosen == NO_NODE
    else:
      rank = tree.reward[row] - cost[row]
      assert rank[chosen] == np.max(rank[finished])


def test_a_batch_is_each_problem_alone(named_search):
  name, _, search = named_search
  params, key = params_of(name), jax.random.key(5)
  together = search(params, key, problems(ROOTS)).tree
  for row in range(len(ROOTS)):
    # Copies keep the shape, so that no other program is compiled.
    alone = search(params, key, problems(np.full(8, ROOTS[row]))).tree
    for whole, one in zip(
      jax.tree.leaves(together), jax.tree.leaves(alone), strict=True
    ):
      np.testing.assert_array_equal(whole[row], one[2])


def test_draws_derive_from_the_seed_and_the_path():
  batch = problems(np.zeros(8), seeds=[5, 6, 7, 8, 9, 10, 11, 5])
  trees = []
  for num_leaves in (1, 3):
    strategy = make_strategy(
      "mcts",
      dice_model(3, terminal_rate=0.05),
      num_simulations=24,
      capacity=1 + 3 * 60,
      num_parallel_leaves=num_leaves,
    )
    search = run_on_device(strategy)
    tree = search(None, jax.random.key(1), batch).tree
    again = search(None, jax.random.key(1), batch).tree
    other = search(None, jax.random.key(2), batch).tree
    np.testing.assert_array_equal(tree.value, again.value)
    np.testing.assert_array_equal(tree.value[0], tree.value[7])
    first = np.asarray(tree.prior_logits[:, 1:4])
    assert np.all(first[0] != first[1])
    assert np.all(first != np.asarray(other.prior_logits[:, 1:4]))
    trees.append(tree)
  # Looking ahead numbers the nodes otherwise and draws the same.
  assert np.any(trees[0].parent != trees[1].parent)
  for row in range(8):
    assert visits_by_path(trees[0], row) == visits_by_path(trees[1], row)


@pytest.mark.parametrize("name", ["ahead", "dvts"])
def test_the_host_steps_to_the_same_trees(name):
  with jax.enable_x64(True):
    strategy, search = STRATEGIES[name]()
    params, key = params_of(name), jax.random.key(0)
    batches = [problems(ROOTS), problems(ROOTS + 8)]
    expected = [search(params, key, batch) for batch in batches]

    def host_fn(state, batch):
      np.testing.assert_array_equal(
        state.node_state[0][:, ROOT], batches[batch].tokens[:, 0]
      )
      return Told(outcome=np.asarray(state.expansion.outcome))

    states = run_with_host(strategy, host_fn)(params, key, batches)
    for state, device in zip(states, expected, strict=True):
      assert state.expansion is None
      state = state.replace(tree_keys=None)
      device = device.replace(tree_keys=None)
      for left, right in zip(
        jax.tree.leaves(state), jax.tree.leaves(device), strict=True
      ):
        # Two programs may fuse, and so round, a mean differently.
        np.testing.assert_allclose(left, right, rtol=1e-14)


def test_values_that_the_host_says_are_those_of_another_world():
  with jax.enable_x64(True):
    strategy, search = STRATEGIES["best_first"]()
    params, key = world().params, jax.random.key(0)
    plain = search(params, key, problems(ROOTS)).tree

    def changed(value):
      return np.where(np.asarray(value) < 0.4, value, 1.0 - np.asarray(value))

    def host_fn(state, _):
      value = np.asarray(state.expansion.value)
      return Told(value=np.where(value < 0.4, np.nan, changed(value)))

    (state,) = run_with_host(strategy, host_fn)(params, key, [problems(ROOTS)])
    params = params | {"value": changed(params["value"])}
    other = search(params, key, problems(ROOTS)).tree
    for field in ("parent", "is_valid", "value", "reward"):
      found, expected = getattr(state.tree, field), getattr(other, field)
      np.testing.assert_allclose(found[:, 1:], expected[:, 1:], rtol=1e-14)
    assert np.any(plain.parent != other.parent)


def test_host_outcomes_count_where_they_are_numbers_in_one_trace():
  model = table_model(4)
  traces = []

  def step_fn(*args):
    traces.append(1)
    return model.step_fn(*args)

  def host_fn(state, _):
    outcome = np.full(state.expansion.outcome.shape, np.nan)
    outcome[..., 1] = 2.0
    return Told(outcome=outcome[:, 0])

  strategy = make_strategy("best_of_n", model._replace(step_fn=step_fn))
  search = run_with_host(strategy, host_fn)
  graph = random_graph(6, terminal_rate=0.7)
  for seed in range(2):
    (state,) = search(graph.params, jax.random.key(seed), [problems(ROOTS)])
  assert len(traces) == 1
  outcome = graph.outcome[ROOTS].copy()
  outcome[:, 1] = 2.0
  expected = np.where(graph.is_terminal[ROOTS], outcome, 0.0)
  np.testing.assert_allclose(state.tree.reward[:, 1:5], expected, rtol=1e-6)
  is_best = np.asarray(strategy.select(state)) == 2
  np.testing.assert_array_equal(is_best, graph.is_terminal[ROOTS, 1])


def test_best_of_n_chooses_the_best_finished_solution():
  graph = world()
  with jax.enable_x64(True):
    strategy, search = STRATEGIES["best_of_n"]()
    state = search(graph.params, jax.random.key(0), problems(ROOTS))
    selected = np.asarray(strategy.select(state))
  for row, root in enumerate(ROOTS):
    scores = np.where(
      graph.is_terminal[root] & graph.is_valid[root],
      graph.outcome[root],
      -np.inf,
    )
    best = 1 + int(np.argmax(scores)) if np.any(scores > -np.inf) else NO_NODE
    assert selected[row] == best
  means = [
    np.mean(
      [
        graph.root_value[root],
        *np.where(
          graph.is_terminal[root], graph.outcome[root], graph.value[root]
        )[graph.is_valid[root]],
      ]
    )
    for root in ROOTS
  ]
  found = np.asarray(state.tree.mean_value)[:, ROOT]
  np.testing.assert_allclose(found, means, rtol=1e-12)


def test_greedy_takes_one_candidate():
  assert make_strategy("greedy", table_model(1)).name == "greedy"
  with pytest.raises(ValueError, match="greedy takes a step model with 1"):
    make_strategy("greedy", table_model(2))


@pytest.mark.parametrize(
  "name, options, message",
  [
    ("mtcs", {}, "unknown strategy 'mtcs'; did you mean 'mcts'?"),
    ("zzz", {}, "unknown strategy 'zzz' .there are: a_star"),
    (
      "mcts",
      {"num_simulation": 3},
      "unknown option of strategy 'mcts' 'num_simulation'; did you mean",
    ),
    ("best_of_n", {"num_simulations": 3}, "unknown option of strategy"),
  ],
)
def test_unknown_names_say_what_comes_nearest(name, options, message):
  with pytest.raises(ValueError, match=message):
    make_strategy(name, table_model(2), **options)
