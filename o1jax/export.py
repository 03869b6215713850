"""Writes the policy of a run into a folder that `solve` can load.

python -m o1jax.export --workdir=runs/countdown --to=o1jax/assets/countdown
"""

import pathlib

from absl import flags

from o1jax import config as config_lib
from o1jax import load
from o1jax.policy import pretrained

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
TO = flags.DEFINE_string("to", None, "Folder to write.")
ITERATION = flags.DEFINE_integer(
  "iteration", None, "A saved iteration; the last by default, -1: the best."
)


def main(argv: list[str]) -> None:
  """Reads the flags and exports."""
  if len(argv) > 1 or WORKDIR.value is None or TO.value is None:
    raise config_lib.UserError(
      "usage: python -m o1jax.export --workdir=W --to=FOLDER"
    )
  trained = load.from_workdir(pathlib.Path(WORKDIR.value), ITERATION.value)
  manifest = config_lib.read_manifest(WORKDIR.value)
  card = {
    "config": manifest["config"],
    "versions": manifest["versions"],
    "iteration": trained.iteration,
  }
  with config_lib.user_input():
    pretrained.save(
      pathlib.Path(TO.value),
      trained.params,
      trained.policy.tokenizer.to_bytes(),
      card,
    )
  print(f"wrote iteration {trained.iteration} to {TO.value}")


if __name__ == "__main__":
  config_lib.run(main)
