"""Packed rows: a scalar first fit, and gradients of the documents apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.packing import (
  Document,
  empty_rows,
  first_fit,
  pack_batches,
  pack_rows,
)
from o1jax.policy import TransformerConfig, make_network, next_token_log_probs

CONFIG = TransformerConfig(
  vocab_size=19,
  num_layers=2,
  width=16,
  num_heads=2,
  num_kv_heads=1,
  head_width=8,
  ffn_width=16,
)
SIZES = (5, 3, 4, 1, 6, 2, 2)


def draw_documents():
  rng = np.random.default_rng(0)
  return [rng.integers(1, 19, size).tolist() for size in SIZES]


def with_weights(documents):
  """Each token's weight is a tenth of it."""
  return [Document(np.array(d, np.int32), np.array(d) / 10) for d in documents]


def test_first_fit_by_hand():
  tokens, segments, positions, weights = dataclasses.astuple(
    pack_rows(
      with_weights([[1, 2, 3], [4, 5, 6], [7], [8, 9], [3, 3, 3, 3]]),
      5,
      pad_id=11,
    )
  )
  assert tokens.dtype == segments.dtype == positions.dtype == np.int32
  # 7 goes behind the first document, 8 9 behind the second.
  assert tokens.tolist() == [
    [1, 2, 3, 7, 11],
    [4, 5, 6, 8, 9],
    [3, 3, 3, 3, 11],
  ]
  assert segments.tolist() == [
    [0, 0, 0, 1, -1],
    [0, 0, 0, 1, 1],
    [0, 0, 0, 0, -1],
  ]
  assert positions.tolist() == [
    [0, 1, 2, 0, 0],
    [0, 1, 2, 0, 1],
    [0, 1, 2, 3, 0],
  ]
  expected = np.where(tokens == 11, 0, tokens) / 10
  np.testing.assert_array_equal(weights, expected.astype(np.float32))


def test_first_fit_stops_where_a_row_more_would_open():
  sizes = [3, 3, 1, 2, 4, 1]
  assert first_fit(sizes, 5) == [[0, 2, 5], [1, 3], [4]]
  assert first_fit(sizes, 5, 3) == first_fit(sizes, 5)
  # 1 would have room, but stands behind what has none.
  assert first_fit(sizes, 5, 2) == [[0, 2], [1, 3]]
  assert first_fit(sizes, 5, 1) == [[0]]


def test_batches_of_a_stream_hold_it_in_order():
  """Each batch by hand from the documents that the others leave."""
  rng = np.random.default_rng(1)
  documents = [
    Document(
      rng.integers(1, 19, size).astype(np.int32),
      rng.random(size).astype(np.float32),
    )
    for size in rng.integers(1, 9, 60)
  ]
  found = pack_batches(iter(documents), 8, 3, 4, pad_id=7)
  left = documents
  for k in range(4):
    batch = jax.tree.map(lambda x, k=k: x[k], found)
    rows = first_fit([len(one.tokens) for one in left], 8, 3)
    for row, members in enumerate(rows):
      own = np.concatenate([left[i].tokens for i in members])
      assert batch.tokens[row].tolist() == [*own, *[7] * (8 - len(own))]
      own = np.concatenate([left[i].weights for i in members])
      assert batch.policy_weights[row, : len(own)].tolist() == own.tolist()
      assert not batch.policy_weights[row, len(own) :].any()
      segments = np.repeat(
        np.arange(len(members)), [len(left[i].tokens) for i in members]
      )
      assert batch.segment_ids[row, : len(own)].tolist() == segments.tolist()
      assert (batch.segment_ids[row, len(own) :] == -1).all()
    left = left[sum(map(len, rows)) :]


def test_empty_rows_are_padding():
  rows = empty_rows(2, 5, pad_id=3)
  assert (rows.tokens == 3).all() and (rows.segment_ids == -1).all()
  assert not rows.policy_weights.any() and rows.positions.shape == (2, 5)


def test_every_document_is_there_once():
  documents = draw_documents()
  rows = pack_rows(with_weights(documents), 8)
  tokens, segments = rows.tokens, rows.segment_ids
  found = [
    tokens[row, segments[row] == segment].tolist()
    for row in range(len(tokens))
    for segment in range(segments[row].max() + 1)
  ]
  assert sorted(found) == sorted(documents)


def test_a_packed_gradient_is_that_of_the_documents_apart():
  network = make_network(CONFIG)
  params = network.init(jax.random.key(0))
  kernel = params["value_head"]["out"]["kernel"]
  params["value_head"]["out"]["kernel"] = jnp.ones_like(kernel)
  documents = draw_documents()
  rows = pack_rows(with_weights(documents), 8)
  tokens, segments, positions = rows.tokens, rows.segment_ids, rows.positions
  assert len(tokens) < len(documents)

  def total(log_probs, values, weights):
    return jnp.sum(weights * (log_probs + jnp.square(values)))

  def packed_loss(params):
    is_token = segments >= 0
    log_probs, values = next_token_log_probs(
      network,
      params,
      tokens,
      is_token.sum(-1),
      segment_ids=segments,
      positions=positions,
    )
    ends = np.diff(segments, axis=1, append=-1) != 0
    assert log_probs.shape == segments.shape
    return total(log_probs, values, is_token), log_probs * ends

  def apart_loss(params):
    size = max(SIZES)
    rows = np.array([d + [0] * (size - len(d)) for d in documents])
    lengths = np.array(SIZES)
    log_probs, values = next_token_log_probs(network, params, rows, lengths)
    return total(log_probs, values, np.arange(size)[None] < lengths[:, None])

  (found, at_ends), packed = jax.jit(
    jax.value_and_grad(packed_loss, has_aux=True)
  )(params)
  expected, apart = jax.jit(jax.value_and_grad(apart_loss))(params)
  assert not np.asarray(at_ends).any()
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(apart), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
  ("documents", "words"),
  [([], "is empty"), ([[1], []], "document 1 has 0"), ([[1] * 5], "1 to 4")],
)
def test_what_does_not_fit_is_refused(documents, words):
  with pytest.raises(ValueError, match=words):
    pack_rows(with_weights(documents), 4)


def test_segments_want_positions():
  network = make_network(CONFIG)
  with pytest.raises(ValueError, match="belong together"):
    next_token_log_probs(
      network, {}, jnp.ones((1, 2), int), jnp.ones(1, int), positions=1
    )
