"""What the host says of a round of search: verdicts on what was just written.

Between the two halves of a round the new candidates are read back as texts.
The checker judges those that are finished, and the rollouts of the others; its
verdicts are the outcomes that the search goes on with.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from o1jax import node_store
from o1jax.reward.outcome import Verifier
from o1jax.search import contracts
from o1jax.types import Problem

Watch = Callable[[list[str]], None]


class Round(NamedTuple):
  """The new candidates of a round, as tokens.

  Attributes:
    tokens, mask: `[B, W, A, R * S]` the way from the root to each candidate.
    is_new: `[B, W, A]` which candidates are valid and new.
    is_finished: `[B, W, A]` which of these end with the end mark.
    rollouts: `[B, W, A, M, T]`.
    is_rolled: `[B, W, A]` which new candidates have rollouts.
  """

  tokens: jax.Array
  mask: jax.Array
  is_new: jax.Array
  is_finished: jax.Array
  rollouts: jax.Array
  is_rolled: jax.Array


def read_round(state: contracts.SearchState, *, max_depth: int) -> Round:
  """Reads the candidates of a state that `propose` returned."""
  store, expansion = state.node_state, state.expansion
  trees, leaves, candidates = expansion.is_valid.shape
  row = jnp.arange(trees)[:, None]
  actions = jnp.arange(candidates)[None, None]
  node = (state.first_child[..., None] + actions).reshape(trees, -1)
  path = node_store.path_to(store, node, max_depth)
  tokens, mask = node_store.path_tokens(store, path)
  shape = (trees, leaves, candidates)
  is_new = expansion.is_valid & state.is_expanding[..., None]
  is_finished = store.is_finished[row, node].reshape(shape)
  rollouts = store.rollout_tokens[row, node]
  is_rolled = is_new & ~expansion.is_terminal & (rollouts.shape[2] > 0)
  return Round(
    tokens=tokens.reshape(*shape, -1),
    mask=mask.reshape(*shape, -1),
    is_new=is_new,
    is_finished=is_new & is_finished,
    rollouts=rollouts.reshape(*shape, *rollouts.shape[2:]),
    is_rolled=is_rolled,
  )


class Judge:
  """Reads rounds, shows them to a watcher and has the checker judge them.

  Attributes:
    asked: the texts that the checker was asked about, by problem.
  """

  def __init__(
    self,
    text_fn: Callable[[np.ndarray], str],
    *,
    eos_id: int,
    max_depth: int,
    verifier: Verifier | None,
  ):
    """Prepares; `begin` comes before the first round.

    Args:
      text_fn: from the tokens of a path to the solution that it ends with.
      eos_id: the end mark.
      max_depth: of the trees.
      verifier: asked about finished solutions; None where the device judges.
    """
    self.asked: list[list[str]] = []
    self._text = text_fn
    self._eos_id = eos_id
    self._verifier = verifier
    self._read = jax.jit(functools.partial(read_round, max_depth=max_depth))
    self._problems: Sequence[Problem] = ()
    self._watch: Watch | None = None

  def begin(self, problems: Sequence[Problem], watch: Watch | None) -> None:
    """Begins a batch, whose rows past these problems only fill it."""
    self.asked = [[] for _ in problems]
    self._problems = problems
    self._watch = watch

  def __call__(
    self, state: contracts.SearchState, part: int
  ) -> np.ndarray | None:
    """Outcomes `[B, W, A]` where they were checked, else NaN.

    Args:
      state: of one part of the batch, as `propose` returned it.
      part: its index; parts are equally large.
    """
    seen = jax.device_get(self._read(state))
    if self._watch is not None and part == 0:
      self._watch(self._new_texts(seen))
    if self._verifier is None:
      return None
    first = part * len(seen.is_new)
    places, texts = [], []
    for place, text in self._questions(seen, first):
      self.asked[first + place[0]].append(text)
      places.append(place)
      texts.append(text)
    problems = [self._problems[first + b] for b, _, _ in places]
    verdicts = self._verifier.check(problems, texts)
    outcome = np.full(seen.is_new.shape, np.nan, np.float32)
    # Those cut off have no answer: they count as wrong.
    is_real = first + np.arange(len(outcome)) < len(self._problems)
    outcome[seen.is_rolled & is_real[:, None, None]] = 0.0
    share = 1.0 / max(seen.rollouts.shape[3], 1)
    for place, verdict in zip(places, verdicts, strict=True):
      if seen.is_finished[place]:
        outcome[place] = float(verdict.is_correct)
      else:
        outcome[place] += share * verdict.is_correct
    return outcome

  def _new_texts(self, seen: Round) -> list[str]:
    """Texts of the first problem's new candidates."""
    is_new = seen.is_new[0]
    new = zip(seen.tokens[0][is_new], seen.mask[0][is_new], strict=True)
    return [self._text(tokens[mask]) for tokens, mask in new]

  def _questions(
    self, seen: Round, first: int
  ) -> Iterator[tuple[tuple[int, int, int], str]]:
    """Places and texts of finished solutions, then of rollouts that ended.

    Rows that only fill the batch are nobody's cost: they are left out.
    """
    for place in _places(seen.is_finished, len(self._problems) - first):
      yield place, self._text(seen.tokens[place][seen.mask[place]])
    for place in _places(seen.is_rolled, len(self._problems) - first):
      start = seen.tokens[place][seen.mask[place]]
      for rollout in seen.rollouts[place]:
        if self._eos_id in rollout:
          yield place, self._text(np.concatenate([start, rollout]))


def _places(is_true: np.ndarray, num_rows: int) -> list[tuple[int, int, int]]:
  """Indices `(b, w, a)` of what is true in the first rows, in order."""
  places = np.argwhere(is_true[: max(num_rows, 0)]).tolist()
  return [tuple(place) for place in places]
