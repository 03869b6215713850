"""Every strategy beside best-of-N with the same tokens: won here, lost there.

What best-of-N solves is computed exactly from the drawn world; a strategy's
share is the mean over 64 seeds (of which nothing depends where a world shows
its candidates in order). A strategy that is best-of-N under another name gains
nothing, which the peers show.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from o1jax.search.strategies import STRATEGIES
from o1jax.search.tree import NO_NODE, read, scores
from o1jax.search.voting import vote
from oracles import expected_best_of_n
from worlds import (
  TOKENS_PER_STEP,
  World,
  chain_search,
  corridors,
  garden_path,
  halving_tree,
  ladder,
  polls,
  problems,
  revisable,
  signpost,
  table_search,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

NUM_SEEDS = 64
LEAST_GAIN = 0.15
steps_in_order = functools.partial(table_search, 2)
answers = functools.partial(chain_search, are_answers=True)


def in_rows(num_rows, **options):
  """Best-of-N sampled step by step."""
  return chain_search(
    "speculative_rejection", num_rows=num_rows, rejection_rate=0.0, **options
  )


@dataclasses.dataclass(frozen=True)
class Match:
  """A world to win in and one to lose in against N whole solutions.

  Attributes:
    wins: makes the world, and so does `loses`.
    num_steps: of a solution.
    num_solutions: N.
    peer: best-of-N as a search.
  """

  wins: Callable[[], World]
  loses: Callable[[], World]
  num_steps: int
  num_solutions: int
  peer: Callable[[], Any]


of = functools.partial
SIGNS = of(Match, of(signpost), of(garden_path), 3)
TWO_SIGNS = SIGNS(2, of(in_rows, 2, capacity=7))
FOUR_SIGNS = SIGNS(4, of(in_rows, 4, capacity=13))
LEAVES = Match(
  of(halving_tree, lambda leaf: leaf == 21, telling=True),
  of(halving_tree, lambda leaf: leaf < 16, telling=False),
  5,
  6,
  of(in_rows, 6, capacity=31),
)
IN_CORRIDORS = dict(capacity=40, max_tokens=4 * 8 * TOKENS_PER_STEP + 1)
CORRIDORS = Match(
  of(corridors, 0.8, 0.2),
  of(corridors, 0.2, 0.8),
  8,
  4,
  of(in_rows, 4, num_starts=4, **IN_CORRIDORS),
)
FIXES = Match(
  of(revisable, 0.5),
  of(revisable, 0.0),
  1,
  4,
  of(answers, "best_of_n", num_candidates=4),
)
CLIMBS = Match(
  of(ladder),
  of(revisable, 0.0, wrong=0.5),
  1,
  16,
  of(answers, "best_of_n", num_candidates=16),
)
TREE = dict(capacity=31, max_tokens=6 * 5 * TOKENS_PER_STEP)
MCTS = of(steps_in_order, "mcts", num_simulations=60, **TREE)
LAYERS = dict(max_depth=3)
CASES = {
  "beam": (TWO_SIGNS, of(steps_in_order, "beam", width=1, **LAYERS)),
  "breadth_first": (
    TWO_SIGNS,
    of(steps_in_order, "breadth_first", width=1, **LAYERS),
  ),
  "dvts": (
    FOUR_SIGNS,
    of(steps_in_order, "beam", width=2, num_subtrees=2, **LAYERS),
  ),
  "treebon": (TWO_SIGNS, of(steps_in_order, "treebon", num_roots=2, **LAYERS)),
  "best_first": (TWO_SIGNS, of(steps_in_order, "best_first", num_expansions=3)),
  "a_star": (
    TWO_SIGNS,
    of(steps_in_order, "a_star", num_expansions=3, cost_weight=0.1),
  ),
  "depth_first": (
    TWO_SIGNS,
    of(steps_in_order, "depth_first", num_expansions=3),
  ),
  "mcts": (LEAVES, MCTS),
  "mcts-uct": (LEAVES, of(MCTS, rule="uct")),
  "mcts-gumbel": (LEAVES, of(MCTS, rule="gumbel")),
  "reroot": (
    LEAVES,
    of(steps_in_order, "reroot", num_simulations=6, select_by="visits", **TREE),
  ),
  "speculative_rejection": (
    CORRIDORS,
    of(
      chain_search,
      "speculative_rejection",
      num_rows=6,
      num_starts=12,
      rejection_rate=0.5,
      **IN_CORRIDORS,
    ),
  ),
  "revision": (FIXES, of(answers, "revision", num_revisions=3)),
  "mctsr": (CLIMBS, of(answers, "mctsr", num_simulations=16)),
}
MATCHES = (TWO_SIGNS, LEAVES, CORRIDORS, FIXES, CLIMBS)


def run(search, world: World, num_seeds: int = NUM_SEEDS):
  """Searches from state 0 for every seed; the state and the chosen nodes."""
  strategy, program = search
  batch = problems(np.zeros(num_seeds), seeds=np.arange(num_seeds))
  state = program(world.params, jax.random.key(0), batch)
  return state, strategy.select(state)


def gain(search, world: World, match: Match) -> float:
  """Share of seeds solved, less that of as many tokens of best-of-N."""
  state, chosen = run(search, world)
  most = match.num_solutions * match.num_steps * TOKENS_PER_STEP
  assert np.max(state.cost.generated_tokens) <= most
  is_solved = read(scores(state.tree), chosen) == 1.0
  share = np.mean(np.asarray(is_solved & (chosen != NO_NODE)))
  return float(share) - chance_of_best_of_n(world, match)


def chance_of_best_of_n(world: World, match: Match) -> float:
  """Probability that one of N solutions drawn by the prior has outcome 1."""
  is_terminal = world.is_terminal | (match.num_steps == 1)
  is_solved = (world.outcome == 1.0).astype(float)
  world = dataclasses.replace(world, outcome=is_solved, is_terminal=is_terminal)
  return expected_best_of_n(world, 0, match.num_solutions)


@pytest.mark.parametrize("name", CASES)
def test_it_wins_in_one_world_and_loses_in_another(name):
  match, make = CASES[name]
  assert gain(make(), match.wins(), match) > LEAST_GAIN
  assert gain(make(), match.loses(), match) < -LEAST_GAIN


@pytest.mark.parametrize("match", MATCHES)
def test_best_of_n_itself_does_neither(match):
  """Its share is that of the exact chance, as far as 64 seeds show."""
  for world in (match.wins(), match.loses()):
    assert abs(gain(match.peer(), world, match)) < LEAST_GAIN


def right_share(chosen_states) -> float:
  return float(np.mean(np.asarray(chosen_states) == 1))


def best_of_polls(world: World, num_solutions: int) -> float:
  """Probability that the answer of highest score among so many is right."""
  prob = np.exp(world.prior_logits[0])
  if world.outcome[0, 0] > world.outcome[0, 1]:
    return 1 - prob[1] ** num_solutions
  return prob[0] ** num_solutions


def test_a_vote_wins_where_scores_mislead_and_loses_where_most_are_wrong():
  """Five answers, of which the vote asks each and best-of-N one."""
  gains = []
  for world in (polls(0.6, 0.5), polls(0.4, 0.9)):
    state, chosen = run(chain_search("best_of_n", num_candidates=5), world, 256)
    drawn = np.asarray(state.node_state)[:, 1:6]
    voted = np.array([int(vote(list(map(str, row)))) for row in drawn])
    exact = best_of_polls(world, 5)
    plain = np.take_along_axis(drawn, np.asarray(chosen)[:, None] - 1, 1)[:, 0]
    assert abs(right_share(plain) - exact) < LEAST_GAIN
    gains.append(right_share(voted) - exact)
  assert gains[0] > LEAST_GAIN and gains[1] < -LEAST_GAIN, gains


def test_greedy_wins_where_the_likeliest_is_right_and_loses_where_not():
  """One answer: the likeliest, as of temperature 0, or one that is drawn."""
  gains = []
  for world in (polls(0.6, 0.5), polls(0.4, 0.9)):
    exact = best_of_polls(world, 1)
    plain, _ = run(chain_search("greedy"), world, 256)
    assert abs(right_share(plain.node_state[:, 1]) - exact) < LEAST_GAIN
    cold = dataclasses.replace(world, prior_logits=1e6 * world.prior_logits)
    state, _ = run(chain_search("greedy"), cold, 256)
    gains.append(right_share(state.node_state[:, 1]) - exact)
  assert gains[0] > LEAST_GAIN and gains[1] < -LEAST_GAIN, gains


def test_no_strategy_is_left_out():
  names = {name.split("-")[0] for name in CASES} - {"dvts"}
  assert names | {"best_of_n", "greedy"} == set(STRATEGIES)
