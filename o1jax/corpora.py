"""Texts of files: documents to pre-train on, dialogs to be instructed by.

Section 3 of the paper (arXiv 2412.14135), policy initialization: pre-training
on texts, then instruction tuning on prompts that differ and responses that are
right. How much depends on either is a study's to measure: `diversity` takes
prompts away, and `label_noise` puts responses under the wrong ones.

  documents     .jsonl: {"text": ...} a line. Any other name: plain UTF-8, in
                which blank lines part the documents
  instructions  .jsonl: {"prompt": ..., "response": ...} a line, or {"messages":
                [{"role": ..., "content": ...}, ...]} of the roles system, user
                and assistant, of which the last speaks last

  python -m o1jax.main --config=configs/countdown.py --workdir=W \\
    --config.texts.documents=book.txt --config.initialize.rows.documents=16 \\
    --config.texts.instructions="('a.jsonl=3','b.jsonl')" \\
    --config.initialize.rows.instructions=16 --config.lengths.row_tokens=256

A dialog reads `user:\\n<text>\\nassistant:\\n<response>`; every response ends
with the tokenizer's end mark. Who speaks is known from the file, so a text that
holds such a line itself is learned no differently.
"""

import contextlib
import dataclasses
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from o1jax import jsonl

ROLES = ("system", "user", "assistant")
STREAM = 2**31 + 1  # of randomness: what is kept and what is swapped

_FORMS = {
  "documents": (
    'takes {"text": ...} a line in a .jsonl file, plain UTF-8 in others'
  ),
  "instructions": (
    'takes {"prompt": ..., "response": ...} or {"messages": [{"role": ..., '
    '"content": ...}, ...]} a line'
  ),
}
_MAX_LINE = 1000  # characters, which are up to four bytes each
_PAIR = ("prompt", "response")
_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


class Dialog(NamedTuple):
  """One conversation.

  Attributes:
    turns: `(given, response)` each: what is read, marks included, and what is
      learned after it, without its end mark.
  """

  turns: tuple[tuple[str, str], ...]

  @property
  def prompt(self) -> str:
    """What stands before the first response."""
    return self.turns[0][0]


class Source(NamedTuple):
  """The dialogs of one file.

  Attributes:
    path: of the file.
    weight: share of the rows that are drawn from it, before normalization.
    dialogs: one or more.
  """

  path: str
  weight: float
  dialogs: Sequence[Dialog]


class Texts(NamedTuple):
  """What the files hold.

  Attributes:
    documents: of the file of documents; none without one.
    sources: files of dialogs whose weight is above 0.
  """

  documents: Sequence[str]
  sources: Sequence[Source]

  def corpus(self, rng: np.random.Generator, count: int) -> list[str]:
    """Lines for a tokenizer, of at most `count` documents and dialogs each.

    Long ones are cut, for what trains on them may pass over those.
    """
    dialogs = [
      "\n".join(part for turn in dialog.turns for part in turn)
      for source in self.sources
      for dialog in source.dialogs
    ]
    return [
      line[begin : begin + _MAX_LINE]
      for texts in (self.documents, dialogs)
      for i in rng.permutation(len(texts))[:count]
      for line in texts[i].split("\n")
      for begin in range(0, len(line), _MAX_LINE)
    ]


@dataclasses.dataclass(frozen=True)
class TextFiles:
  """Which files, and what becomes of them; fields of a config.

  Attributes:
    documents: path of the file of documents, "" for none.
    instructions: "path" or "path=weight" of each file of dialogs; weights are
      relative, 1 where none is given, and a file of weight 0 is not read.
    diversity: share, in (0, 1], of the distinct prompts of each file that are
      kept; those of a smaller share are among those of a larger one.
    label_noise: share, in [0, 1), of the dialogs of each file whose last
      response is replaced by that of another prompt, drawn evenly.

  Raises:
    ValueError: a number out of its range, weights that cannot be drawn by, a
      file named twice, or an option that is not read; names the field.
  """

  documents: str = ""
  instructions: tuple[str, ...] = ()
  diversity: float = 1.0
  label_noise: float = 0.0

  def __post_init__(self):
    if not 0 < self.diversity <= 1:
      raise ValueError(
        f"texts.diversity={self.diversity} is not in (0, 1]: set it to 1 to "
        "keep every prompt"
      )
    if not 0 <= self.label_noise < 1:
      raise ValueError(
        f"texts.label_noise={self.label_noise} is not in [0, 1): set it to 0 "
        "to keep every response"
      )
    for name, plain in (("diversity", 1), ("label_noise", 0)):
      value = getattr(self, name)
      if value != plain and not self.instructions:
        raise ValueError(
          f"texts.{name}={value} is not read without texts.instructions: name "
          f"a file there, or set it to {plain}"
        )
    self.weights()

  def weights(self) -> dict[str, float]:
    """Path -> weight of each file of dialogs, in order."""
    weights: dict[str, float] = {}
    for entry in map(str, self.instructions):
      path, equals, number = entry.rpartition("=")
      path, number = (path, number) if equals else (entry, "1")
      try:
        weight = float(number)
      except ValueError:
        weight = math.nan
      if not path or not 0 <= weight < math.inf:
        raise ValueError(
          f"texts.instructions has {entry!r}: write 'path=weight' with a "
          "weight of 0 or more"
        )
      if path in weights:
        raise ValueError(
          f"texts.instructions names {path} twice: name it once, with the sum "
          "of the weights"
        )
      weights[path] = weight
    if weights and not any(weights.values()):
      raise ValueError(
        f"texts.instructions={tuple(self.instructions)} has no weight above 0: "
        "raise one of them"
      )
    return weights

  def paths(self) -> list[str]:
    """The files that are read."""
    dialogs = [path for path, weight in self.weights().items() if weight]
    return [self.documents, *dialogs] if self.documents else dialogs

  def read(self, seed: int) -> Texts:
    """Reads the files; equal seeds give equal texts.

    Raises:
      ValueError: a file that is missing, empty or not in its form; names file,
        line and what is expected.
    """
    sources = []
    for index, (path, weight) in enumerate(self.weights().items()):
      if not weight:
        continue
      rng = np.random.default_rng([seed, STREAM, index])
      dialogs = diverse(read_dialogs(path), self.diversity, rng)
      try:
        dialogs = noisy(dialogs, self.label_noise, rng)
      except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
      sources.append(Source(path, weight, dialogs))
    documents = read_documents(self.documents) if self.documents else []
    return Texts(documents, sources)


def read_documents(path: str) -> list[str]:
  """The documents of a file, see the head of this module.

  Raises:
    ValueError: the file is missing or empty, or a line is bad.
  """
  with _reading(path, "documents"):
    if path.endswith(".jsonl"):
      documents = [
        _text(row, "text", where) for where, row in jsonl.numbered_rows(path)
      ]
    else:
      parts = _BLANK_LINES.split(f"\n{_plain_text(path)}\n")
      documents = [part.strip("\n") for part in parts if part.strip()]
  if not documents:
    raise ValueError(
      f"{path} has no documents: write some, or leave texts.documents empty"
    )
  return documents


def read_dialogs(path: str) -> list[Dialog]:
  """The dialogs of a file, see the head of this module.

  Raises:
    ValueError: the file is missing or empty, or a line is bad.
  """
  with _reading(path, "instructions"):
    dialogs = [_dialog(row, at) for at, row in jsonl.numbered_rows(path)]
  if not dialogs:
    raise ValueError(
      f"{path} has no dialogs: write some, or take it out of texts.instructions"
    )
  return dialogs


def chat_prompt(text: str) -> str:
  """What a policy is asked by that was instructed in this form."""
  return _given([("user", text)])


def diverse(
  dialogs: Sequence[Dialog], share: float, rng: np.random.Generator
) -> list[Dialog]:
  """Keeps the dialogs of some prompts, in their order.

  Args:
    dialogs: of one file.
    share: of the distinct prompts, in (0, 1]; rounded, and at least one.
    rng: chooses which.
  """
  prompts = list(dict.fromkeys(dialog.prompt for dialog in dialogs))
  count = max(_rounded(share * len(prompts)), 1)
  kept = {prompts[i] for i in rng.permutation(len(prompts))[:count]}
  return [dialog for dialog in dialogs if dialog.prompt in kept]


def noisy(
  dialogs: Sequence[Dialog], share: float, rng: np.random.Generator
) -> list[Dialog]:
  """Replaces the last response of some by that of another prompt.

  Args:
    dialogs: of one file.
    share: of the dialogs, in [0, 1); rounded.
    rng: chooses which, and the others evenly.

  Raises:
    ValueError: there is no other prompt.
  """
  total, count = len(dialogs), _rounded(share * len(dialogs))
  if not count:
    return list(dialogs)
  prompts = [dialog.prompt for dialog in dialogs]
  _, groups = np.unique(np.array(prompts, object), return_inverse=True)
  order = np.argsort(groups, kind="stable")
  begins = np.searchsorted(groups[order], groups, "left")
  sizes = np.searchsorted(groups[order], groups, "right") - begins
  if sizes[0] == total:
    raise ValueError(
      f"texts.label_noise={share} needs two distinct prompts, and here is one: "
      "set it to 0, or raise texts.diversity"
    )
  chosen = rng.permutation(total)[:count]
  # Those of another prompt stand before and behind those of the same.
  places = rng.integers(0, total - sizes[chosen])
  places += (places >= begins[chosen]) * sizes[chosen]
  changed = list(dialogs)
  for i, other in zip(chosen, order[places], strict=True):
    *turns, (given, _) = dialogs[i].turns
    response = dialogs[other].turns[-1][1]
    changed[i] = Dialog((*turns, (given, response)))
  return changed


@contextlib.contextmanager
def _reading(path: str, name: str) -> Iterator[None]:
  """Errors as one sentence that ends with what is to be changed."""
  try:
    yield
  except OSError as error:
    raise ValueError(
      f"{path} cannot be read ({error.strerror}): name a file that is there in "
      f"texts.{name}"
    ) from error
  except ValueError as error:
    raise ValueError(f"{error}; texts.{name} {_FORMS[name]}") from error


def _plain_text(path: str) -> str:
  data = pathlib.Path(path).read_bytes()
  try:
    return data.decode().replace("\r\n", "\n")
  except UnicodeDecodeError as error:
    line = data[: error.start].count(b"\n") + 1
    raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason})") from error


def _dialog(row: dict[str, Any], where: str) -> Dialog:
  if "messages" not in row:
    asked, response = (_text(row, name, where) for name in _PAIR)
    return Dialog(((chat_prompt(asked), response),))
  for name in _PAIR:
    if name in row:
      raise ValueError(f"{where}: field {name!r} stands beside 'messages'")
  messages = row["messages"]
  if not isinstance(messages, list):
    raise ValueError(f"{where}: field 'messages' is not a list")
  spoken = []
  for place, message in enumerate(messages):
    at = f"{where}: messages[{place}]"
    if not isinstance(message, dict):
      raise ValueError(f"{at} is not an object")
    role = _text(message, "role", at)
    if role not in ROLES:
      raise ValueError(f"{at}: role {role!r} is none of {', '.join(ROLES)}")
    if role == "system" and place:
      raise ValueError(f"{at}: role 'system' may speak first only")
    spoken.append((role, _text(message, "content", at)))
  if not spoken or spoken[-1][0] != "assistant":
    raise ValueError(f"{where}: the assistant must speak last")
  if spoken[int(spoken[0][0] == "system")][0] != "user":
    raise ValueError(f"{where}: the user must speak before the assistant")
  turns, given = [], []
  for role, content in spoken:
    if role == "assistant":
      turns.append((_given(given), content))
      given = []
    else:
      given.append((role, content))
  return Dialog(tuple(turns))


def _given(messages: Sequence[tuple[str, str]]) -> str:
  parts = [f"{role}:\n{content}\n" for role, content in messages]
  return "".join([*parts, "assistant:\n"])


def _text(row: dict[str, Any], name: str, where: str) -> str:
  """The field, which must be a text with something in it."""
  if name not in row:
    raise ValueError(f"{where}: field {name!r} is missing")
  text = row[name]
  if not isinstance(text, str) or not text.strip():
    raise ValueError(f"{where}: field {name!r} is not a text, or is blank")
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f"{where}: field {name!r} holds half a surrogate pair"
    ) from error
  return text


def _rounded(number: float) -> int:
  """To the nearest, halves up."""
  return math.floor(number + 0.5)
