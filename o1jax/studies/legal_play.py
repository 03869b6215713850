"""Tree search against best-of-N where the policy plays random legal steps.

The reward is the exact checker and nothing is learned, so this asks what the
tree alone is worth. The budget is in distinct texts that were checked:
best-of-N draws whole plays and leaves out those it has seen, a tree search
checks the plays that it finishes and the rollouts of its steps. A game counts
as solved from the first text on that is right. Before it every outcome is 0,
and after it the game is won; so a run to the largest budget tells the smaller
ones too.

Intervals resample games, over the mean of the seeds: 95% bootstrap.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from o1jax import drawing, legal_play
from o1jax import mesh as mesh_lib
from o1jax.encoding import problem_seed
from o1jax.search import driver, strategies
from o1jax.search.contracts import Strategy
from o1jax.studies.context import TaskContext
from o1jax.studies.study import (
  Cell,
  Measured,
  Study,
  by_setting,
  estimate,
  markdown_table,
  percent,
)
from o1jax.types import Problem

BUDGETS = (10, 30, 100, 300)
BASELINE = "best_of_n"

# Best-of-N draws plays that it had, and a tree plays out steps whose rollout
# it has seen: so many texts are asked for to have the distinct ones.
_REPEATS = {"best_of_n": 4, "mcts": 2}
_PLAYS_A_ROUND = 50
_STEPS = {"strategy": "mcts", "num_candidates": "all"}
_UCT = {"rule": "uct", "rollout_weight": 1.0}

# One line a row of the table: options of the step model and of the strategy.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
  "best_of_n": {"strategy": "best_of_n", "are_whole": True},
  "mcts_uct": {**_STEPS, "options": _UCT},
  "mcts_puct": {**_STEPS, "options": {"rollout_weight": 1.0}},
  "mcts_uct_widening": {
    "strategy": "mcts",
    "num_candidates": 1,
    "options": {**_UCT, "max_blocks": 24, "widening_rate": 1.0},
  },
  "mcts_uct_without_rollouts": {
    **_STEPS,
    "rolls_out": False,
    "options": {"rule": "uct"},
  },
  # The task's heuristic looks one step ahead: this is another experiment.
  "mcts_puct_by_heuristic": {
    **_STEPS,
    "rolls_out": False,
    "guide": "nearness",
  },
}


def make_cells(context: TaskContext, num_seeds: int) -> list[Cell]:
  """Every variant with every seed."""
  del context
  return [
    {"name": name, "seed": seed, "most_texts": max(BUDGETS)}
    for seed in range(num_seeds)
    for name in VARIANTS
  ]


def check(context: TaskContext, cell: Cell) -> None:
  """Refuses problems that are no games of numbers of one kind."""
  legal_play.encode_games(context.problems, _seeds(context))
  make_strategy(context, cell)


def make_strategy(context: TaskContext, cell: Cell) -> Strategy:
  """The search of a cell."""
  model = dict(VARIANTS[cell["name"]])
  strategy, options = model.pop("strategy"), dict(model.pop("options", {}))
  most = _REPEATS[strategy] * cell["most_texts"]
  num_numbers = len(context.problems[0].data["numbers"])
  if strategy == "best_of_n":
    model["num_candidates"] = min(_PLAYS_A_ROUND, most)
    options["num_rounds"] = -(-most // model["num_candidates"])
  else:
    num_expansions = 2 * most
    if model["num_candidates"] == "all":
      model["num_candidates"] = len(legal_play.make_choices(num_numbers).op)
      # One that checks anything checks three texts or more.
      num_expansions = 16 + most // 3
    options["capacity"] = 1 + model["num_candidates"] * num_expansions
    options["num_simulations"] = 8 * most
  step_model = legal_play.make_play_model(
    num_numbers, integers_only=context.task.integers_only, **model
  )
  return strategies.make_strategy(
    strategy, step_model, max_tokens=most, **options
  )


def measure(context: TaskContext, cell: Cell) -> dict[str, Any]:
  """When each game was solved, in distinct texts checked.

  Returns:
    Lists with one number a game: `solved_at`, which right text was the first,
    0 for none; `num_texts`, distinct texts checked until then; and seconds,
    compilation among them.
  """
  start = time.monotonic()
  strategy = driver.over_mesh(make_strategy(context, cell), context.mesh)
  search = driver.run_on_device(strategy)
  problems = mesh_lib.shard_batch(
    legal_play.encode_games(context.problems, _seeds(context)), context.mesh
  )
  state = search(None, jax.random.key(cell["seed"]), problems)
  nodes = jax.device_get(state.node_state)
  most = cell["most_texts"]
  counted = [
    count_texts(context, problem, play[at], is_right[at], most)
    for problem, play, is_right, at in zip(
      context.problems,
      nodes.play,
      nodes.is_right,
      nodes.is_checked,
      strict=True,
    )
  ]
  solved_at, num_texts = zip(*counted, strict=True)
  return {
    "solved_at": solved_at,
    "num_texts": num_texts,
    "seconds": time.monotonic() - start,
  }


def count_texts(
  context: TaskContext,
  problem: Problem,
  plays: np.ndarray,
  is_right: np.ndarray,
  most: int,
) -> tuple[int, int]:
  """Checks the texts of plays in their order, each once.

  Args:
    context: has the checker.
    problem: the game.
    plays: `[n, k - 1]`.
    is_right: `[n]` what the search held them to be.
    most: texts to check.

  Returns:
    The number of the first right one, 0 for none, and that of those checked.

  Raises:
    AssertionError: the checker says otherwise than the search.
  """
  seen: set[str] = set()
  for play, expected in zip(plays.tolist(), is_right.tolist(), strict=True):
    if len(seen) == most:
      break
    text = legal_play.play_text(problem.data["numbers"], play)
    if text in seen:
      continue
    seen.add(text)
    (verdict,) = context.verifier.check([problem], [text])
    assert verdict.is_correct == expected, (problem.id, text, verdict.reason)
    if verdict.is_correct:
      return len(seen), len(seen)
  return 0, len(seen)


def _seeds(context: TaskContext) -> list[int]:
  return [problem_seed(problem) for problem in context.problems]


class Row(NamedTuple):
  """A line of the table.

  Attributes:
    name: of the variant.
    budget: in distinct texts.
    num_seeds: seeds it was measured with.
    solved: share of the games, with its interval.
    gain: the same less that of best-of-N; None without it.
    texts: distinct texts checked a game, those after the first right one not
      counted.
    seconds: of a whole search, mean over the seeds.
  """

  name: str
  budget: int
  num_seeds: int
  solved: tuple[float, float, float]
  gain: tuple[float, float, float] | None
  texts: float
  seconds: float


def summarize(measured: Sequence[Measured]) -> list[Row]:
  """The rows of the table, budget by budget."""
  groups = by_setting(measured, ("name",))
  base = groups.get((BASELINE,))
  rows = []
  for budget in BUDGETS:
    for (name,), group in groups.items():
      solved, gain = _solved(group, budget), None
      if base is not None and name != BASELINE:
        gain = estimate(solved - _solved(base, budget))
      texts = [np.minimum(one.result["num_texts"], budget) for one in group]
      seconds = np.mean([one.result["seconds"] for one in group])
      rows.append(
        Row(
          name,
          budget,
          len(group),
          estimate(solved),
          gain,
          float(np.mean(texts)),
          float(seconds),
        )
      )
  return rows


def _solved(group: Sequence[Measured], budget: int) -> np.ndarray:
  """Share of the seeds `[B]` that solved each game within a budget."""
  at = np.array([one.result["solved_at"] for one in group])
  return ((at > 0) & (at <= budget)).mean(0)


def make_table(measured: Sequence[Measured]) -> str:
  """One row a budget and variant."""
  head = (
    "strategy",
    "distinct texts",
    "seeds",
    "solved",
    "less best-of-N",
    "texts checked",
    "seconds",
  )
  rows = [
    (
      row.name,
      str(row.budget),
      str(row.num_seeds),
      percent(*row.solved),
      "-" if row.gain is None else percent(*row.gain, sign="+"),
      f"{row.texts:.1f}",
      f"{row.seconds:.1f}",
    )
    for row in summarize(measured)
  ]
  return markdown_table(head, rows)


def draw(measured: Sequence[Measured]) -> drawing.Drawing | None:
  """Solved games against distinct texts."""
  rows = summarize(measured)
  names = list(dict.fromkeys(row.name for row in rows))
  if not names:
    return None
  series = []
  for color, name in enumerate(names):
    own = [row for row in rows if row.name == name]
    points = [(row.budget, row.solved[0]) for row in own]
    intervals = [row.solved[1:] for row in own]
    label = name.replace("_", " ")
    series.append(drawing.Series(label, points, intervals, color))
  return drawing.draw_lines(
    series,
    title="Games solved by random legal play",
    x_title="distinct texts checked a game",
    is_percent=True,
    is_log=True,
    height=420,
  )


STUDY = Study(
  "legal_play",
  "1",
  make_cells,
  check,
  measure,
  make_table,
  draw,
  has_policy=False,
)
