"""From a config to the parts of a run, checked before anything compiles.

Every command builds its parts here, so that a run, its evaluation and its
solver agree on what the fields mean.
"""

import dataclasses
import functools
import inspect
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from o1jax import config as config_lib
from o1jax import fresh_rows, jsonl, rows
from o1jax import mesh as mesh_lib
from o1jax.combinations import REVISIONS
from o1jax.config import user_input
from o1jax.corpora import TextFiles, Texts
from o1jax.encoding import Lengths, Policy, encode_problems
from o1jax.evaluation import Evaluator
from o1jax.experience import Experience
from o1jax.fresh_rows import FreshRows
from o1jax.health import Limits
from o1jax.learning import update
from o1jax.learning.objective import Objective, PolicyGradient, Preference
from o1jax.learning.optimizer import Optimizer, make_optimizer
from o1jax.policy.config import TransformerConfig
from o1jax.policy.network import make_network, next_token_log_probs
from o1jax.policy.tokenizer import Tokenizer, train_tokenizer
from o1jax.question_generator import QuestionGenerator
from o1jax.regimes import Schedule
from o1jax.rollouts import Advantages, Pairs
from o1jax.solver import Solver
from o1jax.tasks import make_task
from o1jax.tasks.task import Task
from o1jax.text_rows import TextRows
from o1jax.types import Problem, ScoredSolution

TOKENIZER_FILE = "tokenizer.model"
TOKENIZER_STREAM = 2**31

# Groups of fields that are the arguments of a function, and which of its
# arguments are no fields.
GROUPS = {
  "tokenizer": (train_tokenizer, {"texts"}),
  "lengths": (Lengths, set()),
  "network": (TransformerConfig, {"vocab_size"}),
  "search": (
    Solver,
    {
      "policy",
      "mesh",
      "task",
      "steps_from_host",
      "guidance_functions",
      "text_functions",
      "classes_fn",
      "draft",
    },
  ),
  "learn.optimizer": (make_optimizer, {"total_updates"}),
  "learn.advantages": (Advantages, set()),
  "learn.policy_gradient": (PolicyGradient, set()),
  "learn.preference": (Preference, set()),
  "learn.pairs": (Pairs, set()),
  "learn.replay": (
    Experience.sample,
    {"self", "rng", "n", "pool", "iteration"},
  ),
  "texts": (TextFiles, set()),
  "questions": (QuestionGenerator, {"task"}),
  "health": (Limits, set()),
  "regimes": (Schedule, {"known"}),
  "experience": (Experience, set()),
  "evaluation": (Evaluator, {"policy", "task", "mesh"}),
}
# Groups whose fields the task, the rows and the rule know.
OPEN_GROUPS = (
  "task.options.",
  "initialize.rows.",
  "search.rule_options.",
  "search.options.",
  "search.cache.",
  "search.guidance.",
  "learn.rows.",
  "regimes.changes.",
  "evaluation.rule_options.",
  "evaluation.options.",
  "evaluation.guidance.",
)

# Groups without a field that has to be there; the groups have to.
EMPTY_GROUPS = (
  "learn.advantages",
  "learn.policy_gradient",
  "learn.preference",
  "learn.pairs",
  "learn.replay",
  "health",
)
# What a regime may change: not what spans the run, or what it is counted by.
CHANGED_BY_REGIMES = ("search.", "learn.")
NEVER_CHANGED = (
  "learn.optimizer.",
  "learn.num_updates",
  "learn.updates_per_call",
  "search.num_problems",
)
# Where the problems that are searched come from.
SOURCES = ("uniform", "frontier")
# The one regime of a config that names none.
ONLY_REGIME = "learn"

# All other fields, and numbers of the groups above: the least that each may
# be. A field has the type of the value here.
LEAST = {
  "seed": 0,
  "num_iterations": 0,
  "task.name": "",
  "tokenizer.num_texts": 1,
  "lengths.prompt_tokens": 1,
  "lengths.step_tokens": 1,
  "lengths.num_steps": 1,
  "lengths.row_tokens": 1,
  "mesh.num_cpu_devices": 1,
  "mesh.data": -1,
  "mesh.fsdp": -1,
  "mesh.tensor": -1,
  "initialize.path": "",
  "initialize.num_iterations": 0,
  "initialize.num_updates": 1,
  "search.num_problems": 1,
  "search.batch_size": 1,
  "search.num_candidates": 1,
  "search.num_expansions": 1,
  "search.num_simulations": 1,
  "search.num_parallel_leaves": 1,
  "search.num_workers": 0,
  "search.num_rollouts": 0,
  "search.num_revisions": 0,
  "learn.num_updates": 1,
  "learn.updates_per_call": 1,
  "learn.num_microbatches": 1,
  "learn.value_coefficient": 0.0,
  "learn.average_decay": 0.0,
  "learn.learning_rate_scale": 0.0,
  "learn.reference": "",
  "learn.optimizer.warmup_updates": 0,
  "regimes.names": (),
  "texts.documents": "",
  "texts.instructions": (),
  "questions.source": "",
  "metrics.wandb_project": "",
  "experience.path": "",
  "evaluation.num_problems": 1,
  "evaluation.batch_size": 1,
  "evaluation.interval": 0,
  "evaluation.strategies": (),
  "evaluation.efforts": (),
  "evaluation.num_candidates": 1,
  "checkpoint.interval": 1,
  "checkpoint.keep_every": 0,
  "checkpoint.num_samples": 0,
}
TYPE_NAMES = {
  bool: "true or false",
  int: "a whole number",
  float: "a number",
  str: "a text",
  tuple: "a tuple",
}


@dataclasses.dataclass(frozen=True)
class Regime:
  """One way in which a run searches and learns.

  Attributes:
    config: of the run, with the regime's changes.
    solver: the search that learning learns from.
    learn_rows: batches of its mix.
    fresh_rows: what of them is made anew in every iteration.
    objective: what its updates minimize.
    update_fn: see `learning.update.make_updates`.
  """

  config: Any
  solver: Solver
  learn_rows: rows.RowMaker
  fresh_rows: FreshRows
  objective: Objective
  update_fn: Any

  @property
  def relabels(self) -> bool:
    """Whether its rows have a use for failures that were relabelled."""
    mix = self.config.learn.rows
    return "hindsight" in mix and mix.hindsight > 0


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
  limits: Limits
  experience: Experience
  heldout: Sequence[Problem]

  @property
  def first(self) -> Regime:
    """The regime that the run begins with."""
    return self.regimes[self.schedule.names[0]]


def check_fields(config: Any) -> None:
  """Checks that the config has every field, and no other, in its range.

  Raises:
    UserError: a field is unknown, missing, of another type or too small.
  """
  given = config_lib.flatten(config)
  types = {name: type(least) for name, least in LEAST.items()}
  required = set(LEAST)
  for group, (function, others) in GROUPS.items():
    for argument in inspect.signature(function).parameters.values():
      name = f"{group}.{argument.name}"
      if argument.name in others or name in types:
        continue
      types[name] = argument.annotation
      if argument.default is argument.empty:
        required.add(name)
  with user_input():
    for name, value in given.items():
      if not name.startswith(OPEN_GROUPS):
        if name not in types:
          near = config_lib.nearest(list(types), name)
          raise ValueError(f"unknown config field {name}{near}")
        _check_value(name, value, types[name])
      elif ".rows." in name:
        _check_value(name, value, int)
    for name in sorted(required - set(given)):
      raise ValueError(f"the config lacks the field {name}")
    for name in OPEN_GROUPS:
      parent, field, _ = name.split(".")
      is_optional = f"{parent}.{field}" in types
      if field not in config[parent] and not is_optional:
        raise ValueError(f"the config lacks the group {parent}.{field}")
    for name in EMPTY_GROUPS:
      group = config
      for word in name.split("."):
        group = group[word] if word in group else None
      if group is None:
        raise ValueError(f"the config lacks the group {name}")
    if not config.num_iterations + config.initialize.num_iterations:
      raise ValueError(
        "num_iterations=0 and initialize.num_iterations=0: there is nothing "
        "to do, raise one of them"
      )


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
    texts += texts_of(config).corpus(rng, num_texts)
    return train_tokenizer(
      texts,
      vocab_size=config.tokenizer.vocab_size,
      max_digits_per_piece=config.tokenizer.max_digits_per_piece,
    )


def mixes_of(config: Any) -> dict[str, Mapping[str, int]]:
  """The mixes of rows of a run, by what errors call them."""
  mixes = {"initialize.rows": config.initialize.rows}
  for name, changed in regime_configs(config).items():
    label = "learn.rows" if name == ONLY_REGIME else f"learn.rows of {name}"
    mixes[label] = changed.learn.rows
  return mixes


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
  task = task_of(config)
  policy = policy_of(config, tokenizer_of(config, task, workdir))
  configs = regime_configs(config)
  with user_input():
    first_mix = config.initialize.rows
    # The first phase learns by the first regime's update.
    first = configs[schedule_of(config).names[0]]
    for (label, mix), changed in zip(
      mixes_of(config).items(), (first, *configs.values()), strict=True
    ):
      rows.check_mix(mix, task, label)
      for count in rows.group_sizes(mix, policy.lengths).values():
        _check_rows(count, label, changed, mesh)
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
      total_updates=total_updates(config), **config.learn.optimizer
    )
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
  return Parts(
    task=task,
    policy=policy,
    mesh=mesh,
    evaluator=evaluator,
    optimizer=optimizer,
    initialize_rows=initialize_rows,
    regimes=regimes,
    schedule=schedule_of(config),
    questions=questions_of(config, task),
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
    if source == "frontier":
      if arrays is not None:
        return QuestionGenerator.from_arrays(arrays, task, **options)
      return QuestionGenerator(task, **options)
    if options:
      raise ValueError(
        f"questions.{min(options)} is not read with source='uniform': leave it "
        "out, or set questions.source to 'frontier'"
      )
  return None


def limits_of(config: Any) -> Limits:
  """What the run must keep to.

  Raises:
    UserError: a limit out of its range.
  """
  with user_input():
    return Limits(**config.health)


def schedule_of(config: Any) -> Schedule:
  """The order of the config's regimes.

  Raises:
    UserError: a name that is unknown, or a number out of range.
  """
  options = config.regimes.to_dict()
  known = options.pop("changes")
  if not options["names"]:
    options["names"], known = (ONLY_REGIME,), (ONLY_REGIME,)
  with user_input():
    return Schedule(known=tuple(known), **options)


def regime_configs(config: Any) -> dict[str, Any]:
  """The config of each regime: the run's own with the regime's changes.

  Raises:
    UserError: a regime that the schedule leaves out, or a change of a field
      that there is not, or that must not change.
  """
  names = schedule_of(config).names
  if names == (ONLY_REGIME,) and not config.regimes.changes:
    return {ONLY_REGIME: config}
  configs = {}
  with user_input():
    for name, changes in config.regimes.changes.items():
      if name not in names:
        raise ValueError(
          f"regimes.changes.{name} is not in regimes.names="
          f"{tuple(config.regimes.names)}: put it there, or take it out"
        )
      if isinstance(changes, str):
        raise ValueError(
          f"regimes.changes.{name}={changes!r} must be a tuple of texts, "
          "one for each field"
        )
      for change in changes:
        field = change.partition("=")[0]
        is_open = field.startswith(CHANGED_BY_REGIMES)
        if not is_open or field.startswith(NEVER_CHANGED):
          raise ValueError(
            f"regimes.changes.{name} changes {field}, which stays the same in "
            "a run: a regime changes fields of search and learn, but none of "
            f"{', '.join(NEVER_CHANGED)}"
          )
      changed = config.copy_and_resolve_references()
      config_lib.apply_overrides(changed.lock(), changes)
      check_fields(changed)
      configs[name] = changed
  return configs


def make_regimes(
  configs: Mapping[str, Any],
  task: Task,
  policy: Policy,
  optimizer: Optimizer,
  mesh: Mesh,
  text_rows: TextRows | None = None,
) -> dict[str, Regime]:
  """The parts of each regime.

  Raises:
    ValueError: fields that do not fit together.
  """

  @functools.cache
  def update_of(objective, num_microbatches, average_decay, scale):
    # Regimes that learn by the same rule share its program.
    return update.make_updates(
      log_probs_of(policy, objective),
      optimizer,
      objective=objective,
      num_microbatches=num_microbatches,
      average_decay=average_decay,
      learning_rate_scale=scale,
      mesh=mesh,
    )

  score_fn = update.make_score(log_probs_of(policy, Objective()), mesh=mesh)
  regimes = {}
  for name, config in configs.items():
    learn, search = config.learn, config.search.to_dict()
    search.pop("num_problems")
    mesh_lib.check_divides("search.batch_size", search["batch_size"], mesh)
    if search["strategy"] in REVISIONS:
      raise ValueError(
        f"search.strategy={search['strategy']!r} finds answers that follow "
        "others in one text, which learning does not read: choose another "
        "here, and compare with it in evaluation"
      )
    objective = Objective(
      value_coefficient=learn.value_coefficient,
      policy_gradient=PolicyGradient(**learn.policy_gradient),
      preference=Preference(**learn.preference),
    )
    advantages = Advantages(**learn.advantages)
    notice = fresh_rows.check(
      learn.rows,
      reference=learn.reference,
      advantages=advantages,
      objective=objective,
      search=search,
    )
    if notice:
      print(notice, flush=True)
    regimes[name] = Regime(
      config=config,
      solver=Solver(policy, mesh=mesh, task=task, **search),
      learn_rows=rows.RowMaker(
        policy, task, learn.rows, learn.replay, text_rows
      ),
      fresh_rows=FreshRows(
        policy,
        task,
        learn.rows,
        score_fn,
        reference=learn.reference,
        advantages=advantages,
        pairs=Pairs(**learn.pairs),
      ),
      objective=objective,
      update_fn=update_of(
        objective,
        learn.num_microbatches,
        learn.average_decay,
        learn.learning_rate_scale,
      ),
    )
  return regimes


def log_probs_of(policy: Policy, objective: Objective) -> update.LogProbsFn:
  """What the update asks of the policy's network."""
  has_entropy = objective.policy_gradient.entropy_coefficient > 0

  def log_probs_fn(params, tokens, lengths, **documents):
    # Of packed rows: segment_ids and positions.
    return next_token_log_probs(
      policy.network,
      params,
      tokens,
      lengths,
      with_entropy=has_entropy,
      **documents,
    )

  return log_probs_fn


def has_reference(config: Any) -> bool:
  """Whether a run keeps the parameters of a reference."""
  # Runs of earlier versions have no such field.
  if "reference" not in config.learn:
    return False
  return any(
    changed.learn.reference != "none"
    for changed in regime_configs(config).values()
  )


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


def _check_value(name: str, value: Any, wanted: Any) -> None:
  """Raises ValueError where a field has another type or is too small."""
  if wanted in TYPE_NAMES:
    allowed = (int, float) if wanted is float else wanted
    is_bool = isinstance(value, bool)
    if not isinstance(value, allowed) or is_bool != (wanted is bool):
      raise ValueError(
        f"config field {name} must be {TYPE_NAMES[wanted]}, not {value!r}"
      )
  if name in LEAST and value < LEAST[name]:
    raise ValueError(f"{name}={value} must be {LEAST[name]} or more")


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


def _check_rows(count: int, name: str, config: Any, mesh: Mesh) -> None:
  ways = mesh_lib.batch_ways(mesh) * config.learn.num_microbatches
  if count % ways:
    raise ValueError(
      f"{name} has {count} rows, which do not divide over "
      f"learn.num_microbatches={config.learn.num_microbatches} x "
      f"{mesh_lib.batch_ways(mesh)} devices: make it "
      f"{(count // ways + 1) * ways}"
    )
