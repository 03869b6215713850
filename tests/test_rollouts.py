"""Rows of what was drawn: against loops, and against all draws there are."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax import rollouts
from o1jax.learning import baselines
from o1jax.learning import objective as objectives
from o1jax.learning.objective import Objective, PolicyGradient
from o1jax.rollouts import Advantages, Deck, Pairs
from o1jax.searched import FoundSolution, Searched
from o1jax.types import Problem, ScoredSolution, Verdict

pytestmark = pytest.mark.usefixtures("quick_programs")

LENGTH, MAX_TOKENS, PAD = 9, 6, 77


def problem(number):
  return Problem(f"toy/{number}", "toy", f"problem {number}", {})


def solution(tokens, log_probs=None, is_finished=True):
  tokens = np.asarray(tokens, np.int32)
  if log_probs is None:
    log_probs = -np.arange(1.0, 1 + len(tokens))
  log_probs = np.asarray(log_probs, np.float32)
  return FoundSolution(
    node=1,
    text=" ".join(map(str, tokens)),
    path=(1,),
    tokens=tokens,
    behavior_log_probs=log_probs,
    policy_log_probs=log_probs - 0.25,
    is_finished=is_finished,
    outcome=0.0,
    num_visits=1,
  )


def search_of(number, solutions, nodes=None):
  return Searched(problem(number), solutions, None, nodes or {}, {})


def verdicts_of(marks):
  return [[Verdict(bool(m), "toy", None) for m in group] for group in marks]


def collect(groups, marks, prompts, **options):
  searched = [search_of(i, group) for i, group in enumerate(groups)]
  sizes = {"length": LENGTH, "pad_id": PAD} | options
  prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
  return rollouts.collect(searched, verdicts_of(marks), prompts, **sizes)


def test_a_log_prob_stands_at_the_position_before_its_token():
  groups = [
    [solution([11, 12, 13]), solution([14], is_finished=False)],
    [],
    [solution([15, 16]), solution([17] * 7), solution([15, 16])],
  ]
  marks = [[1, 1], [], [0, 1, 1]]
  prompts = [[1, 2, 3, 4], [5], [6, 7, 8]]
  draws = collect(groups, marks, prompts)
  # Seven tokens after three are one too many.
  assert draws.num_dropped == 1 and draws.num_problems == 3
  assert draws.groups.tolist() == [0, 0, 2, 2]
  assert draws.is_truncated.tolist() == [False, True, False, False]
  # What was cut off is not right, whatever was read in it.
  assert draws.outcomes.tolist() == [1, 0, 0, 1]
  kept = [(0, groups[0][0]), (0, groups[0][1]), *[(2, groups[2][0])] * 2]
  for row, (group, one) in enumerate(kept):
    p, n = len(prompts[group]), len(one.tokens)
    assert (draws.starts[row], draws.lengths[row]) == (p, p + n)
    expected = [*prompts[group], *one.tokens] + [PAD] * (LENGTH - p - n)
    assert draws.tokens[row].tolist() == expected
    behavior, policy = np.zeros(LENGTH), np.zeros(LENGTH)
    is_learned = np.zeros(LENGTH, bool)
    for i in range(n):
      behavior[p + i - 1] = one.behavior_log_probs[i]
      policy[p + i - 1] = one.policy_log_probs[i]
      is_learned[p + i - 1] = True
    np.testing.assert_array_equal(draws.behavior_log_probs[row], behavior)
    np.testing.assert_array_equal(draws.policy_log_probs[row], policy)
    np.testing.assert_array_equal(draws.is_learned[row], is_learned)


def mixed_draws():
  """Six problems: mixed, all right, all wrong, one draw, cut off, repeats."""
  marks = [[1, 0, 0, 1], [1, 1], [0, 0, 0], [1], [1, 0, 1], [1, 0, 1, 1]]
  rng = np.random.default_rng(0)
  groups = [
    [solution(rng.integers(1, 9, rng.integers(1, 7))) for _ in group]
    for group in marks
  ]
  groups[4][2] = solution([3, 4, 5], is_finished=False)
  groups[4].append(solution([3], is_finished=False))
  marks[4].append(0)
  # The same text three times.
  groups[5] = [groups[5][0], groups[5][1], groups[5][0], groups[5][0]]
  draws = collect(groups, marks, [[1] * n for n in (1, 2, 3, 1, 2, 3)])
  shape = draws.tokens.shape
  values = rng.uniform(0.1, 0.9, shape).astype(np.float32)
  log_probs = draws.behavior_log_probs + rng.normal(0, 0.5, shape)
  reference = rng.normal(size=shape)
  return draws, values, log_probs.astype(np.float32), reference


def rows_in_loops(options, draws, moving, values, log_probs):
  """`(draw, what its row holds by name)` of each draw that is kept."""
  rewards, expected, is_used = [], [], []
  for n in range(len(draws.tokens)):
    reward = float(draws.outcomes[n])
    if draws.is_truncated[n] and options.truncated == "bootstrap":
      reward = float(values[n, draws.lengths[n] - 1])
    expected.append(reward)
    excess = draws.lengths[n] - draws.starts[n] - options.free_length
    excess /= MAX_TOKENS - options.free_length
    rewards.append(reward - options.length_penalty * min(max(excess, 0), 1))
    is_used.append(not draws.is_truncated[n] or options.truncated != "mask")
  advantages = {}
  for n in np.flatnonzero(is_used).tolist():
    peers = [m for m in np.flatnonzero(draws.groups == draws.groups[n])
             if is_used[m]]  # fmt: skip
    learned = range(draws.starts[n] - 1, draws.lengths[n] - 1)
    if options.baseline == "value":
      advantages[n] = along(
        options, draws, n, learned, rewards[n], values, log_probs
      )
    else:
      one = among(options, [rewards[m] for m in peers], peers.index(n), moving)
      advantages[n] = {t: (one, expected[n]) for t in learned}
  moved = {
    int(draws.groups[n])
    for n, along_row in advantages.items()
    if any(advantage for advantage, _ in along_row.values())
  }
  rows = []
  for n in range(len(draws.tokens)):
    is_flat = int(draws.groups[n]) not in moved
    if not is_used[n] or (options.skips_flat and is_flat):
      continue
    names = ("advantages", "policy_weights", "value_weights", "targets")
    row = {name: np.zeros(LENGTH) for name in names}
    for t, (advantage, target) in advantages[n].items():
      by_rows = options.normalize_by == "rows"
      row["policy_weights"][t] = 1 / len(advantages[n]) if by_rows else 1
      row["advantages"][t] = advantage
      row["value_weights"][t] = 1
      row["targets"][t] = min(max(target, 0), 1)
    if not draws.is_truncated[n]:
      last = draws.lengths[n] - 1
      row["value_weights"][last] = 1
      is_along = options.baseline == "value"
      known = rewards[n] if is_along else expected[n]
      row["targets"][last] = min(max(known, 0), 1)
    rows.append((n, row))
  return rows


def among(options, rewards, own, moving):
  """The advantage of one draw among the rewards of its problem."""
  if options.reward == "vbon":
    rewards = [
      quantile_reward(r, rewards[:i] + rewards[i + 1 :], options.num_draws)
      for i, r in enumerate(rewards)
    ]
  reward, others = rewards[own], rewards[:own] + rewards[own + 1 :]
  mean = sum(rewards) / len(rewards)
  if options.baseline == "none":
    return reward
  if options.baseline == "moving":
    return reward - moving
  if len(set(rewards)) == 1:
    return 0.0
  if options.baseline == "leave_one_out":
    return reward - sum(others) / len(others)
  std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
  scale = std + 1e-6 if options.baseline == "group_std" else 1.0
  return (reward - mean) / scale


def quantile_reward(reward, others, num_draws):
  at_most = sum(other <= reward for other in others)
  share = sum(other < reward for other in others) / (1 + at_most)
  log_quantile = math.log((1 + at_most) / (1 + len(others)))
  ties = sum(share**i for i in range(num_draws))
  return (num_draws - 1) * log_quantile + math.log(ties)


def along(options, draws, n, learned, reward, values, log_probs):
  """`{position: (advantage, target)}` by sums of errors, first to last."""
  after = draws.lengths[n] - 1
  is_open = draws.is_truncated[n] and options.truncated == "bootstrap"
  behind = float(values[n, after]) if is_open else 0.0
  rewards = dict.fromkeys(learned, 0.0)
  if learned:
    # It earned nothing yet but its penalty, where it goes on.
    rewards[learned[-1]] = reward - behind if is_open else reward
  v = {t: float(values[n, t]) for t in learned} | {after: behind}
  gamma, lam = options.discount, options.lambda_
  delta = {t: rewards[t] + gamma * v[t + 1] - v[t] for t in learned}
  if options.estimator == "gae":
    found = {}
    for t in learned:
      advantage = sum(
        (gamma * lam) ** (k - t) * delta[k] for k in range(t, after)
      )
      found[t] = (advantage, advantage + v[t])
    return found
  ratio = {t: math.exp(log_probs[n, t] - draws.behavior_log_probs[n, t])
           for t in learned}  # fmt: skip
  rho = {t: min(1.0, r) for t, r in ratio.items()}
  target = {after: behind}
  for t in learned:
    target[t] = v[t] + sum(
      gamma ** (k - t)
      * math.prod(lam * rho[i] for i in range(t, k))
      * rho[k]
      * delta[k]
      for k in range(t, after)
    )
  return {
    t: (rho[t] * (rewards[t] + gamma * target[t + 1] - v[t]), target[t])
    for t in learned
  }


VALUE = dict(baseline="value", skips_flat=False)
OPTIONS = [
  dict(baseline="none"),
  dict(baseline="none", skips_flat=False, truncated="wrong"),
  dict(baseline="moving", normalize_by="rows"),
  dict(baseline="group"),
  dict(baseline="group", truncated="wrong", length_penalty=0.5, free_length=2),
  dict(baseline="group_std", truncated="bootstrap", normalize_by="rows"),
  dict(baseline="leave_one_out"),
  dict(baseline="leave_one_out", truncated="wrong", skips_flat=False),
  dict(baseline="leave_one_out", truncated="bootstrap", length_penalty=2.0),
  dict(baseline="none", reward="vbon", num_draws=4),
  dict(baseline="leave_one_out", reward="vbon", num_draws=2),
  VALUE | dict(discount=0.9, lambda_=0.8),
  VALUE | dict(truncated="bootstrap", length_penalty=0.5, lambda_=1.0),
  VALUE | dict(truncated="wrong", normalize_by="rows", lambda_=0.0),
  VALUE | dict(estimator="vtrace", discount=0.9, truncated="bootstrap"),
]


def moving_at(mean):
  weight = jnp.float32(0.5)
  return baselines.MovingBaseline(reward_sum=weight * mean, weight=weight)


@pytest.mark.parametrize("given", OPTIONS)
def test_rows_are_those_of_the_loops(given):
  options = Advantages(**given)
  draws, values, log_probs, reference = mixed_draws()
  moving = moving_at(0.625)
  rows, moved, numbers = rollouts.policy_gradient_rows(
    draws,
    options,
    moving,
    values=values,
    log_probs=log_probs,
    reference_log_probs=reference,
    max_tokens=MAX_TOKENS,
  )
  expected = rows_in_loops(options, draws, 0.625, values, log_probs)
  assert len(rows.tokens) == len(expected) == numbers["draws_kept"]
  # Equal texts as often as they came.
  repeats = draws.tokens[draws.groups == 5]
  assert len(repeats) == 4 and len(np.unique(repeats, axis=0)) == 2
  assert numbers["draws"] == len(draws.tokens) == 18
  for row, (n, one) in enumerate(expected):
    np.testing.assert_array_equal(rows.tokens[row], draws.tokens[n])
    assert rows.lengths[row] == draws.lengths[n]
    for name, wanted in (
      ("advantages", one["advantages"]),
      ("policy_weights", one["policy_weights"]),
      ("value_weights", one["value_weights"]),
      ("behavior_log_probs", draws.behavior_log_probs[n]),
      ("reference_log_probs", reference[n]),
      ("behavior_values", values[n]),
    ):
      found = getattr(rows, name)[row]
      np.testing.assert_allclose(found, wanted, atol=2e-6, err_msg=name)
    targets = rows.value_targets[row] * rows.value_weights[row]
    np.testing.assert_allclose(targets, one["targets"], atol=2e-6)
  for leaf in jax.tree.leaves(rows):
    assert isinstance(leaf, np.ndarray) and leaf.dtype.itemsize == 4
  if options.baseline != "moving":
    assert moved.weight == moving.weight
  else:
    outcomes = draws.outcomes[~draws.is_truncated]
    np.testing.assert_allclose(
      moved.reward_sum, 0.9 * 0.5 * 0.625 + 0.1 * outcomes.mean(), rtol=1e-6
    )
    np.testing.assert_allclose(moved.weight, 0.9 * 0.5 + 0.1, rtol=1e-6)


def rows_of(draws, options, **arrays):
  given = dict.fromkeys(
    ("values", "log_probs", "reference_log_probs"),
    np.zeros(draws.tokens.shape, np.float32),
  )
  return rollouts.policy_gradient_rows(
    draws,
    options,
    baselines.empty_baseline(),
    max_tokens=MAX_TOKENS,
    **(given | arrays),
  )


@pytest.mark.parametrize("given", [OPTIONS[6], OPTIONS[10], OPTIONS[-1]])
def test_draws_of_a_problem_may_lie_apart(given):
  draws, values, log_probs, reference = mixed_draws()
  order = np.random.default_rng(1).permutation(len(draws.tokens))
  turned = dataclasses.replace(
    draws,
    **{
      name: array[order]
      for name, array in vars(draws).items()
      if isinstance(array, np.ndarray)
    },
  )
  options = Advantages(**(given | dict(skips_flat=False, truncated="wrong")))
  arrays = dict(
    values=values, log_probs=log_probs, reference_log_probs=reference
  )
  rows, _, _ = rows_of(draws, options, **arrays)
  arrays = {name: array[order] for name, array in arrays.items()}
  found, _, _ = rows_of(turned, options, **arrays)
  assert len(found.tokens) == len(order)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y[order], atol=1e-6),
    found,
    rows,
  )


@pytest.mark.parametrize("baseline", ["group", "group_std", "leave_one_out"])
def test_groups_without_a_difference_have_no_advantage_at_all(baseline):
  # A third is no binary fraction: the mean of three is off.
  groups = [[solution([1, 2])] * 3, [solution([3])], [solution([4])] * 3]
  marks = [[1, 1, 1], [1], [0, 0, 0]]
  draws = collect(groups, marks, [[1], [2], [3]])
  options = Advantages(baseline=baseline, skips_flat=False)
  rows, _, numbers = rows_of(draws, options)
  assert len(rows.tokens) == 7 and not rows.advantages.any()
  assert numbers["flat_share"] == 1
  rows, _, _ = rows_of(draws, Advantages(baseline=baseline))
  assert rows.tokens.shape == (0, LENGTH)


def test_a_problem_keeps_the_draws_that_its_value_is_learned_from():
  """Without a baseline the wrong ones have no advantage."""
  draws = collect(
    [[solution([1]), solution([2])], [solution([3]), solution([4])]],
    [[1, 0], [0, 0]],
    [[1], [2]],
  )
  rows, _, _ = rows_of(draws, Advantages(baseline="none"))
  assert rows.value_targets[:, 0].tolist() == [1, 0]


def test_advantages_along_a_solution_by_hand():
  draws = collect([[solution([5, 6, 7])]], [[1]], [[1, 2]])
  values = np.zeros((1, LENGTH), np.float32)
  # After the prompt, after 5 and after 6.
  values[0, 1:4] = 0.5, 0.25, 0.75
  options = Advantages(baseline="value", lambda_=0.5)
  rows, _, _ = rows_of(draws, options, values=values)
  # Errors -0.25, 0.5 and 0.25.
  expected = [-0.25 + 0.5 * (0.5 + 0.5 * 0.25), 0.5 + 0.5 * 0.25, 0.25]
  np.testing.assert_allclose(rows.advantages[0, 1:4], expected)
  assert not rows.advantages[0, [0, 4, 5]].any()
  np.testing.assert_allclose(
    rows.value_targets[0, 1:5], [*(expected + values[0, 1:4]), 1]
  )
  # V-trace where the last token has become half as likely.
  log_probs = draws.behavior_log_probs.copy()
  log_probs[0, 3] -= math.log(2)
  log_probs[0, 2] += 1.0
  options = Advantages(baseline="value", estimator="vtrace", lambda_=1.0)
  rows, _, _ = rows_of(draws, options, values=values, log_probs=log_probs)
  # v = 0.75 + 0.25 / 2 after 6; what stands before it is passed on whole.
  np.testing.assert_allclose(rows.value_targets[0, 1:4], 0.875, rtol=1e-6)
  expected = [0.875 - 0.5, 0.875 - 0.25, (1 - 0.75) / 2]
  np.testing.assert_allclose(rows.advantages[0, 1:4], expected, rtol=1e-6)


@pytest.mark.parametrize("given", OPTIONS)
def test_searches_without_a_draw_give_no_rows(given):
  draws = collect([[], []], [[], []], [[1], [2]])
  rows, moving, numbers = rows_of(draws, Advantages(**given))
  assert rows.tokens.shape == (0, LENGTH)
  assert moving.weight == 0 and np.isfinite(list(numbers.values())).all()
  empty = Deck(rows).draw(np.random.default_rng(0), 3)
  assert empty.tokens.shape == (3, LENGTH)
  assert not any(leaf.any() for leaf in jax.tree.leaves(empty))


# A world that can be enumerated. The first token of a row is its problem; a
# solution ends with 0, or with its second token.
PROBLEMS = ([3], [4, 3])
SOLUTIONS = ([0], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2])
MARKS = ((1, 0, 1, 0, 0, 1, 0), (0, 0, 0, 1, 0, 0, 0))
GROUP = 3


def table(seed):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(5, 5, 3))


def table_log_probs(params, tokens, lengths):
  """The next token depends on the problem and on the present token."""
  del lengths
  whole = jax.nn.log_softmax(params[tokens[:, :1], tokens])
  following = jnp.minimum(jnp.roll(tokens, -1, axis=1), 2)
  picked = jnp.take_along_axis(whole, following[:, :, None], 2)[:, :, 0]
  return picked, jnp.zeros(tokens.shape, whole.dtype)


def log_probs_of(params, prompt, tokens):
  """Of the tokens of one solution, in NumPy."""
  found, present = [], prompt[-1]
  for token in tokens:
    logits = params[prompt[0], present]
    found.append(logits[token] - np.log(np.exp(logits).sum()))
    present = token
  return np.array(found)


def exact_gradient(params):
  """Of the mean over problems of the probability of being right."""

  def objective(params):
    total = 0.0
    for prompt, marks in zip(PROBLEMS, MARKS, strict=True):
      for tokens, mark in zip(SOLUTIONS, marks, strict=True):
        row = jnp.array([[*prompt, *tokens]])
        log_probs, _ = table_log_probs(params, row, None)
        start = len(prompt) - 1
        own = log_probs[0, start : start + len(tokens)]
        total += mark * jnp.exp(jnp.sum(own)) / len(PROBLEMS)
    return total

  return jax.grad(objective)(params)


def expected_gradient(params, drawn_by, advantages, **options):
  """Mean of the whole path's gradient over every group that may be drawn.

  Each group is searched once, and its rows are weighted by its probability.
  """
  searched, marks, prompts, probs = [], [], [], []
  for prompt, right in zip(PROBLEMS, MARKS, strict=True):
    own = [log_probs_of(drawn_by, prompt, tokens) for tokens in SOLUTIONS]
    for drawn in itertools.product(range(len(SOLUTIONS)), repeat=GROUP):
      searched.append([solution(SOLUTIONS[i], own[i]) for i in drawn])
      marks.append([right[i] for i in drawn])
      prompts.append(prompt)
      probs.append(math.exp(sum(own[i].sum() for i in drawn)))
  probs = np.array(probs) / len(PROBLEMS)
  np.testing.assert_allclose(probs.sum(), 1)
  draws = collect(searched, marks, prompts, length=4, pad_id=0)
  shape = draws.tokens.shape
  # Groups are told by their values, which these baselines do not read.
  values = np.broadcast_to(draws.groups[:, None], shape).astype(np.float32)
  if advantages.baseline == "value":
    values = table(7)[draws.tokens[:, :1], draws.tokens, 0]
  rows, _, _ = rollouts.policy_gradient_rows(
    draws,
    advantages,
    moving_at(0.25),
    values=values,
    log_probs=draws.policy_log_probs,
    reference_log_probs=draws.policy_log_probs,
    max_tokens=MAX_TOKENS,
  )
  groups = draws.groups
  if advantages.baseline != "value":
    groups = rows.behavior_values[:, 0].astype(int)
  rows = rows.replace(
    policy_weights=rows.policy_weights * probs[groups][:, None] / GROUP,
    value_targets=rows.value_weights,
  )
  objective = Objective(
    policy_gradient=PolicyGradient(loss="reinforce", **options)
  )

  def gained(params):
    sums = objectives.sums(objective, table_log_probs, params, rows)
    return -sums.terms["policy_gradient"]

  return jax.grad(gained)(params), len(rows.tokens)


@pytest.mark.parametrize(
  "given, options, drawn_by",
  [
    (dict(baseline="none"), {}, 0),
    (dict(baseline="moving"), {}, 0),
    (dict(baseline="leave_one_out"), {}, 0),
    (dict(baseline="leave_one_out", skips_flat=False), {}, 0),
    (dict(baseline="value", lambda_=1.0), {}, 0),
    (dict(baseline="none"), dict(importance="sequence"), 1),
    (dict(baseline="leave_one_out"), dict(importance="sequence"), 1),
  ],
)
def test_over_all_draws_the_gradient_is_the_policy_gradient(
  given, options, drawn_by
):
  with jax.enable_x64(True):
    params = jnp.asarray(table(0))
    exact = exact_gradient(params)
    found, num_rows = expected_gradient(
      params, table(drawn_by), Advantages(**given), **options
    )
    assert float(jnp.abs(exact).max()) > 0.03
    np.testing.assert_allclose(found, exact, atol=1e-7)
  num_all = GROUP * len(PROBLEMS) * len(SOLUTIONS) ** GROUP
  is_whole = given["baseline"] in ("moving", "value") or "skips_flat" in given
  assert (num_rows == num_all) == is_whole


def test_what_is_known_to_be_biased_is():
  with jax.enable_x64(True):
    params = jnp.asarray(table(0))
    exact = exact_gradient(params)
    # The mean of a group holds the draw itself (Dr. GRPO).
    found, _ = expected_gradient(params, table(0), Advantages(baseline="group"))
    np.testing.assert_allclose(found, exact * (GROUP - 1) / GROUP, atol=1e-6)
    none = Advantages(baseline="none")
    for options in ({}, dict(importance="token")):
      found, _ = expected_gradient(params, table(1), none, **options)
      assert float(jnp.abs(found - exact).max()) > 0.01


def test_a_deck_is_drawn_in_epochs():
  deck = Deck({"a": np.arange(7), "b": np.arange(14).reshape(7, 2)})
  rng = np.random.default_rng(3)
  drawn = [deck.draw(rng, n) for n in (3, 3, 8, 0, 7)]
  for one in drawn:
    np.testing.assert_array_equal(one["b"][:, 0], 2 * one["a"])
  order = np.concatenate([one["a"] for one in drawn])
  epochs = order.reshape(3, 7)
  for epoch in epochs:
    assert sorted(epoch) == list(range(7))
  assert np.any(epochs[0] != epochs[1]) and len(deck) == 7
  again = Deck(deck.rows).draw(np.random.default_rng(3), 21)
  np.testing.assert_array_equal(again["a"], order)


def tree():
  """The root has 1, 2, 3; node 1 has 4, 5, node 2 has 6, 7, node 6 has 8, 9."""
  parent = [-1, 0, 0, 0, 1, 1, 2, 2, 6, 6]
  mean = [0.5, 0.2, 0.7, 0.9, 0.0, 0.0, 0.4, 0.45, 0.8, 0.1]
  reward = [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
  lengths = [0, 2, 1, 2, 1, 3, 1, 1, 1, 1]
  tokens = 10 * np.arange(10)[:, None] + np.arange(3)[None, :]
  return {
    "parent": np.array(parent),
    "depth": np.array([0, 1, 1, 1, 2, 2, 2, 2, 3, 3]),
    "mean_value": np.array(mean, np.float32),
    "reward": np.array(reward, np.float32),
    # Node 3 was never visited, so that nothing is known of it.
    "num_visits": np.array([9, 3, 3, 0, 1, 1, 1, 1, 1, 1]),
    "is_valid": np.ones(10, bool),
    "lengths": np.array(lengths),
    "tokens": tokens.astype(np.int32),
  }


def test_pairs_of_steps_stand_below_one_node():
  searched = [search_of(0, [], tree())]
  found = rollouts.step_pairs(searched, min_margin=0.2)
  # Below node 2 the two differ by too little.
  expected = [
    ([], [20], [10, 11]),
    ([10, 11], [40], [50, 51, 52]),
    ([20, 60], [80], [90]),
  ]
  assert [[part.tolist() for part in parts] for _, *parts in found] == [
    list(map(list, one)) for one in expected
  ]
  assert all(one == problem(0) for one, *_ in found)
  assert len(rollouts.step_pairs(searched, min_margin=0.01)) == 4
  nodes = tree() | {"mean_value": np.zeros(10), "reward": np.zeros(10)}
  assert not rollouts.step_pairs([search_of(0, [], nodes)], min_margin=0.0)


def test_a_pair_compares_the_tokens_of_its_steps_alone():
  pairs = rollouts.step_pairs([search_of(0, [], tree())], min_margin=0.2)[:2]
  prompt = np.array([1, 2], np.int32)

  def score(tokens, lengths):
    del lengths
    return -np.arange(tokens.size, dtype=np.float32).reshape(tokens.shape)

  def lay_out(length):
    return rollouts.preference_rows(
      pairs, lambda _: prompt, score, length=length, pad_id=PAD
    )

  rows, num_dropped = lay_out(8)
  assert num_dropped == 0 and rows.pair_weights.tolist() == [1, 1]
  assert rows.tokens[1].tolist() == [
    [1, 2, 10, 11, 40, PAD, PAD, PAD],
    [1, 2, 10, 11, 50, 51, 52, PAD],
  ]
  assert rows.lengths.tolist() == [[3, 4], [5, 7]]
  assert rows.token_weights[1].tolist() == [
    [0, 0, 0, 1, 0, 0, 0, 0],
    [0, 0, 0, 1, 1, 1, 0, 0],
  ]
  np.testing.assert_array_equal(
    rows.reference_log_probs, -np.arange(32).reshape(2, 2, 8)
  )
  # A pair goes as a whole, where one side is too long.
  rows, num_dropped = lay_out(6)
  assert num_dropped == 1 and rows.lengths.tolist() == [[3, 4]]
  rows, num_dropped = lay_out(2)
  assert num_dropped == 2 and rows.tokens.shape == (0, 2, 2)
  assert Deck(rows).draw(np.random.default_rng(0), 4).tokens.shape == (4, 2, 2)


def test_whole_solutions_are_pairs_with_nothing_before():
  better, worse = (
    ScoredSolution(
      problem=problem(1),
      text="",
      tokens=np.array(tokens, np.int32),
      step_weights=np.zeros(0),
      behavior_log_probs=np.zeros(0),
      policy_log_probs=np.zeros(0),
      outcome_reward=reward,
      verdict="toy",
      iteration=0,
      source="search",
    )
    for tokens, reward in (([5, 6], 1.0), ([7], 0.0))
  )
  ((one, before, *both),) = rollouts.solution_pairs([(better, worse)])
  assert one == problem(1) and len(before) == 0
  assert [part.tolist() for part in both] == [[5, 6], [7]]


def test_the_best_of_a_problem_is_finished_and_the_first_of_its_equals():
  groups = [
    [solution([1]), solution([2]), solution([3])],
    [solution([4], is_finished=False), solution([5])],
    [solution([6], is_finished=False)],
  ]
  marks = verdicts_of([[0, 1, 1], [1, 0], [1]])
  searched = [search_of(i, group) for i, group in enumerate(groups)]
  found = rollouts.best_draws(searched, marks)
  assert [(p.id, s.tokens.tolist(), v.is_correct) for p, s, v in found] == [
    ("toy/0", [2], True),
    ("toy/1", [5], False),
  ]


def test_rows_are_scored_by_one_program_and_few_by_a_smaller_one(monkeypatch):
  monkeypatch.setattr(rollouts, "SCORE_ROWS", 8)
  shapes = set()

  def score_fn(params, tokens, lengths):
    shapes.add(tokens.shape)
    return params * tokens, tokens + lengths[:, None]

  rng = np.random.default_rng(0)
  for count, size in ((0, None), (1, 1), (3, 4), (4, 4), (5, 8), (17, 8)):
    shapes.clear()
    tokens = rng.integers(0, 9, (count, 3))
    lengths = rng.integers(0, 4, count)
    log_probs, values = rollouts.score_rows(score_fn, 2, tokens, lengths)
    np.testing.assert_array_equal(log_probs, 2 * tokens)
    np.testing.assert_array_equal(values, tokens + lengths[:, None])
    assert shapes == ({(size, 3)} if size else set())


def test_the_moving_baseline_survives_a_file_to_the_bit():
  moving = rollouts.moving_from(None)
  assert moving.weight == 0 == moving.reward_sum
  draws, values, log_probs, reference = mixed_draws()
  arrays = dict(values=values, log_probs=log_probs)
  arrays["reference_log_probs"] = reference
  options = Advantages(baseline="moving")
  for _ in range(3):
    record = json.loads(json.dumps(rollouts.moving_record(moving)))
    restored = rollouts.moving_from(record)
    both = [
      rollouts.policy_gradient_rows(
        draws, options, one, max_tokens=MAX_TOKENS, **arrays
      )[:2]
      for one in (moving, restored)
    ]
    jax.tree.map(np.testing.assert_array_equal, *both)
    moving = both[0][1]
  assert 0 < moving.weight < 1


@pytest.mark.parametrize(
  "make, options, words",
  [
    (Advantages, dict(baseline="mean"), "baseline='mean' is unknown"),
    (Advantages, dict(reward="bon"), "reward='bon' is unknown"),
    (Advantages, dict(truncated="drop"), "truncated='drop' is unknown"),
    (Advantages, dict(estimator="td"), "estimator='td' is unknown"),
    (Advantages, dict(normalize_by="row"), "normalize_by='row' is unknown"),
    (Advantages, dict(discount=1.5), r"discount=1.5 is not in \[0, 1\]"),
    (Advantages, dict(lambda_=-0.5), r"lambda_=-0.5 is not in \[0, 1\]"),
    (Advantages, dict(length_penalty=-1.0), "must be 0 or more"),
    (Advantages, dict(free_length=3), "set it to 0, or length_penalty above"),
    (Advantages, dict(num_draws=2), "set it to 1 otherwise"),
    (Advantages, dict(num_draws=0, reward="vbon"), "at least 1"),
    (
      Advantages,
      dict(reward="vbon", baseline="value"),
      "take another baseline",
    ),
    (Advantages, dict(estimator="vtrace"), "read by baseline='value' alone"),
    (Advantages, dict(discount=0.5), "read by baseline='value' alone"),
    (Advantages, dict(lambda_=0.5), "read by baseline='value' alone"),
    (Pairs, dict(level="token"), "level='token' is unknown; take one of sol"),
    (Pairs, dict(max_per_problem=0), "max_per_problem=0 must be 1 or more"),
    (Pairs, dict(max_age=-1), "max_age=-1"),
    (Pairs, dict(min_margin=-0.5), "min_margin=-0.5"),
  ],
)
def test_bad_options_are_refused(make, options, words):
  with pytest.raises(ValueError, match=words) as raised:
    make(**options)
  assert "\n" not in str(raised.value)
