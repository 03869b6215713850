"""Random legal play of the numbers game as a world to search in.

The step model of tests and studies that need the real game and no policy: a
node is a state of the game, its numbers as exact fractions in int32, and its
candidates are legal steps drawn by the uniform law of `tasks/numbers_game`.
With every node goes one whole play through it, the steps that led there and
then random ones; its last number decides the node's outcome, exactly as
`task.check` decides about the play's text (`play_text`). As in
`tasks/numbers_play` fractions are not reduced: both parts stay below
`(2 * max)**k`, which `encode_games` holds against 32 bits.

Texts are what costs here: an expansion spends one token for each play whose
text has to be checked, so that `max_tokens` of a strategy bounds the checks.

Letters: k numbers of a problem, C = 6 * k * (k - 1) / 2 choices. A choice is a
pair of positions and an operation, in the order of `numbers_game.legal_steps`;
the numbers left keep their order and the result comes last.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from o1jax.search.contracts import Expansion, Request, StepModel
from o1jax.search.tree import NO_NODE, ROOT, read, write
from o1jax.tasks import numbers_game
from o1jax.types import Problem, ProblemBatch

SYMBOLS = "+-*/"
_COMMUTES = np.array([True, False, True, False])


@struct.dataclass
class State:
  """A state of the game.

  Attributes:
    num, den: `[..., k]` the numbers left, then 0 / 1; den above 0.
    left: `[...]` int32 how many.
  """

  num: jax.Array
  den: jax.Array
  left: jax.Array


@struct.dataclass
class Nodes:
  """What the step model remembers of N nodes of B trees.

  Attributes:
    state: the state of each node.
    choice: `[B, N]` its last step, -1 at the root.
    play: `[B, N, k - 1]` choices of one play through it.
    is_checked: `[B, N]` True where that play's text is checked.
    is_right: `[B, N]` whether it reaches the target.
    target: `[B]`.
  """

  state: State
  choice: jax.Array
  play: jax.Array
  is_checked: jax.Array
  is_right: jax.Array
  target: jax.Array


class Choices(NamedTuple):
  """The C choices of k numbers, as constants.

  Attributes:
    first, second: `[C]` positions of the operands as they are written.
    op: `[C]` index into `SYMBOLS`.
    others: `[C, k - 2]` the positions that stay, in order.
  """

  first: np.ndarray
  second: np.ndarray
  op: np.ndarray
  others: np.ndarray


@functools.cache
def make_choices(num_numbers: int) -> Choices:
  """The choices of k numbers."""
  rows = []
  for pair in itertools.combinations(range(num_numbers), 2):
    others = [p for p in range(num_numbers) if p not in pair]
    for symbol, is_swapped in numbers_game.BRANCHES:
      first, second = pair[::-1] if is_swapped else pair
      rows.append((first, second, SYMBOLS.index(symbol), others))
  first, second, op, others = zip(*rows, strict=True)
  shape = (len(rows), num_numbers - 2)
  others = np.array(others, np.int32).reshape(shape)
  return Choices(np.array(first), np.array(second), np.array(op), others)


def make_play_model(
  num_numbers: int,
  *,
  integers_only: bool = False,
  num_candidates: int,
  are_whole: bool = False,
  rolls_out: bool = True,
  guide: str = "nothing",
) -> StepModel:
  """The step model; its parameters are not read.

  Args:
    num_numbers: k.
    integers_only: the rule in force, see `numbers_game`.
    num_candidates: A; from C on an expansion offers every legal step.
    are_whole: candidates are whole plays, drawn independently, so that equal
      ones may come: for best-of-N. Else they are steps, drawn without those
      that the node has already; a node may be expanded once in a call.
    rolls_out: the play of an unfinished step is checked as well, as its
      rollout; else its outcome is 0.
    guide: value of an unfinished step: "nothing" for 0, "nearness" for
      `numbers_game.nearness`.

  Raises:
    ValueError: an unknown guide, or no number of candidates.
  """
  if guide not in ("nothing", "nearness"):
    raise ValueError(f"guide={guide!r}: choose nothing or nearness")
  if num_candidates < 1:
    raise ValueError(f"num_candidates={num_candidates}: give at least 1")
  choices = make_choices(num_numbers)
  num_steps = num_numbers - 1

  def root_fn(params: Any, problems: ProblemBatch, capacity: int):
    del params
    num_trees = problems.tokens.shape[0]
    per_node = (num_trees, capacity)

    def at_root(array, filler):
      shape = (*per_node, *array.shape[1:])
      return jnp.full(shape, filler, jnp.int32).at[:, ROOT].set(array)

    numbers = problems.tokens[:, :num_numbers]
    left = jnp.full((num_trees,), num_numbers, jnp.int32)
    nodes = Nodes(
      state=State(
        at_root(numbers, 0),
        at_root(jnp.ones_like(numbers), 1),
        at_root(left, 0),
      ),
      choice=jnp.full(per_node, -1, jnp.int32),
      play=jnp.full((*per_node, num_steps), -1, jnp.int32),
      is_checked=jnp.zeros(per_node, bool),
      is_right=jnp.zeros(per_node, bool),
      target=problems.tokens[:, num_numbers],
    )
    return jnp.zeros((num_trees,), jnp.float32), jnp.zeros_like(left), nodes

  def candidates(key, state, play, drawn, target):
    """Of one node: what its A candidates are, arrays `[A, ...]`."""
    draw_key, play_key = jax.random.split(key)
    results = combine(choices, state, integers_only)
    if are_whole:
      logits = jnp.where(results.is_legal, 0.0, -jnp.inf)
      shape = (num_candidates,)
      choice = jax.random.categorical(draw_key, logits, shape=shape)
      prior, is_new = jnp.zeros(shape), jnp.ones(shape, bool)
    else:
      choice, prior, is_new = draw_steps(
        draw_key, choices, state, results, drawn, num_candidates
      )
    depth = num_numbers - state.left
    after = jax.vmap(lambda c: take(choices, state, results, c))(choice)
    begun = jnp.where(jnp.arange(num_steps) == depth, choice[:, None], play)
    end, play = jax.vmap(
      lambda key, state, play: play_on(choices, key, state, play, integers_only)
    )(jax.random.split(play_key, num_candidates), after, begun)
    is_right = end.num[:, 0] == target * end.den[:, 0]
    if guide == "nothing":
      value = jnp.zeros_like(prior)
    else:
      value = jax.vmap(
        lambda state: nearness(choices, state, target, integers_only)
      )(after)
    return choice, prior, is_new, after, play, is_right, value

  def step_fn(params: Any, keys, request: Request, nodes: Nodes):
    del params
    node, num_leaves = request.node, request.node.shape[1]
    state = jax.tree.map(lambda array: read(array, node), nodes.state)
    flat = request.siblings.reshape(node.shape[0], -1)
    drawn = read(nodes.choice, flat).reshape(request.siblings.shape)
    drawn = jnp.where(request.siblings == NO_NODE, -1, drawn)
    target = jnp.repeat(nodes.target[:, None], num_leaves, axis=1)
    choice, prior, is_new, after, play, is_right, value = jax.vmap(
      jax.vmap(candidates)
    )(keys, state, read(nodes.play, node), drawn, target)
    index = jnp.arange(num_candidates, dtype=jnp.int32)[None, None]
    is_valid = is_new & (index < request.num_rows[..., None])
    is_terminal = (after.left == 1) | are_whole
    is_checked = is_valid & (is_terminal | rolls_out)
    is_right &= is_checked
    spent = is_checked.sum((1, 2), dtype=jnp.int32)
    expansion = Expansion(
      prior_logits=prior,
      is_valid=is_valid,
      is_terminal=is_terminal,
      is_solution=is_terminal,
      value=value,
      outcome=is_right.astype(jnp.float32),
      generated_tokens=spent,
      forward_tokens=jnp.zeros_like(spent),
    )
    child = (request.first_child[..., None] + index).reshape(node.shape[0], -1)

    def keep(array, new):
      return write(array, child, new.reshape(*child.shape, *new.shape[3:]))

    new = nodes.replace(
      state=jax.tree.map(keep, nodes.state, after),
      choice=keep(nodes.choice, choice),
      play=keep(nodes.play, play),
      is_checked=keep(nodes.is_checked, is_checked),
      is_right=keep(nodes.is_right, is_right),
    )
    return expansion, new

  return StepModel(num_candidates, root_fn, step_fn, 1)


# The rules, on one state.


class Results(NamedTuple):
  """What the choices of a state make, `[C]` each."""

  num: jax.Array
  den: jax.Array
  is_legal: jax.Array


def combine(choices: Choices, state: State, integers_only: bool) -> Results:
  """The number that each choice makes; without meaning where not legal."""
  a_num, b_num = state.num[choices.first], state.num[choices.second]
  a_den, b_den = state.den[choices.first], state.den[choices.second]
  a_over, b_over, den = a_num * b_den, b_num * a_den, a_den * b_den
  num = jnp.stack(
    [a_over + b_over, a_over - b_over, a_num * b_num, a_over * jnp.sign(b_over)]
  )
  den = jnp.stack([den, den, den, jnp.abs(b_over)])
  index = np.arange(len(choices.op))
  num, den = num[choices.op, index], den[choices.op, index]
  is_there = np.maximum(choices.first, choices.second) < state.left
  is_legal = is_there & (den != 0)
  den = jnp.where(den == 0, 1, den)
  if integers_only:
    is_legal &= (num % den == 0) & (num >= 0)
    num, den = num // den, jnp.ones_like(den)
  return Results(num, den, is_legal)


def take(
  choices: Choices, state: State, results: Results, choice: jax.Array
) -> State:
  """The state after a legal choice `[]`."""
  last = state.left - 2
  place = jnp.arange(state.num.shape[-1])

  def after(array, result, filler):
    kept = jnp.append(array[jnp.asarray(choices.others)[choice]], array[:2])
    return jnp.where(
      place < last, kept, jnp.where(place == last, result[choice], filler)
    )

  return State(
    after(state.num, results.num, 0),
    after(state.den, results.den, 1),
    state.left - 1,
  )


def play_on(
  choices: Choices,
  key: jax.Array,
  state: State,
  play: jax.Array,
  integers_only: bool,
) -> tuple[State, jax.Array]:
  """Plays on to the end by the uniform law.

  Args:
    choices: of k numbers.
    key: consumed.
    state: where to begin.
    play: `[k - 1]` choices so far; those to come are written into it.
    integers_only: the rule in force.

  Returns:
    The last state and the whole play.
  """
  num_steps = len(play)
  keys = jax.random.split(key, num_steps)
  # At least one step led here.
  for place in range(1, num_steps):
    results = combine(choices, state, integers_only)
    is_due = num_steps + 1 - state.left == place
    # A finished state has no legal choice, and none is taken there.
    logits = jnp.where(results.is_legal | ~is_due, 0.0, -jnp.inf)
    choice = jax.random.categorical(keys[place], logits).astype(play.dtype)
    after = take(choices, state, results, choice)
    state = jax.tree.map(
      lambda new, old, is_due=is_due: jnp.where(is_due, new, old), after, state
    )
    play = play.at[place].set(jnp.where(is_due, choice, play[place]))
  return state, play


def draw_steps(
  key: jax.Array,
  choices: Choices,
  state: State,
  results: Results,
  drawn: jax.Array,
  count: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Draws distinct steps by the law, one after another without replacement.

  Choices that write the same step (of equal numbers) are one step, whose
  weight is their number.

  Args:
    key: consumed.
    choices: of k numbers.
    state: where to step from.
    results: of its choices.
    drawn: `[E]` choices that were drawn before, -1 for none.
    count: A.

  Returns:
    `[A]` choices, their log weights, and False where none was left.
  """
  step = step_ids(choices, state)
  is_same = (step[:, None] == step[None, :]) & results.is_legal[None, :]
  index = np.arange(len(step))
  is_first = ~(is_same & (index[None, :] < index[:, None])).any(-1)
  is_drawn = (drawn[:, None] == index[None, :]).any(0)
  weight = jnp.log(jnp.maximum(is_same.sum(-1), 1).astype(jnp.float32))
  is_open = results.is_legal & is_first & ~is_drawn
  # The highest of log weights with Gumbel noise are such a draw.
  noisy = weight + jax.random.gumbel(key, weight.shape)
  score = jnp.where(is_open, noisy, -jnp.inf)
  score = jnp.pad(
    score, (0, max(count - len(step), 0)), constant_values=-jnp.inf
  )
  best, choice = jax.lax.top_k(score, count)
  choice = jnp.minimum(choice, len(step) - 1).astype(jnp.int32)
  return choice, weight[choice], best > -jnp.inf


def step_ids(choices: Choices, state: State) -> jax.Array:
  """A number `[C]` for each choice, equal where the written step is equal."""
  k = state.num.shape[-1]
  over = state.num[:, None] * state.den[None, :]
  is_equal = over == over.T
  number = jnp.argmax(is_equal, axis=-1)
  first, second = number[choices.first], number[choices.second]
  # Sums and products are written with the larger number first.
  low, high = jnp.minimum(first, second), jnp.maximum(first, second)
  first = jnp.where(_COMMUTES[choices.op], low, first)
  second = jnp.where(_COMMUTES[choices.op], high, second)
  return (choices.op * k + first) * k + second


def nearness(
  choices: Choices, state: State, target: jax.Array, integers_only: bool
) -> jax.Array:
  """`numbers_game.nearness` of a state, `[]`."""
  results = combine(choices, state, integers_only)
  off = jnp.abs(results.num - target * results.den) / results.den
  near = jnp.where(results.is_legal, 1 / (1 + off), 0.0).max()
  is_hit = state.num[0] == target * state.den[0]
  steps_left = jnp.maximum(state.left - 1, 1)
  return jnp.where(state.left == 1, is_hit, near / steps_left)


# The host's side.


def encode_games(problems: Sequence[Problem], seeds) -> ProblemBatch:
  """Games as arrays: the numbers and the target.

  Args:
    problems: of a task of numbers, all with equally many.
    seeds: `[B]` one a problem.

  Raises:
    ValueError: other problems, or numbers for which int32 is too small.
  """
  rows = []
  for problem in problems:
    try:
      rows.append([*problem.data["numbers"], problem.data["target"]])
    except (KeyError, TypeError) as error:
      raise ValueError(f"{problem.id} is no game of numbers") from error
  counts = sorted({len(row) - 1 for row in rows})
  if len(counts) != 1:
    raise ValueError(f"games of {counts} numbers: give games of one size")
  largest, k = max(map(max, rows)), counts[0]
  if (2 * largest) ** k >= 2**31:
    raise ValueError(
      f"{k} numbers up to {largest} do not fit in 32 bits: lower them"
    )
  return ProblemBatch(
    tokens=jnp.asarray(rows, jnp.int32),
    lengths=jnp.full((len(rows),), k, jnp.int32),
    seeds=jnp.asarray(seeds, jnp.uint32),
  )


def play_text(numbers: Sequence[int], play: Sequence[int]) -> str:
  """The text of a play: sums and products with the larger number first.

  The numbers left are written in ascending order, so that plays that combine
  the same numbers in the same way have the same text.
  """
  choices, left, lines = make_choices(len(numbers)), list(numbers), []
  for choice in play:
    first, second = choices.first[choice], choices.second[choice]
    op = SYMBOLS[choices.op[choice]]
    a, b = left[first], left[second]
    result = numbers_game.combine(a, op, b)
    if op in "+*":
      a, b = max(a, b), min(a, b)
    kept = [n for place, n in enumerate(left) if place not in (first, second)]
    left = [*kept, result]
    lines.append(numbers_game.step_text(a, op, b, result, sorted(left)))
  return "\n".join(lines)
