"""Chains of thought: what of them is learned, and how one is decoded."""

import dataclasses

import jax
import numpy as np
import pytest

from o1jax import mesh as mesh_lib
from o1jax.encoding import Lengths
from o1jax.experience import Experience
from o1jax.learned_texts import chain_entries, learned_parts
from o1jax.rows import RowMaker
from o1jax.tasks import make_task
from o1jax.thinking import Thinking
from o1jax.types import ScoredSolution
from policies import (
  ToyTask,
  countdown,
  greedy_text,
  packed_members,
  tiny_params,
  tiny_policy,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

TASK = make_task(
  "countdown",
  num_numbers=3,
  min_number=1,
  max_number=9,
  integers_only=True,
  canonical_play=True,
  balanced_hindsight=True,
)
EOS = tiny_policy().tokenizer.eos_id
LONG = Lengths(14, 5, 2, row_tokens=64, reflection_tokens=400)


def make_entry(text, reward, iteration=0):
  problem = TASK.parse("3 7 2 = 13")
  tokens = np.array(tiny_policy().encode_solution(text), np.int32)
  nothing = np.zeros(len(tokens), np.float32)
  return ScoredSolution(
    problem=problem,
    text=text,
    tokens=tokens,
    step_weights=nothing,
    behavior_log_probs=nothing,
    policy_log_probs=nothing,
    outcome_reward=reward,
    verdict="toy",
    iteration=iteration,
    source="search",
  )


def make_experience(*entries):
  experience = Experience(
    max_search=99,
    max_hindsight=9,
    max_demonstrations=9,
    max_expert_per_problem=9,
  )
  experience.add(entries)
  return experience


RIGHT = "3 * 2 = 6 (left: 7 6)\n7 + 6 = 13 (left: 13)"
WRONG = "7 + 3 = 10 (left: 2 10)\n10 + 2 = 12 (left: 12)"
OTHER = "7 - 3 = 4 (left: 2 4)\n4 * 2 = 8 (left: 8)"


def test_a_chain_says_what_is_wrong_and_ends_with_the_answer():
  problem = TASK.parse("3 7 2 = 13")
  text = TASK.chain(problem, [WRONG, OTHER], RIGHT)
  assert text == (
    f"think:\n{WRONG}\nagain:\nreaches 12, not 13\n"
    f"{OTHER}\nagain:\nreaches 8, not 13\n{RIGHT}"
  )
  assert TASK.final_solution(text) == RIGHT
  assert TASK.final_solution(TASK.chain(problem, [], RIGHT)) == RIGHT
  assert TASK.check(problem, TASK.final_solution(text)).is_correct


def test_wrong_attempts_are_not_learned_but_when_to_go_on_is():
  """To end, or to begin another line, is chosen where an attempt ends."""
  problem = TASK.parse("3 7 2 = 13")
  parts = list(learned_parts(TASK, TASK.chain(problem, [WRONG], RIGHT)))
  assert parts == [
    ("think:\n", False),
    (WRONG, False),
    ("\nagain:\n", True),
    (f"reaches 12, not 13\n{RIGHT}", True),
  ]


def rows_of(kind, experience, num_rows=20):
  """Each chain in rows of a kind, and what is learned of it, as texts."""
  policy = dataclasses.replace(tiny_policy(), lengths=LONG)
  maker = RowMaker(policy, TASK, {kind: num_rows})
  rng = np.random.default_rng(5)
  batch, num_dropped = maker.batches(rng, experience, 2)
  assert num_dropped == 0 and batch.tokens.shape == (2, num_rows, 400)
  chains = packed_members(batch)
  # No row has room for two of the longest, and all have more than one.
  assert len(chains) > 2 * 2 * num_rows
  tokenizer = policy.tokenizer
  for tokens, weights in chains:
    words, is_learned = tokens[1:].tolist(), weights[:-1] > 0
    assert words[-1] == tokenizer.eos_id and is_learned[-1] and not weights[-1]
    text = tokenizer.decode([tokens[0].item(), *words[:-1]])
    learned = [t for t, has in zip(words, is_learned, strict=True) if has]
    yield text, tokenizer.decode(learned[:-1])


def assert_learned(text, learned):
  """By text alone: what stands between an attempt and the next, and results."""
  prompt, _, chain = text.partition("\nthink:\n")
  *attempts, last = chain.split("\nagain:\n")
  expected = ""
  for place, attempt in enumerate(attempts):
    lines = attempt.split("\n")
    if place:
      expected += lines.pop(0) + "\n"
    results = (line.partition(" = ")[2] for line in lines)
    expected += "\n".join(results) + "\nagain:\n"
  assert learned == expected + last
  return prompt, attempts, last


def test_rows_of_play_hold_other_plays_as_attempts():
  counts = set()
  for text, learned in rows_of("retrying", make_experience()):
    prompt, attempts, last = assert_learned(text, learned)
    counts.add(len(attempts))
    problem = TASK.parse(prompt)
    solution = TASK.final_solution(text.partition("\n")[2])
    assert last.endswith(solution)
    assert TASK.check(problem, solution).is_correct
    plays = [a.split("\n", 1)[1] if i else a for i, a in enumerate(attempts)]
    for play in plays:
      assert TASK.first_fault(problem, play).startswith("reaches ")
  assert counts == {0, 1, 2, 3}


def test_rows_of_search_hold_its_own_failures_as_attempts():
  found = [make_entry(WRONG, 0.0), make_entry(RIGHT, 1.0)]
  rows = list(rows_of("retried", make_experience(*found)))
  counts = set()
  for text, learned in rows:
    _, attempts, last = assert_learned(text, learned)
    counts.add(len(attempts))
    assert attempts in ([], [WRONG])
    assert last == (f"reaches 12, not 13\n{RIGHT}" if attempts else RIGHT)
  assert counts == {0, 1}


def test_results_of_an_attempt_that_is_not_legal_are_not_learned():
  policy = tiny_policy()
  problem = TASK.parse("3 7 2 = 13")
  illegal = "7 + 3 = 11 (left: 2 11)\n11 + 2 = 13 (left: 13)"
  for attempt, is_learned in ((WRONG, True), (illegal, False)):
    text = TASK.chain(problem, [attempt], RIGHT)
    (entry,) = chain_entries(policy, TASK, [(problem, text)])
    assert policy.tokenizer.decode(entry.tokens[:-1].tolist()) == text
    start = len(policy.tokenizer.encode("think:\n"))
    end = start + len(policy.tokenizer.encode(attempt))
    assert entry.step_weights[start:end].any() == is_learned
    assert not entry.step_weights[:start].any()
    assert entry.step_weights[end:].all()


def test_without_a_right_solution_there_is_nothing_to_try_again_for():
  experience = make_experience(make_entry(WRONG, 0.0))
  policy = dataclasses.replace(tiny_policy(), lengths=LONG)
  maker = RowMaker(policy, TASK, {"retried": 3})
  batch, _ = maker.batches(np.random.default_rng(0), experience, 1)
  assert batch.tokens.shape == (1, 3, 400) and not packed_members(batch)


def test_chains_longer_than_a_row_are_dropped_and_counted():
  """Of a problem with one failure a chain has it or not: two lengths."""
  experience = make_experience(make_entry(WRONG, 0.0), make_entry(RIGHT, 1.0))
  problem = TASK.parse("3 7 2 = 13")
  without, whole = (
    [*tiny_policy().tokenizer.encode(problem.prompt + text), EOS]
    for text in (TASK.chain(problem, a, RIGHT) for a in ([], [WRONG]))
  )
  for width, kept in (
    (len(whole), [without, whole]),
    (len(whole) - 1, [without]),
    (len(without) - 1, []),
  ):
    lengths = LONG._replace(reflection_tokens=width)
    policy = dataclasses.replace(tiny_policy(), lengths=lengths)
    maker = RowMaker(policy, TASK, {"retried": 4})
    batch, dropped = maker.batches(np.random.default_rng(0), experience, 3)
    assert batch.tokens.shape == (3, 4, width)
    found = {tuple(tokens.tolist()) for tokens, _ in packed_members(batch)}
    assert found == set(map(tuple, kept))
    assert (dropped > 0) == (len(kept) < 2)


def test_attempts_are_parted_by_problem_and_follow_what_is_added():
  experience = make_experience(make_entry(WRONG, 0.0))
  assert experience.attempts() == []
  experience.add([make_entry(RIGHT, 1.0), make_entry(OTHER, 0.0)])
  ((right, wrong),) = experience.attempts()
  assert [entry.text for entry in right] == [RIGHT]
  assert [entry.text for entry in wrong] == [WRONG, OTHER]


def test_a_chain_is_decoded_greedily_behind_the_mark():
  policy = dataclasses.replace(
    tiny_policy(), lengths=Lengths(14, 5, 2, 64, thinking_tokens=8)
  )
  thinking = Thinking(
    policy, ToyTask(num_numbers=3), mesh_lib.make_mesh({}), batch_size=2
  )
  problems = countdown().sample_problems(np.random.default_rng(0), 2)
  searched = thinking(tiny_params(), jax.random.key(0), problems)
  for problem, one in zip(problems, searched, strict=True):
    assert one.problem is problem
    text, is_finished = greedy_text(
      policy, tiny_params(), f"{problem.prompt}think:\n", 8
    )
    (solution,) = one.solutions
    assert solution.text == text and solution.is_finished == is_finished


def test_no_room_for_a_chain_is_refused():
  with pytest.raises(ValueError, match="lengths.thinking_tokens=0"):
    Thinking(tiny_policy(), countdown(), mesh_lib.make_mesh({}), batch_size=2)
