"""A tiny policy, a task whose checker is a toy, and the config of a tiny run.

An untrained network would write byte soup: here a few pieces are far likelier
than all others, so that steps end, solutions finish and texts repeat.
"""

import contextlib
import functools
import pathlib

import jax
import numpy as np
import pytest

from o1jax import build, iterate, load, metrics
from o1jax import config as config_lib
from o1jax import mesh as mesh_lib
from o1jax.checkpoint import Checkpoints
from o1jax.encoding import Lengths, Policy
from o1jax.learning import update
from o1jax.policy.config import TransformerConfig
from o1jax.policy.network import make_network, next_token_log_probs
from o1jax.policy.tokenizer import train_tokenizer
from o1jax.studies.context import Context
from o1jax.tasks import make_task
from o1jax.tasks.countdown import Countdown
from o1jax.types import Problem, Verdict

ROOT = pathlib.Path(__file__).resolve().parent.parent

# A run of one iteration of initialization and four of search and learning.
TINY_CONFIG = f"{ROOT}/configs/countdown.py:smoke"
TINY_SIZES = [
  "tokenizer.vocab_size=320",
  "tokenizer.max_number=9",
  "tokenizer.num_texts=200",
  "network.num_layers=1",
  "network.width=16",
  "network.num_heads=2",
  "network.num_kv_heads=1",
  "network.head_width=8",
  "network.ffn_width=16",
  "network.value_hidden_width=8",
  # As many as the tests force.
  "mesh.num_cpu_devices=8",
  "mesh.data=2",
  "initialize.num_iterations=1",
  "initialize.num_updates=60",
  "num_iterations=4",
  "learn.num_updates=3",
  "learn.updates_per_call=3",
  "learn.optimizer.learning_rate=0.02",
  "search.num_problems=6",
  "search.batch_size=4",
  "search.num_candidates=3",
  "search.num_expansions=2",
  "search.num_simulations=12",
  "evaluation.num_problems=4",
  "evaluation.batch_size=4",
  "evaluation.interval=2",
  "evaluation.strategies=best_of_n",
  "evaluation.efforts=2",
  "checkpoint.num_samples=5",
]
TINY_OVERRIDES = [
  *TINY_SIZES,
  "task.options.max_number=9",
  "lengths.prompt_tokens=14",
  "lengths.step_tokens=20",
  "lengths.row_tokens=56",
  "lengths.opening_tokens=14",
  "initialize.rows.random_play=16",
]
# Chains of three numbers of one digit.
TINY_ARITHMETIC = [
  *TINY_SIZES,
  "task.options.num_terms=3",
  "task.options.max_digits=1",
  "lengths.prompt_tokens=8",
  "lengths.step_tokens=9",
  "lengths.num_steps=2",
  "lengths.row_tokens=24",
  "initialize.rows.optimal=16",
]

LIKELY = "12+\n"
LENGTHS = Lengths(prompt_tokens=14, step_tokens=5, num_steps=2, row_tokens=64)


def countdown() -> Countdown:
  """Three numbers of one digit."""
  return make_task("countdown", num_numbers=3, min_number=1, max_number=9)


class ToyTask(Countdown):
  """Countdown's problems; about half of all texts are right, none is read.

  The answer is the number of ones, None where there is none.
  """

  def check(self, problem: Problem, text: str) -> Verdict:
    is_correct = (len(text) + len(problem.prompt)) % 2 == 0
    answer = str(text.count("1")) if "1" in text else None
    return Verdict(is_correct, "toy", answer)


@functools.cache
def tiny_policy() -> Policy:
  """One layer of width 16 over the pieces of `countdown`."""
  texts = countdown().corpus(np.random.default_rng(0), 200)
  tokenizer = train_tokenizer(texts, vocab_size=310, max_number=9)
  config = TransformerConfig(
    vocab_size=tokenizer.vocab_size,
    num_layers=1,
    width=16,
    num_heads=2,
    num_kv_heads=1,
    head_width=8,
    ffn_width=16,
  )
  network = make_network(config)
  likely = [tokenizer.encode(text)[0] for text in LIKELY]
  bias = np.full((1, tokenizer.vocab_size), -6.0, np.float32)
  bias[0, [*likely, tokenizer.eos_id]] = 0.0

  def policy_logits(params, hidden):
    shape = (1,) * (hidden.ndim - 1) + (tokenizer.vocab_size,)
    return network.policy_logits(params, hidden) + bias.reshape(shape)

  biased = network._replace(policy_logits=policy_logits)
  return Policy(biased, tokenizer, LENGTHS)


@functools.cache
def tiny_params():
  """Its parameters; different texts have clearly different values."""
  params = tiny_policy().network.init(jax.random.key(0))
  return params | {"value_head": drawn_anew(params["value_head"])}


def drawn_anew(params):
  """Normal numbers in place of parameters; heads of values begin at 0."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: rng.normal(0, 0.5, x.shape).astype(x.dtype), params
  )


def greedy_text(policy, params, prompt, most):
  """The likeliest token again and again, by whole forwards."""
  tokens = policy.tokenizer.encode(prompt)
  start = len(tokens)
  score = jax.jit(
    lambda rows: next_token_log_probs(
      policy.network, params, rows, np.full(len(rows), rows.shape[1])
    )[0]
  )
  width = start + most
  vocab = np.arange(policy.tokenizer.vocab_size)
  while len(tokens) < width:
    rows = np.zeros((len(vocab), width), np.int32)
    rows[:, : len(tokens)] = tokens
    rows[:, len(tokens)] = vocab
    best = int(np.argmax(score(rows)[:, len(tokens) - 1]))
    if best == policy.tokenizer.eos_id:
      return policy.tokenizer.decode(tokens[start:]), True
    tokens.append(best)
  return policy.tokenizer.decode(tokens[start:]), False


def tiny_config(*changed: str):
  """The config of TINY_CONFIG and TINY_OVERRIDES, with further overrides."""
  return config_lib.load_config(TINY_CONFIG, [*TINY_OVERRIDES, *changed])


def tiny_arithmetic(*changed: str):
  """The same for arithmetic."""
  path = f"{ROOT}/configs/arithmetic.py:smoke"
  return config_lib.load_config(path, [*TINY_ARITHMETIC, *changed])


def tiny_context() -> Context:
  """The tiny policy and four problems, on two devices; close it."""
  task = ToyTask(num_numbers=3, min_number=1, max_number=9)
  mesh = mesh_lib.make_mesh({"data": 2})
  params = mesh_lib.replicate(tiny_params(), mesh)
  trained = load.Trained(tiny_config(), task, tiny_policy(), params, mesh, 7)
  return Context(trained, task.heldout_problems(4))


def tiny_workdir(workdir: pathlib.Path, num_saves: int) -> None:
  """What a run of `tiny_config` leaves, without its training.

  Checkpoint i holds parameters of seed i.
  """
  config = tiny_config("checkpoint.keep_every=1")
  mesh = mesh_lib.make_mesh({"data": 2})
  parts = build.build(config, workdir, mesh)
  config_lib.open_workdir(workdir, config)
  build.keep_tokenizer(parts.policy.tokenizer, workdir)
  (workdir / "metrics.jsonl").touch()
  checkpoints = Checkpoints(workdir / "checkpoints", keep_every=1)
  for step in range(num_saves):
    params = parts.policy.network.init(jax.random.key(step))
    checkpoints.save(
      step,
      state=update.make_state(params, parts.optimizer, mesh),
      host={"num_entries": np.zeros(1, np.int64)},
      meta={"metrics_cursor": 0},
      metric=-step,
    )


@contextlib.contextmanager
def what_compiles(name):
  """Yields a list: whether each call of a function of `iterate` compiled.

  Rows of an update and of a tree have one shape. Where solutions are sampled
  they have not: programs for fewer rows are compiled when so many are left,
  which is up to the draws.
  """
  found, function = [], getattr(iterate, name)

  def watched(*args):
    clock = metrics.Clock()
    result = function(*args)
    found.append(clock.compilation() > 0)
    return result

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(iterate, name, watched)
    yield found


def packed_members(batch):
  """The documents of packed `[..., T]` rows in order of batch, row and place.

  Each as `(tokens, weights)`; weights are those of the token that follows.
  Checks the places in documents, and that padding weighs nothing.
  """
  found = []
  flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch)
  for row, segments in enumerate(flat.segment_ids):
    for segment in range(segments.max() + 1):
      own = segments == segment
      np.testing.assert_array_equal(
        flat.positions[row, own], np.arange(own.sum())
      )
      found.append((flat.tokens[row, own], flat.policy_weights[row, own]))
    is_padding = segments < 0
    assert (
      flat.tokens[row, is_padding] == tiny_policy().tokenizer.pad_id
    ).all()
    assert not flat.policy_weights[row, is_padding].any()
  return found
