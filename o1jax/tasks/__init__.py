"""Problems with checkable answers, one file a task.

`make_task` builds a task by name. The interface is in `task`.
"""

import dataclasses
from typing import Any

from o1jax.tasks.arithmetic import Arithmetic
from o1jax.tasks.countdown import Countdown
from o1jax.tasks.game24 import Game24
from o1jax.tasks.task import (
  SPLITS,
  Featured,
  Task,
  Unsolvable,
  require_known,
  success_rate,
)

TASKS = {task.name: task for task in (Countdown, Game24, Arithmetic)}

__all__ = [
  "SPLITS",
  "TASKS",
  "Featured",
  "Task",
  "Unsolvable",
  "make_task",
  "success_rate",
]


def make_task(name: str, **options: Any) -> Task:
  """Builds the task of that name.

  Args:
    name: a key of `TASKS`.
    **options: the fields of its class; those left out keep their defaults.

  Raises:
    ValueError: an unknown name or option (with the nearest known one), an
      option of the wrong type, or values that the task refuses.
  """
  require_known("task", name, sorted(TASKS))
  fields = {field.name: field for field in dataclasses.fields(TASKS[name])}
  for option, value in options.items():
    require_known(f"option of task {name}", option, sorted(fields))
    _require_type(name, option, value, fields[option].type)
  return TASKS[name](**options)


def _require_type(name: str, option: str, value: Any, wanted: type) -> None:
  allowed = (int, float) if wanted is float else (wanted,)
  is_bool = isinstance(value, bool)
  if not isinstance(value, allowed) or is_bool != (wanted is bool):
    raise ValueError(
      f"{name}.{option}={value!r} is not of type {wanted.__name__}"
    )
