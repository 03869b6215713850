"""Problems that the policy writes itself, behind the question mark.

  write   texts are sampled from the policy, several for each problem wanted
  screen  the exact filter lets through what may be trained on and is new
  choose  the most promising of these, by what past searches say of them
  fill    where too few are left, the task's sampler gives the others

What was searched then teaches the policy to write: rows of `questions` (`rows`)
weigh a problem by how near one half its success was. So one network writes and
solves, as in the question generator of the paper (arXiv 2412.14135, section 4).
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from o1jax.encoding import Policy
from o1jax.question_generator import QuestionGenerator
from o1jax.solver import Solver
from o1jax.tasks.task import Task
from o1jax.types import Problem

# Problems of the sampler by which the room for a text is judged.
_NUM_TRIED = 500


class QuestionWriter:
  """Samples problems from the policy, as texts."""

  def __init__(
    self,
    policy: Policy,
    task: Task,
    mesh: Mesh,
    *,
    batch_size: int,
    num_texts: int,
  ):
    """Prepares; nothing compiles before the first call.

    Args:
      policy: what writes; a text has `prompt_tokens` of its lengths as room,
        its end mark included, as the prompt of a problem has.
      task: its question mark begins a text.
      mesh: as in `Solver`.
      batch_size: problems wanted that are written for at a time.
      num_texts: texts for each problem wanted.

    Raises:
      ValueError: the task's own problems have no room.
    """
    self._policy = policy
    self._task = task
    self._num_texts = num_texts
    drawn = task.sample_problems(np.random.default_rng(0), _NUM_TRIED)
    longest = max(self._num_tokens(problem) for problem in drawn)
    room = policy.lengths.prompt_tokens
    if longest > room:
      raise ValueError(
        f"lengths.prompt_tokens={room} is too short for problems that the "
        f"policy writes, which have up to {longest} tokens: raise it to "
        f"{longest}, or take another questions.source"
      )
    lengths = policy.lengths._replace(
      prompt_tokens=len(policy.tokenizer.encode(task.question_mark)),
      step_tokens=room,
      num_steps=1,
    )
    self._solver = Solver(
      dataclasses.replace(policy, lengths=lengths),
      strategy="best_of_n",
      num_candidates=num_texts,
      batch_size=batch_size,
      mesh=mesh,
      task=task,
    )

  def write(self, params: Any, key: jax.Array, n: int) -> list[str]:
    """Samples `num_texts` texts for each of n problems wanted.

    A text that does not end in the room there is comes back empty.

    Args:
      params: of the network.
      key: typed key, from which each of the n derives its own.
      n: problems wanted.
    """
    name, mark = self._task.name, self._task.question_mark
    blanks = [Problem(f"{name}/blank/{i}", name, mark, {}) for i in range(n)]
    return [
      text.text if text.is_finished else ""
      for searched in self._solver(params, key, blanks)
      for text in searched.solutions
    ]

  def propose(
    self,
    questions: QuestionGenerator,
    params: Any,
    key: jax.Array,
    rng: np.random.Generator,
    n: int,
    known_ids: Collection[str] = (),
  ) -> tuple[list[Problem], dict[str, float]]:
    """The most promising of the problems that the policy writes.

    Args:
      questions: screens and chooses, and fills up from the task's sampler.
      params: of the network.
      key: of the texts.
      rng: draws of the choice and of the sampler.
      n: problems to propose.
      known_ids: ids of problems that are not new.

    Returns:
      `(problems, report)`: n training problems, those written first; and the
      report of `QuestionGenerator.screen` with `filled`, the share of the n
      that the sampler gave.
    """
    texts = self.write(params, key, n)
    written, report = questions.screen(texts, known_ids)
    # As a prompt a problem may be longer than the text that it was read from.
    room = self._policy.lengths.prompt_tokens
    written = [one for one in written if self._num_tokens(one) <= room]
    problems = questions.choose(rng, written, n)
    missing = n - len(problems)
    if missing:
      problems += questions.propose(rng, missing)[0]
    return problems, report | {"filled": missing / n}

  def _num_tokens(self, problem: Problem) -> int:
    """Tokens of a prompt, whose newline takes the room of an end mark."""
    return len(self._policy.tokenizer.encode(problem.prompt))
