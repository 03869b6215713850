"""Compares strategies on held-out problems at equal token budgets.

  python -m o1jax.evaluate --workdir=runs/countdown --efforts=4,16,64

An effort of n is the tokens of n whole solutions. Rows go to the terminal and
to evaluation.jsonl in the workdir, and into its report.
"""

import pathlib

import jax
from absl import flags

from o1jax import build, evaluation, iterate, load, metrics, report
from o1jax import config as config_lib
from o1jax import mesh as mesh_lib

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
EFFORTS = flags.DEFINE_list("efforts", ["4", "16", "64"], "Token budgets.")
STRATEGIES = flags.DEFINE_list(
  "strategies",
  ["greedy", "majority_vote", "best_of_n", "mcts"],
  "What to compare.",
)
ITERATIONS = flags.DEFINE_list(
  "iterations", [], "Saved iterations, or all; the last by default."
)
NUM_PROBLEMS = flags.DEFINE_integer("num_problems", 512, "Held out.")
COMPILATION_CACHE = flags.DEFINE_string(
  "compilation_cache", "~/.cache/o1jax/jax", "Keeps compiled programs."
)


def main(argv: list[str]) -> None:
  """Reads the flags and evaluates."""
  if len(argv) > 1:
    raise config_lib.UserError(f"unknown argument {argv[1]!r}")
  if WORKDIR.value is None:
    raise config_lib.UserError("--workdir is missing: --workdir=runs/countdown")
  workdir = pathlib.Path(WORKDIR.value)
  efforts = [_whole(text, "efforts") for text in EFFORTS.value]
  mesh_lib.enable_compilation_cache(COMPILATION_CACHE.value)
  evaluator = None
  for iteration in _iterations(workdir):
    trained = load.from_workdir(workdir, iteration)
    if evaluator is None:
      # Compiled programs take parameters as arguments: one for all iterations.
      evaluator = build.evaluator_of(
        trained.config, trained.policy, trained.task, trained.mesh
      )
    rows = measure(trained, evaluator, STRATEGIES.value, efforts)
    iterate.save_evaluation(workdir, rows)
    print(f"iteration {trained.iteration}, {NUM_PROBLEMS.value} problems")
    print(evaluation.format_rows(rows), flush=True)
  report.write_report(workdir)


def measure(trained, evaluator, strategies, efforts) -> list[dict]:
  """Rows of every strategy at every effort; greedy has but one."""
  with config_lib.user_input():
    problems = trained.task.heldout_problems(NUM_PROBLEMS.value)
    cells = [
      (strategy, effort)
      for strategy in strategies
      for effort in ([1] if strategy == "greedy" else efforts)
    ]
    rows = []
    for strategy, effort in metrics.progress(cells, "evaluate", len(cells)):
      key = jax.random.key(trained.config.seed)
      row, _ = evaluator.measure(
        trained.params, problems, strategy, effort, key
      )
      rows.append({"iteration": trained.iteration, **row})
  return rows


def _iterations(workdir: pathlib.Path) -> list[int | None]:
  if ITERATIONS.value == ["all"]:
    return load.saved_iterations(workdir)
  return [_whole(text, "iterations") for text in ITERATIONS.value] or [None]


def _whole(text: str, name: str) -> int:
  if not text.isdecimal() or int(text) < (name == "efforts"):
    raise config_lib.UserError(f"--{name} takes whole numbers, not {text!r}")
  return int(text)


if __name__ == "__main__":
  config_lib.run(main)
