"""Revisions that begin with the checker's feedback, read back from trees."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from o1jax import mesh as mesh_lib
from o1jax.encoding import Lengths
from o1jax.evaluation import strategy_options
from o1jax.feedback import Critic
from o1jax.search.tree import ROOT
from o1jax.solver import Solver
from policies import ToyTask, tiny_params, tiny_policy

pytestmark = pytest.mark.usefixtures("quick_programs")

BATCH, EFFORT = 4, 12
STRATEGIES = ("revision", "mctsr")


class Outspoken(ToyTask):
  """Its feedback differs from text to text."""

  def feedback(self, problem, text):
    if self.check(problem, text).is_correct:
      return "correct\n"
    return f"{len(text)}-{text.count('1')}\n"


TASK = Outspoken(num_numbers=3, min_number=1, max_number=9)
PROBLEMS = TASK.heldout_problems(BATCH)


@functools.cache
def policy():
  """With room for a whole line of feedback."""
  return dataclasses.replace(tiny_policy(), lengths=Lengths(14, 8, 1, 64))


def opening():
  return policy().tokenizer.encode("\nagain:\n")


@functools.cache
def solver(strategy, memory, reward):
  budget = strategy_options(strategy, EFFORT, 1, 1, {"feedback": "checker"})
  return Solver(
    policy(),
    strategy=strategy,
    batch_size=BATCH,
    mesh=mesh_lib.make_mesh({"data": 2}),
    task=TASK,
    reward=reward,
    # MCTSr stays at the root while no answer beats its value.
    guidance={"mean_prob" if strategy == "revision" else "value": 1.0},
    memory=memory,
    **budget,
  )


@functools.cache
def searched(strategy, memory="tree", reward="value", alone=None):
  problems = PROBLEMS if alone is None else [PROBLEMS[alone]]
  search = solver(strategy, memory, reward)
  return search(tiny_params(), jax.random.key(2), problems)


def paths(one):
  """Texts of the answers on the way to each node, by node."""
  nodes, found = one.nodes, {ROOT: []}
  for node in np.flatnonzero(nodes["is_valid"] & (nodes["depth"] > 0)).tolist():
    above = found[int(nodes["parent"][node])]
    found[node] = [*above, nodes["texts"][node]]
  return found


def answer(path):
  """The last answer of a path: behind the mark and the feedback, if any."""
  return path[-1].split("\n", 3)[3] if len(path) > 1 else path[-1]


@pytest.mark.parametrize("reward", ["value", "checker"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_revision_begins_with_the_feedback_on_its_answer(strategy, reward):
  tokenizer, said = policy().tokenizer, []
  for one in searched(strategy, reward=reward):
    nodes, texts = one.nodes, paths(one)
    asked = []
    for node, path in texts.items():
      if node == ROOT:
        continue
      is_open = nodes["is_finished"][node] and not nodes["is_terminal"][node]
      if is_open:
        asked.append(answer(path))
      if reward == "checker" and nodes["is_finished"][node]:
        asked.append(answer(path))
      if len(path) == 1:
        continue
      line = TASK.feedback(one.problem, answer(path[:-1]))
      right = TASK.check(one.problem, answer(path[:-1])).is_correct
      assert (line == "correct\n") == right
      given = [*opening(), *tokenizer.encode(line)]
      assert nodes["tokens"][node, : len(given)].tolist() == given
      assert not nodes["policy_log_probs"][node, : len(given)].any()
      assert nodes["lengths"][node] > len(given)
      said.append(line)
    assert one.cost["verifier_requests"] == len(asked)
    assert one.cost["verifier_distinct"] == len(set(asked))
  # MCTSr with the checker goes on from answers that are right.
  assert "correct\n" in said
  assert len(set(said)) > 2 or (strategy, reward) == ("mctsr", "checker")


def test_what_was_given_is_not_what_the_policy_wrote():
  for one in searched("revision"):
    for solution in one.solutions:
      if solution.is_finished:
        # The end marks of answers before the last were written too.
        count = len(solution.tokens)
        for above in solution.path[:-1]:
          text = answer(paths(one)[above])
          line = policy().tokenizer.encode(TASK.feedback(one.problem, text))
          count -= len(opening()) + len(line)
        expected = np.exp(solution.policy_log_probs.sum() / count)
        np.testing.assert_allclose(solution.outcome, expected, rtol=1e-4)


@pytest.mark.parametrize(
  "strategy",
  ["revision", pytest.param("mctsr", marks=pytest.mark.slow)],
)
def test_memories_and_batches_give_the_same_trees(strategy):
  whole = searched(strategy)
  again = searched(strategy, memory="tokens")
  alone = [searched(strategy, alone=i)[0] for i in (1, 2)]
  for one, other in [*zip(whole, again), *zip(whole[1:3], alone)]:  # noqa: B905
    assert one.nodes["texts"] == other.nodes["texts"]
    assert one.selected == other.selected
    np.testing.assert_allclose(
      [s.outcome for s in one.solutions],
      [s.outcome for s in other.solutions],
      atol=1e-5,
    )
    names = ("generated_tokens", "verifier_requests", "verifier_distinct")
    assert all(one.cost[name] == other.cost[name] for name in names)


def test_feedback_is_cut_to_whole_tokens_and_asked_for_once():
  asked = []

  def feedback(problem, text):
    asked.append((problem.id, text))
    return "12+12+12\n"

  critic = Critic(feedback, policy().tokenizer, 4)
  for problem in PROBLEMS[:2]:
    for text in ("1", "1", "\udc80"):
      tokens = list(critic(problem, text))
      assert policy().tokenizer.decode(tokens) == "12+\n"
  assert len(asked) == len(set(asked)) == 4
  whole = Critic(feedback, policy().tokenizer, 9)(PROBLEMS[0], "1")
  assert policy().tokenizer.decode(list(whole)) == "12+12+12\n"
  # Text of the policy's own, whatever it is, has one line of feedback.
  critic = Critic(TASK.feedback, policy().tokenizer, 8)
  for text in ("", "\n\n", "again:\n", "check:\n\x00", "\ud800"):
    *line, newline = critic(PROBLEMS[0], text)
    assert newline == policy().tokenizer.newline_id and newline not in line


@pytest.mark.parametrize(
  "strategy, feedback, message",
  [
    ("mcts", "checker", "feedback='checker': strategy='mcts' does not revise"),
    ("revision", "teacher", "feedback='teacher': choose one of policy, check"),
  ],
)
def test_feedback_that_nothing_reads_is_refused(strategy, feedback, message):
  with pytest.raises(ValueError, match=message):
    Solver(
      policy(),
      strategy=strategy,
      batch_size=2,
      mesh=mesh_lib.make_mesh({"data": 2}),
      task=TASK,
      feedback=feedback,
    )
