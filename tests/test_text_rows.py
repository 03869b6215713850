"""Rows of documents and dialogs, against texts read by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from o1jax import regime_parts
from o1jax.corpora import Dialog, Source, Texts
from o1jax.encoding import Lengths
from o1jax.learning import update
from o1jax.learning.objective import Objective
from o1jax.text_rows import TextRows
from o1jax.types import LearnerBatch, PackedBatch
from policies import packed_members, tiny_params, tiny_policy

pytestmark = pytest.mark.usefixtures("quick_programs")

TOKENIZER = tiny_policy().tokenizer
DOCUMENTS = ("1 + 2 = 3", "4", "5 * 6 = 30\n30 - 1 = 29", "7 - 7 = 0", "8 / 2")


def policy_of(row_tokens, reflection_tokens=0):
  lengths = Lengths(14, 5, 2, row_tokens, reflection_tokens)
  return dataclasses.replace(tiny_policy(), lengths=lengths)


def document_rows(documents, row_tokens):
  return TextRows(policy_of(row_tokens), Texts(documents, ()))


def tokens_of(text):
  return [*TOKENIZER.encode(text), TOKENIZER.eos_id]


def draw(rows, num_batches, num_rows, seed=0):
  return rows.documents(np.random.default_rng(seed), num_batches, num_rows)


def test_of_a_document_every_token_but_the_first_is_learned():
  batch = draw(document_rows(DOCUMENTS, 40), 3, 2)
  assert batch.tokens.shape == (3, 2, 40)
  assert batch.tokens.dtype == batch.segment_ids.dtype == np.int32
  whole = [tokens_of(text) for text in DOCUMENTS]
  for tokens, weights in packed_members(batch):
    assert tokens.tolist() in whole
    assert weights.tolist() == [1.0] * (len(tokens) - 1) + [0.0]
  # Rows are filled: no document of the corpus would still have room.
  shortest = min(map(len, whole))
  assert ((batch.segment_ids < 0).sum(-1) < max(map(len, whole))).all()
  assert shortest == 2 and (batch.segment_ids.max(-1) > 0).any()


def test_all_documents_pass_once_before_any_comes_again():
  documents = [f"{i} + {i} = {2 * i}" for i in range(30)]
  size = len(tokens_of(documents[-1]))
  rows = document_rows(documents, 3 * size)
  found = [tokens.tolist() for tokens, _ in packed_members(draw(rows, 8, 2))]
  first = found[: len(documents)]
  assert len(found) >= 8 * 2 * 3
  assert sorted(first) == sorted(tokens_of(text) for text in documents)
  assert first != [tokens_of(text) for text in documents]


def test_a_long_document_is_cut_and_each_token_learned_once():
  text = "1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 = 36"
  whole = tokens_of(text)
  for length in (2, 5, len(whole) - 1, len(whole), len(whole) + 1):
    rows = document_rows([text], length)
    num_pieces = -(-(len(whole) - 1) // (length - 1))
    # As many rows as pieces, so that all are drawn once.
    batch = draw(rows, 1, num_pieces)
    pieces = [tokens.tolist() for tokens, _ in packed_members(batch)]
    assert max(map(len, pieces)) <= length
    starts = {tuple(whole[i : i + length]): i for i in range(len(whole) - 1)}
    learned = []
    for piece, (_, weights) in zip(pieces, packed_members(batch), strict=True):
      begin = starts[tuple(piece)]
      learned += [begin + 1 + i for i in np.flatnonzero(weights)]
    assert set(learned) == set(range(1, len(whole)))
    if length < len(whole) - 1:
      assert len(learned) == len(whole) - 1


def test_without_documents_none_are_drawn():
  with pytest.raises(ValueError, match="no documents to draw from"):
    draw(document_rows([], 20), 1, 2)


def test_a_packed_gradient_is_that_of_the_documents_apart():
  """Of the update: alone, and beside rows of another kind."""
  policy = policy_of(30)
  rows = TextRows(policy, Texts(DOCUMENTS, ()))
  packed = jax.tree.map(lambda x: x[0], draw(rows, 1, 4))
  members = packed_members(packed)
  assert len(members) > 6
  tokens = np.full((len(members), 30), TOKENIZER.pad_id, np.int32)
  weights = np.zeros(tokens.shape, np.float32)
  for row, (ids, own) in enumerate(members):
    tokens[row, : len(ids)] = ids
    weights[row, : len(ids)] = own
  nothing = np.zeros(tokens.shape, np.float32)
  lengths = np.array([len(ids) for ids, _ in members], np.int32)
  apart = LearnerBatch(tokens, lengths, weights, nothing, nothing)
  objective = Objective()
  log_probs_fn = regime_parts.log_probs_of(policy, objective)
  gradient = update.make_gradient(log_probs_fn, objective=objective)

  def of(batch):
    found = np.asarray(gradient(tiny_params(), batch))
    assert np.abs(found).max() > 0.01
    return found

  expected = of(apart)
  np.testing.assert_allclose(of(packed), expected, atol=1e-6)
  # A mean over the tokens of both groups.
  other = jax.tree.map(lambda x: x[:3], apart)
  both = jax.tree.map(lambda *x: np.concatenate(x), apart, other)
  np.testing.assert_allclose(of((packed, other)), of(both), atol=1e-6)
  # The masks and the positions matter.
  for changed in (
    packed.replace(segment_ids=np.minimum(packed.segment_ids, 0)),
    packed.replace(positions=np.zeros_like(packed.positions)),
  ):
    assert np.abs(of(changed) - expected).max() > 1e-3


def dialog(*turns):
  given = [f"user:\n{asked}\nassistant:\n" for asked, _ in turns]
  said = [response for _, response in turns]
  return Dialog(tuple(zip(given, said, strict=True)))


def dialog_rows(*sources, policy=None):
  return TextRows(policy or policy_of(120), Texts((), sources))


def test_of_a_dialog_the_responses_are_learned_and_their_ends():
  # One holds a mark itself, which is learned like any text.
  turns = ("1 + 1", "2"), ("2 + 2", "4\nuser:\nno"), ("4 - 4\n", "0")
  rows = dialog_rows(Source("a", 1.0, [dialog(*turns)]))
  batch, dropped = rows.instructions(np.random.default_rng(0), 2)
  assert dropped == 0 and batch.tokens.shape == (2, 120)
  assert not batch.value_weights.any()
  expected_tokens, expected_weights = [], []
  for asked, response in turns:
    given = TOKENIZER.encode(f"user:\n{asked}\nassistant:\n")
    said = tokens_of(response)
    expected_tokens += given + said
    expected_weights += [0.0] * len(given) + [1.0] * len(said)
  size = len(expected_tokens)
  for row in range(2):
    assert batch.lengths[row] == size
    assert batch.tokens[row, :size].tolist() == expected_tokens
    assert (batch.tokens[row, size:] == TOKENIZER.pad_id).all()
    # At the position before the token.
    weights = batch.policy_weights[row]
    assert weights[: size - 1].tolist() == expected_weights[1:]
    assert not weights[size - 1 :].any()
  # Tokens of the parts are those of the text.
  text = "".join(f"user:\n{a}\nassistant:\n{r}" for a, r in turns[:1])
  assert expected_tokens[: len(TOKENIZER.encode(text))] == (
    TOKENIZER.encode(text)
  )


def test_files_are_drawn_by_their_weights_and_dialogs_evenly():
  sources = [
    Source("a", 3.0, [dialog(("1", "10"))]),
    Source("b", 1.0, [dialog(("1", f"2{i}")) for i in range(4)]),
  ]
  rows = dialog_rows(*sources)
  count = 3200
  batch, _ = rows.instructions(np.random.default_rng(0), count)
  found = {}
  for tokens, length in zip(batch.tokens, batch.lengths, strict=True):
    text = TOKENIZER.decode(tokens[:length].tolist()).rpartition("\n")[2]
    found[text] = found.get(text, 0) + 1
  shares = {"10": 3 / 4} | {f"2{i}": 1 / 16 for i in range(4)}
  assert found.keys() == shares.keys()
  for text, share in shares.items():
    sigma = (count * share * (1 - share)) ** 0.5
    assert abs(found[text] - count * share) < 4 * sigma, text


def test_dialogs_that_are_too_long_are_dropped_and_counted():
  short, long = dialog(("1", "2")), dialog(("1", "2 + " * 60 + "2"))
  rows = dialog_rows(Source("a", 1.0, [short, long]))
  batch, dropped = rows.instructions(np.random.default_rng(0), 60)
  assert 15 < dropped < 45
  is_empty = batch.lengths == 0
  assert dropped == is_empty.sum()
  assert not batch.policy_weights[is_empty].any()
  assert (batch.tokens[is_empty] == TOKENIZER.pad_id).all()
  assert (batch.policy_weights[~is_empty].sum(-1) == 2).all()
  size = len(TOKENIZER.encode("user:\n1\nassistant:\n2")) + 1
  for policy, name in (
    (policy_of(size - 1), "row_tokens"),
    (policy_of(200, size - 1), "reflection_tokens"),
  ):
    words = f"b.jsonl: lengths.{name}={size - 1} is too short .* has {size} tok"
    with pytest.raises(ValueError, match=words):
      dialog_rows(Source("b.jsonl", 1.0, [short]), policy=policy)
  fits = dialog_rows(Source("b", 1.0, [short]), policy=policy_of(size))
  assert fits.instructions(np.random.default_rng(0), 5)[1] == 0


def test_texts_stand_in_rows_of_the_width_of_reflections():
  texts = Texts(DOCUMENTS, [Source("a", 1.0, [dialog(("1", "2"))])])
  rows = TextRows(policy_of(20, 90), texts)
  assert draw(rows, 1, 2).tokens.shape == (1, 2, 90)
  assert rows.instructions(np.random.default_rng(0), 2)[0].tokens.shape[1] == 90
  with pytest.raises(ValueError, match="lengths.row_tokens=1 is too short for"):
    TextRows(policy_of(1), texts)


def test_draws_depend_on_the_generator_alone():
  dialogs = [dialog((f"{i}", f"{i} + 1")) for i in range(9)]
  texts = Texts(DOCUMENTS, [Source("a", 1.0, dialogs)])

  def call(rows, rng):
    batch, _ = rows.instructions(rng, 6)
    return rows.documents(rng, 2, 2), batch

  rng, rows = np.random.default_rng(1), TextRows(policy_of(40), texts)
  call(rows, rng)
  state = rng.bit_generator.state
  expected = call(rows, rng)
  later = np.random.default_rng()
  later.bit_generator.state = state
  found = call(TextRows(policy_of(40), texts), later)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert isinstance(found[0], PackedBatch)
  other = call(rows, rng)
  assert (other[0].tokens != expected[0].tokens).any()
  assert (other[1].tokens != expected[1].tokens).any()
