"""Strategies at equal token budgets, with and without the checker.

An effort n is the tokens of n whole solutions. Accuracy is that of the
solution answered with, coverage that of any that was found. Each strategy is
also compared with best-of-N at the same effort and reward, problem by problem.
A problem's numbers are averaged over the seeds, and intervals resample
problems: 95% bootstrap, for this one policy.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from o1jax import drawing, evaluation
from o1jax.studies.context import Context
from o1jax.studies.study import (
  Cell,
  Measured,
  Study,
  by_setting,
  markdown_table,
  percent,
)

EFFORTS = (4, 8, 16, 32)
REWARDS = ("value", "checker")
BASELINE = "best_of_n"

NUM_CANDIDATES = 2  # of an expansion, where nodes have several
WIDENING = dict(num_candidates=1, max_blocks=32, widening_rate=0.5)

# One line a row of the table: its name, and options of `Solver` beyond those
# of the budget, temperature and selection rule.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
  "greedy": dict(strategy="greedy"),
  "majority_vote": dict(strategy="majority_vote"),
  "best_of_n": dict(strategy="best_of_n"),
  "mcts": dict(strategy="mcts"),
  "mcts_widening": dict(strategy="mcts", options=WIDENING),
  "reroot": dict(strategy="reroot", options=WIDENING),
  "beam": dict(strategy="beam"),
  "dvts": dict(strategy="beam", options=dict(num_subtrees=2)),
  "treebon": dict(strategy="treebon"),
  "best_first": dict(strategy="best_first"),
  "a_star": dict(strategy="a_star"),
  "depth_first": dict(strategy="depth_first"),
  "speculative_rejection": dict(strategy="speculative_rejection"),
}
# These choose without a reward.
UNREWARDED = ("greedy", "majority_vote")
# What a cell holds beside the options of `Solver`.
_OTHERS = ("name", "effort", "seed")
_COSTS = ("generated_tokens", "verifier_requests", "verifier_distinct")


def make_cells(context: Context, num_seeds: int) -> list[Cell]:
  """The grid; greedy has one budget and one seed."""
  grid = [
    (reward, effort, name)
    for reward in (None, *REWARDS)
    for effort in (1, *EFFORTS)
    for name in VARIANTS
    if (name in UNREWARDED) == (reward is None)
    and (name == "greedy") == (effort == 1)
  ]
  return [
    _cell(context, *row, seed)
    for seed in range(num_seeds)
    for row in grid
    if row[2] != "greedy" or seed == 0
  ]


def _cell(context, reward, effort, name, seed) -> Cell:
  variant, common = dict(VARIANTS[name]), context.evaluation
  cell = {"name": name, "effort": effort, "seed": seed}
  if reward is not None:
    cell["reward"] = reward
  if variant["strategy"] != "greedy":
    cell["temperature"] = common["temperature"]
  if name == "mcts":
    cell |= {n: common[n] for n in ("rule", "rule_options") if n in common}
  budget = evaluation.strategy_options(
    variant["strategy"],
    effort,
    context.trained.policy.lengths.num_steps,
    NUM_CANDIDATES,
    variant.pop("options", None),
  )
  return {**cell, **budget, **variant}


def check(context: Context, cell: Cell) -> None:
  """Refuses options that `Solver` refuses."""
  context.solver(_options(cell))


def measure(context: Context, cell: Cell) -> dict[str, Any]:
  """Accuracy, coverage and cost of every problem; seconds of all."""
  searched, seconds = context.search(_options(cell), cell["seed"])
  judged = [[v.is_correct for v in context.judge(one)] for one in searched]
  selected = [
    one.selected is not None and is_correct[one.selected]
    for one, is_correct in zip(searched, judged, strict=True)
  ]
  costs = {name: [one.cost[name] for one in searched] for name in _COSTS}
  return {
    "selected": selected,
    "covered": [any(is_correct) for is_correct in judged],
    "seconds": seconds,
    **costs,
  }


def _options(cell: Cell) -> dict[str, Any]:
  return {name: cell[name] for name in cell if name not in _OTHERS}


class Row(NamedTuple):
  """A line of the table.

  Attributes:
    name: of the variant.
    reward: "value", "checker" or None where none is used.
    effort: the budget, in solutions.
    num_seeds: seeds it was measured with.
    accuracy, coverage: each with its interval, `(mean, low, high)`.
    gain: accuracy less that of best-of-N, with its interval; None without it.
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
      gain = _estimate(_mean(group, "selected") - _mean(base, "selected"))
    rows.append(
      Row(
        name=name,
        reward=reward,
        effort=effort,
        num_seeds=len(group),
        accuracy=_estimate(_mean(group, "selected")),
        coverage=_estimate(_mean(group, "covered")),
        gain=gain,
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


def _estimate(values: np.ndarray) -> tuple[float, float, float]:
  return float(values.mean()), *evaluation.bootstrap_interval(values)


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
          [row.accuracy[1:] for row in own],
          color,
        )
      )
  tokens = [row.tokens for row in rows]
  chosen = {"value": "the learned value", "checker": "the checker"}[reward]
  return drawing.draw_lines(
    series,
    title=f"Accuracy against tokens, {chosen} as reward",
    x_title="generated tokens a problem",
    is_percent=True,
    is_log=min(tokens) > 0 and max(tokens) > 8 * min(tokens),
    height=420,
  )


STUDY = Study("search", "1", make_cells, check, measure, make_table, draw)
