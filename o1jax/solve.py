"""Solves one problem by search and shows how.

  python -m o1jax.solve "3 7 2 = 13"
  python -m o1jax.solve --workdir=runs/countdown --effort=high "5 6 11 = 49"
  python -m o1jax.solve --strategy=best_of_n --effort=low "3 7 2 = 13"
  python -m o1jax.solve --workdir=W --strategy=thinking "3 7 2 = 13"

Without --workdir the policy that ships with o1jax answers. The effort is the
search's budget, in whole solutions' worth of tokens: low, medium, high, or a
number; it means the same for every strategy. The checker only says at the end
whether the answer is right, unless --reward=checker lets the search see it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from o1jax import config as config_lib
from o1jax import drawing, evaluation, load
from o1jax import mesh as mesh_lib
from o1jax.searched import tree_record
from o1jax.solver import Solver
from o1jax.thinking import Thinking
from o1jax.tree_drawing import render_tree_text
from o1jax.types import Problem, Verdict

# Fields of `config.evaluation` that belong to the comparison alone.
_OF_COMPARISON = (
  "num_problems",
  "batch_size",
  "interval",
  "strategies",
  "efforts",
  "reward",
)


@dataclasses.dataclass(frozen=True)
class Solved:
  """An answer and the search behind it.

  Attributes:
    text: the solution answered with; "" where the search finished none.
    verdict: the checker's judgement of it.
    tree: the search tree as plain JSON values.
    cost: what the search spent.
  """

  text: str
  verdict: Verdict
  tree: dict[str, Any]
  cost: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Session:
  """A trained policy and the searches compiled for it so far."""

  trained: load.Trained
  solvers: dict[tuple[str, int, str], Solver | Thinking] = dataclasses.field(
    default_factory=dict
  )

  def solver(
    self, strategy: str, effort: int, reward: str
  ) -> Solver | Thinking:
    """The search of an effort, compiled once; a chain of thought has none."""
    trained = self.trained
    if (strategy, effort, reward) in self.solvers:
      pass
    elif strategy == "thinking":
      self.solvers[strategy, effort, reward] = Thinking(
        trained.policy,
        trained.task,
        trained.mesh,
        batch_size=mesh_lib.batch_ways(trained.mesh),
        steps_from_host=True,
      )
    else:
      options = trained.config.evaluation.to_dict()
      self.solvers[strategy, effort, reward] = evaluation.solver_of_effort(
        trained.policy,
        trained.task,
        trained.mesh,
        strategy=strategy,
        effort=effort,
        batch_size=mesh_lib.batch_ways(trained.mesh),
        reward=reward,
        steps_from_host=True,
        **{n: v for n, v in options.items() if n not in _OF_COMPARISON},
      )
    return self.solvers[strategy, effort, reward]


def load_default() -> Session:
  """The policy that ships with o1jax."""
  return Session(load.from_folder())


def solve(
  session: Session,
  text: str,
  *,
  strategy: str = "mcts",
  effort: str | int = "medium",
  reward: str = "value",
  seed: int = 0,
  watch: Callable[[list[str]], None] | None = None,
) -> Solved:
  """Solves a problem.

  Args:
    session: a policy, as from `load_default`.
    text: the problem as the task reads it, such as "3 7 2 = 13".
    strategy: how to search, see `Solver`; or "thinking", one chain of thought.
    effort: "low", "medium", "high" or a number of solutions' worth of tokens.
    reward: "value", or "checker" to let the search see the checker.
    seed: of the search.
    watch: called after every expansion with the texts that it reached.

  Raises:
    UserError: a malformed or unsolvable problem, one unlike those that the
      policy was trained on, or an unknown strategy or effort.
  """
  trained = session.trained
  with config_lib.user_input():
    problem = trained.task.parse(text)
    _check_learned(trained, problem)
    budget = evaluation.solutions_worth(effort)
    solver = session.solver(strategy, budget, reward)
    (searched,) = solver(
      trained.params, jax.random.key(seed), [problem], watch=watch
    )
  verdicts = {
    s.node: trained.task.check(problem, trained.task.final_solution(s.text))
    for s in searched.solutions
    if s.is_finished
  }
  answer, verdict = "", Verdict(False, "no finished solution", None)
  if searched.selected is not None:
    chosen = searched.solutions[searched.selected]
    answer = chosen.text
    verdict = verdicts.get(chosen.node, evaluation.CUT_OFF)
  is_correct = {node: v.is_correct for node, v in verdicts.items()}
  record = tree_record(searched, is_correct, trained.iteration)
  return Solved(answer, verdict, record, dict(searched.cost))


def _check_learned(trained: load.Trained, problem: Problem) -> None:
  """Raises ValueError: the policy has never seen problems of this kind."""
  task, shown = trained.task, problem.prompt.strip()
  unlike = task.unlike_training(problem)
  if unlike is not None:
    raise ValueError(f"{unlike}: this policy cannot solve {shown!r}")
  longest = trained.policy.lengths.prompt_tokens
  if len(trained.policy.tokenizer.encode(problem.prompt)) > longest:
    raise ValueError(
      f"this policy was trained on shorter problems: it cannot solve {shown!r}"
    )


def show_reached(texts: list[str]) -> None:
  """Prints the newest step of every text that an expansion reached."""
  for text in texts:
    *before, newest = text.rstrip("\n").split("\n")
    print("  " * len(before) + drawing.clean(newest), flush=True)


def define_flags() -> None:
  """Defines what the command line takes; `main` reads it."""
  flags.DEFINE_string(
    "workdir", "", "Run or policy folder; the policy that ships by default."
  )
  flags.DEFINE_integer("iteration", None, "A saved one of the run.")
  flags.DEFINE_string("strategy", "mcts", "How to search.")
  flags.DEFINE_string("effort", "medium", "low, medium, high or a number.")
  flags.DEFINE_string("reward", "value", "value or checker.")
  flags.DEFINE_integer("seed", 0, "Of the search.")
  flags.DEFINE_string(
    "compilation_cache", "~/.cache/o1jax/jax", "Keeps compiled programs."
  )


def main(argv: list[str]) -> None:
  """Reads the flags and solves."""
  if len(argv) != 2:
    raise config_lib.UserError(
      'give one problem: python -m o1jax.solve "3 7 2 = 13"'
    )
  mesh_lib.keep_freed_memory()
  mesh_lib.enable_compilation_cache(flags.FLAGS.compilation_cache)
  session = Session(load.from_path(flags.FLAGS.workdir, flags.FLAGS.iteration))
  print("steps, as the search proposes them:")
  solved = solve(
    session,
    argv[1],
    strategy=flags.FLAGS.strategy,
    effort=flags.FLAGS.effort,
    reward=flags.FLAGS.reward,
    seed=flags.FLAGS.seed,
    watch=show_reached,
  )
  print("\ntree:")
  print(render_tree_text(solved.tree))
  print(f"\nanswer ({solved.verdict.reason}):")
  print("\n".join(map(drawing.clean, solved.text.split("\n"))))
  spent = ", ".join(f"{n} {v}" for n, v in solved.cost.items())
  print(f"\n{spent}")


if __name__ == "__main__":
  define_flags()
  config_lib.run(main)
