"""Searches that the host guides, their scores taken from the texts again."""

import collections
import functools

import jax
import numpy as np
import pytest

from o1jax import mesh as mesh_lib
from o1jax import searched as searched_lib
from o1jax.search import ROOT
from o1jax.search.host_guidance import class_entropy
from o1jax.solver import Solver
from policies import ToyTask, tiny_params, tiny_policy

pytestmark = pytest.mark.usefixtures("quick_programs")

TASK = ToyTask(num_numbers=3, min_number=1, max_number=9)
PROBLEMS = TASK.sample_problems(np.random.default_rng(0), 3)
M = 3
TREE = dict(
  strategy="mcts", num_candidates=3, num_expansions=3, num_simulations=9
)


def guided(monkeypatch=None, **options):
  """A search of the problems; with its rollouts in the trees."""
  if monkeypatch is not None:
    fields = (*searched_lib.STORE_FIELDS, "rollout_tokens")
    monkeypatch.setattr(searched_lib, "STORE_FIELDS", fields)
  solver = Solver(
    tiny_policy(),
    batch_size=4,
    mesh=mesh_lib.make_mesh({"data": 2}),
    task=TASK,
    **TREE | options,
  )
  return solver(tiny_params(), jax.random.key(3), PROBLEMS)


def text_of(nodes, node):
  path = searched_lib.path_of(nodes["parent"], node)
  return "".join(nodes["texts"][n] for n in path)


def scored(one):
  """Nodes `(node, text, is_finished, score)` that guidance has a word on."""
  nodes = one.nodes
  for node in np.flatnonzero(nodes["is_valid"]).tolist():
    is_finished = bool(nodes["is_finished"][node])
    if node != ROOT and (is_finished or not nodes["is_terminal"][node]):
      score = float(nodes["value"][node] + nodes["reward"][node])
      yield node, text_of(nodes, node), is_finished, score


def rollouts_of(one, node):
  """Answers of the rollouts from a node that ended."""
  tokenizer = tiny_policy().tokenizer
  return [
    TASK.check(
      one.problem, text_of(one.nodes, node) + tokenizer.decode(rollout)
    ).answer
    for rollout in one.nodes["rollout_tokens"][node].tolist()
    if tokenizer.eos_id in rollout
  ]


@functools.cache
def by_value():
  return guided()


def test_a_function_on_texts_guides_alone():
  def length(problem, texts):
    assert problem in PROBLEMS
    return [1 / (1 + len(text)) for text in texts]

  found = guided(guidance={"length": 1.0}, text_functions={"length": length})
  for one in found:
    for _, text, _, score in scored(one):
      assert score == pytest.approx(1 / (1 + len(text)))
    outcomes = [s.outcome for s in one.solutions if s.is_finished]
    if outcomes:
      assert one.solutions[one.selected].outcome == max(outcomes)
    assert all(s.outcome == 0 for s in one.solutions if not s.is_finished)
    assert one.cost["verifier_requests"] == 0


def test_device_and_host_share_the_score_by_their_weights():
  def half(problem, texts):
    return [0.5] * len(texts)

  found = guided(
    guidance={"value": 3.0, "half": 1.0}, text_functions={"half": half}
  )
  for one, plain in zip(found, by_value(), strict=True):
    values = {text: score for _, text, _, score in scored(plain)}
    common = [row for row in scored(one) if row[1] in values]
    assert len(common) >= 3
    for _, text, _, score in common:
      assert score == pytest.approx((3 * values[text] + 0.5) / 4, abs=1e-5)


def test_the_heuristic_of_the_task_guides():
  kinds = set()
  for one in guided(guidance={"heuristic": 1.0}):
    for _, text, is_finished, score in scored(one):
      assert score == pytest.approx(TASK.heuristic(one.problem, text))
      kinds.add((is_finished, score > 0))
  assert (False, False) in kinds


def test_rollouts_that_are_of_one_mind_are_worth_more(monkeypatch):
  found = guided(
    monkeypatch,
    guidance={"semantic_entropy": 1.0},
    num_rollouts=M,
    reward="checker",
  )
  scores = set()
  for one in found:
    texts = []
    for node, text, is_finished, score in scored(one):
      if is_finished:
        texts.append(text)
        assert score == TASK.check(one.problem, text).is_correct
        continue
      entropy = class_entropy(rollouts_of(one, node), M)
      assert score == pytest.approx(1 - entropy / np.log(M), abs=1e-6)
      scores.add(round(score, 3))
    # Rollouts are read, and not asked the checker about.
    assert one.cost["verifier_requests"] == len(texts)
  assert len(scores) > 1


def test_classes_may_be_handed_in(monkeypatch):
  found = guided(
    monkeypatch,
    guidance={"semantic_entropy": 1.0},
    num_rollouts=M,
    reward="checker",
    classes_fn=lambda problem, texts: [0] * len(texts),
  )
  scores = set()
  for one in found:
    for node, _, is_finished, score in scored(one):
      if not is_finished:
        num_ended = len(rollouts_of(one, node))
        entropy = class_entropy([0] * num_ended, M)
        assert score == pytest.approx(1 - entropy / np.log(M), abs=1e-6)
        scores.add(num_ended)
  assert len(scores) > 1


def test_answers_that_others_give_are_worth_more(monkeypatch):
  found = guided(
    monkeypatch, guidance={"self_consistency": 1.0}, num_rollouts=M
  )
  shares = set()
  for one in found:
    votes = collections.Counter()
    # Expansions come in the order of their slots, their children together.
    for first in range(1, len(one.nodes["parent"]), 3):
      rows = [row for row in scored(one) if first <= row[0] < first + 3]
      for node, text, is_finished, _ in rows:
        if is_finished:
          votes[TASK.check(one.problem, text).answer] += 1
        else:
          votes.update(rollouts_of(one, node))
      for node, text, is_finished, score in rows:
        if is_finished:
          answer = TASK.check(one.problem, text).answer
          expected = votes[answer] / votes.total() if answer else 0.0
        else:
          answers = rollouts_of(one, node)
          own = collections.Counter(a for a in answers if a is not None)
          expected = max(own.values(), default=0) / M
        assert score == pytest.approx(expected)
        shares.add((is_finished, round(score, 3)))
  assert {is_finished for is_finished, _ in shares} == {True, False}
  assert len(shares) > 4


def test_trees_without_rollouts_ask_the_others_of_what_is_unfinished():
  found = guided(guidance={"self_consistency": 1.0, "value": 1.0})
  for one, plain in zip(found, by_value(), strict=True):
    values = {text: score for _, text, _, score in scored(plain)}
    for _, text, is_finished, score in scored(one):
      if not is_finished and text in values:
        assert score == pytest.approx(values[text], abs=1e-5)
