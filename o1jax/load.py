"""A trained policy with its task, from a run's workdir or a policy folder.

`evaluate`, `solve`, `export` and notebooks begin here, and runs that begin with
the policy of another.
"""

import dataclasses
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

import o1jax
from o1jax import build, regime_parts
from o1jax import config as config_lib
from o1jax import mesh as mesh_lib
from o1jax.checkpoint import Checkpoints
from o1jax.encoding import Policy
from o1jax.learning import update
from o1jax.learning.optimizer import ADAPTERS, make_optimizer
from o1jax.policy import pretrained
from o1jax.policy.tokenizer import Tokenizer
from o1jax.tasks.task import Task

DEFAULT = pathlib.Path(o1jax.__file__).parent / "assets" / "countdown"


@dataclasses.dataclass(frozen=True)
class Trained:
  """A trained policy.

  Attributes:
    config: of the run that trained it.
    task: its task.
    policy: network, tokenizer and shapes.
    params: on the mesh.
    mesh: devices.
    iteration: the iteration it is of.
  """

  config: Any
  task: Task
  policy: Policy
  params: Any
  mesh: Mesh
  iteration: int


def from_workdir(
  workdir: pathlib.Path,
  iteration: int | None = None,
  mesh: Mesh | None = None,
) -> Trained:
  """The policy of a run, as it searched.

  Args:
    workdir: of the run.
    iteration: one that was saved; None for the last, -1 for the best.
    mesh: where to; None for one device.

  Raises:
    UserError: no such run or iteration, or a damaged checkpoint.
  """
  config = config_lib.config_of_workdir(workdir)
  mesh = mesh or mesh_lib.make_mesh({})
  task = build.task_of(config)
  policy = build.policy_of(config, build.tokenizer_of(config, task, workdir))
  checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
  with config_lib.user_input():
    if iteration is None:
      iteration = checkpoints.latest()
    elif iteration == -1:
      iteration = checkpoints.best()
    if iteration is None:
      raise ValueError(f"{workdir} holds no checkpoint yet: run o1jax.main")
    optimizer = make_optimizer(
      total_updates=build.total_updates(config), **config.learn.optimizer
    )
    params = policy.network.init(jax.random.key(config.seed))
    target = update.make_state(
      params, optimizer, mesh, has_reference=regime_parts.has_reference(config)
    )
    state = checkpoints.restore(iteration, target).state
  params = mesh_lib.replicate(state.average_params, mesh)
  return Trained(config, task, policy, params, mesh, iteration)


def from_folder(directory: pathlib.Path = DEFAULT) -> Trained:
  """A policy that `o1jax.export` wrote, on one device; by default what ships.

  Raises:
    UserError: the folder holds no policy, or one that does not fit.
  """
  with config_lib.user_input():
    card = pretrained.load_card(directory)
    config = config_lib.from_dict(card["config"])
    mesh = mesh_lib.make_mesh({})
    task = build.task_of(config)
    tokenizer = Tokenizer.from_bytes(pretrained.load_tokenizer_model(directory))
    policy = build.policy_of(config, tokenizer)
    like = jax.eval_shape(policy.network.init, jax.random.key(0))
    params = pretrained.load_params(directory, like)
  params = mesh_lib.replicate(params, mesh)
  return Trained(config, task, policy, params, mesh, card["iteration"])


def from_path(path: str, iteration: int | None = None) -> Trained:
  """A workdir or a policy folder; "" for the policy that ships.

  Raises:
    UserError: an iteration of what is no workdir, or as in the functions above.
  """
  folder = pathlib.Path(path) if path else DEFAULT
  if not (folder / pretrained.CARD).exists():
    return from_workdir(folder, iteration)
  if iteration is not None:
    raise config_lib.UserError(
      f"{folder} holds one policy: --iteration={iteration} needs the workdir "
      "of a run"
    )
  return from_folder(folder)


def first_params(path: str, policy: Policy, params: Any) -> Any:
  """Parameters that a run begins with: those of the policy at `path`.

  Args:
    path: as for `from_path`.
    policy: of the run.
    params: fresh ones of it; their adapters stay where the other has none.

  Raises:
    UserError: the other is of another architecture, or has other adapters or
      another head.
  """
  given = from_path(path)
  theirs, own = given.policy.network.config, policy.network.config
  adapters = [
    f"lora_rank={config.lora_rank}, lora_alpha={config.lora_alpha}"
    for config in (theirs, own)
  ]
  if theirs.lora_rank and adapters[0] != adapters[1]:
    raise config_lib.UserError(
      f"initialize.path={path} has adapters of {adapters[0]}, this config has "
      f"{adapters[1]}; give it the same network.*"
    )
  if theirs.value_bins != own.value_bins:
    raise config_lib.UserError(
      f"initialize.path={path} has a value head of value_bins="
      f"{theirs.value_bins}, this config of {own.value_bins}: set "
      f"network.value_bins={theirs.value_bins}"
    )
  has, wants = (
    {
      jax.tree_util.keystr(place): leaf
      for place, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for tree in (given.params, params)
  )
  for name in wants.keys() - has.keys():
    if any(factor in name for factor in ADAPTERS):
      has[name] = wants[name]
  for name in sorted(has.keys() | wants.keys()):
    there, here = (
      side[name].shape if name in side else "absent" for side in (has, wants)
    )
    if there != here:
      raise config_lib.UserError(
        f"initialize.path={path} is of another architecture: {name} is {there} "
        f"there, this config has {here}; give it the same network.*"
      )
  structure = jax.tree.structure(params)
  return jax.tree.unflatten(structure, [has[name] for name in wants])


def saved_iterations(workdir: pathlib.Path) -> list[int]:
  """Iterations of a run that have a checkpoint, ascending."""
  return Checkpoints(workdir / "checkpoints", read_only=True).steps()
