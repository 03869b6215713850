"""Searched solutions with their verdicts: what goes into the experience."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from o1jax.searched import FoundSolution, Searched, step_weights
from o1jax.tasks.task import Task
from o1jax.types import Problem, ScoredSolution, Verdict


def score(
  task: Task,
  searched: Sequence[Searched],
  verdicts: Sequence[Sequence[Verdict]],
  iteration: int,
  *,
  relabels: bool,
) -> list[ScoredSolution]:
  """Every finished solution with its verdict; failures relabelled if asked.

  Args:
    task: relabels.
    searched: the searches.
    verdicts: of each of their solutions.
    iteration: written along.
    relabels: failures also come with the problem that they do solve.
  """
  scored = []
  for one, judged in zip(searched, verdicts, strict=True):
    weights = step_weights(one)
    for solution, verdict in zip(one.solutions, judged, strict=True):
      if not solution.is_finished:
        continue
      entry = scored_solution(one, solution, verdict, weights, iteration)
      scored.append(entry)
      if relabels and not verdict.is_correct:
        problem = task.relabel(one.problem, solution.text)
        if problem is not None:
          scored.append(relabelled(entry, problem))
  return scored


def scored_solution(
  searched: Searched,
  solution: FoundSolution,
  verdict: Verdict,
  weights: Mapping[int, np.ndarray],
  iteration: int,
) -> ScoredSolution:
  """A solution that search found, with its verdict and provenance."""
  return ScoredSolution(
    problem=searched.problem,
    text=solution.text,
    tokens=solution.tokens,
    step_weights=weights[solution.node],
    behavior_log_probs=solution.behavior_log_probs,
    policy_log_probs=solution.policy_log_probs,
    outcome_reward=float(verdict.is_correct),
    verdict=verdict.reason,
    iteration=iteration,
    source="search",
    num_visits=solution.num_visits,
  )


def relabelled(entry: ScoredSolution, problem: Problem) -> ScoredSolution:
  """The same text as a solution of the problem that it does solve.

  Hindsight experience replay, Andrychowicz et al., arXiv 1707.01495.
  """
  return dataclasses.replace(
    entry,
    problem=problem,
    outcome_reward=1.0,
    verdict="correct for the target it reached",
    source="hindsight",
  )
