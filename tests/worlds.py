"""Toy worlds small enough to draw, all as one step model over a table.

A world is a table of M states: each has A candidates, and each candidate leads
to a state. The table is the step model's `params`, so one compiled search
serves every world of the same shapes. Letters: M states, A candidates.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from o1jax.search.contracts import (
  Expansion,
  Request,
  SearchState,
  StepModel,
  Strategy,
)
from o1jax.search.driver import run_on_device
from o1jax.search.strategies import make_strategy
from o1jax.search.tree import NO_NODE, read, write
from o1jax.types import ProblemBatch

TOKENS_PER_STEP = 3


@dataclasses.dataclass(frozen=True)
class World:
  """A table of states as NumPy arrays.

  Attributes:
    root_value: `[M]` value of a state as a root.
    child: `[M, A]` state after each candidate; not read if terminal.
    prior_logits: `[M, A]`.
    value: `[M, A]` after the candidate.
    outcome: `[M, A]` of the finished solution or of a rollout.
    is_terminal: `[M, A]`.
    is_valid: `[M, A]`.
  """

  root_value: np.ndarray
  child: np.ndarray
  prior_logits: np.ndarray
  value: np.ndarray
  outcome: np.ndarray
  is_terminal: np.ndarray
  is_valid: np.ndarray

  @property
  def params(self) -> dict[str, Any]:
    """The table as arrays of jax's current precision."""
    return {
      field.name: jnp.asarray(getattr(self, field.name))
      for field in dataclasses.fields(self)
    }


def problems(roots, seeds=None) -> ProblemBatch:
  """Problems that start at the given states `[B]` of a world."""
  roots = np.asarray(roots, np.int32)
  seeds = roots * 7919 + 13 if seeds is None else seeds
  return ProblemBatch(
    tokens=jnp.asarray(roots[:, None]),
    lengths=jnp.ones(roots.shape, jnp.int32),
    seeds=jnp.asarray(np.asarray(seeds, np.uint32)),
  )


def first_rows(request: Request, num_candidates: int) -> jax.Array:
  """True `[B, W, A]` for the candidates that are to be drawn."""
  index = jnp.arange(num_candidates)[None, None]
  return index < request.num_rows[:, :, None]


def num_earlier(request: Request) -> jax.Array:
  """How often each node stands to its left in the same call, `[B, W, 1]`."""
  is_same = request.node[:, :, None] == request.node[:, None, :]
  is_same &= (request.num_rows > 0)[:, None, :]
  index = jnp.arange(request.node.shape[1])
  is_left = (index[:, None] > index[None, :])[None]
  return jnp.sum(is_same & is_left, axis=-1, keepdims=True, dtype=jnp.int32)


def table_model(num_candidates: int) -> StepModel:
  """The step model of any world with that many candidates.

  Where a world has more, each further expansion of a node shows the next ones.
  The node state is the table's state of each node `[B, N]`, -1 where unused,
  and the number of calls so far `[B]`.
  """

  def root_fn(params, problems, capacity):
    root = problems.tokens[:, 0]
    state = jnp.full((root.shape[0], capacity), -1, jnp.int32)
    return (
      params["root_value"][root],
      problems.lengths,
      (state.at[:, 0].set(root), jnp.zeros_like(root)),
    )

  def step_fn(params, keys, request, node_state):
    del keys
    states, num_calls = node_state
    state = read(states, request.node)
    is_drawn = first_rows(request, num_candidates)
    num_old = jnp.sum(request.siblings != NO_NODE, axis=-1, keepdims=True)
    num_old += num_candidates * num_earlier(request)
    shown = num_old + jnp.arange(num_candidates)[None, None]

    def look_up(field):
      return jnp.take_along_axis(params[field][state], shown, axis=-1)

    child = (
      request.first_child[:, :, None]
      + jnp.arange(num_candidates, dtype=jnp.int32)[None, None]
    )
    flat = (state.shape[0], -1)
    states = write(states, child.reshape(flat), look_up("child").reshape(flat))
    tokens = TOKENS_PER_STEP * jnp.sum(
      look_up("is_valid") & is_drawn,
      axis=(1, 2),
      dtype=jnp.int32,
    )
    fields = ("prior_logits", "is_terminal", "value", "outcome")
    return (
      Expansion(
        **{field: look_up(field) for field in fields},
        is_valid=look_up("is_valid") & is_drawn,
        is_solution=look_up("is_terminal"),
        generated_tokens=tokens,
        forward_tokens=tokens,
      ),
      (states, num_calls + 1),
    )

  return StepModel(num_candidates, root_fn, step_fn, TOKENS_PER_STEP)


def random_graph(
  seed: int,
  *,
  num_states: int = 40,
  num_candidates: int = 4,
  terminal_rate: float = 0.0,
  invalid_rate: float = 0.0,
) -> World:
  """States that lead to random states: an endless tree, drawn from a seed."""
  rng = np.random.default_rng(seed)
  shape = (num_states, num_candidates)
  return World(
    root_value=rng.uniform(size=num_states),
    child=rng.integers(num_states, size=shape, dtype=np.int32),
    prior_logits=rng.normal(size=shape) * 1.5,
    value=rng.uniform(size=shape),
    outcome=rng.uniform(size=shape),
    is_terminal=rng.uniform(size=shape) < terminal_rate,
    is_valid=rng.uniform(size=shape) >= invalid_rate,
  )


def drawn_tree() -> World:
  r"""Two candidates everywhere; values and outcomes written at the nodes.

          0
         / \
     .6 1   2 .5         the prior prefers 1 at the root (3 : 1)
       / \ / \
      T  T T  dead       outcomes: .2, .4, 1.0; state 3 has no candidates
  """
  log3 = np.log(3.0)
  no = np.zeros((4, 2))
  return World(
    root_value=np.array([0.5, 0.6, 0.5, 0.1]),
    child=np.array([[1, 2], [0, 0], [0, 3], [0, 0]], np.int32),
    prior_logits=np.array([[log3, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]),
    value=no + np.array([[0.6, 0.5], [0, 0], [0, 0.1], [0, 0]]),
    outcome=no + np.array([[0, 0], [0.2, 0.4], [1.0, 0], [0, 0]]),
    is_terminal=np.array(
      [[False, False], [True, True], [True, False], [False, False]]
    ),
    is_valid=np.array([[True, True], [True, True], [True, True], [False] * 2]),
  )


def world_of_tree(tree: dict, value: float = 0.5) -> World:
  """A drawn tree as a table; its root is state 0.

  Args:
    tree: name of a node to its candidates, the root first, all of one number;
      a candidate is `(prior, name, value)`, or `(prior, None, outcome)` where
      it finishes.
    value: of the root.
  """
  index = {name: i for i, name in enumerate(tree)}
  rows = list(tree.values())
  named = [[index.get(name, 0) for _, name, _ in row] for row in rows]
  is_terminal = np.array([[name is None for _, name, _ in row] for row in rows])
  score = np.array([[score for *_, score in row] for row in rows])
  return World(
    root_value=np.full(len(rows), value),
    child=np.array(named, np.int32),
    prior_logits=np.log([[prior for prior, *_ in row] for row in rows]),
    value=np.where(is_terminal, 0.0, score),
    outcome=np.where(is_terminal, score, 0.0),
    is_terminal=is_terminal,
    is_valid=np.ones(is_terminal.shape, bool),
  )


def signpost() -> World:
  r"""The policy walks left, the values point right; one leaf is worth 1.

            o                prior 4 : 1 to the left everywhere
        .3 / \ .5
          a   b              values at the nodes, outcomes at the leaves
         .3/ \.2  .3/ \.7
         c   d     e   f
        /|   |\    |\  |\
       .2 .2 .2 .2  .2 .2 .3 1

  A search that follows the values needs 6 candidates. A policy that does not
  look draws the best leaf once in 125 solutions.
  """
  left, right = 0.8, 0.2
  bad = [(left, None, 0.2), (right, None, 0.2)]
  return world_of_tree(
    {
      "o": [(left, "a", 0.3), (right, "b", 0.5)],
      "a": [(left, "c", 0.3), (right, "d", 0.2)],
      "b": [(left, "e", 0.3), (right, "f", 0.7)],
      "c": bad,
      "d": bad,
      "e": bad,
      "f": [(left, None, 0.3), (right, None, 1.0)],
    }
  )


def garden_path() -> World:
  r"""The policy is right and the values are not, at the first step and later.

            o                prior 4 : 1 to the left everywhere
        .3 / \ .9
          a   b              values at the nodes, outcomes at the leaves
         .3/ \.4  .9/ \.9
         c   d     e   f
        /|   |\    |\  |\
        1 .5 .5 .5  0 0  0 0
  """
  left, right = 0.8, 0.2
  half = [(left, None, 0.5), (right, None, 0.5)]
  bad = [(left, None, 0.0), (right, None, 0.0)]
  return world_of_tree(
    {
      "o": [(left, "a", 0.3), (right, "b", 0.9)],
      "a": [(left, "c", 0.3), (right, "d", 0.4)],
      "b": [(left, "e", 0.9), (right, "f", 0.9)],
      "c": [(left, None, 1.0), (right, None, 0.5)],
      "d": half,
      "e": bad,
      "f": bad,
    }
  )


def detour() -> World:
  r"""The best first step leads nowhere; the second best to the solution.

            o
        .9 / \ .6
          a   b              values at the nodes, outcomes at the leaves
        .8/ \.8  .7/ \.2
         c   d     e   f
        /|   |\    |\  |\
       .1 .1 .1 .1 .9 .1 .1 .1

  A beam of one ends at .1, and so does a beam of two, which keeps c and d. Two
  beams that are kept apart find .9, and so do searches that come back.
  """
  half = 0.5
  bad = [(half, None, 0.1), (half, None, 0.1)]
  return world_of_tree(
    {
      "o": [(half, "a", 0.9), (half, "b", 0.6)],
      "a": [(half, "c", 0.8), (half, "d", 0.8)],
      "b": [(half, "e", 0.7), (half, "f", 0.2)],
      "c": bad,
      "d": bad,
      "e": [(half, None, 0.9), (half, None, 0.1)],
      "f": bad,
    }
  )


def markov_chain(seed: int, num_tokens: int = 3, length: int = 4) -> World:
  """Every text of a Markov chain, scored by its log-likelihood.

  State 0 is the empty text, the A candidates are the tokens; texts end after
  `length` tokens.
  """
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(num_tokens + 1, num_tokens))
  log_probs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
  texts = [
    text
    for size in range(length)
    for text in itertools.product(range(num_tokens), repeat=size)
  ]
  index = {text: i for i, text in enumerate(texts)}
  likelihood = {(): 0.0}
  shape = (len(texts), num_tokens)
  child, prior, score = (
    np.zeros(shape, np.int32),
    np.zeros(shape),
    np.zeros(shape),
  )
  for text, i in index.items():
    prior[i] = log_probs[text[-1] if text else num_tokens]
    score[i] = likelihood[text] + prior[i]
    for token in range(num_tokens):
      likelihood[*text, token] = score[i, token]
      child[i, token] = index.get((*text, token), 0)
  is_last = np.array([len(text) == length - 1 for text in texts])
  is_terminal = np.broadcast_to(is_last[:, None], shape)
  return World(
    root_value=np.zeros(len(texts)),
    child=child,
    prior_logits=prior,
    value=score,
    outcome=score,
    is_terminal=is_terminal,
    is_valid=np.ones(shape, bool),
  )


def arithmetic_game(games: list[tuple[tuple[int, ...], int]]) -> World:
  """Three numbers and a target, enumerated: the i-th game starts at state i.

  A step takes two numbers and puts a + b, a * b, a - b or b - a in their place
  (12 candidates at three numbers, 4 at two, the rest invalid). The outcome is
  1 on the target and falls with the distance; the value knows nothing.
  """
  states = [(numbers, target) for numbers, target in games]
  index = {state: i for i, state in enumerate(states)}
  rows = []
  position = 0
  while position < len(states):
    numbers, target = states[position]
    position += 1
    row = []
    for i, j in itertools.combinations(range(len(numbers)), 2):
      a, b = numbers[i], numbers[j]
      rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
      for result in (a + b, a * b, a - b, b - a):
        after = (tuple(sorted([*rest, result])), target)
        if rest and after not in index:
          index[after] = len(states)
          states.append(after)
        distance = abs(result - target)
        row.append((index.get(after, 0), not rest, 1 / (1 + distance)))
    rows.append(row)
  shape = (len(states), 12)
  child = np.zeros(shape, np.int32)
  is_valid = np.zeros(shape, bool)
  is_terminal = np.zeros(shape, bool)
  outcome = np.zeros(shape, np.float32)
  for i, row in enumerate(rows):
    for a, (after, is_last, score) in enumerate(row):
      child[i, a], is_valid[i, a], is_terminal[i, a] = after, True, is_last
      outcome[i, a] = score
  return World(
    root_value=np.full(shape[:1], 0.5, np.float32),
    child=child,
    prior_logits=np.zeros(shape, np.float32),
    value=np.full(shape, 0.5, np.float32),
    outcome=outcome,
    is_terminal=is_terminal,
    is_valid=is_valid,
  )


def dice_model(num_candidates: int, terminal_rate: float = 0.3) -> StepModel:
  """Candidates drawn from the expansion's key alone; there is no node state."""

  def root_fn(params, problems, capacity):
    del params, capacity
    half = jnp.full(problems.lengths.shape, 0.5)
    return half, problems.lengths, ()

  def step_fn(params, keys, request, state):
    del params
    draw = jax.vmap(
      jax.vmap(lambda key: jax.random.uniform(key, (num_candidates, 4)))
    )
    draws = draw(keys)
    tokens = jnp.sum(request.num_rows, axis=-1, dtype=jnp.int32)
    is_drawn = first_rows(request, num_candidates)
    return (
      Expansion(
        prior_logits=draws[..., 0],
        is_valid=is_drawn,
        is_terminal=draws[..., 1] < terminal_rate,
        is_solution=draws[..., 1] < terminal_rate,
        value=draws[..., 2],
        outcome=draws[..., 3],
        generated_tokens=tokens,
        forward_tokens=tokens,
      ),
      state,
    )

  return StepModel(num_candidates, root_fn, step_fn, 1)


@functools.cache
def table_search(
  num_candidates: int = 4,
  name: str = "mcts",
  rule_options: tuple[tuple[str, Any], ...] = (),
  **options,
) -> tuple[Strategy, Callable[..., SearchState]]:
  """A strategy over tables and its program, compiled once for all tests.

  Where the table has a field "root_noise" `[M, A]`, it takes the place of the
  noise that the rule drew.
  """
  if rule_options:
    options["rule_options"] = dict(rule_options)
  strategy = make_strategy(name, table_model(num_candidates), **options)

  draw_init = strategy.init

  def init(params, key, problems):
    state = draw_init(params, key, problems)
    if "root_noise" not in params:
      return state
    noise = params["root_noise"][problems.tokens[:, 0]]
    return state.replace(root_noise=noise)

  strategy = strategy._replace(init=init)
  return strategy, run_on_device(strategy)


NUM_ROOTS = 8
SIMULATIONS = 32
DISCOUNT = 0.9
ROLLOUT_WEIGHT = 0.25
NUM_CONSIDERED = 3  # of 4 candidates: then the better 2
AHEAD = {"num_parallel_leaves": 4, "capacity": 1 + 4 * 3 * SIMULATIONS}


def rule_search(rule: str, **options):
  """The program of a rule that most tests share, at `NUM_ROOTS` problems."""
  if rule == "gumbel":
    options["rule_options"] = (("num_considered_actions", NUM_CONSIDERED),)
  return table_search(
    num_simulations=SIMULATIONS,
    discount=DISCOUNT,
    rollout_weight=ROLLOUT_WEIGHT,
    rule=rule,
    **options,
  )


def with_noise(world: World, seed: int) -> dict[str, Any]:
  """The world's table with Gumbel noise for each state as a root."""
  noise = np.random.default_rng(seed).gumbel(size=world.child.shape)
  return {**world.params, "root_noise": jnp.asarray(noise)}


def chance_model(num_candidates: int, are_answers: bool = False) -> StepModel:
  """Draws each candidate from the prior of the world's state.

  A candidate costs its tokens even where it is not valid. The node state is the
  table's state of each node `[B, N]`.

  Args:
    num_candidates: A.
    are_answers: every candidate is a whole answer, which may be revised where
      it is not terminal.
  """

  def root_fn(params, problems, capacity):
    root = problems.tokens[:, 0]
    state = jnp.full((root.shape[0], capacity), -1, jnp.int32)
    return (
      params["root_value"][root],
      problems.lengths,
      state.at[:, 0].set(root),
    )

  def step_fn(params, keys, request, states):
    state = read(states, request.node)
    draw = jax.vmap(
      jax.vmap(
        functools.partial(jax.random.categorical, shape=(num_candidates,))
      )
    )
    logits = params["prior_logits"][state]
    chosen = draw(keys, jnp.where(request.num_rows[..., None] > 0, logits, 0.0))

    def look_up(field):
      return jnp.take_along_axis(params[field][state], chosen, axis=-1)

    within = jnp.arange(num_candidates, dtype=jnp.int32)[None, None]
    child = request.first_child[:, :, None] + within
    flat = (state.shape[0], -1)
    states = write(states, child.reshape(flat), look_up("child").reshape(flat))
    is_drawn = first_rows(request, num_candidates)
    tokens = TOKENS_PER_STEP * jnp.sum(is_drawn, axis=(1, 2), dtype=jnp.int32)
    is_terminal = look_up("is_terminal")
    return (
      Expansion(
        prior_logits=jnp.zeros(chosen.shape, params["value"].dtype),
        is_valid=look_up("is_valid") & is_drawn,
        is_terminal=is_terminal,
        is_solution=jnp.ones_like(is_terminal) if are_answers else is_terminal,
        value=look_up("value"),
        outcome=look_up("outcome"),
        generated_tokens=tokens,
        forward_tokens=tokens,
      ),
      states,
    )

  return StepModel(num_candidates, root_fn, step_fn, TOKENS_PER_STEP)


def corridors(value_of_good: float, value_of_bad: float) -> World:
  r"""A first step that decides all, and seven more until that is known.

        0
  1/8  / \  7/8        good: value_of_good all the way, outcome 1
      1   8            bad:  value_of_bad all the way, outcome 0
      :   :
      7  14
      |   |
      T   T
  """
  state = np.arange(15)
  child = np.stack([state + 1, np.where(state == 0, 8, state + 1)], axis=-1)
  is_good = np.stack([state < 8, (0 < state) & (state < 8)], axis=-1)
  is_last = np.isin(state, (7, 14))[:, None] & np.ones((1, 2), bool)
  return World(
    root_value=np.full(15, 0.125),
    child=np.where(is_last, 0, child).astype(np.int32),
    prior_logits=np.log(np.tile([0.125, 0.875], (15, 1))),
    value=np.where(is_good, value_of_good, value_of_bad),
    outcome=np.where(is_good, 1.0, 0.0),
    is_terminal=is_last,
    is_valid=np.ones((15, 2), bool),
  )


def revisable(fix_rate: float, wrong: float = 0.0) -> World:
  r"""Answers, right once in eight; a wrong one is put right at `fix_rate`.

         0
   1/8  / \  7/8
       1   2 ---.        1: right, outcome 1, and so are its revisions
           | ^  |        2: wrong, outcome `wrong`
  fix_rate |  \_|  else
           1
  """
  rates = np.clip([0.125, 1.0, fix_rate], 1e-9, 1 - 1e-9)
  shape = (3, 2)
  outcome = np.tile([1.0, wrong], (3, 1))
  return World(
    root_value=np.full(3, 0.125),
    child=np.tile(np.array([1, 2], np.int32), (3, 1)),
    prior_logits=np.log(np.stack([rates, 1 - rates], axis=-1)),
    value=outcome,
    outcome=outcome,
    is_terminal=np.zeros(shape, bool),
    is_valid=np.ones(shape, bool),
  )


def ladder(num_rungs: int = 5) -> World:
  r"""Answers that a revision takes one rung up or down, with even chances.

  0 -> 1 <-> 2 <-> 3 <-> 4 <-> 5      rung r has outcome r / 5
  """
  rung = np.arange(num_rungs + 1)
  up = np.minimum(rung + 1, num_rungs)
  down = np.maximum(rung - 1, 1)
  child = np.stack([up, down], axis=-1).astype(np.int32)
  outcome = child / num_rungs
  return World(
    root_value=rung / num_rungs,
    child=child,
    prior_logits=np.zeros(child.shape),
    value=outcome,
    outcome=outcome,
    is_terminal=np.zeros(child.shape, bool),
    is_valid=np.ones(child.shape, bool),
  )


def polls(right: float, score: float) -> World:
  r"""One step to the right answer or to the wrong one.

         0
  right / \ 1 - right     state 1: right, its score is `score`
       1   2              state 2: wrong, scored .7
       T   T
  """
  prior = np.array([[right, 1 - right]] * 3)
  outcome = np.tile([score, 0.7], (3, 1))
  return World(
    root_value=np.full(3, 0.5),
    child=np.tile(np.array([1, 2], np.int32), (3, 1)),
    prior_logits=np.log(prior),
    value=outcome,
    outcome=outcome,
    is_terminal=np.ones((3, 2), bool),
    is_valid=np.ones((3, 2), bool),
  )


def halving_tree(is_good: Callable[[int], bool], telling: bool) -> World:
  r"""Five even choices between two; of the 32 leaves some are good.

       0
     /   \             the i-th state leads to 2i + 1 and 2i + 2;
    1     2            telling: .7 where a good leaf lies below, else .3
   / \   / \           misleading: the other way round
  3   4 5   6          outcome 1 at good leaves, else 0
  :   : :   :
  """
  num_states = 31
  child = 2 * np.arange(num_states)[:, None] + np.array([[1, 2]])
  is_last = child >= num_states
  has_good = np.zeros(2 * num_states + 1, bool)
  has_good[num_states:] = [is_good(leaf) for leaf in range(32)]
  for state in reversed(range(num_states)):
    has_good[state] = has_good[2 * state + 1] | has_good[2 * state + 2]
  return World(
    root_value=np.full(num_states, 0.5),
    child=np.where(is_last, 0, child).astype(np.int32),
    prior_logits=np.zeros(child.shape),
    value=np.where(has_good[child] == telling, 0.7, 0.3),
    outcome=np.where(has_good[child], 1.0, 0.0),
    is_terminal=is_last,
    is_valid=np.ones(child.shape, bool),
  )


@functools.cache
def chain_search(
  name: str, are_answers: bool = False, num_candidates: int = 1, **options
) -> tuple[Strategy, Callable[..., SearchState]]:
  """A strategy over candidates drawn by chance, compiled once for all tests."""
  model = chance_model(num_candidates, are_answers)
  strategy = make_strategy(name, model, **options)
  return strategy, run_on_device(strategy)
