"""A policy in a folder: what a trained run leaves for others to load.

Three files: `policy.json` (the config it was made with, and where it comes
from), `tokenizer.model` and `params.npz`. Loading runs no code of theirs and
checks every name and shape against the network of the config.
"""

import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

CARD, TOKENIZER, PARAMS = "policy.json", "tokenizer.model", "params.npz"


def save(
  directory: pathlib.Path,
  params: Any,
  tokenizer_model: bytes,
  card: Mapping[str, Any],
) -> None:
  """Writes a policy; the folder is made if needed.

  All is written beside the folder before anything in it is replaced, so that a
  write that fails leaves a policy that was there as it was.

  Args:
    directory: where to.
    params: of the network, nested dict of arrays.
    tokenizer_model: `Tokenizer.to_bytes()`.
    card: JSON values; `config` is the resolved config of the run.

  Raises:
    OSError: the files cannot be written.
  """
  leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(params))
  arrays = {_name(path): np.asarray(leaf) for path, leaf in leaves}
  text = json.dumps(dict(card), indent=2, sort_keys=True)
  directory.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=directory.parent) as name:
    new = pathlib.Path(name)
    np.savez(new / PARAMS, allow_pickle=False, **arrays)
    (new / TOKENIZER).write_bytes(tokenizer_model)
    (new / CARD).write_text(text + "\n")
    directory.mkdir(exist_ok=True)
    for file in (PARAMS, TOKENIZER, CARD):
      os.replace(new / file, directory / file)


def load_card(directory: pathlib.Path) -> dict[str, Any]:
  """The card of a policy.

  Raises:
    ValueError: the folder holds no policy.
  """
  try:
    card = json.loads((directory / CARD).read_text())
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{directory} holds no policy: {CARD} is missing or damaged"
    ) from error
  if not isinstance(card, dict) or "config" not in card:
    raise ValueError(f"{directory / CARD} has no config: not made by o1jax")
  return card


def load_tokenizer_model(directory: pathlib.Path) -> bytes:
  """The serialized tokenizer of a policy."""
  try:
    return (directory / TOKENIZER).read_bytes()
  except OSError as error:
    raise ValueError(f"{directory} has no {TOKENIZER}") from error


def load_params(directory: pathlib.Path, like: Any) -> Any:
  """Parameters of a policy.

  Args:
    directory: where from.
    like: pytree of arrays or shapes; the names, shapes and types expected.

  Raises:
    ValueError: a file that cannot be read, or that is of another network.
  """
  path = directory / PARAMS
  try:
    with open(path, "rb") as file:
      table = np.load(file, allow_pickle=False)
      arrays = {name: table[name] for name in table.files}
  # A damaged zip file can raise almost anything.
  except Exception as error:
    raise ValueError(f"{path} cannot be read: {error}") from error
  leaves, structure = jax.tree_util.tree_flatten_with_path(like)
  wanted = {_name(at): leaf for at, leaf in leaves}
  for name in sorted(wanted.keys() | arrays.keys()):
    found = arrays[name].shape if name in arrays else "absent"
    expected = wanted[name].shape if name in wanted else "absent"
    if found != expected:
      raise ValueError(
        f"{path} is of another network: {name} is {found}, the config's "
        f"network has {expected}"
      )
  loaded = [arrays[_name(at)].astype(leaf.dtype) for at, leaf in leaves]
  return jax.tree_util.tree_unflatten(structure, loaded)


def _name(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
