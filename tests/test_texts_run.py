"""Runs that learn from files of texts, and what a command says of bad ones."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from o1jax import build, fields, iterate, metrics
from o1jax import config as config_lib
from o1jax import mesh as mesh_lib
from o1jax.rows import RowMaker, check_mix, group_sizes
from o1jax.types import LearnerBatch, PackedBatch
from policies import tiny_config

pytestmark = pytest.mark.usefixtures("quick_programs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  """A file of documents and two of dialogs."""
  folder = tmp_path_factory.mktemp("texts")
  words = ("zebra", "quagga", "okapi")
  documents = [{"text": f"a {word} met {i} of {word}"} for i in range(9)
               for word in words]  # fmt: skip
  dialogs = [
    {"prompt": f"{i} + {i}", "response": f"gives {i + i}"} for i in range(20)
  ]
  for name, rows in (("documents", documents), ("a", dialogs), ("b", dialogs)):
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / f"{name}.jsonl").write_text("".join(lines))
  return folder


def config_of(folder, *changed, reflection_tokens=64):
  """Both kinds of rows beside the task's own, in the first phase."""
  entries = (f"{folder}/a.jsonl=3", f"{folder}/b.jsonl")
  config = tiny_config(
    f"texts.documents={folder}/documents.jsonl",
    f"texts.instructions={entries!r}",
    "initialize.rows.documents=4",
    "initialize.rows.instructions=8",
    "tokenizer.vocab_size=400",
    *changed,
  )
  with config.unlocked():
    config.lengths.reflection_tokens = reflection_tokens
  return config


def build_of(config, workdir):
  fields.check_fields(config)
  return build.build(config, workdir, mesh_lib.make_mesh({"data": 2}))


def test_a_run_learns_from_both_and_resumes(folder, tmp_path, capsys):
  config = config_of(
    folder,
    "texts.label_noise=0.2",
    "num_iterations=0",
    "initialize.num_iterations=2",
    "initialize.num_updates=15",
    "evaluation.strategies=()",
    "checkpoint.keep_every=1",
  )
  expected = iterate.run(config, tmp_path / "run")
  rows = metrics.read_jsonl(tmp_path / "run" / "metrics.jsonl")
  losses = [row["learn/policy_loss"] for row in rows]
  assert losses[1] < losses[0] - 0.1
  assert not any(row["learn/rows_too_long"] for row in rows)
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "1")
  resumed = iterate.run(config, tmp_path / "run")
  assert "resuming after iteration 0" in capsys.readouterr().out
  jax.tree.map(np.testing.assert_array_equal, resumed, expected)


def test_a_run_is_not_resumed_with_other_texts(folder, tmp_path):
  copy = tmp_path / "texts"
  shutil.copytree(folder, copy)
  config = config_of(
    copy,
    f"texts.instructions=('{copy}/a.jsonl=3', '{copy}/b.jsonl=0')",
    "num_iterations=0",
    "initialize.num_updates=6",
    "evaluation.strategies=()",
  )
  run = functools.partial(iterate.run, config, tmp_path / "run")
  run()
  # Of weight 0: never read.
  (copy / "b.jsonl").unlink()
  run()
  for name in ("documents.jsonl", "a.jsonl"):
    path = copy / name
    text = path.read_text()
    # Of the same size.
    path.write_text(text.replace("0", "7", 1))
    with pytest.raises(config_lib.UserError) as raised:
      run()
    assert str(raised.value) == (
      f"{path} is gone or changed since {tmp_path / 'run'} began with it: put "
      "it back as it was, or take another --workdir"
    )
    path.unlink()
    with pytest.raises(config_lib.UserError, match=f"{path} is gone or"):
      run()
    path.write_text(text)
  run()


def test_rows_of_texts_mix_with_others_in_both_phases(folder, tmp_path):
  learned = [f"learn.rows.{kind}=2" for kind in ("documents", "instructions")]
  config = config_of(folder, *learned, "learn.rows.openings=0")
  parts = build_of(config, tmp_path)
  mix = {"random_play": 16, "documents": 4, "instructions": 8}
  assert check_mix(mix, parts.task, "rows") == 28
  assert group_sizes(mix, parts.policy.lengths) == {
    (LearnerBatch, 56): 16,
    (PackedBatch, 64): 4,
    (LearnerBatch, 64): 8,
  }
  for maker, counts in (
    (parts.initialize_rows, (16, 4, 8)),
    (parts.regimes["learn"].learn_rows, (40, 2, 2)),
  ):
    assert isinstance(maker, RowMaker)
    rng = np.random.default_rng(0)
    groups, dropped = maker.batches(rng, parts.experience, 3)
    assert dropped == 0
    sizes = {(type(g), g.tokens.shape): g for g in groups}
    play, packed, dialogs = counts
    assert sizes.keys() == {
      (LearnerBatch, (3, play, 56)),
      (PackedBatch, (3, packed, 64)),
      (LearnerBatch, (3, dialogs, 64)),
    }
    decode = parts.policy.tokenizer.decode
    text = decode(sizes[PackedBatch, (3, packed, 64)].tokens[0, 0].tolist())
    assert " met " in text
    text = decode(sizes[LearnerBatch, (3, dialogs, 64)].tokens[0, 0].tolist())
    assert text.startswith("user:\n") and "\nassistant:\ngives " in text


def test_the_tokenizer_sees_the_texts(folder, tmp_path):
  def num_tokens(text, config):
    task = build.task_of(config)
    return len(build.tokenizer_of(config, task, tmp_path).encode(text))

  plain = tiny_config("tokenizer.vocab_size=400")
  for text in (" of quagga", "assistant:\n"):
    assert num_tokens(text, config_of(folder)) <= 3 < num_tokens(text, plain)
  # A line that is too long for the tokenizer's own reader.
  path = tmp_path / "long.jsonl"
  path.write_text(json.dumps({"text": "llama alpaca " * 1000}))
  long = config_of(folder, f"texts.documents={path}")
  assert num_tokens("llama alpaca", long) <= 3


@pytest.mark.parametrize(
  "changed, words",
  [
    ("texts.documents=none.txt", "none.txt cannot be read (No such file or di"),
    ("texts.documents=", "initialize.rows.documents has no file to draw from"),
    ("texts.instructions=()", "initialize.rows.instructions has no file to d"),
    ("texts.instructions=none.jsonl", "none.jsonl cannot be read (No such"),
    ("initialize.rows.documents=0", "is not read without such rows: set initi"),
    ("initialize.rows.instructions=0", "is not read without such rows: set i"),
    ("initialize.rows.documents=3", "initialize.rows has 3 rows of 64 tokens"),
    ("texts.label_noise=1.0", "texts.label_noise=1.0 is not in [0, 1)"),
    ("texts.diversity=0.0", "texts.diversity=0.0 is not in (0, 1]"),
    ("texts.diversty=0.5", "unknown config field texts.diversty: did you mean"),
  ],
)
def test_a_run_refuses_before_it_writes(folder, tmp_path, changed, words):
  with pytest.raises(config_lib.UserError) as raised:
    config = config_of(folder, changed)
    iterate.run(config, tmp_path / "run")
  message = str(raised.value)
  assert words in message and "\n" not in message
  assert not (tmp_path / "run").exists()


def test_rows_of_a_regime_need_a_file_too(tmp_path):
  config = tiny_config(
    "regimes.names=('one',)",
    "regimes.changes.one=('learn.rows.documents=4',)",
  )
  words = "learn.rows of one.documents has no file to draw from"
  with pytest.raises(config_lib.UserError, match=words):
    build_of(config, tmp_path)


def test_dialogs_that_never_fit_are_refused(folder, tmp_path):
  words = f"{folder}/a.jsonl: lengths.reflection_tokens=5 is too short"
  with pytest.raises(config_lib.UserError, match=words):
    build_of(config_of(folder, reflection_tokens=5), tmp_path)
