"""Selection rules by their formulas; whole searches are in test_mcts.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mctx._src import seq_halving

from o1jax.search import selection
from o1jax.search.tree import Candidates
from oracles import halving


def candidates(num_visits, q_values, prior, is_valid=None) -> Candidates:
  num_visits = jnp.array(num_visits)
  if is_valid is None:
    is_valid = np.ones(num_visits.shape, bool)
  return Candidates(
    num_visits=num_visits,
    q_values=jnp.array(q_values),
    prior_logits=jnp.log(jnp.array(prior)),
    is_valid=jnp.array(is_valid),
    node_visits=jnp.sum(num_visits) + 1,
    node_mean=jnp.array(0.5),
    node_value=jnp.array(0.4),
  )


@pytest.mark.parametrize("num_considered", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_simulations", [1, 7, 32, 50])
def test_sequential_halving_takes_turns_as_mctx_does(
  num_considered, num_simulations
):
  turns = selection.halving_visits(num_considered, num_simulations)
  expected = seq_halving.get_sequence_of_considered_visits(
    num_considered, num_simulations
  )
  assert turns == list(expected)
  assert turns == halving(num_considered, num_simulations)


def test_puct_by_hand():
  seen = candidates([3, 1, 0], [0.9, 0.1, 0.0], [0.5, 0.3, 0.2])
  scores = selection.puct_scores(
    seen, exploration_init=1.25, exploration_base=19652.0
  )
  rate = np.sqrt(5) * (1.25 + np.log((5 + 19653) / 19652))
  expected = [
    1.0 + rate * 0.5 / 4,
    0.0 + rate * 0.3 / 2,
    0.0 + rate * 0.2,
  ]
  np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_uct_visits_each_once_by_prior_then_by_bound():
  new = candidates([2, 0, 0], [0.9, 0.0, 0.0], [0.5, 0.1, 0.4])
  scores = selection.uct_scores(new, exploration=1.0)
  assert int(selection.choose(scores, new.is_valid)) == 2
  # An invalid candidate is never visited and holds nobody up.
  only = candidates(
    [2, 1, 0], [0.5, 0.4, 0.0], [0.5, 0.1, 0.4], [True, True, False]
  )
  scores = selection.uct_scores(only, exploration=1.0)
  bonus = np.sqrt(np.log(3) / np.array([2, 1]))
  np.testing.assert_allclose(scores[:2], [0.5, 0.4] + bonus, rtol=1e-5)
  assert int(selection.choose(scores, only.is_valid)) == 1


def test_ties_go_to_the_first_valid_candidate():
  is_valid = jnp.array([False, True, True])
  assert int(selection.choose(jnp.zeros(3), is_valid)) == 1


def test_dirichlet_noise_mixes_into_the_valid_prior():
  rule = selection.make_rule("puct", 3, 8, {"dirichlet_fraction": 0.25})
  noise = rule.draw_noise(jax.random.key(0), jnp.float32)
  np.testing.assert_allclose(np.sum(np.asarray(noise)), 1.0, rtol=1e-5)
  is_valid = jnp.array([True, False, True])
  logits = jnp.log(jnp.array([0.2, 0.5, 0.2])) + 3.0
  mixed = np.exp(np.asarray(rule.mix_prior(logits, is_valid, noise)))
  kept = np.asarray(noise)[[0, 2]]
  expected = 0.75 * 0.5 + 0.25 * kept / np.sum(kept)
  np.testing.assert_allclose(mixed[[0, 2]], expected, rtol=1e-5)
  assert mixed[1] < 1e-30


def test_completed_values_prefer_what_search_found_good():
  seen = candidates([4, 4, 0], [0.9, 0.1, 0.0], [0.4, 0.4, 0.2])
  completed, total = selection.completed_q_values(
    seen, value_scale=0.1, visits_init=50.0
  )
  mixed = (0.4 + 8 * 0.5) / 9
  expected = (50 + 4) * 0.1 * np.array([1.0, 0.0, (mixed - 0.1) / 0.8])
  np.testing.assert_allclose(completed, expected, rtol=1e-5, atol=1e-6)
  assert float(total) == 8.0
