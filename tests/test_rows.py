"""Rows for an update, against texts read by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from o1jax.encoding import Lengths, Policy
from o1jax.experience import Experience
from o1jax.policy.tokenizer import train_tokenizer
from o1jax.rows import (
  DEMONSTRATIONS,
  POOLS,
  REFLECTIONS,
  RowMaker,
  check_mix,
  group_sizes,
)
from o1jax.tasks import make_task
from o1jax.types import LearnerBatch, ScoredSolution
from policies import tiny_policy

TASK = make_task("countdown", num_numbers=3, min_number=1, max_number=9)
ARITHMETIC = make_task("arithmetic", num_terms=3, max_digits=2)
LIMITS = dict(
  max_search=9, max_hindsight=9, max_demonstrations=9, max_expert_per_problem=2
)


def make_experience(entries=()):
  experience = Experience(**LIMITS)
  experience.add(entries)
  return experience


def entry(text, reward, source="search", seed=0):
  (problem,) = TASK.sample_problems(np.random.default_rng(seed), 1)
  tokens = np.array(tiny_policy().encode_solution(text), np.int32)
  numbers = np.random.default_rng(seed).uniform(size=len(tokens))
  return ScoredSolution(
    problem=problem,
    text=text,
    tokens=tokens,
    step_weights=numbers.astype(np.float32),
    behavior_log_probs=numbers,
    policy_log_probs=numbers,
    outcome_reward=reward,
    verdict="toy",
    iteration=0,
    source=source,
  )


def rows_of(batches):
  """Each row of `[K, B, T]` batches as `(text, text that is learned)`.

  The learned text is that of the tokens whose log-prob has weight, with <eos>
  for the end mark; dots stand for what lies between.
  """
  tokenizer = tiny_policy().tokenizer
  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
  rows = []
  for tokens, length, weights in zip(
    flat.tokens.tolist(), flat.lengths, flat.policy_weights, strict=True
  ):
    tokens = tokens[:length]
    assert not weights[max(length - 1, 0) :].any()
    words = [tokenizer.decode([t]) for t in tokens]
    words = [
      "<eos>" if t == tokenizer.eos_id else word
      for t, word in zip(tokens, words, strict=True)
    ]
    has_weight = [False, *(weights[: length - 1] > 0)][:length]
    learned = "".join(
      word if weighs else "."
      for word, weighs in zip(words, has_weight, strict=True)
    )
    rows.append(("".join(words), learned))
  return rows


def make_batches(mix, experience=None, seed=0, num_batches=2, policy=None):
  maker = RowMaker(policy or tiny_policy(), TASK, mix)
  rng = np.random.default_rng(seed)
  return maker.batches(rng, experience or make_experience(), num_batches)


def test_demonstrations_are_learned_from_the_first_token_of_the_solution_on():
  batches, dropped = make_batches({"random_play": 8})
  assert batches.tokens.shape == (2, 8, tiny_policy().lengths.row_tokens)
  assert dropped == 0 and not batches.value_weights.any()
  for text, learned in rows_of(batches):
    prompt, _, solution = text.partition("\n")
    assert learned.strip(".") == solution
    assert prompt.count(" = ") == 1 and solution.endswith(")<eos>")


def consequences_of(text):
  """By text alone: what a line calculates, up to the end of the line."""
  prompt, _, solution = text.partition("\n")
  lines = solution.split("\n")
  return [line.partition(" = ")[2] for line in lines]


def test_consequences_are_what_follows_from_the_choice_of_a_step():
  tokenizer = tiny_policy().tokenizer
  batches, _ = make_batches({"consequences": 40})
  with_minus = 0
  for text, learned in rows_of(batches):
    *firsts, last = consequences_of(text)
    # The newline that ends a step follows from it as well, and so does the end.
    expected = [f"{rest}\n" for rest in firsts] + [last]
    found = [part for part in learned.split(".") if part]
    # A piece that joins the mark and a minus is the mark's.
    pieces = [rest.removeprefix("-") for rest in expected]
    assert found in (expected, pieces)
    with_minus += expected != pieces
  assert with_minus
  assert tokenizer.encode(TASK.consequence_mark) == [
    tokenizer.encode("1 = 2")[1]
  ]


def test_an_opening_ends_where_the_first_step_has_chosen():
  lengths = tiny_policy().lengths._replace(opening_tokens=20)
  policy = dataclasses.replace(tiny_policy(), lengths=lengths)
  mix = {"openings": 8, "random_play": 2}
  (openings, plays), dropped = make_batches(mix, policy=policy)
  assert dropped == 0 and not openings.value_weights.any()
  assert openings.tokens.shape == (2, 8, 20)
  assert plays.tokens.shape == (2, 2, lengths.row_tokens)
  sizes = {(LearnerBatch, 20): 8, (LearnerBatch, lengths.row_tokens): 2}
  assert group_sizes(mix, lengths) == sizes
  # Equal generators draw equal plays.
  whole, _ = make_batches({"hindsight_play": 8})
  for (text, learned), (play, _) in zip(
    rows_of(openings), rows_of(whole), strict=True
  ):
    prompt, _, solution = play.partition("\n")
    choice = solution.partition(" = ")[0]
    assert len(choice.split(" ")) == 3
    assert text == f"{prompt}\n{choice}"
    assert learned.lstrip(".") == choice


def test_each_pool_gives_its_own_weights():
  solution = "1 + 2 = 3 (left: 4 3)\n4 + 3 = 7 (left: 7)"
  found = entry(solution, 1.0)
  failed = entry("1 + 1 = 2 (left: 5 2)\n5 * 2 = 10 (left: 10)", 0.0, seed=1)
  relabelled = entry(failed.text, 1.0, "hindsight", seed=2)
  experience = make_experience([found, failed, relabelled])
  mix = {"search": 2, "expert": 2, "hindsight": 1, "value": 2}
  batches, dropped = make_batches(mix, experience, num_batches=1)
  assert dropped == 0
  rows = [jax.tree.map(lambda x: x[0, i], batches) for i in range(7)]  # noqa: B023
  prompts = [
    tiny_policy().tokenizer.encode(e.problem.prompt)
    for e in (found, failed, relabelled)
  ]
  whole = {
    (*prompt, *e.tokens.tolist()): (e, len(prompt))
    for prompt, e in zip(prompts, (found, failed, relabelled), strict=True)
  }

  def read(row):
    return whole[tuple(row.tokens[: row.lengths].tolist())]

  kinds = ["search"] * 2 + ["expert"] * 2 + ["hindsight"] + ["value"] * 2
  drawn = {}
  for kind, row in zip(kinds, rows, strict=True):
    e, start = read(row)
    drawn.setdefault(kind, []).append(e.source + e.text)
    weights = {
      "search": e.step_weights,
      "value": np.zeros(len(e.tokens)),
    }
    expected = weights[kind] if kind in weights else np.ones(len(e.tokens))
    learned = row.policy_weights[start - 1 : row.lengths - 1]
    np.testing.assert_array_equal(learned, expected.astype(np.float32))
    np.testing.assert_allclose(
      row.policy_weights.sum(), learned.sum(), rtol=1e-6
    )
    targets = np.zeros(len(row.tokens))
    if kind in ("search", "value"):
      targets[start - 1 : row.lengths] = 1
    np.testing.assert_array_equal(row.value_weights, targets)
    np.testing.assert_array_equal(row.value_targets, targets * e.outcome_reward)
  every_search = {e.source + e.text for e in (found, failed)}
  assert set(drawn["search"]) == set(drawn["value"]) == every_search
  correct = {e.source + e.text for e in (found, relabelled)}
  assert set(drawn["expert"]) == correct
  assert drawn["hindsight"] == [relabelled.source + relabelled.text]


def test_empty_pools_give_empty_rows():
  batches, dropped = make_batches(dict.fromkeys(POOLS, 3))
  assert batches.tokens.shape[:2] == (2, 3 * len(POOLS)) and dropped == 0
  for name in ("lengths", "policy_weights", "value_weights", "value_targets"):
    assert not getattr(batches, name).any()
  assert (batches.tokens == tiny_policy().tokenizer.pad_id).all()


def test_rows_depend_on_the_generator_alone():
  kinds = set(DEMONSTRATIONS) - {*REFLECTIONS, "openings"}
  mix = dict.fromkeys(sorted(kinds), 2) | {"search": 2, "optimal": 0}
  experience = make_experience(
    [entry("1 + 2 = 3", 1.0, seed=i) for i in (0, 5)]
  )
  one, _ = make_batches(mix, experience, seed=4)
  two, _ = make_batches(mix, experience, seed=4)
  jax.tree.map(np.testing.assert_array_equal, one, two)
  other, _ = make_batches(mix, experience, seed=5)
  assert (one.tokens != other.tokens).any()
  # Batches of one call differ.
  assert (one.tokens[0] != one.tokens[1]).any()


def test_every_kind_of_demonstration_is_the_tasks_own():
  assert set(DEMONSTRATIONS.values()) <= set(TASK.demonstration_kinds)
  batches, _ = make_batches(
    dict.fromkeys(("optimal", "hindsight_play", "search_trace"), 4)
  )
  rows = rows_of(batches)
  rows = [rows[start + i] for start in (0, 12) for i in range(8)]
  for text, _ in rows:
    prompt, _, solution = text.removesuffix("<eos>").partition("\n")
    assert TASK.check(TASK.parse(prompt), solution).is_correct


def learned_letters(solution):
  """By its lines alone: for each letter of a text with marks, is it learned?

  Judgements, comparisons and criticism are, and the solution that no mark
  follows.
  """
  lines = solution.splitlines(keepends=True)
  places = [i for i, line in enumerate(lines) if line == "again:\n"]
  ends = [i for i, line in enumerate(lines) if line in ("check:\n", "same:\n")]
  if ends:
    learned = range(ends[0] + 1, len(lines))
  else:
    learned = {place + 1 for place in places}
    learned |= set(range(places[-1] + 1, len(lines)))
  return [i in learned for i, line in enumerate(lines) for _ in line]


@pytest.mark.parametrize(
  "task", [TASK, ARITHMETIC], ids=["countdown", "arithmetic"]
)
@pytest.mark.parametrize("kind", ["judging", "revising", "comparing"])
def test_no_solution_is_learned_that_may_be_wrong(task, kind):
  tokenizer = tiny_policy().tokenizer
  policy = dataclasses.replace(
    tiny_policy(), lengths=Lengths(14, 5, 2, row_tokens=400)
  )
  maker = RowMaker(policy, task, {kind: 10})
  batches, dropped = maker.batches(
    np.random.default_rng(0), make_experience(), 2
  )
  assert dropped == 0 and not batches.value_weights.any()
  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
  num_rounds = set()
  for tokens, length, weights in zip(
    flat.tokens, flat.lengths, flat.policy_weights, strict=True
  ):
    pieces = [tokenizer.decode([t]) for t in tokens[: length - 1].tolist()]
    assert tokens[length - 1] == tokenizer.eos_id
    prompt, _, solution = "".join(pieces).partition("\n")
    num_rounds.add(solution.count("again:\n"))
    expected = [False] * (len(prompt) + 1) + learned_letters(solution)
    letters = [weigh for piece, weigh in zip(pieces[1:], weights, strict=False)
               for weigh in [weigh] * len(piece)]  # fmt: skip
    letters = [0] * len(pieces[0]) + letters
    np.testing.assert_array_equal(letters, np.float32(expected))
    assert weights[length - 2] == 1 and not weights[length - 1 :].any()
  assert num_rounds == ({1, 2} if kind == "revising" else {0})


@pytest.mark.parametrize(
  "task", [TASK, ARITHMETIC], ids=["countdown", "arithmetic"]
)
def test_of_revised_answers_the_value_is_learned_alone(task):
  policy = dataclasses.replace(
    tiny_policy(), lengths=Lengths(14, 5, 2, row_tokens=400)
  )
  maker = RowMaker(policy, task, {"revised": 20})
  rng = np.random.default_rng(0)
  batches, dropped = maker.batches(rng, make_experience(), 1)
  assert dropped == 0 and not batches.policy_weights.any()
  outcomes = []
  for tokens, length, weights, targets in zip(
    batches.tokens[0].tolist(),
    batches.lengths[0],
    batches.value_weights[0],
    batches.value_targets[0],
    strict=True,
  ):
    assert tokens[length - 1] == policy.tokenizer.eos_id
    text = policy.tokenizer.decode(tokens[: length - 1])
    prompt, _, text = text.partition("\n")
    problem = next(
      problem
      for problem, other in task.demonstrations(
        "revised", np.random.default_rng(0), 20
      )
      if other == text and problem.prompt == prompt + "\n"
    )
    answer = text.rpartition("again:\n")[2].partition("\n")[2]
    outcomes.append(task.check(problem, answer).is_correct)
    # Each token of the last line, and the end mark.
    last_line = answer.rpartition("\n")[2]
    num_tokens = len(policy.tokenizer.encode(last_line)) + 1
    expected = np.zeros(len(tokens), np.float32)
    expected[length - num_tokens : length] = 1
    np.testing.assert_array_equal(weights, expected)
    np.testing.assert_array_equal(targets, expected * outcomes[-1])
  assert len(set(outcomes)) == 2


def test_rows_with_marks_may_have_a_width_of_their_own():
  mix = {"random_play": 4, "judging": 3, "value": 2, "revising": 1}
  alike = Lengths(14, 5, 2, row_tokens=400)
  apart = alike._replace(row_tokens=64, reflection_tokens=400)
  policy = dataclasses.replace(tiny_policy(), lengths=alike)
  plain, _ = make_batches(mix, policy=policy)
  policy = dataclasses.replace(policy, lengths=apart)
  (short, long), dropped = make_batches(mix, policy=policy)
  assert dropped == 0
  sizes = {(LearnerBatch, 64): 6, (LearnerBatch, 400): 4}
  assert group_sizes(mix, apart) == sizes
  assert group_sizes(mix, alike) == {(LearnerBatch, 400): 10}
  is_long = np.isin(np.arange(10), [4, 5, 6, 9])
  for name in ("tokens", "lengths", "policy_weights", "value_weights"):
    rows = getattr(plain, name)
    np.testing.assert_array_equal(getattr(long, name), rows[:, is_long])
    width = (64,)[: rows.ndim - 2]
    expected = rows[:, ~is_long][(..., *map(slice, width))]
    np.testing.assert_array_equal(getattr(short, name), expected)
  short_for_marks = alike._replace(reflection_tokens=64)
  policy = dataclasses.replace(policy, lengths=short_for_marks)
  with pytest.raises(ValueError, match="lengths.reflection_tokens=64 is too"):
    RowMaker(policy, TASK, mix)


def test_problems_are_learned_by_how_near_one_half_their_success_was():
  rewards = {0: (1, 0, 0, 0), 1: (1, 0), 2: (0, 0, 0), 3: (1, 1)}
  found = [
    entry(f"{i} + {i} = {j}", float(reward), seed=seed)
    for seed, outcomes in rewards.items()
    for i, (j, reward) in enumerate(enumerate(outcomes), seed)
  ]
  experience = Experience(**LIMITS | {"max_search": 99})
  # Relabelled ones say nothing of how hard a problem is.
  experience.add([*found, entry("1 + 1 = 2", 1.0, "hindsight", seed=2)])
  weights = {}
  for seed, outcomes in rewards.items():
    (problem,) = TASK.sample_problems(np.random.default_rng(seed), 1)
    share = sum(outcomes) / len(outcomes)
    weights[problem.prompt] = 4 * share * (1 - share)
  assert sorted(weights.values()) == [0, 0, 0.75, 1]
  maker = RowMaker(tiny_policy(), TASK, {"questions": 6}, rates_questions=True)
  rng = np.random.default_rng(0)
  batches, dropped = maker.batches(rng, experience, 2)
  assert dropped == 0 and not batches.value_weights.any()
  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
  drawn = []
  for (text, learned), row in zip(
    rows_of(batches), flat.policy_weights, strict=True
  ):
    mark, prompt = text.removesuffix("<eos>").split("\n")
    drawn.append(f"{prompt}\n")
    weight = weights[f"{prompt}\n"]
    assert mark == "question:"
    assert learned.strip(".") == (f"{prompt}<eos>" if weight else "")
    tokens = tiny_policy().encode_solution(prompt)
    np.testing.assert_allclose(row.sum(), weight * len(tokens), rtol=1e-6)
    assert set(row.tolist()) <= {0, np.float32(weight)}
  # As even as it goes.
  assert sorted(map(drawn.count, weights)) == [3, 3, 3, 3]
  # Where nothing was searched yet, nothing is learned.
  empty, _ = maker.batches(rng, make_experience(), 2)
  assert empty.tokens.shape == batches.tokens.shape
  assert not empty.lengths.any() and not empty.policy_weights.any()


def test_the_form_of_problems_is_learned_from_those_of_the_sampler():
  experience = make_experience([entry("1 + 2 = 3", 1.0)])
  batches, _ = make_batches({"questions": 20}, experience)
  texts = set()
  for text, learned in rows_of(batches):
    question = text.removeprefix("question:\n").removesuffix("<eos>")
    assert learned.strip(".") == f"{question}<eos>"
    assert TASK.is_train(TASK.parse(question))
    texts.add(question)
  assert set(np.unique(batches.policy_weights)) == {0, 1}
  assert len(texts) > 35
  assert check_mix({"questions": 2}, ARITHMETIC, "rows") == 2


def test_a_long_thought_is_learned_whole_at_the_width_of_reflections():
  lengths = Lengths(14, 5, 2, row_tokens=64, reflection_tokens=500)
  policy = dataclasses.replace(tiny_policy(), lengths=lengths)
  (short, long), dropped = make_batches(
    {"random_play": 2, "long_thought": 8}, policy=policy
  )
  assert dropped == 0 and not long.value_weights.any()
  assert short.tokens.shape == (2, 2, 64)
  assert long.tokens.shape == (2, 8, 500)
  for text, learned in rows_of(long):
    prompt, _, solution = text.partition("\n")
    assert learned.lstrip(".") == solution
    solution = solution.removesuffix("<eos>")
    assert solution.endswith("</answer>")
    assert TASK.check(TASK.parse(prompt), solution).is_correct
  with pytest.raises(ValueError, match="task arithmetic has no such demonst"):
    check_mix({"long_thought": 1}, ARITHMETIC, "rows")


def test_play_teaches_the_value_at_its_end_where_it_is_asked_to():
  mix = {"hindsight_play": 4, "consequences": 20, "random_play": 20}
  maker = RowMaker(tiny_policy(), TASK, mix, play_outcomes=True)
  batches, _ = maker.batches(np.random.default_rng(0), make_experience(), 2)
  plain, _ = make_batches(mix)
  np.testing.assert_array_equal(batches.tokens, plain.tokens)
  np.testing.assert_array_equal(batches.policy_weights, plain.policy_weights)
  assert not plain.value_weights.any()
  is_end = np.arange(batches.tokens.shape[-1]) == batches.lengths[..., None] - 1
  np.testing.assert_array_equal(batches.value_weights, is_end)
  targets = batches.value_targets.sum(-1).ravel()
  for (text, _), target in zip(rows_of(batches), targets, strict=True):
    prompt, _, solution = text.removesuffix("<eos>").partition("\n")
    wanted = prompt.partition(" = ")[2]
    assert solution.endswith(f"(left: {wanted})") == target
  assert 8 <= targets.sum() < 88
  # What a solver writes says nothing of play.
  mix = {"optimal": 4, "search_trace": 4}
  maker = RowMaker(tiny_policy(), TASK, mix, play_outcomes=True)
  batches, _ = maker.batches(np.random.default_rng(0), make_experience(), 2)
  assert not batches.value_weights.any()


def test_openings_want_a_tokenizer_that_shows_where_they_end():
  texts = ["abc", "cab"]
  tokenizer = train_tokenizer(texts, vocab_size=280, max_number=9)
  policy = dataclasses.replace(tiny_policy(), tokenizer=tokenizer)
  lengths = policy.lengths._replace(opening_tokens=60)
  policy = dataclasses.replace(policy, lengths=lengths)
  with pytest.raises(ValueError, match="no piece with the mark ' = '"):
    RowMaker(policy, TASK, {"openings": 2})


def test_openings_that_do_not_fit_are_refused():
  for width in (0, 8):
    lengths = tiny_policy().lengths._replace(opening_tokens=width)
    policy = dataclasses.replace(tiny_policy(), lengths=lengths)
    words = f"lengths.opening_tokens={width} is too short for rows of openings"
    with pytest.raises(ValueError, match=words) as raised:
      RowMaker(policy, TASK, {"openings": 2})
  longest = int(str(raised.value).split("raise it to ")[1].split(",")[0])
  lengths = lengths._replace(opening_tokens=longest)
  policy = dataclasses.replace(policy, lengths=lengths)
  _, dropped = make_batches({"openings": 100}, policy=policy)
  assert dropped <= 2


@pytest.mark.parametrize("kind", [*REFLECTIONS, "questions"])
def test_rows_with_marks_that_do_not_fit_are_refused(kind):
  width = 12 if kind == "questions" else 64
  short = Lengths(14, 5, 2, width)
  if kind == "questions":
    # They are no wider for the sake of others.
    short = short._replace(reflection_tokens=400)
  policy = dataclasses.replace(tiny_policy(), lengths=short)
  with pytest.raises(ValueError) as raised:
    RowMaker(policy, TASK, {"random_play": 2, kind: 2})
  words = (
    f"lengths.row_tokens={width} is too short for rows of {kind}, which have"
  )
  assert str(raised.value).startswith(words)
  # As long as it says is long enough, but for the rarest rows.
  longest = int(str(raised.value).split("raise it to ")[1].split(",")[0])
  policy = dataclasses.replace(
    tiny_policy(), lengths=Lengths(14, 5, 2, row_tokens=longest)
  )
  maker = RowMaker(policy, TASK, {kind: 100})
  _, dropped = maker.batches(np.random.default_rng(1), make_experience(), 1)
  assert dropped <= 2
  RowMaker(tiny_policy(), TASK, {"random_play": 2, kind: 0})


def test_rows_that_are_too_long_are_dropped_and_counted():
  policy = tiny_policy()
  short = dataclasses.replace(policy, lengths=Lengths(14, 5, 2, 34))
  batches, dropped = make_batches({"random_play": 30}, policy=short)
  assert batches.tokens.shape == (2, 30, 34)
  assert 0 < dropped < 60
  assert dropped == (batches.lengths == 0).sum()


@pytest.mark.parametrize(
  "mix, words",
  [
    ({"serch": 4}, "learn.rows.serch is unknown: rows are random_play"),
    ({"search": -4}, "learn.rows.search=-4 must be 0 or more"),
    ({"search": 0, "value": 0}, "learn.rows has no rows"),
    ({}, "learn.rows has no rows"),
    ({"random_play": 4}, "learn.rows.random_play=4, but task arithmetic"),
  ],
)
def test_bad_mixes_are_refused(mix, words):
  with pytest.raises(ValueError, match=words):
    check_mix(mix, ARITHMETIC, "learn.rows")


def test_good_mixes_are_counted():
  mix = {"optimal": 3, "search": 2, "random_play": 0}
  assert check_mix(mix, ARITHMETIC, "learn.rows") == 5


def test_the_mark_is_found_where_numbers_are_longer():
  texts = TASK.corpus(np.random.default_rng(0), 500)
  tokenizer = train_tokenizer(texts, vocab_size=1400, max_number=999)
  policy = Policy(None, tokenizer, tiny_policy().lengths)
  batches, _ = make_batches({"consequences": 20}, policy=policy)
  plain, _ = make_batches({"random_play": 20}, policy=policy)
  np.testing.assert_array_equal(batches.tokens, plain.tokens)
  is_operand = (batches.policy_weights == 0) & (plain.policy_weights == 1)
  # Two operands, an operation and the mark a line.
  assert (is_operand.sum(-1) >= 8).all()
  assert (batches.policy_weights.sum(-1) >= 8).all()
