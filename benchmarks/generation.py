"""Tokens per second of generation, ours beside peers (goals P1, P2, P3).

  python benchmarks/generation.py --size=S --prompts=16
  python benchmarks/generation.py --clock=wall --devices=2 --size=S \
    --peers=hf_compiled

Every row is decoded to its full length. "ours" is `policy.generate`, which the
host drives; "ours_one_program" is `decode_rows` behind the prompt. A peer that
is not installed is named and left out. `floor_share` (P3) is the time that the
arithmetic or the memory traffic needs at the rates given, by the time taken;
the defaults are those of both cores of the 2-core AMD EPYC.
"""

import common
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from peers import GENERATORS

from o1jax import mesh as mesh_lib
from o1jax.policy import decode_rows, make_controls, prefix_from_prompt
from o1jax.policy.generate import make_generate

ENDLESS = {"eos_id": -1, "pad_id": 0}  # no token ends a row


def make_ours(network, params, prompts, num_rows, num_new, mesh):
  """Both of our generators as calls that block."""
  batch, width = prompts.shape
  lengths = jnp.full((batch,), width, jnp.int32)
  prompts, lengths = mesh_lib.shard_batch((prompts, lengths), mesh)
  params = mesh_lib.replicate(params, mesh)
  calls = [0]
  generate = make_generate(
    network,
    num_rows=num_rows,
    max_new_tokens=num_new,
    mesh=mesh if mesh.size > 1 else None,
    **ENDLESS,
  )

  def one_program(params, keys, prompts, lengths):
    prefix, last = prefix_from_prompt(network, params, prompts, lengths)
    return decode_rows(
      network,
      params,
      keys,
      last,
      lengths,
      prefix,
      num_rows=num_rows,
      max_new_tokens=num_new,
      stop_ids=(),
      controls=make_controls(),
      **ENDLESS,
    ).tokens

  batch_spec, whole = mesh_lib.batch_sharding(mesh).spec, PartitionSpec()
  one_program = jax.jit(
    jax.shard_map(
      one_program,
      mesh=mesh,
      in_specs=(whole, batch_spec, batch_spec, batch_spec),
      out_specs=batch_spec,
      check_vma=False,
    )
  )

  def new_keys():
    calls[0] += 1
    keys = jax.random.split(jax.random.key(calls[0]), (batch, num_rows))
    return mesh_lib.shard_batch(keys, mesh)

  def by_host():
    generate(params, new_keys(), prompts, lengths, make_controls())

  def at_once():
    one_program(params, new_keys(), prompts, lengths).block_until_ready()

  return {"ours": by_host, "ours_one_program": at_once}


def floor_seconds(config, args, rows):
  """Time of the decoding steps at the given rates."""
  c = config
  kv_width = c.num_kv_heads * c.head_width
  layer = 2 * c.width * (c.num_heads * c.head_width + kv_width)
  layer += 3 * c.width * c.ffn_width
  weights = c.num_layers * layer + c.width * c.vocab_size
  read = args.prompt + np.arange(args.new)
  cache = 2 * c.num_layers * kv_width * read * rows
  scores = 4 * c.num_layers * c.num_heads * c.head_width * read * rows
  memory = 4 * (weights + cache) / (args.gbs * 1e9)
  arithmetic = (2 * weights * rows + scores) / (args.gflops * 1e9)
  return float(np.maximum(memory, arithmetic).sum())


def main(argv=None):
  parser = common.make_parser(__doc__)
  parser.add_argument("--size", choices=common.SIZES, default="S")
  parser.add_argument("--prompts", type=int, default=16)
  parser.add_argument("--rows", type=int, default=1, help="of each prompt")
  parser.add_argument("--prompt", type=int, default=64, help="tokens of it")
  parser.add_argument("--new", type=int, default=128, help="tokens of a row")
  parser.add_argument("--peers", default="naive_jax,hf_eager,hf_static")
  parser.add_argument("--devices", type=int, default=1, help="share our rows")
  parser.add_argument("--gflops", type=float, default=210.0)
  parser.add_argument("--gbs", type=float, default=50.0)
  args = parser.parse_args(argv)
  common.start(args.clock, args.devices)
  report = common.Report("generation", args.clock)
  network, params = common.random_network(args.size)
  prompts = common.random_prompts(args.size, args.prompts, args.prompt)
  mesh = mesh_lib.make_mesh({"data": args.devices})
  runs = make_ours(network, params, prompts, args.rows, args.new, mesh)
  every_row = jnp.repeat(prompts, args.rows, axis=0)
  for name in filter(None, args.peers.split(",")):
    try:
      runs[name] = GENERATORS[name](
        network.config, every_row, args.new, args.clock == "cpu"
      )
    except ImportError as error:
      report.skip(name, error)
  series = common.take_turns(runs, repeats=args.repeats, clock=args.clock)
  floor = floor_seconds(network.config, args, len(every_row))
  report.add_series(
    series,
    amounts=dict.fromkeys(series, len(every_row) * args.new),
    unit="tokens",
    extra={
      name: {"floor_share": round(floor / min(seconds), 3)}
      for name, seconds in series.items()
    },
    size=args.size,
    rows=len(every_row),
    prompt=args.prompt,
    new=args.new,
  )
  report.close()


if __name__ == "__main__":
  main()
