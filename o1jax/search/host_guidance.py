"""Guidance by the host: scores of candidates that are read as texts.

A host guidance sees what a compiled search cannot: the task's heuristic, the
answers that solutions end with, a reward model of one's own. It joins the
device's guidances (guidance.py) in one weighted mean, named in the config as
they are. Where it has nothing to say of a candidate it says None, and the mean
is over the others:

  heuristic         the task's guess, of whole lines where a text is unfinished
  self_consistency  of a finished solution the share of those read so far in
                    the search of its problem, rollouts and this round
                    included, that have its answer; of an unfinished one the
                    share of the commonest answer among its rollouts, None
                    without rollouts (Wang et al., arXiv 2203.11171)
  semantic_entropy  1 - H / log M for the classes of M rollouts: those of their
                    final answers, or of `classes_fn`; None of a finished
                    solution, which has none (Kuhn et al., arXiv 2302.09664;
                    Farquhar et al., Nature 2024)

Scores are in [0, 1], higher for better. Solutions that were cut off have no
answer: the device gives them its lowest score, and rollouts that were cut off
agree with no other.
"""

import collections
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

from o1jax.search.guidance import GUIDANCES, Guidance
from o1jax.search.selection import named
from o1jax.types import Problem

# `(problem, texts) -> ...`, one a text.
TextGuidance = Callable[[Problem, Sequence[str]], Sequence[float | None]]
Classes = Callable[[Problem, Sequence[str]], Sequence[Hashable | None]]


class Candidate(NamedTuple):
  """A new candidate of a search.

  Attributes:
    text: of the solution up to its end.
    is_finished: whether it is a whole solution.
    rollouts: texts of whole solutions that were sampled from here.
    num_rollouts: M, those that were cut off included.
  """

  text: str
  is_finished: bool
  rollouts: tuple[str, ...] = ()
  num_rollouts: int = 0


class Readers(NamedTuple):
  """How the task reads texts.

  Attributes:
    heuristic_fn: `(problem, text) -> score`.
    answers_fn: `(problem, solutions) -> answers` in normal form, None where
      none was read.
    classes_fn: the same with the classes that semantic entropy is over.
  """

  heuristic_fn: Callable[[Problem, str], float]
  answers_fn: Classes
  classes_fn: Classes


class Reading(NamedTuple):
  """What is known of the new candidates of one problem.

  Attributes:
    problem: theirs.
    candidates: valid ones, none of them cut off.
    votes: answers of all solutions read so far, these and rollouts included,
      where a guidance needs them.
    readers: of the task.
  """

  problem: Problem
  candidates: Sequence[Candidate]
  votes: collections.Counter
  readers: Readers


HostGuidance = Callable[[Reading], Sequence[float | None]]


def heuristic(reading: Reading) -> list[float | None]:
  """The task's heuristic."""
  score = reading.readers.heuristic_fn
  return [
    score(reading.problem, c.text if c.is_finished else _whole_lines(c.text))
    for c in reading.candidates
  ]


def self_consistency(reading: Reading) -> list[float | None]:
  """The share of solutions with the same answer; see the head."""
  answers_fn = reading.readers.answers_fn
  total = reading.votes.total()
  finished = [c.text for c in reading.candidates if c.is_finished]
  answers = dict(
    zip(finished, answers_fn(reading.problem, finished), strict=True)
  )

  def score(candidate):
    if candidate.is_finished:
      answer = answers[candidate.text]
      return 0.0 if answer is None else reading.votes[answer] / total
    if not candidate.num_rollouts:
      return None
    counts = collections.Counter(
      answers_fn(reading.problem, candidate.rollouts)
    )
    del counts[None]
    return max(counts.values(), default=0) / candidate.num_rollouts

  return [score(c) for c in reading.candidates]


def semantic_entropy(reading: Reading) -> list[float | None]:
  """How far the rollouts of a candidate end with one meaning."""

  def score(candidate):
    if candidate.is_finished or not candidate.num_rollouts:
      return None
    labels = reading.readers.classes_fn(reading.problem, candidate.rollouts)
    entropy = class_entropy(labels, candidate.num_rollouts)
    return 1.0 - entropy / math.log(candidate.num_rollouts)

  return [score(c) for c in reading.candidates]


HOST_GUIDANCES: Mapping[str, HostGuidance] = {
  "heuristic": heuristic,
  "self_consistency": self_consistency,
  "semantic_entropy": semantic_entropy,
}
# Those that read rollouts.
READ_ROLLOUTS = ("self_consistency", "semantic_entropy")


def class_entropy(labels: Sequence[Hashable | None], size: int) -> float:
  """Entropy, in nats, of classes; those without a label stand alone.

  Args:
    labels: of texts, None for one that is like no other.
    size: M, texts in all; those beyond the labels stand alone too.
  """
  counts = collections.Counter(labels)
  del counts[None]
  num_alone = size - counts.total()
  shares = [count / size for count in counts.values()] + [1 / size] * num_alone
  return -math.fsum(share * math.log(share) for share in shares)


def entailment_classes(
  texts: Sequence[str], entails: Callable[[str, str], bool]
) -> list[int]:
  """Classes of texts that entail each other.

  Each text joins the first class whose first member it entails and is entailed
  by, else it begins a class: Kuhn et al., arXiv 2302.09664, Algorithm 1.

  Args:
    texts: with their context, as `entails` needs it.
    entails: `(a, b)`, whether b follows from a.

  Returns:
    The class of each text, numbered from 0 by first appearance.
  """
  firsts: list[str] = []
  labels = []
  for text in texts:
    same = (
      label
      for label, first in enumerate(firsts)
      if entails(first, text) and entails(text, first)
    )
    label = next(same, len(firsts))
    if label == len(firsts):
      firsts.append(text)
    labels.append(label)
  return labels


def split_weights(
  weights: Mapping[str, float] | None,
  functions: Mapping[str, Guidance] | None,
  text_functions: Mapping[str, TextGuidance] | None,
) -> tuple[Mapping[str, float] | None, dict[str, float]]:
  """The weights of the device's guidances and those of the host's, above 0.

  The device's are None where the value head alone is to stand there, which is
  so too where the host alone guides.

  Raises:
    ValueError: an unknown name, or one that is taken.
  """
  on_host = {**HOST_GUIDANCES, **(text_functions or {})}
  on_device = {**GUIDANCES, **(functions or {})}
  for name in text_functions or {}:
    if name in on_device or name in HOST_GUIDANCES:
      raise ValueError(f"guidance {name!r} is there already: rename yours")
  if weights is None:
    return None, {}
  for name, weight in weights.items():
    named("guidance", name, {**on_device, **on_host})
    if not 0 <= weight < float("inf"):
      raise ValueError(f"guidance.{name}={weight}: give a weight of 0 or more")
  of_host = {n: w for n, w in weights.items() if w and n in on_host}
  of_device = {n: w for n, w in weights.items() if n not in on_host}
  if of_host and not any(of_device.values()):
    return None, of_host
  return of_device, of_host


class HostGuide:
  """The host's guidances of a search, with what it has read so far."""

  def __init__(
    self,
    weights: Mapping[str, float],
    device_weight: float,
    readers: Readers,
    text_functions: Mapping[str, TextGuidance] | None = None,
    *,
    is_checked: bool = False,
  ):
    """Takes what `split_weights` accepted.

    Args:
      weights: of the host's guidances by name, above 0.
      device_weight: sum of the weights of the device's.
      readers: of the task.
      text_functions: guidances of one's own by name.
      is_checked: whether a checker decides about finished solutions, so that
        no guidance need have a word on them.
    """
    own = {n: _of_texts(n, fn) for n, fn in (text_functions or {}).items()}
    known = {**HOST_GUIDANCES, **own}
    # In the order of the names, so that equal weights give equal bits.
    self._parts = [(weights[name], known[name]) for name in sorted(weights)]
    self._counts_votes = "self_consistency" in weights
    self._device_weight = device_weight
    self._readers = readers
    self._is_checked = is_checked
    self._votes: list[collections.Counter] = []

  def begin(self, num_problems: int) -> None:
    """Forgets what was read; further problems are searched."""
    self._votes = [collections.Counter() for _ in range(num_problems)]

  def __call__(
    self,
    index: int,
    problem: Problem,
    candidates: Sequence[Candidate],
    device_scores: Sequence[float],
  ) -> list[float]:
    """Weighted means of the device's scores and the host's.

    Where none speaks of a solution that is checked, it is the device's score.

    Args:
      index: of the problem among those searched.
      problem: the problem.
      candidates: its new ones, none of them cut off.
      device_scores: theirs by the device's guidances.

    Raises:
      ValueError: a function of one's own gave no finite numbers, or none of
        the guidances says anything of a candidate.
    """
    votes = self._votes[index]
    if self._counts_votes:
      texts = [c.text for c in candidates if c.is_finished]
      texts += [text for c in candidates for text in c.rollouts]
      votes.update(self._readers.answers_fn(problem, texts))
    reading = Reading(problem, candidates, votes, self._readers)
    sums = [self._device_weight * score for score in device_scores]
    totals = [self._device_weight] * len(sums)
    for weight, guidance in self._parts:
      for i, score in enumerate(guidance(reading)):
        if score is not None:
          sums[i] += weight * score
          totals[i] += weight
    for i, candidate in enumerate(candidates):
      if totals[i]:
        sums[i] /= totals[i]
      elif self._is_checked and candidate.is_finished:
        sums[i] = device_scores[i]
      else:
        raise ValueError(
          f"no guidance says anything of the text {candidate.text!r}: give one "
          "that does a weight, such as guidance.value"
        )
    return sums


def _of_texts(name: str, function: TextGuidance) -> HostGuidance:
  """A guidance of one's own, its scores checked."""

  def guidance(reading: Reading) -> Sequence[float | None]:
    texts = [c.text for c in reading.candidates]
    scores = list(function(reading.problem, texts))
    if len(scores) != len(texts) or not all(
      score is None or math.isfinite(score) for score in scores
    ):
      raise ValueError(
        f"guidance {name!r} gave {scores} for {len(texts)} texts: it must give"
        " a finite number, or None, for each"
      )
    return scores

  return guidance


def _whole_lines(text: str) -> str:
  return text[: text.rfind("\n") + 1]
