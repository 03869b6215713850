"""The scripts that set a bare machine up; what needs a network is not tried."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = ("test.sh", "launch/local.sh", ".ci/run", "launch/setup_venv.sh")

# Stands in for .venv/bin/python: notes what it is asked to do, and runs only
# what the scripts compute for themselves.
FAKE_PYTHON = """#!/usr/bin/env bash
(IFS="|" && echo "$*") >>"$LOG"
case "$1" in
  -m) exit 0 ;;
  *) exec REAL_PYTHON "$@" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
  """A copy of the scripts, with a space in its path."""
  folder = tmp_path / "a checkout"
  for name in (*SCRIPTS, "setup.py", "o1jax/__init__.py"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / name, folder / name)
  shutil.copytree(ROOT / "requirements", folder / "requirements")
  return folder


def make_fake_venv(checkout):
  python = checkout / ".venv" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.write_text(FAKE_PYTHON.replace("REAL_PYTHON", sys.executable))
  python.chmod(0o755)


def run(checkout, script, *arguments, cwd=None, **environment):
  """Runs a script; returns it and what .venv's python was asked to do.

  One line for each call, its arguments joined by "|".
  """
  log = checkout.parent / "log"
  log.write_text("")
  kept = {name: os.environ[name] for name in ("PATH", "HOME")}
  done = subprocess.run(
    ["bash", str(checkout / script), *arguments],
    capture_output=True,
    text=True,
    cwd=cwd or checkout,
    env={**kept, "LOG": str(log), **environment},
  )
  asked = [line for line in log.read_text().splitlines() if line[:3] == "-m|"]
  return done, [line for line in asked if line != "-m|pip|--version"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash_and_stop_at_errors(script):
  text = (ROOT / script).read_text()
  subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
  assert "set -euo pipefail" in text or script.endswith("setup_venv.sh")


def test_nothing_is_installed_twice(checkout):
  make_fake_venv(checkout)
  install = "-m|pip|install|--quiet|-e|.[dev]"
  _, asked = run(checkout, "test.sh")
  assert asked[0] == install
  _, asked = run(checkout, "test.sh")
  assert install not in asked
  # Who has the dev extras has the core.
  _, asked = run(checkout, "launch/local.sh")
  assert len(asked) == 1 and asked[0].startswith("-m|o1jax.main|")
  # Other requirements, another place: installed again.
  with open(checkout / "setup.py", "a") as file:
    file.write("# more\n")
  _, asked = run(checkout, "test.sh")
  assert asked[0] == install
  moved = checkout.rename(checkout.with_name("moved"))
  _, asked = run(moved, "test.sh")
  assert asked[0] == install
  _, asked = run(moved, "test.sh", PIP_CONSTRAINT="requirements/ci-311.txt")
  assert asked[0] == install


def test_core_is_not_enough_for_the_tests(checkout):
  make_fake_venv(checkout)
  _, asked = run(checkout, "launch/local.sh")
  assert asked[0] == "-m|pip|install|--quiet|-e|."
  _, asked = run(checkout, "test.sh")
  assert asked[0] == "-m|pip|install|--quiet|-e|.[dev]"


def test_lint_comes_before_the_tests_and_arguments_are_passed_on(checkout):
  make_fake_venv(checkout)
  _, asked = run(checkout, "test.sh", "tests/test_mesh.py", "-k", "two words")
  assert asked[1:3] == ["-m|ruff|check|.", "-m|ruff|format|--check|."]
  assert asked[3].startswith("-m|pytest|-n|")
  assert asked[3].endswith("-m|not slow|tests/test_mesh.py|-k|two words")
  _, asked = run(checkout, "test.sh", "--all")
  assert "slow" not in asked[-1] and "--all" not in asked[-1]


def test_workdir_is_seen_from_where_the_user_stands(checkout, tmp_path):
  make_fake_venv(checkout)
  (tmp_path / "here").mkdir()
  _, asked = run(checkout, "launch/local.sh", "w", cwd=tmp_path / "here")
  assert asked[-1].endswith(f"--workdir={tmp_path}/here/w")
  _, asked = run(checkout, "launch/local.sh", "/w", "--config.seed=1")
  assert asked[-1].endswith("--workdir=/w|--config.seed=1")
  _, asked = run(checkout, "launch/local.sh", "--config.seed=1")
  default = f"--workdir={checkout}/runs/countdown"
  assert asked[-1].endswith(f"{default}|--config.seed=1")
  _, asked = run(checkout, "launch/local.sh", cwd=tmp_path / "here")
  assert asked[-1].endswith(f"--workdir={checkout}/runs/countdown")


def test_continuous_integration_finds_the_data_beside_the_checkout(checkout):
  make_fake_venv(checkout)
  shown = checkout / "test.sh"
  shown.write_text('echo "data: ${O1JAX_TEST_DATA:-none}"\n')
  done, _ = run(checkout, ".ci/run")
  assert done.stdout == "data: none\n"
  data = checkout.parent / "shared" / "data"
  data.mkdir(parents=True)
  done, _ = run(checkout, ".ci/run")
  assert done.stdout == f"data: {data}\n"


def test_an_old_python_is_refused_with_one_line(checkout, tmp_path):
  done, _ = run(checkout, "launch/local.sh", PYTHON="false")
  assert done.returncode == 1 and done.stdout == ""
  assert done.stderr == (
    "error: PYTHON=false is not a Python of version 3.11 or newer\n"
  )
  # Every python on the PATH is an old one.
  tools = tmp_path / "bin"
  tools.mkdir()
  for name in ("bash", "dirname", "cat"):
    (tools / name).symlink_to(shutil.which(name))
  (tools / "python3").symlink_to(shutil.which("false"))
  done, _ = run(checkout, "test.sh", PATH=str(tools))
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  assert "no Python of version 3.11 or newer was found" in line
  assert not (checkout / ".venv").exists()
