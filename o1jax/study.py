"""Runs a study of a trained policy: a grid of cells, a table and a figure.

  python -m o1jax.study --study=search --workdir=runs/countdown
  python -m o1jax.study --study=search --workdir=runs/countdown --seeds=5
  python -m o1jax.study --study=guidance --workdir=runs/countdown
  python -m o1jax.study --study=search --workdir=W --problems=games.jsonl
  python -m o1jax.study --study=legal_play --workdir=W --problems=games.jsonl

Each cell is kept as soon as it is measured, in W/studies/<name>/, and is not
measured again for the same policy and problems: run again, a study goes on.
The study legal_play has no policy: its workdir may be any folder.
"""

import json
import os
import pathlib
from collections.abc import Sequence

from absl import flags

from o1jax import build, load, studies
from o1jax import config as config_lib
from o1jax import mesh as mesh_lib
from o1jax.studies import runner
from o1jax.studies.context import Context, TaskContext
from o1jax.tasks import make_task
from o1jax.tasks.task import Task, require_known
from o1jax.types import Problem

NUM_HELDOUT = 128


def define_flags() -> None:
  """Defines what the command line takes; `main` reads it."""
  flags.DEFINE_string("study", None, f"One of {', '.join(studies.STUDIES)}.")
  flags.DEFINE_string("workdir", None, "Folder of the run.")
  flags.DEFINE_integer("iteration", None, "A saved one; the last by default.")
  flags.DEFINE_integer("seeds", 1, "Seeds that each cell is measured with.")
  flags.DEFINE_string(
    "problems",
    None,
    "File of problems, one a line as text or JSON; held-out ones by default.",
  )
  flags.DEFINE_string("task", "game24", "Of a study without a policy.")
  flags.DEFINE_integer(
    "num_cpu_devices",
    os.cpu_count() or 1,
    "Virtual devices of a study without a policy, where there is no other.",
  )
  flags.DEFINE_integer(
    "num_problems",
    None,
    f"The first so many; {NUM_HELDOUT} held-out ones, or the whole file.",
  )
  flags.DEFINE_list(
    "only", [], "Settings of the cells to measure, as strategy=mcts,effort=8."
  )
  flags.DEFINE_integer("max_cells", None, "Most cells to measure now.")
  flags.DEFINE_string(
    "compilation_cache", "~/.cache/o1jax/jax", "Keeps compiled programs."
  )


def main(argv: list[str]) -> None:
  """Reads the flags and runs the study."""
  values = flags.FLAGS
  if len(argv) > 1:
    raise config_lib.UserError(f"unknown argument {argv[1]!r}")
  for name, example in (("study", "search"), ("workdir", "runs/countdown")):
    if values[name].value is None:
      raise config_lib.UserError(f"--{name} is missing: --{name}={example}")
  for name in ("seeds", "num_problems", "max_cells", "num_cpu_devices"):
    if values[name].value is not None and values[name].value < 1:
      raise config_lib.UserError(f"--{name}={values[name].value} is below 1")
  with config_lib.user_input():
    require_known("study", values.study, list(studies.STUDIES))
  study, workdir = studies.STUDIES[values.study], pathlib.Path(values.workdir)
  unread = ("task", "num_cpu_devices") if study.has_policy else ("iteration",)
  for name in unread:
    if values[name].present:
      raise config_lib.UserError(
        f"--{name} is not for the study {study.name}: leave it out"
      )
  mesh_lib.enable_compilation_cache(values.compilation_cache)
  if study.has_policy:
    config = config_lib.config_of_workdir(workdir)
    mesh_lib.keep_freed_memory(config.mesh.num_cpu_devices)
    mesh = build.evaluation_devices(config)
    trained = load.from_workdir(workdir, values.iteration, mesh)
  else:
    mesh_lib.keep_freed_memory(values.num_cpu_devices)
    with config_lib.user_input():
      mesh_lib.configure_host_devices(values.num_cpu_devices)
  with config_lib.user_input():
    task = trained.task if study.has_policy else make_task(values.task)
    if values.problems is None:
      problems = task.heldout_problems(values.num_problems or NUM_HELDOUT)
    else:
      problems = read_problems(pathlib.Path(values.problems), task)
      problems = problems[: values.num_problems]
    if study.has_policy:
      context = Context(trained, problems)
    else:
      context = TaskContext(task, problems)
  table = run(
    study,
    context,
    workdir / "studies" / values.study,
    num_seeds=values.seeds,
    only=values.only,
    max_cells=values.max_cells,
  )
  print(table, end="")


def read_problems(path: pathlib.Path, task: Task) -> list[Problem]:
  """Problems from a file, one a line.

  A line is what `o1jax.solve` takes, or a JSON object that has it as `puzzle`
  or `prompt`, or has the numbers `nums` and a `target`; other fields of it are
  not read.

  Raises:
    OSError: the file cannot be read.
    ValueError: a line that is no problem of the task, or comes again.
  """
  problems: dict[str, Problem] = {}
  for number, line in enumerate(path.read_text().splitlines(), 1):
    if not line.strip():
      continue
    try:
      problem = task.parse(_typed(line))
    except ValueError as error:
      raise ValueError(f"{path}:{number}: {error}") from error
    if problem.id in problems:
      raise ValueError(f"{path}:{number}: {line.strip()!r} comes again")
    problems[problem.id] = problem
  if not problems:
    raise ValueError(f"{path} holds no problem")
  return list(problems.values())


def _typed(line: str) -> str:
  """A line of a file as a user would type it."""
  if not line.lstrip().startswith("{"):
    return line
  row = json.loads(line)
  for name in ("puzzle", "prompt"):
    if isinstance(row.get(name), str):
      return row[name].strip()
  if isinstance(row.get("nums"), list) and "target" in row:
    return f"{' '.join(map(str, row['nums']))} = {row['target']}"
  raise ValueError("give it a puzzle or a prompt, or nums and a target")


def run(
  study: studies.Study,
  context: Context | TaskContext,
  folder: pathlib.Path,
  *,
  num_seeds: int,
  only: Sequence[str] = (),
  max_cells: int | None = None,
) -> str:
  """Measures what is missing, writes table and figure, returns the table.

  Raises:
    UserError: what cannot be measured, before anything is; or a folder that
      cannot be written.
  """
  with config_lib.writing(folder):
    measured, num_missing = runner.run(
      study,
      context,
      folder,
      num_seeds=num_seeds,
      only=only,
      max_cells=max_cells,
    )
    context.close()
    problems = context.problems
    caption = f"Study {study.name}: {context.label}, {len(problems)} problems"
    if study.has_policy:
      num_train = sum(map(context.task.is_train, problems))
      caption += f" ({num_train} of them of the training share)"
    caption += f", seeds 0 to {num_seeds - 1}"
    caption += "; intervals are 95% bootstrap over problems."
    if note := study.note(context):
      caption += f" {note}"
    if num_missing:
      caption += f" {num_missing} cells are not measured yet."
    return runner.show(study, measured, folder, caption)


if __name__ == "__main__":
  define_flags()
  config_lib.run(main)
