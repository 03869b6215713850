"""The notebook runs from top to bottom in a checkout, and ships unrun."""

import os
import pathlib
import subprocess
import sys
import types

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "notebooks" / "quickstart.ipynb"
BADGE = (
  "https://colab.research.google.com/github/o1jax/o1jax/blob/main/"
  "notebooks/quickstart.ipynb"
)


def read_notebook():
  notebook = nbformat.read(QUICKSTART, as_version=4)
  nbformat.validate(notebook)
  return notebook


def printed(cell):
  return "".join(o.text for o in cell.outputs if o.output_type == "stream")


def pictures(cell):
  return [
    o.data["image/svg+xml"]
    for o in cell.outputs
    if o.output_type == "display_data" and "image/svg+xml" in o.data
  ]


def test_notebook_opens_in_colab_and_ships_without_outputs():
  notebook = read_notebook()
  assert BADGE in notebook.cells[0].source
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert all(c.outputs == [] and c.execution_count is None for c in code)


def test_install_cell_may_run_twice_in_colab(monkeypatch):
  (cell,) = (c for c in read_notebook().cells if c.id == "install")
  fetch, _, rest = cell.source.partition("sys.path.insert")
  assert rest
  folders, moved, commands = set(), [], []

  def run(command, check):
    assert check
    commands.append(command)
    if command[0] == "git":
      folders.add(command[-1])

  monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("colab"))
  monkeypatch.setattr(subprocess, "run", run)
  monkeypatch.setattr(os, "chdir", moved.append)
  monkeypatch.setattr(os.path, "isdir", folders.__contains__)
  program = compile(fetch, "install", "exec")
  for _ in range(2):
    types.FunctionType(program, {})()
  assert [command[0] for command in commands].count("git") == 1
  # From wherever it is run, the same folder.
  assert len(folders) == 1 and moved == 2 * list(folders)
  assert os.path.isabs(moved[0])


def test_the_run_of_the_notebook_leaves_accelerators_alone():
  (cell,) = (c for c in read_notebook().cells if c.id == "run")
  assert '"JAX_PLATFORMS": "cpu"' in cell.source and "env=" in cell.source


def test_quickstart_runs(tmp_path, monkeypatch):
  # Nothing of the machine's user is read or written.
  for name in ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
    monkeypatch.setenv(name, str(tmp_path))
  notebook = read_notebook()
  nbclient.NotebookClient(
    notebook,
    timeout=180,
    kernel_name="python3",
    resources={"metadata": {"path": str(ROOT)}},
  ).execute()
  cells = {cell.id: cell for cell in notebook.cells}
  assert "on cpu" in printed(cells["install"])
  assert printed(cells["solve"]).strip()
  assert "Search tree of 2 3 7 = 13" in pictures(cells["tree"])[0]
  assert "2 3 7 = 13" in printed(cells["tree"])
  accuracy, tree = pictures(cells["curves"])
  assert "Accuracy against training iterations" in accuracy
  assert ">greedy<" in accuracy
  assert "Search tree of" in tree
