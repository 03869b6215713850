"""Runs or resumes a config: initialization, then search and learning.

  python -m o1jax.main --config=configs/countdown.py --workdir=runs/countdown
  python -m o1jax.main --config=configs/countdown.py:smoke --workdir=/tmp/smoke

Any field of the config can be set with --config.a.b=value. The same command
again resumes where the run stopped.
"""

from absl import flags

from o1jax import config as config_lib
from o1jax import fields, iterate, mesh


def define_flags() -> None:
  """Defines what the command line takes; `main` reads it."""
  config_lib.define_config_flag()
  flags.DEFINE_string("workdir", None, "Folder of the run.")
  flags.DEFINE_bool("profile", False, "Write a profiler trace.")
  flags.DEFINE_string(
    "compilation_cache", "~/.cache/o1jax/jax", "Keeps compiled programs."
  )


def main(argv: list[str]) -> None:
  """Reads the flags and runs."""
  if len(argv) > 1:
    raise config_lib.UserError(f"unknown argument {argv[1]!r}")
  if flags.FLAGS.workdir is None:
    raise config_lib.UserError("--workdir is missing: --workdir=runs/countdown")
  config = config_lib.load_flag_config()
  # The run checks them too, but the memory is set before it begins.
  fields.check_fields(config)
  mesh.keep_freed_memory(config.mesh.num_cpu_devices)
  mesh.enable_compilation_cache(flags.FLAGS.compilation_cache)
  iterate.run(config, flags.FLAGS.workdir, profile=flags.FLAGS.profile)
  print(f"report: {flags.FLAGS.workdir}/report.html")


if __name__ == "__main__":
  define_flags()
  config_lib.run(main)
