"""Text to tokens and back, exactly.

A sentencepiece model trained on the task's own text: whole words of the format
(" = ", " (left: ") become single pieces, every integer up to `max_number` is a
piece of its own, "\\n" is always its own piece (a step ends with it), and bytes
stand in for whatever was not seen, so that any text comes back as it was.
"""

import io
import re
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece

# Blanks enter the model as this letter of the private use area: sentencepiece
# takes a blank for the start of a word and would not learn " = " as one piece.
BLANK = "\ue000"
NEWLINE = "\n"
# Texts of a call from which on it takes all cores.
_NUM_FOR_THREADS = 10_000


class Tokenizer:
  """A trained model; build it with `train_tokenizer` or `from_bytes`.

  Attributes:
    vocab_size: V.
    pad_id: fills rows; never produced by `encode`.
    eos_id: ends a solution; never produced by `encode`.
    newline_id: the piece "\\n".
    pieces: bytes of every piece; b"" for marks.
  """

  def __init__(self, model: bytes):
    """Reads a serialized sentencepiece model.

    Raises:
      ValueError: the bytes are not a model of this kind.
    """
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
      raise ValueError("not a tokenizer: the model does not parse") from error
    self._bytes = bytes(model)
    self.vocab_size = self._model.get_piece_size()
    self.pad_id = self._model.pad_id()
    self.eos_id = self._model.eos_id()
    self.newline_id = self._model.piece_to_id(NEWLINE)
    if (
      self.pad_id < 0
      or self.eos_id < 0
      or self._piece(self.newline_id) != (NEWLINE.encode())
    ):
      raise ValueError("not a tokenizer of o1jax: pad, eos or newline missing")
    self.pieces = [self._piece(i) for i in range(self.vocab_size)]
    self._blank_bytes = [
      self._model.piece_to_id(f"<0x{byte:02X}>") for byte in BLANK.encode()
    ]

  @classmethod
  def from_bytes(cls, data: bytes) -> "Tokenizer":
    """The tokenizer that `to_bytes` saved."""
    return cls(data)

  def to_bytes(self) -> bytes:
    """The model as bytes (a protocol buffer)."""
    return self._bytes

  def encode(self, text: str) -> list[int]:
    """Tokens of a text, without an end mark.

    Raises:
      UnicodeEncodeError: the text holds half a surrogate pair.
    """
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
    """`encode` for many texts at once, faster than one by one."""
    texts = list(texts)
    for text in texts:
      text.encode()
    encoded = self._pieces_of(texts)
    for i, text in enumerate(texts):
      if BLANK in text:  # the letter itself, which goes as bytes
        encoded[i] = self._encode_parts(text.split(BLANK))
    return encoded

  def decode(self, ids: Iterable[int]) -> str:
    """The text of tokens; pad and end marks vanish, bad bytes become U+FFFD.

    Raises:
      IndexError: an id outside the vocabulary.
    """
    data = b"".join([self.pieces[i] for i in ids])
    return data.decode(errors="replace")

  def number_values(self) -> np.ndarray:
    """`[V]` float64 value of every number piece, NaN for the others."""
    is_number = re.compile(rb"[0-9]+").fullmatch
    return np.array(
      [
        float(p) if is_number(p) and not self._model.is_byte(i) else np.nan
        for i, p in enumerate(self.pieces)
      ]
    )

  def _pieces_of(self, texts: Sequence[str]) -> list[list[int]]:
    # The rows of an update are few and are made while the last one computes:
    # threads, opened and joined in every call, would take its cores.
    return self._model.encode(
      [text.replace(" ", BLANK) for text in texts],
      num_threads=1 if len(texts) < _NUM_FOR_THREADS else -1,
    )

  def _encode_parts(self, parts: list[str]) -> list[int]:
    first, *others = self._pieces_of(parts)
    for ids in others:
      first += self._blank_bytes + ids
    return first

  def _piece(self, i: int) -> bytes:
    if self._model.is_control(i) or self._model.is_unknown(i):
      return b""
    piece = self._model.id_to_piece(i)
    if self._model.is_byte(i):
      return bytes([int(piece[3:5], 16)])
    return piece.replace(BLANK, " ").encode()


def train_tokenizer(
  texts: Iterable[str], *, vocab_size: int, max_number: int = 9
) -> Tokenizer:
  """Trains a tokenizer; equal texts give equal bytes.

  Args:
    texts: what it should be short on: prompts and solutions of the task.
    vocab_size: at most so many pieces, of which 256 are bytes, 4 are marks and
      newline, and `max_number + 1` are numbers; fewer where the texts have no
      more to offer.
    max_number: integers up to it are pieces; larger ones are several, each as
      long as it can be.

  Raises:
    ValueError: `max_number` out of range, a vocabulary too small for the fixed
      pieces, or no text.
  """
  if not 9 <= max_number <= 9_999:
    raise ValueError(f"max_number={max_number} is not in 9 to 9,999")
  numbers = [str(n) for n in range(max_number + 1)]
  # Lines, so that no learned piece holds a newline.
  lines = [
    line.replace(" ", BLANK)
    for text in texts
    for line in text.split(NEWLINE)
    if line
  ]
  if not lines:
    raise ValueError("train_tokenizer got no text to learn from")
  letters = {letter for line in lines for letter in line}
  fixed = 256 + 3 + len(numbers) + 1 + len(letters)
  if vocab_size < fixed:
    raise ValueError(
      f"vocab_size={vocab_size} is less than the {fixed} pieces every "
      f"tokenizer with max_number={max_number} needs here"
    )
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_writer=model,
    model_type="bpe",
    vocab_size=vocab_size,
    hard_vocab_limit=False,
    user_defined_symbols=[NEWLINE, *numbers],
    byte_fallback=True,
    character_coverage=1.0,
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    split_by_whitespace=False,
    split_by_unicode_script=False,
    split_digits=False,
    max_sentencepiece_length=32,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    num_threads=1,
    minloglevel=2,
  )
  return Tokenizer(model.getvalue())
