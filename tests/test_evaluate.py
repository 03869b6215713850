"""The command that compares strategies, and policies loaded for it."""

import functools
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags

from o1jax import build, evaluate, iterate, load, metrics, report
from o1jax import config as config_lib
from o1jax import mesh as mesh_lib
from o1jax.policy import pretrained
from policies import tiny_workdir

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "run"
  tiny_workdir(workdir, 2)
  return workdir


def run(module, *arguments):
  return subprocess.run(
    [sys.executable, "-m", f"o1jax.{module}", *arguments],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )


def test_the_command_prints_a_table_and_keeps_its_rows(workdir):
  done = run(
    "evaluate",
    f"--workdir={workdir}",
    "--efforts=2",
    "--strategies=greedy,best_of_n",
    "--iterations=all",
    "--num_problems=6",
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert [line for line in lines if line.startswith("iteration ")] == [
    "iteration 0, 6 problems",
    "iteration 1, 6 problems",
  ]
  assert lines[1].split()[:3] == ["strategy", "budget", "accuracy"]
  table = [line.split()[:2] for line in lines if "%" in line]
  cells = [["greedy", "1"], ["best_of_n", "2"]]
  assert table == 2 * cells
  rows = metrics.read_jsonl(workdir / "evaluation.jsonl")
  assert [(r["iteration"], r["strategy"], r["budget"]) for r in rows] == [
    (i, name, int(budget)) for i in (0, 1) for name, budget in cells
  ]
  for row in rows:
    assert 0 <= row["accuracy"] <= row["coverage"] <= 1
    assert row["num_problems"] == 6 and row["verifier_requests"] == 0
    # At most the budget's worth of whole solutions.
    assert 0 < row["tokens"] <= row["budget"] * 40
  assert "<svg" in (workdir / "report.html").read_text()


def test_bad_numbers_end_with_one_line(workdir):
  done = run("evaluate", f"--workdir={workdir}", "--efforts=low,0")
  assert done.returncode == 2 and done.stdout == ""
  words = "effort '0' is none of low, medium, high, nor a number of solutions"
  assert done.stderr == f"error: {words}\n"
  assert evaluate._whole("0") == 0
  for text in ("many", "-1", "1.5", ""):
    with pytest.raises(config_lib.UserError, match=f"not '{text}'"):
      evaluate._whole(text)


def own_flags(monkeypatch):
  """Flags of the command that no other test has read."""
  values = flags.FlagValues()
  monkeypatch.setattr(flags, "FLAGS", values)
  monkeypatch.setattr(mesh_lib, "enable_compilation_cache", lambda _: None)
  for define in (
    flags.DEFINE_string,
    flags.DEFINE_list,
    flags.DEFINE_integer,
    flags.DEFINE_multi_string,
  ):
    define = functools.partial(define, flag_values=values)
    monkeypatch.setattr(flags, define.func.__name__, define)
  evaluate.define_flags()
  return values


@pytest.mark.parametrize(
  "flag, words",
  [
    ("--num_problems=0", "--num_problems=0 is less than 1"),
    ("--iterations=0,7", "iteration 7 is not saved in"),
  ],
)
def test_bad_flags_are_refused_before_anything_is_measured(
  workdir, monkeypatch, flag, words
):
  monkeypatch.setattr(evaluate, "measure", None)
  values = own_flags(monkeypatch)
  values(["evaluate", f"--workdir={workdir}", flag])
  with pytest.raises(config_lib.UserError, match=words):
    evaluate.main(["evaluate"])


def test_fields_of_the_evaluation_may_be_set_anew(workdir):
  config = config_lib.config_of_workdir(workdir)
  evaluate.override_evaluation(
    config, ["evaluation.options.best_of_n.answer_by=weighted_vote"]
  )
  trained = load.from_workdir(workdir)
  evaluator = build.evaluator_of(
    config, trained.policy, trained.task, trained.mesh
  )
  assert evaluator._solver("best_of_n", 4)._answer_by == "weighted_vote"
  with pytest.raises(config_lib.UserError, match="only fields of evaluation"):
    evaluate.override_evaluation(config, ["search.rule=uct"])


def test_rows_of_another_evaluation_are_not_kept(workdir, monkeypatch):
  values = own_flags(monkeypatch)
  monkeypatch.setattr(evaluate, "measure", lambda *_: [])
  kept = []
  for module, name in ((iterate, "save_evaluation"), (report, "write_report")):
    monkeypatch.setattr(module, name, lambda *_: kept.append(1))
  values(["evaluate", f"--workdir={workdir}"])
  evaluate.main(["evaluate"])
  assert len(kept) == 2
  values["config_override"].value = ["evaluation.rule=uct"]
  evaluate.main(["evaluate"])
  assert len(kept) == 2


def test_every_cell_is_checked_before_the_first_is_measured(
  workdir, monkeypatch
):
  trained = load.from_workdir(workdir)
  evaluator = build.evaluator_of(
    trained.config, trained.policy, trained.task, trained.mesh
  )
  monkeypatch.setattr(evaluator, "measure", None)
  with pytest.raises(config_lib.UserError, match="strategy='beams'"):
    evaluate.measure(trained, evaluator, ["greedy", "beams"], [4], 4)


@pytest.mark.parametrize(
  "strategy, effort, num_problems, words",
  [
    ("beams", 4, 4, "strategy='beams': choose one of"),
    ("best_first", 1, 4, "does not pay for one expansion"),
    ("greedy", 1, 10**6, "held-out problems, 1000000 were asked for"),
  ],
)
def test_what_cannot_be_compared_is_refused(
  workdir, strategy, effort, num_problems, words
):
  trained = load.from_workdir(workdir)
  evaluator = build.evaluator_of(
    trained.config, trained.policy, trained.task, trained.mesh
  )
  with pytest.raises(config_lib.UserError, match=words):
    evaluate.measure(trained, evaluator, [strategy], [effort], num_problems)


def test_a_run_is_loaded_at_any_saved_iteration(workdir):
  assert load.saved_iterations(workdir) == [0, 1]
  network = load.from_workdir(workdir).policy.network
  # The last one; the best one, which is the first; and one by its number.
  for given, expected in ((None, 1), (-1, 0), (0, 0), (1, 1)):
    trained = load.from_workdir(workdir, given)
    assert trained.iteration == expected
    params = network.init(jax.random.key(expected))
    jax.tree.map(np.testing.assert_array_equal, trained.params, params)
  with pytest.raises(config_lib.UserError, match="there is no checkpoint 7"):
    load.from_workdir(workdir, 7)


def test_a_folder_that_is_no_run_is_refused(workdir, tmp_path):
  with pytest.raises(config_lib.UserError, match="is not a workdir"):
    load.from_path(str(tmp_path))
  copy = tmp_path / "run"
  shutil.copytree(workdir, copy)
  shutil.rmtree(copy / "checkpoints")
  with pytest.raises(config_lib.UserError, match="holds no checkpoint yet"):
    load.from_path(str(copy))


def test_an_exported_policy_is_the_runs(workdir, tmp_path):
  folder = tmp_path / "policy"
  done = run("export", f"--workdir={workdir}", f"--to={folder}")
  assert done.returncode == 0, done.stderr
  assert done.stdout == f"wrote iteration 1 to {folder}\n"
  there, here = load.from_path(str(folder)), load.from_workdir(workdir)
  jax.tree.map(np.testing.assert_array_equal, there.params, here.params)
  assert there.iteration == 1
  assert there.config.to_dict() == here.config.to_dict()
  tokenizers = [t.policy.tokenizer.to_bytes() for t in (there, here)]
  assert tokenizers[0] == tokenizers[1]
  text = (folder / pretrained.CARD).read_text()
  (folder / pretrained.CARD).write_text(
    text.replace('"width": 16', '"width": 32')
  )
  with pytest.raises(config_lib.UserError, match="is of another network"):
    load.from_path(str(folder))
