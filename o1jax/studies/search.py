"""Strategies at equal token budgets, with and without the checker.

An effort n is a budget of T_n tokens a problem: n times what one sampled
solution of this policy takes on these problems. Best-of-N and majority vote
draw n solutions, which is what defines the budget; greedy decoding draws one.
Every other strategy stops where T_n does not pay for one more candidate and is
given room enough that nothing else stops it, where its structure has a use for
the tokens; the table shows what each spent.

Accuracy is that of the solution answered with, coverage that of any that was
found. Each strategy is also compared with best-of-N at the same effort and
reward, problem by problem. A problem's numbers are averaged over the seeds,
and intervals resample problems: 95% bootstrap, for this one policy.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from o1jax import drawing
from o1jax.combinations import REVISIONS, WHOLE
from o1jax.studies.context import Context
from o1jax.studies.study import (
  Cell,
  Measured,
  Study,
  by_setting,
  estimate,
  markdown_table,
  percent,
)

EFFORTS = (4, 8, 16, 32)
REWARDS = ("value", "checker")
BASELINE = "best_of_n"

# The solutions that the tokens of one are measured by.
NUM_MEASURED = 4
# Room for steps that are shorter than the mean, or that come twice.
_SLACK = 2.0

# Options of `Solver` for an effort n and R steps of a solution.
Sized = Callable[[int, int], Mapping[str, Any]]


def _widening(effort: int, num_steps: int) -> dict[str, Any]:
  """A tree that draws one candidate at a time; see search/mcts.py."""
  room = int(_SLACK * effort * num_steps)
  return {
    "num_candidates": 1,
    "num_expansions": room,
    "num_simulations": 16 * room,
    "options": {"max_blocks": min(room, 32), "widening_rate": 0.5},
  }


def _wide(effort: int, num_steps: int) -> dict[str, Any]:
  """The same, and wider with the budget: for values that know steps apart."""
  sized = _widening(effort, num_steps)
  rate = min(effort / 4, 3.0)
  return {
    **sized,
    "rule": "uct",
    "rule_options": {"exploration": 0.5},
    "options": {**sized["options"], "widening_rate": rate},
  }


def _committing(effort: int, num_steps: int) -> dict[str, Any]:
  """The same; equal simulations before each commitment."""
  return {**_widening(effort, num_steps), "num_simulations": 8 * effort}


def _branching(effort: int, num_steps: int) -> dict[str, Any]:
  """As many candidates a node as a tree needs to hold twice the budget.

  Equal candidates are merged, so that it holds fewer than it could.
  """
  room, num_candidates = _SLACK * effort * num_steps, 2
  while sum(num_candidates**d for d in range(1, num_steps + 1)) < room:
    num_candidates += 1
  return {
    "num_candidates": num_candidates,
    "num_expansions": math.ceil(room / num_candidates),
  }


def _broad(effort: int, num_steps: int) -> dict[str, Any]:
  """As many candidates a node as best-of-N draws first steps, up to 16."""
  num_candidates = min(effort, 16)
  room = _SLACK * effort * num_steps
  return {
    "num_candidates": num_candidates,
    "num_expansions": math.ceil(room / num_candidates),
  }


def _layers(effort: int, num_steps: int) -> dict[str, Any]:
  """A beam whose layers take the tokens, the best of the last one first."""
  # With few tokens a first layer as wide as the others would leave too little.
  width, num_root_blocks = (2, 1) if effort < 16 else (4, 4)
  num_expansions = num_root_blocks + width * (num_steps - 1)
  room = 1.25 * effort * num_steps
  return {
    "num_candidates": max(width, math.ceil(room / num_expansions)),
    "options": {"width": width, "num_root_blocks": num_root_blocks},
  }


def _dealt(effort: int, num_steps: int) -> dict[str, Any]:
  """The same beams, each in a subtree of its own."""
  sized = _layers(effort, num_steps)
  options = sized["options"]
  return {**sized, "options": {**options, "num_subtrees": options["width"]}}


def _refilled(effort: int, num_steps: int) -> dict[str, Any]:
  """Rows for every solution, and new starts in the places of those dropped."""
  num_starts = int(_SLACK * effort)
  return {
    "num_expansions": num_starts * num_steps,
    "options": {"num_rows": effort, "num_starts": num_starts},
  }


def _chains(effort: int, num_steps: int) -> dict[str, Any]:
  """Chains of three revisions side by side, and more where these end."""
  del num_steps
  options = {"num_chains": math.ceil(effort / 4), "num_starts": effort}
  return {"num_revisions": 3, "options": options}


# One line a row of the table: the strategy, and what it makes of an effort.
VARIANTS: Mapping[str, tuple[str, Sized]] = {
  "greedy": ("greedy", lambda n, r: {}),
  "majority_vote": ("majority_vote", lambda n, r: {"num_candidates": n}),
  "best_of_n": ("best_of_n", lambda n, r: {"num_candidates": n}),
  "mcts": ("mcts", _widening),
  "mcts_uct": ("mcts", lambda n, r: {**_widening(n, r), "rule": "uct"}),
  "mcts_wide": ("mcts", _wide),
  "mcts_without_widening": (
    "mcts",
    lambda n, r: {
      **_branching(n, r),
      "num_simulations": 16 * int(_SLACK * n * r),
    },
  ),
  "reroot": ("reroot", _committing),
  "beam": ("beam", _layers),
  "dvts": ("beam", _dealt),
  "treebon": (
    "treebon",
    lambda n, r: {"num_candidates": 2, "options": {"num_roots": n}},
  ),
  "best_first": ("best_first", _branching),
  "best_first_wide": ("best_first", _broad),
  "a_star": (
    "a_star",
    lambda n, r: {
      **_branching(n, r),
      "options": {"cost_weight": 0.1, "stop_at_solution": False},
    },
  ),
  "depth_first": ("depth_first", _branching),
  "speculative_rejection": ("speculative_rejection", _refilled),
  "revision": ("revision", _chains),
  "revision_by_checker": (
    "revision",
    lambda n, r: {**_chains(n, r), "feedback": "checker"},
  ),
  "mctsr": (
    "mctsr",
    lambda n, r: {
      "num_revisions": 3,
      "num_simulations": int(_SLACK * n),
      "options": {"max_blocks": min(int(_SLACK * n), 16)},
    },
  ),
}
# These choose without a reward.
UNREWARDED = ("greedy", "majority_vote")
# These are told by the checker what is wrong, so that it is their reward too.
CHECKED = ("revision_by_checker",)
# What a cell holds beside the options of `Solver`.
_OTHERS = ("name", "effort", "seed")
_COSTS = ("generated_tokens", "verifier_requests", "verifier_distinct")


def make_cells(context: Context, num_seeds: int) -> list[Cell]:
  """The grid; greedy has one budget and one seed."""
  grid = [
    (reward, effort, name)
    for reward in (None, *REWARDS)
    for effort in (1, *EFFORTS)
    for name in _variants(context)
    if (name in UNREWARDED) == (reward is None)
    and (name == "greedy") == (effort == 1)
    and (name not in CHECKED or reward == "checker")
  ]
  return [
    _cell(context, *row, seed)
    for seed in range(num_seeds)
    for row in grid
    if row[2] != "greedy" or seed == 0
  ]


def note(context: Context) -> str:
  """What of `VARIANTS` the grid leaves out, "" for nothing."""
  left_out = [name for name in VARIANTS if name not in _variants(context)]
  if not left_out:
    return ""
  return (
    f"Left out: {', '.join(left_out)}; the config of the run has no rows of"
    " kind revising, so its policy was not taught to revise."
  )


def _variants(context: Context) -> list[str]:
  taught = context.was_taught("revising")
  return [
    name
    for name, (strategy, _) in VARIANTS.items()
    if taught or strategy not in REVISIONS
  ]


def _cell(context, reward, effort, name, seed) -> Cell:
  strategy, sized = VARIANTS[name]
  num_steps = context.trained.policy.lengths.num_steps
  cell = {"name": name, "effort": effort, "seed": seed, "strategy": strategy}
  if reward is not None:
    cell["reward"] = reward
  if strategy != "greedy":
    cell["temperature"] = context.evaluation["temperature"]
  return cell | sized(effort, num_steps)


def check(context: Context, cell: Cell) -> None:
  """Refuses options that `Solver` refuses."""
  context.solver(_options(context, cell))


def measure(context: Context, cell: Cell) -> dict[str, Any]:
  """Accuracy, coverage and cost of every problem; seconds of all."""
  options = _options(context, cell)
  searched, seconds = context.search(options, cell["seed"])
  judged = [[v.is_correct for v in context.judge(one)] for one in searched]
  selected = [
    one.selected is not None and is_correct[one.selected]
    for one, is_correct in zip(searched, judged, strict=True)
  ]
  costs = {name: [one.cost[name] for one in searched] for name in _COSTS}
  return {
    "selected": selected,
    "covered": [any(is_correct) for is_correct in judged],
    "budget_tokens": _budget(context, cell["effort"]),
    "seconds": seconds,
    **costs,
  }


def _options(context: Context, cell: Cell) -> dict[str, Any]:
  """Of `Solver`; the budget follows from what the context measures."""
  options = {name: cell[name] for name in cell if name not in _OTHERS}
  if cell["strategy"] in WHOLE:
    return options
  more = dict(options["options"]) if "options" in options else {}
  more["max_tokens"] = _budget(context, cell["effort"])
  return options | {"options": more}


def _budget(context: Context, effort: int) -> int:
  """T_n, rounded up."""
  return math.ceil(effort * context.tokens_per_solution(NUM_MEASURED))


class Row(NamedTuple):
  """A line of the table.

  Attributes:
    name: of the variant.
    reward: "value", "checker" or None where none is used.
    effort: the budget, in solutions.
    num_seeds: seeds it was measured with.
    accuracy, coverage: each with its interval, `(mean, low, high)`.
    gain: accuracy less that of best-of-N, with its interval; None without it.
    budget: T_n, in tokens a problem.
    tokens, requests, distinct: means a problem.
    seconds: for all problems, mean over the seeds.
  """

  name: str
  reward: str | None
  effort: int
  num_seeds: int
  accuracy: tuple[float, float, float]
  coverage: tuple[float, float, float]
  gain: tuple[float, float, float] | None
  budget: float
  tokens: float
  requests: float
  distinct: float
  seconds: float


def summarize(measured: Sequence[Measured]) -> list[Row]:
  """The rows of the table, in the order of the grid."""
  groups = by_setting(measured, ("reward", "effort", "name"))
  rows = []
  for (reward, effort, name), group in groups.items():
    base = groups.get((reward or "value", effort, BASELINE))
    gain = None
    if base is not None and name != BASELINE:
      gain = estimate(_mean(group, "selected") - _mean(base, "selected"))
    rows.append(
      Row(
        name=name,
        reward=reward,
        effort=effort,
        num_seeds=len(group),
        accuracy=estimate(_mean(group, "selected")),
        coverage=estimate(_mean(group, "covered")),
        gain=gain,
        budget=float(_mean(group, "budget_tokens")),
        tokens=float(_mean(group, "generated_tokens").mean()),
        requests=float(_mean(group, "verifier_requests").mean()),
        distinct=float(_mean(group, "verifier_distinct").mean()),
        seconds=float(_mean(group, "seconds")),
      )
    )
  return rows


def _mean(group: Sequence[Measured], name: str) -> np.ndarray:
  """Mean over the seeds, of each problem where there is one a problem."""
  return np.mean([np.asarray(one.result[name], float) for one in group], axis=0)


def make_table(measured: Sequence[Measured]) -> str:
  """One row a strategy, effort and reward."""
  head = (
    "reward",
    "strategy",
    "budget",
    "seeds",
    "accuracy",
    "less best-of-N",
    "coverage",
    "tokens",
    "of the budget",
    "checks",
    "distinct texts",
    "seconds",
  )
  rows = [
    (
      row.reward or "-",
      row.name,
      str(row.effort),
      str(row.num_seeds),
      percent(*row.accuracy),
      "-" if row.gain is None else percent(*row.gain, sign="+"),
      percent(*row.coverage),
      f"{row.tokens:.1f}",
      f"{row.tokens / row.budget:.0%}",
      f"{row.requests:.1f}",
      f"{row.distinct:.1f}",
      f"{row.seconds:.2f}",
    )
    for row in summarize(measured)
  ]
  return markdown_table(head, rows, num_left=2)


def draw(measured: Sequence[Measured]) -> drawing.Drawing | None:
  """Accuracy against tokens, one chart a reward."""
  rows = summarize(measured)
  charts = []
  for reward in REWARDS:
    shown = [row for row in rows if row.reward in (reward, None)]
    if any(row.reward == reward for row in shown):
      charts.append(_chart(shown, reward))
  return drawing.stack(charts, width=960) if charts else None


def _chart(rows: Sequence[Row], reward: str) -> drawing.Drawing:
  series = []
  for color, name in enumerate(VARIANTS):
    own = sorted((r for r in rows if r.name == name), key=lambda r: r.tokens)
    if own:
      series.append(
        drawing.Series(
          name.replace("_", " "),
          [(row.tokens, row.accuracy[0]) for row in own],
          # Bars on every line would hide them all; the table has the others.
          [r.accuracy[1:] for r in own] if name == BASELINE else None,
          color,
        )
      )
  tokens = [row.tokens for row in rows]
  chosen = {"value": "the learned value", "checker": "the checker"}[reward]
  return drawing.draw_lines(
    series,
    title=f"Accuracy against tokens, {chosen} as reward (95% of best-of-N)",
    x_title="generated tokens a problem",
    is_percent=True,
    is_log=min(tokens) > 0 and max(tokens) > 8 * min(tokens),
    height=480,
  )


STUDY = Study(
  "search", "3", make_cells, check, measure, make_table, draw, note=note
)
