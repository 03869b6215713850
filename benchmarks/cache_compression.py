"""What a compressed context does to log-probs, and to a tree search.

The policy solves held-out problems; each prompt with the first half of its
solution becomes a prefix, compressed in one way after another, and the second
half is scored behind it. Printed are the mean and the largest change of a
token's log-prob against the whole context in the network's dtype, and the bytes
of the context's keys and values.

  python benchmarks/cache_compression.py
  python benchmarks/cache_compression.py --policy=runs/countdown --problems=512
  python benchmarks/cache_compression.py --tree --problems=128

The policy that ships, 256 problems (texts of about 28 tokens; November 2026):

  context                       mean   largest   bytes
  int8, block of 1           0.00004    0.0106     29%
  int8, block of 16          0.00006    0.0324     27%
  window 16, 0 sinks         0.38201   18.6680     50%
  window 16, 4 sinks         0.00938    5.8300     63%
  window 8, 0 sinks          3.35588   22.6630     23%
  window 8, 4 sinks          1.71495   21.3509     37%

int8 hardly shows. A window does to a policy that was trained without one, and
the sinks take most of it back as long as the window holds the last lines.

With --tree the same problems are searched by MCTS over steps, once for each way
that a tree can be kept (`CacheOptions`). Printed are the change of the
log-probs that stand in the trees against a full forward of the same texts, the
bytes of a tree's keys and values, and the share of problems whose answer by
value is right. The policy that ships, 128 problems, November 2026:

  tree                            mean   largest     bytes   right
  whole                        0.00000    0.0000   1483776   88.3%
  int8                         0.00074    0.1050    380736   88.3%
  window 16, 4 sinks           0.03748   25.1232   1483776   65.6%
  window 8, 4 sinks            1.68864   35.6804   1483776    1.6%
  int8, window 16, 4 sinks     0.04437   25.0768    380736   64.8%

A tree in int8 is as good with a quarter of the memory. A window spoils a policy
that was trained without one; it bounds what is read, not what is kept.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from o1jax import load
from o1jax.encoding import encode_problems
from o1jax.policy import (
  make_cache,
  make_controls,
  make_network,
  prefix_from_prompt,
)
from o1jax.policy.cache import quantize_prefix
from o1jax.policy.generate import make_generate
from o1jax.policy.network import next_token_log_probs, selected_log_probs
from o1jax.solver import Solver

TREES = {
  "whole": {},
  "int8": {"dtype": "int8"},
  "window 16, 4 sinks": {"window": 16, "num_sinks": 4},
  "window 8, 4 sinks": {"window": 8, "num_sinks": 4},
  "int8, window 16, 4 sinks": {
    "dtype": "int8",
    "window": 16,
    "num_sinks": 4,
  },
}


def solved(trained, num_problems):
  """Texts `[B, T]` of greedy solutions, where each is cut, and lengths."""
  tokenizer, lengths = trained.policy.tokenizer, trained.policy.lengths
  prompts = [
    tokenizer.encode(p.prompt)
    for p in trained.task.heldout_problems(num_problems)
  ]
  prompt_lengths = np.array([len(p) for p in prompts], np.int32)
  tokens = np.full(
    (num_problems, prompt_lengths.max()), tokenizer.pad_id, np.int32
  )
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  room = lengths.row_tokens - tokens.shape[1]
  found = make_generate(
    trained.policy.network,
    num_rows=1,
    max_new_tokens=room,
    eos_id=tokenizer.eos_id,
    pad_id=tokenizer.pad_id,
  )(
    trained.params,
    jax.random.split(jax.random.key(0), (num_problems, 1)),
    tokens,
    prompt_lengths,
    make_controls(temperature=0.0),
  )
  texts = np.pad(tokens, ((0, 0), (0, room)))
  new = found.lengths[:, 0]
  for row, start, n, own in zip(
    texts, prompt_lengths, new, found.tokens[:, 0], strict=True
  ):
    row[start : start + n] = own[:n]
  return texts, prompt_lengths + new // 2, prompt_lengths + new


def scored(network, params, texts, cuts, compress):
  """Log-prob of each token behind the cut `[B, T]`, and bytes of the prefix."""
  prefix, last = prefix_from_prompt(network, params, texts, cuts)
  prefix = compress(prefix)
  index = jnp.arange(texts.shape[1])[None]
  at = jnp.minimum(cuts[:, None] + index, texts.shape[1] - 1)
  following = jnp.take_along_axis(jnp.asarray(texts), at, 1)
  cache = make_cache(prefix, num_rows=1, capacity=texts.shape[1])
  positions = cuts[:, None, None] + index[:, None]
  hidden, _ = network.apply(
    params, following[:, None], positions, cache, slot=0
  )
  before = jnp.concatenate([last[:, None], hidden[:, 0, :-1]], 1)
  log_probs = selected_log_probs(
    network.policy_logits(params, before), following
  )
  arrays = jax.tree.leaves((prefix.keys, prefix.values))
  return log_probs, sum(x.nbytes for x in arrays)


def tree_changes(trained, found):
  """How far log-probs in the trees are from full forwards of their texts."""
  solutions, texts, starts = [], [], []
  for one in found:
    prompt = trained.policy.tokenizer.encode(one.problem.prompt)
    for solution in one.solutions:
      solutions.append(solution)
      texts.append([*prompt, *solution.tokens])
      starts.append(len(prompt))
  lengths = np.array([len(text) for text in texts])
  tokens = np.zeros((len(texts), lengths.max()), np.int32)
  for row, text in zip(tokens, texts, strict=True):
    row[: len(text)] = text
  log_probs, _ = next_token_log_probs(
    trained.policy.network, trained.params, tokens, jnp.asarray(lengths)
  )
  exact = [
    row[start - 1 : length - 1]
    for row, start, length in zip(
      np.asarray(log_probs), starts, lengths, strict=True
    )
  ]
  kept = np.concatenate([one.policy_log_probs for one in solutions])
  return np.abs(kept - np.concatenate(exact))


def tree_row(trained, problems, cache):
  """Changes of log-probs, bytes of a tree, and the share answered right."""
  solver = Solver(
    trained.policy,
    strategy="mcts",
    batch_size=len(problems),
    mesh=trained.mesh,
    task=trained.task,
    num_candidates=4,
    num_expansions=12,
    num_simulations=64,
    cache=cache,
  )
  key = jax.random.key(0)
  batch = encode_problems(trained.policy, problems)
  state = jax.eval_shape(solver.strategy.init, trained.params, key, batch)
  store = state.node_state
  kept = (store.keys, store.values, store.prompt.keys, store.prompt.values)
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))
  found = solver(trained.params, key, problems)
  right = [
    trained.task.check(one.problem, one.solutions[one.selected].text).is_correct
    for one in found
    if one.selected is not None
  ]
  return (
    tree_changes(trained, found),
    size / len(problems),
    sum(right) / len(found),
  )


def print_trees(trained, num_problems):
  problems = trained.task.heldout_problems(num_problems)
  print(f"{'tree':26}{'mean':>10}{'largest':>10}{'bytes':>10}{'right':>8}")
  for name, cache in TREES.items():
    change, size, right = tree_row(trained, problems, cache)
    print(
      f"{name:26}{change.mean():10.5f}{change.max():10.4f}{size:10.0f}"
      f"{right:8.1%}",
      flush=True,
    )


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--policy", default="", help="workdir or policy folder")
  parser.add_argument("--problems", type=int, default=256)
  parser.add_argument("--tree", action="store_true", help="search trees")
  args = parser.parse_args()
  trained = load.from_path(args.policy)
  if args.tree:
    print_trees(trained, args.problems)
    return
  network = trained.policy.network
  texts, cuts, ends = solved(trained, args.problems)
  counts = np.arange(texts.shape[1])[None] < (ends - cuts)[:, None]

  def windowed(window, num_sinks):
    config = dataclasses.replace(
      network.config, sliding_window=window, num_sinks=num_sinks
    )
    return make_network(config, trained.policy.tokenizer.number_values())

  want, whole = scored(network, trained.params, texts, cuts, lambda p: p)
  ways = {
    f"int8, block of {block}": (
      network,
      lambda p, n=block: quantize_prefix(p, n),
    )
    for block in (1, 4, 16, 64)
  }
  for window in (32, 16, 8):
    for num_sinks in (0, 4):
      name = f"window {window}, {num_sinks} sinks"
      ways[name] = (windowed(window, num_sinks), lambda p: p)
  print(f"{'context':24}{'mean':>10}{'largest':>10}{'bytes':>8}")
  for name, (other, compress) in ways.items():
    found, size = scored(other, trained.params, texts, cuts, compress)
    change = np.abs(np.asarray(found - want))[counts]
    print(
      f"{name:24}{change.mean():10.5f}{change.max():10.4f}{size / whole:8.0%}"
    )


if __name__ == "__main__":
  main()
