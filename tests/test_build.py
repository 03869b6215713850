"""What a config must say, and what a run may begin with."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from o1jax import build, fields, jsonl, regime_parts
from o1jax import config as config_lib
from o1jax import mesh as mesh_lib
from o1jax.learned_texts import demonstration
from o1jax.tasks import make_task
from o1jax.tasks.countdown import Countdown
from policies import tiny_config, tiny_policy

CONFIGS = sorted(
  (pathlib.Path(__file__).resolve().parent.parent / "configs").glob("*.py")
)
ARGUMENTS = {
  "countdown": (None, "smoke", "no_hindsight", "short", "thinking"),
  "countdown4_small": (None, "smoke", "reflection", "comparing"),
}


@pytest.mark.parametrize(
  "path, arg",
  [
    (path, arg)
    for path in CONFIGS
    for arg in (
      ARGUMENTS[path.stem] if path.stem in ARGUMENTS else (None, "smoke")
    )
  ],
  ids=lambda value: value.stem if isinstance(value, pathlib.Path) else value,
)
def test_every_config_can_be_run(path, arg, tmp_path):
  # Texts and problems are most of the time.
  fewer = ["tokenizer.num_texts=500", "evaluation.num_problems=16"]
  config = config_lib.load_config(f"{path}:{arg or ''}", fewer)
  fields.check_fields(config)
  parts = build.build(config, tmp_path, mesh_lib.make_mesh({"data": 2}))
  assert len(parts.heldout) == config.evaluation.num_problems
  params = jax.eval_shape(parts.policy.network.init, jax.random.key(0))
  assert jax.tree.leaves(params)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "name, value, message",
  [
    (
      "search.num_simulation",
      8,
      "unknown config field search.num_simulation: did you mean "
      "search.num_simulations?",
    ),
    (
      "network.widht",
      8,
      "unknown config field network.widht: did you mean network.width?",
    ),
    ("lengths.extra", 1, "unknown config field lengths.extra"),
    ("learn.optimizer.beta", 1, "unknown config field learn.optimizer.beta"),
    ("sed", 1, "unknown config field sed: did you mean seed?"),
    ("seed", None, "the config lacks the field seed"),
    ("search", None, "the config lacks the field search."),
    ("lengths.num_steps", None, "the config lacks the field lengths.num_steps"),
    ("network.width", None, "the config lacks the field network.width"),
    ("learn.rows", None, "the config lacks the group learn.rows"),
    *(
      (name, None, f"the config lacks the group {name}")
      for name in (
        "learn.advantages",
        "learn.policy_gradient",
        "learn.preference",
        "learn.pairs",
        "learn.process",
        "regimes.changes",
      )
    ),
    ("regimes", None, "the config lacks the field regimes.names"),
    ("learn.reference", None, "the config lacks the field learn.reference"),
    ("learn.advantages.basline", "none", "did you mean learn.advantages.base"),
    ("learn.policy_gradient.clip", 0.1, "unknown config field learn.policy_g"),
    ("learn.pairs.level", 1, "learn.pairs.level must be a text, not 1"),
    ("learn.learning_rate_scale", -1.0, "learning_rate_scale=-1.0 must be 0"),
    ("learn.num_updates", "5", "learn.num_updates must be a whole number"),
    ("learn.num_updates", True, "learn.num_updates must be a whole number"),
    ("search.top_p", "all", "search.top_p must be a number, not 'all'"),
    ("search.memory", 1, "search.memory must be a text, not 1"),
    ("evaluation.strategies", "mcts", "evaluation.strategies must be a tuple"),
    ("learn.rows.search", 1.5, "learn.rows.search must be a whole number"),
    ("network.tied_embeddings", 1, "must be true or false, not 1"),
  ],
)
def test_fields_of_a_file_are_checked(name, value, message):
  config = tiny_config().unlock()
  *groups, field = name.split(".")
  group = config
  for word in groups:
    group = group[word]
  if value is None or field in group:
    del group[field]
  if value is not None:
    group[field] = value
  with pytest.raises(config_lib.UserError) as raised:
    fields.check_fields(config)
  assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_run_of_no_iterations_is_refused():
  config = tiny_config("num_iterations=0", "initialize.num_iterations=0")
  with pytest.raises(config_lib.UserError, match="nothing to do"):
    fields.check_fields(config)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("none")
  return build.build(tiny_config(), workdir, mesh_lib.make_mesh({"data": 2}))


def test_solutions_of_a_file_must_fit_the_run(parts, tmp_path):
  path = tmp_path / "solutions.jsonl"
  config = tiny_config(f"experience.path={path}")
  task, policy = parts.task, parts.policy
  ((problem, text),) = task.demonstrations(
    "optimal", np.random.default_rng(0), 1
  )
  good = demonstration(policy, problem, text, policy.tokenizer.encode(text))
  other = task.heldout_problems(1)[0]
  change = dataclasses.replace

  def outside(tokens):
    return np.array([*tokens[:-1], policy.tokenizer.vocab_size], np.int32)

  bad = {
    "held out": change(good, problem=other),
    "outside the vocabulary": change(good, tokens=outside(good.tokens)),
    "of another text": change(good, text=text + "\n1"),
    "of task 'game24'": change(good, problem=change(problem, task="game24")),
    "is not of task": change(good, problem=change(problem, data={"x": 1})),
  }
  jsonl.write_solutions(path, [good])
  assert len(build.first_experience(config, policy, task)) == 1
  for words, solution in bad.items():
    jsonl.write_solutions(path, [good, solution])
    with pytest.raises(config_lib.UserError) as raised:
      build.first_experience(config, policy, task)
    message = str(raised.value)
    assert message.startswith(f"{path}, solution 2: ") and words in message
  # Tokens may be left out.
  row = jsonl.solution_row(good)
  for name in ("tokens", *jsonl.FLOAT_ARRAYS):
    row.pop(name, None)
  path.write_text(json.dumps(row))
  assert len(build.first_experience(config, policy, task)) == 1


def test_solutions_of_every_task_must_be_of_training_problems(tmp_path):
  path = tmp_path / "solutions.jsonl"
  arithmetic = make_task("arithmetic")
  rng = np.random.default_rng(0)
  ((problem, text),) = arithmetic.demonstrations("optimal", rng, 1)
  policy = tiny_policy()
  good = demonstration(policy, problem, text, policy.tokenizer.encode(text))
  config = tiny_config(f"experience.path={path}")
  jsonl.write_solutions(path, [good])
  assert len(build.first_experience(config, policy, arithmetic)) == 1
  heldout = arithmetic.heldout_problems(1)[0]
  jsonl.write_solutions(path, [dataclasses.replace(good, problem=heldout)])
  with pytest.raises(config_lib.UserError, match="is held out"):
    build.first_experience(config, policy, arithmetic)


REFLECTING = ("initialize.rows.judging=8", "learn.rows.revising=8")


def test_the_tokenizer_sees_the_marks_of_the_rows(tmp_path):
  def tokenizer(*changed):
    config = tiny_config("tokenizer.vocab_size=400", *changed)
    return build.tokenizer_of(config, build.task_of(config), tmp_path)

  task = build.task_of(tiny_config())
  marks = (task.judge_mark, task.revision_mark, "step 2: illegal number ")
  plain = tokenizer()
  # A mix without such rows has the tokenizer it always had.
  assert plain.to_bytes() == tokenizer("learn.rows.judging=0").to_bytes()
  reflecting = tokenizer(*REFLECTING)
  for mark in marks:
    assert len(reflecting.encode(mark)) <= 4 < len(plain.encode(mark))


def test_the_tokenizer_sees_the_mark_of_problems(tmp_path):
  config = tiny_config("tokenizer.vocab_size=400", "learn.rows.questions=8")
  task = build.task_of(config)
  tokenizer = build.tokenizer_of(config, task, tmp_path)
  assert len(tokenizer.encode(task.question_mark)) == 2


@pytest.mark.parametrize(
  "changes, words",
  [
    ("source=policy", "questions.source='policy', but no rows teach the"),
    ("source=polcy", "'polcy' is unknown; take one of uniform, frontier, poli"),
    (
      "pool_factor=2",
      "questions.pool_factor is not read with source='uniform'",
    ),
    ("source=policy memory=0.0 rows", "memory=0.0 is not in (0, 1]"),
    ("source=policy texts=3 rows", "unknown config field questions.texts"),
    (
      "source=policy rows lengths.row_tokens=9",
      "lengths.row_tokens=9 is too short for rows of questions, which have",
    ),
    (
      "source=policy rows initialize.num_iterations=0",
      "questions.source='policy', but no rows teach the",
    ),
  ],
)
def test_what_writes_problems_is_checked(changes, words, tmp_path):
  names = {"rows": "initialize.rows.questions=8"}
  config = tiny_config(*(
    names[change] if change in names
    else change if "." in change.partition("=")[0]
    else f"questions.{change}"
    for change in changes.split()
  ))  # fmt: skip
  assert words in refusal(config, tmp_path)


class Bare(Countdown):
  """Says nothing of what its problems look like."""

  problem_features = None


def test_a_task_must_have_features_to_choose_written_problems(
  tmp_path, monkeypatch
):
  changes = ("questions.source=policy", "learn.rows.questions=8")
  monkeypatch.setattr(build, "make_task", lambda _, **options: Bare(**options))
  words = "task 'countdown' has no problem_features"
  assert words in refusal(tiny_config(*changes), tmp_path)


def test_rows_that_do_not_fit_are_refused_with_the_field_to_raise(tmp_path):
  mesh = mesh_lib.make_mesh({"data": 2})
  short = ("tokenizer.vocab_size=400", "lengths.row_tokens=56")
  with pytest.raises(config_lib.UserError) as raised:
    build.build(tiny_config(*REFLECTING, *short), tmp_path, mesh)
  assert "lengths.row_tokens=56 is too short for rows" in str(raised.value)
  assert "\n" not in str(raised.value)
  long = tiny_config(*REFLECTING, *short, "lengths.row_tokens=200")
  fields.check_fields(long)
  assert build.build(long, tmp_path, mesh).initialize_rows


def test_a_tokenizer_that_cannot_be_written_leaves_nothing(
  parts, tmp_path, monkeypatch
):
  def fail(*_):
    raise OSError("no room")

  monkeypatch.setattr("os.replace", fail)
  with pytest.raises(config_lib.UserError, match="no room"):
    build.keep_tokenizer(parts.policy.tokenizer, tmp_path)
  assert not list(tmp_path.iterdir())


def test_evaluation_takes_the_devices_there_are():
  # Made on a mesh of 64: here are 8, and batches of 12 divide over 6.
  config = tiny_config("mesh.data=64", "evaluation.batch_size=12")
  assert build.evaluation_devices(config).size == 6


def regimes(*changes, names="('first','rl')", **fields):
  """A config of two regimes, of which the second changes fields."""
  return tiny_config(
    f"regimes.names={names}",
    "regimes.changes.first=()",
    f"regimes.changes.rl={changes!r}",
    *(f"{name}={value}" for name, value in fields.items()),
  )


def refusal(config, workdir):
  """The one line with which a config is refused, by its fields or parts."""
  with pytest.raises(config_lib.UserError) as raised:
    fields.check_fields(config)
    build.build(config, workdir, mesh_lib.make_mesh({"data": 2}))
  assert "\n" not in str(raised.value)
  return str(raised.value)


@pytest.mark.parametrize(
  "change, words",
  [
    *(
      (
        f"{field}={value}",
        f"regimes.changes.rl changes {field}, which stays the same in a run",
      )
      for field, value in (
        ("learn.optimizer.learning_rate", 0.1),
        ("learn.num_updates", 6),
        ("learn.updates_per_call", 1),
        ("search.num_problems", 12),
        ("seed", 1),
        ("evaluation.num_problems", 8),
        ("network.width", 32),
      )
    ),
    ("learn.rows.serch=4", "learn.rows of rl.serch is unknown: rows are"),
    (
      "learn.rows.policy_gradient=7",
      "learn.rows of rl has 7 rows of 56 tokens",
    ),
    ("learn.num_microbatches=3", "learn.rows of rl has 40 rows of 56 tokens"),
    ("learn.refrence=start", "unknown config field learn.refrence: did you"),
    ("learn.reference=begin", "learn.reference='begin' is unknown; take one"),
    ("learn.rows.pairs=4", "set it to 'start' or 'iteration'"),
    ("learn.rows.policy_gradient=8", "search.strategy='mcts' chooses which"),
    ("learn.advantages.baseline=mean", "baseline='mean' is unknown"),
    ("search.strategy=mtcs", "strategy='mtcs': choose one of"),
    ("search.strategy=revision", "learning does not read: choose another"),
    ("search.batch_size=3", "search.batch_size=3 does not divide over 2"),
    ("search.num_revisions=-1", "search.num_revisions=-1 must be 0 or more"),
  ],
)
def test_changes_of_a_regime_are_checked(change, words, tmp_path):
  assert words in refusal(regimes(change), tmp_path)


def test_names_of_regimes_are_checked(tmp_path):
  words = "regimes.changes.rl is not in regimes.names=('first',): put it there"
  assert words in refusal(regimes(names="('first',)"), tmp_path)
  assert "'late'" in refusal(regimes(names="('first','late')"), tmp_path)
  assert "regimes.names=(): put" in refusal(regimes(names="()"), tmp_path)
  config = regimes()
  with config.unlocked():
    del config.regimes.changes["rl"]
    config.regimes.changes.rl = "learn.reference=start"
  assert "must be a tuple of texts" in refusal(config, tmp_path)


def test_the_reference_of_an_earlier_version_s_run_is_known():
  config = regimes("learn.reference=start")
  with config.unlocked():
    del config.learn["process"]
  assert regime_parts.has_reference(config)


def test_initialization_has_no_rows_of_searches(tmp_path):
  for kind in ("policy_gradient", "best", "pairs"):
    config = tiny_config(f"initialize.rows.{kind}=4")
    words = f"initialize.rows.{kind}: nothing is searched in that phase"
    assert refusal(config, tmp_path).startswith(words)


def test_options_of_learning_reach_what_makes_rows_and_moves_weights(tmp_path):
  mesh = mesh_lib.make_mesh({"data": 2})
  for asked in (True, False):
    config = tiny_config(
      f"learn.play_outcomes={asked}",
      f"learn.optimizer.name={'muon' if asked else 'adamw'}",
    )
    parts = build.build(config, tmp_path, mesh)
    rng = np.random.default_rng(0)
    maker = parts.regimes["learn"].learn_rows
    (whole, openings), _ = maker.batches(rng, parts.experience, 2)
    assert whole.value_weights.any() == asked
    assert not openings.value_weights.any()
    params = jax.eval_shape(parts.policy.network.init, jax.random.key(0))
    state = jax.eval_shape(parts.optimizer.init, params)
    steps = jax.make_jaxpr(parts.optimizer.update)(params, state, params)
    assert ("shard_map" in str(steps)) == asked


def test_outcomes_of_play_want_rows_of_play(tmp_path):
  config = tiny_config(
    "learn.rows.hindsight_play=0", "learn.rows.consequences=0"
  )
  message = refusal(config, tmp_path)
  assert message.startswith("learn.play_outcomes=True is not read without rows")


def test_regimes_have_parts_of_their_own(tmp_path):
  config = regimes(
    "search.strategy=best_of_n",
    "learn.reference=start",
    "learn.rows.policy_gradient=8",
    "learn.policy_gradient.entropy_coefficient=0.1",
    "learn.policy_gradient.max_value_change=0.2",
  )
  fields.check_fields(config)
  parts = build.build(config, tmp_path, mesh_lib.make_mesh({"data": 2}))
  first, rl = (parts.regimes[name] for name in ("first", "rl"))
  assert parts.schedule.names[0] == "first"
  assert list(parts.regimes) == ["first", "rl"]
  assert first.solver.strategy.name == "mcts-puct"
  assert rl.solver.strategy.name == "best_of_n"
  assert not first.fresh_rows and rl.fresh_rows
  # A bound on the changes of values is told to what scores the draws.
  assert rl.fresh_rows._reads_values and not first.fresh_rows._reads_values
  assert first.update_fn is not rl.update_fn
  assert regime_parts.has_reference(config) and not regime_parts.has_reference(
    tiny_config()
  )
  # Those that learn by one rule share its program.
  config = regimes("search.strategy=best_of_n")
  parts = build.build(config, tmp_path, mesh_lib.make_mesh({"data": 2}))
  first, rl = (parts.regimes[name] for name in ("first", "rl"))
  assert first.update_fn is rl.update_fn
  assert not regime_parts.has_reference(config)


def test_the_tokenizer_sees_the_marks_of_every_regime(tmp_path):
  task = build.task_of(tiny_config())

  def num_tokens(config):
    config = config.copy_and_resolve_references().unlock()
    config.tokenizer.vocab_size = 400
    tokenizer = build.tokenizer_of(config, task, tmp_path)
    return len(tokenizer.encode(task.judge_mark))

  assert num_tokens(regimes("learn.rows.judging=8")) <= 4
  assert num_tokens(regimes()) > 4
