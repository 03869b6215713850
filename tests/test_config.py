"""Configs: overrides, clear refusals, and the workdir's own config."""

import json
import pathlib
import subprocess
import sys

import jax
import ml_collections
import pytest

import o1jax
from o1jax import config as config_lib

CONFIG_FILE = '''
"""A config for the tests."""

from ml_collections import ConfigDict


def get_config(arg=None):
  if arg not in (None, "smoke"):
    raise ValueError(f"unknown config argument {arg!r}: it is smoke or absent")
  config = ConfigDict()
  config.seed = 0
  config.name = "countdown"
  config.learn = ConfigDict()
  config.learn.batch_size = 8 if arg == "smoke" else 64
  config.learn.learning_rate = 1e-3
  config.learn.is_packed = False
  config.learn.limit = None
  config.search = ConfigDict()
  config.search.budgets = (8, 16)
  config.search.weights = (0.5, 1.0)
  config.learn.rows = ConfigDict()
  config.learn.rows.expert = 8
  return config
'''


@pytest.fixture
def path(tmp_path):
  path = tmp_path / "config.py"
  path.write_text(CONFIG_FILE)
  return path


@pytest.mark.parametrize(
  "override, field, value",
  [
    ("seed=3", "seed", 3),
    ("name=12", "name", "12"),
    ("name=", "name", ""),
    ("learn.batch_size=-1", "learn.batch_size", -1),
    ("learn.learning_rate=1", "learn.learning_rate", 1.0),
    ("learn.learning_rate=3e-4", "learn.learning_rate", 3e-4),
    ("learn.is_packed=True", "learn.is_packed", True),
    ("learn.is_packed=0", "learn.is_packed", False),
    ("learn.limit=5", "learn.limit", 5),
    ("learn.limit=text=x", "learn.limit", "text=x"),
    ("search.budgets=4,8,12", "search.budgets", (4, 8, 12)),
    ("search.budgets=(4,)", "search.budgets", (4,)),
    ("search.budgets=4", "search.budgets", (4,)),
    ("search.budgets=()", "search.budgets", ()),
    ("search.weights=1,0.25", "search.weights", (1.0, 0.25)),
  ],
)
def test_override_is_read_as_the_type_of_the_field(
  path, override, field, value
):
  fields = config_lib.flatten(config_lib.load_config(path, [override]))
  assert repr(fields[field]) == repr(value)  # 1 is not 1.0, nor True.
  others = config_lib.flatten(config_lib.load_config(path))
  assert others[field] != value or field == "learn.is_packed"
  del fields[field], others[field]
  assert fields == others


def test_kinds_of_rows_can_be_added(path):
  rows = ("learn.rows.judging=4", "learn.rows.judging=5", "learn.rows.expert=0")
  config = config_lib.load_config(path, rows)
  assert config.learn.rows.to_dict() == {"expert": 0, "judging": 5}
  assert config.is_locked and config.learn.rows.is_locked
  with pytest.raises(config_lib.UserError, match="must be a whole number"):
    config_lib.load_config(path, ["learn.rows.judging=many"])
  with pytest.raises(config_lib.UserError, match="judging is a value"):
    config_lib.load_config(path, ["learn.rows.judging.x=1"])


@pytest.mark.parametrize(
  "override, field, value",
  [
    ("search.options.width=4", "search.options.width", 4),
    ("search.options.stop=false", "search.options.stop", False),
    ("search.options.cost=steps", "search.options.cost", "steps"),
    ("search.cache.dtype=int8", "search.cache.dtype", "int8"),
    ("search.guidance.certainty=1", "search.guidance.certainty", 1.0),
    ("evaluation.options.mcts.max_blocks=8", None, 8),
  ],
)
def test_options_can_be_added(override, field, value):
  file = pathlib.Path(o1jax.__file__).parent.parent / "configs/countdown.py"
  fields = config_lib.flatten(config_lib.load_config(file, [override]))
  found = fields[field or override.partition("=")[0]]
  assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
  "override, message",
  [
    (
      "learn.batchsize=3",
      "unknown config field learn.batchsize: did you mean learn.batch_size?",
    ),
    (
      "learning.batch_size=3",
      "unknown config field learning.batch_size: did you mean "
      "learn.batch_size?",
    ),
    ("sed=3", "unknown config field sed: did you mean seed?"),
    (
      "batch_size=3",
      "unknown config field batch_size: did you mean learn.batch_size?",
    ),
    (
      "budgets=3",
      "unknown config field budgets: did you mean search.budgets?",
    ),
    ("zzzzzz=3", "unknown config field zzzzzz"),
    ("seed.x=3", "unknown config field seed.x: seed is a value"),
    (
      "search=3",
      "config field search is a group: set one of search.budgets, "
      "search.weights",
    ),
    ("seed=x", "config field seed must be a whole number, not 'x'"),
    ("seed=1.5", "config field seed must be a whole number, not '1.5'"),
    ("seed=True", "config field seed must be a whole number, not 'True'"),
    (
      "learn.learning_rate=fast",
      "config field learn.learning_rate must be a number, not 'fast'",
    ),
    (
      "learn.is_packed=maybe",
      "config field learn.is_packed must be true or false, not 'maybe'",
    ),
    (
      "search.budgets=4,x",
      "config field search.budgets must be a tuple like (8, 16), not '4,x'",
    ),
    (
      "search.budgets=1.5",
      "config field search.budgets must be a tuple like (8, 16), not '1.5'",
    ),
  ],
)
def test_bad_override_ends_with_one_line(path, override, message):
  with pytest.raises(config_lib.UserError) as caught:
    config_lib.load_config(path, [override])
  assert str(caught.value) == message


def test_argument_after_the_colon_reaches_the_file(path):
  assert config_lib.load_config(f"{path}:smoke").learn.batch_size == 8
  with pytest.raises(config_lib.UserError, match="argument 'smok': it is smok"):
    config_lib.load_config(f"{path}:smok")
  with pytest.raises(config_lib.UserError, match="no config file .*nothing.py"):
    config_lib.load_config(path.with_name("nothing.py"))


def test_config_is_locked(path):
  config = config_lib.load_config(path)
  with pytest.raises(AttributeError):
    config.learn.batchsize = 3
  with pytest.raises(AttributeError):
    _ = config.learn.batchsize


def test_workdir_resumes_with_its_own_config_only(path, tmp_path):
  workdir = tmp_path / "runs" / "first"
  config = config_lib.load_config(path, ["search.weights=0.1,2"])
  assert not config_lib.open_workdir(workdir, config)
  assert config_lib.open_workdir(workdir, config)
  assert [file.name for file in workdir.iterdir()] == ["manifest.json"]
  other = config_lib.load_config(path, ["seed=1", "search.budgets=8,32"])
  with pytest.raises(config_lib.UserError) as caught:
    config_lib.open_workdir(workdir, other)
  assert str(caught.value) == (
    f"{workdir} belongs to another config: search.budgets was [8, 16], is "
    "[8, 32]; search.weights was [0.1, 2.0], is [0.5, 1.0]; seed was 0, is 1. "
    "Take another --workdir, or the old values"
  )
  assert config_lib.config_of_workdir(workdir).to_dict() == config.to_dict()


def test_a_workdir_of_an_earlier_version_kept_no_checksums(path, tmp_path):
  config = config_lib.load_config(path)
  config_lib.open_workdir(tmp_path / "run", config, [str(path)])
  manifest = config_lib.read_manifest(tmp_path / "run")
  assert manifest.pop("files").keys() == {str(path)}
  path.write_text(path.read_text() + "# changed")
  with pytest.raises(config_lib.UserError, match=f"{path} is gone or changed"):
    config_lib.check_workdir(tmp_path / "run", config)
  (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
  assert config_lib.check_workdir(tmp_path / "run", config)


def test_manifest_answers_the_first_questions_of_a_bug_report(path, tmp_path):
  config = config_lib.load_config(path)
  config_lib.open_workdir(tmp_path / "run", config)
  manifest = config_lib.read_manifest(tmp_path / "run")
  assert manifest["versions"]["o1jax"] == o1jax.__version__
  assert manifest["versions"]["jax"] == jax.__version__
  assert manifest["device"] == {"platform": "cpu", "kind": "cpu", "count": 8}
  assert manifest["git_hash"] is None or len(manifest["git_hash"]) in (40, 41)
  assert manifest["config"]["search"]["budgets"] == [8, 16]


def test_differing_fields_tell_absent_fields_and_types_apart():
  old = {"a": {"b": 1, "c": None}, "d": 0}
  new = {"a": {"b": 1.0, "c": None}, "e": False}
  assert config_lib.differing_fields(old, old) == []
  assert config_lib.differing_fields(old, new) == [
    "a.b was 1, is 1.0",
    "d was 0, is absent",
    "e was absent, is False",
  ]


@pytest.mark.parametrize(
  "content, message",
  [
    (None, "is not a workdir: it has no manifest.json"),
    ('{"config": {', "is damaged: Expecting"),
    ('{"versions": {}}', "is damaged: it holds no config"),
    ("[]", "is damaged: it holds no config"),
  ],
)
def test_damaged_or_foreign_workdir_is_refused(tmp_path, content, message):
  if content is not None:
    (tmp_path / "manifest.json").write_text(content)
  with pytest.raises(config_lib.UserError, match=message):
    config_lib.config_of_workdir(tmp_path)


def test_folder_of_other_files_is_not_taken_as_workdir(path, tmp_path):
  config = config_lib.load_config(path)
  with pytest.raises(config_lib.UserError, match="but no manifest.json"):
    config_lib.open_workdir(tmp_path, config)
  assert [file.name for file in tmp_path.iterdir()] == ["config.py"]
  # What a process killed in its first write leaves behind is its own.
  workdir = tmp_path / "killed"
  workdir.mkdir()
  (workdir / "manifest.json.tmp").write_text("{")
  assert not config_lib.open_workdir(workdir, config)
  assert config_lib.open_workdir(workdir, config)


PROGRAM = """
import sys
from absl import flags
from o1jax import config
config.define_config_flag()
flags.DEFINE_string("workdir", None, "Folder of the run.")
def main(argv):
  c = config.load_flag_config()
  if flags.FLAGS.workdir == "broken":
    raise ValueError("a bug")
  fields = config.flatten(c)
  print(argv[1:], flags.FLAGS.workdir, fields["seed"],
        fields["learn.is_packed"], fields["learn.batch_size"])
config.run(main)
"""


def run_program(*arguments):
  return subprocess.run(
    [sys.executable, "-c", PROGRAM, *arguments],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parent.parent,
  )


def test_command_line_takes_every_form_of_flag(path):
  done = run_program(
    f"--config={path}:smoke",
    "--config.seed",
    "4",
    "--config.learn.is_packed",
    "--workdir=w",
    "3 7 2 = 13",
  )
  assert done.stdout == "['3 7 2 = 13'] w 4 True 8\n", done.stderr
  done = run_program(
    "--config.learn.is_packed",
    "--noconfig.learn.is_packed",
    "-config.learn.batch_size=2",
    "--config",
    str(path),
    "--",
    "--config.seed=9",
  )
  assert done.stdout == "['--config.seed=9'] None 0 False 2\n", done.stderr


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "--config is missing: --config=configs/countdown.py"),
    (["--config=nothing.py"], "there is no config file nothing.py"),
    (["--config=PATH", "--config.sed=1"], "did you mean seed?"),
    (["--config=PATH", "--wrkdir=w"], "Unknown command line flag 'wrkdir'."),
    (["--config=PATH", "--config.seed="], "must be a whole number, not ''"),
  ],
)
def test_bad_flags_end_with_one_line_and_code_2(path, arguments, message):
  done = run_program(*(a.replace("PATH", str(path)) for a in arguments))
  assert done.returncode == 2
  assert done.stdout == ""
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ") and message in line


def test_a_bug_keeps_its_traceback(path):
  done = run_program(f"--config={path}", "--workdir=broken")
  assert done.returncode == 1
  assert "Traceback" in done.stderr and "a bug" in done.stderr


def test_user_input_marks_values_and_files_only():
  for error in (ValueError("v"), FileNotFoundError("f")):
    with pytest.raises(config_lib.UserError), config_lib.user_input():
      raise error
  with pytest.raises(KeyError), config_lib.user_input():
    raise KeyError("k")


CONFIGS = sorted(
  (pathlib.Path(__file__).parent.parent / "configs").glob("*.py")
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("arg", ["", ":smoke"])
def test_every_config_loads_and_survives_its_manifest(path, arg, tmp_path):
  config = config_lib.load_config(f"{path}{arg}")
  assert isinstance(config, ml_collections.ConfigDict)
  for name, value in config_lib.flatten(config).items():
    assert not isinstance(value, list), f"{name} is a list: take a tuple"
  config_lib.open_workdir(tmp_path / "run", config)
  saved = config_lib.config_of_workdir(tmp_path / "run")
  assert saved.to_dict() == config.to_dict()
  assert json.loads((tmp_path / "run" / "manifest.json").read_text())
