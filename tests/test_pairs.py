"""Every strategy with every guidance at every granularity, end to end."""

import functools

import jax
import numpy as np
import pytest

from o1jax import mesh as mesh_lib
from o1jax.combinations import (
  GRANULARITIES,
  REVISIONS,
  STRATEGIES,
  WHOLE,
)
from o1jax.evaluation import strategy_options
from o1jax.search.guidance import GUIDANCES as ON_DEVICE
from o1jax.search.host_guidance import HOST_GUIDANCES
from o1jax.solver import Solver
from policies import ToyTask, tiny_params, tiny_policy

pytestmark = pytest.mark.usefixtures("quick_programs")

EFFORT, BATCH = 4, 4


class Curt(ToyTask):
  """Its verdicts are words that the tiny policy likes."""

  verdict_words = ("1", "2")


TASK = Curt(num_numbers=3, min_number=1, max_number=9)
REWARDS = ("value", "checker")
GUIDANCES = (*ON_DEVICE, *HOST_GUIDANCES)
# Those that leave some candidates to others, here to the value.
IN_COMPANY = ("self_consistency", "semantic_entropy")
NOT_OF_TOKENS = ("speculative_rejection", "treebon")
PROBLEMS = TASK.heldout_problems(BATCH)


def trees():
  """The strategies that have a granularity."""
  return [s for s in STRATEGIES if s not in (*WHOLE, *REVISIONS)]


def all_cells():
  """Every pair of two of: strategy, guidance, granularity, reward."""
  cells = []
  # Trees first, so that they take turns whatever stands between them.
  for i, strategy in enumerate(dict.fromkeys([*trees(), *STRATEGIES])):
    for j, guidance in enumerate(GUIDANCES):
      turn = i + j
      granularity = GRANULARITIES[turn % 3] if strategy in trees() else "step"
      cell = (strategy, guidance, granularity, REWARDS[turn % 2])
      # Instead of what is refused: another reward, another granularity.
      if guidance == "log_prob":
        cell = (*cell[:3], "value")
      if granularity == "token" and strategy in NOT_OF_TOKENS:
        cell = (*cell[:2], "segment", cell[3])
      if cell[:2] == ("mctsr", "log_prob"):
        continue
      # Whole solutions have no rollouts.
      if guidance != "semantic_entropy" or strategy in trees():
        cells.append(cell)
  return cells


def is_refused(a, b):
  """Whether a pair of (factor, level) is refused; see the tests of Solver."""
  return {a, b} in (
    {(1, "log_prob"), (3, "checker")},
    *({(0, name), (2, "token")} for name in NOT_OF_TOKENS),
  )


def is_quick(cell):
  """One cell a guidance; test_battery.py has one a strategy."""
  strategy, guidance, *_ = cell
  turn = (1 + 5 * GUIDANCES.index(guidance)) % len(STRATEGIES)
  return STRATEGIES.index(strategy) == turn


@pytest.mark.parametrize(
  "cell",
  [
    pytest.param(
      cell, id="-".join(cell), marks=[] if is_quick(cell) else pytest.mark.slow
    )
    for cell in all_cells()
  ],
)
def test_a_combination_searches_and_answers_with_its_best(cell):
  strategy, guidance, granularity, reward = cell
  policy = tiny_policy()
  num_candidates = 2 if granularity == "token" else 1
  budget = strategy_options(
    strategy, EFFORT, policy.lengths.num_steps, num_candidates
  )
  if granularity == "token":
    if "num_expansions" in budget:
      budget |= {"num_expansions": 12, "num_simulations": 30}
    if "num_root_blocks" in budget.get("options", {}):
      budget["options"]["num_root_blocks"] = 1
  company = {"value": 1.0} if guidance in IN_COMPANY else {}
  search = Solver(
    policy,
    strategy=strategy,
    batch_size=BATCH,
    mesh=mesh_lib.make_mesh({"data": 1}),
    task=TASK,
    reward=reward,
    guidance={guidance: 1.0} | company,
    num_rollouts=2 if guidance == "semantic_entropy" else 0,
    granularity=granularity,
    **budget,
  )
  found = search(tiny_params(), jax.random.key(1), PROBLEMS)
  assert sum(one.cost["generated_tokens"] for one in found) > 0
  if granularity != "token":
    assert any(s.is_finished for one in found for s in one.solutions)
  for one in found:
    finished = [s for s in one.solutions if s.is_finished]
    if strategy == "majority_vote":
      continue
    best = max((s.outcome for s in finished), default=None)
    assert (one.selected is None) == (best is None)
    if best is not None and strategy != "a_star":
      assert one.solutions[one.selected].outcome == best
    if reward == "checker":
      for solution in finished:
        verdict = TASK.check(one.problem, solution.text)
        assert solution.outcome == float(verdict.is_correct)
    else:
      assert np.isfinite([s.outcome for s in finished]).all()


@functools.cache
def cell_pairs():
  return {
    frozenset((a, b))
    for cell in all_cells()
    for a in enumerate(cell)
    for b in enumerate(cell)
    if a != b
  }


def test_the_cells_cover_all_pairs():
  factors = [STRATEGIES, GUIDANCES, GRANULARITIES, REWARDS]
  for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
    for a in trees() if i == 0 else factors[i]:
      for b in factors[j]:
        if not is_refused((i, a), (j, b)):
          assert frozenset(((i, a), (j, b))) in cell_pairs()
