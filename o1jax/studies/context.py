"""What the cells of a study share: policy, problems, compiled searches."""

import functools
import gc
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from o1jax import build, config, jsonl, load
from o1jax import mesh as mesh_lib
from o1jax.encoding import encode_problems
from o1jax.entailment import policy_classes
from o1jax.reward.outcome import Verifier
from o1jax.search.host_guidance import Classes
from o1jax.searched import Searched
from o1jax.solver import Solver
from o1jax.tasks.task import Task
from o1jax.types import Problem

# Groups of the config that say what a policy computes and who checks it.
_GROUPS = ("task", "network", "lengths")


class Context:
  """A trained policy on fixed problems, and the search that was used last.

  One search is kept and the one before it freed, compiled programs included:
  those of a whole study take more memory mappings than Linux allows a process.

  Attributes:
    trained: the policy.
    task: its task.
    problems: what every cell is measured on.
    label: what tables are headed with.
    evaluation: options of the config's `evaluation`.
    batch_size: problems searched at a time.
    judge: the verdict on each solution of a search; one that was cut off is
      not correct.
  """

  def __init__(self, trained: load.Trained, problems: Sequence[Problem]):
    """Prepares; nothing compiles before the first search.

    Args:
      trained: the policy.
      problems: one or more.

    Raises:
      ValueError: a problem that is too long.
    """
    encode_problems(trained.policy, problems)
    self.trained = trained
    self.task = trained.task
    self.problems = tuple(problems)
    self.label = f"{trained.task.name}, iteration {trained.iteration}"
    self.evaluation = trained.config.evaluation.to_dict()
    self.judge = build.evaluator_of(
      trained.config, trained.policy, trained.task, trained.mesh
    ).judge
    # No larger than the problems need: a short batch is padded and searched.
    ways = mesh_lib.batch_ways(trained.mesh)
    needed = ways * math.ceil(len(problems) / ways)
    self.batch_size = min(self.evaluation["batch_size"], needed)
    self._solver: tuple[str, Solver] | None = None
    self._is_warm = False
    self._solution_tokens: dict[int, float] = {}
    self._last: tuple[Any, Any] = (None, None)

  def solver(self, options: Mapping[str, Any]) -> Solver:
    """The search of these options, the last one where they are the same.

    Args:
      options: of `Solver`, without policy, task, mesh and batch size.

    Raises:
      ValueError: an unknown option, or options that do not fit.
    """
    key = _text_of(options)
    if self._solver is None or self._solver[0] != key:
      self.close()
      trained = self.trained
      solver = Solver(
        trained.policy,
        task=trained.task,
        mesh=trained.mesh,
        batch_size=self.batch_size,
        **options,
      )
      self._solver, self._is_warm = (key, solver), False
    return self._solver[1]

  def search(
    self, options: Mapping[str, Any], seed: int
  ) -> tuple[list[Searched], float]:
    """Searches all problems; the last search is remembered.

    Returns:
      The searches and their seconds, compilation not among them.
    """
    key = (_text_of(options), seed)
    if key != self._last[0]:
      solver, params = self.solver(options), self.trained.params
      if not self._is_warm:
        solver(params, jax.random.key(seed), self.problems[:1])
        self._is_warm = True
      start = time.monotonic()
      searched = solver(params, jax.random.key(seed), self.problems)
      self._last = (key, (searched, time.monotonic() - start))
    return self._last[1]

  def tokens_per_solution(self, num_solutions: int) -> float:
    """Mean tokens of a sampled solution, over so many of each problem.

    Sampled at the evaluation's temperature with seed 0.
    """
    if num_solutions not in self._solution_tokens:
      options = {
        "strategy": "best_of_n",
        "reward": "value",
        "temperature": self.evaluation["temperature"],
        "num_candidates": num_solutions,
      }
      searched, _ = self.search(options, seed=0)
      spent = [one.cost["generated_tokens"] for one in searched]
      self._solution_tokens[num_solutions] = np.mean(spent) / num_solutions
    return float(self._solution_tokens[num_solutions])

  @functools.cached_property
  def classes_fn(self) -> Classes:
    """Classes of solutions by what the policy says of them.

    Raises:
      ValueError: it has no words for that, see `entailment`.
    """
    trained = self.trained
    return policy_classes(trained.policy, trained.params, trained.task)

  def was_taught(self, kind: str) -> bool:
    """Whether the run's config has rows of that kind, see `rows`."""
    mixes = self.trained.config.initialize.rows, self.trained.config.learn.rows
    return any(kind in mix and mix[kind] > 0 for mix in mixes)

  def identity(self) -> dict[str, str]:
    """Hashes of all that results depend on besides the cell."""
    trained = self.trained
    policy = hashlib.sha256(trained.policy.tokenizer.to_bytes())
    fields = config.flatten(trained.config.to_dict())
    for name in sorted(fields):
      if name.startswith(tuple(f"{group}." for group in _GROUPS)):
        policy.update(f"{name}={fields[name]!r}\n".encode())
    leaves = jax.tree_util.tree_leaves_with_path(trained.params)
    for path, leaf in leaves:
      array = np.asarray(jax.device_get(leaf))
      kind = f"{jax.tree_util.keystr(path)} {array.dtype}{array.shape}"
      policy.update(kind.encode())
      policy.update(array.tobytes())
    return {
      "policy": policy.hexdigest(),
      "problems": _hash_of(self.problems),
    }

  def close(self) -> None:
    """Ends the processes that check, and frees the last search."""
    if self._solver is not None:
      self._solver[1].close()
      self._solver = None
      if self._is_warm:
        # A search and what is compiled of it stand in cycles.
        gc.collect()


class TaskContext:
  """A task on fixed problems, for studies without a policy.

  Attributes:
    task: the task.
    problems: what every cell is measured on.
    mesh: devices that these are shared out over.
    verifier: its checker, which remembers verdicts.
    label: what tables are headed with.
  """

  def __init__(self, task: Task, problems: Sequence[Problem]):
    """Prepares; starts nothing."""
    self.task = task
    self.problems = tuple(problems)
    self.mesh = mesh_lib.mesh_for(len(problems))
    self.verifier = Verifier(task.check)
    self.label = task.name

  def identity(self) -> dict[str, str]:
    """What results depend on besides the cell."""
    return {"task": repr(self.task), "problems": _hash_of(self.problems)}

  def close(self) -> None:
    """Ends the processes that check."""
    self.verifier.close()


def _hash_of(problems: Sequence[Problem]) -> str:
  content = hashlib.sha256()
  for problem in problems:
    content.update(_text_of(jsonl.problem_row(problem)).encode())
  return content.hexdigest()


def _text_of(value: Any) -> str:
  return json.dumps(value, sort_keys=True, allow_nan=False)
