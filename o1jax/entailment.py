"""Whether one solution follows from another, asked of the policy in writing.

Two solutions stand behind the prompt, joined by the task's marks; then the
policy writes what the rows `comparing` taught it (see `tasks/reflection.py`):
what each of them answers, and the verdict, one word on a line. It is read as a
judgement is (see `self_evaluation.py`): the second follows from the first where

  P(yes) / (P(yes) + P(no)) > 1/2

at the verdict's place. Where no verdict comes nothing follows, nor from or to a
text that cannot be asked about, being empty, too long or with a mark in it.

Solutions that follow from each other are of one class: the classes of semantic
entropy (Kuhn et al., arXiv 2302.09664).
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from o1jax.encoding import Policy
from o1jax.policy.cache import prefix_from_prompt
from o1jax.policy.network import Params
from o1jax.search.host_guidance import Classes, entailment_classes
from o1jax.self_evaluation import UNDECIDED, judge, judgement_behind
from o1jax.tasks.reflection import marked
from o1jax.tasks.task import Task
from o1jax.types import Problem

Pair = tuple[str, str]
# `(problem, pairs) -> ...`, for each `(a, b)` whether b follows from a.
Entails = Callable[[Problem, Sequence[Pair]], Sequence[bool]]
# Answers that are remembered; then all are forgotten.
_MAX_KNOWN = 100_000


def policy_classes(policy: Policy, params: Params, task: Task) -> Classes:
  """Classes of solutions by what a policy says, for `Solver(classes_fn=...)`.

  What it writes for that is not counted among the tokens of a search.

  Raises:
    ValueError: as `Asker`.
  """
  return make_classes(functools.partial(Asker(policy, task), params))


def make_classes(entails_fn: Entails) -> Classes:
  """Classes of solutions that follow from each other.

  All pairs of the solutions, both ways round, are asked about in one call, each
  pair of texts of a problem once. A text that stands there twice is asked about
  too: it may say nothing, and then stands for a class of its own each time.

  Args:
    entails_fn: is asked.
  """
  known: dict[tuple[str, Pair], bool] = {}

  def classes_fn(problem: Problem, texts: Sequence[str]) -> list[int]:
    if len(known) > _MAX_KNOWN:
      known.clear()
    pairs = dict.fromkeys(itertools.permutations(texts, 2))
    new = [pair for pair in pairs if (problem.prompt, pair) not in known]
    if new:
      answers = entails_fn(problem, new)
      for pair, answer in zip(new, answers, strict=True):
        known[problem.prompt, pair] = answer
    return entailment_classes(texts, lambda a, b: known[problem.prompt, (a, b)])

  return classes_fn


class Asker:
  """Asks a policy about pairs of solutions, many in one compiled call."""

  def __init__(self, policy: Policy, task: Task, *, max_rows: int = 128):
    """Prepares; nothing compiles before the first call.

    Args:
      policy: one that learned rows of kind comparing.
      task: its marks and verdicts.
      max_rows: most pairs of one call; fewer are filled up to a power of two.

    Raises:
      ValueError: the task has no marks for comparing, or its verdicts are not
        one token each.
    """
    if not (task.other_mark and task.same_mark):
      raise ValueError(
        f"task {task.name} has no marks for comparing, so that nothing taught "
        "its policy to compare: take the classes of the answers"
      )
    lengths = policy.lengths
    self._policy = policy
    self._other_mark = task.other_mark
    marks = task.judge_mark, task.revision_mark
    self._marks = [*filter(None, marks), task.other_mark, task.same_mark]
    self._form = judgement_behind(
      policy.tokenizer,
      task.same_mark,
      task.verdict_words,
      # What a solution answers is not longer than the solution.
      max_tokens=2 * lengths.step_tokens * lengths.num_steps + 1,
      asker="entailment",
      kind="comparing",
    )
    # As wide as the rows that taught it.
    self._width = lengths.reflection_tokens or lengths.row_tokens
    self._max_rows = max_rows
    self._scores = jax.jit(self._score)

  def __call__(
    self, params: Params, problem: Problem, pairs: Sequence[Pair]
  ) -> list[bool]:
    """For each `(a, b)`, whether the policy says that b follows from a.

    Args:
      params: of the policy.
      problem: that all of them are solutions of.
      pairs: any number of them.
    """
    asked = [i for i, pair in enumerate(pairs) if all(map(self._is_read, pair))]
    encoded = self._policy.tokenizer.encode_batch(
      [self._question(problem, *pairs[i]) for i in asked]
    )
    questions = {
      i: tokens
      for i, tokens in zip(asked, encoded, strict=True)
      if len(tokens) <= self._width
    }
    follows = np.zeros(len(pairs), bool)
    places = list(questions)
    for start in range(0, len(places), self._max_rows):
      some = places[start : start + self._max_rows]
      scores = self._ask(params, [questions[i] for i in some])
      follows[some] = scores > UNDECIDED
    return follows.tolist()

  def _is_read(self, text: str) -> bool:
    """Whether a text is neither empty nor holds marks of its own."""
    lines = f"\n{text}\n"
    return bool(text.strip()) and not any(
      f"\n{mark}" in lines for mark in self._marks
    )

  def _question(self, problem: Problem, a: str, b: str) -> str:
    return problem.prompt + marked(a, self._other_mark) + b.rstrip("\n")

  def _ask(self, params: Params, questions: Sequence[Sequence[int]]):
    """The scores of a few questions, as one batch of rows."""
    size = min(1 << (len(questions) - 1).bit_length(), self._max_rows)
    pad_id = self._policy.tokenizer.pad_id
    tokens = np.full((size, self._width), pad_id, np.int32)
    lengths = np.ones(size, np.int32)
    for row, question in enumerate(questions):
      tokens[row, : len(question)] = question
      lengths[row] = len(question)
    is_active = np.arange(size) < len(questions)
    scores = self._scores(params, tokens, lengths, is_active)
    return np.asarray(scores)[: len(questions)]

  def _score(
    self,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    is_active: jax.Array,
  ) -> jax.Array:
    """P(yes) of questions `[rows, T]`, `[rows]`."""
    network, tokenizer = self._policy.network, self._policy.tokenizer
    prefix, last_hidden = prefix_from_prompt(network, params, tokens, lengths)
    scores, _ = judge(
      network,
      params,
      self._form,
      last_hidden,
      lengths,
      prefix,
      is_active,
      eos_id=tokenizer.eos_id,
      pad_id=tokenizer.pad_id,
    )
    return scores
