"""Texts as solutions whose weights say which of their tokens are learned.

A demonstration is learned whole. In texts with marks (`tasks.reflection`) what
was given is not: a judgement is learned and the solution that it judges is not,
in a chain of thought the criticism and the last solution are. A problem that
the policy should write is learned by as much as it earns. What becomes of such
texts as rows of a batch is up to `rows`.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from o1jax.encoding import Policy
from o1jax.packing import Document
from o1jax.policy.tokenizer import Tokenizer
from o1jax.question_generator import variance_score
from o1jax.tasks.task import Task
from o1jax.types import Problem, ScoredSolution


def demonstration(
  policy: Policy, problem: Problem, text: str, tokens: Sequence[int]
) -> ScoredSolution:
  """A demonstration as a solution; `tokens` are those of the text."""
  tokens = np.array([*tokens, policy.tokenizer.eos_id], np.int32)
  nothing = np.zeros(len(tokens), np.float32)
  return ScoredSolution(
    problem=problem,
    text=text,
    tokens=tokens,
    step_weights=np.ones(len(tokens), np.float32),
    behavior_log_probs=nothing,
    policy_log_probs=nothing,
    outcome_reward=0.0,
    verdict="unchecked",
    iteration=0,
    source="demonstration",
  )


def question_entry(
  policy: Policy, task: Task, problem: Problem, success: float
) -> ScoredSolution:
  """A problem as the policy should write it, behind the mark.

  Its weight is what it earns at its rate of success: cloning weighted by what
  is earned, as in ReST (arXiv 2308.08998), moves the policy to write more of
  such problems.
  """
  text = problem.prompt.removesuffix("\n")
  tokens = policy.tokenizer.encode(text)
  asked = dataclasses.replace(problem, prompt=task.question_mark)
  entry = demonstration(policy, asked, text, tokens)
  return dataclasses.replace(
    entry, step_weights=variance_score(success) * entry.step_weights
  )


def learned_parts(task: Task, text: str) -> Iterator[tuple[str, bool]]:
  """Splits a demonstration into parts, and says which of them are learned.

  All of a text without marks. With them only what follows a mark, and of that
  no solution but the last: a solution that is judged or revised may be wrong.
  """
  is_chain = text.startswith(task.thinking_mark)
  if is_chain:
    # The mark is given, and what is learned then is when to go on.
    yield task.thinking_mark, False
    text = text.removeprefix(task.thinking_mark)
  for mark in (task.judge_mark, task.same_mark):
    judged, found, judgement = text.partition(mark)
    if found:
      yield judged + mark, False
      yield judgement, True
      return
  *attempts, last = text.split(task.revision_mark)
  for place, attempt in enumerate(attempts):
    if place:
      criticism, newline, attempt = attempt.partition("\n")
      yield criticism + newline, True
    if is_chain:
      # From the end of the last line on: to end there is the other choice.
      yield attempt.removesuffix("\n"), False
      yield "\n" + task.revision_mark, True
    else:
      yield attempt + task.revision_mark, False
  yield last, True


def chain_entries(
  policy: Policy, task: Task, chains: Sequence[tuple[Problem, str]]
) -> list[ScoredSolution]:
  """Texts with marks as solutions whose weights say what is learned.

  Of an attempt in a chain whose steps are legal what its steps come to is
  learned too. Else the policy would see no line of a chain that does not reach
  the target, and would write the target as the result of anything.

  Args:
    policy: encodes.
    task: has the marks, and judges the steps.
    chains: problems and what is written behind them.
  """
  split = [list(learned_parts(task, text)) for _, text in chains]
  # Parts begin or end with newlines, which are tokens of their own: the tokens
  # of a text are those of its parts.
  texts = [part for parts in split for part, _ in parts]
  encoded = iter(policy.tokenizer.encode_batch(texts))
  entries = []
  for (problem, text), parts in zip(chains, split, strict=True):
    is_chain = text.startswith(task.thinking_mark)
    tokens, weights = [], []
    for part, learns in parts:
      ids = next(encoded)
      own = np.full(len(ids), learns, np.float32)
      is_attempt = is_chain and not learns and part != task.thinking_mark
      if is_attempt and all(task.judge_steps(problem, part)):
        # What follows the last token belongs to the next part.
        own[1:] = after_mark(policy, task, np.array(ids))[:-1]
      tokens += ids
      weights.append(own)
    # The last part is learned, and so is the end mark after it.
    weights = np.concatenate([*weights, np.ones(1, np.float32)])
    entry = demonstration(policy, problem, text, tokens)
    entries.append(dataclasses.replace(entry, step_weights=weights))
  return entries


def chain_document(prompt: np.ndarray, entry: ScoredSolution) -> Document:
  """A solution behind its prompt, with its weights, for a row of several."""
  tokens = np.concatenate([prompt, entry.tokens])
  weights = np.zeros(len(tokens), np.float32)
  # The weight of a token lies at the position before it.
  weights[len(prompt) - 1 : -1] = entry.step_weights
  return Document(tokens, weights)


def after_mark(policy: Policy, task: Task, tokens: np.ndarray) -> np.ndarray:
  """Where the following token is calculated and not chosen, `[..., T]` bool.

  That is from the mark of a step's consequences to the end of the step. A piece
  may hold more than the mark (" = -"): it is not among them, or it would be
  learned without what stands there instead of it.
  """
  tokenizer = policy.tokenizer
  is_mark = _holding(tokenizer, task.consequence_mark)[tokens]
  index = np.broadcast_to(np.arange(tokens.shape[-1]), tokens.shape)
  last_mark = np.where(is_mark, index, -1)
  last_end = np.where(tokens == tokenizer.newline_id, index, -1)
  return np.maximum.accumulate(last_mark, -1) > (
    np.maximum.accumulate(last_end, -1)
  )


@functools.lru_cache(maxsize=8)
def _holding(tokenizer: Tokenizer, text: str) -> np.ndarray:
  """Which pieces have a text in them, `[V]` bool."""
  return np.array([text.encode() in piece for piece in tokenizer.pieces])
