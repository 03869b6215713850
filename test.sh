#!/usr/bin/env bash
# Lint and tests, environment included.
#
#   bash test.sh [--all] [pytest argument ...]
#
# --all adds the long oracles. O1JAX_TEST_DATA names the folder of external
# data; without it the tests that need it are skipped (under CI=true: fail).
set -euo pipefail
cd "$(dirname "$0")"
. launch/setup_venv.sh
setup_venv dev

marks=(-m "not slow")
arguments=()
for argument in "$@"; do
  if [ "$argument" = --all ]; then
    marks=()
  else
    arguments+=("$argument")
  fi
done
cores=$(.venv/bin/python -c '
import os
count = getattr(os, "sched_getaffinity", lambda pid: range(os.cpu_count()))
print(min(8, len(count(0))))')

.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
# An empty array counts as unset in the bash of macOS.
exec .venv/bin/python -m pytest -n "$cores" --dist loadfile \
  ${marks[@]+"${marks[@]}"} ${arguments[@]+"${arguments[@]}"}
