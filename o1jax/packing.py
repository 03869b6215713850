"""Several documents in one row, so that training reads little padding.

First fit, on the host: each document goes to the first row that has room, in
the order given (Krell et al., arXiv 2107.02027, pack by lengths alone; here the
order of the documents is kept within a row). What learns from packed rows gets
a document of each token, so that documents do not read each other, and
positions that start anew (`policy.next_token_log_probs`).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from o1jax.types import PackedBatch

PADDING = -1  # the segment of padding


class Document(NamedTuple):
  """Tokens `[T]`, and `[T]` the weight of the token that follows each."""

  tokens: np.ndarray
  weights: np.ndarray


def first_fit(
  sizes: Sequence[int], length: int, max_rows: int | None = None
) -> list[list[int]]:
  """Indices of the documents in each row, by their sizes alone.

  With `max_rows` it stops before the first document that would open one row
  more: then all rows are open, and what stands in them is a beginning of the
  documents.

  Args:
    sizes: tokens of each document, 1 to `length`.
    length: T, tokens of a row.
    max_rows: rows at most; None for as many as it takes.

  Raises:
    ValueError: a document is empty, or longer than a row.
  """
  for i, size in enumerate(sizes):
    if not 1 <= size <= length:
      raise ValueError(
        f"document {i} has {size} tokens, and a row holds 1 to {length}: cut "
        "or drop it, or raise length"
      )
  rows: list[list[int]] = []
  left: list[int] = []
  for i, size in enumerate(sizes):
    row = next((r for r, room in enumerate(left) if room >= size), len(rows))
    if row == max_rows:
      break
    if row == len(rows):
      rows.append([])
      left.append(length)
    rows[row].append(i)
    left[row] -= size
  return rows


def pack_rows(
  documents: Sequence[Document], length: int, *, pad_id: int = 0
) -> PackedBatch:
  """Puts documents one behind the other into as few rows as first fit takes.

  Args:
    documents: at least one.
    length: T, tokens of a row.
    pad_id: fills what is left on the right.

  Returns:
    Rows `[B, T]`: segments count from 0 in each row and are -1 in padding,
    positions from 0 in each document.

  Raises:
    ValueError: no document, an empty one, or one longer than a row.
  """
  if not documents:
    raise ValueError("documents is empty: pass at least one")
  sizes = [len(document.tokens) for document in documents]
  return _laid_out(documents, first_fit(sizes, length), length, pad_id)


def _laid_out(
  documents: Sequence[Document],
  places: Sequence[Sequence[int]],
  length: int,
  pad_id: int,
) -> PackedBatch:
  """Rows `[B, T]` of the documents whose indices `places` has for each."""
  rows = empty_rows(len(places), length, pad_id=pad_id)
  for row, members in enumerate(places):
    begin = 0
    for segment, i in enumerate(members):
      tokens, weights = documents[i]
      own = row, slice(begin, begin + len(tokens))
      rows.tokens[own] = tokens
      rows.segment_ids[own] = segment
      rows.positions[own] = np.arange(len(tokens))
      rows.policy_weights[own] = weights
      begin += len(tokens)
  return rows


def empty_rows(num_rows: int, length: int, *, pad_id: int = 0) -> PackedBatch:
  """Rows `[B, T]` of nothing but padding."""
  shape = num_rows, length
  return PackedBatch(
    tokens=np.full(shape, pad_id, np.int32),
    segment_ids=np.full(shape, PADDING, np.int32),
    positions=np.zeros(shape, np.int32),
    policy_weights=np.zeros(shape, np.float32),
  )


def pack_batches(
  documents: Iterator[Document],
  length: int,
  num_rows: int,
  num_batches: int,
  *,
  pad_id: int = 0,
) -> PackedBatch:
  """Batches `[K, B, T]` of a stream of documents that does not end.

  Those that a batch has no room for begin the next one; what is left of them
  at the end is not used.
  """
  capacity = num_rows * length
  members: list[Document] = []
  batches = []
  for _ in range(num_batches):
    size = sum(len(member.tokens) for member in members)
    while size <= capacity:
      members.append(next(documents))
      size += len(members[-1].tokens)
    sizes = [len(member.tokens) for member in members]
    places = first_fit(sizes, length, num_rows)
    batches.append(_laid_out(members, places, length, pad_id))
    members = members[sum(map(len, places)) :]
  return jax.tree.map(lambda *rows: np.stack(rows), *batches)
