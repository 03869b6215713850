"""Rows of uneven length, four ways: what becomes of slots that are done.

  python benchmarks/uneven.py --repeats=5

Rows end with a chance of 1 in 43 a token and have at most 128 tokens. They are
decoded in batches that always run to the end, in batches that halve, together
in one batch that halves, and through slots that take the next row when one has
ended. Printed are useful tokens per CPU second (medians of interleaved runs),
and rows evaluated for each row that wrote a token. Pinned to one core where
the system can.

Two busy CPU cores, November 2026:

                            tokens/s  rows/live
  batches, to the end           4862       3.35
  batches that halve           11835       1.50
  one batch that halves        13465       1.35
  slots                        10608       1.15

Slots evaluate the fewest rows and need memory for 32 of the 128. On a CPU they
are not the fastest: a steady mix of old and young rows always reads caches of
the full length, where a batch grows old together.
"""

import argparse
import os
import time

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import jax.numpy as jnp
import numpy as np
from generation import CONFIG

from o1jax.policy import make_controls, make_network
from o1jax.policy.generate import make_generate

EOS, MEAN, LONGEST = 1, 43, 128


def network_that_ends():
  """The network of `generation`; its end token has the chance 1 / MEAN."""
  network = make_network(CONFIG)

  def policy_logits(params, hidden):
    logits = network.policy_logits(params, hidden)
    others = jax.nn.logsumexp(logits.at[..., EOS].set(-1e30), -1)
    return logits.at[..., EOS].set(others - np.log(MEAN - 1))

  return network._replace(policy_logits=policy_logits)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rows", type=int, default=128)
  parser.add_argument("--slots", type=int, default=32)
  parser.add_argument("--prompt", type=int, default=8, help="prompt tokens")
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  network = network_that_ends()
  params = network.init(jax.random.key(0))
  prompts = jax.random.randint(
    jax.random.key(1), (args.rows, args.prompt), 2, CONFIG.vocab_size
  )
  lengths = jnp.full((args.rows,), args.prompt)

  def way(batch, eos_id=EOS, **options):
    generate = make_generate(
      network,
      num_rows=1,
      max_new_tokens=LONGEST,
      eos_id=eos_id,
      pad_id=0,
      **options,
    )

    def run(repeat):
      keys = jax.random.split(jax.random.key(2 + repeat), (args.rows, 1))
      evaluated = 0
      for start in range(0, args.rows, batch):
        part = slice(start, start + batch)
        found = generate(
          params, keys[part], prompts[part], lengths[part], make_controls()
        )
        evaluated += found.rows_evaluated
      return evaluated, found.rows_live

    return run

  ways = {
    "batches, to the end": way(args.slots, eos_id=-1),
    "batches that halve": way(args.slots),
    "one batch that halves": way(args.rows),
    "slots": way(args.rows, num_slots=args.slots),
  }
  seconds = {name: [] for name in ways}
  evaluated = {name: [] for name in ways}
  useful = []
  for repeat in range(args.repeats + 1):
    for name, run in ways.items():
      start = time.process_time()
      rows, live = run(repeat)
      seconds[name].append(time.process_time() - start)
      evaluated[name].append(rows)
    useful.append(live)  # of the slots: all rows in one call
  print(f"{'':24}{'tokens/s':>10}{'rows/live':>11}")
  for name in ways:
    rate = np.median(np.array(useful[1:]) / np.array(seconds[name][1:]))
    share = np.sum(evaluated[name][1:]) / np.sum(useful[1:])
    print(f"{name:24}{rate:10.0f}{share:11.2f}")


if __name__ == "__main__":
  main()
