"""Compares strategies on held-out problems at equal token budgets.

  python -m o1jax.evaluate --workdir=runs/countdown --efforts=4,16,64

An effort of n is the tokens of n whole solutions; low, medium and high are 4,
16 and 64. The strategies "adaptive" and "compute_optimal" share these out over
the problems by how hard they seem, see allocation.py. Rows go to the terminal
and to evaluation.jsonl in the workdir, and into its report.

Fields of the config's evaluation may be set anew, as in
`--config.evaluation.options.best_of_n.answer_by=weighted_vote`; such rows go to
the terminal alone.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from o1jax import build, evaluation, iterate, load, metrics, report
from o1jax import config as config_lib
from o1jax import mesh as mesh_lib


def define_flags() -> None:
  """Defines what the command line takes; `main` reads it."""
  flags.DEFINE_string("workdir", None, "Folder of the run.")
  flags.DEFINE_list(
    "efforts", ["4", "16", "64"], "Token budgets: numbers, low, medium or high."
  )
  flags.DEFINE_list(
    "strategies",
    ["greedy", "majority_vote", "best_of_n", "mcts"],
    "What to compare.",
  )
  flags.DEFINE_list(
    "iterations", [], "Saved iterations, or all; the last by default."
  )
  flags.DEFINE_integer("num_problems", 512, "Held out.")
  flags.DEFINE_multi_string(
    "config_override", [], "What --config.evaluation.a=value becomes."
  )
  flags.DEFINE_string(
    "compilation_cache", "~/.cache/o1jax/jax", "Keeps compiled programs."
  )


def main(argv: list[str]) -> None:
  """Reads the flags and evaluates."""
  if len(argv) > 1:
    raise config_lib.UserError(f"unknown argument {argv[1]!r}")
  if flags.FLAGS.workdir is None:
    raise config_lib.UserError("--workdir is missing: --workdir=runs/countdown")
  workdir = pathlib.Path(flags.FLAGS.workdir)
  with config_lib.user_input():
    efforts = [evaluation.solutions_worth(e) for e in flags.FLAGS.efforts]
  mesh_lib.enable_compilation_cache(flags.FLAGS.compilation_cache)
  num_problems = flags.FLAGS.num_problems
  if num_problems < 1:
    raise config_lib.UserError(f"--num_problems={num_problems} is less than 1")
  overrides = flags.FLAGS.config_override
  config = config_lib.config_of_workdir(workdir)
  override_evaluation(config, overrides)
  mesh_lib.keep_freed_memory(config.mesh.num_cpu_devices)
  mesh = build.evaluation_devices(config)
  evaluator = None
  for iteration in _iterations(workdir):
    trained = load.from_workdir(workdir, iteration, mesh)
    if evaluator is None:
      # Compiled programs take parameters as arguments: one for all iterations.
      evaluator = build.evaluator_of(
        config, trained.policy, trained.task, trained.mesh
      )
    rows = measure(
      trained,
      evaluator,
      flags.FLAGS.strategies,
      efforts,
      num_problems,
    )
    if not overrides:
      with config_lib.writing(workdir):
        iterate.save_evaluation(workdir, rows)
    print(f"iteration {trained.iteration}, {num_problems} problems")
    print(evaluation.format_rows(rows), flush=True)
  if not overrides:
    with config_lib.writing(workdir):
      report.write_report(workdir)


def override_evaluation(config: Any, overrides: Sequence[str]) -> None:
  """Sets fields of a run's `evaluation` from texts "evaluation.a=value".

  Raises:
    UserError: a field of another group, an unknown one, or a bad value.
  """
  for text in overrides:
    if not text.startswith("evaluation."):
      raise config_lib.UserError(
        f"--config.{text}: only fields of evaluation can be set here, the rest "
        "made the run what it is"
      )
  config_lib.apply_overrides(config, overrides)


def measure(
  trained: load.Trained,
  evaluator: evaluation.Evaluator,
  strategies: Sequence[str],
  efforts: Sequence[int],
  num_problems: int,
) -> list[dict[str, Any]]:
  """Rows of every strategy at every effort; greedy has but one.

  Raises:
    UserError: what cannot be compared, before anything is measured.
  """
  with config_lib.user_input():
    problems = trained.task.heldout_problems(num_problems)
    cells = [
      (strategy, effort)
      for strategy in strategies
      for effort in ([1] if strategy in evaluation.ALONE else efforts)
    ]
    evaluator.check(cells, problems)
    rows = []
    for strategy, effort in metrics.progress(cells, "evaluate", len(cells)):
      key = jax.random.key(trained.config.seed)
      row, _ = evaluator.measure(
        trained.params, problems, strategy, effort, key
      )
      rows.append({"iteration": trained.iteration, **row})
  return rows


def _iterations(workdir: pathlib.Path) -> list[int | None]:
  given, saved = flags.FLAGS.iterations, load.saved_iterations(workdir)
  if given == ["all"]:
    return saved or [None]
  iterations = [_whole(text) for text in given]
  for iteration in iterations:
    if iteration not in saved:
      raise config_lib.UserError(
        f"iteration {iteration} is not saved in {workdir}; there are {saved}"
      )
  return iterations or [None]


def _whole(text: str) -> int:
  if not text.isdecimal():
    raise config_lib.UserError(
      f"--iterations takes whole numbers, not {text!r}"
    )
  return int(text)


if __name__ == "__main__":
  define_flags()
  config_lib.run(main)
