"""What the studies that train share: a config made anew, updates in calls."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from o1jax import config as config_lib
from o1jax import fields
from o1jax.learning.update import TrainState

# Of the compiled program.
UPDATES_PER_CALL = 10
# What holds where no change says otherwise.
_PLAIN = (
  "learn.reference=none",
  "learn.learning_rate_scale=1.0",
  "learn.play_outcomes=False",
)


def changed_config(config: Any, changes: Sequence[str]) -> Any:
  """The config of a run, its own ways of searching and learning taken out.

  Args:
    config: of the run.
    changes: texts "field=value", for what stands in their place.

  Raises:
    ValueError: the config is of a version without a field.
  """
  changed = config.copy_and_resolve_references()
  with changed.unlocked():
    _empty(changed.learn.rows)
    for parent, _, name in (n.partition(".") for n in fields.EMPTY_GROUPS):
      if parent == "learn":
        _empty(changed.learn[name])
    changed.search.rule = "puct"
    for name in ("rule_options", "options", "cache"):
      _empty(changed.search[name])
  config_lib.apply_overrides(changed.lock(), [*_PLAIN, *changes])
  return changed


def _empty(group: Any) -> None:
  """Takes every field out of a group of a config."""
  for name in list(group):
    del group[name]


def learn(
  update_fn: Callable[[TrainState, Any], tuple[TrainState, Any]],
  state: TrainState,
  batches_fn: Callable[[], Any],
  num_updates: int,
) -> TrainState:
  """Makes updates, `UPDATES_PER_CALL` of them in each call.

  Args:
    update_fn: from `make_updates`.
    state: given up, as an update donates it.
    batches_fn: the batches of the next call.
    num_updates: a multiple of `UPDATES_PER_CALL`.
  """
  finite = []
  for _ in range(num_updates // UPDATES_PER_CALL):
    state, numbers = update_fn(state, batches_fn())
    finite.append(numbers["is_finite"])
  # Such an update is left out, and the next ones may be finite again.
  assert np.all(np.array(jax.device_get(finite)) == 1), (
    "a gradient was not finite"
  )
  return state
