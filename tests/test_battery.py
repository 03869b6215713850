"""One battery for every strategy: repeats, books, devices, scores.

Each cell is searched twice: on one device with the tree memory, all problems
in one batch, and on eight devices with the tokens memory, each problem alone
on its own. Both must find the same trees. On the one device the network counts
what it is given, token by token, and that count is the cost.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax import mesh as mesh_lib
from o1jax.combinations import (
  GRANULARITIES,
  REVISIONS,
  STRATEGIES,
  WHOLE,
)
from o1jax.solver import Solver
from policies import LENGTHS, ToyTask, tiny_params, tiny_policy

pytestmark = pytest.mark.usefixtures("quick_programs")

BATCH, NUM_REVISIONS, NUM_DEVICES = 8, 2, 8
TASK = ToyTask(num_numbers=3, min_number=1, max_number=9)
PROBLEMS = TASK.sample_problems(np.random.default_rng(5), BATCH)
KEY = 3
SOLUTION = LENGTHS.step_tokens * LENGTHS.num_steps
TREE = dict(num_candidates=2, num_expansions=8, num_simulations=60)
# Options of a Solver; beside them each has a budget that it cannot keep to.
CASES = {
  "best_of_n": dict(num_candidates=2, options=dict(num_rounds=4)),
  "majority_vote": dict(num_candidates=2, options=dict(num_rounds=4)),
  "greedy": {},
  "revision": dict(options=dict(num_chains=2, num_starts=4)),
  # With so much exploration it soon leaves the root.
  "mctsr": dict(num_simulations=8, options=dict(exploration=1.0)),
  "mcts": TREE,
  "mcts-uct": TREE | dict(rule="uct", options=dict(max_blocks=2)),
  "mcts-rollouts": TREE | dict(num_rollouts=2, rollout_weight=0.5),
  "mcts-gumbel": TREE | dict(rule="gumbel", num_parallel_leaves=2),
  "reroot": TREE | dict(num_simulations=6),
  "beam": TREE | dict(options=dict(width=3)),
  "breadth_first": TREE | dict(options=dict(width=3, num_root_blocks=2)),
  "dvts": TREE | dict(strategy="beam", options=dict(width=2, num_subtrees=2)),
  "treebon": TREE | dict(options=dict(num_roots=4)),
  "best_first": TREE | dict(options=dict(num_leaves=2)),
  "a_star": TREE,
  "depth_first": TREE,
  "speculative_rejection": dict(
    num_expansions=20,
    options=dict(num_rows=4, num_starts=8, rejection_rate=0.25),
  ),
}
# The most tokens of one candidate, and what a problem may spend.
MOST = {"step": LENGTHS.step_tokens, "segment": LENGTHS.step_tokens}
MOST |= {"token": 1, "solution": SOLUTION}
BUDGET = {"step": 20, "segment": 20, "token": 11, "solution": 34}


def strategy_of(case):
  return CASES[case].get("strategy", case.split("-")[0])


def all_cells():
  """Every case with every granularity that it has."""
  cells = []
  for case in CASES:
    strategy = strategy_of(case)
    if strategy in (*WHOLE, *REVISIONS):
      cells.append((case, "solution"))
      continue
    is_one_start = strategy not in ("speculative_rejection", "treebon")
    blocks = CASES[case].get("options", {})
    expands_once = not {"max_blocks", "num_root_blocks"} & set(blocks)
    for granularity in GRANULARITIES:
      if granularity != "token" or (is_one_start and expands_once):
        cells.append((case, granularity))
  return cells


# Programs of others, or nearly so.
SLOW = ("majority_vote", "mcts", "mcts-uct", "beam", "breadth_first")
SLOW += ("a_star", "depth_first")
SLOW_ON_EIGHT = (*SLOW, "greedy", "mctsr", "mcts-rollouts", "dvts", "treebon")
SLOW_ON_EIGHT += ("reroot", "best_first", "best_of_n")


def every_cell(slow):
  """Of each case that is not slow one granularity, taking turns, is quick."""

  def is_quick(case, granularity):
    own = [g for c, g in all_cells() if c == case]
    turn = list(CASES).index(case) % len(own)
    return case not in slow and granularity == own[turn]

  return pytest.mark.parametrize(
    "cell",
    [
      pytest.param(
        cell,
        id="-".join(cell),
        marks=[] if is_quick(*cell) else pytest.mark.slow,
      )
      for cell in all_cells()
    ],
    # All tests of a cell follow each other, so that one search is kept.
    scope="module",
  )


class Meter:
  """Tokens that a network was given, by problem, as its calls count them.

  `written` are those appended behind a context: generated ones. `read` are the
  others.
  """

  def __init__(self):
    self.counts = collections.defaultdict(lambda: np.zeros(BATCH, np.int64))

  def start(self):
    self.counts.clear()

  def add(self, kind, is_token):
    # Whatever rows a problem has, they follow each other.
    self.counts[kind] += np.asarray(is_token).reshape(BATCH, -1).sum(1)

  def policy(self, counts):
    """`tiny_policy`, which never draws a pad; its network counts here."""
    policy = tiny_policy()
    plain, pad = policy.network, policy.tokenizer.pad_id
    never = np.zeros((1, policy.tokenizer.vocab_size), np.float32)
    never[0, pad] = -1e9

    def apply(params, tokens, positions, cache=None, **more):
      kind = "read" if cache is None else "written"
      if counts:
        jax.debug.callback(functools.partial(self.add, kind), tokens != pad)
      return plain.apply(params, tokens, positions, cache, **more)

    def policy_logits(params, hidden):
      logits = plain.policy_logits(params, hidden)
      return logits + never.reshape((1,) * (hidden.ndim - 1) + (-1,))

    network = plain._replace(apply=apply, policy_logits=policy_logits)
    return dataclasses.replace(policy, network=network)


METER = Meter()


def takes_sums(case):
  """Whether scores may be sums of log-probs, below any outcome."""
  return case not in ("mctsr", "mcts-rollouts")


def guidance_of(case):
  """Two scores at once."""
  other = "log_prob" if takes_sums(case) else "mean_prob"
  return {"value": 0.5, other: 0.5}


def make_solver(cell, num_devices, memory):
  case, granularity = cell
  strategy = strategy_of(case)
  options = dict(CASES[case])
  options.pop("strategy", None)
  more = dict(options.pop("options", {}))
  if strategy != "greedy":
    more["max_tokens"] = budget_of(cell)
  return Solver(
    METER.policy(counts=num_devices == 1),
    strategy=strategy,
    batch_size=BATCH,
    mesh=mesh_lib.make_mesh({"data": num_devices}),
    task=TASK,
    guidance=guidance_of(case),
    granularity="step" if granularity == "solution" else granularity,
    num_revisions=NUM_REVISIONS,
    memory=memory,
    options=more,
    **options,
  )


def most_tokens(cell):
  """The most that one candidate may cost."""
  case, granularity = cell
  if strategy_of(case) not in REVISIONS:
    most = MOST[granularity]
    num_later = SOLUTION // most - 1
    num_rollouts = CASES[case].get("num_rollouts", 0)
    return most * (1 + num_rollouts * num_later)
  mark = tiny_policy().tokenizer.encode(f"\n{TASK.revision_mark}")
  return len(mark) + LENGTHS.step_tokens * (LENGTHS.num_steps + 1)


def budget_of(cell):
  """What a search without it would not keep to."""
  case, granularity = cell
  if strategy_of(case) in REVISIONS:
    return 3 * most_tokens(cell) + most_tokens(cell) // 2
  if case == "mcts-rollouts":
    return most_tokens(cell) + MOST[granularity]
  return BUDGET[granularity]


@functools.lru_cache(maxsize=1)
def solver(cell):
  return make_solver(cell, 1, "tree")


@functools.lru_cache(maxsize=1)
def searched(cell):
  """The search of one batch on one device, and what its network counted."""
  METER.start()
  found = solver(cell)(tiny_params(), jax.random.key(KEY), PROBLEMS)
  jax.effects_barrier()
  return found, {kind: METER.counts[kind].copy() for kind in METER.counts}


@every_cell(SLOW)
def test_the_calls_of_the_network_are_the_cost_and_keep_to_the_budget(cell):
  found, counts = searched(cell)
  for i, one in enumerate(found):
    written, read = int(counts["written"][i]), int(counts["read"][i])
    assert read == len(tiny_policy().tokenizer.encode(one.problem.prompt))
    assert one.cost["generated_tokens"] == written
    assert one.cost["forward_tokens"] == written + read
  if cell[0] != "greedy":
    most = max(counts["written"])
    # Some problem wanted more than it could pay for.
    assert budget_of(cell) - most_tokens(cell) < most <= budget_of(cell)


@every_cell(SLOW)
def test_the_same_key_gives_the_same_in_any_row(cell):
  found, _ = searched(cell)
  key = jax.random.key(KEY)
  again = solver(cell)(tiny_params(), key, PROBLEMS)
  turned = solver(cell)(tiny_params(), key, PROBLEMS[::-1])[::-1]
  for one, other, third in zip(found, again, turned, strict=True):
    assert_same(one, other, 0)
    # The place of a row in a vector may show in the last bit.
    assert_same(one, third, 1e-5)


@every_cell(SLOW_ON_EIGHT)
def test_eight_devices_with_one_problem_each_are_one_with_all(cell):
  """The other memory too: all that is recomputed is what was kept."""
  found, _ = searched(cell)
  others = make_solver(cell, NUM_DEVICES, "tokens")
  others = others(tiny_params(), jax.random.key(KEY), PROBLEMS)
  for one, other in zip(found, others, strict=True):
    # Reading a context again is paid for.
    assert one.cost["forward_tokens"] <= other.cost["forward_tokens"]
    cost = other.cost | {"forward_tokens": one.cost["forward_tokens"]}
    assert_same(one, dataclasses.replace(other, cost=cost), 1e-5)


def assert_same(one, other, tolerance):
  """Node for node; floats within the tolerance, everything else exactly."""
  assert one.problem == other.problem and one.cost == other.cost
  assert one.nodes["texts"] == other.nodes["texts"]
  for name in one.nodes.keys() - {"texts"}:
    left, right = one.nodes[name], other.nodes[name]
    if np.issubdtype(left.dtype, np.floating):
      np.testing.assert_allclose(left, right, atol=tolerance, err_msg=name)
    else:
      np.testing.assert_array_equal(left, right, err_msg=name)
  assert answer_of(one) == answer_of(other)


def answer_of(one):
  """Equal texts have equal scores but for the last bit."""
  return None if one.selected is None else one.solutions[one.selected].text


@jax.jit
def full_forward(params, tokens):
  """Log-probs `[T, V]` and values `[T]` of one whole text, without a cache."""
  network = METER.policy(counts=False).network
  positions = jnp.arange(tokens.shape[0])[None]
  hidden, _ = network.apply(params, tokens[None], positions)
  logits = network.policy_logits(params, hidden)
  return jax.nn.log_softmax(logits)[0], network.value(params, hidden)[0]


def read_anew(context, tokens):
  """Log-prob of each of `tokens` behind a text, and the value at the end."""
  padded = np.zeros(128, np.int32)
  whole = [*context, *tokens]
  padded[: len(whole)] = whole
  log_probs, values = jax.device_get(full_forward(tiny_params(), padded))
  at = np.arange(len(context), len(whole))
  return log_probs[at - 1, padded[at]], float(values[len(whole) - 1])


def score_of_text(cell, one, solution):
  """The guidance's score of a solution, from its tokens alone."""
  policy, nodes = tiny_policy(), one.nodes
  steps = [nodes["tokens"][n, : nodes["lengths"][n]] for n in solution.path]
  if strategy_of(cell[0]) not in REVISIONS:
    # One text, wherever its steps end.
    steps = [np.concatenate(steps)]
  context = policy.tokenizer.encode(one.problem.prompt)
  num_given = len(policy.tokenizer.encode(f"\n{TASK.revision_mark}"))
  total, num_written = 0.0, 0
  for i, step in enumerate(map(np.ndarray.tolist, steps)):
    # The mark of a revision is given; an answer loses its end before it.
    log_probs, value = read_anew(context, step)
    written = log_probs[num_given if i else 0 :]
    total, num_written = total + written.sum(), num_written + len(written)
    context = [*context, *step[:-1]]
  other = max(total, -100.0)
  if not takes_sums(cell[0]):
    other = np.exp(total / num_written)
  return 0.5 * value + 0.5 * other


@every_cell(SLOW)
def test_the_score_of_an_answer_is_that_of_its_text_read_anew(cell):
  found, _ = searched(cell)
  least = -50.0 if takes_sums(cell[0]) else 0.0
  for one in found:
    for solution in one.solutions:
      if not solution.is_finished:
        assert solution.outcome == least
        continue
      expected = score_of_text(cell, one, solution)
      assert solution.outcome == pytest.approx(expected, abs=2e-5)
      text = "".join(one.nodes["texts"][n] for n in solution.path)
      assert text.endswith(solution.text)
    is_finished = any(s.is_finished for s in one.solutions)
    # An answer that nobody can read does not vote.
    if cell[0] != "majority_vote":
      assert is_finished == (one.selected is not None)
  # The likeliest tokens may not hold the end.
  if cell[1] != "token":
    assert sum(one.selected is not None for one in found) > 1
  if strategy_of(cell[0]) in REVISIONS:
    depths = [len(s.path) for one in found for s in one.solutions]
    assert max(depths) > 1


def test_no_strategy_is_left_out():
  assert {strategy_of(case) for case in CASES} == set(STRATEGIES)
