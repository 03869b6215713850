"""Random legal play against the exact game: rules, law, texts, solvability."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax import legal_play
from o1jax.search.contracts import Request
from o1jax.search.driver import run_on_device
from o1jax.search.strategies import make_strategy
from o1jax.tasks import make_task, numbers_game

pytestmark = pytest.mark.usefixtures("quick_programs")

RULES = (False, True)
# Equal numbers, zero as a result, fractions, no solution by whole numbers.
GAMES = ((3, 8, 3, 8), (1, 5, 5, 5), (6, 6, 6, 6), (1, 3, 4, 6), (2, 2, 7, 13))


def as_state(numbers):
  """Exact numbers as arrays."""
  k = len(GAMES[0])
  parts = [Fraction(n) for n in numbers]
  pad = k - len(parts)
  return legal_play.State(
    jnp.array([p.numerator for p in parts] + [0] * pad, jnp.int32),
    jnp.array([p.denominator for p in parts] + [1] * pad, jnp.int32),
    jnp.int32(len(parts)),
  )


def as_numbers(state):
  """Arrays as exact numbers in normal form."""
  left = int(state.left)
  pairs = zip(state.num[:left].tolist(), state.den[:left].tolist(), strict=True)
  exact = [Fraction(*pair) for pair in pairs]
  return tuple(int(f) if f.denominator == 1 else f for f in exact)


@pytest.fixture(scope="module")
def transitions():
  """Legal masks and the states after every choice, compiled once."""
  choices = legal_play.make_choices(4)
  index = jnp.arange(len(choices.op))

  def of_rule(integers_only):
    def all_steps(state):
      results = legal_play.combine(choices, state, integers_only)
      after = jax.vmap(lambda c: legal_play.take(choices, state, results, c))(
        index
      )
      near = legal_play.nearness(choices, state, 24, integers_only)
      return results.is_legal, after, legal_play.step_ids(choices, state), near

    return jax.jit(all_steps)

  return {rule: of_rule(rule) for rule in RULES}


@pytest.mark.parametrize("integers_only", RULES)
@pytest.mark.parametrize("numbers", GAMES)
def test_steps_are_those_of_the_game(transitions, numbers, integers_only):
  rng = np.random.default_rng(sum(numbers))
  while True:
    expected = list(numbers_game.legal_steps(numbers, integers_only))
    is_legal, after, ids, near = jax.device_get(
      transitions[integers_only](as_state(numbers))
    )
    found = [
      as_numbers(jax.tree.map(lambda x, c=c: x[c], after))
      for c in np.flatnonzero(is_legal)
    ]
    assert found == [left for *_, left in expected]
    # Ids are equal where the written step is, operands of sums in one order.
    written = [
      (op, *((max(a, b), min(a, b)) if op in "+*" else (a, b)))
      for a, op, b, _, _ in expected
    ]
    ids = ids[is_legal]
    for i, j in itertools.combinations(range(len(ids)), 2):
      assert (ids[i] == ids[j]) == (written[i] == written[j])
    expected_near = numbers_game.nearness(numbers, 24, integers_only)
    assert near == pytest.approx(expected_near, rel=1e-6)
    if len(numbers) == 1:
      return
    numbers = found[rng.integers(len(found))]


def games(task, texts):
  return [task.parse(text) for text in texts]


def searched(task, problems, strategy, model, **options):
  """Final nodes and tree of a search over these games."""
  k = len(problems[0].data["numbers"])
  world = legal_play.make_play_model(
    k, integers_only=task.integers_only, **model
  )
  search = run_on_device(make_strategy(strategy, world, **options))
  seeds = np.arange(len(problems))
  batch = legal_play.encode_games(problems, seeds)
  state = search(None, jax.random.key(1), batch)
  return jax.device_get((state.node_state, state.tree, state.cost))


def texts_of(problem, nodes, row):
  """Checked texts of one tree in their order, each with its verdict."""
  at = nodes.is_checked[row]
  numbers = problem.data["numbers"]
  return [
    (legal_play.play_text(numbers, play), right)
    for play, right in zip(
      nodes.play[row][at], nodes.is_right[row][at], strict=True
    )
  ]


def all_texts(numbers):
  """Every text of legal play, by the game itself."""
  if len(numbers) == 1:
    return {""}
  found = set()
  for a, op, b, result, left in numbers_game.legal_steps(numbers):
    if op in "+*":
      a, b = max(a, b), min(a, b)
    line = numbers_game.step_text(a, op, b, result, sorted(left))
    found |= {f"{line}\n{rest}".strip("\n") for rest in all_texts(left)}
  return found


def test_a_whole_tree_holds_every_text_once_and_solves_what_can_be():
  task = make_task("countdown", num_numbers=3)
  problems = [
    task.make_problem([int(n) for n in text.split()], target)
    for text in ("3 7 2", "5 5 5", "1 1 6", "6 4 13")
    for target in (13, 24, 25)
  ]
  nodes, tree, cost = searched(
    task,
    problems,
    "depth_first",
    dict(num_candidates=18, rolls_out=False),
    num_expansions=20,
  )
  solved = []
  for row, problem in enumerate(problems):
    texts = texts_of(problem, nodes, row)
    written = [text for text, _ in texts]
    numbers = tuple(problem.data["numbers"])
    assert len(set(written)) == len(written) == cost.generated_tokens[row]
    assert set(written) == all_texts(numbers)
    for text, is_right in texts:
      assert task.check(problem, text).is_correct == is_right
    solved.append(any(is_right for _, is_right in texts))
    assert solved[-1] == task.can_reach(problem)
  assert 0 < sum(solved) < len(solved)
  # A right play is rewarded where it ends.
  assert (tree.reward[nodes.is_right] == 1).all()
  assert tree.reward.sum() == nodes.is_right.sum()


def test_whole_plays_follow_the_uniform_law():
  task = make_task("game24")
  problems = games(task, ("4 4 6 8", "1 2 3 4"))
  count = 2000
  model = legal_play.make_play_model(4, num_candidates=count, are_whole=True)
  batch = legal_play.encode_games(problems, [0, 1])
  _, _, nodes = model.root_fn(None, batch, 1 + count)
  request = Request(
    node=jnp.zeros((2, 1), jnp.int32),
    first_child=jnp.ones((2, 1), jnp.int32),
    num_rows=jnp.full((2, 1), count - 1, jnp.int32),
    siblings=jnp.full((2, 1, 0), -1, jnp.int32),
  )
  keys = jax.random.split(jax.random.key(3), (2, 1))
  expansion, nodes = jax.device_get(
    jax.jit(model.step_fn)(None, keys, request, nodes)
  )
  assert expansion.generated_tokens.tolist() == [count - 1] * 2
  for row, problem in enumerate(problems):
    texts = texts_of(problem, nodes, row)
    assert len(texts) == count - 1
    share = np.mean([is_right for _, is_right in texts])
    value = task.true_value(problem)
    assert share and abs(share - value) < 4 * np.sqrt(
      value * (1 - value) / count
    )
    for text, is_right in texts:
      assert task.check(problem, text).is_correct == is_right
    # Every legal first step is equally likely.
    numbers = tuple(problem.data["numbers"])
    steps = list(numbers_game.legal_steps(numbers))
    firsts = nodes.play[row][nodes.is_checked[row]][:, 0]
    _, counts = np.unique(firsts, return_counts=True)
    assert len(counts) == len(steps)
    expected = len(firsts) / len(steps)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < len(steps) + 4 * np.sqrt(2 * len(steps))


def test_steps_are_drawn_without_those_that_a_node_has():
  task = make_task("game24")
  problems = games(task, ("3 3 8 8", "1 1 4 6"))
  nodes, tree, cost = searched(
    task,
    problems,
    "mcts",
    dict(num_candidates=1),
    num_simulations=400,
    capacity=121,
    max_blocks=30,
    rule="uct",
    rollout_weight=1.0,
    max_tokens=100,
  )
  assert (cost.generated_tokens <= 100).all()
  for row, problem in enumerate(problems):
    numbers = problem.data["numbers"]
    used = np.flatnonzero(tree.is_valid[row] & (tree.depth[row] > 0))
    assert len(used) == cost.generated_tokens[row] > 60
    steps = {}
    for node in used:
      depth, play = tree.depth[row, node], nodes.play[row, node]
      assert play[depth - 1] == nodes.choice[row, node] and (play >= 0).all()
      text = legal_play.play_text(numbers, play)
      verdict = task.check(problem, text)
      assert verdict.is_correct == nodes.is_right[row, node]
      step = text.split("\n")[depth - 1]
      steps.setdefault(tree.parent[row, node], []).append(step)
    # No step twice at a node, and the root's at random.
    assert all(len(set(own)) == len(own) for own in steps.values())
    assert len(steps[0]) > 5


def test_other_problems_are_refused():
  task = make_task("countdown", num_numbers=4, max_number=999)
  large = task.make_problem([999, 2, 3, 4], 24)
  small = task.make_problem([9, 2, 3], 24)
  word = make_task("arithmetic").heldout_problems(1)
  for problems, words in (
    ([large], "4 numbers up to 999 do not fit in 32 bits"),
    ([small, task.make_problem([1, 2, 3, 4], 9)], r"games of \[3, 4\] numbers"),
    (word, "is no game of numbers"),
  ):
    with pytest.raises(ValueError, match=words):
      legal_play.encode_games(problems, [0] * len(problems))
  with pytest.raises(ValueError, match="guide='near'"):
    legal_play.make_play_model(4, num_candidates=1, guide="near")
  with pytest.raises(ValueError, match="num_candidates=0"):
    legal_play.make_play_model(4, num_candidates=0)
