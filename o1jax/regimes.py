"""When a run changes the way it learns, as plain data.

Behaviour cloning learns fast and stops early; policy gradients and preferences
go on from where it stopped (section 7.3 of the paper, arXiv 2412.14135: start
warm with cloning, and change over once it no longer helps). A `Schedule` is the
order of such regimes and the rule that leaves one: its accuracy has stopped
rising. `advance` is called once an iteration and is a function of nothing but
its arguments, so a run that is resumed with the saved state changes where an
undisturbed one does.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from o1jax.tasks.task import require_known

# What differences of accuracies are off by, as binary fractions.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The order of the regimes and what ends one.

  Attributes:
    names: the regimes in order.
    known: names that there are; a name outside them is an error.
    patience: evaluations without a gain after which a regime ends.
    min_gain: accuracy, as a share, that counts as a gain over the last one
      that did; small gains add up until they count.
    min_iterations: iterations that a regime lasts at least.
    max_iterations: iterations that a regime lasts at most; 0 for no limit.
    is_cyclic: the first regime follows the last; otherwise the last stays.

  Raises:
    ValueError: a name is unknown or follows itself, or a number is out of its
      range; names the field.
  """

  names: tuple[str, ...]
  known: dataclasses.InitVar[Sequence[str]]
  patience: int = 4
  min_gain: float = 0.01
  min_iterations: int = 1
  max_iterations: int = 0
  is_cyclic: bool = False

  def __post_init__(self, known: Sequence[str]):
    # A tuple, however the config had them.
    object.__setattr__(self, "names", tuple(self.names))
    if not self.names:
      raise ValueError("names=() names no regime: give at least one")
    for name in self.names:
      require_known("regime", name, tuple(known))
    if self.is_cyclic and len(self.names) < 2:
      raise ValueError(
        f"is_cyclic=True needs two regimes, names={self.names} has one"
      )
    followers = self.names[1:] + self.names[: int(self.is_cyclic)]
    for name, follower in zip(self.names, followers, strict=False):
      if name == follower:
        raise ValueError(f"names={self.names}: {name!r} follows itself")
    if self.patience < 1:
      raise ValueError(f"patience={self.patience} must be at least 1")
    if not 0 <= self.min_gain < 1:
      raise ValueError(f"min_gain={self.min_gain} is not in [0, 1)")
    if self.min_iterations < 1:
      raise ValueError(
        f"min_iterations={self.min_iterations} must be at least 1"
      )
    if self.max_iterations and self.max_iterations < self.min_iterations:
      raise ValueError(
        f"max_iterations={self.max_iterations} must be 0 or at least "
        f"min_iterations={self.min_iterations}"
      )

  def name(self, state: "RegimeState") -> str:
    """The regime that the next iteration learns by.

    Raises:
      ValueError: the state is of a schedule with more regimes.
    """
    if not 0 <= state.index < len(self.names):
      raise ValueError(
        f"the saved state is in regime {state.index}, but names={self.names} "
        f"has {len(self.names)}: give the names that the run began with"
      )
    return self.names[state.index]

  def follower(self, state: "RegimeState") -> str | None:
    """The regime after the present one; None where it stays."""
    self.name(state)
    if state.index + 1 < len(self.names):
      return self.names[state.index + 1]
    return self.names[0] if self.is_cyclic else None


@dataclasses.dataclass(frozen=True)
class RegimeState:
  """Where a run stands in its schedule; plain JSON values.

  Attributes:
    index: of the present regime, in `Schedule.names`.
    best: highest accuracy within the regime, None before the first.
    mark: accuracy that a gain is counted from, None before the first.
    since_gain: evaluations since the last gain.
    num_iterations: iterations that the regime has lasted.
  """

  index: int = 0
  best: float | None = None
  mark: float | None = None
  since_gain: int = 0
  num_iterations: int = 0

  def to_dict(self) -> dict[str, Any]:
    """The fields by name, for the meta of a checkpoint."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> "RegimeState":
    """Rebuilds exactly what `to_dict` gave.

    Raises:
      ValueError: the fields are not those of a state.
    """
    fields = {field.name for field in dataclasses.fields(cls)}
    if set(values) != fields:
      raise ValueError(
        f"the saved regime has the fields {sorted(values)}, not "
        f"{sorted(fields)}: it is of another version; start in another workdir"
      )
    return cls(**values)


def advance(
  schedule: Schedule,
  state: RegimeState,
  accuracy: float | None,
  *,
  iteration: int,
) -> tuple[RegimeState, str | None]:
  """Counts one iteration and, where its regime is over, changes to the next.

  A new regime's gains are counted from the accuracy it starts with, not from
  the best of the old one, which is the highest of several noisy numbers.

  Args:
    schedule: the regimes.
    state: before the iteration.
    accuracy: after the iteration, in [0, 1]; None where it was not measured.
    iteration: number of the iteration, for the sentence.

  Returns:
    `(state, reason)`: the state for the next iteration, and one sentence where
    the regime changes, else None.

  Raises:
    ValueError: the accuracy is no number in [0, 1].
  """
  if accuracy is not None and not 0 <= accuracy <= 1:
    raise ValueError(f"accuracy={accuracy} is not in [0, 1]")
  name, follower = schedule.name(state), schedule.follower(state)
  state = dataclasses.replace(state, num_iterations=state.num_iterations + 1)
  if accuracy is not None:
    state = _measured(schedule, state, float(accuracy))
  if follower is None or state.num_iterations < schedule.min_iterations:
    return state, None
  best = "not measured" if state.best is None else f"{state.best:.1%}"
  if state.since_gain >= schedule.patience:
    evaluations = "evaluation" if state.since_gain == 1 else "evaluations"
    cause = (
      f"no gain of {schedule.min_gain:.1%} in {state.since_gain} "
      f"{evaluations}, best {best}"
    )
  elif 0 < schedule.max_iterations <= state.num_iterations:
    cause = f"{state.num_iterations} iterations are its limit, best {best}"
  else:
    return state, None
  last = state.mark if accuracy is None else float(accuracy)
  index = (state.index + 1) % len(schedule.names)
  reason = f"{name} -> {follower} after iteration {iteration}: {cause}"
  return RegimeState(index=index, best=last, mark=last), reason


def _measured(schedule, state, accuracy):
  """The state with one more evaluation."""
  if state.mark is None:
    return dataclasses.replace(state, best=accuracy, mark=accuracy)
  best = max(state.best, accuracy)
  gain = accuracy - state.mark
  if gain > 0 and gain >= schedule.min_gain - _ROUNDING:
    return dataclasses.replace(state, best=best, mark=accuracy, since_gain=0)
  return dataclasses.replace(state, best=best, since_gain=state.since_gain + 1)
