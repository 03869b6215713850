"""A run that is stopped anywhere and started again ends with the same bits."""

import hashlib
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from o1jax import build, iterate, jsonl, metrics, tree_drawing
from o1jax import config as config_lib
from o1jax import mesh as mesh_lib
from o1jax.checkpoint import Checkpoints
from o1jax.experience import Experience
from o1jax.searched import Searched
from policies import (
  TINY_CONFIG,
  TINY_OVERRIDES,
  countdown,
  tiny_arithmetic,
  tiny_config,
  tiny_workdir,
  what_compiles,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

ROOT = pathlib.Path(__file__).resolve().parent.parent
NUM_ITERATIONS = 5  # one of initialization, four of search and learning


def hash_of(state):
  """Of every array that survives: parameters, their mean, the optimizer's."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(state)):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()


def rows_of(workdir, name="metrics.jsonl"):
  """Rows without the fields that are times."""
  return [
    {key: value for key, value in row.items() if "seconds" not in key}
    for row in metrics.read_jsonl(workdir / name)
  ]


def assert_same_runs(workdir, other):
  assert rows_of(workdir) == rows_of(other)
  name = "evaluation.jsonl"
  assert rows_of(workdir, name) == rows_of(other, name)
  for folder in ("samples", "trees"):
    names = sorted(path.name for path in (workdir / folder).iterdir())
    assert names == sorted(path.name for path in (other / folder).iterdir())
    for name in names:
      here, there = (run / folder / name for run in (workdir, other))
      assert here.read_bytes() == there.read_bytes()
  steps = Checkpoints(workdir / "checkpoints", read_only=True).steps()
  assert steps == Checkpoints(other / "checkpoints", read_only=True).steps()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """Of a run from beginning to end: workdir, hash, what compiled where."""
  workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
  with what_compiles("learn") as learning, what_compiles("search") as searching:
    digest = hash_of(iterate.run(tiny_config(), workdir))
  return workdir, digest, learning, searching


# The command, but for a process that kills itself in the middle of a save.
KILLED = """
import os, signal, sys
from o1jax import checkpoint, config, main

write_record, saves = checkpoint._write_record, []

def killed(path, record):
  saves.append(path)
  if len(saves) == 2:
    path.write_text("half a rec")
    os.kill(os.getpid(), signal.SIGKILL)
  write_record(path, record)

checkpoint._write_record = killed
main.define_flags()
config.run(main.main)
"""


def command(workdir, *program, changed=()):
  flags = [f"--config.{text}" for text in [*TINY_OVERRIDES, *changed]]
  return [
    sys.executable,
    *program,
    f"--config={TINY_CONFIG}",
    f"--workdir={workdir}",
    *flags,
  ]


def test_a_run_searches_learns_and_writes(undisturbed):
  workdir = undisturbed[0]
  rows = metrics.read_jsonl(workdir / "metrics.jsonl")
  assert [row["iteration"] for row in rows] == list(range(NUM_ITERATIONS))
  assert [row["kind"] for row in rows] == ["initialize"] + ["iteration"] * 4
  assert 0 <= rows[0]["demonstrations/random_play_solved"] < 0.2
  assert not {"step", "demonstrations/random_play_solved"} & rows[1].keys()
  # It found solutions, so that experience is part of what is compared.
  assert rows[-1]["learn/d_search"] > rows[1]["learn/d_search"] > 0
  assert rows[-1]["search/verifier_requests"] > 0
  assert rows[-1]["search/generated_tokens"] > 0
  manifest = json.loads((workdir / "manifest.json").read_text())
  assert manifest["config"]["search"]["num_candidates"] == 3
  assert manifest["versions"]["jax"] == jax.__version__
  evaluated = metrics.read_jsonl(workdir / "evaluation.jsonl")
  cells = [(row["iteration"], row["strategy"]) for row in evaluated]
  kinds = ("greedy", "best_of_n")
  assert cells == [(i, kind) for i in (1, 3, 4) for kind in kinds]
  names = [f"iteration_{i:05d}.jsonl" for i in range(1, NUM_ITERATIONS)]
  for folder in ("samples", "trees"):
    assert sorted(p.name for p in (workdir / folder).iterdir()) == names
  assert "<svg" in (workdir / "report.html").read_text()
  assert list((workdir / "tensorboard").iterdir())
  best = max(
    range(NUM_ITERATIONS), key=lambda i: rows[i]["eval/greedy_accuracy"]
  )
  steps = Checkpoints(workdir / "checkpoints", read_only=True).steps()
  assert set(steps) == {1, 3, 4, best}


def test_what_a_run_writes_is_read_back(undisturbed, tmp_path):
  workdir = undisturbed[0]
  copy = tmp_path / "copy.jsonl"
  name = f"iteration_{NUM_ITERATIONS - 1:05d}.jsonl"
  trees = jsonl.read_trees(workdir / "trees" / name)
  assert 0 < len(trees) <= iterate.NUM_TREES
  jsonl.write_trees(copy, trees)
  assert copy.read_bytes() == (workdir / "trees" / name).read_bytes()
  drawn = tree_drawing.render_tree_text(trees[0])
  assert trees[0]["problem"]["prompt"].strip() in drawn

  path = workdir / "samples" / name
  config = tiny_config()
  task = build.task_of(config)
  policy = build.policy_of(config, build.tokenizer_of(config, task, workdir))
  samples = jsonl.read_solutions(path, policy.encode_solution)
  assert 0 < len(samples) <= config.checkpoint.num_samples
  jsonl.write_solutions(copy, samples)
  assert copy.read_bytes() == path.read_bytes()
  experience = Experience(**build.experience_limits(config))
  experience.add(samples)
  assert len(experience.pool("search")) > 0


def test_a_task_without_play_and_hindsight_runs_the_same_way(tmp_path):
  config = tiny_arithmetic("num_iterations=2", "evaluation.interval=0")
  config.evaluation.strategies = ()  # greedy alone
  state = iterate.run(config, tmp_path)
  initial, learned = config.initialize, config.learn
  assert int(state.num_updates) == (
    initial.num_iterations * initial.num_updates + 2 * learned.num_updates
  )
  assert initial.num_updates != learned.num_updates
  rows = metrics.read_jsonl(tmp_path / "metrics.jsonl")
  assert [row["kind"] for row in rows] == ["initialize"] + ["iteration"] * 2
  assert rows[0]["demonstrations/optimal_solved"] == 1
  assert all(row["learn/rows_too_long"] == 0 for row in rows)
  assert rows[-1]["learn/d_search"] > rows[1]["learn/d_search"] > 0
  assert rows[-1]["search/relabelled"] == 0
  task = build.task_of(config)
  path = tmp_path / "samples" / "iteration_00002.jsonl"
  samples = jsonl.read_solutions(path)
  assert samples
  for sample in samples:
    chain = "\n".join(task.solutions(sample.problem))
    assert sample.outcome_reward == (sample.text == chain)


def found_by(workdir):
  """What the searches of a run found, in order."""
  return [
    (path.name, one.problem.id, one.text, one.outcome_reward, one.num_visits)
    for path in sorted((workdir / "samples").iterdir())
    for one in jsonl.read_solutions(path)
  ]


@pytest.mark.slow
def test_one_device_two_and_eight_agree(tmp_path):
  runs = []
  for num_devices in (1, 2, 8):
    config = tiny_config(
      f"mesh.data={num_devices}",
      "num_iterations=2",
      "search.num_problems=8",
      "search.batch_size=8",
      "evaluation.batch_size=8",
      "checkpoint.num_samples=1000",
    )
    workdir = tmp_path / str(num_devices)
    iterate.run(config, workdir)
    runs.append((rows_of(workdir), found_by(workdir)))
  (rows, found), *others = runs
  assert len(found) > 20
  for other_rows, other_found in others:
    assert other_found == found
    for row, other in zip(rows, other_rows, strict=True):
      # Counts and shares are the same; losses and norms are float32 sums in
      # another order, 5e-7 apart after these 66 updates.
      assert row.keys() == other.keys() and row["kind"] == other["kind"]
      for name in row.keys() - {"kind"}:
        assert other[name] == pytest.approx(row[name], rel=1e-5), name


@pytest.mark.parametrize("num_items, count, places", [
  (3, 5, [0, 1, 2]), (9, 5, [0, 2, 4, 6, 8]), (5, 1, [0]), (5, 0, []),
  (0, 5, []),
])  # fmt: skip
def test_samples_are_no_more_than_asked_for(num_items, count, places):
  assert list(iterate.evenly(range(num_items), count)) == places


def test_every_proposed_step_is_judged_once():
  task = countdown()
  proposed = [  # parent, text, legal
    (0, "2 + 3 = 5 (left: 7 5)\n", True),
    (0, "2 + 3 = 6 (left: 7 6)\n", False),
    (1, "7 - 5 = 2 (left: 2)", True),
    (1, "7 - 6 = 1 (left: 1)", False),
    (1, "\n", False),
    (1, "", False),
    # Judged where it stands: after what the wrong step above claims is left.
    (2, "7 + 6 = 13 (left: 13)", True),
    (2, "merged into another", None),
  ]
  parents, texts, legal = zip(*proposed, strict=True)
  nodes = {
    "parent": np.array([-1, *parents]),
    "texts": ["", *texts],
    "is_valid": np.array([True, *(mark is not None for mark in legal)]),
  }
  searched = Searched(task.parse("2 3 7 = 8"), [], None, nodes, {})
  found = iterate.judge_proposals(task, searched)
  assert found == [mark for mark in legal if mark is not None]


@pytest.mark.slow
def test_a_profile_is_written_where_asked_for(tmp_path):
  iterate.run(tiny_config(), tmp_path / "run", profile=True)
  (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
  assert trace.stat().st_size > 0


def test_updates_compile_twice_and_a_search_once(undisturbed):
  # Batches of initialization have rows of their own number.
  assert undisturbed[2] == [True, True] + [False] * (NUM_ITERATIONS - 2)
  assert undisturbed[3] == [True] + [False] * (NUM_ITERATIONS - 2)
  rows = metrics.read_jsonl(undisturbed[0] / "metrics.jsonl")
  assert rows[0]["compile_seconds"] > 0


def test_stopped_inside_two_saves_it_ends_with_the_same_bits(
  undisturbed, tmp_path, monkeypatch
):
  workdir = tmp_path / "run"
  saves = workdir / "checkpoints"
  checkpoint = iterate.RunWriter.checkpoint
  before = resource.getrlimit(resource.RLIMIT_FSIZE)

  def limited(writer, done, *rest):
    if done.iteration == 2:
      resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
      checkpoint(writer, done, *rest)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, before)

  # A file that cannot grow: one line, and the previous checkpoint is good.
  with monkeypatch.context() as patch:
    patch.setattr(iterate.RunWriter, "checkpoint", limited)
    with pytest.raises(config_lib.UserError) as raised:
      iterate.run(tiny_config(), workdir)
  message = str(raised.value)
  assert "checkpoint 2 could not be written" in message
  assert "the previous one, 1, is good" in message and "\n" not in message
  names = {path.name for path in saves.iterdir()}
  assert {"1"} <= names <= {"0", "1"}
  # It goes on from there and is killed in the save of iteration 3.
  done = subprocess.run(
    command(workdir, "-c", KILLED), capture_output=True, text=True, cwd=ROOT
  )
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert "resuming after iteration 1" in done.stdout
  names = {path.name for path in saves.iterdir()}
  assert {"1", "2", "unfinished-3"} <= names
  # The row of the iteration that was lost is there, and will be cut off.
  assert len(rows_of(workdir)) == 4
  state = iterate.run(tiny_config(), workdir)
  assert hash_of(state) == undisturbed[1]
  assert_same_runs(workdir, undisturbed[0])


def wait_for(condition, process):
  while not condition():
    assert process.poll() is None, "it ended before it could be killed"
    time.sleep(0.001)


@pytest.mark.slow
def test_killed_at_three_random_moments_it_ends_with_the_same_bits(
  undisturbed, tmp_path
):
  workdir = tmp_path / "run"
  rng = random.Random(4)
  saves = workdir / "checkpoints"

  def iterations():
    path = workdir / "metrics.jsonl"
    rows = metrics.read_jsonl(path) if path.exists() else []
    return {row["iteration"] for row in rows}

  def unfinished():
    return {path.name for path in saves.glob("unfinished-*")}

  def kill_at_new(names_fn, seconds=0.0):
    """Kills it so long after a new name is there; returns the new names."""
    # What an earlier kill left is no sign of this process.
    before = names_fn()
    process = subprocess.Popen(
      command(workdir, "-m", "o1jax.main"),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      cwd=ROOT,
    )
    wait_for(lambda: names_fn() - before, process)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return names_fn() - before

  assert kill_at_new(iterations, rng.uniform(0, 0.3))
  # Inside a save: the checkpoint is begun and not there.
  (name,) = kill_at_new(unfinished)
  assert not (saves / name.removeprefix("unfinished-")).exists()
  assert kill_at_new(iterations, rng.uniform(0, 0.3))
  done = subprocess.run(
    command(workdir, "-m", "o1jax.main"),
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.returncode == 0, done.stderr
  assert "resuming after iteration" in done.stdout
  assert f"report: {workdir}/report.html" in done.stdout
  assert hash_of(iterate.run(tiny_config(), workdir)) == undisturbed[1]
  assert_same_runs(workdir, undisturbed[0])


@pytest.mark.parametrize("name", ["samples", "close"])
def test_a_file_that_cannot_be_written_ends_with_one_line(
  tmp_path, monkeypatch, name
):
  close = iterate.RunWriter.close

  def fail(writer, *_):
    if name == "close":
      close(writer)
    raise OSError(27, "File too large")

  monkeypatch.setattr(iterate.RunWriter, name, fail)
  monkeypatch.setattr(iterate, "restore", lambda *_: (None, None, 0))
  monkeypatch.setattr(iterate, "loop", lambda *args: args[2].samples(0, [], []))
  workdir = tmp_path / "run"
  with pytest.raises(config_lib.UserError) as raised:
    iterate.run(tiny_config(), workdir)
  message = str(raised.value)
  assert message.startswith(f"{workdir} could not be written (")
  assert "File too large" in message and "\n" not in message


def test_a_finished_run_makes_up_for_a_missing_report(undisturbed, tmp_path):
  workdir = tmp_path / "run"
  subprocess.run(["cp", "-r", undisturbed[0], workdir], check=True)
  (workdir / "report.html").unlink()
  iterate.run(tiny_config(), workdir)
  assert "<svg" in (workdir / "report.html").read_text()


@pytest.mark.parametrize(
  "changed, words",
  [
    ("search.strategy=mtcs", "strategy='mtcs': choose one of mcts"),
    ("search.rule=puctt", "puctt"),
    ("search.reward=oracle", "reward='oracle'"),
    ("task.name=countdwn", "unknown task 'countdwn': did you mean 'countdown'"),
    ("task.options.max_number=0", "max_number"),
    ("search.batch_size=3", "search.batch_size=3 does not divide over 2"),
    ("evaluation.batch_size=7", "evaluation.batch_size=7 does not divide"),
    ("initialize.rows.random_play=15", "initialize.rows has 15 rows"),
    ("learn.num_updates=4", "learn.num_updates=4 is not a multiple"),
    ("mesh.data=3", "initialize.rows has 16 rows of 56 tokens, which do not"),
    ("mesh.data=16", "needs 16 devices"),
    ("mesh.num_cpu_devices=3", "3"),
    ("network.num_kv_heads=3", "num_kv_heads=3"),
    ("tokenizer.vocab_size=100", "vocab_size=100"),
    ("learn.optimizer.name=sgdd", "sgdd"),
    ("evaluation.temperature=-1.0", "temperature=-1.0"),
    ("evaluation.strategies=beams", "strategy='beams': choose one of mcts"),
    ("evaluation.efforts=2,0", "an effort must be a whole number above 0"),
    ("evaluation.strategies=mcts evaluation.rule=puctt", "puctt"),
    ("evaluation.reward=oracle", "reward='oracle'"),
    ("evaluation.num_problems=1000000", "1000000 were asked for"),
    ("lengths.prompt_tokens=3", "more than lengths.prompt_tokens=3"),
    ("seed=-1", "seed=-1 must be 0 or more"),
    ("learn.updates_per_call=0", "learn.updates_per_call=0 must be 1 or more"),
    ("learn.num_microbatches=0", "learn.num_microbatches=0 must be 1"),
    ("learn.num_updates=0", "learn.num_updates=0 must be 1 or more"),
    ("search.num_problems=0", "search.num_problems=0 must be 1 or more"),
    ("search.batch_size=0", "search.batch_size=0 must be 1 or more"),
    ("evaluation.num_problems=0", "evaluation.num_problems=0 must be 1"),
    ("evaluation.interval=-1", "evaluation.interval=-1 must be 0 or more"),
    ("checkpoint.interval=0", "checkpoint.interval=0 must be 1 or more"),
    ("lengths.num_steps=0", "lengths.num_steps=0 must be 1 or more"),
  ],
)
def test_bad_fields_end_before_anything_is_written(changed, words, tmp_path):
  workdir = tmp_path / "run"
  with pytest.raises(config_lib.UserError) as raised:
    iterate.run(tiny_config(*changed.split()), workdir)
  message = str(raised.value)
  assert words in message and "\n" not in message
  assert not workdir.exists()


def test_a_config_without_a_group_ends_with_one_line(tmp_path):
  path = tmp_path / "bare.py"
  path.write_text(
    "from configs import countdown\n"
    "def get_config(arg=None):\n"
    "  config = countdown.get_config()\n"
    "  del config.mesh\n"
    "  return config\n"
  )
  arguments = [
    "-m",
    "o1jax.main",
    f"--config={path}",
    f"--workdir={tmp_path}/w",
  ]
  done = subprocess.run(
    [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 2
  assert done.stderr == "error: the config lacks the field mesh.data\n"


def test_a_workdir_of_another_config_is_refused(undisturbed):
  workdir = undisturbed[0]
  before = {
    path: path.stat().st_mtime_ns for path in sorted(workdir.rglob("*"))
  }
  done = subprocess.run(
    command(
      workdir, "-m", "o1jax.main", changed=["learn.num_updates=6", "seed=1"]
    ),
    capture_output=True,
    text=True,
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ") and "belongs to another config" in line
  assert "learn.num_updates was 3, is 6" in line and "seed was 0, is 1" in line
  after = {path: path.stat().st_mtime_ns for path in sorted(workdir.rglob("*"))}
  assert before == after


def test_a_truncated_checkpoint_is_refused(undisturbed, tmp_path):
  workdir = tmp_path / "run"
  subprocess.run(["cp", "-r", undisturbed[0], workdir], check=True)
  path = workdir / "checkpoints" / str(NUM_ITERATIONS - 1) / "host.npz"
  path.write_bytes(path.read_bytes()[:-50])
  with pytest.raises(config_lib.UserError) as raised:
    iterate.run(tiny_config(), workdir)
  message = str(raised.value)
  assert "cannot be read (a file is cut, altered or missing)" in message
  assert "remove that folder" in message and "\n" not in message
  assert rows_of(workdir) == rows_of(undisturbed[0])
  # As it says.
  subprocess.run(["rm", "-r", path.parent], check=True)
  assert hash_of(iterate.run(tiny_config(), workdir)) == undisturbed[1]


def test_a_run_may_begin_with_the_policy_of_another(tmp_path):
  first, second = tmp_path / "first", tmp_path / "second"
  tiny_workdir(first, 1)
  mesh = mesh_lib.make_mesh({"data": 2})
  config = tiny_config(f"initialize.path={first}")
  parts = build.build(config, second, mesh)
  assert not second.exists()
  tokenizer = (first / build.TOKENIZER_FILE).read_bytes()
  assert parts.policy.tokenizer.to_bytes() == tokenizer
  params = iterate.first_params(config, parts)
  expected = parts.policy.network.init(jax.random.key(0))
  jax.tree.map(
    np.testing.assert_array_equal, *map(jax.device_get, (params, expected))
  )


def test_a_policy_of_another_architecture_is_refused(tmp_path):
  first = tmp_path / "first"
  tiny_workdir(first, 1)
  mesh = mesh_lib.make_mesh({"data": 2})
  config = tiny_config(f"initialize.path={first}", "network.ffn_width=24")
  parts = build.build(config, tmp_path / "second", mesh)
  words = r"another architecture: \['trunk'\].*give it the same network"
  with pytest.raises(config_lib.UserError, match=words):
    iterate.first_params(config, parts)
  missing = tiny_config("initialize.path=nowhere")
  with pytest.raises(config_lib.UserError, match="initialize.path=nowhere"):
    build.build(missing, tmp_path / "second", mesh)
