"""The checker's feedback on answers that are to be revised.

A policy that revises writes a line of criticism behind the revision mark. With
feedback from outside that line is the checker's: what is wrong, and in which
step. The policy does not know this by itself, so a search asks for it only
where its config says so, and each question is counted.

Between the two halves of a round the host gives a line for each new answer that
may be revised; it is kept with the answer's node, and the step model begins the
revisions with it. Self-Refine is Madaan et al., arXiv 2303.17651; revisions by
what a tool says are those of CRITIC, Gou et al., arXiv 2305.11738.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from o1jax import node_store
from o1jax.policy.tokenizer import Tokenizer
from o1jax.search.contracts import SearchState
from o1jax.search.driver import Told, take_in
from o1jax.types import Problem

_MAX_KNOWN = 100_000  # texts remembered


class Said(NamedTuple):
  """What the host says of the candidates of a round, feedback included.

  Attributes:
    told: of their scores, or None.
    tokens: `[B, W, A, F]` feedback on each answer that may be revised.
    lengths: `[B, W, A]` how many tokens of it count.
  """

  told: Told | None
  tokens: Any
  lengths: Any


def take_in_feedback(state: SearchState, said: Said) -> tuple[SearchState, Any]:
  """Keeps feedback with the nodes it is on; see `driver.run_with_host`."""
  new = dict(feedback_tokens=said.tokens, feedback_lengths=said.lengths)
  store = node_store.write_nodes(state.node_state, state.first_child, new)
  return take_in(state.replace(node_state=store), said.told)


class Critic:
  """Feedback as tokens, each text asked about once."""

  def __init__(
    self,
    feedback_fn: Callable[[Problem, str], str],
    tokenizer: Tokenizer,
    max_tokens: int,
  ):
    """Prepares.

    Args:
      feedback_fn: the task's, one line with its newline; it depends on the
        problem's id and the text alone.
      tokenizer: the policy's.
      max_tokens: F; a longer line loses its last tokens but for the newline.
    """
    self.max_tokens = max_tokens
    self._feedback_fn = feedback_fn
    self._tokenizer = tokenizer
    self._known: dict[tuple[str, str], list[int]] = {}

  def __call__(self, problem: Problem, text: str) -> list[int]:
    """The feedback on one answer."""
    if len(self._known) > _MAX_KNOWN:
      self._known.clear()
    key = (problem.id, text)
    if key not in self._known:
      line = self._feedback_fn(problem, text)
      *tokens, newline = self._tokenizer.encode(line)
      self._known[key] = [*tokens[: self.max_tokens - 1], newline]
    return self._known[key]
