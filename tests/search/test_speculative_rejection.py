"""Speculative rejection against lists of rows, and best-of-N against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.search.chains import live_tips
from o1jax.search.driver import run_with_host
from o1jax.search.speculative_rejection import speculative_rejection
from o1jax.search.tree import NO_NODE, make_tree
from oracles import (
  Draws,
  grow_chains,
  lowest_share,
  visits_by_path,
  visits_of,
)
from worlds import (
  TOKENS_PER_STEP,
  chain_search,
  chance_model,
  corridors,
  problems,
  random_graph,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

BATCH = 64
NUM_STEPS = 32  # of a problem: four whole solutions of the corridors
KEY = 3


def search(rejection_rate: float, num_rows: int, num_starts: int):
  return chain_search(
    "speculative_rejection",
    num_rows=num_rows,
    num_starts=num_starts,
    rejection_rate=rejection_rate,
    capacity=40,
    max_tokens=NUM_STEPS * TOKENS_PER_STEP + 1,
  )


def best_of_four():
  return search(0.0, 4, 4)


def rejecting():
  return search(0.5, 6, 12)


def batch(seeds):
  return problems(np.zeros(BATCH), seeds=seeds)


def dangerous_graph():
  """Some steps end a solution, some lead nowhere, some cannot be taken."""
  return random_graph(9, terminal_rate=0.15, invalid_rate=0.15)


@pytest.mark.parametrize(
  "make, rate, num_rows, num_starts",
  [(best_of_four, 0.0, 4, 4), (rejecting, 0.5, 6, 12)],
)
@pytest.mark.parametrize(
  "make_world", [dangerous_graph, lambda: corridors(0.8, 0.2)]
)
def test_rows_are_those_of_lists(make, rate, num_rows, num_starts, make_world):
  """With a rate of 0 the lists are four rows sampled step by step."""
  world = make_world()
  strategy, run = make()
  key = jax.random.key(KEY)
  state = run(world.params, key, batch(np.arange(BATCH)))
  assert np.all(strategy.is_done(state))
  chosen = np.asarray(strategy.select(state))
  for row in range(4):
    draws = Draws(world, key, row)
    ended = grow_chains(
      draws,
      num_chains=num_rows,
      num_starts=num_starts,
      num_nodes=NUM_STEPS,
      stops=lowest_share(draws, rate),
    )
    assert visits_by_path(state.tree, row) == visits_of(ended)
    assert int(state.cost.simulations[row]) == len(ended)
    num_nodes = len(draws.score) - 1
    spent = int(state.cost.generated_tokens[row])
    assert spent == TOKENS_PER_STEP * num_nodes
    finished = [path for path in ended if draws.is_terminal[path]]
    if not finished:
      assert chosen[row] == NO_NODE
    else:
      best = max(draws.score[path] for path in finished)
      reward = float(state.tree.reward[row, chosen[row]])
      np.testing.assert_allclose(reward, best, rtol=1e-6)


def test_the_longest_rows_come_first_of_equal_ones_the_oldest():
  r"""Only under a budget that runs short may a longer row be a younger node.

      0
   / / \ \        2 was followed by 3; 4 has ended
  1 2   4 5
    3
  """
  tree = make_tree(jnp.array([0.5]), capacity=7, num_candidates=1)
  tree = tree.replace(
    depth=jnp.array([[0, 1, 1, 2, 1, 1, 0]]),
    first_child=jnp.array([[1, -1, 3, -1, -1, -1, -1]]),
    num_visits=jnp.array([[2, 0, 0, 0, 1, 0, 0]]),
    is_valid=jnp.array([[True] * 6 + [False]]),
  )
  tips = live_tips(tree, 4)
  np.testing.assert_array_equal(tips, [[3, 1, 5, NO_NODE]])


def test_without_rejection_every_row_is_sampled_to_its_end():
  """The ends are those of each row drawn alone, one after another."""
  world, key = corridors(0.8, 0.2), jax.random.key(KEY)
  _, run = best_of_four()
  state = run(world.params, key, batch(np.arange(BATCH)))
  for row in range(4):
    draws = Draws(world, key, row)
    rewards = []
    for start in range(4):
      path = draws.expand((), start)
      while not draws.is_terminal[path]:
        path = draws.expand(path, 0)
      rewards.append(draws.score[path])
    tree = state.tree
    ends = np.flatnonzero(np.asarray(tree.is_terminal[row]))
    assert sorted(np.asarray(tree.reward[row, ends])) == sorted(rewards)
    mean = (world.root_value[0] + sum(rewards)) / 5
    np.testing.assert_allclose(tree.mean_value[row, 0], mean, rtol=1e-6)


def test_the_same_key_gives_the_same_and_a_batch_is_each_problem_alone():
  world, key = dangerous_graph(), jax.random.key(KEY)
  _, run = rejecting()
  together = run(world.params, key, batch(np.arange(BATCH)))
  again = run(world.params, key, batch(np.arange(BATCH)))
  alone = run(world.params, key, batch(np.full(BATCH, 5)))
  for field in ("parent", "value", "num_visits", "is_valid"):
    tree = getattr(together.tree, field)
    np.testing.assert_array_equal(tree, getattr(again.tree, field))
    np.testing.assert_array_equal(tree[5], getattr(alone.tree, field)[2])
  other = run(world.params, jax.random.key(4), batch(np.arange(BATCH)))
  assert np.any(np.asarray(together.tree.value) != other.tree.value)


def test_a_budget_is_spent_and_never_exceeded():
  """One token is left, which pays for no step."""
  world = random_graph(5)
  _, run = rejecting()
  state = run(world.params, jax.random.key(KEY), batch(np.arange(BATCH)))
  np.testing.assert_array_equal(
    state.cost.generated_tokens, NUM_STEPS * TOKENS_PER_STEP
  )
  assert np.all(state.is_full)


def test_the_host_steps_to_the_same_tree():
  world, key = corridors(0.8, 0.2), jax.random.key(KEY)
  strategy, run = best_of_four()
  expected = run(world.params, key, batch(np.arange(BATCH)))
  step = run_with_host(strategy, lambda state, _: None)
  (state,) = step(world.params, key, [batch(np.arange(BATCH))])
  np.testing.assert_array_equal(state.tree.parent, expected.tree.parent)
  np.testing.assert_allclose(
    state.tree.mean_value, expected.tree.mean_value, rtol=1e-6
  )


@pytest.mark.parametrize(
  "options, message",
  [
    ({"rejection_rate": 1.0}, "rejection_rate=1.0: give a share"),
    ({"num_rows": 0}, "0 chains at a time of 0 in all: give at least 1"),
    ({"num_starts": 3}, "4 chains at a time of 3 in all"),
    ({"capacity": 1}, "capacity=1 cannot hold"),
    ({"max_tokens": 2}, "max_tokens=2 does not pay for one candidate"),
  ],
)
def test_bad_options_say_what_to_change(options, message):
  with pytest.raises(ValueError, match=message):
    speculative_rejection(
      chance_model(1), **{"num_rows": 4, "capacity": 20, **options}
    )


def test_a_model_that_branches_is_refused():
  with pytest.raises(ValueError, match="takes a step model with 1 candidate"):
    speculative_rejection(chance_model(2), num_rows=4, capacity=20)
