"""Whole tree searches, ours beside peers (goals P7 and P8).

  python benchmarks/tree_search.py --size=S --trees=8

Every search makes the same number of nodes a tree: `--expansions` times
`--children`; a node is a step of `--step` tokens with its value.

  ours          mcts on the device, keys and values of a step kept once (tree)
  copy          the same search, the whole sequence's in every node
  recompute     the same search, tokens only
  mctx          mctx.muzero_policy with the whole cache as embedding; one step a
                simulation
  hf_tree       Python objects and transformers, all trees in one call
  hf_one_tree   the same with one tree
  host_tree     Python objects and our own generator
  generator     no search: our generator at the rows of an expansion (P8)

`over_ours` compares the time for the same number of tokens: for "generator" it
is the share of its token rate that the search reaches.
"""

import common
import jax
import jax.numpy as jnp
import numpy as np
from copied_cache import copy_step_model, mctx_search
from fixed_steps import fixed_step_model
from python_tree import hf_sampler, our_sampler, search

from o1jax.policy import make_controls
from o1jax.policy.generate import make_generate
from o1jax.search.driver import run_on_device
from o1jax.search.mcts import mcts
from o1jax.types import ProblemBatch

NAMES = (
  "ours,copy,recompute,mctx,hf_tree,hf_one_tree,host_tree,generator".split(",")
)


def device_search(model, params, problems, args):
  """Searches that end when the tree is full, so simulations do not count."""
  strategy = mcts(
    model,
    num_simulations=10_000,
    capacity=1 + args.expansions * args.children,
  )
  run_search = run_on_device(strategy)
  calls = [0]

  def run():
    calls[0] += 1
    state = run_search(params, jax.random.key(calls[0]), problems)
    made = np.asarray(state.tree.next_free) - 1
    assert (made == args.expansions * args.children).all(), made

  return run


def mctx_run(network, params, prompts, args):
  run_search = mctx_search(
    network,
    num_candidates=args.children,
    step_tokens=args.step,
    max_depth=args.depth,
    num_simulations=args.expansions * args.children,
  )
  calls = [0]

  def run():
    calls[0] += 1
    jax.block_until_ready(run_search(params, jax.random.key(calls[0]), prompts))

  return run


def host_run(sampler, prompts, args):
  prompts = np.asarray(prompts).tolist()

  def run():
    search(
      sampler, prompts, num_expansions=args.expansions, max_depth=args.depth
    )

  return run


def generator_run(network, params, prompts, args):
  """Rows as long as the deepest path."""
  generate = make_generate(
    network,
    num_rows=args.children,
    max_new_tokens=args.depth * args.step,
    eos_id=-1,
    pad_id=0,
  )
  batch, width = prompts.shape
  lengths = jnp.full((batch,), width, jnp.int32)
  calls = [0]

  def run():
    calls[0] += 1
    shape = (batch, args.children)
    keys = jax.random.split(jax.random.key(calls[0]), shape)
    generate(params, keys, prompts, lengths, make_controls())

  return run


def make_run(name, network, params, prompts, args):
  steps = dict(
    num_candidates=args.children, step_tokens=args.step, max_depth=args.depth
  )
  problems = ProblemBatch(
    tokens=prompts,
    lengths=jnp.full(prompts.shape[:1], prompts.shape[1], jnp.int32),
    seeds=jnp.arange(len(prompts), dtype=jnp.uint32),
  )
  if name in ("ours", "recompute"):
    memory = "tree" if name == "ours" else "tokens"
    model = fixed_step_model(network, memory=memory, **steps)
    return device_search(model, params, problems, args)
  if name == "copy":
    model = copy_step_model(network, **steps)
    return device_search(model, params, problems, args)
  if name == "mctx":
    return mctx_run(network, params, prompts, args)
  if name == "generator":
    return generator_run(network, params, prompts, args)
  if name == "host_tree":
    longest = args.prompt + (args.depth - 1) * args.step
    sampler = our_sampler(network, params, args.children, args.step, longest)
    return host_run(sampler, prompts, args)
  sampler = hf_sampler(
    network.config, args.children, args.step, args.clock == "cpu"
  )
  return host_run(
    sampler, prompts[: 1 if name == "hf_one_tree" else None], args
  )


def nodes_made(name, args):
  """Nodes a call, or as many tokens as so many nodes have."""
  if name == "generator":
    return args.trees * args.children * args.depth
  trees = 1 if name == "hf_one_tree" else args.trees
  return trees * args.expansions * args.children


def main(argv=None):
  parser = common.make_parser(__doc__, repeats=5)
  parser.add_argument("--size", choices=common.SIZES, default="S")
  parser.add_argument("--trees", type=int, default=8)
  parser.add_argument("--expansions", type=int, default=32)
  parser.add_argument("--children", type=int, default=4)
  parser.add_argument("--depth", type=int, default=8)
  parser.add_argument("--step", type=int, default=16, help="tokens of a step")
  parser.add_argument("--prompt", type=int, default=64)
  parser.add_argument("--names", default=",".join(NAMES))
  args = parser.parse_args(argv)
  common.start(args.clock)
  report = common.Report("tree_search", args.clock)
  network, params = common.random_network(args.size)
  prompts = common.random_prompts(args.size, args.trees, args.prompt)
  runs = {}
  for name in args.names.split(","):
    try:
      runs[name] = make_run(name, network, params, prompts, args)
    except ImportError as error:
      report.skip(name, error)
  series = common.take_turns(runs, repeats=args.repeats, clock=args.clock)
  amounts = {name: nodes_made(name, args) for name in runs}
  report.add_series(
    series,
    amounts=amounts,
    unit="nodes",
    extra={
      name: {
        "tokens_per_s": round(
          amounts[name] * args.step / float(np.median(seconds))
        )
      }
      for name, seconds in series.items()
    },
    size=args.size,
    trees=args.trees,
    expansions=args.expansions,
    children=args.children,
    depth=args.depth,
    step=args.step,
  )
  report.close()


if __name__ == "__main__":
  main()
