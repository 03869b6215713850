"""Greedy decoding of a long chain: attempts, criticism and further attempts.

A policy that was taught to (rows `retrying` and `retried`) answers in two ways.
After a prompt it writes one solution. After a prompt with the thinking mark it
goes on after a wrong one: it says what is wrong, and tries again, until it
believes a solution or its tokens are spent. The last solution is the answer; no
checker and no search have a part in it.

  think:
  3 + 7 = 10 (left: 2 10)
  10 + 2 = 12 (left: 12)
  again:
  reaches 12, not 13
  3 * 2 = 6 (left: 7 6)
  7 + 6 = 13 (left: 13)

That is search as the policy's own chain of thought (sections 3.3 and 5 of the
paper, arXiv 2412.14135; O1 Journey, arXiv 2410.18982).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from o1jax.encoding import Policy
from o1jax.searched import Searched
from o1jax.solver import Solver
from o1jax.tasks.task import Task
from o1jax.types import Problem


class Thinking:
  """Solves problems by one long chain each."""

  def __init__(
    self,
    policy: Policy,
    task: Task,
    mesh: Mesh,
    *,
    batch_size: int,
    steps_from_host: bool = False,
  ):
    """Prepares; nothing compiles before the first call.

    Arguments are those of `Solver`.

    Raises:
      ValueError: the config's lengths leave no room for a chain.
    """
    lengths = policy.lengths
    if not lengths.thinking_tokens:
      raise ValueError(
        "lengths.thinking_tokens=0 leaves no room for a chain of thought: set "
        "it to the tokens that one may have"
      )
    self._mark = task.thinking_mark
    mark = policy.tokenizer.encode(self._mark)
    longer = lengths._replace(
      prompt_tokens=lengths.prompt_tokens + len(mark),
      step_tokens=lengths.thinking_tokens,
      num_steps=1,
    )
    self._solver = Solver(
      dataclasses.replace(policy, lengths=longer),
      strategy="greedy",
      batch_size=batch_size,
      mesh=mesh,
      task=task,
      steps_from_host=steps_from_host,
    )

  def __call__(
    self,
    params: Any,
    key: jax.Array,
    problems: Sequence[Problem],
    *,
    watch: Callable[[list[str]], None] | None = None,
  ) -> list[Searched]:
    """One chain a problem; solutions carry the whole text of it."""
    marked = [
      dataclasses.replace(problem, prompt=problem.prompt + self._mark)
      for problem in problems
    ]
    searched = self._solver(params, key, marked, watch=watch)
    return [
      dataclasses.replace(one, problem=problem)
      for one, problem in zip(searched, problems, strict=True)
    ]
