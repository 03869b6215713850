"""One expansion of one leaf in each tree: time and memory (goal P6).

  python benchmarks/expansion.py --size=S --depths=8,16,32

The leaf lies at the deepest level but one, in a store of so many nodes; all
sizes take turns. Three
memories: "ours" keeps each step's keys and values once, "copy" the whole
sequence in every node, "recompute" tokens only. `over_ours` is the peer's time
by ours; `over_smallest` a memory's time by its own with the smallest store.
"""

import functools
import itertools

import common
import jax
import jax.numpy as jnp
from copied_cache import copy_step_model
from fixed_steps import fixed_step_model

from o1jax.search.contracts import Request
from o1jax.types import ProblemBatch


def deepen(store, depth, step_tokens, prompt_tokens):
  """A chain of steps from the root down to a leaf at `depth`."""
  chain = jnp.arange(depth + 1)
  at = (slice(None), chain)
  return store.replace(
    parent=store.parent.at[at].set(jnp.maximum(chain - 1, 0)[None]),
    depth=store.depth.at[at].set(chain[None]),
    lengths=store.lengths.at[at].set(step_tokens * (chain > 0)[None]),
    end_positions=store.end_positions.at[at].set(
      prompt_tokens + step_tokens * chain[None]
    ),
  )


def deepen_copy(state, depth, step_tokens):
  store, tokens, prompt = state
  length = store.length.at[:, depth].set(depth * step_tokens)
  return store.replace(length=length), tokens, prompt


def make_run(model, params, problems, num_nodes, leaf, set_up):
  """A call that expands the leaf, and what memory it takes."""
  num_trees = problems.tokens.shape[0]
  root = functools.partial(model.root_fn, capacity=num_nodes)
  _, _, store = jax.jit(root)(params, problems)
  store = set_up(store)
  store_bytes = sum(x.nbytes for x in jax.tree.leaves(store))
  full = functools.partial(jnp.full, (num_trees, 1), dtype=jnp.int32)
  request = Request(
    node=full(leaf),
    first_child=full(num_nodes),
    num_rows=full(model.num_candidates),
    siblings=jnp.zeros((num_trees, 1, 0), jnp.int32),
  )
  keys = jax.random.split(jax.random.key(3), (num_trees, 1))
  step = jax.jit(model.step_fn, donate_argnums=3)
  compiled = step.lower(params, keys, request, store).compile()
  held = [store]
  del store

  def run():
    expansion, held[0] = compiled(params, keys, request, held[0])
    jax.block_until_ready((expansion, held[0]))

  temporary = compiled.memory_analysis().temp_size_in_bytes
  return run, {
    "store_mb": common.megabytes(store_bytes),
    "temporary_mb": common.megabytes(temporary),
  }


def measure(report, args, depth):
  """Series and memory by `(name, number of nodes)`, all taking turns."""
  network, params = common.random_network(args.size)
  problems = ProblemBatch(
    tokens=common.random_prompts(args.size, args.trees, args.prompt),
    lengths=jnp.full((args.trees,), args.prompt, jnp.int32),
    seeds=jnp.arange(args.trees, dtype=jnp.uint32),
  )
  sizes = dict(
    num_candidates=args.children, step_tokens=args.step, max_depth=depth
  )
  chain = functools.partial(
    deepen,
    depth=depth - 1,
    step_tokens=args.step,
    prompt_tokens=args.prompt,
  )
  copied = functools.partial(
    deepen_copy, depth=depth - 1, step_tokens=args.step
  )
  models = {
    "ours": (fixed_step_model(network, memory="tree", **sizes), chain),
    "copy": (copy_step_model(network, **sizes), copied),
    "recompute": (fixed_step_model(network, memory="tokens", **sizes), chain),
  }
  runs, memory = {}, {}
  for num_nodes, (name, (model, set_up)) in itertools.product(
    args.nodes, models.items()
  ):
    root = functools.partial(model.root_fn, capacity=num_nodes)
    state = jax.eval_shape(root, params, problems)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    if size > args.max_gb * 2**30:
      reason = f"a store of {common.megabytes(size)} MB"
      report.skip(f"{name}, depth {depth}, {num_nodes} nodes", reason)
      continue
    runs[name, num_nodes], memory[name, num_nodes] = make_run(
      model, params, problems, num_nodes, depth - 1, set_up
    )
  series = common.take_turns(runs, repeats=args.repeats, clock=args.clock)
  return series, memory


def main(argv=None):
  parser = common.make_parser(__doc__)
  parser.add_argument("--size", choices=common.SIZES, default="S")
  parser.add_argument("--trees", type=int, default=4)
  parser.add_argument("--children", type=int, default=4)
  parser.add_argument("--prompt", type=int, default=64)
  parser.add_argument("--step", type=int, default=16, help="tokens of a step")
  parser.add_argument("--depths", type=common.integers, default=[8, 16, 32])
  parser.add_argument(
    "--nodes", type=common.integers, default=[32, 128, 512, 2048]
  )
  parser.add_argument("--max-gb", type=float, default=4.0, help="of a store")
  args = parser.parse_args(argv)
  common.start(args.clock)
  report = common.Report("expansion", args.clock)
  for depth in args.depths:
    series, memory = measure(report, args, depth)
    amounts = dict.fromkeys(series, args.trees * args.children)
    for name, nodes in series:
      over_smallest = common.ratio(
        series, (name, nodes), (name, args.nodes[0]), amounts
      )
      memory[name, nodes]["over_smallest"] = round(over_smallest, 2)
    for nodes in args.nodes:
      here = {name: s for (name, n), s in series.items() if n == nodes}
      report.add_series(
        here,
        amounts=dict.fromkeys(here, args.trees * args.children),
        unit="nodes",
        extra={name: memory[name, nodes] for name in here},
        size=args.size,
        depth=depth,
        step=args.step,
        nodes=nodes,
      )
  report.close()


if __name__ == "__main__":
  main()
