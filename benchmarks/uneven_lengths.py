"""Rows of uneven length: useful tokens per second (goal P4).

  python benchmarks/uneven_lengths.py --size=S --jobs=128 --slots=32

Every row ends at each token with the same chance, 1 / `--mean`, at the latest
after `--new` tokens.

  fixed     batches of `--slots` rows, all decoded to the full length
  batches   batches of `--slots` rows that our generator halves as rows end
  one_batch all jobs in one batch that halves
  ours      so many slots, which our generator fills again as rows end

All draw the same tokens; those up to a row's end are useful. `slot_use`
is the share of useful tokens among the rows evaluated. Slots evaluate the
fewest rows in the least memory, but always read caches of the full length: a
batch grows old together, and is as fast on a CPU.
"""

import functools
import math

import common
import jax
import jax.numpy as jnp
import numpy as np

from o1jax.policy import make_controls
from o1jax.policy.generate import make_generate

END, PAD = 1, 0


def with_end_rate(network, rate):
  """The network with the end token at probability `rate`, always."""

  def policy_logits(params, hidden):
    logits = network.policy_logits(params, hidden)
    is_end = jnp.arange(logits.shape[-1]) == END
    is_end = is_end.reshape((1,) * (logits.ndim - 1) + (-1,))
    others = jnp.where(is_end, -jnp.inf, logits)
    end = jax.nn.logsumexp(others, -1, keepdims=True)
    return jnp.where(is_end, end + math.log(rate / (1 - rate)), logits)

  return network._replace(policy_logits=policy_logits)


def in_batches(generate, jobs, num_slots):
  """Calls `generate` for the first `num_slots` jobs, the next, ..."""
  keys, tokens, lengths = jobs
  parts = []
  for begin in range(0, len(tokens), num_slots):
    part = slice(begin, begin + num_slots)
    parts.append(generate(keys[part], tokens[part], lengths[part]))
  return parts


def make_runs(args):
  """Calls that return a list of `Generated`."""
  network, params = common.random_network(args.size)
  network = with_end_rate(network, 1 / args.mean)
  jobs = (
    jax.random.split(jax.random.key(5), (args.jobs, 1)),
    common.random_prompts(args.size, args.jobs, args.prompt),
    jnp.full((args.jobs,), args.prompt, jnp.int32),
  )

  def make(eos_id, num_slots):
    generate = make_generate(
      network,
      num_rows=1,
      max_new_tokens=args.new,
      eos_id=eos_id,
      pad_id=PAD,
      num_slots=num_slots,
    )
    return lambda *jobs: generate(params, *jobs, make_controls())

  whole = functools.partial(in_batches, jobs=jobs, num_slots=args.jobs)
  split = functools.partial(in_batches, jobs=jobs, num_slots=args.slots)
  return {
    "ours": functools.partial(whole, make(END, args.slots)),
    "one_batch": functools.partial(whole, make(END, None)),
    "batches": functools.partial(split, make(END, None)),
    "fixed": functools.partial(split, make(-1, None)),
  }


def rows_evaluated(parts, name, args):
  if name == "fixed":
    return args.jobs * args.new
  return sum(part.rows_evaluated for part in parts)


def main(argv=None):
  parser = common.make_parser(__doc__, repeats=5)
  parser.add_argument("--size", choices=common.SIZES, default="S")
  parser.add_argument("--jobs", type=int, default=128)
  parser.add_argument("--slots", type=int, default=32)
  parser.add_argument("--prompt", type=int, default=64)
  parser.add_argument("--new", type=int, default=128, help="tokens at most")
  parser.add_argument("--mean", type=float, default=43.0, help="tokens")
  args = parser.parse_args(argv)
  common.start(args.clock)
  report = common.Report("uneven_lengths", args.clock)
  runs = make_runs(args)
  results = {name: run() for name, run in runs.items()}
  useful = sum(int(part.lengths.sum()) for part in results["ours"])
  series = common.take_turns(runs, repeats=args.repeats, clock=args.clock)
  amounts = dict.fromkeys(series, useful)
  evaluated = {n: rows_evaluated(r, n, args) for n, r in results.items()}
  report.add_series(
    series,
    amounts=amounts,
    unit="useful_tokens",
    extra={
      name: {
        "slot_use": round(useful / evaluated[name], 2),
        "over_fixed": round(common.ratio(series, "fixed", name, amounts), 2),
      }
      for name in series
    },
    size=args.size,
    jobs=args.jobs,
    slots=args.slots,
    mean_length=round(float(np.mean(useful / args.jobs)), 1),
  )
  report.close()


if __name__ == "__main__":
  main()
