"""Guidances of the host against sums by hand."""

import collections
import math

import pytest

from o1jax.search.host_guidance import (
  Candidate,
  HostGuide,
  Readers,
  Reading,
  class_entropy,
  entailment_classes,
  heuristic,
  self_consistency,
  semantic_entropy,
  split_weights,
)
from o1jax.types import Problem

PROBLEM = Problem("toy/0", "toy", "ask\n", {})


def last_word(problem, texts):
  """The answer of a text; "?" is none."""
  words = [text.split()[-1] for text in texts]
  return [None if word == "?" else word for word in words]


READERS = Readers(lambda problem, text: len(text) / 100, last_word, last_word)


def reading(*candidates, votes=()):
  return Reading(PROBLEM, candidates, collections.Counter(votes), READERS)


def test_the_heuristic_reads_whole_lines_of_what_is_unfinished():
  read = reading(
    Candidate("ab\ncde", True),
    Candidate("ab\ncde", False),
    Candidate("a", False),
  )
  assert heuristic(read) == [0.06, 0.03, 0.0]


def test_self_consistency_is_the_share_of_the_answer():
  read = reading(
    Candidate("x 7", True),
    Candidate("y 8", True),
    Candidate("z ?", True),
    Candidate("x\n", False),
    Candidate("y\n", False, ("y 8", "y 7", "yy 8"), 4),
    Candidate("y\n", False, ("y ?",), 4),
    votes=["7", "7", "7", "8", None],
  )
  assert self_consistency(read) == [3 / 5, 1 / 5, 0.0, None, 2 / 4, 0.0]


def test_semantic_entropy_is_that_of_the_classes():
  rollouts = ("a 7", "b 7", "c 8", "d ?")
  read = reading(
    Candidate("x 7", True),
    Candidate("x\n", False),
    Candidate("x\n", False, rollouts, 5),
    Candidate("x\n", False, ("a 7",) * 5, 5),
    Candidate("x\n", False, (), 5),
  )
  # Classes of two and of one; one without answer, one cut off: both alone.
  entropy = -(2 / 5) * math.log(2 / 5) - 3 / 5 * math.log(1 / 5)
  found = semantic_entropy(read)
  assert found[:2] == [None, None]
  assert found[2:] == pytest.approx([1 - entropy / math.log(5), 1, 0])


def test_the_entropy_of_equal_classes_is_their_logarithm():
  assert class_entropy("aabbcc", 6) == pytest.approx(math.log(3))
  assert class_entropy([None] * 4, 4) == pytest.approx(math.log(4))
  assert class_entropy("aaa", 3) == 0


def test_classes_are_of_texts_that_entail_each_other():
  asked = []

  def entails(a, b):
    asked.append((a, b))
    return set(b) <= set(a)

  # "ab" entails "a", and not the other way round.
  assert entailment_classes(["ab", "a", "ba", "aa"], entails) == [0, 1, 0, 1]
  # A text is compared with the first of a class, until one takes it.
  assert ("a", "aa") in asked and ("ba", "aa") not in asked
  assert entailment_classes([], entails) == []


def test_the_mean_is_over_those_that_speak():
  def own(problem, texts):
    assert problem is PROBLEM
    return [0.5 if "x" in text else None for text in texts]

  guide = HostGuide(
    {"own": 1.0, "self_consistency": 2.0}, 3.0, READERS, {"own": own}
  )
  guide.begin(2)
  candidates = [
    Candidate("x 7", True),
    Candidate("y 8", True),
    Candidate("y\n", False),
    Candidate("x\n", False, ("x 8", "x 9", "x 9"), 4),
  ]
  # Votes: 7, 8, 8, 9, 9.
  expected = [
    (3 * 0.1 + 1 * 0.5 + 2 * 1 / 5) / 6,
    (3 * 0.2 + 2 * 2 / 5) / 5,
    0.3,
    (3 * 0.4 + 1 * 0.5 + 2 * 2 / 4) / 6,
  ]
  scores = [0.1, 0.2, 0.3, 0.4]
  assert guide(1, PROBLEM, candidates, scores) == pytest.approx(expected)
  # What was read before counts too, for the same problem only.
  again = guide(1, PROBLEM, [Candidate("y 9", True)], [0.0])
  assert again == pytest.approx([2 * 3 / 6 / 5])
  other = guide(0, PROBLEM, [Candidate("y 9", True)], [0.0])
  assert other == pytest.approx([2 * 1 / 5])


@pytest.mark.parametrize(
  "scores, words",
  [
    ([0.5], "gave .* for 2 texts"),
    ([0.5, math.nan], "finite number"),
    ([0.5, None], "no guidance says anything of the text 'y 8'"),
  ],
)
def test_functions_that_give_no_scores_are_refused(scores, words):
  own = {"own": lambda problem, texts: scores}
  guide = HostGuide({"own": 1.0}, 0.0, READERS, own)
  guide.begin(1)
  candidates = [Candidate("x 7", True), Candidate("y 8", True)]
  with pytest.raises(ValueError, match=words):
    guide(0, PROBLEM, candidates, [0.0, 0.0])


def test_weights_go_to_the_device_and_to_the_host():
  def own(problem, texts):
    return [0.0] * len(texts)

  weights = {"value": 1.0, "heuristic": 2.0, "own": 0.5, "semantic_entropy": 0}
  on_device, on_host = split_weights(weights, None, {"own": own})
  assert on_device == {"value": 1.0}
  assert on_host == {"heuristic": 2.0, "own": 0.5}
  # The host alone, and the device alone.
  assert split_weights({"heuristic": 1.0, "value": 0}, None, None)[0] is None
  assert split_weights({"value": 0.0}, None, None) == ({"value": 0.0}, {})
  assert split_weights(None, None, None) == (None, {})


@pytest.mark.parametrize(
  "weights, own, words",
  [
    ({"heuristics": 1.0}, {}, "heuristics"),
    ({"heuristic": -1.0}, {}, "heuristic=-1.0"),
    ({"value": 1.0}, {"value": last_word}, "'value' is there already"),
    ({"value": 1.0}, {"heuristic": last_word}, "'heuristic' is there already"),
  ],
)
def test_bad_weights_are_refused(weights, own, words):
  with pytest.raises(ValueError, match=words):
    split_weights(weights, None, own)
