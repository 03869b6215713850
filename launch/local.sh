#!/usr/bin/env bash
# The main job on this machine: sets everything up, then searches and learns.
#
#   bash launch/local.sh [workdir] [--flag=value ...]
#
# Run again with the same workdir, it resumes.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
workdir=$root/runs/countdown
case ${1:--} in
  -*) ;;
  *) workdir=$1 && shift ;;
esac
case $workdir in
  /* | *://*) ;;
  *) workdir=$PWD/$workdir ;;
esac
cd "$root"
. launch/setup_venv.sh
setup_venv core
exec .venv/bin/python -m o1jax.main --config=configs/countdown.py \
  --workdir="$workdir" "$@"
