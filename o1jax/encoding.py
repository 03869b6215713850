"""What a policy reads: its tokenizer and shapes, and problems as arrays."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from o1jax.policy.network import Network
from o1jax.policy.tokenizer import Tokenizer
from o1jax.types import Problem, ProblemBatch


class Lengths(NamedTuple):
  """Shapes that follow from the task's format.

  Attributes:
    prompt_tokens: P, positions of a prompt.
    step_tokens: S, tokens of one step, its end included.
    num_steps: steps of a solution.
    row_tokens: T, positions of a row that is learned from: prompt and solution.
    reflection_tokens: the same of rows with judgements, revisions or texts of
      files, which are longer; 0 for `row_tokens`.
    thinking_tokens: tokens of a chain of thought; 0 where none is written.
    opening_tokens: positions of a row that ends where the first step has
      chosen; 0 where there are none.
  """

  prompt_tokens: int
  step_tokens: int
  num_steps: int
  row_tokens: int
  reflection_tokens: int = 0
  thinking_tokens: int = 0
  opening_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Policy:
  """What searches and learns: a network with its tokenizer and its shapes."""

  network: Network
  tokenizer: Tokenizer
  lengths: Lengths

  def encode_solution(self, text: str) -> list[int]:
    """Tokens of a solution, end mark included."""
    return [*self.tokenizer.encode(text), self.tokenizer.eos_id]


def problem_seed(problem: Problem) -> int:
  """Returns a fixed 32-bit hash of the problem's id (FNV-1a)."""
  value = 2166136261
  for byte in problem.id.encode():
    value = (value ^ byte) * 16777619 % 2**32
  return value


def encode_problems(
  policy: Policy, problems: Sequence[Problem]
) -> ProblemBatch:
  """Problems as arrays.

  Raises:
    ValueError: a prompt is longer than P.
  """
  encoded = policy.tokenizer.encode_batch([p.prompt for p in problems])
  width = policy.lengths.prompt_tokens
  for problem, ids in zip(problems, encoded, strict=True):
    if len(ids) > width:
      raise ValueError(
        f"the prompt of {problem.id} has {len(ids)} tokens, more than "
        f"lengths.prompt_tokens={width}: raise it"
      )
  tokens = np.full((len(problems), width), policy.tokenizer.pad_id, np.int32)
  for row, ids in zip(tokens, encoded, strict=True):
    row[: len(ids)] = ids
  return ProblemBatch(
    tokens=tokens,
    lengths=np.array([len(ids) for ids in encoded], np.int32),
    seeds=np.array([problem_seed(p) for p in problems], np.uint32),
  )
