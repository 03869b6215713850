"""Checkpoints are whole or absent, and what is damaged is refused."""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax import checkpoint
from o1jax import mesh as mesh_lib
from o1jax.checkpoint import Checkpoints


def make_state(seed: int, width: int = 50):
  rng = np.random.default_rng(seed)
  return {
    "params": {
      "kernel": jnp.asarray(rng.normal(size=(4, width)), jnp.float32),
      "half": jnp.asarray(rng.normal(size=3), jnp.bfloat16),
    },
    "key": jax.random.key(seed),
    "num_updates": jnp.int32(seed),
  }


HOST = {
  "tokens": np.arange(7, dtype=np.int16),
  "texts": np.array(["3 + 4 = 7", "", "→\n"]),
  "none": np.zeros((0, 3), np.float32),
  "size": np.int64(9),
}


def save(checkpoints, step, metric=None, **kwargs):
  checkpoints.save(
    step,
    state=make_state(step, **kwargs),
    host=HOST,
    meta={"cursor": 12, "name": "x"},
    metric=metric,
  )


def assert_same(restored, step):
  expected = make_state(step)
  jax.tree.map(
    np.testing.assert_array_equal, restored.state["params"], expected["params"]
  )
  assert restored.state["params"]["half"].dtype == jnp.bfloat16
  assert restored.state["num_updates"] == step
  np.testing.assert_array_equal(
    jax.random.key_data(restored.state["key"]),
    jax.random.key_data(expected["key"]),
  )
  assert restored.host.keys() == HOST.keys()
  for name, array in HOST.items():
    np.testing.assert_array_equal(restored.host[name], array)
    assert restored.host[name].dtype == array.dtype
  assert restored.meta == {"cursor": 12, "name": "x"}


def test_everything_comes_back_bit_for_bit(tmp_path):
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  assert checkpoints.steps() == [] and checkpoints.latest() is None
  assert checkpoints.best() is None
  save(checkpoints, 3)
  restored = Checkpoints(tmp_path / "checkpoints").restore(3, make_state(0))
  assert_same(restored, 3)
  jax.random.normal(restored.state["key"])  # A typed key, and a fresh one.
  host, meta = checkpoints.read(3)
  assert host.keys() == HOST.keys() and meta["cursor"] == 12


def test_arrays_go_where_the_target_lies(tmp_path):
  save(Checkpoints(tmp_path), 1)
  for shape in ({"data": 1}, {"data": 8}):
    mesh = mesh_lib.make_mesh(shape)
    target = mesh_lib.replicate(make_state(0), mesh)
    restored = Checkpoints(tmp_path, read_only=True).restore(1, target)
    kernel = restored.state["params"]["kernel"]
    assert kernel.sharding == target["params"]["kernel"].sharding
    assert len(kernel.sharding.device_set) == mesh.size
    assert_same(restored, 1)


def test_last_best_and_regular_ones_are_kept(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep_every=5)
  metrics = {1: 0.1, 2: 0.7, 3: None, 4: 0.2, 5: 0.7, 6: 0.3}
  kept = []
  for step, metric in metrics.items():
    save(checkpoints, step, metric)
    kept.append(checkpoints.steps())
  assert kept == [[1], [2], [2, 3], [2, 4], [2, 4, 5], [2, 4, 6]]
  assert checkpoints.best() == 2 and checkpoints.latest() == 6
  assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "6"]
  with pytest.raises(ValueError, match="steps must ascend"):
    save(checkpoints, 6)


def test_a_file_cut_altered_missing_or_added_is_refused(tmp_path):
  save(Checkpoints(tmp_path / "good"), 1)
  files = [f for f in (tmp_path / "good").rglob("*") if f.is_file()]
  assert len(files) > 8
  for file in files:
    for harm in ("cut", "altered", "removed", "added"):
      bad = tmp_path / "bad"
      shutil.copytree(tmp_path / "good", bad)
      path = bad / file.relative_to(tmp_path / "good")
      content = path.read_bytes()
      middle = len(content) // 2
      if harm == "cut":
        path.write_bytes(content[:-1])
      elif harm == "altered":
        changed = bytes([content[middle] ^ 1])
        path.write_bytes(content[:middle] + changed + content[middle + 1 :])
      elif harm == "removed":
        path.unlink()
      else:
        path.with_name("added").touch()
      with pytest.raises(ValueError) as caught:
        Checkpoints(bad, read_only=True).restore(1, make_state(0))
      message = str(caught.value)
      assert "\n" not in message and str(bad) in message, message
      shutil.rmtree(bad)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  save(checkpoints, 1)
  with pytest.raises(ValueError, match="kernel is float32.4, 50., this run"):
    checkpoints.restore(1, make_state(0, width=60))
  target = make_state(0)
  del target["params"]["half"]
  with pytest.raises(ValueError, match="half is bfloat16.3., .* has absent"):
    checkpoints.restore(1, target)
  with pytest.raises(ValueError, match=r"no checkpoint 7 in .*; there are \[1"):
    checkpoints.restore(7, make_state(0))


def test_foreign_folders_are_refused_or_not_counted(tmp_path):
  for name in ("notes", "5", "6"):
    (tmp_path / name).mkdir()
  (tmp_path / "6" / "checkpoint.json").write_text('{"step": 6}\n')
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.steps() == [6]
  with pytest.raises(ValueError, match=r"checkpoint .*6 cannot be read"):
    checkpoints.restore(6, make_state(0))


SAVE_WITH_LIMIT = """
import pathlib, resource, sys
sys.path.insert(0, "tests")
import test_checkpoint as t
checkpoints = t.Checkpoints(sys.argv[1])
t.save(checkpoints, 1)
for limit in (0, 100, 3000, 30000):
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
  try:
    t.save(checkpoints, 2)
    print("saved")
  except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
t.assert_same(checkpoints.restore(1, t.make_state(0)), 1)
assert [p.name for p in pathlib.Path(sys.argv[1]).iterdir()] == ["1"]
t.save(checkpoints, 2)
t.assert_same(checkpoints.restore(2, t.make_state(0)), 2)
"""


def test_a_save_that_finds_no_room_leaves_the_previous_one_good(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", SAVE_WITH_LIMIT, str(tmp_path)],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parent.parent,
  )
  assert done.returncode == 0, done.stderr
  assert done.stderr == ""
  lines = done.stdout.splitlines()
  assert len(lines) == 4
  for line in lines:
    assert "checkpoint 2 could not be written" in line
    assert "File too large" in line and "the previous one, 1, is good" in line


SAVE_WITHOUT_PROOF = """
import pathlib, resource, sys
sys.path.insert(0, "tests")
import numpy as np
import test_checkpoint as t
t.checkpoint._prove_room = lambda *_: None
checkpoints = t.Checkpoints(sys.argv[1])
t.save(checkpoints, 1)
large = {
  "state": dict(state=t.make_state(2, width=200_000)),
  "host.npz": dict(host={"large": np.zeros(1_000_000)}),
  "checkpoint.json": dict(meta={"large": "x" * 1_000_000}),
}
for name, values in large.items():
  values = dict(state=t.make_state(2), host=t.HOST, meta={}) | values
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
  reached, sweep = [], checkpoints._sweep
  def swept():
    folder = pathlib.Path(sys.argv[1]) / "unfinished-2"
    reached.append(sorted(path.name for path in folder.iterdir()))
    sweep()
  checkpoints._sweep = swept
  try:
    checkpoints.save(2, **values)
    print("saved")
  except OSError as error:
    print(error)
  checkpoints._sweep = sweep
  assert name in reached[0][-1] or name in reached[0], reached
  assert len(reached[0]) == 1 + list(large).index(name), reached
  resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
  t.assert_same(checkpoints.restore(1, t.make_state(0)), 1)
  assert [p.name for p in pathlib.Path(sys.argv[1]).iterdir()] == ["1"]
"""


def test_a_file_that_cannot_grow_in_mid_save_leaves_the_previous_one(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", SAVE_WITHOUT_PROOF, str(tmp_path)],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parent.parent,
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert len(lines) == 3
  for line in lines:
    assert "checkpoint 2 could not be written" in line
    assert "the previous one, 1, is good" in line


def test_all_is_on_disk_before_the_previous_one_goes(tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path)
  save(checkpoints, 1)
  synced = []

  def sync(path):
    synced.append((path, (tmp_path / "1").exists()))

  monkeypatch.setattr(checkpoint, "_sync", sync)
  save(checkpoints, 2)
  assert all(previous for _, previous in synced)
  folder = tmp_path / "unfinished-2"
  written = [tmp_path / "2", *(tmp_path / "2").rglob("*")]
  names = {folder / path.relative_to(tmp_path / "2") for path in written}
  assert len(names) > 10 and names <= {path for path, _ in synced}
  assert synced[-1][0] == tmp_path
  assert checkpoints.steps() == [2]


def test_a_failure_inside_orbax_is_reported_the_same_way(tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path)
  save(checkpoints, 1)

  def write_half(path, state):
    path.mkdir()
    raise ValueError("OUT_OF_RANGE: no space left\nand a page of detail")

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint, "_write_state", write_half)
    with pytest.raises(OSError, match="no space left") as caught:
      save(checkpoints, 2)
  assert "\n" not in str(caught.value)
  assert [path.name for path in tmp_path.iterdir()] == ["1"]
  save(checkpoints, 2)
  assert checkpoints.steps() == [2]


SAVE_FOREVER = """
import sys
sys.path.insert(0, "tests")
import test_checkpoint as t
checkpoints = t.Checkpoints(sys.argv[1])
step = (checkpoints.latest() or 0) + 1
while True:
  t.save(checkpoints, step, metric=-step)
  print(step, flush=True)
  step += 1
"""


def test_killed_in_a_save_it_restarts_from_a_whole_checkpoint(tmp_path):
  rng = random.Random(0)
  for _ in range(3):
    process = subprocess.Popen(
      [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)],
      stdout=subprocess.PIPE,
      text=True,
      cwd=pathlib.Path(__file__).parent.parent,
    )
    try:
      saved = int(process.stdout.readline())
      # A save takes about a tenth of a second: somewhere in the next ones.
      time.sleep(rng.uniform(0.0, 0.3))
    finally:
      os.kill(process.pid, signal.SIGKILL)
      process.wait()
    saved = max([saved, *map(int, process.stdout.read().split())])
    process.stdout.close()
    # Before anything is swept every listed checkpoint is whole.
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.latest() >= saved
    for step in reader.steps():
      assert_same(reader.restore(step, make_state(0)), step)
    assert reader.best() == 1
  Checkpoints(tmp_path)
  assert all(path.name.isdecimal() for path in tmp_path.iterdir())
