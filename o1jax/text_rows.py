"""Rows for an update from the texts of files (`corpora`).

Documents are packed, several in a row (`packing`), and of each every token but
the first is learned, its end mark included. One that is longer than a row is
cut into pieces that overlap by a token, so that each of its tokens is still
learned once. A dialog has a row of its own, of which the responses are learned.

Draws depend on the generator alone: nothing is remembered between calls, and a
run that is resumed draws what an undisturbed one does.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from o1jax.corpora import Dialog, Texts
from o1jax.encoding import Policy
from o1jax.packing import Document, pack_batches
from o1jax.types import LearnerBatch, PackedBatch


class _Encoded(NamedTuple):
  """A dialog as tokens, `[T]`, and which of them are learned."""

  tokens: np.ndarray
  is_learned: np.ndarray


class TextRows:
  """Draws rows from documents and dialogs."""

  def __init__(self, policy: Policy, texts: Texts):
    """Encodes the texts.

    Raises:
      ValueError: a row is too short for any document, or for all dialogs of a
        file; names the config field.
    """
    lengths = policy.lengths
    self._tokenizer = policy.tokenizer
    self._length = lengths.reflection_tokens or lengths.row_tokens
    name = "reflection_tokens" if lengths.reflection_tokens else "row_tokens"
    if texts.documents and self._length < 2:
      raise ValueError(
        f"lengths.{name}={self._length} is too short for documents: raise it "
        "to 2 or more"
      )
    self._pieces = [
      piece
      for ids in self._tokenizer.encode_batch(texts.documents)
      for piece in _cut([*ids, self._tokenizer.eos_id], self._length)
    ]
    weights = np.array([source.weight for source in texts.sources])
    self._shares = weights / weights.sum()
    self._sources = [self._encode(source.dialogs) for source in texts.sources]
    for source, encoded in zip(texts.sources, self._sources, strict=True):
      shortest = min(len(dialog.tokens) for dialog in encoded)
      if shortest > self._length:
        raise ValueError(
          f"{source.path}: lengths.{name}={self._length} is too short for "
          f"every dialog, of which the shortest has {shortest} tokens: raise it"
        )

  def documents(
    self, rng: np.random.Generator, num_batches: int, num_rows: int
  ) -> PackedBatch:
    """Batches `[K, B, T]` of packed documents, drawn without a preference.

    All of them pass once before any comes again (`packing.pack_batches`).

    Raises:
      ValueError: there are none.
    """
    if not self._pieces:
      raise ValueError("no documents to draw from: name a file of them")
    return pack_batches(
      (self._pieces[place] for place in self._shuffled(rng)),
      self._length,
      num_rows,
      num_batches,
      pad_id=self._tokenizer.pad_id,
    )

  def instructions(
    self, rng: np.random.Generator, count: int
  ) -> tuple[LearnerBatch, int]:
    """Rows `[B, T]` of dialogs, and how many were dropped as too long.

    The file of each is drawn by the weights, the dialog evenly; one that is
    dropped leaves its row empty.
    """
    files = rng.choice(len(self._sources), count, p=self._shares)
    places = rng.integers(0, [len(self._sources[file]) for file in files])
    shape = count, self._length
    tokens = np.full(shape, self._tokenizer.pad_id, np.int32)
    lengths = np.zeros(count, np.int32)
    weights = np.zeros(shape, np.float32)
    for row, (file, place) in enumerate(zip(files, places, strict=True)):
      dialog = self._sources[file][place]
      size = len(dialog.tokens)
      if size > self._length:
        continue
      lengths[row] = size
      tokens[row, :size] = dialog.tokens
      # The weight of a token lies at the position before it.
      weights[row, : size - 1] = dialog.is_learned[1:]
    batch = LearnerBatch(
      tokens=tokens,
      lengths=lengths,
      policy_weights=weights,
      value_targets=np.zeros(shape, np.float32),
      value_weights=np.zeros(shape, np.float32),
    )
    return batch, int((lengths == 0).sum())

  def _shuffled(self, rng: np.random.Generator) -> Iterator[int]:
    while True:
      yield from rng.permutation(len(self._pieces)).tolist()

  def _encode(self, dialogs: Sequence[Dialog]) -> list[_Encoded]:
    texts = [
      text for dialog in dialogs for turn in dialog.turns for text in turn
    ]
    # What is given ends with a newline, which is a token of its own: the tokens
    # of both parts are those of the text.
    parts = iter(self._tokenizer.encode_batch(texts))
    encoded = []
    for dialog in dialogs:
      tokens: list[int] = []
      is_learned: list[bool] = []
      for _ in dialog.turns:
        given, response = next(parts), [*next(parts), self._tokenizer.eos_id]
        tokens += [*given, *response]
        is_learned += [False] * len(given) + [True] * len(response)
      encoded.append(_Encoded(np.array(tokens, np.int32), np.array(is_learned)))
    return encoded


def _cut(tokens: Sequence[int], length: int) -> list[Document]:
  """Pieces of at most `length` tokens, each from the last of the one before."""
  tokens = np.array(tokens, np.int32)
  pieces = [
    tokens[begin : begin + length]
    for begin in range(0, len(tokens) - 1, length - 1)
  ]
  # Nothing follows the last token.
  learned = np.arange(length, 0, -1) > 1
  return [
    Document(piece, learned[-len(piece) :].astype(np.float32))
    for piece in pieces
  ]
