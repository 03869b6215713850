"""From a config to the parts of a run, checked before anything compiles.

Every command builds its parts here, so that a run, its evaluation and its
solver agree on what the fields mean.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from o1jax import config as config_lib
from o1jax import jsonl, rows
from o1jax import mesh as mesh_lib
from o1jax.config import user_input
from o1jax.corpora import TextFiles, Texts
from o1jax.encoding import Lengths, Policy, encode_problems
from o1jax.evaluation import Evaluator
from o1jax.experience import Experience
from o1jax.fields import check_fields
from o1jax.health import Limits
from o1jax.learning.optimizer import Optimizer, make_optimizer
from o1jax.policy.config import TransformerConfig
from o1jax.policy.network import make_network
from o1jax.policy.tokenizer import Tokenizer, train_tokenizer
from o1jax.question_generator import QuestionGenerator
from o1jax.question_writer import QuestionWriter
from o1jax.regime_parts import (
  Regime,
  make_regimes,
  mixes_of,
  regime_configs,
  schedule_of,
)
from o1jax.regimes import Schedule
from o1jax.tasks import make_task
from o1jax.tasks.task import Task
from o1jax.text_rows import TextRows
from o1jax.types import Problem, ScoredSolution

TOKENIZER_FILE = "tokenizer.model"
TOKENIZER_STREAM = 2**31

# Where the problems that are searched come from.
SOURCES = ("uniform", "frontier", "policy")


@dataclasses.dataclass(frozen=True)
class Parts:
  """What a run is made of.

  Attributes:
    task: problems and their checker.
    policy: network, tokenizer and shapes.
    mesh: devices.
    evaluator: compares strategies on held-out problems.
    optimizer: with its schedule over the whole run.
    initialize_rows: batches of the first phase.
    regimes: ways to search and learn, by name.
    schedule: their order.
    questions: chooses the problems to search; None to draw them evenly.
    writer: writes those that `questions` chooses from; None to draw them.
    limits: what the run must keep to.
    experience: what a run begins with: empty, or read from a file.
    heldout: problems that strategies are compared on.
  """

  task: Task
  policy: Policy
  mesh: Mesh
  evaluator: Evaluator
  optimizer: Optimizer
  initialize_rows: rows.RowMaker
  regimes: Mapping[str, Regime]
  schedule: Schedule
  questions: QuestionGenerator | None
  writer: QuestionWriter | None
  limits: Limits
  experience: Experience
  heldout: Sequence[Problem]


def start_devices(config: Any) -> Mesh:
  """Splits the CPU as the config says and arranges the mesh.

  Raises:
    UserError: the mesh does not fit the devices.
  """
  with user_input():
    mesh_lib.configure_host_devices(config.mesh.num_cpu_devices)
    return mesh_lib.make_mesh(
      {axis: config.mesh[axis] for axis in mesh_lib.AXES}
    )


def evaluation_devices(config: Any) -> Mesh:
  """As many devices as the batches of the evaluation divide over.

  Not the mesh of the run, which may have had more devices than are here.
  """
  with user_input():
    mesh_lib.configure_host_devices(config.mesh.num_cpu_devices)
    return mesh_lib.mesh_for(config.evaluation.batch_size)


def task_of(config: Any) -> Task:
  """The config's task.

  Raises:
    UserError: an unknown task or option.
  """
  with user_input():
    return make_task(config.task.name, **config.task.options)


def tokenizer_of(config: Any, task: Task, workdir: pathlib.Path) -> Tokenizer:
  """The workdir's tokenizer; trained where there is none yet."""
  path = workdir / TOKENIZER_FILE
  if not path.exists() and config.initialize.path:
    path = pathlib.Path(config.initialize.path) / TOKENIZER_FILE
    if not path.exists():
      raise config_lib.UserError(
        f"initialize.path={config.initialize.path} holds no {TOKENIZER_FILE}: "
        "give the workdir of a run, or a folder that o1jax.export wrote"
      )
  if path.exists():
    with user_input():
      return Tokenizer.from_bytes(path.read_bytes())
  rng = np.random.default_rng([config.seed, TOKENIZER_STREAM])
  with user_input():
    num_texts = config.tokenizer.num_texts
    texts = task.corpus(rng, num_texts)
    mixes = mixes_of(config).values()
    for kind in rows.REFLECTIONS:
      if any(kind in mix and mix[kind] for mix in mixes):
        texts += task.corpus(rng, -(-num_texts // 4), kind)
    if teaches_questions(config):
      drawn = task.sample_problems(rng, -(-num_texts // 4))
      texts += [task.question_mark + problem.prompt for problem in drawn]
    texts += texts_of(config).corpus(rng, num_texts)
    return train_tokenizer(
      texts,
      vocab_size=config.tokenizer.vocab_size,
      max_number=config.tokenizer.max_number,
    )


def texts_of(config: Any) -> Texts:
  """What the config's files of texts hold.

  Raises:
    UserError: a file that is missing or bad, one that no rows are made of, or
      rows without a file.
  """
  with user_input():
    files = TextFiles(**config.texts)
    for kind in rows.TEXTS:
      using = [
        label for label, mix in mixes_of(config).items() if mix.get(kind)
      ]
      if using and not config.texts[kind]:
        raise ValueError(
          f"{using[0]}.{kind} has no file to draw from: name one in "
          f"texts.{kind}, or set the rows to 0"
        )
      if config.texts[kind] and not using:
        raise ValueError(
          f"texts.{kind}={config.texts[kind]!r} is not read without such rows: "
          f"set initialize.rows.{kind} or learn.rows.{kind} above 0, or leave "
          "it empty"
        )
    return files.read(config.seed)


def keep_tokenizer(tokenizer: Tokenizer, workdir: pathlib.Path) -> None:
  """Writes the tokenizer into the workdir, unless it is there."""
  path = workdir / TOKENIZER_FILE
  if not path.exists():
    with user_input():
      config_lib.write_atomically(path, tokenizer.to_bytes())


def policy_of(config: Any, tokenizer: Tokenizer) -> Policy:
  """Network and shapes of the config for a tokenizer.

  Raises:
    UserError: fields that do not fit together.
  """
  with user_input():
    network_config = TransformerConfig(
      vocab_size=tokenizer.vocab_size, **config.network
    )
    network = make_network(network_config, tokenizer.number_values())
  return Policy(network, tokenizer, Lengths(**config.lengths))


def evaluator_of(
  config: Any, policy: Policy, task: Task, mesh: Mesh
) -> Evaluator:
  """The config's comparison of strategies."""
  with user_input():
    mesh_lib.check_divides(
      "evaluation.batch_size", config.evaluation.batch_size, mesh
    )
    options = config.evaluation.to_dict()
    for name in ("num_problems", "interval", "strategies", "efforts"):
      del options[name]
    return Evaluator(policy, task, mesh, **options)


def build(config: Any, workdir: pathlib.Path, mesh: Mesh) -> Parts:
  """All parts of a run; writes nothing.

  Raises:
    UserError: a field that does not fit, with what to change.
  """
  configs = regime_configs(config)
  for changed in configs.values():
    # Not where runs are loaded: those of earlier versions lack fields.
    if changed is not config:
      check_fields(changed)
  task = task_of(config)
  policy = policy_of(config, tokenizer_of(config, task, workdir))
  with user_input():
    first_mix = config.initialize.rows
    # The first phase learns by the first regime's update.
    first = configs[schedule_of(config).names[0]]
    for (label, mix), changed in zip(
      mixes_of(config).items(), (first, *configs.values()), strict=True
    ):
      rows.check_mix(mix, task, label)
      for (_, width), count in rows.group_sizes(mix, policy.lengths).items():
        _check_rows(count, width, label, changed, mesh)
    for kind in rows.FRESH:
      if first_mix.get(kind):
        raise ValueError(
          f"initialize.rows.{kind}: nothing is searched in that phase; set it "
          "to 0"
        )
    for name in ("initialize", "learn"):
      count, calls = config[name].num_updates, config.learn.updates_per_call
      if count % calls:
        raise ValueError(
          f"{name}.num_updates={count} is not a multiple of "
          f"learn.updates_per_call={calls}"
        )
    optimizer = make_optimizer(
      total_updates=total_updates(config),
      mesh=mesh,
      **config.learn.optimizer,
    )
    # Refuses what it would move where the network has none of it.
    shapes = jax.eval_shape(policy.network.init, jax.random.key(0))
    jax.eval_shape(optimizer.init, shapes)
    evaluator = evaluator_of(config, policy, task, mesh)
    options = config.evaluation
    cells = itertools.product(options.strategies, options.efforts)
    heldout = task.heldout_problems(options.num_problems)
    alone = ["greedy"] + ["thinking"] * bool(policy.lengths.thinking_tokens)
    evaluator.check([*((name, 1) for name in alone), *cells], heldout)
    # A prompt of training problems may be too long as well.
    rng = np.random.default_rng(config.seed)
    encode_problems(policy, task.sample_problems(rng, 16))
    text_rows = TextRows(policy, texts_of(config))
    initialize_rows = rows.RowMaker(
      policy, task, config.initialize.rows, text_rows=text_rows
    )
    regimes = make_regimes(configs, task, policy, optimizer, mesh, text_rows)
  questions = questions_of(config, task)
  return Parts(
    task=task,
    policy=policy,
    mesh=mesh,
    evaluator=evaluator,
    optimizer=optimizer,
    initialize_rows=initialize_rows,
    regimes=regimes,
    schedule=schedule_of(config),
    questions=questions,
    writer=writer_of(config, policy, task, mesh, questions),
    limits=limits_of(config),
    experience=first_experience(config, policy, task),
    heldout=heldout,
  )


def questions_of(
  config: Any, task: Task, arrays: Mapping[str, np.ndarray] | None = None
) -> QuestionGenerator | None:
  """What chooses the problems to search; None to draw them evenly.

  Args:
    config: of the run.
    task: has the problems.
    arrays: what a checkpoint keeps of it; None before it has learned anything.

  Raises:
    UserError: an unknown source, or an option that does not fit.
  """
  options = config.questions.to_dict()
  source = options.pop("source")
  with user_input():
    if source not in SOURCES:
      raise ValueError(
        f"questions.source={source!r} is unknown; take one of "
        f"{', '.join(SOURCES)}"
      )
    if source != "uniform":
      if arrays is not None:
        return QuestionGenerator.from_arrays(arrays, task, **options)
      return QuestionGenerator(task, **options)
    if options:
      raise ValueError(
        f"questions.{min(options)} is not read with source='uniform': leave it "
        "out, or set questions.source to 'frontier'"
      )
  return None


def teaches_questions(config: Any) -> bool:
  """Whether any rows of the run teach the policy to write problems."""
  mixes = mixes_of(config)
  if not config.initialize.num_iterations:
    del mixes["initialize.rows"]
  return any(mix.get(rows.QUESTIONS) for mix in mixes.values())


def writer_of(
  config: Any,
  policy: Policy,
  task: Task,
  mesh: Mesh,
  questions: QuestionGenerator | None,
) -> QuestionWriter | None:
  """What writes the problems to search; None to draw them.

  Raises:
    UserError: nothing teaches the policy to, or its texts have no room.
  """
  if config.questions.source != "policy":
    return None
  with user_input():
    if not teaches_questions(config):
      raise ValueError(
        "questions.source='policy', but no rows teach the policy to write "
        "problems: set learn.rows.questions above 0, or "
        "initialize.rows.questions with initialize.num_iterations"
      )
    return QuestionWriter(
      policy,
      task,
      mesh,
      batch_size=config.search.batch_size,
      num_texts=questions.pool_factor,
    )


def limits_of(config: Any) -> Limits:
  """What the run must keep to.

  Raises:
    UserError: a limit out of its range.
  """
  with user_input():
    return Limits(**config.health)


def experience_limits(config: Any) -> dict[str, int]:
  """The size limits of the config's experience."""
  limits = config.experience.to_dict()
  del limits["path"]
  return limits


def first_experience(config: Any, policy: Policy, task: Task) -> Experience:
  """Empty, or the solutions of `experience.path`.

  Raises:
    UserError: the file cannot be read, or a row of it is bad.
  """
  path = config.experience.path
  with user_input():
    experience = Experience(**experience_limits(config))
    if path:
      solutions = jsonl.read_solutions(path, policy.encode_solution)
      for number, solution in enumerate(solutions, 1):
        fault = _fault(solution, policy, task)
        if fault:
          raise ValueError(f"{path}, solution {number}: {fault}")
      experience.add(solutions)
  return experience


def total_updates(config: Any) -> int:
  """Updates of the whole run, over which the schedule runs."""
  return (
    config.initialize.num_iterations * config.initialize.num_updates
    + config.num_iterations * config.learn.num_updates
  )


def _fault(solution: ScoredSolution, policy: Policy, task: Task) -> str:
  """Why a solution cannot be learned from, "" where it can."""
  problem, tokens = solution.problem, solution.tokens.tolist()
  if problem.task != task.name:
    return f"its problem is of task {problem.task!r}, not {task.name!r}"
  if tokens and max(tokens) >= policy.tokenizer.vocab_size:
    return (
      f"token {max(tokens)} is outside the vocabulary of "
      f"{policy.tokenizer.vocab_size}: leave the tokens out"
    )
  if policy.tokenizer.decode(tokens) != solution.text:
    return "its tokens are of another text or tokenizer: leave them out"
  try:
    is_train = task.is_train(problem)
  except ValueError as error:
    return str(error)
  return (
    "" if is_train else f"its problem {problem.prompt.strip()!r} is held out"
  )


def _check_rows(
  count: int, width: int, name: str, config: Any, mesh: Mesh
) -> None:
  ways = mesh_lib.batch_ways(mesh) * config.learn.num_microbatches
  if count % ways:
    raise ValueError(
      f"{name} has {count} rows of {width} tokens, which do not divide over "
      f"learn.num_microbatches={config.learn.num_microbatches} x "
      f"{mesh_lib.batch_ways(mesh)} devices: make it "
      f"{(count // ways + 1) * ways}"
    )
