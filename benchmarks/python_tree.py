"""Tree search as most projects write it: Python objects around a sampler.

Every expansion asks the sampler for K continuations of whole sequences, and
reads the values of the results in a second pass: nothing read before is kept.
Two samplers: `hf_sampler` (transformers generate), and `our_sampler`, our own
compiled generator, which tells what is lost by keeping the tree on the host.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from peers import HF_SAMPLING, hf_model

from o1jax.policy import TransformerConfig, make_controls
from o1jax.policy.generate import make_generate

Tokens = list[int]
# Sequences -> K continuations of each, and a value of each.
Sampler = Callable[[list[Tokens]], tuple[list[list[Tokens]], np.ndarray]]


@dataclasses.dataclass(eq=False)
class Node:
  tokens: Tokens
  parent: "Node | None" = None
  depth: int = 0
  children: list["Node"] = dataclasses.field(default_factory=list)
  num_visits: int = 0
  total: float = 0.0

  def sequence(self) -> Tokens:
    before = self.parent.sequence() if self.parent else []
    return before + self.tokens

  def add(self, value: float) -> None:
    self.num_visits += 1
    self.total += value
    if self.parent:
      self.parent.add(value)


def search(
  sampler: Sampler,
  prompts: Sequence[Tokens],
  *,
  num_expansions: int,
  max_depth: int,
) -> list[Node]:
  """PUCT with even priors, one tree per prompt, all trees in one call."""
  roots = [Node(list(prompt)) for prompt in prompts]
  for _ in range(num_expansions):
    leaves = [_select(root, max_depth) for root in roots]
    steps, values = sampler([leaf.sequence() for leaf in leaves])
    for leaf, candidates, worth in zip(leaves, steps, values, strict=True):
      for tokens, value in zip(candidates, worth, strict=True):
        child = Node(tokens, leaf, leaf.depth + 1)
        leaf.children.append(child)
        child.add(float(value))
  return roots


def _select(node, max_depth):
  while node.children and node.depth < max_depth - 1:
    scale = 1.25 / len(node.children) * math.sqrt(node.num_visits)
    node = max(
      node.children,
      key=lambda c: c.total / c.num_visits + scale / (1 + c.num_visits),
    )
  return node


def hf_sampler(
  config: TransformerConfig, num_samples: int, num_new: int, one_core: bool
) -> Sampler:
  """`transformers` generate, padded on the left, then a pass for the value."""
  import torch

  model = hf_model(config, one_core)

  def sample(sequences):
    width = max(map(len, sequences))
    gaps = [width - len(s) for s in sequences]
    tokens = torch.tensor(
      [[0] * gap + s for gap, s in zip(gaps, sequences, strict=True)]
    )
    mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])
    with torch.inference_mode():
      out = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=num_new,
        num_return_sequences=num_samples,
        disable_compile=True,
        **HF_SAMPLING,
      )
      logits = model(out, logits_to_keep=1).logits[:, -1, 0]
    shape = (len(sequences), num_samples)
    steps = out[:, width:].reshape(*shape, num_new).tolist()
    return steps, torch.sigmoid(logits).reshape(shape).numpy()

  return sample


def our_sampler(
  network, params, num_samples: int, num_new: int, max_tokens: int
) -> Sampler:
  """Our generator; prompts padded to `max_tokens`, so it compiles once."""
  generate = make_generate(
    network, num_rows=num_samples, max_new_tokens=num_new, eos_id=-1, pad_id=0
  )
  calls = [0]

  @jax.jit
  def values_of(params, tokens, lengths):
    batch, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width)[None], (batch, width))
    hidden, _ = network.apply(params, tokens, positions)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return network.value(params, last[:, 0])

  def sample(sequences):
    calls[0] += 1
    shape = (len(sequences), num_samples)
    lengths = np.array([len(s) for s in sequences], np.int32)
    tokens = np.zeros((len(sequences), max_tokens), np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
      row[: len(sequence)] = sequence
    keys = jax.random.split(jax.random.key(calls[0]), shape)
    steps = generate(params, keys, tokens, lengths, make_controls()).tokens
    whole = np.repeat(np.pad(tokens, ((0, 0), (0, num_new))), num_samples, 0)
    for row, length, step in zip(
      whole,
      lengths.repeat(num_samples),
      steps.reshape(-1, num_new),
      strict=True,
    ):
      row[length : length + num_new] = step
    ends = (lengths + num_new).repeat(num_samples)
    worth = np.asarray(values_of(params, whole, ends))
    return steps.tolist(), worth.reshape(shape)

  return sample
