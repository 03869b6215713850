"""The regimes of a run: ways to search and learn, and the parts of each.

A regime is the config of the run with changes of its own. All are checked and
built before anything compiles.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from o1jax import config as config_lib
from o1jax import fresh_rows, rows
from o1jax import mesh as mesh_lib
from o1jax.combinations import REVISIONS
from o1jax.config import user_input
from o1jax.encoding import Policy
from o1jax.fresh_rows import FreshRows
from o1jax.learning import update
from o1jax.learning.objective import Objective, PolicyGradient, Preference
from o1jax.learning.optimizer import Optimizer
from o1jax.policy.network import next_token_log_probs
from o1jax.process_rewards import Process
from o1jax.regimes import Schedule
from o1jax.rollouts import Advantages, Pairs
from o1jax.solver import Solver
from o1jax.tasks.task import Task
from o1jax.text_rows import TextRows

# What a regime may change: not what spans the run, or what it is counted by.
CHANGED_BY_REGIMES = ("search.", "learn.")
NEVER_CHANGED = (
  "learn.optimizer.",
  "learn.num_updates",
  "learn.updates_per_call",
  "search.num_problems",
)
# The one regime of a config that names none.
ONLY_REGIME = "learn"


@dataclasses.dataclass(frozen=True)
class Regime:
  """One way in which a run searches and learns.

  Attributes:
    config: of the run, with the regime's changes.
    solver: the search that learning learns from.
    learn_rows: batches of its mix.
    fresh_rows: what of them is made anew in every iteration.
    objective: what its updates minimize.
    update_fn: see `learning.update.make_updates`.
  """

  config: Any
  solver: Solver
  learn_rows: rows.RowMaker
  fresh_rows: FreshRows
  objective: Objective
  update_fn: Any

  @property
  def relabels(self) -> bool:
    """Whether its rows have a use for failures that were relabelled."""
    mix = self.config.learn.rows
    return "hindsight" in mix and mix.hindsight > 0


def schedule_of(config: Any) -> Schedule:
  """The order of the config's regimes.

  Raises:
    UserError: a name that is unknown, or a number out of range.
  """
  options = config.regimes.to_dict()
  known = options.pop("changes")
  if not options["names"]:
    options["names"], known = (ONLY_REGIME,), (ONLY_REGIME,)
  with user_input():
    return Schedule(known=tuple(known), **options)


def regime_configs(config: Any) -> dict[str, Any]:
  """The config of each regime: the run's own with the regime's changes.

  Raises:
    UserError: a regime that the schedule leaves out, or a change of a field
      that there is not, or that must not change.
  """
  names = schedule_of(config).names
  if names == (ONLY_REGIME,) and not config.regimes.changes:
    return {ONLY_REGIME: config}
  configs = {}
  with user_input():
    for name, changes in config.regimes.changes.items():
      if name not in names:
        raise ValueError(
          f"regimes.changes.{name} is not in regimes.names="
          f"{tuple(config.regimes.names)}: put it there, or take it out"
        )
      if isinstance(changes, str):
        raise ValueError(
          f"regimes.changes.{name}={changes!r} must be a tuple of texts, "
          "one for each field"
        )
      for change in changes:
        field = change.partition("=")[0]
        is_open = field.startswith(CHANGED_BY_REGIMES)
        if not is_open or field.startswith(NEVER_CHANGED):
          raise ValueError(
            f"regimes.changes.{name} changes {field}, which stays the same in "
            "a run: a regime changes fields of search and learn, but none of "
            f"{', '.join(NEVER_CHANGED)}"
          )
      changed = config.copy_and_resolve_references()
      config_lib.apply_overrides(changed.lock(), changes)
      configs[name] = changed
  return configs


def mixes_of(config: Any) -> dict[str, Mapping[str, int]]:
  """The mixes of rows of a run, by what errors call them."""
  mixes = {"initialize.rows": config.initialize.rows}
  for name, changed in regime_configs(config).items():
    label = "learn.rows" if name == ONLY_REGIME else f"learn.rows of {name}"
    mixes[label] = changed.learn.rows
  return mixes


def make_regimes(
  configs: Mapping[str, Any],
  task: Task,
  policy: Policy,
  optimizer: Optimizer,
  mesh: Mesh,
  text_rows: TextRows | None = None,
) -> dict[str, Regime]:
  """The parts of each regime.

  Raises:
    ValueError: fields that do not fit together.
  """

  @functools.cache
  def update_of(objective, num_microbatches, average_decay, scale):
    # Regimes that learn by the same rule share its program.
    return update.make_updates(
      log_probs_of(policy, objective),
      optimizer,
      objective=objective,
      num_microbatches=num_microbatches,
      average_decay=average_decay,
      learning_rate_scale=scale,
      mesh=mesh,
    )

  asking = [one.learn for one in configs.values() if one.learn.play_outcomes]
  if asking and not any(
    learn.rows.get(k) for learn in asking for k in rows.PLAYED
  ):
    raise ValueError(
      "learn.play_outcomes=True is not read without rows of "
      f"{' or '.join(rows.PLAYED)} in learn.rows: set it to False"
    )

  score_fn = update.make_score(log_probs_of(policy, Objective()), mesh=mesh)
  regimes = {}
  for name, config in configs.items():
    learn, search = config.learn, search_options(config, mesh)
    objective = objective_of(config)
    advantages = Advantages(**learn.advantages)
    process = Process(**learn.process)
    notice = fresh_rows.check(
      learn.rows,
      reference=learn.reference,
      advantages=advantages,
      process=process,
      objective=objective,
      search=search,
    )
    if notice:
      print(notice, flush=True)
    regimes[name] = Regime(
      config=config,
      solver=Solver(policy, mesh=mesh, task=task, **search),
      learn_rows=rows.RowMaker(
        policy,
        task,
        learn.rows,
        learn.replay,
        text_rows,
        rates_questions=True,
        play_outcomes=learn.play_outcomes,
      ),
      fresh_rows=FreshRows(
        policy,
        task,
        learn.rows,
        score_fn,
        reference=learn.reference,
        advantages=advantages,
        pairs=Pairs(**learn.pairs),
        process=process,
        max_value_change=objective.policy_gradient.max_value_change,
      ),
      objective=objective,
      update_fn=update_of(
        objective,
        learn.num_microbatches,
        learn.average_decay,
        learn.learning_rate_scale,
      ),
    )
  return regimes


def search_options(config: Any, mesh: Mesh) -> dict[str, Any]:
  """Options of the solver that learning learns from.

  Raises:
    ValueError: a strategy, or a size, that learning or the mesh do not take.
  """
  options = config.search.to_dict()
  del options["num_problems"]
  mesh_lib.check_divides("search.batch_size", options["batch_size"], mesh)
  if options["strategy"] in REVISIONS:
    raise ValueError(
      f"search.strategy={options['strategy']!r} finds answers that follow "
      "others in one text, which learning does not read: choose another "
      "here, and compare with it in evaluation"
    )
  return options


def objective_of(config: Any) -> Objective:
  """What the config's updates minimize.

  Raises:
    ValueError: an option that is unknown, out of range, or not read.
  """
  learn = config.learn
  return Objective(
    value_coefficient=learn.value_coefficient,
    policy_gradient=PolicyGradient(**learn.policy_gradient),
    preference=Preference(**learn.preference),
  )


def log_probs_of(policy: Policy, objective: Objective) -> update.LogProbsFn:
  """What the update asks of the policy's network."""
  has_entropy = objective.policy_gradient.entropy_coefficient > 0

  def log_probs_fn(params, tokens, lengths, **documents):
    # Of packed rows: segment_ids and positions.
    return next_token_log_probs(
      policy.network,
      params,
      tokens,
      lengths,
      with_entropy=has_entropy,
      **documents,
    )

  return log_probs_fn


def has_reference(config: Any) -> bool:
  """Whether a run keeps the parameters of a reference."""
  # Runs of earlier versions have no such field.
  if "reference" not in config.learn:
    return False
  return any(
    changed.learn.reference != "none"
    for changed in regime_configs(config).values()
  )
