"""What reasoning behaviours in the texts of a policy are worth, measured.

Four policies begin as the same one and are tuned on as many tokens of other
texts, each written on training problems: solutions in plain steps (`plain`);
long thoughts that show the six behaviours of Zeng et al., arXiv 2412.14135,
Section 3.3 (`six`); the same with a wrong answer (`wrong`); and the policy's
own search trees as one text each (`linearized`). The first three then learn by
PPO from as many tokens of their own, rewarded by the checker.

Before, between and after, each answers held-out problems greedily, in one text
of as many tokens as it likes up to a limit that is the same for all. Texts are
judged by their last solution and read by the meter of o1jax/behaviors.py; so
are those about problems of other tasks, which nothing was tuned on. The chain
of `linearized` is compared with tree search and best-of-N by value of the
policy that it began as, within the tokens that the chains take.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from o1jax import behaviors, drawing, regime_parts, rollouts
from o1jax import mesh as mesh_lib
from o1jax.encoding import Policy
from o1jax.experience import Experience, make_learner_batch
from o1jax.fresh_rows import MAX_DEAD_ENDS
from o1jax.learned_texts import demonstration
from o1jax.learning import update
from o1jax.learning.objective import Objective
from o1jax.learning.optimizer import Optimizer, make_optimizer
from o1jax.linearize import linearized
from o1jax.solver import Solver
from o1jax.studies import learner, search
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
from o1jax.tasks import TASKS, make_task, task
from o1jax.types import LearnerBatch, Problem

LINEARIZED = "linearized"
# A policy -> demonstrations that it is tuned on, the first that the task has.
DEMONSTRATIONS: Mapping[str, tuple[str, ...]] = {
  "plain": ("hindsight", "optimal"),
  "six": ("long_thought",),
  "wrong": ("long_thought_wrong",),
}
NAMES = (*DEMONSTRATIONS, LINEARIZED)
STAGES = ("start", "tuned", "reinforced")
# Policies whose accuracies are compared.
COMPARED = (("six", "plain"), ("wrong", "six"), (LINEARIZED, "plain"))
# A failed check is answered by one of these right after it.
_ANSWERS = ("self_correction", "alternative_proposal")
# By value, with the tokens of the chains.
_SEARCHES = ("mcts", "best_of_n")

_TUNING = {
  "name": "muon",
  "learning_rate": 4e-3,
  "warmup_updates": 20,
  "schedule": "cosine",
}
_REINFORCING = {"learning_rate": 1e-4, "warmup_updates": 10}
# Fields of a config by which a policy learns from its own texts. Rows without
# an advantage stay: where few are left, ten updates go over these many times.
_PPO = (
  "search.strategy=best_of_n",
  "search.reward=value",
  "search.temperature=1.0",
  "search.num_candidates={draws}",
  "search.num_expansions=1",
  "search.num_simulations=1",
  "search.batch_size={problems}",
  "learn.rows.policy_gradient={rows}",
  "learn.policy_gradient.loss=ppo",
  "learn.advantages.truncated=wrong",
  "learn.advantages.skips_flat=False",
  "learn.value_coefficient=0.0",
  "learn.average_decay=0.9",
  "learn.num_microbatches=1",
  f"learn.updates_per_call={learner.UPDATES_PER_CALL}",
)
# Texts that lengths are told by, and room for longer ones.
_NUM_TRIED, _SLACK = 256, 1.1
# Of the trees that are linearised, in solutions.
_TREE_EFFORT = 8

Pairs = list[tuple[Problem, str]]


def make_cells(context: Context, num_seeds: int) -> list[Cell]:
  """Every policy with every seed."""
  del context
  return [
    {
      "name": name,
      "seed": seed,
      "num_updates": 500,
      "num_tokens": 5000,
      "num_rounds": 8,
      "num_round_updates": 10,
      "num_round_tokens": 24_000,
      "num_draws": 8,
      "num_trees": 2048,
      "num_others": 64,
    }
    for seed in range(num_seeds)
    for name in NAMES
  ]


def check(context: Context, cell: Cell) -> None:
  """Refuses a task without long thoughts, and a config that does not fit."""
  kinds = context.task.demonstration_kinds
  for wanted in DEMONSTRATIONS.values():
    if not set(wanted) & set(kinds):
      raise ValueError(
        f"task {context.task.name} has no demonstrations of kind {wanted[-1]}: "
        "take the workdir of a run whose task has, as countdown"
      )
  for name in ("num_updates", "num_round_updates"):
    if cell[name] < 1 or cell[name] % learner.UPDATES_PER_CALL:
      raise ValueError(
        f"{name}={cell[name]} must be a multiple of {learner.UPDATES_PER_CALL}"
      )
  trained = context.trained
  ways = mesh_lib.batch_ways(trained.mesh)
  optimizer = make_optimizer(**_REINFORCING)
  _ppo_regime(context, cell, trained.policy, ways, optimizer)


def _ppo_regime(
  context: Context,
  cell: Cell,
  policy: Policy,
  num_rows: int,
  optimizer: Optimizer,
) -> regime_parts.Regime:
  """How a policy learns from its own texts; nothing compiles yet."""
  trained = context.trained
  ways = mesh_lib.batch_ways(trained.mesh)
  numbers = {
    "draws": cell["num_draws"],
    "rows": num_rows,
    "problems": ways * math.ceil(16 / ways),
  }
  changes = [change.format(**numbers) for change in _PPO]
  config = learner.changed_config(trained.config, changes)
  regimes = regime_parts.make_regimes(
    {"ppo": config}, trained.task, policy, optimizer, trained.mesh
  )
  return regimes["ppo"]


def measure(context: Context, cell: Cell) -> dict[str, Any]:
  """Tunes a policy, reinforces it, and reads it at each stage.

  Returns:
    `tasks`, the own one first; for each of them lists with one entry a stage
    and problem, `correct/TASK`, `tokens/TASK`, `cut/TASK` (off, at the limit),
    `failed/TASK` (checks that found something wrong), `answered/TASK` (such as
    a correction or another way follows) and `counts/TASK`, with one more axis
    for `behaviors.COUNTED`. Then `learned`, tokens tuned on; `text_tokens` of
    each of these texts, on average; `sampled`, tokens reinforced by; `right`,
    the share of right draws in each round of that; `seconds` of both,
    compilation among them; and of `linearized` for each other search
    `correct/SEARCH` and `tokens/SEARCH` a problem.
  """
  run = _Run(context, cell)
  stages = [run.read()]
  run.tune()
  stages.append(run.read())
  if cell["name"] != LINEARIZED:
    run.reinforce()
    stages.append(run.read())
  result = {name: [stage[name] for stage in stages] for name in stages[0]}
  result |= run.costs()
  if cell["name"] == LINEARIZED:
    chains = np.mean(stages[-1][f"tokens/{context.task.name}"])
    effort = round(chains / context.tokens_per_solution(search.NUM_MEASURED))
    for name in _SEARCHES:
      found = search.measure(
        context,
        {
          "name": name,
          "effort": max(effort, 1),
          "seed": cell["seed"],
          "reward": "value",
          "temperature": context.evaluation["temperature"],
          **_search_options(context, name, max(effort, 1)),
        },
      )
      result[f"correct/{name}"] = found["selected"]
      result[f"tokens/{name}"] = found["generated_tokens"]
  return result


def _search_options(context: Context, name: str, effort: int) -> dict[str, Any]:
  """Options of `Solver` as the study of search has them."""
  strategy, sized = search.VARIANTS[name]
  num_steps = context.trained.policy.lengths.num_steps
  return {"strategy": strategy, **sized(effort, num_steps)}


class _Run:
  """A policy that is tuned, and then learns from its own texts."""

  def __init__(self, context: Context, cell: Cell):
    trained = context.trained
    self._context, self._cell, self._trained = context, cell, trained
    self._params = trained.params
    self._rng = np.random.default_rng([cell["seed"], 0])
    self._learned = self._sampled = 0
    self._seconds = 0.0
    self._right: list[float] = []
    others = [
      make_task(name) for name in sorted({*TASKS} - {trained.task.name})
    ]
    self._asked = [(trained.task, context.problems)] + [
      (other, other.heldout_problems(cell["num_others"])) for other in others
    ]
    encode = trained.policy.tokenizer.encode
    prompt = max(
      len(encode(problem.prompt))
      for _, problems in self._asked
      for problem in problems
    )
    self._prompt = max(prompt, trained.policy.lengths.prompt_tokens)
    thoughts = [
      pair
      for asked, _ in self._asked
      if "long_thought" in asked.demonstration_kinds
      for pair in asked.demonstrations(
        "long_thought", np.random.default_rng(0), _NUM_TRIED
      )
    ]
    self._greedy = Solver(
      self._with_room(_longest(trained.policy, thoughts)),
      strategy="greedy",
      task=trained.task,
      mesh=trained.mesh,
      batch_size=context.batch_size,
    )
    self._draw_texts: Callable[[int], Pairs] | None = None

  def _with_room(self, longest: int) -> Policy:
    """The policy where a solution is one text, not much above the longest."""
    policy, room = self._trained.policy, math.ceil(_SLACK * longest)
    lengths = policy.lengths._replace(
      prompt_tokens=self._prompt,
      step_tokens=room,
      num_steps=1,
      row_tokens=self._prompt + room,
      reflection_tokens=0,
      thinking_tokens=0,
    )
    return dataclasses.replace(policy, lengths=lengths)

  def read(self) -> dict[str, list]:
    """Answers all problems greedily; see `measure`."""
    found: dict[str, list] = {}
    for asked, problems in self._asked:
      texts = [
        _read(asked, one)
        for one in self._greedy(self._params, jax.random.key(0), problems)
      ]
      for name in _Text._fields:
        found[f"{name}/{asked.name}"] = [getattr(t, name) for t in texts]
    return found

  def tune(self) -> None:
    """Clones texts of the policy's kind."""
    self._prepare()
    objective = Objective(value_coefficient=0.0)
    # The decay has to begin behind the rise.
    total = max(self._cell["num_updates"], _TUNING["warmup_updates"] + 1)
    optimizer = make_optimizer(**_TUNING, total_updates=total)
    update_fn = update.make_updates(
      regime_parts.log_probs_of(self._own, objective),
      optimizer,
      objective=objective,
      average_decay=0.99,
      mesh=self._trained.mesh,
    )
    state = update.make_state(self._params, optimizer, self._trained.mesh)
    start = time.monotonic()
    state = learner.learn(
      update_fn, state, self._text_batches, self._cell["num_updates"]
    )
    self._params = state.average_params
    self._seconds += time.monotonic() - start

  def _prepare(self) -> None:
    """What the texts are, how long, and how many of them are a batch."""
    name, task_ = self._cell["name"], self._trained.task
    if name == LINEARIZED:
      texts = self._linearized()
      self._draw_texts = lambda n: [
        texts[i] for i in self._rng.integers(0, len(texts), n)
      ]
    else:
      kinds = DEMONSTRATIONS[name]
      kind = next(k for k in kinds if k in task_.demonstration_kinds)
      self._draw_texts = lambda n: task_.demonstrations(kind, self._rng, n)
    tried = self._draw_texts(_NUM_TRIED)
    policy = self._trained.policy
    self._own = self._with_room(_longest(policy, tried))
    tokens = [len(policy.encode_solution(text)) for _, text in tried]
    self._text_tokens = float(np.mean(tokens))
    # As many tokens an update whatever the texts are.
    ways = mesh_lib.batch_ways(self._trained.mesh)
    count = self._cell["num_tokens"] / self._text_tokens / ways
    self._num_rows = ways * max(1, round(count))

  def _linearized(self) -> Pairs:
    """Trees of the policy on training problems as texts, where one is right."""
    cell, context = self._cell, self._context
    problems = self._trained.task.sample_problems(self._rng, cell["num_trees"])
    options = _search_options(context, "mcts", _TREE_EFFORT)
    tokens = _TREE_EFFORT * context.tokens_per_solution(search.NUM_MEASURED)
    more = options["options"] | {"max_tokens": math.ceil(tokens)}
    solver = context.solver(options | {"reward": "checker", "options": more})
    key = jax.random.key(cell["seed"])
    trees = solver(self._params, key, problems)
    texts = linearized(trees, context.judge, max_dead_ends=MAX_DEAD_ENDS)
    if not texts:
      raise ValueError(
        f"none of the {len(trees)} trees holds a right solution: take a policy "
        "that solves some problems"
      )
    return texts

  def _text_batches(self) -> LearnerBatch:
    """Batches of the next texts, `[UPDATES_PER_CALL, rows, T]`."""
    policy, count = self._own, learner.UPDATES_PER_CALL * self._num_rows
    pairs = self._draw_texts(count)
    # Plays of the same numbers come one after another.
    pairs = [pairs[i] for i in self._rng.permutation(count)]
    encode = policy.tokenizer.encode_batch
    prompts = [np.array(ids) for ids in encode([p.prompt for p, _ in pairs])]
    entries = [
      demonstration(policy, *pair, ids)
      for pair, ids in zip(pairs, encode([t for _, t in pairs]), strict=True)
    ]
    batch, _ = make_learner_batch(
      prompts,
      entries,
      length=policy.lengths.row_tokens,
      policy_weights="ones",
      value_positions="none",
      pad_id=policy.tokenizer.pad_id,
    )
    self._learned += int(np.count_nonzero(batch.policy_weights))
    return jax.tree.map(
      lambda x: x.reshape(learner.UPDATES_PER_CALL, -1, *x.shape[1:]), batch
    )

  def reinforce(self) -> None:
    """Learns from draws of the policy, round after round."""
    cell, trained = self._cell, self._trained
    optimizer = make_optimizer(**_REINFORCING)
    regime = _ppo_regime(
      self._context, cell, self._own, self._num_rows, optimizer
    )
    state = update.make_state(self._params, optimizer, trained.mesh)
    # Rows of draws do not come from what was kept.
    nothing = Experience(
      max_search=1,
      max_hindsight=0,
      max_demonstrations=0,
      max_expert_per_problem=1,
    )
    start = time.monotonic()
    for number in range(cell["num_rounds"]):
      searched = self._draws(regime.solver, state.average_params, number)
      decks, _, numbers = regime.fresh_rows.decks(
        state,
        searched,
        [self._context.judge(one) for one in searched],
        nothing,
        rollouts.moving_from(None),
        self._rng,
        number,
      )
      self._right.append(numbers["learn/mean_reward"])
      draw = functools.partial(
        regime.learn_rows.batches,
        self._rng,
        nothing,
        learner.UPDATES_PER_CALL,
        decks,
      )
      state = learner.learn(
        regime.update_fn,
        state,
        lambda d=draw: d()[0],
        cell["num_round_updates"],
      )
    self._params = state.average_params
    self._seconds += time.monotonic() - start

  def _draws(self, solver: Solver, params: Any, number: int) -> list:
    """Draws of a round, of as many problems as its tokens pay for."""
    key = jax.random.fold_in(jax.random.key(self._cell["seed"]), number)
    searched, spent = [], 0
    while spent < self._cell["num_round_tokens"]:
      problems = self._trained.task.sample_problems(
        self._rng, solver.batch_size
      )
      key, draw_key = jax.random.split(key)
      found = solver(params, draw_key, problems)
      spent += sum(one.cost["generated_tokens"] for one in found)
      searched += found
    self._sampled += spent
    return searched

  def costs(self) -> dict[str, Any]:
    """What was learned from; see `measure`."""
    return {
      "tasks": [asked.name for asked, _ in self._asked],
      "learned": self._learned,
      "text_tokens": self._text_tokens,
      "sampled": self._sampled,
      "right": self._right,
      "seconds": self._seconds,
    }


def _longest(policy: Policy, pairs: Pairs) -> int:
  """Tokens of the longest of some texts."""
  return max(len(policy.encode_solution(text)) for _, text in pairs)


class _Text(NamedTuple):
  """What is read of a greedy text; see `measure`."""

  correct: bool
  tokens: int
  cut: bool
  failed: int
  answered: int
  counts: list[int]


def _read(asked: task.Task, searched: Any) -> _Text:
  (solution,) = searched.solutions
  text = solution.text
  verdict = asked.check(searched.problem, asked.final_solution(text))
  events = behaviors.find_behaviors(text)
  followed = [
    after.behavior in _ANSWERS
    for event, after in zip(events, events[1:], strict=False)
    if event.is_failed
  ]
  counts = behaviors.count_behaviors(text)
  return _Text(
    correct=solution.is_finished and verdict.is_correct,
    tokens=searched.cost["generated_tokens"],
    cut=not solution.is_finished,
    failed=sum(event.is_failed for event in events),
    answered=sum(followed),
    counts=[counts[name] for name in behaviors.COUNTED],
  )


class Row(NamedTuple):
  """A line of the first table: a policy at a stage on problems of a task.

  Attributes:
    task: of the problems.
    name: of the policy.
    stage: one of `STAGES`.
    num_seeds: seeds it was measured with.
    accuracy: with its interval, `(mean, low, high)`.
    tokens: of a text, mean.
    cut: share of the texts that were cut off.
    answered: share of the failed checks that something was done about; None
      where no check failed.
    counts: of each of `behaviors.COUNTED` in a text, means.
  """

  task: str
  name: str
  stage: str
  num_seeds: int
  accuracy: tuple[float, float, float]
  tokens: float
  cut: float
  answered: float | None
  counts: tuple[float, ...]


def summarize(measured: Sequence[Measured]) -> list[Row]:
  """The rows of the first table, the own task's problems first."""
  rows = []
  groups = by_setting(measured, ("name",))
  tasks = measured[0].result["tasks"] if measured else ()
  for asked in tasks:
    for (name,), group in groups.items():
      correct = _mean(group, f"correct/{asked}")
      failed = _mean(group, f"failed/{asked}").sum(1)
      answered = _mean(group, f"answered/{asked}").sum(1)
      for i, stage in enumerate(STAGES[: len(correct)]):
        rows.append(
          Row(
            asked,
            name,
            stage,
            len(group),
            estimate(correct[i]),
            float(_mean(group, f"tokens/{asked}")[i].mean()),
            float(_mean(group, f"cut/{asked}")[i].mean()),
            float(answered[i] / failed[i]) if failed[i] else None,
            tuple(_mean(group, f"counts/{asked}")[i].mean(0).tolist()),
          )
        )
  return rows


def _mean(group: Sequence[Measured], name: str) -> np.ndarray:
  """Mean over the seeds: `[stages, B]` or `[B]`."""
  return np.mean([np.asarray(one.result[name], float) for one in group], axis=0)


class Gap(NamedTuple):
  """A line of the second table: what one policy is ahead of another.

  Attributes:
    name, other: of the policies.
    task: of the problems.
    stage: at which both are.
    gap: in accuracy, problem by problem, with its interval.
  """

  name: str
  other: str
  task: str
  stage: str
  gap: tuple[float, float, float]


def compare(measured: Sequence[Measured]) -> list[Gap]:
  """The rows of the second table."""
  gaps = []
  groups = by_setting(measured, ("name",))
  for name, other in COMPARED:
    pair = [groups[(n,)] for n in (name, other) if (n,) in groups]
    if len(pair) < 2:
      continue
    for asked in measured[0].result["tasks"]:
      first, second = (_mean(group, f"correct/{asked}") for group in pair)
      for i, stage in list(enumerate(STAGES[: len(first)]))[1:]:
        gap = estimate(first[i] - second[i])
        gaps.append(Gap(name, other, asked, stage, gap))
  return gaps


def make_table(measured: Sequence[Measured]) -> str:
  """Four tables: policies, their differences, chains and trees, costs."""
  short = [name.replace("_", " ") for name in behaviors.COUNTED]
  head = ("problems", "policy", "stage", "seeds", "accuracy", "tokens")
  head = (*head, "cut off", "failed checks answered", *short)
  rows = [
    (
      row.task,
      row.name,
      row.stage,
      str(row.num_seeds),
      percent(*row.accuracy),
      f"{row.tokens:.1f}",
      f"{row.cut:.0%}",
      "-" if row.answered is None else f"{row.answered:.0%}",
      *(f"{count:.2f}" for count in row.counts),
    )
    for row in summarize(measured)
  ]
  tables = [markdown_table(head, rows, num_left=3)]
  if gaps := compare(measured):
    head = ("problems", "policy", "less", "stage", "accuracy")
    rows = [
      (gap.task, gap.name, gap.other, gap.stage, percent(*gap.gap, sign="+"))
      for gap in gaps
    ]
    tables.append(markdown_table(head, rows, num_left=4))
  groups = by_setting(measured, ("name",))
  if (LINEARIZED,) in groups:
    tables.append(_chain_table(groups[(LINEARIZED,)]))
  head = ("policy", "tokens of a text", "tuned on", "reinforced by", "seconds")
  head = (*head, "right draws, first round", "last round")
  rows = []
  for (name,), group in groups.items():
    numbers = ("text_tokens", "learned", "sampled", "seconds")
    right = _mean(group, "right")
    ends = [f"{share:.1%}" for share in right[[0, -1]]] if len(right) else "--"
    rows.append((name, *(f"{_mean(group, n):.0f}" for n in numbers), *ends))
  tables.append(markdown_table(head, rows))
  return "\n\n".join(tables)


def _chain_table(group: Sequence[Measured]) -> str:
  """Chains of the policy tuned on trees against searches by value."""
  own = group[0].result["tasks"][0]
  chain = _mean(group, f"correct/{own}")[-1]
  rows = [("chain", chain, _mean(group, f"tokens/{own}")[-1])]
  rows += [
    (name, _mean(group, f"correct/{name}"), _mean(group, f"tokens/{name}"))
    for name in _SEARCHES
  ]
  return markdown_table(
    ("linearized, or the start's search", "accuracy", "less chain", "tokens"),
    [
      (
        name,
        percent(*estimate(correct)),
        percent(*estimate(correct - chain), sign="+") if i else "-",
        f"{tokens.mean():.1f}",
      )
      for i, (name, correct, tokens) in enumerate(rows)
    ],
  )


def draw(measured: Sequence[Measured]) -> drawing.Drawing | None:
  """Accuracy on the own task at each stage."""
  rows = summarize(measured)
  series = []
  for color, name in enumerate(NAMES):
    own = [r for r in rows if r.name == name and r.task == rows[0].task]
    if own:
      series.append(
        drawing.Series(
          name,
          [(float(i), row.accuracy[0]) for i, row in enumerate(own)],
          [row.accuracy[1:] for row in own],
          color,
        )
      )
  if not series:
    return None
  return drawing.draw_lines(
    series,
    title="Accuracy of one greedy text",
    x_title="stage: 0 before tuning, 1 after it, 2 after reinforcement",
    is_percent=True,
    height=420,
  )


def note(context: Context) -> str:
  """What the rows of the table are."""
  del context
  return (
    "Greedy texts; behaviours are counts a text, failed checks are answered by"
    " a correction or another way right after them."
  )


STUDY = Study(
  "behaviors", "1", make_cells, check, measure, make_table, draw, note
)
