"""Files of documents and dialogs, and every sentence that refuses one."""

import collections
import json

import numpy as np
import pytest

from o1jax.corpora import (
  Dialog,
  Source,
  TextFiles,
  Texts,
  chat_prompt,
  diverse,
  noisy,
  read_dialogs,
  read_documents,
)


def write(path, *rows):
  path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  return str(path)


def pair(prompt, response):
  return {"prompt": prompt, "response": response}


def said(*messages):
  """A row of messages: ("user", "hello"), ..."""
  return {
    "messages": [{"role": role, "content": text} for role, text in messages]
  }


def dialogs_of(tmp_path, *pairs):
  return read_dialogs(write(tmp_path / "d.jsonl", *(pair(*p) for p in pairs)))


def responses(dialogs):
  return [dialog.turns[-1][1] for dialog in dialogs]


def test_documents_stand_on_lines_or_between_blank_lines(tmp_path):
  path = write(tmp_path / "d.jsonl", {"text": "one\n\nstill one"})
  with open(path, "a") as file:
    file.write('\n{"text": "two", "source": "passed over"}\n')
  assert read_documents(path) == ["one\n\nstill one", "two"]
  plain = tmp_path / "d.txt"
  plain.write_bytes("\n\n één\r\nline\r\n \t\r\n\r\ntwo \n\n\n".encode())
  assert read_documents(str(plain)) == [" één\nline", "two "]


def test_a_dialog_is_written_with_the_marks_of_its_speakers(tmp_path):
  one, same, long = read_dialogs(
    write(
      tmp_path / "d.jsonl",
      pair("2 + 2?", "4"),
      said(("user", "2 + 2?"), ("assistant", "4")),
      said(
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "Bye"),
        ("user", "now"),
        ("assistant", "user:\nBye"),
      ),
    )
  )
  assert one == same
  assert one.turns == (("user:\n2 + 2?\nassistant:\n", "4"),)
  assert one.prompt == chat_prompt("2 + 2?") == "user:\n2 + 2?\nassistant:\n"
  assert long.turns == (
    ("system:\nBe brief.\nuser:\nHi\nassistant:\n", "Hello."),
    ("user:\nBye\nuser:\nnow\nassistant:\n", "user:\nBye"),
  )


@pytest.mark.parametrize(
  "row, words",
  [
    ({"txt": "a"}, "field 'text' is missing"),
    ({"text": " \n"}, "field 'text' is not a text, or is blank"),
    ({"text": 3}, "field 'text' is not a text, or is blank"),
    ({"text": "\ud800"}, "field 'text' holds half a surrogate pair"),
    (["a"], "expected an object, got"),
    ("{", "not a line of JSON"),
  ],
)
def test_bad_documents_are_refused_with_their_line(tmp_path, row, words):
  line = row if row == "{" else json.dumps(row)
  path = tmp_path / "d.jsonl"
  path.write_text('{"text": "good"}\n\n' + line)
  with pytest.raises(ValueError) as raised:
    read_documents(str(path))
  message = str(raised.value)
  assert message.startswith(f"{path}:3: ") and words in message
  assert message.count('; texts.documents takes {"text": ...} a line') == 1
  assert "\n" not in message


def test_plain_text_must_be_utf8(tmp_path):
  path = tmp_path / "d.txt"
  path.write_bytes(b"good\n\nb\xffad")
  with pytest.raises(ValueError, match=f"{path}:3: not UTF-8 .invalid start"):
    read_documents(str(path))


HI = ("user", "Hi")


@pytest.mark.parametrize(
  "row, words",
  [
    ({"prompt": "a"}, "field 'response' is missing"),
    ({"response": "a"}, "field 'prompt' is missing"),
    (pair("a", ""), "field 'response' is not a text, or is blank"),
    (pair("a", None), "field 'response' is not a text, or is blank"),
    (pair("a", "b") | said(HI), "field 'prompt' stands beside 'messages'"),
    ({"messages": "a"}, "field 'messages' is not a list"),
    ({"messages": []}, "the assistant must speak last"),
    ({"messages": ["a"]}, "messages[0] is not an object"),
    ({"messages": [{"role": "user"}]}, "messages[0]: field 'content' is miss"),
    (said(HI, ("bot", "a")), "messages[1]: role 'bot' is none of system, use"),
    (said(HI, ("system", "a")), "role 'system' may speak first only"),
    (said(HI), "the assistant must speak last"),
    (said(("assistant", "a")), "the user must speak before the assistant"),
    (
      said(("assistant", "a"), HI, ("assistant", "a")),
      "the user must speak before the assistant",
    ),
    (said(("system", "a"), ("assistant", "a")), "the user must speak before"),
  ],
)
def test_bad_dialogs_are_refused_with_their_line(tmp_path, row, words):
  path = write(tmp_path / "d.jsonl", pair("a", "b"), row)
  with pytest.raises(ValueError) as raised:
    read_dialogs(path)
  message = str(raised.value)
  assert message.startswith(f"{path}:2: ") and words in message
  assert message.count('; texts.instructions takes {"prompt": ..., "resp') == 1


@pytest.mark.parametrize(
  "name, read",
  [("documents", read_documents), ("instructions", read_dialogs)],
)
def test_missing_and_empty_files_are_refused(tmp_path, name, read):
  path = str(tmp_path / "none.jsonl")
  words = f"{path} cannot be read .No such file.*name a file.*texts.{name}"
  with pytest.raises(ValueError, match=words):
    read(path)
  with pytest.raises(ValueError, match="cannot be read .Is a directory"):
    read(str(tmp_path))
  write(tmp_path / "none.jsonl")
  with pytest.raises(ValueError, match=f"{path} has no .*texts.{name}"):
    read(path)
  (tmp_path / "blank.txt").write_text("\n \n\n")
  with pytest.raises(ValueError, match="has no documents"):
    read_documents(str(tmp_path / "blank.txt"))


@pytest.mark.parametrize(
  "options, words",
  [
    (dict(instructions=("a=-1",)), "has 'a=-1': write 'path=weight'"),
    (dict(instructions=("a=inf",)), "has 'a=inf': write 'path=weight'"),
    (dict(instructions=("a=nan",)), "has 'a=nan': write 'path=weight'"),
    (dict(instructions=("a=b",)), "has 'a=b': write 'path=weight'"),
    (dict(instructions=("=1",)), "has '=1': write 'path=weight'"),
    (dict(instructions=("a", "a=2")), "names a twice"),
    (dict(instructions=("a=0", "b=0")), "has no weight above 0: raise one"),
    (dict(instructions=("a",), diversity=0.0), "diversity=0.0 is not in (0"),
    (dict(instructions=("a",), diversity=1.1), "diversity=1.1 is not in (0"),
    (dict(instructions=("a",), label_noise=1.0), "noise=1.0 is not in [0, 1"),
    (dict(instructions=("a",), label_noise=-0.1), "noise=-0.1 is not in [0,"),
    (dict(documents="a", diversity=0.5), "diversity=0.5 is not read without"),
    (dict(label_noise=0.5), "label_noise=0.5 is not read without texts.instr"),
  ],
)
def test_options_are_checked(options, words):
  with pytest.raises(ValueError) as raised:
    TextFiles(**options)
  assert words in str(raised.value)


def test_weights_stand_behind_paths():
  files = TextFiles(instructions=("a=b.jsonl=2.5", "c.jsonl", "d=0"))
  assert files.weights() == {"a=b.jsonl": 2.5, "c.jsonl": 1.0, "d": 0.0}


def test_diversity_is_a_share_of_the_distinct_prompts(tmp_path):
  # Prompt i stands there 1 + i % 3 times.
  pairs = [(f"p{i}", f"r{i}.{j}") for i in range(10) for j in range(1 + i % 3)]
  dialogs = dialogs_of(tmp_path, *pairs)
  kept = {}
  for share in (0.01, 0.25, 0.5, 1.0):
    kept[share] = diverse(dialogs, share, np.random.default_rng(3))
    prompts = {dialog.prompt for dialog in kept[share]}
    # 2.5 is rounded up, and one is the least.
    assert len(prompts) == {0.01: 1, 0.25: 3, 0.5: 5, 1.0: 10}[share]
    assert kept[share] == [d for d in dialogs if d.prompt in prompts]
  assert set(kept[0.01]) < set(kept[0.25]) < set(kept[0.5])
  assert kept[1.0] == dialogs
  other = diverse(dialogs, 0.5, np.random.default_rng(4))
  assert other != kept[0.5]
  assert kept[0.5] == diverse(dialogs, 0.5, np.random.default_rng(3))


def test_label_noise_puts_responses_under_other_prompts(tmp_path):
  # Most dialogs have the prompt p0.
  names = [0, 0, 1, 0, 2, 0, 0, 3, 3, 0]
  pairs = [(f"p{name}", f"r{name}.{i}") for i, name in enumerate(names)]
  dialogs = dialogs_of(tmp_path, *pairs)
  for share, count in ((0.0, 0), (0.04, 0), (0.25, 3), (0.5, 5), (0.99, 10)):
    changed = noisy(dialogs, share, np.random.default_rng(1))
    assert [d.prompt for d in changed] == [d.prompt for d in dialogs]
    is_new = [a != b for a, b in zip(changed, dialogs, strict=True)]
    assert sum(is_new) == count
    assert set(responses(changed)) <= set(responses(dialogs))
    assert (
      sum(
        not new.startswith(f"r{old}.")
        for new, old in zip(responses(changed), names, strict=True)
      )
      == count
    )
  again = noisy(dialogs, 0.5, np.random.default_rng(1))
  assert again == noisy(dialogs, 0.5, np.random.default_rng(1))
  assert again != noisy(dialogs, 0.5, np.random.default_rng(2))


def test_label_noise_takes_every_other_response_equally_often(tmp_path):
  pairs = [("a", "0"), ("b", "1"), ("b", "2"), ("c", "3"), ("a", "4")]
  dialogs = dialogs_of(tmp_path, *pairs)
  rng = np.random.default_rng(0)
  counts = [collections.Counter() for _ in dialogs]
  for _ in range(900):
    for count, new in zip(
      counts, responses(noisy(dialogs, 0.9, rng)), strict=True
    ):
      count[new] += 1
  allowed = ["123", "034", "034", "0124", "123"]
  for count, others in zip(counts, allowed, strict=True):
    assert set(count) == set(others)
    for number in count.values():
      expected = 900 / len(others)
      assert abs(number - expected) < 4 * expected**0.5


def test_every_dialog_is_equally_often_noisy(tmp_path):
  dialogs = dialogs_of(tmp_path, *((f"p{i}", f"r{i}") for i in range(5)))
  rng = np.random.default_rng(0)
  counts = np.zeros(5)
  for _ in range(500):
    changed = noisy(dialogs, 0.4, rng)
    counts += [a != b for a, b in zip(changed, dialogs, strict=True)]
  assert counts.sum() == 1000 and (abs(counts - 200) < 4 * 200**0.5).all()


def test_of_several_turns_the_last_response_is_swapped(tmp_path):
  long = said(HI, ("assistant", "kept"), HI, ("assistant", "swapped"))
  path = write(tmp_path / "d.jsonl", long, pair("a", "b"))
  first, second = noisy(read_dialogs(path), 0.9, np.random.default_rng(0))
  assert [response for _, response in first.turns] == ["kept", "b"]
  assert responses([second]) == ["swapped"]


def test_one_prompt_alone_has_no_other_response(tmp_path):
  path = write(tmp_path / "d.jsonl", pair("a", "b"), pair("a", "c"))
  files = TextFiles(instructions=(path,), label_noise=0.5)
  words = f"{path}: texts.label_noise=0.5 needs two distinct prompts"
  with pytest.raises(ValueError, match=words):
    files.read(0)


def test_files_are_read_by_the_seed_alone(tmp_path):
  rows = [pair(f"p{i}", f"r{i}") for i in range(20)]
  paths = [write(tmp_path / f"{name}.jsonl", *rows) for name in "ab"]
  documents = write(tmp_path / "d.jsonl", {"text": "one"})
  entries = (f"{paths[0]}=2", paths[1], f"{tmp_path}/none.jsonl=0")
  files = TextFiles(documents, entries, diversity=0.5, label_noise=0.3)
  texts = files.read(7)
  assert texts == files.read(7) and texts != files.read(8)
  assert texts.documents == ["one"]

  def answer_of(prompt):
    return prompt.split("\n")[1].replace("p", "r")

  # A file of weight 0 is not read.
  assert [(s.path, s.weight) for s in texts.sources] == [
    (paths[0], 2.0),
    (paths[1], 1.0),
  ]
  for _, _, dialogs in texts.sources:
    assert len(dialogs) == 10
    wrong = [d for d in dialogs if answer_of(d.prompt) != responses([d])[0]]
    assert len(wrong) == 3
  # Each file has a draw of its own.
  assert texts.sources[0].dialogs != texts.sources[1].dialogs


def test_a_tokenizer_is_shown_some_of_each_in_short_lines(tmp_path):
  long = "".join(chr(ord("a") + i % 26) for i in range(2500))
  dialog = Dialog((("user:\n1\nassistant:\n", "2"),))
  texts = Texts([long], [Source("a", 1.0, [dialog] * 3)])
  lines = texts.corpus(np.random.default_rng(0), 2)
  assert max(map(len, lines)) <= 1000
  turn = "user:1assistant:2"
  assert "".join(lines) == long + 2 * turn
