# Sourced by test.sh and launch/local.sh from the root of the checkout.
#
# setup_venv core|dev: makes or reuses .venv and installs this checkout into it.
# PYTHON names the interpreter; without it an existing .venv is kept as it is,
# else the first of the names below that is new enough is taken. A stamp in
# .venv remembers what was installed, so that nothing is installed twice.

fail() {
  echo "error: $*" >&2
  exit 1
}

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

python_version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'
}

find_python() {
  local name
  for name in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.13 python3.11; do
    if is_new_enough "$name"; then
      echo "$name"
      return
    fi
  done
  fail "no Python of version 3.11 or newer was found: install one, or name" \
    "it as in PYTHON=python3.12 bash $0"
}

make_venv() {
  local python
  python=$(find_python) || exit 1
  echo "making .venv with $("$python" --version)"
  "$python" -m venv --clear .venv ||
    fail "$python -m venv failed: on Debian and Ubuntu install the package" \
      "python3-venv"
}

# A checksum of all that decides what is installed, and where.
requirements_checksum() {
  .venv/bin/python - "$PWD" "${PIP_CONSTRAINT:-}" <<'EOF'
import hashlib
import pathlib
import sys

checksum = hashlib.sha256(" ".join([sys.version, *sys.argv[1:]]).encode())
paths = [pathlib.Path(name) for name in ("setup.py", "o1jax/__init__.py")]
paths += sorted(pathlib.Path("requirements").glob("*.txt"))
for path in paths:
  checksum.update(path.read_bytes())
print(checksum.hexdigest())
EOF
}

setup_venv() {
  local wanted=$1 checksum stamp
  if [ -n "${PYTHON:-}" ] && ! is_new_enough "$PYTHON"; then
    fail "PYTHON=$PYTHON is not a Python of version 3.11 or newer"
  fi
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    make_venv
  elif ! is_new_enough .venv/bin/python; then
    make_venv
  elif [ -n "${PYTHON:-}" ] &&
    [ "$(python_version "$PYTHON")" != "$(python_version .venv/bin/python)" ]
  then
    make_venv
  fi
  checksum=$(requirements_checksum)
  # Whoever has the dev extras has the core as well.
  for stamp in "$wanted" dev; do
    if [ "$(cat ".venv/installed-$stamp" 2>/dev/null)" = "$checksum" ]; then
      return
    fi
  done
  echo "installing o1jax into .venv"
  if [ "$wanted" = dev ]; then
    .venv/bin/python -m pip install --quiet -e ".[dev]"
  else
    .venv/bin/python -m pip install --quiet -e .
  fi
  echo "$checksum" >".venv/installed-$wanted"
}
