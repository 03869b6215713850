"""Tokens per second of one update, ours beside peers (goal P5).

  python benchmarks/training.py --size=S --rows=16 --microbatches=4
  python benchmarks/training.py --clock=wall --size=S --rows=32 \
    --microbatches=8 --peers=torch_compiled
  python benchmarks/training.py --size=job --rows=64 --length=30

Forward, loss, backward and AdamW of the same decoder on full rows of random
tokens. Ours is `make_update`: it has the value's loss, clipping, the moving
average and the check for finite gradients besides. "job" is the shape of
configs/countdown.py:no_hindsight. A peer that is not installed is named and
left out.
"""

import functools

import common
import jax
import jax.numpy as jnp
from peers import TRAINERS

from o1jax import mesh as mesh_lib
from o1jax.learning.objective import Objective
from o1jax.learning.optimizer import make_optimizer
from o1jax.learning.update import make_state, make_update
from o1jax.policy import next_token_log_probs
from o1jax.types import LearnerBatch


def make_ours(network, params, tokens, num_microbatches, mesh):
  """Our update as a call that blocks."""
  optimizer = make_optimizer(learning_rate=1e-4, weight_decay=0.01)
  batch, length = tokens.shape
  ones = jnp.ones((batch, length))
  rows = LearnerBatch(
    tokens=tokens,
    lengths=jnp.full((batch,), length, jnp.int32),
    policy_weights=ones.at[:, -1].set(0.0),
    value_targets=ones,
    value_weights=ones,
  )
  if mesh is not None:
    rows = mesh_lib.shard_batch(rows, mesh)
  update = make_update(
    functools.partial(next_token_log_probs, network),
    optimizer,
    objective=Objective(),
    num_microbatches=num_microbatches,
    average_decay=0.99,
    mesh=mesh,
  )
  held = [make_state(params, optimizer, mesh)]

  def run():
    held[0], metrics = update(held[0], rows)
    jax.block_until_ready((held[0], metrics))

  return run


def main(argv=None):
  parser = common.make_parser(__doc__)
  parser.add_argument("--size", choices=common.SIZES, default="S")
  parser.add_argument("--rows", type=int, default=16)
  parser.add_argument("--length", type=int, default=256, help="tokens of a row")
  parser.add_argument("--microbatches", type=int, default=1, help="ours")
  parser.add_argument("--devices", type=int, default=1, help="share our rows")
  parser.add_argument("--peers", default="plain_jax,torch_eager")
  args = parser.parse_args(argv)
  common.start(args.clock, args.devices)
  report = common.Report("training", args.clock)
  network, params = common.random_network(args.size)
  tokens = common.random_prompts(args.size, args.rows, args.length)
  is_shared = args.devices > 1
  mesh = mesh_lib.make_mesh({"data": args.devices}) if is_shared else None
  runs = {"ours": make_ours(network, params, tokens, args.microbatches, mesh)}
  for name in filter(None, args.peers.split(",")):
    try:
      runs[name] = TRAINERS[name](network.config, tokens, args.clock == "cpu")
    except ImportError as error:
      report.skip(name, error)
  for run in runs.values():
    run()  # what a heap grows by in the first rounds is not counted
  series = common.take_turns(runs, repeats=args.repeats, clock=args.clock)
  report.add_series(
    series,
    amounts=dict.fromkeys(series, tokens.size),
    unit="tokens",
    size=args.size,
    rows=args.rows,
    length=args.length,
    microbatches=args.microbatches,
  )
  report.close()


if __name__ == "__main__":
  main()
