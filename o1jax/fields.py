"""The fields of a config: their types, the least they may be, what is missing.

Groups of fields are the arguments of functions and dataclasses, so that a field
is named, typed and explained in one place. Everything else is listed here.
"""

import inspect
from typing import Any

from o1jax import config as config_lib
from o1jax.config import user_input
from o1jax.corpora import TextFiles
from o1jax.encoding import Lengths
from o1jax.evaluation import Evaluator
from o1jax.experience import Experience
from o1jax.health import Limits
from o1jax.learning.objective import PolicyGradient, Preference
from o1jax.learning.optimizer import make_optimizer
from o1jax.policy.config import TransformerConfig
from o1jax.policy.tokenizer import train_tokenizer
from o1jax.process_rewards import Process
from o1jax.question_generator import QuestionGenerator
from o1jax.regimes import Schedule
from o1jax.rollouts import Advantages, Pairs
from o1jax.solver import Solver

# Groups of fields that are the arguments of a function, and which of its
# arguments are no fields.
GROUPS = {
  "tokenizer": (train_tokenizer, {"texts"}),
  "lengths": (Lengths, set()),
  "network": (TransformerConfig, {"vocab_size"}),
  "search": (
    Solver,
    {
      "policy",
      "mesh",
      "task",
      "steps_from_host",
      "guidance_functions",
      "text_functions",
      "classes_fn",
      "draft",
    },
  ),
  "learn.optimizer": (make_optimizer, {"total_updates", "mesh"}),
  "learn.advantages": (Advantages, set()),
  "learn.policy_gradient": (PolicyGradient, set()),
  "learn.preference": (Preference, set()),
  "learn.pairs": (Pairs, set()),
  "learn.process": (Process, set()),
  "learn.replay": (
    Experience.sample,
    {"self", "rng", "n", "pool", "iteration"},
  ),
  "texts": (TextFiles, set()),
  "questions": (QuestionGenerator, {"task"}),
  "health": (Limits, set()),
  "regimes": (Schedule, {"known"}),
  "experience": (Experience, set()),
  "evaluation": (Evaluator, {"policy", "task", "mesh"}),
}
# Groups whose fields the task, the rows and the rule know.
OPEN_GROUPS = (
  "task.options.",
  "initialize.rows.",
  "search.rule_options.",
  "search.options.",
  "search.cache.",
  "search.guidance.",
  "learn.rows.",
  "regimes.changes.",
  "evaluation.rule_options.",
  "evaluation.options.",
  "evaluation.guidance.",
)
# Groups without a field that has to be there; the groups have to.
EMPTY_GROUPS = (
  "learn.advantages",
  "learn.policy_gradient",
  "learn.preference",
  "learn.pairs",
  "learn.process",
  "learn.replay",
  "health",
)
# All other fields, and numbers of the groups above: the least that each may
# be. A field has the type of the value here.
LEAST = {
  "seed": 0,
  "num_iterations": 0,
  "task.name": "",
  "tokenizer.num_texts": 1,
  "lengths.prompt_tokens": 1,
  "lengths.step_tokens": 1,
  "lengths.num_steps": 1,
  "lengths.row_tokens": 1,
  "mesh.num_cpu_devices": 1,
  "mesh.data": -1,
  "mesh.fsdp": -1,
  "mesh.tensor": -1,
  "initialize.path": "",
  "initialize.num_iterations": 0,
  "initialize.num_updates": 1,
  "search.num_problems": 1,
  "search.batch_size": 1,
  "search.num_candidates": 1,
  "search.num_expansions": 1,
  "search.num_simulations": 1,
  "search.num_parallel_leaves": 1,
  "search.num_workers": 0,
  "search.num_rollouts": 0,
  "search.num_revisions": 0,
  "learn.num_updates": 1,
  "learn.updates_per_call": 1,
  "learn.num_microbatches": 1,
  "learn.value_coefficient": 0.0,
  "learn.play_outcomes": False,
  "learn.average_decay": 0.0,
  "learn.learning_rate_scale": 0.0,
  "learn.reference": "",
  "learn.optimizer.warmup_updates": 0,
  "regimes.names": (),
  "texts.documents": "",
  "texts.instructions": (),
  "questions.source": "",
  "metrics.wandb_project": "",
  "experience.path": "",
  "evaluation.num_problems": 1,
  "evaluation.batch_size": 1,
  "evaluation.interval": 0,
  "evaluation.strategies": (),
  "evaluation.efforts": (),
  "evaluation.num_candidates": 1,
  "checkpoint.interval": 1,
  "checkpoint.keep_every": 0,
  "checkpoint.num_samples": 0,
}
TYPE_NAMES = {
  bool: "true or false",
  int: "a whole number",
  float: "a number",
  str: "a text",
  tuple: "a tuple",
}


def check_fields(config: Any) -> None:
  """Checks that the config has every field, and no other, in its range.

  Raises:
    UserError: a field is unknown, missing, of another type or too small.
  """
  given = config_lib.flatten(config)
  types = {name: type(least) for name, least in LEAST.items()}
  required = set(LEAST)
  for group, (function, others) in GROUPS.items():
    for argument in inspect.signature(function).parameters.values():
      name = f"{group}.{argument.name}"
      if argument.name in others or name in types:
        continue
      types[name] = argument.annotation
      if argument.default is argument.empty:
        required.add(name)
  with user_input():
    for name, value in given.items():
      if not name.startswith(OPEN_GROUPS):
        if name not in types:
          near = config_lib.nearest(list(types), name)
          raise ValueError(f"unknown config field {name}{near}")
        _check_value(name, value, types[name])
      elif ".rows." in name:
        _check_value(name, value, int)
    for name in sorted(required - set(given)):
      raise ValueError(f"the config lacks the field {name}")
    for name in OPEN_GROUPS:
      parent, field, _ = name.split(".")
      is_optional = f"{parent}.{field}" in types
      if field not in config[parent] and not is_optional:
        raise ValueError(f"the config lacks the group {parent}.{field}")
    for name in EMPTY_GROUPS:
      group = config
      for word in name.split("."):
        group = group[word] if word in group else None
      if group is None:
        raise ValueError(f"the config lacks the group {name}")
    if not config.num_iterations + config.initialize.num_iterations:
      raise ValueError(
        "num_iterations=0 and initialize.num_iterations=0: there is nothing "
        "to do, raise one of them"
      )


def _check_value(name: str, value: Any, wanted: Any) -> None:
  """Raises ValueError where a field has another type or is too small."""
  if wanted in TYPE_NAMES:
    allowed = (int, float) if wanted is float else wanted
    is_bool = isinstance(value, bool)
    if not isinstance(value, allowed) or is_bool != (wanted is bool):
      raise ValueError(
        f"config field {name} must be {TYPE_NAMES[wanted]}, not {value!r}"
      )
  if name in LEAST and value < LEAST[name]:
    raise ValueError(f"{name}={value} must be {LEAST[name]} or more")
