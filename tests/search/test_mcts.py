"""The tree search against mctx, a dictionary search and enumeration."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest

from o1jax.search.mcts import best_finished, mcts, most_visited
from o1jax.search.tree import NO_NODE, ROOT, make_tree, read, visit_probs
from oracles import DictionaryMCTS, best_first_steps, visits_by_path
from worlds import (
  AHEAD,
  DISCOUNT,
  NUM_CONSIDERED,
  NUM_ROOTS,
  ROLLOUT_WEIGHT,
  SIMULATIONS,
  World,
  arithmetic_game,
  drawn_tree,
  problems,
  random_graph,
  rule_search,
  table_model,
  table_search,
  with_noise,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

RULES = ["puct", "uct", "gumbel"]


@pytest.fixture
def float64():
  """Two roundings of one formula may flip a tie in float32."""
  with jax.enable_x64(True):
    yield


def rooted_graph(seed: int) -> World:
  """A random graph whose roots have invalid candidates and no way back."""
  world = random_graph(seed, terminal_rate=0.15)
  rng = np.random.default_rng(seed)
  num_states, num_candidates = world.child.shape
  is_valid = np.ones(world.is_valid.shape, bool)
  is_valid[np.arange(0, NUM_ROOTS, 2), rng.integers(num_candidates)] = False
  return dataclasses.replace(
    world,
    child=rng.integers(NUM_ROOTS, num_states, size=world.child.shape).astype(
      np.int32
    ),
    is_valid=is_valid,
  )


def mctx_tree(rule: str, table: dict):
  """mctx's tree for the roots 0 to NUM_ROOTS - 1."""

  def recurrent_fn(table, key, action, state):
    del key
    child = table["child"][state, action]
    is_terminal = table["is_terminal"][state, action]
    outcome = table["outcome"][state, action]
    value = (1 - ROLLOUT_WEIGHT) * table["value"][state, action]
    value = value + ROLLOUT_WEIGHT * outcome
    return mctx.RecurrentFnOutput(
      reward=jnp.where(is_terminal, outcome, 0.0),
      discount=jnp.where(is_terminal, 0.0, DISCOUNT),
      prior_logits=table["prior_logits"][child],
      value=jnp.where(is_terminal, 0.0, value),
    ), child

  roots = jnp.arange(NUM_ROOTS)
  root = mctx.RootFnOutput(
    prior_logits=table["prior_logits"][roots],
    value=table["root_value"][roots],
    embedding=roots,
  )
  arguments = (table, jax.random.key(0), root, recurrent_fn, SIMULATIONS)
  invalid = ~table["is_valid"][roots]
  if rule == "uct":
    return mctx.search(
      *arguments[:2],
      root=root,
      recurrent_fn=recurrent_fn,
      root_action_selection_fn=functools.partial(mctx_uct, depth=0),
      interior_action_selection_fn=mctx_uct,
      num_simulations=SIMULATIONS,
      invalid_actions=invalid,
    )
  if rule == "puct":
    return mctx.muzero_policy(
      *arguments, invalid_actions=invalid, dirichlet_fraction=0.0
    ).search_tree
  # mctx draws its noise inside; here it gets ours.
  noise = table["root_noise"][:NUM_ROOTS]
  with mock.patch.object(jax.random, "gumbel", lambda *_, **__: noise):
    return mctx.gumbel_muzero_policy(
      *arguments,
      invalid_actions=invalid,
      max_num_considered_actions=NUM_CONSIDERED,
    ).search_tree


def mctx_uct(key, tree, node, depth):
  """UCT for mctx, which has none of its own: unvisited ones first, by prior."""
  del key
  visits = tree.children_visits[node]
  log_total = jnp.log(jnp.maximum(jnp.sum(visits), 1))
  bound = tree.qvalues(node) + jnp.sqrt(2 * log_total / visits)
  first = 1e6 + tree.children_prior_logits[node]
  scores = jnp.where(visits == 0, first, bound)
  is_invalid = tree.root_invalid_actions * (depth == 0)
  scores = jnp.where(is_invalid, -jnp.inf, scores)
  return jnp.argmax(scores).astype(jnp.int32)


def mctx_visits_by_path(tree, row: int, is_terminal) -> dict:
  """Paths of mctx's tree down to finished solutions."""
  children = np.asarray(tree.children_index[row])
  visits = np.asarray(tree.node_visits[row])
  states = np.asarray(tree.embeddings[row])
  found, stack = {}, [((), 0)]
  while stack:
    path, node = stack.pop()
    found[path] = int(visits[node])
    for action, child in enumerate(children[node]):
      if child < 0:
        continue
      if is_terminal[states[node], action]:
        # mctx goes on below; its discount of 0 keeps that from mattering.
        found[(*path, action)] = int(visits[child])
      else:
        stack.append(((*path, action), int(child)))
  return found


@pytest.mark.parametrize("rule", RULES)
def test_visits_are_those_of_mctx(rule, float64):
  _, search = rule_search(rule)
  peer_search = jax.jit(functools.partial(mctx_tree, rule))
  for seed in range(3):
    table = with_noise(rooted_graph(seed), seed)
    with jax.debug_key_reuse(False):
      peer = peer_search(table)
    state = search(table, jax.random.key(1), problems(range(NUM_ROOTS)))
    for row in range(NUM_ROOTS):
      expected = mctx_visits_by_path(peer, row, table["is_terminal"])
      assert visits_by_path(state.tree, row) == expected


@pytest.mark.parametrize("rule", RULES)
def test_visits_are_those_of_a_dictionary_search(rule, float64):
  _, search = rule_search(rule)
  for seed in range(3):
    world = random_graph(seed, terminal_rate=0.2, invalid_rate=0.25)
    table = with_noise(world, seed)
    state = search(table, jax.random.key(seed), problems(range(NUM_ROOTS)))
    means = np.asarray(state.tree.mean_value[:, ROOT])
    for row in range(NUM_ROOTS):
      expected = DictionaryMCTS(
        world,
        row,
        rule=rule,
        num_simulations=SIMULATIONS,
        discount=DISCOUNT,
        rollout_weight=ROLLOUT_WEIGHT,
        root_noise=np.asarray(table["root_noise"])[row],
        num_considered=NUM_CONSIDERED,
      )
      assert visits_by_path(state.tree, row) == expected.visits
      mean = expected.total[()] / expected.visits[()]
      np.testing.assert_allclose(means[row], mean, rtol=1e-12)


@pytest.mark.parametrize(
  "rule", ["puct", pytest.param("gumbel", marks=pytest.mark.slow)]
)
def test_looking_ahead_changes_no_visit_and_saves_rounds(rule, float64):
  world = random_graph(7, terminal_rate=0.1, invalid_rate=0.1)
  table = with_noise(world, 0)
  calls, trees = [], []
  for options in ({}, AHEAD):
    _, search = rule_search(rule, **options)
    state = search(table, jax.random.key(0), problems(range(NUM_ROOTS)))
    trees.append([visits_by_path(state.tree, r) for r in range(NUM_ROOTS)])
    calls.append(int(state.node_state[1][0]))
    assert not np.any(state.is_full)
    np.testing.assert_array_equal(state.cost.simulations, SIMULATIONS)
  assert trees[0] == trees[1]
  assert calls[1] < 0.7 * calls[0]


@pytest.mark.parametrize("rule, num_leaves", [("uct", 1), ("puct", 3)])
def test_widening_is_that_of_a_dictionary_search(rule, num_leaves, float64):
  """Two candidates an expansion of the world's six, in up to three of them."""
  world = random_graph(21, num_candidates=6, terminal_rate=0.2)
  _, run = table_search(
    num_candidates=2,
    rule=rule,
    num_simulations=60,
    num_parallel_leaves=num_leaves,
    max_blocks=3,
    widening_rate=0.8,
    widening_exponent=0.6,
    capacity=1 + 2 * 200,
  )
  roots = list(range(NUM_ROOTS))
  state = run(world.params, jax.random.key(0), problems(roots))
  assert not np.any(state.is_full)
  blocks = np.asarray(state.tree.num_blocks)
  assert {1, 2, 3} <= set(blocks[blocks > 0].tolist())
  for row, root in enumerate(roots):
    oracle = DictionaryMCTS(
      world,
      root,
      rule=rule,
      num_simulations=60,
      block=2,
      widening=(0.8, 0.6),
    )
    assert visits_by_path(state.tree, row) == oracle.visits


def test_a_token_budget_is_spent_and_never_exceeded(float64):
  """Steps of the table cost 3 tokens; the last expansion is cut to one."""
  _, run = table_search(
    num_candidates=4, num_simulations=200, num_parallel_leaves=4, max_tokens=41
  )
  table = random_graph(5, num_candidates=4).params
  state = run(table, jax.random.key(0), problems(range(NUM_ROOTS)))
  assert np.all(state.is_full)
  np.testing.assert_array_equal(state.cost.generated_tokens, 39)
  # 13 candidates: three whole expansions and the first of a fourth.
  np.testing.assert_array_equal(np.sum(state.tree.is_valid, axis=-1), 14)


@pytest.mark.parametrize(
  "rule, rule_options",
  [
    ("puct", (("exploration_init", 3.0),)),
    pytest.param("gumbel", (), marks=pytest.mark.slow),
    pytest.param("uct", (), marks=pytest.mark.slow),
  ],
)
def test_finds_the_best_first_step_of_enumerated_games(rule, rule_options):
  games = [((2, 3, 7), 13), ((3, 5, 8), 64), ((4, 6, 9), 15), ((5, 7, 9), 68)]
  world = arithmetic_game(games)
  strategy, search = table_search(
    12,
    num_simulations=1000,
    capacity=1 + 13 * 12,
    rule=rule,
    rule_options=rule_options,
  )
  state = search(world.params, jax.random.key(0), problems(range(4)))
  tree, root = state.tree, jnp.zeros(4, jnp.int32)
  probs = np.asarray(visit_probs(tree, root))
  for row in range(len(games)):
    # One step of twelve leads to the target.
    (step,) = best_first_steps(world, row)
    # Sequential halving ends with equal visits of the last two.
    assert probs[row, step] == probs[row].max()
  np.testing.assert_array_equal(
    read(tree.reward, strategy.select(state)), np.ones(4)
  )
  assert np.all(tree.is_terminal[np.arange(4), most_visited(tree)])
  np.testing.assert_array_equal(read(tree.reward, most_visited(tree)), 1.0)


def small_search(world: World, roots: list[int]):
  """Twelve simulations in eight trees that hold four expansions of two."""
  strategy, search = table_search(2, num_simulations=12, capacity=9)
  return strategy, search(world.params, jax.random.key(0), problems(roots))


def test_drawn_tree_by_hand(float64):
  strategy, state = small_search(drawn_tree(), [0, 1, 2, 3] * 2)
  visits = visits_by_path(state.tree, 0)
  # The prior sends the first simulation to 1. Below it are outcomes of .2 and
  # .4, below 2 one of 1, so that 2 takes over.
  assert visits[()] == 13
  assert visits[(1,)] > visits[(0,)] > 1
  assert visits[(1, 0)] > visits[(1, 1)]
  chosen = int(strategy.select(state)[0])
  assert float(state.tree.reward[0, chosen]) == 1.0
  assert int(state.tree.parent[0, chosen]) == 2
  expected = DictionaryMCTS(
    drawn_tree(), 0, rule="puct", num_simulations=12
  ).visits
  assert visits == expected


def test_dead_ends_back_up_their_value_and_the_search_goes_on(float64):
  strategy, state = small_search(drawn_tree(), [3, 3, 0, 0] * 2)
  assert int(state.cost.simulations[0]) == 12
  assert visits_by_path(state.tree, 0) == {(): 13}
  np.testing.assert_allclose(state.tree.mean_value[0, ROOT], 0.1, 1e-6)
  assert int(strategy.select(state)[0]) == NO_NODE


def test_a_full_tree_stops_and_says_so(float64):
  world = random_graph(4, num_candidates=2, num_states=16)
  strategy, state = small_search(world, list(range(8)))
  assert np.all(state.is_full) and np.all(strategy.is_done(state))
  np.testing.assert_array_equal(state.tree.next_free, 9)
  for row in range(8):
    simulations = int(state.cost.simulations[row])
    assert 4 <= simulations < 12
    # It did what a search of that many simulations does, and the next one
    # would have needed an expansion.
    run = functools.partial(DictionaryMCTS, world, row, rule="puct")
    expected = run(num_simulations=simulations).visits
    assert visits_by_path(state.tree, row) == expected
    longer = run(num_simulations=simulations + 1).visits
    (added,) = set(longer) - set(expected)
    assert expected[added[:-1]] == 1


def test_a_full_tree_looks_no_further(float64):
  """Room for four expansions, of which up to three are asked for at a time."""
  world = random_graph(4, num_candidates=2, num_states=16)
  _, search = table_search(
    2, num_simulations=12, capacity=9, num_parallel_leaves=3
  )
  state = search(world.params, jax.random.key(0), problems(range(8)))
  assert np.all(state.is_full)
  np.testing.assert_array_equal(state.tree.next_free, 9)
  assert np.max(state.tree.first_child) == 7
  for row in range(8):
    simulations = int(state.cost.simulations[row])
    expected = DictionaryMCTS(
      world, row, rule="puct", num_simulations=simulations
    )
    assert visits_by_path(state.tree, row) == expected.visits


def test_nothing_is_expanded_for_simulations_that_will_not_be(float64):
  """Two simulations need the root and one more node at most."""
  world = random_graph(4, num_candidates=2, num_states=16)
  _, search = table_search(
    2, num_simulations=2, capacity=13, num_parallel_leaves=3
  )
  state = search(world.params, jax.random.key(0), problems(range(8)))
  np.testing.assert_array_equal(state.cost.simulations, 2)
  assert np.max(state.tree.next_free) == 5


def test_solutions_are_chosen_by_outcome_or_by_visits(float64):
  _, state = small_search(drawn_tree(), [0, 1, 2, 3] * 2)
  tree = state.tree
  left = int(tree.first_child[0, 1])
  visits = np.asarray(tree.num_visits).copy()
  visits[0, 1], visits[0, left + 1] = 50, 40
  tree = tree.replace(num_visits=jnp.asarray(visits))
  assert float(tree.reward[0, best_finished(tree)[0]]) == 1.0
  assert int(most_visited(tree)[0]) == left + 1
  # Where the path of most visits ends at no solution, the best one counts.
  is_solution = np.asarray(tree.is_solution).copy()
  is_solution[0, left + 1] = False
  unfinished = tree.replace(is_solution=jnp.asarray(is_solution))
  assert int(most_visited(unfinished)[0]) == int(best_finished(tree)[0])


def test_equal_outcomes_go_to_visits_then_prior_then_index():
  tree = make_tree(jnp.array([0.5]), capacity=4, num_candidates=3)
  tree = tree.replace(
    reward=jnp.array([[0.0, 0.5, 0.5, 0.5]]),
    is_solution=jnp.array([[False, True, True, True]]),
    is_valid=jnp.array([[True, True, True, True]]),
  )
  assert int(best_finished(tree)[0]) == 1
  by_prior = tree.replace(prior_logits=jnp.array([[0.0, -2.0, -2.0, -1.0]]))
  assert int(best_finished(by_prior)[0]) == 3
  by_visits = by_prior.replace(num_visits=jnp.array([[4, 1, 2, 1]]))
  assert int(best_finished(by_visits)[0]) == 2
  by_outcome = by_visits.replace(reward=jnp.array([[0.0, 0.6, 0.5, 0.5]]))
  assert int(best_finished(by_outcome)[0]) == 1
  is_valid = jnp.array([[True, False, True, True]])
  assert int(best_finished(by_outcome.replace(is_valid=is_valid))[0]) == 2


@pytest.mark.parametrize(
  "options, message",
  [
    ({"max_tokens": 2}, "max_tokens=2 does not pay for one candidate"),
    ({"max_blocks": 0}, "max_blocks=0: give at least 1"),
    ({"max_blocks": 2, "rule": "gumbel"}, "takes the root's first candidates"),
    ({"widening_exponent": 1.5}, "an exponent in"),
    ({"num_simulations": 0}, "num_simulations=0: give at least 1"),
    ({"capacity": 4}, "capacity=4 cannot hold .* give at least 5"),
    ({"num_parallel_leaves": 0}, "num_parallel_leaves=0"),
    ({"rollout_weight": 1.5}, "rollout_weight=1.5"),
    ({"discount": 0.0}, "discount=0.0"),
    ({"rule": "pucd"}, "unknown selection rule 'pucd'; did you mean 'puct'?"),
    ({"select_by": "visit"}, "unknown select_by 'visit'; did you mean"),
    (
      {"rule": "uct", "rule_options": {"explorations": 1.0}},
      "unknown option of selection rule 'uct' 'explorations'; did you mean",
    ),
    (
      {"rule": "gumbel", "rule_options": {"num_considered_actions": 5}},
      "num_considered_actions=5 is not between 1 and the 4 candidates",
    ),
    (
      {"rule_options": {"dirichlet_fraction": 2.0}},
      "dirichlet_fraction=2.0 is not in",
    ),
  ],
)
def test_bad_options_say_what_to_change(options, message):
  with pytest.raises(ValueError, match=message):
    mcts(table_model(4), **{"num_simulations": 8, **options})
