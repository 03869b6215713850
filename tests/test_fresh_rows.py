"""Rows that an iteration makes anew, from real searches of a tiny policy."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from o1jax import fields, fresh_rows, scoring
from o1jax import mesh as mesh_lib
from o1jax.experience import Experience
from o1jax.fresh_rows import FreshRows
from o1jax.learning import update
from o1jax.learning.baselines import empty_baseline
from o1jax.learning.objective import Objective, PolicyGradient
from o1jax.learning.optimizer import make_optimizer
from o1jax.policy.network import next_token_log_probs
from o1jax.process_rewards import Process
from o1jax.rollouts import Advantages, Pairs
from o1jax.solver import Solver
from policies import ToyTask, packed_members, tiny_params, tiny_policy

pytestmark = pytest.mark.usefixtures("quick_programs")


TASK = ToyTask(num_numbers=3, min_number=1, max_number=9)
PROBLEMS = TASK.heldout_problems(4)
NUM_DRAWS = 4
LIMITS = dict(
  max_search=99,
  max_hindsight=9,
  max_demonstrations=9,
  max_expert_per_problem=9,
)
ITERATION = 7


@jax.jit
def log_probs_fn(params, tokens, lengths):
  return next_token_log_probs(tiny_policy().network, params, tokens, lengths)


@functools.cache
def score_fn():
  return update.make_score(log_probs_fn)


@functools.cache
def search(strategy):
  """`(searches, their verdicts, the experience that holds them)`."""
  trees = dict(num_expansions=8, num_simulations=48)
  solver = Solver(
    tiny_policy(),
    strategy=strategy,
    batch_size=len(PROBLEMS),
    mesh=mesh_lib.make_mesh({"data": 1}),
    task=TASK,
    reward="checker",
    num_candidates=NUM_DRAWS,
    **(trees if strategy == "mcts" else {}),
  )
  searched = solver(tiny_params(), jax.random.key(1), PROBLEMS)
  verdicts = [
    [TASK.check(one.problem, s.text) for s in one.solutions] for one in searched
  ]
  experience = Experience(**LIMITS)
  experience.add(
    scoring.score(TASK, searched, verdicts, ITERATION, relabels=False)
  )
  return searched, verdicts, experience


def make_optimizer_of_runs():
  return make_optimizer(learning_rate=0.01, warmup_updates=1)


@functools.cache
def other_params(seed=3):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: np.asarray(x) + rng.normal(0, 0.1, x.shape).astype(x.dtype),
    tiny_params(),
  )


def make_state():
  """What searched, with another reference and yet another trainer."""
  optimizer = make_optimizer_of_runs()
  state = update.make_state(tiny_params(), optimizer, has_reference=True)
  return state.replace(reference_params=other_params(), params=other_params(4))


def make_fresh(
  mix,
  *,
  reference="none",
  advantages=None,
  pairs=None,
  process=None,
  max_value_change=0.0,
):
  return FreshRows(
    tiny_policy(),
    TASK,
    mix,
    score_fn(),
    reference=reference,
    advantages=advantages or Advantages(),
    pairs=pairs or Pairs(),
    process=process or Process(),
    max_value_change=max_value_change,
  )


def decks_of(kind, strategy, *, reference="start", **options):
  fresh = make_fresh(
    {"search": 4, "best": 0} | {kind: 4},
    reference=reference,
    **options,
  )
  assert fresh
  searched, verdicts, experience = search(strategy)
  decks, moving, numbers = fresh.decks(
    make_state(),
    searched,
    verdicts,
    experience,
    empty_baseline(),
    np.random.default_rng(0),
    ITERATION,
  )
  assert set(decks) == {kind}
  assert all(name.startswith("learn/") for name in numbers)
  return decks[kind], numbers


def prompt_of(problem):
  return tiny_policy().tokenizer.encode(problem.prompt)


@pytest.mark.parametrize("reference", ["none", "start"])
def test_every_draw_is_a_row_with_its_advantage(reference):
  searched, verdicts, _ = search("best_of_n")
  options = Advantages(truncated="wrong", skips_flat=False)
  deck, numbers = decks_of(
    "policy_gradient", "best_of_n", reference=reference, advantages=options
  )
  rows = deck.rows
  assert len(deck) == NUM_DRAWS * len(PROBLEMS) == numbers["learn/draws"]
  row = 0
  for one, judged in zip(searched, verdicts, strict=True):
    right = [
      v.is_correct and s.is_finished
      for s, v in zip(one.solutions, judged, strict=True)
    ]
    for i, solution in enumerate(one.solutions):
      start = len(prompt_of(one.problem))
      end = start + len(solution.tokens)
      whole = [*prompt_of(one.problem), *solution.tokens]
      assert rows.tokens[row, :end].tolist() == whole
      learned = slice(start - 1, end - 1)
      np.testing.assert_array_equal(
        rows.behavior_log_probs[row, learned], solution.behavior_log_probs
      )
      others = right[:i] + right[i + 1 :]
      advantage = right[i] - sum(others) / len(others)
      np.testing.assert_allclose(
        rows.advantages[row, learned], advantage, atol=1e-6
      )
      row += 1
  assert any(not s.is_finished for one in searched for s in one.solutions)
  assert len(set(rows.advantages.ravel().tolist())) > 3
  # Searching and learning agree on what the drawn tokens were worth.
  assert 0 < numbers["learn/log_prob_gap"] < 1e-4
  params = tiny_params() if reference == "none" else other_params()
  expected, _ = log_probs_fn(params, rows.tokens, rows.lengths)
  is_learned = rows.policy_weights > 0
  np.testing.assert_allclose(
    rows.reference_log_probs[is_learned], expected[is_learned], atol=1e-4
  )


@pytest.mark.parametrize(
  "advantages, max_value_change, num_read",
  [
    (Advantages(skips_flat=False), 0.0, fresh_rows.NUM_COMPARED),
    (Advantages(skips_flat=False), 0.2, None),
    (Advantages(skips_flat=False, truncated="bootstrap"), 0.0, None),
    (Advantages(skips_flat=False, baseline="value"), 0.0, None),
  ],
)
def test_the_trainer_looks_at_all_draws_where_its_values_are_read(
  advantages, max_value_change, num_read
):
  deck, numbers = decks_of(
    "policy_gradient",
    "best_of_n",
    reference="none",
    advantages=advantages,
    max_value_change=max_value_change,
  )
  rows = deck.rows
  _, logits = log_probs_fn(tiny_params(), rows.tokens, rows.lengths)
  if num_read is None:
    np.testing.assert_allclose(
      rows.behavior_values, jax.nn.sigmoid(logits), atol=1e-4
    )
  else:
    num_seen = int(rows.behavior_values.any(axis=1).sum())
    assert num_seen <= num_read < numbers["learn/draws"]
  assert 0 < numbers["learn/log_prob_gap"] < 1e-4


def test_the_first_update_finds_ratios_of_one():
  deck, _ = decks_of("policy_gradient", "best_of_n")
  optimizer = make_optimizer_of_runs()
  step = update.make_update(log_probs_fn, optimizer, objective=Objective())
  state = update.make_state(tiny_params(), optimizer)
  rows = deck.draw(np.random.default_rng(0), 8)
  _, metrics = step(state, rows)
  for name in ("max_ratio", "min_ratio", "effective_share"):
    assert float(metrics[name]) == pytest.approx(1, abs=1e-4), name
  assert metrics["clip_share"] == 0 and metrics["grad_norm"] > 0.01


def test_the_best_draw_of_each_problem_is_cloned():
  deck, numbers = decks_of("best", "best_of_n")
  searched, verdicts, _ = search("best_of_n")
  row = 0
  for one, judged in zip(searched, verdicts, strict=True):
    pairs = zip(one.solutions, judged, strict=True)
    finished = [(s, v.is_correct) for s, v in pairs if s.is_finished]
    if not finished:
      continue
    right = [s for s, is_correct in finished if is_correct]
    best = (right or [s for s, _ in finished])[0]
    start = len(prompt_of(one.problem))
    end = start + len(best.tokens)
    assert deck.rows.tokens[row, start:end].tolist() == best.tokens.tolist()
    expected = np.zeros(deck.rows.tokens.shape[1])
    expected[start - 1 : end - 1] = 1
    np.testing.assert_array_equal(deck.rows.policy_weights[row], expected)
    row += 1
  assert len(deck) == row == numbers["learn/best"] > 0
  assert not deck.rows.value_weights.any()


def test_pairs_of_solutions_come_from_this_iteration():
  pairs = Pairs(max_per_problem=2, max_age=0)
  deck, numbers = decks_of("pairs", "best_of_n", pairs=pairs)
  assert 0 < len(deck) == numbers["learn/pairs"] <= 2 * len(PROBLEMS)
  assert numbers["learn/pairs_too_long"] == 0
  tokenizer = tiny_policy().tokenizer
  by_prompt = {tuple(prompt_of(p)): p for p in PROBLEMS}
  for row in range(len(deck)):
    marks = []
    for side in range(2):
      length = deck.rows.lengths[row, side]
      tokens = deck.rows.tokens[row, side, :length].tolist()
      start = int(np.flatnonzero(deck.rows.token_weights[row, side])[0]) + 1
      one = by_prompt[tuple(tokens[:start])]
      text = tokenizer.decode(tokens[start:-1])
      marks.append(TASK.check(one, text).is_correct)
    assert marks == [True, False]
  flat = deck.rows.tokens.reshape(-1, deck.rows.tokens.shape[2])
  expected, _ = log_probs_fn(
    other_params(), flat, deck.rows.lengths.reshape(-1)
  )
  np.testing.assert_allclose(
    deck.rows.reference_log_probs.reshape(flat.shape), expected, atol=1e-4
  )
  searched, verdicts, experience = search("best_of_n")
  fresh = make_fresh({"pairs": 4}, reference="start", pairs=pairs)
  decks, _, _ = fresh.decks(
    make_state(),
    searched,
    verdicts,
    experience,
    empty_baseline(),
    np.random.default_rng(0),
    ITERATION + 1,
  )
  assert len(decks["pairs"]) == 0


def test_pairs_of_steps_share_what_stands_before_them():
  pairs = Pairs(level="step", min_margin=0.1)
  deck, numbers = decks_of("pairs", "mcts", pairs=pairs)
  assert len(deck) == numbers["learn/pairs"] > 2
  rows = deck.rows
  first = np.argmax(rows.token_weights, axis=2) + 1
  np.testing.assert_array_equal(first[:, 0], first[:, 1])
  for row, start in enumerate(first[:, 0]):
    better, worse = rows.tokens[row]
    np.testing.assert_array_equal(better[:start], worse[:start])
    assert np.any(better[start:] != worse[start:])
  # Some steps stand behind others.
  prompts = {len(prompt_of(p)) for p in PROBLEMS}
  assert set(first[:, 0].tolist()) - prompts


def is_through(nodes, solution, node):
  """Whether a node is the end of a solution or an ancestor of it."""
  place = solution.node
  while place not in (node, 0):
    place = int(nodes["parent"][place])
  return place == node


@pytest.mark.parametrize(
  "strategy, estimate",
  [("mcts", "soft"), ("mcts", "hard"), ("best_of_n", "soft")],
)
def test_steps_learn_the_share_of_right_solutions_through_them(
  strategy, estimate
):
  deck, numbers = decks_of(
    "process", strategy, process=Process(estimate=estimate)
  )
  rows, row = deck.rows, 0
  found = []
  for one, judged in zip(*search(strategy)[:2], strict=True):
    finished = [
      (s, v.is_correct)
      for s, v in zip(one.solutions, judged, strict=True)
      if s.is_finished
    ]
    for solution, _ in finished:
      expected, end = {}, rows.lengths[row]
      node = solution.node
      while node:
        marks = [
          is_right
          for other, is_right in finished
          if is_through(one.nodes, other, node)
        ]
        label = sum(marks) / len(marks)
        expected[int(end) - 1] = label if estimate == "soft" else label > 0
        end -= one.nodes["lengths"][node]
        node = int(one.nodes["parent"][node])
      assert end == len(prompt_of(one.problem))
      assert rows.lengths[row] == end + len(solution.tokens)
      places = np.flatnonzero(rows.value_weights[row])
      assert places.tolist() == sorted(expected)
      np.testing.assert_allclose(
        rows.value_targets[row, places],
        [expected[place] for place in places],
        rtol=1e-6,
      )
      found += expected.values()
      row += 1
  assert len(deck) == row == numbers["learn/process"] > 0
  assert set(np.unique(rows.value_weights)) == {0, 1}
  assert not rows.policy_weights.any()
  # Only solutions of a tree share steps.
  is_mixed = strategy == "mcts" and estimate == "soft"
  assert any(0 < label < 1 for label in found) == is_mixed
  assert len(found) > row if strategy == "mcts" else len(found) == row


def test_a_mix_without_such_rows_makes_none():
  fresh = make_fresh({"search": 4, "best": 0})
  assert not fresh
  decks, _, numbers = fresh.decks(
    None, [], [], None, None, np.random.default_rng(0), 0
  )
  assert decks == numbers == {}


SEARCH = {
  "strategy": "best_of_n",
  "num_candidates": 4,
  "temperature": 1.0,
  "top_k": 0,
  "top_p": 1.0,
  "min_p": 0.0,
  "options": {},
}
CHOICE = dict(allows_choice=True)


def check(
  mix,
  reference="start",
  advantages=None,
  process=None,
  objective=None,
  **search,
):
  return fresh_rows.check(
    mix,
    reference=reference,
    advantages=Advantages(**(advantages or {})),
    process=Process(**(process or {})),
    objective=Objective(policy_gradient=PolicyGradient(**(objective or {}))),
    search=SEARCH | search,
  )


DRAWN = {"policy_gradient": 8}


@pytest.mark.parametrize(
  "given, words",
  [
    (
      dict(mix={"search": 8}, reference="begin"),
      "learn.reference='begin' is unknown; take one of none, start, iteration",
    ),
    (
      dict(mix={"pairs": 8}, reference="none"),
      "learn.rows.pairs with learn.reference='none': preferences are measured "
      "against a reference; set it to 'start' or 'iteration'",
    ),
    (
      dict(mix={"search": 8, "process": 0}, process=dict(estimate="hard")),
      "learn.process.estimate='hard' is not read without such rows: set "
      "learn.rows.process above 0, or leave it out",
    ),
    (
      dict(mix=DRAWN, reference="none", objective=dict(kl_coefficient=0.1)),
      "set it to 'start' or 'iteration', or the coefficient to 0",
    ),
    (
      dict(mix=DRAWN, advantages=dict(reward="vbon")),
      "set learn.reference to 'iteration'",
    ),
    (
      dict(mix=DRAWN, advantages=dict(baseline="value", estimator="vtrace")),
      "set these to 'reinforce' and 'none', or the estimator to 'gae'",
    ),
    (
      dict(
        mix=DRAWN,
        advantages=dict(baseline="value", estimator="vtrace"),
        objective=dict(loss="reinforce", importance="token"),
      ),
      "weighs by importance already",
    ),
    *(
      (
        dict(mix=DRAWN, advantages=dict(baseline=name), num_candidates=1),
        f"learn.advantages.baseline='{name}' with search.num_candidates=1: it "
        "compares the draws of a problem, and a group of one has no advantage; "
        "draw 2 or more, or take 'moving' or 'value'",
      )
      for name in ("group", "group_std", "leave_one_out")
    ),
    (
      dict(
        mix=DRAWN,
        reference="iteration",
        advantages=dict(baseline="moving", reward="vbon"),
        num_candidates=1,
      ),
      "learn.advantages.reward='vbon' with search.num_candidates=1",
    ),
    (
      dict(mix=DRAWN, objective=dict(loss="reinforce"), temperature=0.7),
      "set importance to 'token' or 'sequence', or the temperature to 1",
    ),
    (dict(mix=DRAWN, strategy="mcts"), "search.strategy='mcts' chooses which"),
    (dict(mix=DRAWN, strategy="greedy"), "take search.strategy=best_of_n"),
    (dict(mix=DRAWN, top_k=5), "search.top_k=5, top_p=1.0 and min_p=0.0 leave"),
    (dict(mix=DRAWN, top_p=0.9), "top_p=0.9"),
    (dict(mix=DRAWN, min_p=0.1), "min_p=0.1"),
    (dict(mix=DRAWN, temperature=0.0), "search.temperature=0 takes the likeli"),
    (
      dict(mix=DRAWN, options=dict(num_rounds=2, stop_threshold=1.0)),
      "search.options.stop_threshold=1.0 ends a search by what it found",
    ),
  ],
)
def test_what_does_not_go_together_is_refused(given, words):
  with pytest.raises(ValueError) as raised:
    check(**given)
  assert words in str(raised.value) and "\n" not in str(raised.value)


def test_what_goes_together_is_taken():
  assert check({"search": 8, "policy_gradient": 0}, reference="none") is None
  assert check(DRAWN, reference="none") is None
  assert check(DRAWN, strategy="majority_vote", temperature=0.7) is None
  assert check({"best": 8}, reference="none", strategy="mcts") is None
  assert check({"pairs": 8}, reference="iteration", strategy="mcts") is None
  hard = dict(estimate="hard")
  assert check({"process": 8}, process=hard, strategy="mcts") is None
  # Rounds of one draw each are a group too.
  rounds = dict(num_candidates=1, options=dict(num_rounds=4))
  assert check(DRAWN, **rounds) is None
  moving = dict(baseline="moving")
  assert check(DRAWN, advantages=moving, num_candidates=1) is None
  vbon = dict(baseline="none", reward="vbon", num_draws=4)
  assert check(DRAWN, reference="iteration", advantages=vbon) is None
  vtrace = dict(baseline="value", estimator="vtrace")
  reinforce = dict(loss="reinforce")
  assert check(DRAWN, advantages=vtrace, objective=reinforce) is None
  warm = dict(objective=reinforce, temperature=0.7)
  assert check(DRAWN, advantages=vtrace, **warm) is None
  weighted = reinforce | dict(importance="token")
  assert check(DRAWN, objective=weighted, temperature=0.7) is None


@pytest.mark.parametrize("search", [dict(strategy="mcts"), dict(top_k=5)])
def test_a_choice_may_be_accepted_and_is_reported(search):
  notice = check(DRAWN, advantages=CHOICE, **search)
  assert notice.startswith("policy gradients are approximate: search.")
  assert "\n" not in notice
  assert check(DRAWN, advantages=CHOICE) is None


def test_a_length_penalty_needs_room():
  lengths = tiny_policy().lengths
  longest = lengths.num_steps * lengths.step_tokens
  for free_length, is_refused in ((longest - 1, False), (longest, True)):
    advantages = Advantages(length_penalty=0.1, free_length=free_length)
    if not is_refused:
      make_fresh(DRAWN, advantages=advantages)
      continue
    with pytest.raises(ValueError, match=f"free_length={longest} must be belo"):
      make_fresh(DRAWN, advantages=advantages)


def test_the_options_are_fields_of_a_config():
  for group, (function, _) in fields.GROUPS.items():
    if function in (Advantages, Pairs, PolicyGradient, Process):
      assert dataclasses.is_dataclass(function) and group in fields.EMPTY_GROUPS


def test_trees_become_chains_of_thought_that_end_right():
  searched, verdicts, experience = search("mcts")
  policy = dataclasses.replace(
    tiny_policy(), lengths=tiny_policy().lengths._replace(reflection_tokens=900)
  )
  fresh = FreshRows(
    policy,
    TASK,
    {"linearized": 4},
    score_fn(),
    reference="none",
    advantages=Advantages(),
    pairs=Pairs(),
    process=Process(),
    max_value_change=0.0,
  )
  decks, _, numbers = fresh.decks(
    make_state(),
    searched,
    verdicts,
    experience,
    empty_baseline(),
    np.random.default_rng(0),
    ITERATION,
  )
  found = [
    (one, any(v.is_correct for v in judged))
    for one, judged in zip(searched, verdicts, strict=True)
  ]
  solved = [one.problem for one, is_solved in found if is_solved]
  assert numbers["learn/linearized"] == len(solved) > 0
  assert numbers["learn/linearized_too_long"] == 0
  rows = decks["linearized"].rows
  tokenizer = policy.tokenizer
  chains = packed_members(rows)
  assert len(rows.tokens) < len(chains) == len(solved)
  of_prompt = {problem.prompt: problem for problem in solved}
  for tokens, weights in chains:
    assert tokens[-1] == tokenizer.eos_id and weights[-1] == 0
    text = tokenizer.decode(tokens[:-1].tolist())
    problem = of_prompt.pop(text.partition("\n")[0] + "\n")
    head = f"{problem.prompt}think:\n"
    assert text.startswith(head)
    answer = TASK.final_solution(text.removeprefix(problem.prompt))
    assert TASK.check(problem, answer).is_correct
    # All but what is given is learned.
    start = len(tokenizer.encode(head))
    assert not weights[: start - 1].any()
    assert weights[start - 1 : -1].min() == 1
