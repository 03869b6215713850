"""Ways to learn from the same searches (Table 3 of the paper, measured).

Every method starts from the same policy with a fresh optimizer. In a first
round it learns from one D_search, the same draws for all; in a second round
from draws of its own policy. The AlphaGo Zero loss needs visits, which draws do
not have: its D_search is a tree search of the same problems within the same
tokens. Sequences of two methods are warm starts.

Accuracy is that of greedy decoding on held-out problems; intervals resample
problems, over the mean of the seeds: 95% bootstrap. The seed chooses training
problems, draws and rows. The noise of the gradient is the variance of a batch's
gradient over batches of the first round, over the squared length of their mean:
how many such batches have to be averaged for a signal as large as the noise.
Memory is what the compiled update holds beside the parameters. Seconds are
those of searching and learning, without compilation and evaluation.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from o1jax import drawing, regime_parts, rollouts, scoring
from o1jax.experience import Experience
from o1jax.learning import update
from o1jax.learning.optimizer import make_optimizer
from o1jax.solver import Solver
from o1jax.studies import learner
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

NUM_ROUNDS = 2
# Batches whose gradients are compared.
NUM_GRADIENTS = 24

# Fields of a config; {draws} of a problem and {rows} of an update are a cell's.
_SHARED = (
  "search.strategy=best_of_n",
  "search.reward=checker",
  "search.num_candidates={draws}",
  "search.num_expansions=1",
  "search.num_simulations=1",
  "learn.value_coefficient=0.25",
  "learn.average_decay=0.9",
  f"learn.updates_per_call={learner.UPDATES_PER_CALL}",
)
_GRADIENT = ("learn.rows.policy_gradient={rows}",)

# A method -> its learning rate and the fields of a config that make it.
METHODS: Mapping[str, tuple[float, tuple[str, ...]]] = {
  "cloning": (1e-4, ("learn.rows.expert={rows}",)),
  "alphazero": (
    1e-4,
    (
      "learn.rows.search={rows}",
      "search.strategy=mcts",
      "search.num_candidates=4",
      "search.num_expansions=64",
      "search.num_simulations=512",
    ),
  ),
  "reinforce": (
    1e-4,
    (
      *_GRADIENT,
      "learn.policy_gradient.loss=reinforce",
      "learn.policy_gradient.importance=sequence",
      "learn.policy_gradient.max_weight=2.0",
    ),
  ),
  "ppo": (1e-4, (*_GRADIENT, "learn.policy_gradient.loss=ppo")),
  "ppo_critic": (
    1e-4,
    (
      *_GRADIENT,
      "learn.policy_gradient.loss=ppo",
      "learn.advantages.baseline=value",
      "learn.advantages.skips_flat=False",
    ),
  ),
  "dpo": (
    1e-5,
    ("learn.rows.pairs={pairs}", "learn.reference=start"),
  ),
}
# What is learned by in each round; where it is one name, in all of them.
SEQUENCES: Mapping[str, tuple[str, ...]] = {
  **{name: (name,) * NUM_ROUNDS for name in METHODS},
  "cloning_then_ppo": ("cloning", "ppo"),
  "cloning_then_dpo": ("cloning", "dpo"),
}


def make_cells(context: Context, num_seeds: int) -> list[Cell]:
  """Every sequence of methods with every seed."""
  del context
  return [
    {
      "name": name,
      "seed": seed,
      "num_problems": 256,
      "num_draws": 16,
      "num_rows": 64,
      "num_updates": 80,
      "num_evaluations": 2,
    }
    for seed in range(num_seeds)
    for name in SEQUENCES
  ]


def check(context: Context, cell: Cell) -> None:
  """Refuses a policy whose config the methods do not fit."""
  for method in set(SEQUENCES[cell["name"]]):
    method_config(context, cell, method)


def method_config(context: Context, cell: Cell, method: str) -> Any:
  """The config of the run, changed to a method.

  Raises:
    ValueError: the config is of a version without a field.
  """
  _, changes = METHODS[method]
  num_draws, num_rows = cell["num_draws"], cell["num_rows"]
  numbers = {"draws": num_draws, "rows": num_rows, "pairs": num_rows // 2}
  changes = [change.format(**numbers) for change in (*_SHARED, *changes)]
  config = learner.changed_config(context.trained.config, changes)
  if method == "alphazero":
    tokens = context.tokens_per_solution(num_draws) * num_draws
    options = {"max_tokens": round(tokens)}
    with config.unlocked():
      config.search.options.update(options)
  return config


def measure(context: Context, cell: Cell) -> dict[str, Any]:
  """Learns by the methods of a cell, round after round.

  Returns:
    Lists with one entry an evaluation, the start among them: `updates`,
    `seconds`, `correct` (a list with one number a problem); and numbers: the
    noise of the gradient, bytes of the update, share of the solutions of the
    first D_search that have a weight, and tokens searched a problem.
  """
  run = _Run(context, cell)
  result: dict[str, Any] = {"updates": [], "seconds": [], "correct": []}
  num_updates = seconds = 0.0

  def note():
    result["updates"].append(num_updates)
    result["seconds"].append(seconds)
    result["correct"].append(run.greedy())

  note()
  for number, method in enumerate(SEQUENCES[cell["name"]]):
    seconds += run.search(method, number)
    if number == 0:
      result |= run.describe()
    for _ in range(cell["num_evaluations"]):
      count = cell["num_updates"] // cell["num_evaluations"]
      seconds += run.learn(count)
      num_updates += count
      note()
  return result


class _Run:
  """A policy that learns in rounds."""

  def __init__(self, context: Context, cell: Cell):
    trained = context.trained
    self._context, self._cell = context, cell
    self._experience = Experience(
      max_search=10**6,
      max_hindsight=0,
      max_demonstrations=0,
      max_expert_per_problem=cell["num_draws"],
    )
    rng = np.random.default_rng([cell["seed"], 0])
    self._problems = trained.task.sample_problems(
      rng, cell["num_problems"] * NUM_ROUNDS
    )
    self._state: update.TrainState | None = None
    self._regime = self._maker = None
    self._regimes: dict[str, regime_parts.Regime] = {}
    self._greedy = Solver(
      trained.policy,
      strategy="greedy",
      task=trained.task,
      mesh=trained.mesh,
      batch_size=context.batch_size,
    )

  def _regime_of(self, method: str) -> regime_parts.Regime:
    trained = self._context.trained
    if method not in self._regimes:
      rate, _ = METHODS[method]
      optimizer = make_optimizer(learning_rate=rate, warmup_updates=10)
      config = method_config(self._context, self._cell, method)
      self._regimes |= regime_parts.make_regimes(
        {method: config}, trained.task, trained.policy, optimizer, trained.mesh
      )
      params = trained.params
      if self._state is not None:
        params = self._state.average_params
      # A method begins with moments of its own.
      self._state = update.make_state(
        params, optimizer, trained.mesh, has_reference=True
      )
    return self._regimes[method]

  def search(self, method: str, number: int) -> float:
    """Searches the problems of a round; returns the seconds."""
    self._regime = regime = self._regime_of(method)
    size = self._cell["num_problems"]
    problems = self._problems[number * size :][:size]
    key = jax.random.fold_in(jax.random.key(self._cell["seed"]), number)
    params = self._state.average_params
    regime.solver(params, key, problems[:1])
    start = time.monotonic()
    searched = regime.solver(params, key, problems)
    verdicts = [self._context.judge(one) for one in searched]
    scored = scoring.score(
      self._context.task, searched, verdicts, number, relabels=False
    )
    self._experience.add(scored)
    self._rng = np.random.default_rng([self._cell["seed"], 1 + number])
    self._decks, _, _ = regime.fresh_rows.decks(
      self._state,
      searched,
      verdicts,
      self._experience,
      rollouts.moving_from(None),
      self._rng,
      number,
    )
    seconds = time.monotonic() - start
    self._found = scored
    self._tokens = np.mean([one.cost["generated_tokens"] for one in searched])
    # Compiles; an update donates its state, so on a copy.
    regime.update_fn(jax.tree.map(jnp.copy, self._state), self._batches())
    return seconds

  def _batches(self):
    batches, _ = self._regime.learn_rows.batches(
      self._rng, self._experience, learner.UPDATES_PER_CALL, self._decks
    )
    return batches

  def describe(self) -> dict[str, float]:
    """Noise, memory, and what of D_search is used; before any update."""
    regime, trained = self._regime, self._context.trained
    # Of the policy alone: all methods fit the value alike.
    objective = dataclasses.replace(regime.objective, value_coefficient=0.0)
    gradient = update.make_gradient(
      regime_parts.log_probs_of(trained.policy, objective),
      objective=objective,
      mesh=trained.mesh,
    )
    found = []
    while len(found) < NUM_GRADIENTS:
      batches = self._batches()
      for i in range(learner.UPDATES_PER_CALL):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        found.append(np.asarray(gradient(self._state.params, batch)))
    found = np.array(found[:NUM_GRADIENTS], np.float64)
    mean = found.mean(0)
    variance = np.square(found - mean).sum() / (NUM_GRADIENTS - 1)
    # The squared length of the mean has a share of the variance in it.
    signal = np.square(mean).sum() - variance / NUM_GRADIENTS
    compiled = regime.update_fn.lower(self._state, self._batches()).compile()
    return {
      "noise": variance / max(signal, 1e-12),
      "bytes": compiled.memory_analysis().temp_size_in_bytes,
      "used_share": self._used_share(),
      "tokens": self._tokens,
    }

  def _used_share(self) -> float:
    """Share of the solutions found that have a weight in some row."""
    mix = self._regime.config.learn.rows
    if "policy_gradient" in mix:
      count = len(self._decks["policy_gradient"])
    elif "pairs" in mix:
      rows = self._decks["pairs"].rows
      pairs = zip(rows.tokens.reshape(-1, rows.tokens.shape[2]), strict=True)
      count = len({row.tobytes() for (row,) in pairs})
    elif "expert" in mix:
      count = len(self._experience.d_expert)
    else:
      count = sum(bool(entry.step_weights.any()) for entry in self._found)
    return count / max(len(self._found), 1)

  def learn(self, num_updates: int) -> float:
    """Makes updates; returns the seconds."""
    start = time.monotonic()
    self._state = learner.learn(
      self._regime.update_fn, self._state, self._batches, num_updates
    )
    return time.monotonic() - start

  def greedy(self) -> list[float]:
    """Whether each held-out problem is solved greedily."""
    params = self._context.trained.params
    if self._state is not None:
      params = self._state.average_params
    searched = self._greedy(params, jax.random.key(0), self._context.problems)
    return [
      float(bool(verdicts) and verdicts[0].is_correct)
      for verdicts in map(self._context.judge, searched)
    ]


class Row(NamedTuple):
  """A line of the table.

  Attributes:
    name: of the sequence.
    num_seeds: seeds it was measured with.
    first: accuracy after the first round, with its interval.
    last: accuracy at the end, with its interval.
    gain: the last less the start, with its interval.
    seconds: searching and learning, mean over the seeds.
    noise: of the gradient, median over the seeds.
    megabytes: of the update.
    used: share of D_search with a weight.
  """

  name: str
  num_seeds: int
  first: tuple[float, float, float]
  last: tuple[float, float, float]
  gain: tuple[float, float, float]
  seconds: float
  noise: float
  megabytes: float
  used: float


def summarize(measured: Sequence[Measured]) -> list[Row]:
  """The rows of the table."""
  rows = []
  for (name,), group in by_setting(measured, ("name",)).items():
    curve = _curve(group)
    results = [one.result for one in group]
    middle = (len(curve) - 1) // NUM_ROUNDS
    rows.append(
      Row(
        name,
        len(group),
        estimate(curve[middle]),
        estimate(curve[-1]),
        estimate(curve[-1] - curve[0]),
        float(np.mean([r["seconds"][-1] for r in results])),
        float(np.median([r["noise"] for r in results])),
        float(np.mean([r["bytes"] for r in results])) / 2**20,
        float(np.mean([r["used_share"] for r in results])),
      )
    )
  return rows


def _curve(group: Sequence[Measured]) -> np.ndarray:
  """Share of the seeds that solve each problem: `[evaluations, B]`."""
  return np.mean([one.result["correct"] for one in group], axis=0)


def make_table(measured: Sequence[Measured]) -> str:
  """One row a sequence of methods."""
  head = (
    "method",
    "seeds",
    "after round 1",
    "after round 2",
    "gain",
    "seconds",
    "noise",
    "MiB",
    "D_search used",
  )
  rows = [
    (
      row.name,
      str(row.num_seeds),
      percent(*row.first),
      percent(*row.last),
      percent(*row.gain, sign="+"),
      f"{row.seconds:.1f}",
      f"{row.noise:.1f}",
      f"{row.megabytes:.0f}",
      f"{row.used:.0%}",
    )
    for row in summarize(measured)
  ]
  return markdown_table(head, rows)


def draw(measured: Sequence[Measured]) -> drawing.Drawing | None:
  """Accuracy against updates."""
  series = []
  groups = by_setting(measured, ("name",))
  for color, ((name,), group) in enumerate(groups.items()):
    curve = _curve(group)
    updates = group[0].result["updates"]
    estimates = [estimate(values) for values in curve]
    points = [(x, e[0]) for x, e in zip(updates, estimates, strict=True)]
    label = name.replace("_", " ")
    series.append(
      drawing.Series(label, points, [e[1:] for e in estimates], color)
    )
  if not series:
    return None
  return drawing.draw_lines(
    series,
    title="Learning from the same searches",
    x_title="updates",
    is_percent=True,
    height=420,
  )


def note(context: Context) -> str:
  """How the start and the D_search are made."""
  del context
  return (
    "two rounds of search and learning; accuracy is that of greedy decoding"
  )


STUDY = Study(
  "learning", "1", make_cells, check, measure, make_table, draw, note
)
