"""Classes of solutions by what a policy says, against scripted answers."""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.encoding import Lengths, Policy
from o1jax.entailment import Asker, make_classes, policy_classes
from o1jax.policy.tokenizer import train_tokenizer
from policies import ToyTask, countdown, tiny_policy


class Curt(ToyTask):
  """Its verdicts are words that the tiny policy likes."""

  verdict_words = ("1", "+")


TASK = Curt(num_numbers=3, min_number=1, max_number=9)
PROBLEM, OTHER = TASK.heldout_problems(2)
WIDTH = 96


@functools.cache
def loud_params():
  """Those of the tiny policy, whose likeliest texts differ more."""
  params = tiny_policy().network.init(jax.random.key(0))
  return jax.tree.map(lambda x: 1.2 * x if x.ndim > 1 else x, params)


@pytest.fixture(scope="module")
def asker():
  """Of the tiny policy, whose logits may be changed: see `leaning`."""
  policy = tiny_policy()
  network = policy.network

  def apply(params, *args, **kwargs):
    return network.apply(params[0], *args, **kwargs)

  def policy_logits(params, hidden):
    return network.policy_logits(params[0], hidden) + params[1]

  leaning_one = network._replace(apply=apply, policy_logits=policy_logits)
  policy = dataclasses.replace(policy, network=leaning_one)
  return Asker(policy, TASK, max_rows=8)


def leaning(word=None):
  """Parameters, with a word that is always written; "" for the end mark."""
  tokenizer = tiny_policy().tokenizer
  logits = np.zeros((1, 1, tokenizer.vocab_size), np.float32)
  if word is not None:
    token = tokenizer.encode(word)[0] if word else tokenizer.eos_id
    logits[..., token] = 100.0
  return loud_params(), logits


@jax.jit
def all_log_probs(params, tokens):
  network = tiny_policy().network
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
  hidden, _ = network.apply(params, tokens, positions)
  return jax.nn.log_softmax(network.policy_logits(params, hidden))


def verdicts_by_hand(problem, pairs):
  """Verdicts written token by token, "" where none comes."""
  tokenizer, lengths = tiny_policy().tokenizer, tiny_policy().lengths
  yes, no = (tokenizer.encode(word)[0] for word in TASK.verdict_words)
  texts = [
    tokenizer.encode(f"{problem.prompt}{a}\nand:\n{b}\nsame:\n")
    for a, b in pairs
  ]
  verdicts = [None] * len(pairs)
  for _ in range(2 * lengths.step_tokens * lengths.num_steps + 1):
    rows = np.zeros((len(texts), WIDTH), np.int32)
    for row, text in zip(rows, texts, strict=True):
      row[: len(text)] = text
    every = np.asarray(all_log_probs(loud_params(), rows))
    for i, text in enumerate(texts):
      log_probs = every[i, len(text) - 1]
      text.append(int(np.argmax(log_probs)))
      if verdicts[i] is None and text[-1] in (yes, no, tokenizer.eos_id):
        is_one = text[-1] != tokenizer.eos_id and (
          text[-2] == tokenizer.newline_id
        )
        word = "yes" if log_probs[yes] > log_probs[no] else "no"
        verdicts[i] = word if is_one else ""
  return [verdict or "" for verdict in verdicts]


def test_what_follows_is_what_the_policy_writes_token_by_token(asker):
  rng = np.random.default_rng(0)
  texts = [
    "1" + "".join(rng.choice(["1", "2", "+", "\n"], rng.integers(0, 8))) + "+"
    for _ in range(40)
  ]
  pairs = list(zip(texts[::2], texts[1::2], strict=True))
  found = asker(leaning(), PROBLEM, pairs)
  verdicts = verdicts_by_hand(PROBLEM, pairs)
  assert found == [verdict == "yes" for verdict in verdicts]
  assert min(map(verdicts.count, ("yes", "no", ""))) >= 2, verdicts
  assert asker(leaning(), PROBLEM, []) == []


HOSTILE = (
  "",
  "\n",
  "1\nand:\n1",
  "1\nsame:\n1\n1\n1",
  "same:",
  "check:\n1",
  "1\nagain:\n2",
  "1+" * 50,  # too long
)


@pytest.mark.parametrize("word", ["1", "+", ""])
def test_nothing_follows_from_texts_that_cannot_be_asked_about(asker, word):
  pairs = [("1", "2"), ("1", "1"), ("say same:", "1+2\n"), ("and", "+")] * 2
  pairs += [(text, "1") for text in HOSTILE] + [("1", text) for text in HOSTILE]
  found = asker(leaning(word), PROBLEM, pairs)
  assert found == [word == "1"] * 8 + [False] * (len(pairs) - 8)


def test_the_question_is_that_of_the_demonstrations():
  task = countdown()
  texts = task.corpus(np.random.default_rng(0), 200, "comparing")
  tokenizer = train_tokenizer(texts, vocab_size=400, max_number=9)
  lengths = Lengths(14, 20, 2, 56, 200)
  policy = Policy(tiny_policy().network, tokenizer, lengths)
  asked = []

  class Recorded(Asker):
    def _ask(self, params, questions):
      asked.extend(questions)
      return np.ones(len(questions))

  asker = Recorded(policy, task)
  rng = np.random.default_rng(1)
  for problem, text in task.demonstrations("comparing", rng, 50):
    first, _, rest = text.partition("\nand:\n")
    second, _, comparison = rest.partition("\nsame:\n")
    assert asker(None, problem, [(first, second)]) == [True]
    tokens = tokenizer.encode(problem.prompt + text)
    written = tokens[len(asked[-1]) :]
    assert [*asked[-1], *written] == tokens
    form = asker._form
    assert tokenizer.decode(written) == f"\nsame:\n{comparison}"
    assert tuple(written[: len(form.mark)]) == form.mark
    assert len(written) <= form.max_tokens
    # The verdict is the only one of its words, and on a line of its own.
    is_verdict = np.isin(written, form.verdicts)
    assert is_verdict.tolist() == [False] * (len(written) - 1) + [True]
    assert written[-2] == form.newline_id


def test_a_task_that_cannot_be_asked_is_refused():
  bare = SimpleNamespace(name="bare", other_mark="", same_mark="")
  with pytest.raises(ValueError, match="task bare has no marks for comparing"):
    policy_classes(tiny_policy(), loud_params(), bare)
  with pytest.raises(ValueError, match="train the policy with rows.comparing"):
    policy_classes(tiny_policy(), loud_params(), countdown())


# Classes, with scripted answers.


class Scripted:
  """Says what a set of pairs says, and keeps what it was asked."""

  def __init__(self, pairs):
    self.pairs = pairs
    self.calls = []

  def __call__(self, problem, pairs):
    self.calls.append((problem.id, list(pairs)))
    return [pair in self.pairs for pair in pairs]


def classes_by_hand(texts, pairs):
  """Algorithm 1 of Kuhn et al., read aloud."""
  classes = []
  for i, text in enumerate(texts):
    for members in classes:
      first = texts[members[0]]
      if (first, text) in pairs and (text, first) in pairs:
        members.append(i)
        break
    else:
      classes.append([i])
  return [
    next(label for label, members in enumerate(classes) if i in members)
    for i in range(len(texts))
  ]


def test_classes_are_those_of_the_scripted_answers():
  rng = np.random.default_rng(0)
  sizes = set()
  for _ in range(30):
    texts = rng.choice(list("abcde"), 8).tolist()
    both = itertools.product("abcde", repeat=2)
    pairs = {pair for pair in both if rng.random() < 0.7}
    labels = make_classes(Scripted(pairs))(PROBLEM, texts)
    assert labels == classes_by_hand(texts, pairs)
    sizes.add(len(set(labels)))
  assert len(sizes) > 3


def test_each_pair_is_asked_about_once_and_all_at_once():
  scripted = Scripted({("a", "b"), ("b", "a"), ("a", "a")})
  classes_fn = make_classes(scripted)
  assert classes_fn(PROBLEM, ["a", "b", "c", "a"]) == [0, 0, 1, 0]
  ((_, pairs),) = scripted.calls
  assert len(pairs) == len(set(pairs))
  assert set(pairs) == {*itertools.permutations("abc", 2), ("a", "a")}
  # Known by their texts, whatever their order.
  assert classes_fn(PROBLEM, ["b", "c", "a"]) == [0, 1, 0]
  assert classes_fn(PROBLEM, ["a"]) == [0] and classes_fn(PROBLEM, []) == []
  assert len(scripted.calls) == 1
  # What stands there twice and says nothing is of two classes.
  assert classes_fn(PROBLEM, ["c", "d", "c"]) == [0, 1, 2]
  assert set(scripted.calls[1][1]) == {("c", "d"), ("d", "c"), ("c", "c")}
  # Another problem, another question.
  assert classes_fn(OTHER, ["a", "b"]) == [0, 0]
  assert scripted.calls[2] == (OTHER.id, [("a", "b"), ("b", "a")])


def test_old_answers_are_forgotten(monkeypatch):
  monkeypatch.setattr("o1jax.entailment._MAX_KNOWN", 2)
  scripted = Scripted({("a", "b"), ("b", "a")})
  classes_fn = make_classes(scripted)
  for texts, count in (("ab", 1), ("ab", 1), ("abc", 2), ("ab", 3), ("ab", 3)):
    labels = classes_fn(PROBLEM, list(texts))
    assert labels == [0, 0, 1][: len(texts)]
    assert len(scripted.calls) == count


def test_a_policy_that_says_yes_has_one_class(asker):
  classes_fn = make_classes(functools.partial(asker, leaning("1")))
  texts = ["1", "2+", "1", "1+", "same:", "same:"]
  assert classes_fn(PROBLEM, texts) == [0, 0, 0, 0, 1, 2]
