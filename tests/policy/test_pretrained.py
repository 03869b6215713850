"""A policy folder comes back bit for bit, or is refused with one line."""

import pathlib

import jax
import numpy as np
import pytest

from o1jax.policy import pretrained

PARAMS = {
  "trunk": {"embedding": np.arange(6, dtype=np.float32).reshape(2, 3)},
  "value_head": {"bias": np.float32([0.5])},
}
CARD = {"config": {"seed": 1}, "iteration": 7}


@pytest.fixture
def folder(tmp_path):
  pretrained.save(tmp_path / "policy", PARAMS, b"model", CARD)
  return tmp_path / "policy"


def test_everything_comes_back(folder):
  assert pretrained.load_card(folder) == CARD
  assert pretrained.load_tokenizer_model(folder) == b"model"
  like = jax.eval_shape(lambda: jax.tree.map(jax.numpy.asarray, PARAMS))
  loaded = pretrained.load_params(folder, like)
  assert jax.tree.structure(loaded) == jax.tree.structure(PARAMS)
  jax.tree.map(np.testing.assert_array_equal, loaded, PARAMS)
  half = jax.tree.map(lambda x: x.astype(np.float16), PARAMS)
  assert pretrained.load_params(folder, half)["value_head"]["bias"].dtype == (
    np.float16
  )


@pytest.mark.parametrize("file", ["params", "tokenizer", "card"])
def test_a_write_that_fails_leaves_the_policy_that_was_there(
  folder, monkeypatch, file
):
  (folder / "notes.txt").write_text("mine")
  before = {path.name: path.read_bytes() for path in folder.iterdir()}
  places = {
    "params": (np, "savez"),
    "tokenizer": (pathlib.Path, "write_bytes"),
    "card": (pathlib.Path, "write_text"),
  }

  def fail(*args, **kwargs):
    raise OSError("no room")

  with monkeypatch.context() as patch:
    patch.setattr(*places[file], fail)
    with pytest.raises(OSError, match="no room"):
      pretrained.save(folder, {"a": np.ones(3)}, b"other", {})
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
  assert list(folder.parent.iterdir()) == [folder]
  # A new policy takes its place; what else lies there is left alone.
  pretrained.save(folder, PARAMS, b"new", CARD | {"iteration": 8})
  assert pretrained.load_card(folder)["iteration"] == 8
  assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
  "changed, words",
  [
    (
      {"trunk": {"embedding": np.zeros((2, 4))}},
      r"trunk/embedding is \(2, 3\), the config's network has \(2, 4\)",
    ),
    ({"value_head": {}}, r"value_head/bias is \(1,\), .* has absent"),
    ({"head": np.zeros(2)}, r"head is absent, .* has \(2,\)"),
  ],
)
def test_parameters_of_another_network_are_refused(folder, changed, words):
  with pytest.raises(ValueError, match=words):
    pretrained.load_params(folder, PARAMS | changed)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", None])
def test_a_damaged_file_of_parameters_is_refused(folder, content):
  path = folder / pretrained.PARAMS
  path.write_bytes(path.read_bytes()[:-60] if content is None else content)
  with pytest.raises(ValueError, match="params.npz cannot be read"):
    pretrained.load_params(folder, PARAMS)


def test_objects_in_the_file_are_not_loaded(folder):
  objects = {"trunk/embedding": np.array([{}], object)}
  np.savez(folder / pretrained.PARAMS, **objects)
  with pytest.raises(ValueError, match="cannot be read"):
    pretrained.load_params(folder, PARAMS)


@pytest.mark.parametrize(
  "card, words",
  [
    (None, "holds no policy: policy.json is missing or damaged"),
    ("{", "missing or damaged"),
    ("[]", "has no config: not made by o1jax"),
    ('{"iteration": 1}', "has no config"),
  ],
)
def test_a_folder_without_a_good_card_is_refused(folder, card, words):
  path = folder / pretrained.CARD
  path.unlink()
  if card is not None:
    path.write_text(card)
  with pytest.raises(ValueError, match=words):
    pretrained.load_card(folder)
  (folder / pretrained.TOKENIZER).unlink()
  with pytest.raises(ValueError, match=r"has no tokenizer\.model"):
    pretrained.load_tokenizer_model(folder)
