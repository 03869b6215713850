"""Every strategy through one battery; the readings against plain Python."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax import jsonl
from o1jax import mesh as mesh_lib
from o1jax import searched as searched_lib
from o1jax.search import ROOT
from o1jax.searched import step_weights, tree_record
from o1jax.solver import Solver
from policies import ToyTask, tiny_params, tiny_policy

pytestmark = pytest.mark.usefixtures("quick_programs")

N, A, EXPANSIONS, ROLLOUTS, BATCH = 6, 3, 6, 2, 8
TASK = ToyTask(num_numbers=3, min_number=1, max_number=9)
PROBLEMS = TASK.sample_problems(np.random.default_rng(0), BATCH + 2)
TREE = dict(
  num_candidates=A, num_expansions=EXPANSIONS, num_simulations=EXPANSIONS * A
)
CASES = {
  "mcts-value": dict(strategy="mcts", **TREE),
  "mcts-checker": dict(
    strategy="mcts",
    reward="checker",
    num_rollouts=ROLLOUTS,
    rollout_weight=1.0,
    **TREE,
  ),
  "best_of_n-value": dict(strategy="best_of_n", num_candidates=N),
  "best_of_n-checker": dict(
    strategy="best_of_n", num_candidates=N, reward="checker"
  ),
  "majority_vote": dict(strategy="majority_vote", num_candidates=N),
  "greedy": dict(strategy="greedy"),
}


def make_solver(num_devices=2, **options):
  defaults = dict(batch_size=BATCH, task=TASK)
  mesh = mesh_lib.make_mesh({"data": num_devices})
  return Solver(tiny_policy(), mesh=mesh, **defaults | options)


@functools.cache
def solver(case):
  return make_solver(**CASES[case])


@functools.cache
def searched(case):
  # Two more problems than a batch holds.
  return solver(case)(tiny_params(), jax.random.key(3), PROBLEMS)


SLOW = {"best_of_n-checker"}
EVERY_CASE = [
  pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case
  for case in CASES
]
every_case = pytest.mark.parametrize("case", EVERY_CASE)


def assert_same(one, other, tolerance):
  """Node for node; floats within the tolerance, everything else exactly."""
  assert one.problem == other.problem and one.cost == other.cost
  assert one.nodes.keys() == other.nodes.keys()
  for name, left in one.nodes.items():
    right = other.nodes[name]
    if name == "texts":
      assert left == right
    elif np.issubdtype(left.dtype, np.floating):
      np.testing.assert_allclose(left, right, atol=tolerance, err_msg=name)
    else:
      np.testing.assert_array_equal(left, right, err_msg=name)
  # Equal texts have equal values but for the last bit.
  answers = [
    None if x.selected is None else x.solutions[x.selected].text
    for x in (one, other)
  ]
  assert answers[0] == answers[1]


def children(nodes, node):
  return np.flatnonzero(nodes["is_valid"] & (nodes["parent"] == node))


@every_case
def test_the_same_key_gives_the_same_search(case):
  # Again, with the memory of verdicts; then in other rows of other batches.
  again = solver(case)(tiny_params(), jax.random.key(3), PROBLEMS)
  turned = solver(case)(tiny_params(), jax.random.key(3), PROBLEMS[::-1])
  for one, other, third in zip(
    searched(case), again, turned[::-1], strict=True
  ):
    assert_same(one, other, 0)
    # The place of a row in a vector may show in the last bit.
    assert_same(one, third, 1e-5)
  if case != "greedy":
    other = solver(case)(tiny_params(), jax.random.key(4), PROBLEMS[:BATCH])
    texts = [[s.text for s in one.solutions] for one in other]
    assert texts != [[s.text for s in one.solutions] for one in searched(case)]


@every_case
def test_solutions_are_the_paths_of_the_tree(case):
  policy, num_found = tiny_policy(), 0
  for one, problem in zip(searched(case), PROBLEMS, strict=True):
    nodes = one.nodes
    assert one.problem == problem
    ends = np.flatnonzero(nodes["is_terminal"] & nodes["is_valid"])
    assert [s.node for s in one.solutions] == ends.tolist()
    for solution in one.solutions:
      path = [solution.node]
      while nodes["parent"][path[0]] != ROOT:
        path.insert(0, int(nodes["parent"][path[0]]))
      assert list(solution.path) == path
      steps = [(n, int(nodes["lengths"][n])) for n in path]
      for name in ("tokens", "behavior_log_probs", "policy_log_probs"):
        expected = np.concatenate([nodes[name][n, :size] for n, size in steps])
        np.testing.assert_array_equal(getattr(solution, name), expected)
      assert solution.text == policy.tokenizer.decode(solution.tokens.tolist())
      has_end = solution.tokens[-1] == policy.tokenizer.eos_id
      assert solution.is_finished == has_end
      assert solution.num_visits == nodes["num_visits"][solution.node]
      num_found += has_end
  assert num_found >= len(PROBLEMS) / 2


@every_case
def test_the_selected_solution_has_the_best_outcome(case):
  if case == "majority_vote":
    return  # It votes: see below.
  for one in searched(case):
    outcomes = [s.outcome for s in one.solutions if s.is_finished]
    if not outcomes:
      assert one.selected is None
      continue
    chosen = one.solutions[one.selected]
    assert chosen.outcome == max(outcomes)
    assert all(s.outcome == 0 for s in one.solutions if not s.is_finished)


def test_majority_vote_is_a_count_by_hand():
  winners = set()
  for one in searched("majority_vote"):
    ballots = [
      TASK.check(one.problem, s.text).answer if s.is_finished else None
      for s in one.solutions
    ]
    voting = [answer for answer in ballots if answer is not None]
    if not voting:
      assert one.selected is None
      continue
    counts = {answer: voting.count(answer) for answer in voting}
    most = [a for a in counts if counts[a] == max(counts.values())]
    assert one.selected == ballots.index(most[0])
    winners.add(one.selected)
    # Votes count each candidate, equal texts too.
    assert len(one.solutions) == N
  assert len(winners) > 1


@pytest.mark.parametrize(
  "case",
  ["mcts-checker", pytest.param("best_of_n-checker", marks=pytest.mark.slow)],
)
def test_the_checker_is_the_reward_and_is_counted(case):
  outcomes = set()
  for one in searched(case):
    finished = [s for s in one.solutions if s.is_finished]
    for solution in finished:
      verdict = TASK.check(one.problem, solution.text)
      assert solution.outcome == float(verdict.is_correct)
      outcomes.add(solution.outcome)
    if case == "best_of_n-checker":
      assert counted(one) == asked_of([s.text for s in finished])
  assert outcomes == {0.0, 1.0}


def counted(one):
  return one.cost["verifier_requests"], one.cost["verifier_distinct"]


def asked_of(texts):
  return len(texts), len(set(texts))


def test_oracle_stopping_ends_with_the_first_right_solution():
  search = make_solver(
    strategy="best_of_n",
    num_candidates=1,
    reward="checker",
    options={"num_rounds": N, "stop_threshold": 1.0},
  )
  counts = []
  for one in search(tiny_params(), jax.random.key(3), PROBLEMS[:BATCH]):
    *before, last = [
      s.is_finished and TASK.check(one.problem, s.text).is_correct
      for s in one.solutions
    ]
    counts.append(1 + len(before))
    assert not any(before) and (last or counts[-1] == N)
    if last:
      assert one.selected == len(before)
    tokens = sum(len(s.tokens) for s in one.solutions)
    assert one.cost["generated_tokens"] == tokens
    finished = [s.text for s in one.solutions if s.is_finished]
    assert counted(one) == asked_of(finished)
  assert len(set(counts)) > 2


def test_rollouts_that_end_are_asked_for(monkeypatch):
  fields = (*searched_lib.STORE_FIELDS, "rollout_tokens")
  monkeypatch.setattr(searched_lib, "STORE_FIELDS", fields)
  tokenizer, num_cut = tiny_policy().tokenizer, 0
  found = solver("mcts-checker")(tiny_params(), jax.random.key(3), PROBLEMS)
  for one in found:
    nodes = one.nodes
    is_open = nodes["is_valid"] & ~nodes["is_terminal"] & (nodes["depth"] > 0)
    texts = [s.text for s in one.solutions if s.is_finished]
    for node in np.flatnonzero(is_open).tolist():
      start, above = "", node
      while above != ROOT:
        start = nodes["texts"][above] + start
        above = int(nodes["parent"][above])
      for rollout in nodes["rollout_tokens"][node].tolist():
        if tokenizer.eos_id in rollout:
          texts.append(start + tokenizer.decode(rollout))
        else:
          num_cut += 1
    assert counted(one) == asked_of(texts)
  assert num_cut


def test_rollouts_are_checked_and_give_the_value():
  values = set()
  for one in searched("mcts-checker"):
    nodes = one.nodes
    visits, mean = nodes["num_visits"], nodes["mean_value"]
    is_open = nodes["is_valid"] & ~nodes["is_terminal"] & (visits > 0)
    for node in np.flatnonzero(is_open & (nodes["depth"] > 0)):
      # What the node itself added to the sum of its returns.
      below = children(nodes, node)
      returns = visits[below] * (nodes["reward"][below] + mean[below])
      values.add(round(float(visits[node] * mean[node] - returns.sum()), 4))
  assert values == {0.0, 1 / ROLLOUTS, 1.0}


@every_case
def test_costs_are_counted_from_the_tree(case):
  rolled = 0
  for one in searched(case):
    cost, nodes = one.cost, one.nodes
    written = int(nodes["lengths"].sum())
    prompt = len(tiny_policy().tokenizer.encode(one.problem.prompt))
    assert cost["forward_tokens"] == cost["generated_tokens"] + prompt
    rolled += cost["generated_tokens"] - written
    if case != "mcts-checker":
      assert cost["generated_tokens"] == written
    if "checker" not in case:
      assert cost["verifier_requests"] == cost["verifier_distinct"] == 0
    visits = nodes["num_visits"]
    below = sum(int(visits[n]) for n in children(nodes, ROOT))
    assert below == cost["simulations"]
    if "mcts" in case:
      num_expanded = len(set(nodes["parent"][nodes["lengths"] > 0].tolist()))
      assert num_expanded <= EXPANSIONS
      assert cost["simulations"] <= EXPANSIONS * A
  assert rolled or case != "mcts-checker"


@every_case
def test_steps_weigh_their_share_of_visits_once(case):
  shared = 0
  for one in searched(case):
    nodes, weights = one.nodes, step_weights(one)
    # Solutions that were cut off are not learned from and carry nothing.
    finished = [s for s in one.solutions if s.is_finished]
    assert list(weights) == [s.node for s in finished]
    carried = {}
    for solution in finished:
      spans = np.split(
        weights[solution.node],
        np.cumsum([nodes["lengths"][n] for n in solution.path])[:-1],
      )
      for node, span in zip(solution.path, spans, strict=True):
        (weight,) = set(span.tolist())
        shared += node in carried
        carried.setdefault(node, []).append(weight)
    for node, found in carried.items():
      siblings = children(nodes, nodes["parent"][node])
      visits = nodes["num_visits"]
      share = visits[node] / max(sum(int(visits[n]) for n in siblings), 1)
      # One solution carries the edge, the others weigh nothing.
      np.testing.assert_allclose(found[0], share, rtol=1e-6)
      assert not any(found[1:])
    for node in {int(nodes["parent"][n]) for n in carried}:
      of_siblings = [
        carried[n][0] for n in children(nodes, node) if n in carried
      ]
      assert sum(of_siblings) <= 1 + 1e-6
  assert shared or "mcts" not in case


@jax.jit
def full_forward(params, tokens):
  network = tiny_policy().network
  positions = jnp.arange(tokens.shape[1])[None]
  hidden, _ = network.apply(params, tokens, positions)
  return network.policy_logits(params, hidden)


def test_greedy_takes_the_likeliest_token():
  policy = tiny_policy()
  for one in searched("greedy")[:1]:
    (solution,) = one.solutions
    tokens = policy.tokenizer.encode(one.problem.prompt)
    start = len(tokens)
    tokens = np.array([*tokens, *solution.tokens.tolist()])[None]
    logits = full_forward(tiny_params(), tokens)
    likeliest = np.argmax(logits[0, start - 1 : -1], axis=-1)
    np.testing.assert_array_equal(solution.tokens, likeliest)
    np.testing.assert_array_equal(solution.behavior_log_probs, 0)


def test_with_processes_two_halves_are_one_batch():
  options = CASES["best_of_n-checker"] | dict(num_workers=1)
  with contextlib.closing(make_solver(**options)) as halves:
    assert halves._num_parts == 2
    found = halves(tiny_params(), jax.random.key(3), PROBLEMS)
  # The candidates are the same, whoever judges them.
  for one, whole in zip(found, searched("best_of_n-value"), strict=True):
    assert one.nodes["texts"] == whole.nodes["texts"]
    assert one.cost["generated_tokens"] == whole.cost["generated_tokens"]
    finished = [s for s in one.solutions if s.is_finished]
    for solution in finished:
      verdict = TASK.check(one.problem, solution.text)
      assert solution.outcome == float(verdict.is_correct)
    assert counted(one) == asked_of([s.text for s in finished])
  assert halves._verifier._pool is None


def test_the_watch_sees_what_the_first_problem_reaches():
  seen = []
  solver("mcts-checker")(
    tiny_params(), jax.random.key(3), PROBLEMS[:1], watch=seen.append
  )
  (one, *_) = searched("mcts-checker")
  nodes, expected = one.nodes, set()
  for node in np.flatnonzero(nodes["is_valid"] & (nodes["depth"] > 0)):
    path = [int(node)]
    while nodes["parent"][path[0]] != ROOT:
      path.insert(0, int(nodes["parent"][path[0]]))
    expected.add("".join(nodes["texts"][n] for n in path))
  assert {text for texts in seen for text in texts} == expected


def test_a_tree_becomes_plain_values():
  (one, *_) = searched("mcts-checker")
  marks = {s.node: s.outcome == 1 for s in one.solutions}
  record = tree_record(one, marks, 7)
  assert record["problem"] == jsonl.problem_row(one.problem)
  assert record["iteration"] == 7
  kept = np.flatnonzero(one.nodes["is_valid"])
  assert len(record["nodes"]) == len(kept)
  for row, node in zip(record["nodes"], kept.tolist(), strict=True):
    parent = int(one.nodes["parent"][node])
    expected = kept.tolist().index(parent) if node else -1
    assert row["parent"] == expected
    assert row["text"] == one.nodes["texts"][node].removesuffix("\n")
    assert row["num_visits"] == one.nodes["num_visits"][node]
    assert row["reward"] == one.nodes["reward"][node]
    assert row["value"] == row["reward"] + one.nodes["mean_value"][node]
    assert row["is_terminal"] == one.nodes["is_terminal"][node]
    assert row["is_correct"] == marks.get(node)
  by_parent = {}
  for row in record["nodes"][1:]:
    by_parent.setdefault(row["parent"], []).append(row["prior"])
  assert by_parent
  for priors in by_parent.values():
    np.testing.assert_allclose(sum(priors), 1, atol=1e-5)


@pytest.mark.parametrize(
  "options, words",
  [
    ({"strategy": "mtcs"}, "strategy='mtcs': choose one of mcts, best_of_n"),
    ({"reward": "oracle"}, "reward='oracle': choose one of checker, value"),
    ({"rollout_weight": 0.5}, "num_rollouts=0 and rollout_weight=0.5"),
    ({"num_rollouts": 2}, "num_rollouts=2 and rollout_weight=0.0"),
    ({"discount": 0.0}, "discount=0.0"),
    ({"rule_options": {"exploration": 1.0}}, "unknown option of selection"),
    ({"batch_size": 3}, "batch_size=3 does not divide over 2 devices"),
    ({"rule": "puctt"}, "puctt"),
    ({"select_by": "value"}, "unknown select_by 'value'"),
    ({"memory": "disk"}, "memory='disk'"),
    ({"num_candidates": 0}, "num_candidates=0"),
    ({"num_simulations": 0}, "num_simulations=0"),
    ({"num_expansions": 0}, "capacity"),
    ({"num_parallel_leaves": 0}, "num_parallel_leaves=0"),
    ({"temperature": -1.0}, "temperature=-1.0"),
    ({"top_p": 0.0}, "top_p=0.0"),
    ({"num_workers": -1, "reward": "checker"}, "num_workers=-1"),
    ({"granularity": "word"}, "granularity='word': choose one of step"),
    ({"guidance": {"value": 0.0}}, "guidance has no weight above 0"),
    ({"options": {"max_block": 2}}, "did you mean 'max_blocks'"),
    ({"options": {"max_blocks": 1.5}}, "'max_blocks' .* is 1.5: it takes int"),
    ({"options": {"max_tokens": "9"}}, "'max_tokens' .* takes int | None"),
    ({"options": {"max_tokens": 2}}, "max_tokens=2 does not pay"),
    (
      {"granularity": "token", "options": {"max_blocks": 2}},
      "granularity='token': max_blocks=2",
    ),
    (
      {"granularity": "token", "strategy": "treebon"},
      "granularity='token': strategy='treebon'",
    ),
    (
      {"strategy": "beam", "num_rollouts": 1, "rollout_weight": 1.0},
      "strategy='beam' does not read rollouts",
    ),
    (
      {"strategy": "beam", "num_rollouts": 1},
      "num_rollouts=1 and .* are for guidance.self_consistency and",
    ),
    (
      {
        "strategy": "revision",
        "num_rollouts": 2,
        "guidance": {"semantic_entropy": 1.0, "value": 1.0},
      },
      "num_rollouts=2: the candidates of strategy='revision' are whole",
    ),
    (
      {"guidance": {"semantic_entropy": 1.0, "value": 1.0}},
      "guidance.semantic_entropy with num_rollouts=0",
    ),
    (
      {"guidance": {"semantic_entropy": 1.0}, "num_rollouts": 2},
      "guidance.semantic_entropy says nothing of finished solutions",
    ),
    (
      {"guidance": {"self_consistency": 1.0}},
      "guidance.self_consistency says nothing of unfinished solutions",
    ),
    ({"guidance": {"heuristics": 1.0}}, "did you mean 'heuristic'"),
    ({"strategy": "beam"}, "strategy 'beam' needs the option 'width'"),
    (
      {"guidance": {"log_prob": 1.0}, "reward": "checker"},
      "guidance.log_prob with reward='checker'",
    ),
    (
      {"guidance": {"log_prob": 1.0}, "strategy": "mctsr"},
      "guidance.log_prob with strategy='mctsr'",
    ),
    ({"strategy": "revision", "num_revisions": -1}, "num_revisions=-1"),
    ({"options": {"stop_patience": 0}}, "stop_patience=0: give at least 1"),
    (
      {"strategy": "best_of_n", "options": {"stop_patience": 9}},
      "best_of_n expands once and has nothing to stop",
    ),
    (
      {
        "strategy": "majority_vote",
        "options": {"num_rounds": 2, "stop_threshold": 0.5},
      },
      "stop_threshold=0.5: strategy='majority_vote' answers by counting",
    ),
    (
      {"answer_by": "vote", "options": {"stop_patience": 9}},
      "stop_patience=9: answer_by='vote' .* set answer_by to search, score or",
    ),
  ],
)
def test_bad_fields_are_refused(options, words):
  with pytest.raises(ValueError, match=words):
    make_solver(**dict(strategy="mcts") | options)


@pytest.mark.slow
def test_options_of_the_search_reach_it():
  tree = CASES["mcts-value"]
  noisy = dict(rule_options={"dirichlet_fraction": 0.5})
  for options in (noisy, dict(discount=0.5)):
    found = make_solver(**tree, **options)(
      tiny_params(), jax.random.key(3), PROBLEMS[:BATCH]
    )
    visits = [one.nodes["num_visits"].tolist() for one in found]
    plain = [one.nodes["num_visits"].tolist() for one in searched("mcts-value")]
    assert visits != plain[:BATCH]
