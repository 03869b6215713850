"""Beam search and its relatives against lists in plain Python."""

import itertools

import jax
import numpy as np
import pytest

from o1jax.search.beam import beam, treebon
from o1jax.search.tree import NO_NODE, ROOT, UNEXPANDED, read
from oracles import brute_force_beam, nodes_in_order
from worlds import (
  NUM_ROOTS,
  TOKENS_PER_STEP,
  detour,
  drawn_tree,
  markov_chain,
  problems,
  random_graph,
  table_model,
  table_search,
)

pytestmark = pytest.mark.usefixtures("quick_programs")


@pytest.fixture(autouse=True)
def float64():
  """Two roundings of one sum may flip a tie in float32."""
  with jax.enable_x64(True):
    yield


def run(world, roots, **options):
  strategy, search = table_search(**options)
  state = search(world.params, jax.random.key(0), problems(roots))
  return strategy, state


@pytest.mark.parametrize(
  "num_subtrees, num_root_blocks", [(1, 1), (2, 1), (4, 3)]
)
def test_the_tree_is_that_of_brute_force(num_subtrees, num_root_blocks):
  """Four places of eight states, some with ties and some with dead ends."""
  options = dict(
    width=4,
    max_depth=5,
    num_subtrees=num_subtrees,
    num_root_blocks=num_root_blocks,
  )
  num_early = 0
  for seed in range(4):
    world = random_graph(
      seed, num_candidates=9, terminal_rate=0.15, invalid_rate=0.3
    )
    world.value[:] = np.round(world.value, 1)  # Makes ties.
    strategy, state = run(
      world, range(NUM_ROOTS), num_candidates=3, name="beam", **options
    )
    chosen = np.asarray(strategy.select(state))
    for row in range(NUM_ROOTS):
      oracle = brute_force_beam(world, row, block=3, **options)
      assert nodes_in_order(state.tree, row) == oracle.made
      best = max((oracle.score[p] for p in oracle.finished), default=None)
      if best is None:
        assert chosen[row] == NO_NODE
      else:
        assert state.tree.reward[row, chosen[row]] == best
      depth = max(map(len, oracle.finished), default=0)
      num_early += sum(len(path) < depth for path in oracle.finished)
      is_made = np.asarray(state.tree.is_valid[row])
      np.testing.assert_allclose(
        state.tree.mean_value[row, is_made], means_of(oracle), rtol=1e-12
      )
  # Finished solutions take no place in the beam.
  assert num_early > 4 * NUM_ROOTS


@pytest.mark.parametrize("num_subtrees, num_payable", [(1, 9), (2, 11)])
def test_a_budget_completes_a_layer_before_the_next(num_subtrees, num_payable):
  """Invalid candidates are paid for in advance and turn out to be free."""
  options = dict(width=4, max_depth=4, num_subtrees=num_subtrees)
  num_completed = 0
  for seed in range(4):
    world = random_graph(seed, terminal_rate=0.1, invalid_rate=0.4)
    _, state = run(
      world,
      range(NUM_ROOTS),
      name="beam",
      max_tokens=num_payable * TOKENS_PER_STEP,
      **options,
    )
    for row in range(NUM_ROOTS):
      oracle = brute_force_beam(world, row, num_payable=num_payable, **options)
      assert nodes_in_order(state.tree, row) == oracle.made
      is_expanded = np.asarray(state.tree.first_child[row]) != UNEXPANDED
      assert np.sum(is_expanded) == len(oracle.expanded)
      # More nodes than the first look at the second layer could pay for.
      num_first = sum(len(path) == 1 for path in oracle.made)
      num_second = sum(len(path) == 1 for path in oracle.expanded)
      num_completed += 4 * (num_second - 1) >= num_payable - num_first
  assert num_completed > 4


def test_a_budget_that_pays_for_all_changes_nothing():
  """Two programs, the same nodes with the same bits."""
  # The options of a program above.
  options = dict(width=4, max_depth=5, num_subtrees=2, num_root_blocks=1)
  world = random_graph(2, num_candidates=9, terminal_rate=0.1, invalid_rate=0.4)
  trees = []
  for budget in ({}, {"max_tokens": 10**6}):
    _, state = run(
      world,
      range(NUM_ROOTS),
      num_candidates=3,
      name="beam",
      **options,
      **budget,
    )
    trees.append(state.tree)
  jax.tree.map(np.testing.assert_array_equal, *trees)


def means_of(walker):
  """Of each node in order: mean of its value and of all scores below it."""
  means = []
  for path in walker.made:
    below = [p for p in walker.made if p[: len(path)] == path and p != path]
    own = 0.0 if path in walker.finished else walker.score[path]
    means.append(np.mean([own, *(walker.score[p] for p in below)]))
  return means


@pytest.mark.parametrize("width, wrong_seeds", [(1, [7, 11]), (9, [])])
def test_a_beam_over_a_language_model(width, wrong_seeds):
  """A beam of nine holds every text of a chain that remembers one token."""
  found_wrong = []
  for seed in (3, 7, 11):
    world = markov_chain(seed)
    strategy, state = run(
      world,
      [0] * NUM_ROOTS,
      num_candidates=3,
      name="beam",
      width=width,
      max_depth=4,
    )
    oracle = brute_force_beam(world, 0, width=width, max_depth=4)
    best = max(oracle.finished, key=lambda path: oracle.score[path])
    assert path_to(state.tree, int(strategy.select(state)[0])) == best
    mode = max(itertools.product(range(3), repeat=4), key=likelihood(world))
    if best != mode:
      found_wrong.append(seed)
  assert found_wrong == wrong_seeds


def likelihood(world):
  """Log-likelihood of a whole text, one transition after another."""

  def of(text):
    state, total = 0, 0.0
    for token in text:
      total += world.prior_logits[state, token]
      state = world.child[state, token]
    return total

  return of


def path_to(tree, node):
  """Candidates on the way to a node of the first tree of a batch."""
  path = []
  while node != ROOT:
    parent = int(tree.parent[0, node])
    path.append(node - int(tree.first_child[0, parent]))
    node = parent
  return tuple(reversed(path))


def test_diverse_beams_do_not_crowd_each_other_out():
  outcomes = {}
  for num_subtrees in (1, 2):
    strategy, state = run(
      detour(),
      [0] * NUM_ROOTS,
      num_candidates=2,
      name="beam",
      width=2,
      max_depth=3,
      num_subtrees=num_subtrees,
    )
    chosen = strategy.select(state)
    outcomes[num_subtrees] = float(read(state.tree.reward, chosen)[0])
  assert outcomes == {1: 0.1, 2: 0.9}


def test_treebon_keeps_the_best_share_of_each_layer():
  world = random_graph(11, num_candidates=6, num_states=60)
  _, state = run(
    world,
    range(NUM_ROOTS),
    num_candidates=2,
    name="treebon",
    num_roots=6,
    max_depth=4,
  )
  for row in range(NUM_ROOTS):
    oracle = brute_force_beam(
      world, row, width=3, max_depth=4, num_root_blocks=3, block=2
    )
    assert nodes_in_order(state.tree, row) == oracle.made
    depths = [len(path) for path in oracle.made]
    assert np.bincount(depths).tolist() == [1, 6, 6, 6, 6]
  np.testing.assert_array_equal(state.node_state[1], 4)


def test_a_budget_ends_a_layer_for_all_subtrees_alike():
  """Nine candidates: the root's four, one beam's four and one of the other."""
  world = random_graph(5)
  _, state = run(
    world,
    range(NUM_ROOTS),
    name="beam",
    width=4,
    max_depth=5,
    num_subtrees=2,
    max_tokens=9 * TOKENS_PER_STEP + 2,
  )
  np.testing.assert_array_equal(
    state.cost.generated_tokens, 9 * TOKENS_PER_STEP
  )
  for row in range(NUM_ROOTS):
    firsts = {path[0] % 2 for path in nodes_in_order(state.tree, row)[5:]}
    assert firsts == {0, 1}


def test_dead_ends_end_a_beam():
  strategy, state = run(
    drawn_tree(),
    [3, 2, 0, 1] * 2,
    num_candidates=2,
    name="beam",
    width=1,
    max_depth=4,
  )
  chosen = strategy.select(state)
  assert int(chosen[0]) == NO_NODE
  # From 2: the solution, and the dead state that is expanded in vain.
  assert nodes_in_order(state.tree, 1) == [(), (0,), (1,)]
  assert int(state.tree.next_free[1]) == 5
  # From 0: both candidates of 1 finish, and the beam does not go back to 2.
  assert len(nodes_in_order(state.tree, 2)) == 5
  rewards = read(state.tree.reward, chosen)[1:4]
  np.testing.assert_allclose(rewards, [1, 0.4, 0.4])


@pytest.mark.parametrize(
  "make, options, message",
  [
    (beam, {"width": 0}, "width=0: give at least 1"),
    (beam, {"max_depth": 0}, "max_depth=0: give at least 1"),
    (beam, {"num_subtrees": 3}, "width=4 does not divide into num_subtrees=3"),
    (beam, {"num_root_blocks": 5}, "num_root_blocks=5 is more than the width"),
    (
      beam,
      {"num_subtrees": 4, "num_candidates": 3},
      "num_subtrees=4 is more than the root's 3 candidates",
    ),
    (beam, {"max_tokens": 2}, "max_tokens=2 does not pay for one candidate"),
    (treebon, {"num_roots": 6}, "num_roots=6 is no multiple of the 4"),
    (treebon, {"num_roots": 0}, "num_roots=0 is no multiple"),
  ],
)
def test_bad_options_say_what_to_change(make, options, message):
  options = {"max_depth": 3, **options}
  model = table_model(options.pop("num_candidates", 4))
  if make is beam:
    options = {"width": 4, **options}
  with pytest.raises(ValueError, match=message):
    make(model, **options)
