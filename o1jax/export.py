"""Writes the policy of a run into a folder that `solve` can load.

python -m o1jax.export --workdir=runs/countdown --to=o1jax/assets/countdown
"""

import pathlib

from absl import flags

from o1jax import config as config_lib
from o1jax import load
from o1jax.policy import pretrained


def define_flags() -> None:
  """Defines what the command line takes; `main` reads it."""
  flags.DEFINE_string("workdir", None, "Folder of the run.")
  flags.DEFINE_string("to", None, "Folder to write.")
  flags.DEFINE_integer(
    "iteration", None, "A saved iteration; the last by default, -1: the best."
  )


def main(argv: list[str]) -> None:
  """Reads the flags and exports."""
  if len(argv) > 1 or flags.FLAGS.workdir is None or flags.FLAGS.to is None:
    raise config_lib.UserError(
      "usage: python -m o1jax.export --workdir=W --to=FOLDER"
    )
  trained = load.from_workdir(
    pathlib.Path(flags.FLAGS.workdir), flags.FLAGS.iteration
  )
  manifest = config_lib.read_manifest(flags.FLAGS.workdir)
  card = {
    "config": manifest["config"],
    "versions": manifest["versions"],
    "iteration": trained.iteration,
  }
  with config_lib.user_input():
    pretrained.save(
      pathlib.Path(flags.FLAGS.to),
      trained.params,
      trained.policy.tokenizer.to_bytes(),
      card,
    )
  print(f"wrote iteration {trained.iteration} to {flags.FLAGS.to}")


if __name__ == "__main__":
  define_flags()
  config_lib.run(main)
