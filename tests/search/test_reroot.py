"""Commitments against a dictionary search and against a fresh one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.search.driver import run_on_device
from o1jax.search.mcts import Widening, start_simulation
from o1jax.search.reroot import reroot
from o1jax.search.selection import make_rule
from o1jax.search.strategies import make_strategy
from o1jax.search.tree import NO_NODE, ROOT, UNEXPANDED, read
from oracles import DictionaryMCTS, commit_and_search, mix, visits_by_path
from worlds import (
  NUM_ROOTS,
  problems,
  random_graph,
  table_model,
  table_search,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

SIMULATIONS = 12
COMMITS = 3
DISCOUNT = 0.9


@pytest.fixture(autouse=True)
def float64():
  """Two roundings of one formula may flip a tie in float32."""
  with jax.enable_x64(True):
    yield


def search(rule: str = "puct", max_commits: int = COMMITS, **options):
  defaults = {"num_simulations": SIMULATIONS, "capacity": 260}
  options = {**defaults, "discount": DISCOUNT, **options}
  return table_search(
    name="reroot", max_commits=max_commits, rule=rule, **options
  )


def world(seed: int):
  return random_graph(seed, terminal_rate=0.2, invalid_rate=0.25)


def run_all(run, table):
  return run(table.params, jax.random.key(0), problems(range(NUM_ROOTS)))


def path_to(tree, row: int, node: int) -> tuple[int, ...]:
  """Actions from the root to a node of a tree whose nodes expand once."""
  parent = np.asarray(tree.parent[row])
  first = np.asarray(tree.first_child[row])
  path = []
  while node != ROOT:
    path.append(int(node - first[parent[node]]))
    node = parent[node]
  return tuple(reversed(path))


@pytest.mark.parametrize(
  "rule, options",
  [("puct", {}), ("uct", {}), ("puct", {"num_parallel_leaves": 3})],
)
def test_commitments_are_those_of_a_dictionary_search(rule, options):
  strategy, run = search(rule, **options)
  depths = set()
  for seed in range(3):
    table = world(seed)
    state = run_all(run, table)
    assert np.all(strategy.is_done(state)) and not np.any(state.is_full)
    for row in range(NUM_ROOTS):
      oracle = DictionaryMCTS(
        table, row, rule=rule, num_simulations=0, discount=DISCOUNT
      )
      roots = commit_and_search(oracle, SIMULATIONS, COMMITS)
      assert visits_by_path(state.tree, row) == oracle.visits
      assert path_to(state.tree, row, int(state.root[row])) == roots[-1]
      depths.add((len(roots) - 1, oracle.is_terminal[roots[-1]]))
      mean = oracle.total[()] / oracle.visits[()]
      np.testing.assert_allclose(state.tree.mean_value[row, ROOT], mean, 1e-12)
  # Some searches ended at a solution and some at the last commitment.
  assert (COMMITS, False) in depths and {(1, True), (2, True)} & depths


def subtree(tree, states, row: int, root: int):
  """The nodes below `root` of one tree, numbered anew from 0, as `[N]`.

  Returns:
    The fields of a `Tree` that search reads, and the table's states.
  """
  first = np.asarray(tree.first_child[row])
  old, starts = [root], {}
  for node in old:
    if first[node] != UNEXPANDED:
      starts[len(starts), node] = len(old)
      old.extend(range(first[node], first[node] + tree.num_candidates))
  starts = {node: start for (_, node), start in starts.items()}
  new_of = {node: i for i, node in enumerate(old)}
  names = ("num_visits", "mean_value", "value", "reward", "prior_logits")
  names += ("is_terminal", "is_solution", "is_valid", "depth", "num_blocks")
  fields = {}
  for name in names:
    array = np.asarray(getattr(tree, name)[row])
    fields[name] = np.zeros_like(array)
    fields[name][: len(old)] = array[old]
  fields["depth"][: len(old)] -= fields["depth"][0]
  parent = np.full_like(first, -1)
  parent[1 : len(old)] = [new_of[tree.parent[row, n].item()] for n in old[1:]]
  fields["parent"] = parent
  fields["first_child"] = np.full_like(first, UNEXPANDED)
  for node, start in starts.items():
    fields["first_child"][new_of[node]] = start
  fields["next_free"] = np.int32(len(old))
  table_state = np.full_like(np.asarray(states[row]), -1)
  table_state[: len(old)] = np.asarray(states[row])[old]
  return fields, table_state


def test_going_on_is_a_fresh_search_with_the_same_statistics():
  """The second root's tree, carried into a new one by hand, and searched."""
  table = random_graph(6)
  strategy = make_strategy(
    "mcts",
    table_model(4),
    num_simulations=SIMULATIONS,
    discount=DISCOUNT,
    capacity=260,
  )
  go_on = run_on_device(
    strategy._replace(init=lambda params, key, problems: params["state"])
  )

  def start(roots):
    return strategy.init(table.params, jax.random.key(1), problems(roots))

  def finish(state):
    state = state.replace(tree_keys=jax.random.split(jax.random.key(2), 8))
    params = {**table.params, "state": state}
    return go_on(params, jax.random.key(1), problems(range(NUM_ROOTS)))

  state = finish(start(range(NUM_ROOTS)))
  later = run_all(search(max_commits=1)[1], table)
  built = [
    subtree(state.tree, state.node_state[0], row, int(later.root[row]))
    for row in range(NUM_ROOTS)
  ]
  fields, states = jax.tree.map(lambda *rows: jnp.stack(rows), *built)
  assert np.all(np.asarray(fields["num_visits"][:, ROOT]) > 1)
  fresh = start(states[:, 0])
  tree = fresh.tree.replace(**fields)
  node = start_simulation(
    tree,
    fresh.root_noise,
    fresh.root,
    jnp.zeros((NUM_ROOTS,), bool),
    rule=make_rule("puct", 4, SIMULATIONS, {}),
    widening=Widening(1.0, 0.5),
    discount=DISCOUNT,
  )
  node_state = (states, fresh.node_state[1])
  fresh = finish(fresh.replace(tree=tree, node=node, node_state=node_state))
  for row in range(NUM_ROOTS):
    root = path_to(later.tree, row, int(later.root[row]))
    assert len(root) == 1
    below = {
      path[1:]: visits
      for path, visits in visits_by_path(later.tree, row).items()
      if path[:1] == root
    }
    assert visits_by_path(fresh.tree, row) == below


def test_a_tree_that_is_full_at_a_commitment_stops():
  """Two candidates, two simulations a step and room for two expansions."""
  strategy = make_strategy(
    "reroot", table_model(2), num_simulations=2, capacity=5
  )
  table = random_graph(6, num_candidates=2)
  state = run_on_device(strategy)(
    table.params, jax.random.key(0), problems(range(NUM_ROOTS))
  )
  assert np.all(state.is_full)
  np.testing.assert_array_equal(state.tree.next_free, 5)
  assert np.max(state.tree.first_child) == 3
  assert np.all(np.asarray(state.cost.generated_tokens) == 4 * 3)


@pytest.mark.parametrize(
  "num_simulations", [pytest.param(SIMULATIONS, marks=pytest.mark.slow), 1]
)
def test_new_roots_get_noise_of_their_own(num_simulations):
  """With a fraction of 1 the prior of a root is its noise.

  After one simulation the new root has no candidates yet, after more it has.
  """
  table = random_graph(2)
  options = (("dirichlet_alpha", 1.0), ("dirichlet_fraction", 1.0))
  _, run = search(
    max_commits=2, rule_options=options, num_simulations=num_simulations
  )
  state = run_all(run, table)
  tree, key = state.tree, jax.random.key(0)
  alpha = jnp.ones(4)
  for row, seed in enumerate(np.asarray(problems(range(NUM_ROOTS)).seeds)):
    first_key, tree_key = jax.random.split(jax.random.fold_in(key, seed))
    path = path_to(tree, row, int(state.root[row]))
    assert len(path) == 2
    noises = [jax.random.dirichlet(first_key, alpha)]
    node, path_id = ROOT, 0
    for action in path:
      path_id = mix(path_id, action)
      own = jax.random.fold_in(tree_key, np.uint32(mix(path_id, -1)))
      noises.append(jax.random.dirichlet(own, alpha))
    plain = set(np.flatnonzero(tree.first_child[row] != UNEXPANDED).tolist())
    for depth, noise in enumerate(noises):
      first = int(tree.first_child[row, node])
      plain.remove(node)
      prior = np.exp(tree.prior_logits[row, first : first + 4])
      np.testing.assert_allclose(prior, noise, rtol=1e-9)
      if depth < len(path):
        node = first + path[depth]
    assert plain or num_simulations == 1
    for node in plain:
      first = int(tree.first_child[row, node])
      prior = np.exp(tree.prior_logits[row, first : first + 4])
      shown = np.exp(table.prior_logits[int(state.node_state[0][row, node])])
      np.testing.assert_allclose(prior, shown / np.sum(shown), rtol=1e-9)


def test_the_same_key_gives_the_same_and_a_batch_is_each_problem_alone():
  table = world(4)
  _, run = search()
  together = run_all(run, table)
  again = run_all(run, table)
  alone = run(table.params, jax.random.key(0), problems(np.full(NUM_ROOTS, 5)))
  for left, right in zip(
    jax.tree.leaves((together.tree, together.root)),
    jax.tree.leaves((again.tree, again.root)),
    strict=True,
  ):
    np.testing.assert_array_equal(left, right)
  for whole, one in zip(
    jax.tree.leaves((together.tree, together.root)),
    jax.tree.leaves((alone.tree, alone.root)),
    strict=True,
  ):
    np.testing.assert_array_equal(whole[5], one[2])


def test_a_budget_is_spent_and_never_exceeded():
  strategy, run = search(max_commits=None, max_tokens=101)
  state = run_all(run, random_graph(3))
  assert np.all(state.is_full) and np.all(strategy.is_done(state))
  np.testing.assert_array_equal(state.cost.generated_tokens, 99)
  assert np.all(read(state.tree.depth, state.root) > 0)


def test_dead_ends_end_the_search():
  strategy, run = search()
  state = run_all(run, random_graph(5, invalid_rate=1.0))
  assert np.all(strategy.is_done(state))
  np.testing.assert_array_equal(state.cost.simulations, SIMULATIONS)
  np.testing.assert_array_equal(strategy.select(state), NO_NODE)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"rule": "gumbel"}, "rule='gumbel' plans the visits of a root"),
    ({"max_commits": -1}, "max_commits=-1: give at least 0, or None"),
    ({"capacity": None, "max_commits": None}, "capacity=None: give it, or"),
    ({"num_simulations": 0}, "num_simulations=0: give at least 1"),
    ({"max_tokens": 2}, "max_tokens=2 does not pay for one candidate"),
  ],
)
def test_bad_options_say_what_to_change(options, message):
  options = {"num_simulations": 4, "max_commits": 2, **options}
  with pytest.raises(ValueError, match=message):
    reroot(table_model(4), **options)
