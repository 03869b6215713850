"""Tokens per network call, and time, of generation with n-gram drafts.

The policy that ships (or --policy) solves held-out problems at temperature 1,
by plain decoding and with what `NgramDraft` proposes. CPU seconds are medians
of interleaved runs.

  python benchmarks/speculation.py --problems=64

Two busy CPU cores, November 2026:

  draft                        tokens/call  tokens/s
  plain                               1.00     28995
  2 tokens, up to 1-grams             1.06      9831
  2 tokens, up to 3-grams             1.07      9922
  4 tokens, up to 1-grams             1.06      6875
  4 tokens, up to 3-grams             1.07      6853

It does not pay here: solutions of Countdown hardly quote, and a network of this
size on a CPU is bound by its arithmetic, so that tokens refused cost as much as
tokens kept.
"""

import argparse
import time

import jax
import numpy as np

from o1jax import load
from o1jax.policy import NgramDraft, make_controls
from o1jax.policy.generate import make_generate, make_speculative_generate


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--policy", default="", help="workdir or policy folder")
  parser.add_argument("--problems", type=int, default=64)
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  trained = load.from_path(args.policy)
  tokenizer = trained.policy.tokenizer
  problems = trained.task.heldout_problems(args.problems)
  prompts = [tokenizer.encode(problem.prompt) for problem in problems]
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  tokens = np.full((len(prompts), lengths.max()), tokenizer.pad_id, np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  options = dict(
    num_rows=1,
    max_new_tokens=trained.policy.lengths.row_tokens - tokens.shape[1],
    eos_id=tokenizer.eos_id,
    pad_id=tokenizer.pad_id,
  )
  network, controls = trained.policy.network, make_controls()
  rows_of = (tokens, lengths, controls)
  plain = make_generate(network, **options)

  def way(num_proposals, max_ngram):
    draft = NgramDraft(max_ngram)
    generate = make_speculative_generate(
      network, num_proposals=num_proposals, **options
    )
    return lambda keys: generate(trained.params, draft, keys, *rows_of)

  ways = {"plain": lambda keys: plain(trained.params, keys, *rows_of)}
  for num_proposals in (2, 4):
    for max_ngram in (1, 3):
      name = f"{num_proposals} tokens, up to {max_ngram}-grams"
      ways[name] = way(num_proposals, max_ngram)
  found = {name: [] for name in ways}
  for repeat in range(args.repeats + 1):
    for name, run in ways.items():
      keys = jax.random.split(jax.random.key(repeat), (len(prompts), 1))
      start = time.process_time()
      rows = run(keys)
      seconds = time.process_time() - start
      written = rows.lengths.sum()
      found[name].append((written / rows.rows_live, written / seconds))
  print(f"{'draft':28}{'tokens/call':>12}{'tokens/s':>10}")
  for name, figures in found.items():
    per_call, per_second = np.median(figures[1:], 0)
    print(f"{name:28}{per_call:12.2f}{per_second:10.0f}")


if __name__ == "__main__":
  main()
