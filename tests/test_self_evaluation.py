"""Scores of written judgements against judgements written token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax import mesh as mesh_lib
from o1jax.encoding import Lengths
from o1jax.policy.cache import prefix_from_prompt
from o1jax.policy.tokenizer import train_tokenizer
from o1jax.self_evaluation import UNDECIDED, Judgement, judge, make_judgement
from o1jax.solver import Solver
from policies import ToyTask, countdown, tiny_policy

pytestmark = pytest.mark.usefixtures("quick_programs")

ROOM = 6  # tokens of a judgement behind its mark
PIECES = ("1", "2", "+", "\n")


def tokens_of(text):
  return tiny_policy().tokenizer.encode(text)


@functools.cache
def loud_params():
  """Those of the tiny policy, whose likeliest texts differ more."""
  params = tiny_policy().network.init(jax.random.key(0))
  return jax.tree.map(lambda x: 1.2 * x if x.ndim > 1 else x, params)


def toy_judgement():
  """Verdicts "1" and "2", which the tiny policy likes to write."""
  return Judgement(
    mark=tuple(tokens_of("\ncheck:\n")),
    verdicts=(tokens_of("1")[0], tokens_of("2")[0]),
    newline_id=tiny_policy().tokenizer.newline_id,
    max_tokens=len(tokens_of("\ncheck:\n")) + ROOM,
  )


@functools.cache
def forward(width):
  network = tiny_policy().network

  def read(params, tokens):
    positions = jnp.arange(width)[None]
    hidden, _ = network.apply(params, tokens[None], positions)
    logits = network.policy_logits(params, hidden)[0]
    return jax.nn.log_softmax(logits), network.value(params, hidden)[0]

  return jax.jit(read)


def read_whole(text, width=64):
  """Log-probs and value after a text, by a whole forward."""
  row = np.zeros(width, np.int32)
  row[: len(text)] = text
  log_probs, values = forward(width)(loud_params(), row)
  return np.asarray(log_probs)[len(text) - 1], float(values[len(text) - 1])


def oracle(text_tokens, judgement):
  """Score and tokens of a judgement, each token by a whole forward."""
  policy = tiny_policy()
  text = [*text_tokens, *judgement.mark]
  end = len(text) + judgement.max_tokens - len(judgement.mark)
  while len(text) < end:
    log_probs, _ = read_whole(text)
    text.append(int(np.argmax(log_probs)))
    if text[-1] in judgement.verdicts and text[-2] == judgement.newline_id:
      yes, no = np.exp(log_probs[list(judgement.verdicts)].astype(np.float64))
      return yes / (yes + no), len(text) - len(text_tokens)
    if text[-1] in (*judgement.verdicts, policy.tokenizer.eos_id):
      break
  return UNDECIDED, len(text) - len(text_tokens)


def written(count=24):
  """Texts of different lengths."""
  rng = np.random.default_rng(0)
  return [
    tokens_of("".join(rng.choice(PIECES, rng.integers(3, 12))))
    for _ in range(count)
  ]


def test_scores_are_those_of_judgements_written_token_by_token():
  policy, judgement = tiny_policy(), toy_judgement()
  texts = written()
  lengths = np.array([len(text) for text in texts])
  tokens = np.zeros((len(texts), lengths.max()), np.int32)
  for row, text in zip(tokens, texts, strict=True):
    row[: len(text)] = text
  is_active = np.arange(len(texts)) % 5 > 0

  @jax.jit
  def run(params):
    prefix, last = prefix_from_prompt(policy.network, params, tokens, lengths)
    return judge(
      policy.network,
      params,
      judgement,
      last,
      jnp.asarray(lengths),
      prefix,
      is_active,
      eos_id=policy.tokenizer.eos_id,
      pad_id=policy.tokenizer.pad_id,
    )

  scores, spent = map(np.asarray, run(loud_params()))
  expected = [oracle(text, judgement) for text in texts]
  decided = 0
  for i, (score, count) in enumerate(expected):
    if is_active[i]:
      assert spent[i] == count
      np.testing.assert_allclose(scores[i], score, atol=1e-5)
      decided += score != UNDECIDED
    else:
      assert spent[i] == 0
  assert 3 <= decided < is_active.sum()


def test_the_form_is_that_of_the_task():
  task = countdown()
  texts = task.corpus(np.random.default_rng(0), 200, "judging")
  tokenizer = train_tokenizer(texts, vocab_size=400, max_number=9)
  judgement = make_judgement(
    tokenizer, Lengths(14, 20, 2, 56), task.judge_mark, task.verdict_words
  )
  assert tokenizer.decode(list(judgement.mark)) == "\ncheck:\n"
  assert [tokenizer.decode([i]) for i in judgement.verdicts] == ["yes", "no"]
  for _, text in task.demonstrations("judging", np.random.default_rng(1), 50):
    solution, _, _ = text.partition("\ncheck:\n")
    encoded = tokenizer.encode(text)
    count = len(tokenizer.encode(solution))
    assert encoded[count:][: len(judgement.mark)] == list(judgement.mark)
    assert len(encoded) - count <= judgement.max_tokens
    # The verdict is the only one of its words, and on a line of its own.
    is_verdict = np.isin(encoded, judgement.verdicts)
    assert is_verdict.tolist() == [False] * (len(encoded) - 1) + [True]
    assert encoded[-2] == judgement.newline_id


@pytest.mark.parametrize(
  "judge_mark, words, message",
  [
    ("", ("1", "2"), "the task has no judge mark"),
    ("check:\n", ("1", "nay"), "the verdict 'nay' has 3 tokens and must have"),
  ],
)
def test_a_task_that_cannot_be_asked_is_refused(judge_mark, words, message):
  with pytest.raises(ValueError, match=message):
    policy = tiny_policy()
    make_judgement(policy.tokenizer, policy.lengths, judge_mark, words)


class Curt(ToyTask):
  """Its verdicts are words that the tiny policy likes."""

  verdict_words = ("1", "2")


TASK = Curt(num_numbers=3, min_number=1, max_number=9)
PROBLEMS = TASK.heldout_problems(4)


def search(strategy, guidance, **options):
  return Solver(
    tiny_policy(),
    strategy=strategy,
    batch_size=len(PROBLEMS),
    mesh=mesh_lib.make_mesh({"data": 2}),
    task=TASK,
    guidance=guidance,
    num_candidates=4,
    **options,
  )(loud_params(), jax.random.key(5), PROBLEMS)


def judged(problem, solution):
  """The oracle's score and tokens for a solution."""
  policy = tiny_policy()
  judgement = make_judgement(
    policy.tokenizer, policy.lengths, TASK.judge_mark, TASK.verdict_words
  )
  prompt = policy.tokenizer.encode(problem.prompt)
  return oracle([*prompt, *solution.tokens[:-1].tolist()], judgement)


def value_of(problem, tokens):
  """The value head after a text, by a whole forward."""
  prompt = tiny_policy().tokenizer.encode(problem.prompt)
  return read_whole([*prompt, *tokens])[1]


def test_whole_solutions_are_scored_by_their_judgements():
  """With the value beside them; below they are alone."""
  scores = []
  for one in search("best_of_n", {"value": 1.0, "self_evaluation": 3.0}):
    spent = 0
    for solution in one.solutions:
      spent += len(solution.tokens)
      if not solution.is_finished:
        assert solution.outcome == 0
        continue
      score, count = judged(one.problem, solution)
      spent += count
      scores.append(score)
      value = value_of(one.problem, solution.tokens.tolist())
      expected = 0.25 * value + 0.75 * score
      np.testing.assert_allclose(solution.outcome, expected, atol=1e-5)
    assert one.cost["generated_tokens"] == spent
  assert UNDECIDED in scores and len(set(scores)) > 3


@pytest.mark.parametrize("memory", ["tree", "tokens"])
def test_unfinished_candidates_keep_their_value(memory):
  budget, num_scored = 160, 0
  for one in search(
    "mcts",
    {"self_evaluation": 1.0},
    num_simulations=6,
    num_expansions=3,
    options={"max_tokens": budget},
    memory=memory,
  ):
    assert one.cost["generated_tokens"] <= budget
    for solution in one.solutions:
      if solution.is_finished:
        score, _ = judged(one.problem, solution)
        np.testing.assert_allclose(solution.outcome, score, atol=1e-5)
        num_scored += 1
    nodes = one.nodes
    is_open = nodes["is_valid"] & ~nodes["is_terminal"]
    for node in np.flatnonzero(is_open & (nodes["depth"] == 1)).tolist()[:2]:
      tokens = nodes["tokens"][node, : nodes["lengths"][node]].tolist()
      value = value_of(one.problem, tokens)
      np.testing.assert_allclose(nodes["value"][node], value, atol=1e-5)
  assert num_scored > 4
