"""Labels of steps in a tree made by hand, and a run that learns them."""

import jax
import numpy as np
import pytest

from o1jax import build, iterate, load, metrics
from o1jax import config as config_lib
from o1jax import mesh as mesh_lib
from o1jax.process_rewards import Process, step_labels, with_step_labels
from o1jax.searched import FoundSolution, Searched
from o1jax.types import LearnerBatch, Problem, Verdict
from policies import tiny_config

# The root has 1 and 2; 1 has 3, 4 (cut off) and 5; 2 has 6; 3 has 7 and 8.
PATHS = {7: (1, 3, 7), 8: (1, 3, 8), 4: (1, 4), 5: (1, 5), 6: (2, 6)}
RIGHT = {7: True, 8: False, 4: True, 5: False, 6: False}
LENGTHS = np.array([0, 2, 1, 3, 1, 1, 2, 1, 2])
LABELS = {
  "soft": {1: 1 / 3, 3: 1 / 2, 7: 1, 8: 0, 5: 0, 2: 0, 6: 0},
  "hard": {1: 1, 3: 1, 7: 1, 8: 0, 5: 0, 2: 0, 6: 0},
}


def make_tree():
  nothing = np.zeros(0, np.float32)
  solutions = [
    FoundSolution(node, "", path, nothing, nothing, nothing, node != 4, 0.0, 0)
    for node, path in PATHS.items()
  ]
  problem = Problem("toy/0", "toy", "", {})
  tree = Searched(problem, solutions, None, {"lengths": LENGTHS}, {})
  return tree, [Verdict(RIGHT[node], "", None) for node in PATHS]


@pytest.mark.parametrize("estimate", LABELS)
def test_labels_of_a_tree_by_hand(estimate):
  assert step_labels(*make_tree(), estimate=estimate) == LABELS[estimate]


def test_labels_stand_at_the_ends_of_steps():
  tree, verdicts = make_tree()
  shape = (4, 10)
  rows = LearnerBatch(
    tokens=np.zeros(shape, np.int32),
    # The third was too long.
    lengths=np.array([9, 10, 0, 6], np.int32),
    policy_weights=np.zeros(shape, np.float32),
    value_targets=np.zeros(shape, np.float32),
    value_weights=np.zeros(shape, np.float32),
  )
  rows = with_step_labels(
    rows, [tree], [verdicts], [3, 3, 3, 3], estimate="soft"
  )
  expected = [{4: 1 / 3, 7: 1 / 2, 8: 1}, {4: 1 / 3, 7: 1 / 2, 9: 0}, {}]
  for row, labels in enumerate([*expected, {3: 0, 5: 0}]):
    assert np.flatnonzero(rows.value_weights[row]).tolist() == [*labels]
    np.testing.assert_allclose(
      rows.value_targets[row, [*labels]], [*labels.values()], rtol=1e-6
    )
  assert rows.value_weights.max() == 1
  # Rows of something else are refused.
  with pytest.raises(AssertionError):
    with_step_labels(
      jax.tree.map(lambda x: np.concatenate([x, x]), rows),
      [tree],
      [verdicts],
      8 * [3],
      estimate="soft",
    )


def test_an_unknown_estimate_is_refused():
  with pytest.raises(ValueError, match="'mean' is unknown; .* soft, hard"):
    Process(estimate="mean")


BINS = "network.value_bins=5"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, quick_programs):
  """Of a run whose values, in bins, learn labels of steps and little else."""
  workdir = tmp_path_factory.mktemp("process") / "run"
  config = tiny_config(
    BINS,
    "mesh.data=1",
    "num_iterations=1",
    "evaluation.strategies=()",
    "learn.rows.process=5",
    "learn.rows.value=0",
    "learn.rows.search=2",
    "learn.rows.expert=4",
    "learn.process.estimate=hard",
    # As many as of learning, whose program it then is.
    "initialize.rows.random_play=63",
  )
  iterate.run(config, workdir)
  return workdir


def test_a_run_learns_labels_of_steps_in_bins(workdir):
  row = metrics.read_jsonl(workdir / "metrics.jsonl")[-1]
  assert row["learn/process"] > 0 == row["learn/process_too_long"]
  # Of an untrained head it is log K.
  assert 0 < row["learn/value_loss"] < 2 * np.log(5)
  trained = load.from_workdir(workdir)
  kernel = trained.params["value_head"]["out"]["kernel"]
  assert kernel.shape == (8, 5) and np.ptp(kernel, axis=0).all()
  hidden = jax.random.normal(jax.random.key(0), (3, 16))
  values = trained.policy.network.value(trained.params, hidden)
  assert values.shape == (3,) and 0 < min(values) < max(values) < 1


@pytest.mark.parametrize("changed", ["network.value_bins=0", None])
def test_a_policy_with_other_bins_is_refused(workdir, tmp_path, changed):
  config = tiny_config(f"initialize.path={workdir}", changed or BINS)
  parts = build.build(config, tmp_path, mesh_lib.make_mesh({"data": 2}))
  fresh = parts.policy.network.init(jax.random.key(7))
  if changed is None:
    load.first_params(str(workdir), parts.policy, fresh)
    return
  with pytest.raises(config_lib.UserError) as raised:
    load.first_params(str(workdir), parts.policy, fresh)
  assert "has a value head of value_bins=5, this config of 0: set " in str(
    raised.value
  )
  assert "network.value_bins=5" in str(raised.value)


@pytest.mark.parametrize(
  "changed, words",
  [
    ("network.value_bins=1", "value_bins=1 must be 0 (one logit), or 2 or"),
    ("learn.process.estimate=mean", "estimate='mean' is unknown"),
    (
      "learn.process.estimate=hard",
      "learn.process.estimate='hard' is not read without such rows",
    ),
    (
      "initialize.rows.process=8",
      "initialize.rows.process: nothing is searched in that phase",
    ),
  ],
)
def test_what_does_not_fit_is_refused_before_anything_compiles(
  changed, words, tmp_path
):
  with pytest.raises(config_lib.UserError) as raised:
    build.build(tiny_config(changed), tmp_path, mesh_lib.make_mesh({"data": 2}))
  assert words in str(raised.value) and "\n" not in str(raised.value)
