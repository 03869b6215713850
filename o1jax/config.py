"""Configs: pages of Python that list every field once, and how runs keep them.

A config file holds `get_config(arg=None)`, which returns an
`ml_collections.ConfigDict`; the text after a colon, as in
`configs/countdown.py:smoke`, is its `arg`. Any field can be overridden by
`--config.a.b=value`. Unknown names and values of the wrong type end with one
line that names the field and the nearest one there is.

A command starts with `run(main)`: it parses the flags and turns a `UserError`
into that one line and exit code 2. A run writes its resolved config to
`manifest.json` with versions, commit, device and the checksums of files that it
goes on reading, and a later run in the same workdir is compared with it.
"""

import ast
import contextlib
import difflib
import importlib.metadata
import json
import os
import pathlib
import platform
import runpy
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import o1jax

if TYPE_CHECKING:
  from ml_collections import ConfigDict

MANIFEST = "manifest.json"
# Groups to which an override may add, and what a new field is before it is set:
# a count, a weight, or an option of any type.
OPEN_GROUPS = {
  "initialize.rows": 0,
  "learn.rows": 0,
  "learn.advantages": None,
  "learn.policy_gradient": None,
  "learn.preference": None,
  "learn.pairs": None,
  "learn.process": None,
  "learn.replay": None,
  "questions": None,
  "health": None,
  "regimes": None,
  "regimes.changes": (),
  "search.cache": None,
  "search.guidance": 0.0,
  "search.options": None,
  "search.rule_options": None,
  "evaluation.guidance": 0.0,
  "evaluation.rule_options": None,
}
# One whose fields are groups of options.
GROUP_OF_OPTIONS = "evaluation.options"

# Packages whose version can change what a run computes.
PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "numpy",
  "sentencepiece",
)


class UserError(ValueError):
  """Bad input; the message is one line that says what to change."""


@contextlib.contextmanager
def user_input() -> Iterator[None]:
  """Marks errors about values raised inside as the user's to mend."""
  try:
    yield
  except (ValueError, OSError) as error:
    raise UserError(str(error)) from error


@contextlib.contextmanager
def writing(where: str | os.PathLike) -> Iterator[None]:
  """Marks files that cannot be written inside `where` as the user's to mend."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f"{where} could not be written ({error}): mend that and run again"
    ) from error


def load_config(
  spec: str | os.PathLike, overrides: Sequence[str] = ()
) -> "ConfigDict":
  """Loads a config file and applies overrides.

  Args:
    spec: path of the file, or "path:arg".
    overrides: texts "a.b=value", as after `--config.` on the command line.

  Returns:
    The config, locked: a field that is not there cannot be read or set.

  Raises:
    UserError: no such file, a bad `arg`, an unknown field or a wrong type.
  """
  path, _, arg = str(spec).partition(":")
  if not pathlib.Path(path).is_file():
    raise UserError(f"there is no config file {path}")
  # Unlike an import, this leaves no compiled copy beside the file.
  names = runpy.run_path(path)
  with user_input():
    config = names["get_config"](arg or None)
  config.lock()
  apply_overrides(config, overrides)
  return config


def apply_overrides(config: "ConfigDict", overrides: Sequence[str]) -> None:
  """Sets fields of `config` from texts "a.b=value", in order.

  The value is read as the type that the field has: true or false, a whole
  number, a number, a text, or a tuple such as 2,4 or (2,4). A field that is
  None takes any of them. Kinds of rows, guidances and options may be added,
  since a config lists only those that it sets.

  Raises:
    UserError: an unknown field, a group of fields, or a wrong type.
  """
  from ml_collections import ConfigDict

  for override in overrides:
    name, equals, text = override.partition("=")
    if not equals:
      raise UserError(f"--config.{name} lacks its value: --config.{name}=...")
    group, seen = config, []
    *groups, field = name.split(".")
    for word in [*groups, field]:
      if not isinstance(group, ConfigDict):
        raise UserError(
          f"unknown config field {name}: {'.'.join(seen)} is a value"
        )
      _open_field(group, ".".join(seen), word)
      if word not in group:
        raise UserError(
          f"unknown config field {name}{nearest(list(flatten(config)), name)}"
        )
      seen.append(word)
      parent, group = group, group[word]
    if isinstance(group, ConfigDict):
      raise UserError(
        f"config field {name} is a group: set one of "
        + ", ".join(f"{name}.{key}" for key in group)
      )
    parent[field] = _parse_value(name, text, group)


def _open_field(group: "ConfigDict", name: str, word: str) -> None:
  """Adds the field `word` to the group where a config leaves that open."""
  from ml_collections import ConfigDict

  if word in group:
    return
  with group.unlocked():
    if name in OPEN_GROUPS:
      group[word] = OPEN_GROUPS[name]
    elif name == GROUP_OF_OPTIONS:
      group[word] = ConfigDict()
    elif name.startswith(GROUP_OF_OPTIONS + "."):
      group[word] = None


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Fields by their full name: {"learn.batch_size": 64, ...}."""
  fields = {}
  for key, value in config.items():
    if hasattr(value, "items"):
      fields.update(flatten(value, f"{prefix}{key}."))
    else:
      fields[f"{prefix}{key}"] = value
  return fields


def make_manifest(
  config: "ConfigDict", files: Sequence[str] = ()
) -> dict[str, Any]:
  """What a bug report asks first: config, versions, commit and device.

  Args:
    config: resolved config.
    files: paths whose size and checksum are kept.
  """
  import jax

  versions = {"o1jax": o1jax.__version__, "python": platform.python_version()}
  for package in PACKAGES:
    versions[package] = importlib.metadata.version(package)
  device = jax.devices()[0]
  return {
    "config": json.loads(json.dumps(config.to_dict())),
    "versions": versions,
    "git_hash": _git_hash(),
    "device": {
      "platform": device.platform,
      "kind": device.device_kind,
      "count": jax.device_count(),
    },
    "files": {path: _checksum(path) for path in files},
  }


def check_workdir(workdir: str | os.PathLike, config: "ConfigDict") -> bool:
  """Checks that a workdir is the config's own or free; writes nothing.

  Args:
    workdir: need not be there.
    config: resolved config of this run.

  Returns:
    True where the workdir was claimed before, so that the run resumes.

  Raises:
    UserError: the workdir belongs to another config; names the fields that
      differ. Or a file that it goes on reading is not what it was, or it holds
      files, but no manifest.
  """
  workdir = pathlib.Path(workdir)
  if (workdir / MANIFEST).exists():
    manifest = read_manifest(workdir)
    new = json.loads(json.dumps(config.to_dict()))
    differing = differing_fields(manifest["config"], new)
    if differing:
      raise UserError(
        f"{workdir} belongs to another config: "
        + "; ".join(differing)
        + ". Take another --workdir, or the old values"
      )
    # Runs of earlier versions kept none.
    for path, kept in manifest.get("files", {}).items():
      if _checksum(path) != kept:
        raise UserError(
          f"{path} is gone or changed since {workdir} began with it: put it "
          "back as it was, or take another --workdir"
        )
    return True
  # A process killed in its first write leaves an unfinished manifest.
  unfinished = MANIFEST + ".tmp"
  if workdir.is_dir() and any(p.name != unfinished for p in workdir.iterdir()):
    raise UserError(
      f"{workdir} holds files but no {MANIFEST}: take an empty --workdir"
    )
  return False


def open_workdir(
  workdir: str | os.PathLike, config: "ConfigDict", files: Sequence[str] = ()
) -> bool:
  """Claims a workdir, made if needed, for a config; else as `check_workdir`.

  Args:
    workdir: made if needed.
    config: resolved config of this run.
    files: paths that must hold the same whenever the run is resumed.
  """
  if check_workdir(workdir, config):
    return True
  workdir = pathlib.Path(workdir)
  with user_input():
    workdir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(make_manifest(config, files), indent=2, sort_keys=True)
    write_atomically(workdir / MANIFEST, f"{text}\n".encode())
  return False


def read_manifest(workdir: str | os.PathLike) -> dict[str, Any]:
  """Reads what `open_workdir` wrote.

  Raises:
    UserError: there is no manifest, or it is damaged.
  """
  path = pathlib.Path(workdir) / MANIFEST
  try:
    manifest = json.loads(path.read_text())
  except OSError as error:
    raise UserError(
      f"{workdir} is not a workdir: it has no {MANIFEST}"
    ) from error
  except ValueError as error:
    raise UserError(f"{path} is damaged: {error}") from error
  if not isinstance(manifest, dict) or "config" not in manifest:
    raise UserError(f"{path} is damaged: it holds no config")
  return manifest


def config_of_workdir(workdir: str | os.PathLike) -> "ConfigDict":
  """The resolved config that a workdir was made with, locked."""
  return from_dict(read_manifest(workdir)["config"])


def from_dict(fields: Mapping[str, Any]) -> "ConfigDict":
  """A config that was kept as JSON, locked."""
  from ml_collections import ConfigDict

  return ConfigDict(_tuples(dict(fields))).lock()


def differing_fields(
  old: Mapping[str, Any], new: Mapping[str, Any]
) -> list[str]:
  """One text per field that differs: "learn.batch_size was 64, is 32"."""
  old_fields, new_fields = flatten(old), flatten(new)
  differing = []
  for name in sorted(old_fields.keys() | new_fields.keys()):
    was = repr(old_fields[name]) if name in old_fields else "absent"
    now = repr(new_fields[name]) if name in new_fields else "absent"
    if was != now:
      differing.append(f"{name} was {was}, is {now}")
  return differing


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
  """Writes a file: after a crash or an error it is there whole or as before."""
  path = pathlib.Path(path)
  unfinished = path.with_name(path.name + ".tmp")
  try:
    with open(unfinished, "wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(unfinished, path)
  except OSError:
    unfinished.unlink(missing_ok=True)
    raise


def define_config_flag() -> None:
  """Defines `--config=path[:arg]`; `load_flag_config` reads it."""
  from absl import flags

  flags.DEFINE_string(
    "config", None, "Config file, as configs/countdown.py or path:arg."
  )
  flags.DEFINE_multi_string(
    "config_override", [], "What --config.a.b=value becomes: a.b=value."
  )


def load_flag_config() -> "ConfigDict":
  """The config that the command line asks for."""
  from absl import flags

  if flags.FLAGS.config is None:
    raise UserError("--config is missing: --config=configs/countdown.py")
  return load_config(flags.FLAGS.config, flags.FLAGS.config_override)


def parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses flags as absl does, `--config.a.b=value` among them.

  Accepts `--config.a.b value`, and `--config.a.b` and `--noconfig.a.b` for
  true and false.

  Returns:
    The program's name and the arguments that are not flags.
  """
  from absl import flags

  rewritten, arguments = [], list(argv)
  while arguments:
    argument = arguments.pop(0)
    if argument == "--":
      rewritten += [argument, *arguments]
      break
    bare = argument.lstrip("-")
    dashes = len(argument) - len(bare)
    if dashes not in (1, 2) or not bare.startswith(("config.", "noconfig.")):
      rewritten.append(argument)
      continue
    switch = "false" if bare.startswith("no") else "true"
    override = bare.partition(".")[2]
    if "=" not in override:
      has_value = switch == "true" and arguments
      if has_value and not arguments[0].startswith("-"):
        switch = arguments.pop(0)
      override = f"{override}={switch}"
    rewritten.append(f"--config_override={override}")
  return flags.FLAGS(rewritten)


def run(main: Callable[[Sequence[str]], Any]) -> None:
  """Runs a command; bad input ends with one line and exit code 2."""
  from absl import app, flags, logging

  def parse(argv):
    try:
      return parse_flags(argv)
    except flags.Error as error:
      _end(" ".join(str(error).split()))

  def guarded(argv):
    # Below this level jax reports every accelerator it did not find.
    logging.set_verbosity(logging.WARNING)
    try:
      return main(argv)
    except UserError as error:
      _end(str(error))

  app.run(guarded, flags_parser=parse)


def _end(message: str) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)


def nearest(names: Sequence[str], name: str) -> str:
  """ ": did you mean ...?" by likeness of the whole name, "" if none.

  Args:
    names: full names of fields.
    name: what was written.
  """
  groups = {n.rpartition(".")[0] for n in names} - {""}
  close = difflib.get_close_matches(name, [*names, *groups], n=1, cutoff=0.5)
  if not close:
    last = name.rpartition(".")[2]
    close = [n for n in names if n.rpartition(".")[2] == last][:1]
  return f": did you mean {close[0]}?" if close else ""


def _parse_value(name: str, text: str, old: Any) -> Any:
  """Reads `text` as the type of the field's present value."""
  if isinstance(old, str):
    return text
  if isinstance(old, bool):
    words = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() in words:
      return words[text.lower()]
    raise UserError(_wrong_type(name, text, "true or false"))
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if old is None:
    words = {"true": True, "false": False}
    return words.get(text.lower(), value)
  if isinstance(old, int):
    if isinstance(value, int) and is_number:
      return value
    raise UserError(_wrong_type(name, text, "a whole number"))
  if isinstance(old, float):
    if is_number:
      return float(value)
    raise UserError(_wrong_type(name, text, "a number"))
  if isinstance(old, tuple):
    value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    kinds = {type(item) for item in old}
    if kinds == {float} and {type(item) for item in value} <= {int, float}:
      return tuple(float(item) for item in value)
    if not kinds or all(type(item) in kinds for item in value):
      return value
    raise UserError(_wrong_type(name, text, f"a tuple like {old}"))
  raise UserError(f"config field {name} cannot be set from the command line")


def _wrong_type(name: str, text: str, wanted: str) -> str:
  return f"config field {name} must be {wanted}, not {text!r}"


def _tuples(value: Any) -> Any:
  """JSON knows lists only; configs hold tuples only."""
  if isinstance(value, dict):
    return {key: _tuples(item) for key, item in value.items()}
  if isinstance(value, list):
    return tuple(_tuples(item) for item in value)
  return value


def _checksum(path: str) -> list[int] | None:
  """Size and checksum of a file, None where it cannot be read."""
  try:
    content = pathlib.Path(path).read_bytes()
  except OSError:
    return None
  return [len(content), zlib.crc32(content)]


def _git_hash() -> str | None:
  """Commit of the checkout this package runs from, "+" when it was changed."""
  folder = pathlib.Path(o1jax.__file__).parent
  try:
    described = subprocess.run(
      ["git", "describe", "--always", "--abbrev=40", "--dirty=+"],
      cwd=folder,
      capture_output=True,
      text=True,
      timeout=10,
      check=True,
    )
  except (OSError, subprocess.SubprocessError):
    return None
  return described.stdout.strip()
