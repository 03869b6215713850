"""From a config to the parts of a run, checked before anything compiles.

Every command builds its parts here, so that a run, its evaluation and its
solver agree on what the fields mean.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from jax.sharding import Mesh

from o1jax import jsonl, rows
from o1jax import mesh as mesh_lib
from o1jax.config import user_input
from o1jax.evaluation import Evaluator
from o1jax.experience import Experience
from o1jax.learning.optimizer import Optimizer, make_optimizer
from o1jax.policy.config import TransformerConfig
from o1jax.policy.network import make_network
from o1jax.policy.tokenizer import Tokenizer, train_tokenizer
from o1jax.solver import Lengths, Policy, Solver
from o1jax.tasks import make_task
from o1jax.tasks.task import Task

TOKENIZER_FILE = "tokenizer.model"
TOKENIZER_STREAM = 2**31


@dataclasses.dataclass(frozen=True)
class Parts:
  """What a run is made of.

  Attributes:
    task: problems and their checker.
    policy: network, tokenizer and shapes.
    mesh: devices.
    solver: the search that learning learns from.
    evaluator: compares strategies on held-out problems.
    optimizer: with its schedule over the whole run.
    initialize_rows, learn_rows: batches of the two phases.
    experience: what a run begins with: empty, or read from a file.
  """

  task: Task
  policy: Policy
  mesh: Mesh
  solver: Solver
  evaluator: Evaluator
  optimizer: Optimizer
  initialize_rows: rows.RowMaker
  learn_rows: rows.RowMaker
  experience: Experience


def start_devices(config: Any) -> Mesh:
  """Splits the CPU as the config says and arranges the mesh.

  Raises:
    UserError: the mesh does not fit the devices.
  """
  with user_input():
    mesh_lib.configure_host_devices(config.mesh.num_cpu_devices)
    return mesh_lib.make_mesh(
      {axis: config.mesh[axis] for axis in mesh_lib.AXES}
    )


def task_of(config: Any) -> Task:
  """The config's task.

  Raises:
    UserError: an unknown task or option.
  """
  with user_input():
    return make_task(config.task.name, **config.task.options)


def tokenizer_of(config: Any, task: Task, workdir: pathlib.Path) -> Tokenizer:
  """The workdir's tokenizer; trained where there is none yet."""
  path = workdir / TOKENIZER_FILE
  if path.exists():
    with user_input():
      return Tokenizer.from_bytes(path.read_bytes())
  rng = np.random.default_rng([config.seed, TOKENIZER_STREAM])
  with user_input():
    return train_tokenizer(
      task.corpus(rng, config.tokenizer.num_texts),
      vocab_size=config.tokenizer.vocab_size,
      max_digits_per_piece=config.tokenizer.max_digits_per_piece,
    )


def keep_tokenizer(tokenizer: Tokenizer, workdir: pathlib.Path) -> None:
  """Writes the tokenizer into the workdir, unless it is there."""
  path = workdir / TOKENIZER_FILE
  if not path.exists():
    partial = path.with_suffix(".partial")
    with user_input():
      partial.write_bytes(tokenizer.to_bytes())
      partial.replace(path)


def policy_of(config: Any, tokenizer: Tokenizer) -> Policy:
  """Network and shapes of the config for a tokenizer.

  Raises:
    UserError: fields that do not fit together.
  """
  with user_input():
    network_config = TransformerConfig(
      vocab_size=tokenizer.vocab_size, **config.network
    )
    network = make_network(network_config, tokenizer.number_values())
  return Policy(network, tokenizer, Lengths(**config.lengths))


def evaluator_of(
  config: Any, policy: Policy, task: Task, mesh: Mesh
) -> Evaluator:
  """The config's comparison of strategies."""
  with user_input():
    mesh_lib.check_divides(
      "evaluation.batch_size", config.evaluation.batch_size, mesh
    )
    return Evaluator(
      policy,
      task,
      mesh,
      batch_size=config.evaluation.batch_size,
      num_candidates=config.evaluation.num_candidates,
      temperature=config.evaluation.temperature,
      rule=config.evaluation.rule,
      reward=config.evaluation.reward,
    )


def build(config: Any, workdir: pathlib.Path, mesh: Mesh) -> Parts:
  """All parts of a run; writes nothing.

  Raises:
    UserError: a field that does not fit, with what to change.
  """
  task = task_of(config)
  policy = policy_of(config, tokenizer_of(config, task, workdir))
  with user_input():
    for name, mix in (
      ("initialize.rows", config.initialize.rows),
      ("learn.rows", config.learn.rows),
    ):
      _check_rows(rows.check_mix(mix, task, name), name, config, mesh)
    for name in ("initialize", "learn"):
      count, calls = config[name].num_updates, config.learn.updates_per_call
      if count % calls:
        raise ValueError(
          f"{name}.num_updates={count} is not a multiple of "
          f"learn.updates_per_call={calls}"
        )
    search = config.search.to_dict()
    search.pop("num_problems")
    mesh_lib.check_divides("search.batch_size", search["batch_size"], mesh)
    solver = Solver(policy, mesh=mesh, task=task, **search)
    optimizer = make_optimizer(
      total_updates=total_updates(config), **config.learn.optimizer
    )
  return Parts(
    task=task,
    policy=policy,
    mesh=mesh,
    solver=solver,
    evaluator=evaluator_of(config, policy, task, mesh),
    optimizer=optimizer,
    initialize_rows=rows.RowMaker(policy, task, config.initialize.rows),
    learn_rows=rows.RowMaker(policy, task, config.learn.rows),
    experience=first_experience(config, policy),
  )


def experience_limits(config: Any) -> dict[str, int]:
  """The size limits of the config's experience."""
  limits = config.experience.to_dict()
  del limits["path"]
  return limits


def first_experience(config: Any, policy: Policy) -> Experience:
  """Empty, or the solutions of `experience.path`.

  Raises:
    UserError: the file cannot be read, or a row of it is bad.
  """
  with user_input():
    experience = Experience(**experience_limits(config))
    if config.experience.path:
      experience.add(
        jsonl.read_solutions(config.experience.path, policy.encode_solution)
      )
  return experience


def total_updates(config: Any) -> int:
  """Updates of the whole run, over which the schedule runs."""
  return (
    config.initialize.num_iterations * config.initialize.num_updates
    + config.num_iterations * config.learn.num_updates
  )


def _check_rows(count: int, name: str, config: Any, mesh: Mesh) -> None:
  ways = mesh_lib.batch_ways(mesh) * config.learn.num_microbatches
  if count % ways:
    raise ValueError(
      f"{name} has {count} rows, which do not divide over "
      f"learn.num_microbatches={config.learn.num_microbatches} x "
      f"{mesh_lib.batch_ways(mesh)} devices: make it "
      f"{(count // ways + 1) * ways}"
    )
