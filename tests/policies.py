"""A tiny policy with a real tokenizer, and a task whose checker is a toy.

An untrained network would write byte soup: here a few pieces are far likelier
than all others, so that steps end, solutions finish and texts repeat.
"""

import functools

import jax
import numpy as np

from o1jax.policy.config import TransformerConfig
from o1jax.policy.network import make_network
from o1jax.policy.tokenizer import train_tokenizer
from o1jax.solver import Lengths, Policy
from o1jax.tasks import make_task
from o1jax.tasks.countdown import Countdown
from o1jax.types import Problem, Verdict

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
  tokenizer = train_tokenizer(texts, vocab_size=310, max_digits_per_piece=1)
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
