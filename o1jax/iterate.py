"""The loop: search with the policy, learn from what search found, repeat.

Sections 5 to 7 of the paper (arXiv 2412.14135), in the manner of AlphaGo Zero:

  initialize  the policy learns the form of the task from demonstrations
  search      tree search looks for solutions of new problems
  score       the checker judges each; failures may be relabelled with what
              they do reach (hindsight)
  learn       the policy learns from D_search and D_expert
  evaluate    greedy decoding, and every strategy at intervals

Only the train state, the experience and the number of the iteration survive an
iteration; all randomness derives from the seed and that number. So a run that
was killed and started again with the same command ends with the same bits.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from o1jax import (
  build,
  evaluation,
  fields,
  health,
  jsonl,
  load,
  metrics,
  regime_parts,
  regimes,
  report,
  rollouts,
  scoring,
  tasks,
)
from o1jax import config as config_lib
from o1jax.build import Parts
from o1jax.checkpoint import Checkpoints
from o1jax.corpora import TextFiles
from o1jax.experience import Experience
from o1jax.learning import update
from o1jax.learning.baselines import MovingBaseline
from o1jax.question_generator import QuestionGenerator
from o1jax.regime_parts import Regime
from o1jax.regimes import RegimeState
from o1jax.rows import DEMONSTRATIONS as DEMONSTRATION_KINDS
from o1jax.search.tree import ROOT
from o1jax.searched import (
  Searched,
  tree_record,
)
from o1jax.tasks.task import Task
from o1jax.types import Problem, ScoredSolution, Verdict

# The rows of one call of the update, and how many were dropped.
BatchesFn = Callable[[], tuple[Any, int]]

# Streams of randomness within an iteration.
PROBLEMS, ROWS, DEMONSTRATIONS = 0, 1, 2

# Demonstrations of a kind whose rate of success is measured.
NUM_DEMONSTRATIONS = 512

# Trees of an iteration whose steps are checked for legality.
NUM_AUDITED = 32
# Rows of an update that failed.
UNHEALTHY = "unhealthy_batch.npz"
# Trees of an iteration that are written out.
NUM_TREES = 4

# Column of the table on the terminal -> metric.
SHOWN = (
  ("greedy", "eval/greedy_accuracy"),
  ("thinking", "eval/thinking_accuracy"),
  ("solved", "search/solved"),
  ("correct", "search/correct"),
  ("illegal", "search/illegal_steps"),
  ("policy_loss", "learn/policy_loss"),
  ("value_loss", "learn/value_loss"),
  ("seconds", "seconds"),
)
COLUMNS = (
  ("iteration", "d"),
  ("phase", ">10"),
  ("greedy", ".1%"),
  ("thinking", ".1%"),
  ("solved", ".1%"),
  ("correct", ".1f"),
  ("illegal", ".1%"),
  ("policy_loss", ".3f"),
  ("value_loss", ".3f"),
  ("seconds", ".1f"),
)


def run(
  config: Any, workdir: str | pathlib.Path, *, profile: bool = False
) -> update.TrainState:
  """Runs or resumes a config in its workdir.

  Args:
    config: resolved config; see configs/countdown.py for its fields.
    workdir: made if needed; holds all that the run writes.
    profile: write a profiler trace of the second iteration of this process.

  Returns:
    The train state at the end.

  Raises:
    UserError: a field, the workdir, a checkpoint or a file of texts does not
      fit.
  """
  workdir = pathlib.Path(workdir)
  fields.check_fields(config)
  config_lib.check_workdir(workdir, config)
  parts = build.build(config, workdir, build.start_devices(config))
  # Claimed by a config that is known to work. Texts are drawn from to the end.
  texts = TextFiles(**config.texts).paths()
  config_lib.open_workdir(workdir, config, texts)
  build.keep_tokenizer(parts.policy.tokenizer, workdir)
  with config_lib.writing(workdir), contextlib.ExitStack() as stack:
    for regime in parts.regimes.values():
      stack.enter_context(contextlib.closing(regime.solver))
    with contextlib.closing(RunWriter(workdir, config)) as writer:
      # Held by the loop alone: what it replaces on the device is freed.
      state = loop(
        config, parts, writer, restore(config, parts, writer), profile
      )
    # Also where the run was killed between its last save and the report.
    report.write_report(workdir)
  return state


@dataclasses.dataclass(frozen=True)
class Progress:
  """All that survives an iteration.

  Attributes:
    state: of the trainer.
    experience: what was found.
    regime: where the run stands in its schedule.
    moving: baseline of the iterations before.
    questions: what chooses the problems, with what it has learned.
    iteration: number of the present one.
  """

  state: update.TrainState
  experience: Experience
  regime: RegimeState
  moving: MovingBaseline
  questions: QuestionGenerator | None
  iteration: int


def loop(
  config: Any,
  parts: Parts,
  writer: "RunWriter",
  progress: Progress,
  profile: bool,
) -> update.TrainState:
  """The iterations that are left; each learns, is evaluated and written."""
  _, loop_key = run_keys(config)
  num_initial = config.initialize.num_iterations
  first, last = progress.iteration, num_initial + config.num_iterations
  history = writer.last_rows(parts.limits)
  for iteration in metrics.progress(range(first, last), "run", last - first):
    progress = dataclasses.replace(progress, iteration=iteration)
    is_initial = iteration < num_initial
    with traced(writer.workdir, profile and iteration == first + 1):
      clock = metrics.Clock()
      key = jax.random.fold_in(loop_key, iteration)
      search_key, evaluation_key = jax.random.split(key)
      if is_initial:
        progress, values = initialize(config, parts, writer, progress)
      else:
        progress = with_reference(parts, progress)
        progress, values = search_and_learn(
          config, parts, writer, progress, search_key, clock
        )
      values["learn_seconds"] = clock.lap()
      rows = evaluate(
        config, parts, progress.state, evaluation_key, iteration, last
      )
      values |= flatten_rows(rows)
      values["evaluate_seconds"] = clock.lap()
    if not is_initial:
      accuracy = values["eval/greedy_accuracy"]
      progress, change = advance(parts, progress, accuracy)
      values |= change
    values["compile_seconds"] = clock.compilation()
    values["seconds"] = clock.total()
    phase = "initialize" if is_initial else "iteration"
    history.append(writer.row(phase, iteration, values, rows))
    with config_lib.user_input():
      health.check(history[-parts.limits.patience :], parts.limits)
    if (
      iteration == last - 1 or (iteration + 1) % config.checkpoint.interval == 0
    ):
      writer.checkpoint(progress, values)
  return progress.state


def initialize(
  config: Any, parts: Parts, writer: "RunWriter", progress: Progress
) -> tuple[Progress, dict[str, Any]]:
  """Learns from demonstrations, by the objective of the first regime.

  Returns:
    What survives, and numbers.
  """
  values = demonstration_metrics(config, parts, progress.iteration)
  progress, learned = learn(
    progress,
    present_regime(parts, progress).update_fn,
    functools.partial(
      parts.initialize_rows.batches,
      stream(config, progress.iteration, ROWS),
      progress.experience,
      config.learn.updates_per_call,
    ),
    config.initialize.num_updates // config.learn.updates_per_call,
    writer.workdir / UNHEALTHY,
  )
  return progress, values | learned


def search_and_learn(
  config: Any,
  parts: Parts,
  writer: "RunWriter",
  progress: Progress,
  key: jax.Array,
  clock: metrics.Clock,
) -> tuple[Progress, dict[str, Any]]:
  """Searches, scores what was found, and learns, all by the present regime.

  Returns:
    What survives, and numbers; the time to the last update is left on the
    clock.
  """
  iteration, experience = progress.iteration, progress.experience
  regime = present_regime(parts, progress)
  searched, verdicts, values = search(config, parts, progress, key)
  scored = scoring.score(
    parts.task, searched, verdicts, iteration, relabels=regime.relabels
  )
  values |= search_metrics(parts, searched, scored)
  experience.add(scored)
  writer.samples(iteration, searched, scored)
  rng = stream(config, iteration, ROWS)
  decks, moving, numbers = regime.fresh_rows.decks(
    progress.state,
    searched,
    verdicts,
    experience,
    progress.moving,
    rng,
    iteration,
  )
  values |= numbers
  values["search_seconds"] = clock.lap()
  per_call = config.learn.updates_per_call
  progress, learned = learn(
    dataclasses.replace(progress, moving=moving),
    regime.update_fn,
    functools.partial(
      regime.learn_rows.batches, rng, experience, per_call, decks
    ),
    config.learn.num_updates // per_call,
    writer.workdir / UNHEALTHY,
  )
  return progress, values | learned


def present_regime(parts: Parts, progress: Progress) -> Regime:
  """The regime that the iteration searches and learns by."""
  return parts.regimes[parts.schedule.name(progress.regime)]


def with_reference(parts: Parts, progress: Progress) -> Progress:
  """A new reference, where the regime asks for one now."""
  kept = present_regime(parts, progress).config.learn.reference
  is_due = kept == "iteration" or (
    kept == "start" and not progress.regime.num_iterations
  )
  if not is_due:
    return progress
  state = update.with_reference(progress.state)
  return dataclasses.replace(progress, state=state)


def advance(
  parts: Parts, progress: Progress, accuracy: float
) -> tuple[Progress, dict[str, Any]]:
  """Counts the iteration of its regime, and changes to the next where it ends.

  Returns:
    What survives, and for the log the regime and why it changed, if it did.
  """
  change: dict[str, Any] = {"regime": progress.regime.index}
  standing, reason = regimes.advance(
    parts.schedule, progress.regime, accuracy, iteration=progress.iteration
  )
  if reason:
    change["regime_change"] = reason
    print(reason, flush=True)
  return dataclasses.replace(progress, regime=standing), change


def run_keys(config: Any) -> tuple[jax.Array, jax.Array]:
  """Key of the first parameters, and the key that iterations fold into."""
  first, iterations = jax.random.split(jax.random.key(config.seed))
  return first, iterations


def stream(config: Any, iteration: int, name: int) -> np.random.Generator:
  """Generator of one purpose in one iteration."""
  return np.random.default_rng([config.seed, iteration, name])


def restore(config: Any, parts: Parts, writer: "RunWriter") -> Progress:
  """What the run begins or goes on with, from the workdir."""
  params = first_params(config, parts)
  state = update.make_state(
    params,
    parts.optimizer,
    parts.mesh,
    has_reference=regime_parts.has_reference(config),
  )
  step = writer.checkpoints.latest()
  if step is None:
    writer.truncate(0)
    return Progress(
      state=state,
      experience=parts.experience,
      regime=RegimeState(),
      moving=rollouts.moving_from(None),
      questions=parts.questions,
      iteration=0,
    )
  with config_lib.user_input():
    restored = writer.checkpoints.restore(step, state)
    writer.truncate(restored.meta["metrics_cursor"])
    standing = RegimeState.from_dict(restored.meta["regime"])
    questions = build.questions_of(config, parts.task, restored.host)
  print(f"resuming after iteration {step}", flush=True)
  return Progress(
    state=restored.state,
    experience=Experience.from_arrays(
      restored.host, **build.experience_limits(config)
    ),
    regime=standing,
    moving=rollouts.moving_from(restored.meta["moving_baseline"]),
    questions=questions,
    iteration=step + 1,
  )


def search(
  config: Any, parts: Parts, progress: Progress, key: jax.Array
) -> tuple[list[Searched], list[list[Verdict]], dict[str, float]]:
  """Searches new training problems with the present policy and judges.

  What chooses the problems, if anything does, learns how often each was solved.

  Returns:
    The searches, the verdicts on the solutions of each, and numbers.
  """
  questions = progress.questions
  problems, chosen = propose(config, parts, progress, key)
  solver = present_regime(parts, progress).solver
  searched = solver(progress.state.average_params, key, problems)
  verdicts = [parts.evaluator.judge(one) for one in searched]
  if questions is not None:
    rates = [
      float(np.mean([v.is_correct for v in judged])) if judged else 0.0
      for judged in verdicts
    ]
    chosen |= questions.learn(problems, rates)
  values = {f"questions/{name}": value for name, value in chosen.items()}
  return searched, verdicts, values | health.search_metrics(searched, verdicts)


def propose(
  config: Any, parts: Parts, progress: Progress, key: jax.Array
) -> tuple[list[Problem], dict[str, float]]:
  """The training problems to search, from where the config says.

  Returns:
    The problems, and numbers of their choice.
  """
  rng = stream(config, progress.iteration, PROBLEMS)
  count, questions = config.search.num_problems, progress.questions
  if questions is None:
    return parts.task.sample_problems(rng, count), {}
  if parts.writer is None:
    return questions.propose(rng, count)
  known = {problem.id for problem, _ in progress.experience.success_rates()}
  params = progress.state.average_params
  return parts.writer.propose(questions, params, key, rng, count, known)


def first_params(config: Any, parts: Parts) -> Any:
  """Parameters that a run begins with: random ones, or those of a policy.

  Raises:
    UserError: the policy of initialize.path does not fit, see `load`.
  """
  first_key, _ = run_keys(config)
  params = parts.policy.network.init(first_key)
  path = config.initialize.path
  return load.first_params(path, parts.policy, params) if path else params


def search_metrics(
  parts: Parts, searched: Sequence[Searched], scored: Sequence[ScoredSolution]
) -> dict[str, float]:
  """Numbers of one iteration's searches."""
  found = [entry for entry in scored if entry.source == "search"]
  solved = {entry.problem.id for entry in found if entry.outcome_reward == 1}
  legal = [
    is_legal
    for one in evenly(searched, NUM_AUDITED)
    for is_legal in judge_proposals(parts.task, one)
  ]
  values = {
    "search/solved": np.mean([one.problem.id in solved for one in searched]),
    "search/solutions": len(found) / len(searched),
    "search/correct": sum(e.outcome_reward for e in found) / len(searched),
    "search/relabelled": (len(scored) - len(found)) / len(searched),
    "search/illegal_steps": 1.0 - np.mean(legal or [True]),
  }
  for name in searched[0].cost:
    costs = [one.cost[name] for one in searched]
    values[f"search/{name}"] = np.mean(costs)
  return {name: float(value) for name, value in values.items()}


def demonstration_metrics(
  config: Any, parts: Parts, iteration: int
) -> dict[str, float]:
  """Share of demonstrations that solve their problem, by kind; printed once."""
  mix = config.initialize.rows
  kinds = {DEMONSTRATION_KINDS.get(kind) for kind in mix if mix[kind]}
  rng = stream(config, iteration, DEMONSTRATIONS)
  values = {}
  for kind in sorted(kinds - {None}):
    pairs = parts.task.demonstrations(kind, rng, NUM_DEMONSTRATIONS)
    problems, texts = zip(*pairs, strict=True)
    solutions = list(map(parts.task.final_solution, texts))
    rate = tasks.success_rate(parts.task, problems, solutions)
    values[f"demonstrations/{kind}_solved"] = rate
    if iteration == 0:
      print(
        f"{kind} demonstrations: {rate:.1%} solve their problem", flush=True
      )
  return values


def judge_proposals(task: Task, searched: Searched) -> list[bool]:
  """For each step that a search proposed: is it legal where it stands?

  Equal steps of one node were merged and count once. A node that adds no step,
  such as an empty line, proposed an illegal one.
  """
  nodes = searched.nodes
  texts, num_steps = {ROOT: ""}, {ROOT: 0}
  legal: list[bool] = []
  for node in np.flatnonzero(nodes["is_valid"]).tolist():
    if node == ROOT:
      continue
    # Parents have lower indices.
    parent = int(nodes["parent"][node])
    texts[node] = texts[parent] + nodes["texts"][node]
    marks = task.judge_steps(searched.problem, texts[node])
    num_steps[node] = len(marks)
    legal += marks[num_steps[parent] :] or [False]
  return legal


def evenly(items: Sequence[Any], count: int) -> Sequence[Any]:
  """At most `count` of the items, at equal distances."""
  if not count:
    return ()
  return items[:: max(math.ceil(len(items) / count), 1)]


def learn(
  progress: Progress,
  update_fn: Any,
  batches_fn: BatchesFn,
  num_calls: int,
  unhealthy: pathlib.Path,
) -> tuple[Progress, dict[str, float]]:
  """Calls the program `num_calls` times, each of which makes some updates.

  The next rows are made while the device works: nothing is read back before
  the end.

  Returns:
    The progress with the new state, and the means of the updates' metrics.

  Raises:
    UserError: a gradient was not finite; the rows of that call are written to
      `unhealthy`.
  """
  state, history, dropped = progress.state, [], 0
  last = None
  for _ in metrics.progress(range(num_calls), "learn", num_calls):
    batches, num_dropped = batches_fn()
    state, numbers = update_fn(state, batches)
    history.append(numbers)
    dropped += num_dropped
    # Looked at one call late, when the device has the next one to work on.
    check_finite(last, unhealthy)
    last = numbers, batches
  check_finite(last, unhealthy)
  history = jax.device_get(history)
  values = {}
  for name in history[0]:
    merge = {"max_ratio": np.max, "min_ratio": np.min}.get(name, np.mean)
    values[f"learn/{name}"] = float(merge([n[name] for n in history]))
  del values["learn/is_finite"]
  values["learn/rows_too_long"] = dropped
  values["learn/d_search"] = len(progress.experience.pool("search"))
  values["learn/d_expert"] = len(progress.experience.d_expert)
  return dataclasses.replace(progress, state=state), values


def check_finite(call: tuple[Any, Any] | None, path: pathlib.Path) -> None:
  """Refuses to go on after a call of the update whose gradient was not finite.

  Args:
    call: its metrics and its rows; None before the first.
    path: where the rows are kept.

  Raises:
    UserError: with what to try.
  """
  if call is None or np.all(jax.device_get(call[0]["is_finite"]) == 1):
    return
  with config_lib.user_input():
    health.save_batch(path, call[1])
  raise config_lib.UserError(
    f"a gradient was not finite (its rows are in {path}): lower "
    "learn.optimizer.learning_rate or learn.optimizer.clip_norm, and start "
    "again from the last checkpoint"
  )


def evaluate(
  config: Any,
  parts: Parts,
  state: update.TrainState,
  key: jax.Array,
  iteration: int,
  last: int,
) -> list[dict[str, Any]]:
  """Greedy decoding always; every strategy and effort by interval and at last.

  Returns:
    Rows of `Evaluator.measure`, with the iteration.
  """
  options = config.evaluation
  compared = [("greedy", 1)]
  if parts.policy.lengths.thinking_tokens:
    compared.append(("thinking", 1))
  is_regular = options.interval and (iteration + 1) % options.interval == 0
  if iteration == last - 1 or is_regular:
    compared += itertools.product(options.strategies, options.efforts)
  rows = []
  for strategy, effort in metrics.progress(compared, "evaluate", len(compared)):
    row, _ = parts.evaluator.measure(
      state.average_params, parts.heldout, strategy, effort, key
    )
    rows.append({"iteration": iteration, **row})
  return rows


def flatten_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Numbers of an evaluation under one name each, for curves."""
  values = {}
  for row in rows:
    name = row["strategy"]
    if name not in evaluation.ALONE:
      name = f"{name}_{row['budget']}"
    values[f"eval/{name}_accuracy"] = row["accuracy"]
    values[f"coverage/{name}"] = row["coverage"]
    values[f"tokens/{name}"] = row["tokens"]
  return values


@contextlib.contextmanager
def traced(workdir: pathlib.Path, is_on: bool) -> Iterator[None]:
  """Writes a profiler trace of what runs inside, where asked to."""
  if not is_on:
    yield
    return
  with jax.profiler.trace(str(workdir / "profile")):
    yield


class RunWriter:
  """All that a run writes into its workdir."""

  def __init__(self, workdir: pathlib.Path, config: Any):
    self.workdir = workdir
    self._num_samples = config.checkpoint.num_samples
    self._jsonl = metrics.JsonlWriter(workdir / "metrics.jsonl")
    self._board = metrics.TensorBoardWriter(workdir / "tensorboard")
    self._table = metrics.Table(COLUMNS)
    self._wandb = None
    if config.metrics.wandb_project:
      with config_lib.user_input():
        self._wandb = metrics.WandbWriter(
          config.metrics.wandb_project,
          workdir.name,
          config.to_dict(),
          directory=workdir,
        )
    self.checkpoints = Checkpoints(
      workdir / "checkpoints", keep_every=config.checkpoint.keep_every
    )

  def last_rows(self, limits: health.Limits) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that a collapse may have begun in."""
    return metrics.read_jsonl(self.workdir / "metrics.jsonl")[
      -limits.patience :
    ]

  def truncate(self, cursor: int) -> None:
    """Drops the metrics of iterations that will be run again."""
    self._jsonl.truncate_to(cursor)

  def samples(
    self,
    iteration: int,
    searched: Sequence[Searched],
    scored: Sequence[ScoredSolution],
  ) -> None:
    """Writes some solutions and the first trees of an iteration."""
    name = f"iteration_{iteration:05d}.jsonl"
    for folder in ("samples", "trees"):
      (self.workdir / folder).mkdir(exist_ok=True)
    samples = evenly(scored, self._num_samples)
    jsonl.write_solutions(self.workdir / "samples" / name, samples)
    correct = {(e.problem.id, e.text): e.outcome_reward == 1 for e in scored}
    trees = []
    for one in searched[:NUM_TREES]:
      marks = {
        s.node: correct[one.problem.id, s.text]
        for s in one.solutions
        if s.is_finished
      }
      trees.append(tree_record(one, marks, iteration))
    jsonl.write_trees(self.workdir / "trees" / name, trees)

  def row(
    self,
    phase: str,
    iteration: int,
    values: Mapping[str, float],
    evaluated: Sequence[Mapping[str, Any]],
  ) -> dict[str, Any]:
    """Writes the numbers of an iteration, and its comparison if any.

    Returns:
      The row of metrics.jsonl.
    """
    row = {"kind": phase, "iteration": iteration, **values}
    self._jsonl.write(row)
    self._board.write(iteration, values)
    if self._wandb is not None:
      self._wandb.write(iteration, values)
    shown = {name: values[key] for name, key in SHOWN if key in values}
    self._table.row({"iteration": iteration, "phase": phase, **shown})
    if len(evaluated) > 1:
      save_evaluation(self.workdir, evaluated)
    return row

  def checkpoint(
    self,
    done: Progress,
    values: Mapping[str, float],
  ) -> None:
    """Saves all that survives the iteration done; updates the report."""
    with config_lib.user_input():
      self.checkpoints.save(
        done.iteration,
        state=done.state,
        host=done.experience.to_arrays() | question_arrays(done.questions),
        meta={
          "metrics_cursor": self._jsonl.cursor(),
          "regime": done.regime.to_dict(),
          "moving_baseline": rollouts.moving_record(done.moving),
        },
        metric=values["eval/greedy_accuracy"],
      )
    report.write_report(self.workdir)

  def close(self) -> None:
    """Finishes the files."""
    self._jsonl.close()
    self._board.close()
    if self._wandb is not None:
      self._wandb.close()


def question_arrays(
  questions: QuestionGenerator | None,
) -> dict[str, np.ndarray]:
  """What a checkpoint keeps of a question generator."""
  return {} if questions is None else questions.to_arrays()


def save_evaluation(
  workdir: pathlib.Path, rows: Sequence[Mapping[str, Any]]
) -> None:
  """Puts rows into evaluation.jsonl, in place of older ones like them."""
  path = workdir / "evaluation.jsonl"
  old = metrics.read_jsonl(path) if path.exists() else []
  table = {
    (row["iteration"], row["strategy"], row["budget"]): row
    for row in [*old, *rows]
  }
  jsonl.write_jsonl(path, table.values())
