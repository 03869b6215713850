"""MCTSr against its recurrences in dictionaries, and best-of-N against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.search.mctsr import mctsr, qualities
from o1jax.search.tree import NO_NODE, make_tree, scores
from oracles import DictionaryMCTSr, Draws, visits_by_path
from worlds import (
  TOKENS_PER_STEP,
  chain_search,
  chance_model,
  problems,
  random_graph,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

BATCH = 64
KEY = 3
SIMULATIONS = 16


def search(**options):
  return chain_search(
    "mctsr", are_answers=True, num_simulations=SIMULATIONS, **options
  )


def tight():
  """Two children at most, much exploration, a budget of a dozen answers."""
  return search(
    max_children=2,
    max_blocks=2,
    exploration=0.3,
    max_tokens=12 * TOKENS_PER_STEP + 1,
  )


def side_by_side():
  return chain_search(
    "revision", are_answers=True, num_chains=SIMULATIONS, num_revisions=0
  )


def batch(seeds):
  return problems(np.zeros(BATCH), seeds=seeds)


@pytest.fixture
def float64():
  """Two roundings of one formula may flip a tie in float32."""
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize(
  "make, options, num_simulations",
  [
    (search, {"max_children": 3, "exploration": 0.007}, SIMULATIONS),
    (tight, {"max_children": 2, "max_blocks": 2, "exploration": 0.3}, 12),
  ],
)
def test_trees_are_those_of_the_recurrences(
  make, options, num_simulations, float64
):
  strategy, run = make()
  key = jax.random.key(KEY)
  for seed in range(3):
    # Some revisions are as good as what they revise, and some are final.
    world = random_graph(seed, terminal_rate=0.3 * seed, invalid_rate=0.2)
    world.outcome[:] = np.round(2 * world.outcome) / 2
    state = run(world.params, key, batch(np.arange(BATCH)))
    assert np.all(strategy.is_done(state))
    chosen = np.asarray(strategy.select(state))
    for row in range(5):
      draws = Draws(world, key, row, are_answers=True)
      expected = DictionaryMCTSr(
        draws, num_simulations=num_simulations, **options
      )
      assert visits_by_path(state.tree, row) == expected.visits
      quality = np.asarray(state.tree.mean_value[row])
      is_answer = np.asarray(state.tree.is_valid[row])
      np.testing.assert_allclose(
        sorted(quality[is_answer]), sorted(expected.quality.values()), 1e-12
      )
      num_answers = len(draws.score) - 1
      spent = int(state.cost.generated_tokens[row])
      assert spent == TOKENS_PER_STEP * num_answers
      assert int(state.cost.simulations[row]) == num_answers
      answers = [draws.score[path] for path in expected.quality if path]
      best = max(answers, default=None)
      if best is None:
        assert chosen[row] == NO_NODE
      else:
        score = float(scores(state.tree)[row, chosen[row]])
        np.testing.assert_allclose(score, best, rtol=1e-12)


def test_qualities_by_hand(float64):
  r"""Two answers of .2 and .6 to a problem of .5; the first revised to .8.

      .5       Q = (.5 + max(.5, .6)) / 2 = .55
     /  \
   .2    .6    Q = (.2 + .8) / 2 = .5 and .6
   |
   .8
  """
  tree = make_tree(jnp.array([0.5]), capacity=6, num_candidates=1)
  tree = tree.replace(
    parent=jnp.array([[-1, 0, 0, 1, -1, -1]]),
    depth=jnp.array([[0, 1, 1, 2, 0, 0]]),
    value=jnp.array([[0.5, 0.2, 0.6, 0.8, 0.0, 0.0]]),
    is_valid=jnp.array([[True] * 4 + [False] * 2]),
  )
  quality = np.asarray(qualities(tree))
  np.testing.assert_allclose(quality[0, :4], [0.55, 0.5, 0.6, 0.8])


def test_the_same_key_gives_the_same_and_a_batch_is_each_problem_alone(float64):
  world = random_graph(4, terminal_rate=0.1, invalid_rate=0.2)
  key = jax.random.key(KEY)
  _, run = search()
  together = run(world.params, key, batch(np.arange(BATCH)))
  again = run(world.params, key, batch(np.arange(BATCH)))
  alone = run(world.params, key, batch(np.full(BATCH, 5)))
  for field in ("parent", "value", "num_visits", "mean_value"):
    tree = getattr(together.tree, field)
    np.testing.assert_array_equal(tree, getattr(again.tree, field))
    np.testing.assert_array_equal(tree[5], getattr(alone.tree, field)[2])


def test_dead_ends_are_left_alone(float64):
  """The root is given up after three draws of nothing."""
  world = random_graph(5, invalid_rate=1.0)
  strategy, run = search()
  state = run(world.params, jax.random.key(KEY), batch(np.arange(BATCH)))
  assert np.all(strategy.is_done(state))
  np.testing.assert_array_equal(state.cost.simulations, 3)
  np.testing.assert_array_equal(strategy.select(state), NO_NODE)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"num_simulations": 0}, "num_simulations=0: give at least 1"),
    ({"max_children": 0}, "max_children=0: give at least 1"),
    ({"max_blocks": 0}, "max_blocks=0: give at least 1"),
    ({"exploration": -1.0}, "exploration=-1.0: give at least 0"),
    ({"max_tokens": 2}, "max_tokens=2 does not pay for one candidate"),
  ],
)
def test_bad_options_say_what_to_change(options, message):
  with pytest.raises(ValueError, match=message):
    mctsr(chance_model(1, True), **{"num_simulations": 4, **options})
