"""A run that begins with cloning and goes on with policy gradients."""

import jax
import numpy as np
import pytest

from o1jax import iterate, load, metrics
from o1jax.checkpoint import Checkpoints
from policies import tiny_config, what_compiles

pytestmark = pytest.mark.usefixtures("quick_programs")

RL = (
  "learn.rows.policy_gradient=8",
  "learn.rows.hindsight_play=0",
  "learn.reference=start",
  "learn.learning_rate_scale=0.5",
  "learn.advantages.baseline=moving",
  "learn.advantages.truncated=wrong",
  # Rewards that differ, although next to nothing is right.
  "learn.advantages.length_penalty=0.5",
  "learn.policy_gradient.kl_coefficient=0.1",
)
SWITCH = 1  # the iteration after which it changes


def make_config():
  return tiny_config(
    "initialize.num_iterations=0",
    "evaluation.strategies=()",
    "evaluation.interval=0",
    "search.strategy=best_of_n",
    "search.num_candidates=4",
    "learn.average_decay=0.9",
    "learn.optimizer.schedule=constant",
    "learn.optimizer.warmup_updates=1",
    "checkpoint.keep_every=1",
    "regimes.names=('cloning','rl')",
    "regimes.changes.cloning=()",
    f"regimes.changes.rl={RL!r}",
    "regimes.patience=1",
    "regimes.min_gain=0.9",
  )


class Killed(BaseException):
  """No error: nothing may take it for one."""


def rows_of(workdir):
  """Rows without the fields that are times."""
  return [
    {name: value for name, value in row.items() if "seconds" not in name}
    for row in metrics.read_jsonl(workdir / "metrics.jsonl")
  ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """Of a run from beginning to end: workdir, last state, what compiled."""
  workdir = tmp_path_factory.mktemp("regimes") / "undisturbed"
  with what_compiles("learn") as compiled:
    state = jax.device_get(iterate.run(make_config(), workdir))
  return workdir, state, compiled


def test_the_reason_of_the_change_is_written(undisturbed):
  rows = rows_of(undisturbed[0])
  assert [row["regime"] for row in rows] == [0, 0, 1, 1]
  changes = {
    row["iteration"]: row["regime_change"]
    for row in rows
    if "regime_change" in row
  }
  (reason,) = changes.values()
  assert set(changes) == {SWITCH}
  assert reason.startswith(
    "cloning -> rl after iteration 1: no gain of 90.0% in 1 evaluation, best "
  )


def test_each_regime_learns_from_its_own_rows(undisturbed):
  rows = metrics.read_jsonl(undisturbed[0] / "metrics.jsonl")
  cloning, rl = rows[: SWITCH + 1], rows[SWITCH + 1 :]
  for row in cloning:
    assert "learn/policy_loss" in row and "learn/draws" not in row
    assert "learn/policy_gradient_loss" not in row
    assert row["learn/learning_rate"] == pytest.approx(0.02)
  for row in rl:
    # Of six problems four draws each.
    assert row["learn/draws"] == row["learn/draws_kept"] == 24
    for name in ("policy_gradient", "kl", "policy", "value"):
      assert np.isfinite(row[f"learn/{name}_loss"])
    assert row["learn/kl_to_reference"] > 0
    assert row["learn/log_prob_gap"] < 1e-4
    assert row["learn/max_ratio"] > 1 > row["learn/min_ratio"] > 0
    assert row["learn/learning_rate"] == pytest.approx(0.01)
  # Each regime compiles in its first iteration, and never again.
  assert undisturbed[2] == [True, False, True, False]


def test_the_reference_is_the_policy_that_the_regime_began_with(undisturbed):
  workdir, state, _ = undisturbed
  assert np.any(
    state.reference_params["trunk"]["embedding"]
    != state.average_params["trunk"]["embedding"]
  )
  trained = load.from_workdir(workdir, SWITCH)
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get(trained.params),
    state.reference_params,
  )


def test_killed_after_the_change_it_ends_with_the_same_bits(
  undisturbed, tmp_path, monkeypatch
):
  workdir, expected, _ = undisturbed
  checkpoint = iterate.RunWriter.checkpoint
  kept = []

  def killed(writer, done, *rest):
    checkpoint(writer, done, *rest)
    kept.append(done)
    # Where the regime is new, and once more where it has a past.
    if done.iteration in (SWITCH, SWITCH + 1):
      raise Killed

  monkeypatch.setattr(iterate.RunWriter, "checkpoint", killed)
  other = tmp_path / "run"
  for _ in range(2):
    with pytest.raises(Killed):
      iterate.run(make_config(), other)
  state = jax.device_get(iterate.run(make_config(), other))
  assert [done.iteration for done in kept] == [0, 1, 2, 3]
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  assert rows_of(other) == rows_of(workdir)
  # What is not in the state matters, and came back.
  meta = [
    Checkpoints(other / "checkpoints", read_only=True)
    .restore(step, kept[-1].state)
    .meta
    for step in (SWITCH, SWITCH + 2)
  ]
  assert [one["regime"]["index"] for one in meta] == [1, 1]
  assert [one["regime"]["num_iterations"] for one in meta] == [0, 2]
  baselines = [one["moving_baseline"] for one in meta]
  assert baselines[0]["weight"] == 0
  assert baselines[1]["weight"] == pytest.approx(0.19)
  assert baselines[1]["reward_sum"] < 0
