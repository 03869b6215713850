"""Regimes change where a plain reading of the rule says so."""

import json

import pytest

from o1jax.regimes import RegimeState, Schedule, advance

KNOWN = ("cloning", "policy_gradient", "dpo")


def make_schedule(names=("cloning", "policy_gradient"), **options):
  return Schedule(names, KNOWN, **options)


def run(schedule, accuracies, state=None, first=0):
  """Regime of each iteration, the reasons, and the state at the end."""
  state, names, reasons = state or RegimeState(), [], []
  for iteration, accuracy in enumerate(accuracies, first):
    names.append(schedule.name(state))
    state, reason = advance(schedule, state, accuracy, iteration=iteration)
    reasons += [reason] if reason else []
  return names, reasons, state


def test_a_regime_ends_once_accuracy_stops_rising():
  schedule = make_schedule(patience=3)
  accuracies = [0.1, 0.3, 0.5, 0.509, 0.4, 0.5, 0.6, 0.1, 0.1, 0.1, 0.1]
  names, reasons, state = run(schedule, accuracies, first=7)
  assert names == ["cloning"] * 6 + ["policy_gradient"] * 5
  assert reasons == [
    "cloning -> policy_gradient after iteration 12: no gain of 1.0% in 3 "
    "evaluations, best 50.9%"
  ]
  # The last regime stays, however long nothing is gained.
  assert state == RegimeState(1, 0.6, 0.6, since_gain=4, num_iterations=5)


def test_small_gains_add_up():
  schedule = make_schedule(patience=2, min_gain=0.03)
  rising = [0.50, 0.52, 0.54, 0.56, 0.58]
  assert run(schedule, rising)[2].index == 0
  assert run(schedule, [0.50, 0.51, 0.52])[2].index == 1


def test_an_equal_accuracy_is_no_gain_and_a_gain_may_be_just_the_least():
  assert run(make_schedule(patience=1, min_gain=0.0), [0.5, 0.5])[1]
  # 0.57 - 0.56 is a little less than 0.01 in binary.
  assert not run(make_schedule(patience=1), [0.56, 0.57])[1]


def test_cycles_return_to_the_first():
  schedule = make_schedule(KNOWN, patience=1, is_cyclic=True)
  names, reasons, _ = run(schedule, [0.5] * 6)
  # The first evaluation of all has nothing to be compared with.
  assert names == ["cloning", *KNOWN, *KNOWN[:2]]
  assert [reason.partition(" after")[0] for reason in reasons] == [
    "cloning -> policy_gradient",
    "policy_gradient -> dpo",
    "dpo -> cloning",
    "cloning -> policy_gradient",
    "policy_gradient -> dpo",
  ]
  assert "in 1 evaluation, best" in reasons[0]


def test_gains_of_a_new_regime_count_from_where_it_starts():
  schedule = make_schedule(KNOWN, patience=2)
  accuracies = [0.7, 0.6, 0.5, 0.55, 0.6, 0.65]
  names, _, state = run(schedule, accuracies)
  assert names == ["cloning"] * 3 + ["policy_gradient"] * 3
  assert state.best == 0.65 and state.since_gain == 0


def test_a_regime_lasts_as_long_as_it_must_and_may():
  flat, rising = [0.5] * 9, [i / 10 for i in range(9)]
  names, _, _ = run(make_schedule(patience=1, min_iterations=5), flat)
  assert names.count("cloning") == 5
  names, reasons, _ = run(make_schedule(max_iterations=4), rising)
  assert names.count("cloning") == 4
  assert reasons == [
    "cloning -> policy_gradient after iteration 3: 4 iterations are its "
    "limit, best 30.0%"
  ]


def test_patience_counts_evaluations_not_iterations():
  schedule = make_schedule(patience=2, max_iterations=20)
  unmeasured = [0.5, None, None, 0.5, None, None]
  assert run(schedule, unmeasured)[0] == ["cloning"] * 6
  assert run(schedule, [*unmeasured, 0.5])[2].index == 1
  _, reasons, state = run(make_schedule(max_iterations=2), [None, None])
  assert reasons[0].endswith("best not measured") and state.mark is None


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_resumed_run_changes_where_an_undisturbed_one_does(cut):
  schedule = make_schedule(KNOWN, patience=2, is_cyclic=True)
  accuracies = [0.1, 1 / 3, 0.2, 0.3, 2 / 3, 0.4, 0.5, 0.1]
  names, reasons, end = run(schedule, accuracies)
  assert len(reasons) > 1
  first, told, state = run(schedule, accuracies[:cut])
  state = RegimeState.from_dict(json.loads(json.dumps(state.to_dict())))
  rest, more, state = run(schedule, accuracies[cut:], state, first=cut)
  assert (first + rest, told + more, state) == (names, reasons, end)


def test_one_regime_never_changes():
  names, reasons, _ = run(make_schedule(["dpo"], patience=1), [0.5] * 5)
  assert names == ["dpo"] * 5 and not reasons


@pytest.mark.parametrize(
  "options, message",
  [
    ({"names": ("cloning", "dpq")}, "unknown regime 'dpq': did you mean 'dpo'"),
    ({"names": ()}, "names no regime"),
    ({"names": ("dpo", "dpo")}, "'dpo' follows itself"),
    ({"names": ("dpo", "cloning", "dpo"), "is_cyclic": True}, "follows itself"),
    ({"names": ("dpo",), "is_cyclic": True}, "is_cyclic=True needs two"),
    ({"patience": 0}, "patience=0 must be at least 1"),
    ({"min_gain": -0.1}, r"min_gain=-0.1 is not in \[0, 1\)"),
    ({"min_gain": float("nan")}, "min_gain=nan"),
    ({"min_iterations": 0}, "min_iterations=0 must be at least 1"),
    ({"min_iterations": 3, "max_iterations": 2}, "max_iterations=2 must be 0"),
    ({"max_iterations": -1}, "max_iterations=-1 must be 0"),
  ],
)
def test_a_bad_schedule_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    make_schedule(**options)


def test_bad_states_and_accuracies_are_refused():
  schedule = make_schedule()
  with pytest.raises(ValueError, match="is in regime 2, but names="):
    advance(schedule, RegimeState(index=2), 0.5, iteration=0)
  for accuracy in (float("nan"), 71.3, -0.1):
    with pytest.raises(ValueError, match=f"accuracy={accuracy} is not in"):
      advance(schedule, RegimeState(), accuracy, iteration=0)
  with pytest.raises(ValueError, match="start in another workdir"):
    RegimeState.from_dict({"index": 0})
