"""The study of ways to learn: its table by hand, a cell on a tiny policy."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from o1jax import regime_parts
from o1jax.learning.optimizer import make_optimizer
from o1jax.studies import learning
from o1jax.studies.context import Context
from o1jax.studies.study import Measured
from policies import (
  tiny_context,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

CELL = {
  "name": "cloning_then_ppo",
  "seed": 0,
  "num_problems": 4,
  "num_draws": 4,
  "num_rows": 4,
  "num_updates": 20,
  "num_evaluations": 2,
}


@pytest.fixture(scope="module")
def context():
  with contextlib.closing(tiny_context()) as made:
    yield made


@pytest.mark.parametrize("method", sorted(learning.METHODS))
def test_every_method_is_a_config_that_builds(context, method):
  trained = context.trained
  config = learning.method_config(context, CELL, method)
  regimes = regime_parts.make_regimes(
    {method: config},
    trained.task,
    trained.policy,
    make_optimizer(learning_rate=1e-3),
    trained.mesh,
  )
  rows = {name: count for name, count in config.learn.rows.items() if count}
  assert sum(rows.values()) == (2 if method == "dpo" else 4) and len(rows) == 1
  assert config.search.num_candidates == 4 and len(regimes) == 1
  is_tree = config.search.strategy == "mcts"
  assert is_tree == (method == "alphazero")
  # Nothing of the run's own mix or options is left.
  assert config.learn.value_coefficient == 0.25


def test_a_tree_gets_the_tokens_of_the_draws(context):
  config = learning.method_config(context, CELL, "alphazero")
  tokens = context.tokens_per_solution(4) * 4
  assert config.search.options.max_tokens == round(tokens)


@pytest.fixture
def few_gradients(monkeypatch):
  monkeypatch.setattr(learning, "NUM_GRADIENTS", 6)


def test_a_cell_learns_in_rounds_from_the_policys_own_params(
  context, few_gradients
):
  before = jax.device_get(context.trained.params)
  result = learning.measure(context, CELL)
  assert result["updates"] == [0, 10, 20, 30, 40]
  assert np.all(np.diff(result["seconds"]) > 0) and result["seconds"][0] == 0
  assert np.shape(result["correct"]) == (5, 4)
  assert 0 < result["used_share"] <= 1
  assert result["bytes"] > 0 and 0 < result["noise"] < np.inf
  assert result["tokens"] > 0
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get(context.trained.params),
    before,
  )


def measured(name, seed, correct, seconds=2.0, noise=1.0):
  cell = CELL | {"name": name, "seed": seed}
  count = len(correct)
  return Measured(
    cell,
    {
      "updates": list(range(count)),
      "seconds": np.linspace(0, seconds, count).tolist(),
      "correct": correct,
      "noise": noise,
      "bytes": 3 * 2**20,
      "used_share": 0.5,
      "tokens": 10.0,
    },
  )


def test_the_table_pools_seeds_by_problem():
  curve = [[0, 0], [1, 0], [1, 0], [1, 1], [1, 1]]
  other = [[0, 0], [0, 0], [0, 0], [1, 0], [1, 0]]
  cells = [
    measured("ppo", 0, curve, seconds=2.0, noise=1.0),
    measured("ppo", 1, other, seconds=4.0, noise=5.0),
    measured("dpo", 0, other),
  ]
  ppo, dpo = learning.summarize(cells)
  assert (ppo.name, ppo.num_seeds, dpo.num_seeds) == ("ppo", 2, 1)
  assert ppo.first[0] == 0.25 and ppo.last[0] == 0.75 and ppo.gain[0] == 0.75
  assert (ppo.seconds, ppo.noise, ppo.megabytes, ppo.used) == (3, 3, 3, 0.5)
  assert dpo.first[0] == 0 and dpo.gain[0] == 0.5
  lines = learning.make_table(cells).splitlines()
  assert len(lines) == 4 and "75.0%" in lines[2] and "50%" in lines[2]
  assert learning.draw(cells) is not None and learning.draw([]) is None


def test_a_config_without_the_fields_is_refused_before_anything(context):
  config = context.trained.config.copy_and_resolve_references()
  with config.unlocked():
    del config.learn.reference
  old = dataclasses.replace(context.trained, config=config.lock())
  other = Context(old, context.problems)
  with pytest.raises(ValueError, match=r"learn\.reference"):
    learning.check(other, CELL | {"name": "dpo"})
