"""Round trips, the format's own pieces, determinism."""

import random

import numpy as np
import pytest

from o1jax.policy.tokenizer import BLANK, Tokenizer, train_tokenizer


def make_texts():
  rng = random.Random(0)
  texts = []
  for _ in range(300):
    a, b, c = (rng.randint(1, 20) for _ in range(3))
    op = rng.choice("+-*/")
    texts.append(f"{a} {b} {c} = {rng.randint(1, 99)}\n")
    texts.append(f"{a} {op} {b} = {c} (left: {c} 4)\n{c} {op} 4 = 5 (left: 5)")
  return texts


@pytest.fixture(scope="module", params=[9, 99, 400, 999])
def tokenizer(request):
  return train_tokenizer(
    make_texts(), vocab_size=1400, max_number=request.param
  )


@pytest.fixture(scope="module")
def two_digits():
  return train_tokenizer(make_texts(), vocab_size=1400, max_number=99)


def test_format_is_short(two_digits):
  assert len(two_digits.encode("3 7 2 = 13\n")) == 8
  solution = "3 + 7 = 10 (left: 2 10)\n10 + 2 = 12 (left: 12)"
  assert len(two_digits.encode(solution)) == 19
  pieces = [two_digits.decode([i]) for i in two_digits.encode(solution)]
  assert pieces[:6] == ["3", " + ", "7", " = ", "10", " (left: "]


HARD_TEXTS = [
  "",
  "\n\n",
  "   ",
  "  a  b ",
  "\u2581 and " + BLANK + "  " + BLANK,
  "nul \0 tab \t return \r\n line \u2028",
  "accents e\u0301 \u00e9, \u6f22\u5b57, \U0001f600, \ufeff, \ufffd",
  "<pad></s><unk><0x0A>",
]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_any_text_comes_back(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_unicode_comes_back(two_digits):
  rng = random.Random(1)
  letters = [
    lambda: rng.randint(0, 127),
    lambda: rng.randint(0, 0xD7FF),
    lambda: rng.randint(0xE000, 0x10FFFF),
    lambda: rng.choice([32, 10, 0x2581, 0xE000]),
  ]
  texts = [
    "".join(chr(rng.choice(letters)()) for _ in range(rng.randint(0, 12)))
    for _ in range(2000)
  ]
  encoded = two_digits.encode_batch(texts)
  assert [two_digits.decode(ids) for ids in encoded] == texts
  marks = {two_digits.pad_id, two_digits.eos_id}
  assert all(marks.isdisjoint(ids) for ids in encoded)
  assert all(two_digits.encode(t) == i for t, i in zip(texts, encoded))  # noqa: B905


def test_newline_is_one_piece_and_in_no_other(tokenizer):
  assert tokenizer.encode("\n") == [tokenizer.newline_id]
  assert tokenizer.encode("1)\n\n2").count(tokenizer.newline_id) == 2
  others = [p for i, p in enumerate(tokenizer.pieces) if b"\n" in p]
  assert others == [b"\n", b"\n"]  # the piece and the byte


def test_number_values_are_those_of_the_pieces(tokenizer):
  values = tokenizer.number_values()
  assert values.shape == (tokenizer.vocab_size,)
  known = {int(v): i for i, v in enumerate(values) if not np.isnan(v)}
  largest = max(known)
  assert sorted(known) == list(range(largest + 1))
  assert largest in (9, 99, 400, 999)
  for number in (0, 7, largest):
    assert tokenizer.encode(str(number)) == [known[number]]
  following = tokenizer.encode(str(largest + 1))
  longest = str(largest + 1)[:-1]
  assert tokenizer.pieces[following[0]].decode() == longest
  assert len(following) == 2
  digits = len(str(largest))
  assert len(tokenizer.encode("1" * (2 * digits))) == 2


def test_bytes_are_deterministic_and_load(two_digits):
  again = train_tokenizer(make_texts(), vocab_size=1400, max_number=99)
  assert again.to_bytes() == two_digits.to_bytes()
  loaded = Tokenizer.from_bytes(two_digits.to_bytes())
  text = "3 + 7 = 10 (left: 2 10)\nodd"
  assert loaded.encode(text) == two_digits.encode(text)
  assert loaded.pieces == two_digits.pieces


def test_decode_drops_marks_and_survives_bad_bytes(two_digits):
  t = two_digits
  assert t.decode([t.pad_id, *t.encode("4"), t.eos_id, t.pad_id]) == "4"
  half_a_letter = t.encode("\u00e9")[:1]
  assert t.decode(half_a_letter) == "\ufffd"
  with pytest.raises(IndexError):
    t.decode([t.vocab_size])


def test_bad_input_is_refused_with_the_numbers():
  with pytest.raises(ValueError, match="vocab_size=300 is less than the"):
    train_tokenizer(make_texts(), vocab_size=300, max_number=99)
  with pytest.raises(ValueError, match="max_number=8 is not in 9 to 9,999"):
    train_tokenizer(make_texts(), vocab_size=999, max_number=8)
  with pytest.raises(ValueError, match="no text"):
    train_tokenizer(["\n"], vocab_size=999)
  with pytest.raises(ValueError, match="not a tokenizer"):
    Tokenizer.from_bytes(b"something else")
  tokenizer = train_tokenizer(make_texts(), vocab_size=999)
  with pytest.raises(UnicodeEncodeError):
    tokenizer.encode("\ud800")
