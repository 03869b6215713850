"""Accuracy against budget, every strategy on the same held-out problems.

The budget is an effort n: as many tokens as n whole solutions. Best-of-N and
majority vote draw n solutions; tree searches may expand nodes until they have
decoded n solutions' worth of steps. "adaptive" and "compute_optimal" spend n on
the mean problem, see allocation.py. Accuracy is that of the solution a
strategy answers with, coverage (pass@k) that of any it found; the checker that
measures both is not one the search can see.
"""

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from o1jax import behaviors
from o1jax import mesh as mesh_lib
from o1jax.allocation import ComputeOptimal, MarginalGain
from o1jax.combinations import REVISIONS, STRATEGIES, WHOLE
from o1jax.encoding import Policy, encode_problems
from o1jax.policy.sample import make_controls
from o1jax.reward.outcome import Verifier
from o1jax.search.selection import named
from o1jax.searched import Searched
from o1jax.solver import Solver
from o1jax.tasks.task import Task
from o1jax.thinking import Thinking
from o1jax.types import Problem, Verdict

# The words for an effort, in solutions.
EFFORTS = {"low": 4, "medium": 16, "high": 64}
# Strategies that share a budget out over the problems.
ADAPTIVE = ("adaptive", "compute_optimal")
# Those that answer once, whatever the effort.
ALONE = ("greedy", "thinking")
SHARES_OF_BATCH = 8
CALIBRATION_SEED = 11
BOOTSTRAP_SEED = 7
NUM_RESAMPLES = 1000
SIMULATIONS_PER_NODE = 32
MAX_REVISIONS = 3
BEAMS = ("beam", "breadth_first", "treebon")
# Strategies whose candidates are given by the effort, or one at a time.
SINGLE = (*WHOLE, *REVISIONS, "speculative_rejection")
# Options that are the budget itself.
FROM_EFFORT = ("num_chains", "num_rows", "num_roots", "width")
CUT_OFF = Verdict(is_correct=False, reason="cut off", answer=None)


def solutions_worth(effort: str | int) -> int:
  """The budget of an effort, in solutions.

  Args:
    effort: "low", "medium", "high", or a number of solutions.

  Raises:
    ValueError: neither a known word nor a whole number above 0.
  """
  if effort in EFFORTS:
    return EFFORTS[effort]
  if not str(effort).isdecimal() or int(effort) < 1:
    raise ValueError(
      f"effort {effort!r} is none of {', '.join(EFFORTS)}, nor a number of "
      "solutions"
    )
  return int(effort)


def strategy_options(
  strategy: str,
  effort: int,
  num_steps: int,
  num_candidates: int,
  options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Options of a `Solver` that spends the tokens of `effort` solutions.

  Args:
    strategy: its name.
    effort: the budget.
    num_steps: R.
    num_candidates: A of strategies that expand nodes.
    options: more options of the strategy; `num_candidates` where it is to
      differ for this one. `num_revisions` sets how much of a budget of
      revisions is spent one after another: 0 draws all answers side by side,
      effort - 1 draws one chain (Snell et al., arXiv 2408.03314, Section 6).
      `feedback` says who criticises what is revised.
      `num_rounds` draws the solutions of best-of-N in as many rounds, between
      which a stop rule may end it. `answer_by` and `fold` are those of
      `Solver`.

  Raises:
    ValueError: the effort is no count, or does not pay for one expansion, or
      an option that follows from it was given.
  """
  more = dict(options or {})
  if "num_candidates" in more and strategy in SINGLE:
    raise ValueError(
      f"options.{strategy}.num_candidates={more['num_candidates']}: {strategy} "
      "follows from the effort alone; leave it out"
    )
  num_candidates = more.pop("num_candidates", num_candidates)
  num_revisions = more.pop("num_revisions", MAX_REVISIONS)
  answer = {n: more.pop(n) for n in ("answer_by", "fold") if n in more}
  if "feedback" in more:
    answer["feedback"] = more.pop("feedback")
  budget = _budget(strategy, effort, num_steps, num_candidates, num_revisions)
  budget |= answer
  if strategy in ("best_of_n", "majority_vote") and "num_rounds" in more:
    num_rounds = more["num_rounds"]
    if type(num_rounds) is not int or num_rounds < 1 or effort % num_rounds:
      raise ValueError(
        f"options.{strategy}.num_rounds={num_rounds}: give a whole number that "
        f"divides the effort of {effort} solutions"
      )
    budget["num_candidates"] //= num_rounds
  own = budget.pop("options", {})
  for name in FROM_EFFORT:
    if name in own and name in more:
      raise ValueError(
        f"options.{strategy}.{name}={more[name]}: it follows from the effort; "
        "leave it out"
      )
  more = own | more
  return budget | {"options": more} if more else budget


def _budget(
  strategy: str,
  effort: int,
  num_steps: int,
  num_candidates: int,
  num_revisions: int,
) -> dict[str, Any]:
  """What each strategy makes of its budget.

  An expansion decodes A steps, the R-th part of A solutions, so a tree gets
  effort * R / A expansions. Simulations cost no tokens: there are enough of
  them for the expansions to be spent on most problems. A revision counts as a
  solution.
  """
  if type(effort) is not int or effort < 1:
    raise ValueError(f"an effort must be a whole number above 0, not {effort}")
  if strategy == "greedy":
    return {}
  if strategy in WHOLE:
    return {"num_candidates": effort}
  if strategy == "speculative_rejection":
    return {
      "num_expansions": effort * num_steps,
      "options": {"num_rows": effort},
    }
  if strategy == "revision":
    num_revisions = min(num_revisions, effort - 1)
    options = {"num_chains": effort // (1 + num_revisions)}
    return {"num_revisions": num_revisions, "options": options}
  if strategy == "mctsr":
    return {"num_revisions": num_revisions, "num_simulations": effort}
  expansions = effort * num_steps // num_candidates
  width = effort // num_candidates
  if min(expansions, width if strategy in BEAMS else expansions) < 1:
    raise ValueError(
      f"an effort of {effort} solutions of {num_steps} steps does not pay for "
      f"one expansion of num_candidates={num_candidates}: raise the effort or "
      "lower num_candidates"
    )
  budget: dict[str, Any] = {"num_candidates": num_candidates}
  if strategy in ("beam", "breadth_first"):
    return budget | {"options": {"width": width, "num_root_blocks": width}}
  if strategy == "treebon":
    return budget | {"options": {"num_roots": width * num_candidates}}
  if strategy == "reroot":
    simulations = effort  # of each step: it commits to about R of them
  else:
    simulations = SIMULATIONS_PER_NODE * expansions * num_candidates
  return budget | {"num_expansions": expansions, "num_simulations": simulations}


def solver_of_effort(
  policy: Policy,
  task: Task,
  mesh: Mesh,
  *,
  strategy: str,
  effort: int,
  num_candidates: int,
  options: Mapping[str, Mapping[str, Any]] | None = None,
  **search: Any,
) -> Solver:
  """A search that spends the tokens of `effort` solutions on a problem.

  Args:
    policy: what proposes.
    task: its checker is the reward, where there is one.
    mesh: problems are shared out over it.
    strategy: its name.
    effort: the budget; greedy has but one.
    num_candidates: A of strategies that expand nodes.
    options: by strategy, more of its options; see `strategy_options`.
    **search: more of `Solver`, such as `batch_size` and `reward`.

  Raises:
    ValueError: a strategy or an effort that cannot be searched with.
  """
  own = (options or {}).get(strategy)
  num_steps = policy.lengths.num_steps
  budget = strategy_options(strategy, effort, num_steps, num_candidates, own)
  return Solver(
    policy, strategy=strategy, mesh=mesh, task=task, **budget, **search
  )


def bootstrap_interval(
  values: np.ndarray, *, level: float = 0.95
) -> tuple[float, float]:
  """Percentile interval of a mean, `[n] -> (low, high)`; Efron, 1979."""
  rng = np.random.default_rng(BOOTSTRAP_SEED)
  draws = rng.integers(0, len(values), (NUM_RESAMPLES, len(values)))
  means = np.asarray(values, np.float64)[draws].mean(1)
  tail = 100 * (1 - level) / 2
  low, high = np.percentile(means, [tail, 100 - tail])
  return float(low), float(high)


Search = Solver | MarginalGain | ComputeOptimal | Thinking


class Evaluator:
  """Compares strategies; solvers are compiled once and kept."""

  def __init__(
    self,
    policy: Policy,
    task: Task,
    mesh: Mesh,
    *,
    batch_size: int,
    num_candidates: int,
    temperature: float,
    rule: str,
    reward: str = "value",
    guidance: Mapping[str, float] | None = None,
    rule_options: Mapping[str, Any] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
  ):
    """Prepares; nothing compiles before the first measurement.

    Args:
      policy: what proposes.
      task: its checker judges.
      mesh: problems are shared out over it.
      batch_size: problems searched at a time.
      num_candidates: A of tree search.
      temperature: of all but greedy.
      rule: selection rule of tree search.
      reward: what searches select by, "value" or "checker".
      guidance: what scores candidates; see `Solver`.
      rule_options: constants of the rule; see search/selection.py.
      options: by strategy, more of its options; see `strategy_options`.

    Raises:
      ValueError: a temperature or a strategy that does not exist.
    """
    for strategy in options or {}:
      named("strategy with options", strategy, dict.fromkeys(STRATEGIES))
    make_controls(temperature=temperature)  # Refuses what cannot be sampled.
    self._policy = policy
    self._task = task
    self._mesh = mesh
    self._batch_size = batch_size
    self._options = dict(
      num_candidates=num_candidates,
      temperature=temperature,
      rule=rule,
      reward=reward,
      guidance=guidance,
      rule_options=rule_options,
      options=options,
    )
    self._solvers: dict[tuple[str, int, int], Search] = {}
    self._warm: set[Search] = set()
    self._judge = Verifier(task.check)

  def check(
    self, cells: Iterable[tuple[str, int]], problems: Sequence[Problem]
  ) -> None:
    """Prepares what is to be measured; compiles nothing.

    Args:
      cells: strategies with their efforts.
      problems: what they are to be compared on.

    Raises:
      ValueError: a strategy or an effort that cannot be searched with, or a
        problem that is too long.
    """
    for strategy, effort in cells:
      self._solver(strategy, effort)
    encode_problems(self._policy, problems)

  def measure(
    self,
    params: Any,
    problems: Sequence[Problem],
    strategy: str,
    effort: int,
    key: jax.Array,
  ) -> tuple[dict[str, Any], list[Searched]]:
    """One row of the comparison, and the searches behind it.

    Returns:
      Numbers by name: accuracy with its bootstrap interval, coverage, mean
      generated tokens and their standard deviation over problems, mean
      verifier requests, seconds in all. A first batch, which compiles the
      programs, and the table of "compute_optimal" are not part of the seconds.
      `behaviors/<name>` counts the behaviours of a text that was answered with,
      in the mean.
    """
    solver = self._solver(strategy, effort)
    if isinstance(solver, (MarginalGain, ComputeOptimal)):
      solver.prepare(params, problems)
    elif solver not in self._warm:
      solver(params, jax.random.key(0), problems[:1])
      self._warm.add(solver)
    start = time.monotonic()
    searched = solver(params, key, problems)
    seconds = time.monotonic() - start
    judged = [self.judge(one) for one in searched]
    selected = np.array(
      [
        one.selected is not None and verdicts[one.selected].is_correct
        for one, verdicts in zip(searched, judged, strict=True)
      ],
      np.float64,
    )
    low, high = bootstrap_interval(selected)
    row = {
      "strategy": strategy,
      "budget": effort,
      "accuracy": float(selected.mean()),
      "accuracy_low": low,
      "accuracy_high": high,
      "coverage": float(np.mean([_any_correct(v) for v in judged])),
      "tokens": _mean(searched, "generated_tokens"),
      "tokens_spread": float(
        np.std([one.cost["generated_tokens"] for one in searched])
      ),
      "verifier_requests": _mean(searched, "verifier_requests"),
      "num_problems": len(problems),
      "seconds": seconds,
      **_behaviors(searched),
    }
    return row, searched

  def judge(self, searched: Searched) -> list[Verdict]:
    """The verdict on each solution; one that was cut off is not correct."""
    solutions = searched.solutions
    texts = [self._task.final_solution(s.text) for s in solutions]
    verdicts = self._judge.check([searched.problem] * len(solutions), texts)
    return [
      verdict if solution.is_finished else CUT_OFF
      for verdict, solution in zip(verdicts, solutions, strict=True)
    ]

  def _solver(
    self, strategy: str, effort: int, batch_size: int | None = None
  ) -> Search:
    batch_size = batch_size or self._batch_size
    if strategy in ALONE:
      effort = 1
    cell = strategy, effort, batch_size
    if cell not in self._solvers:
      self._solvers[cell] = self._make(*cell)
    return self._solvers[cell]

  def _make(self, strategy: str, effort: int, batch_size: int) -> Search:
    if strategy == "thinking":
      return Thinking(
        self._policy, self._task, self._mesh, batch_size=batch_size
      )
    if strategy not in ADAPTIVE:
      return solver_of_effort(
        self._policy,
        self._task,
        self._mesh,
        strategy=strategy,
        effort=effort,
        batch_size=batch_size,
        **self._options,
      )
    if (self._options["guidance"] or {}).get("log_prob"):
      raise ValueError(
        f"strategy={strategy!r} with guidance.log_prob: its scores are no "
        "chances of being right; use guidance.value or guidance.mean_prob"
      )
    # The problems of one share are few and would not fill a whole batch.
    ways = mesh_lib.batch_ways(self._mesh)
    few = ways * max(1, batch_size // (SHARES_OF_BATCH * ways))
    solver_of = functools.partial(self._solver, batch_size=few)
    if strategy == "adaptive":
      return MarginalGain(solver_of, effort)
    rng = np.random.default_rng(CALIBRATION_SEED)
    return ComputeOptimal(
      solver_of,
      effort,
      calibration=self._task.sample_problems(rng, batch_size),
      judge=self.judge,
    )


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
  """The comparison as a table for the terminal."""
  lines = [
    f"{'strategy':<21} {'budget':>6} {'accuracy':>8} {'interval':>15} "
    f"{'coverage':>8} {'tokens':>7} {'spread':>7} {'checks':>7} "
    f"{'seconds':>8}"
  ]
  for row in rows:
    interval = f"{row['accuracy_low']:.1%}-{row['accuracy_high']:.1%}"
    lines.append(
      f"{row['strategy']:<21} {row['budget']:>6} {row['accuracy']:>8.1%} "
      f"{interval:>15} {row['coverage']:>8.1%} {row['tokens']:>7.1f} "
      f"{row['tokens_spread']:>7.1f} {row['verifier_requests']:>7.1f} "
      f"{row['seconds']:>8.2f}"
    )
  return "\n".join(lines)


def _any_correct(verdicts: Sequence[Verdict]) -> bool:
  return any(verdict.is_correct for verdict in verdicts)


def _behaviors(searched: Sequence[Searched]) -> dict[str, float]:
  """Means over the problems that were answered; see `behaviors.summarize`."""
  answers = [
    one.solutions[one.selected].text
    for one in searched
    if one.selected is not None
  ]
  found = behaviors.summarize(answers)
  return {f"behaviors/{n}": found[f"behaviors/{n}"] for n in behaviors.COUNTED}


def _mean(searched: Sequence[Searched], name: str) -> float:
  return float(np.mean([one.cost[name] for one in searched]))
