"""What the host says of a round of search, of the steps just written.

Between the two halves of a round the new candidates are read back as texts.
The host's guidances score them all; the checker, where it is the reward, judges
those that are finished and the rollouts of the others. What they say takes the
place of the device's scores. Where its feedback is what answers are revised by,
the checker also says what is wrong with them.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from o1jax import node_store
from o1jax.feedback import Critic, Said
from o1jax.reward.outcome import Verifier
from o1jax.search import contracts
from o1jax.search.driver import Told
from o1jax.search.host_guidance import Candidate, HostGuide
from o1jax.types import Problem

Watch = Callable[[list[str]], None]


class Round(NamedTuple):
  """The new candidates of a round, as tokens.

  Attributes:
    tokens, mask: `[B, W, A, R * S]` the way from the root to each candidate.
    is_new: `[B, W, A]` which candidates are valid and new.
    is_finished: `[B, W, A]` which of these end with the end mark.
    is_open: `[B, W, A]` which of these can be followed.
    is_revisable: `[B, W, A]` which finished ones another answer may follow.
    rollouts: `[B, W, A, M, T]` from those that can be followed; M may be 0.
    score: `[B, W, A]` the device's outcome of finished ones, its value of
      others.
  """

  tokens: jax.Array
  mask: jax.Array
  is_new: jax.Array
  is_finished: jax.Array
  is_open: jax.Array
  is_revisable: jax.Array
  rollouts: jax.Array
  score: jax.Array


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
  return Round(
    tokens=tokens.reshape(*shape, -1),
    mask=mask.reshape(*shape, -1),
    is_new=is_new,
    is_finished=is_new & is_finished,
    is_open=is_new & ~is_finished & ~expansion.is_terminal,
    is_revisable=is_new & is_finished & ~expansion.is_terminal,
    rollouts=rollouts.reshape(*shape, *rollouts.shape[2:]),
    score=jnp.where(is_finished, expansion.outcome, expansion.value),
  )


class Judge:
  """Reads rounds, shows them to a watcher and says what the host thinks.

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
    checks_rollouts: bool,
    guide: HostGuide | None,
    critic: Critic | None = None,
  ):
    """Prepares; `begin` comes before the first round.

    Args:
      text_fn: from the tokens of a path to the solution that it ends with.
      eos_id: the end mark.
      max_depth: of the trees.
      verifier: asked about finished solutions; None where it is not the reward.
      checks_rollouts: whether it is asked about rollouts too.
      guide: the host's guidances; None where there are none.
      critic: gives the feedback that revisions begin with; None where the
        policy writes it.
    """
    self.asked: list[list[str]] = []
    self._text = text_fn
    self._eos_id = eos_id
    self._verifier = verifier
    self._checks_rollouts = checks_rollouts
    self._guide = guide
    self._critic = critic
    self._read = jax.jit(functools.partial(read_round, max_depth=max_depth))
    self._problems: Sequence[Problem] = ()
    self._watch: Watch | None = None

  def begin(self, problems: Sequence[Problem], watch: Watch | None) -> None:
    """Begins a batch, whose rows past these problems only fill it."""
    self.asked = [[] for _ in problems]
    self._problems = problems
    self._watch = watch
    if self._guide is not None:
      self._guide.begin(len(problems))

  def __call__(
    self, state: contracts.SearchState, part: int
  ) -> Told | Said | None:
    """What the host says of a round; None where it has no say.

    Args:
      state: of one part of the batch, as `propose` returned it.
      part: its index; parts are equally large.
    """
    seen = jax.device_get(self._read(state))
    if self._watch is not None and part == 0:
      self._watch([self._path_text(seen, p) for p in _places(seen.is_new[:1])])
    first = part * len(seen.is_new)
    # Rows that only fill the batch are nobody's cost: they are left out.
    num_rows = max(len(self._problems) - first, 0)
    told = self._scores(seen, num_rows, first)
    if self._critic is None:
      return told
    return Said(told, *self._feedback(seen, num_rows, first))

  def _scores(self, seen: Round, num_rows: int, first: int) -> Told | None:
    """Guidance and verdicts; None where the host gives neither."""
    if self._verifier is None and self._guide is None:
      return None
    outcome = np.full(seen.is_new.shape, np.nan, np.float32)
    value = outcome.copy()
    if self._guide is not None:
      for row in range(min(num_rows, len(outcome))):
        self._guide_row(seen, row, first + row, outcome, value)
    if self._verifier is not None:
      self._check(seen, num_rows, first, outcome)
    return Told(outcome, None if self._guide is None else value)

  def _guide_row(self, seen: Round, row: int, index: int, outcome, value):
    """Writes the scores of a row's candidates, `index` among the problems."""
    places = [
      (row, *place)
      for place in _places(seen.is_finished[row] | seen.is_open[row])
    ]
    candidates = []
    for place in places:
      rollouts = tuple(self._rollout_texts(seen, place))
      candidates.append(
        Candidate(
          self._path_text(seen, place),
          bool(seen.is_finished[place]),
          rollouts,
          seen.rollouts.shape[3] if seen.is_open[place] else 0,
        )
      )
    problem = self._problems[index]
    scores = [float(seen.score[place]) for place in places]
    scores = self._guide(index, problem, candidates, scores)
    for place, score in zip(places, scores, strict=True):
      (outcome if seen.is_finished[place] else value)[place] = score

  def _check(self, seen: Round, num_rows: int, first: int, outcome) -> None:
    """Writes the checked outcomes of the first rows."""
    asked, texts = [], []
    for place in _places(seen.is_finished[:num_rows]):
      asked.append(place)
      texts.append(self._path_text(seen, place))
    if self._checks_rollouts:
      for place in _places(seen.is_open[:num_rows]):
        # One that was cut off has no answer: it counts as wrong.
        outcome[place] = 0.0
        for text in self._rollout_texts(seen, place):
          asked.append(place)
          texts.append(text)
    for place, text in zip(asked, texts, strict=True):
      self.asked[first + place[0]].append(text)
    problems = [self._problems[first + place[0]] for place in asked]
    verdicts = self._verifier.check(problems, texts)
    share = 1.0 / max(seen.rollouts.shape[3], 1)
    for place, verdict in zip(asked, verdicts, strict=True):
      if seen.is_finished[place]:
        outcome[place] = float(verdict.is_correct)
      else:
        outcome[place] += share * verdict.is_correct

  def _feedback(
    self, seen: Round, num_rows: int, first: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Feedback `[B, W, A, F]` on what may be revised, and its lengths."""
    lengths = np.zeros(seen.is_new.shape, np.int32)
    tokens = np.zeros((*lengths.shape, self._critic.max_tokens), np.int32)
    for place in _places(seen.is_revisable[:num_rows]):
      index, text = first + place[0], self._path_text(seen, place)
      self.asked[index].append(text)
      said = self._critic(self._problems[index], text)
      tokens[place][: len(said)] = said
      lengths[place] = len(said)
    return tokens, lengths

  def _path_text(self, seen: Round, place: tuple[int, ...]) -> str:
    return self._text(seen.tokens[place][seen.mask[place]])

  def _rollout_texts(
    self, seen: Round, place: tuple[int, ...]
  ) -> Iterator[str]:
    """Texts of the rollouts that ended, from an open candidate."""
    if not seen.is_open[place]:
      return
    start = seen.tokens[place][seen.mask[place]]
    for rollout in seen.rollouts[place]:
      if self._eos_id in rollout:
        yield self._text(np.concatenate([start, rollout]))


def _places(is_true: np.ndarray) -> list[tuple[int, ...]]:
  """Indices of what is true, in order."""
  return [tuple(place) for place in np.argwhere(is_true).tolist()]
