"""Chains of revisions against lists of answers, and best-of-N against them."""

import jax
import numpy as np
import pytest

from o1jax.search.revision import revision
from o1jax.search.tree import NO_NODE, scores
from oracles import (
  Draws,
  grow_chains,
  stopped_answers,
  visits_by_path,
  visits_of,
)
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
NUM_ANSWERS = 20
RULES = {"num_revisions": 4, "threshold": 0.9, "patience": 2}


def with_all_rules():
  return chain_search(
    "revision",
    are_answers=True,
    num_chains=3,
    num_starts=8,
    max_tokens=NUM_ANSWERS * TOKENS_PER_STEP + 1,
    **RULES,
  )


def one_chain_of_four():
  return chain_search("revision", are_answers=True, num_revisions=3)


def four_chains_of_one():
  return chain_search(
    "revision", are_answers=True, num_chains=4, num_revisions=0
  )


def batch(seeds):
  return problems(np.zeros(BATCH), seeds=seeds)


def dangerous_graph(seed: int = 4):
  """Some answers cannot be revised, some revisions come to nothing."""
  return random_graph(seed, terminal_rate=0.1, invalid_rate=0.1)


def test_stop_rules_are_those_of_lists():
  world, key = dangerous_graph(), jax.random.key(KEY)
  # Some answers just reach the threshold, some revisions change no score.
  world.outcome[:] = np.round(world.outcome, 1)
  strategy, run = with_all_rules()
  state = run(world.params, key, batch(np.arange(BATCH)))
  assert np.all(strategy.is_done(state))
  chosen = np.asarray(strategy.select(state))
  lengths = set()
  for row in range(8):
    draws = Draws(world, key, row, are_answers=True)
    ended = grow_chains(
      draws,
      num_chains=3,
      num_starts=8,
      num_nodes=NUM_ANSWERS,
      stops=stopped_answers(draws, **RULES),
    )
    lengths |= {len(path) for path in ended}
    assert visits_by_path(state.tree, row) == visits_of(ended)
    num_answers = len(draws.score) - 1
    spent = int(state.cost.generated_tokens[row])
    assert spent == TOKENS_PER_STEP * num_answers
    answers = [p for p, valid in draws.is_valid.items() if p and valid]
    best = max(draws.score[path] for path in answers)
    score = float(scores(state.tree)[row, chosen[row]])
    np.testing.assert_allclose(score, best, rtol=1e-6)
  assert lengths == {1, 2, 3, 4, 5}


def test_a_worse_revision_does_not_replace_the_answer():
  strategy, run = one_chain_of_four()
  world = random_graph(2)
  state = run(world.params, jax.random.key(KEY), batch(np.arange(BATCH)))
  assert not np.any(state.is_full)
  np.testing.assert_array_equal(state.tree.parent[0], [-1, 0, 1, 2, 3])
  score = np.asarray(scores(state.tree))[:, 1:]
  chosen = np.asarray(strategy.select(state))
  np.testing.assert_array_equal(chosen, 1 + np.argmax(score, axis=-1))
  assert {1, 2, 3, 4} == set(chosen.tolist())


def test_without_revisions_it_is_best_of_n():
  world, key = dangerous_graph(7), jax.random.key(KEY)
  strategy, run = four_chains_of_one()
  peer, run_peer = chain_search("best_of_n", are_answers=True, num_rounds=4)
  state = run(world.params, key, batch(np.arange(BATCH)))
  expected = run_peer(world.params, key, batch(np.arange(BATCH)))
  for field in ("value", "reward", "num_visits", "is_valid"):
    np.testing.assert_array_equal(
      getattr(state.tree, field), getattr(expected.tree, field)
    )
  np.testing.assert_allclose(
    state.tree.mean_value[:, 0], expected.tree.mean_value[:, 0], rtol=1e-6
  )
  np.testing.assert_array_equal(
    state.cost.simulations, expected.cost.simulations
  )
  np.testing.assert_array_equal(strategy.select(state), peer.select(expected))


def test_the_same_key_gives_the_same_and_a_batch_is_each_problem_alone():
  world, key = dangerous_graph(), jax.random.key(KEY)
  _, run = with_all_rules()
  together = run(world.params, key, batch(np.arange(BATCH)))
  again = run(world.params, key, batch(np.arange(BATCH)))
  alone = run(world.params, key, batch(np.full(BATCH, 5)))
  for field in ("parent", "value", "num_visits", "is_valid"):
    tree = getattr(together.tree, field)
    np.testing.assert_array_equal(tree, getattr(again.tree, field))
    np.testing.assert_array_equal(tree[5], getattr(alone.tree, field)[2])


def test_a_world_without_answers_ends():
  """Everything drawn is paid for and nothing is chosen."""
  world = random_graph(5, invalid_rate=1.0)
  strategy, run = with_all_rules()
  state = run(world.params, jax.random.key(KEY), batch(np.arange(BATCH)))
  np.testing.assert_array_equal(strategy.select(state), NO_NODE)
  np.testing.assert_array_equal(
    state.cost.generated_tokens, 8 * TOKENS_PER_STEP
  )
  np.testing.assert_array_equal(state.cost.simulations, 0)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"num_revisions": -1}, "num_revisions=-1: give at least 0"),
    ({"patience": 0}, "patience=0: give at least 1, or None"),
    ({"num_starts": 0}, "1 chains at a time of 0 in all"),
    ({"max_tokens": 2}, "max_tokens=2 does not pay for one candidate"),
  ],
)
def test_bad_options_say_what_to_change(options, message):
  with pytest.raises(ValueError, match=message):
    revision(chance_model(1, True), **{"num_revisions": 2, **options})
