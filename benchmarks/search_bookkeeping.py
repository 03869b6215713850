"""Time of the search's own bookkeeping, beside mctx at the same sizes (P9).

  python benchmarks/search_bookkeeping.py

The step model costs nothing (a hash gives priors and values), so what is
measured is selection, backup and the tree's memory. "gumbel" is our rule beside
mctx.gumbel_muzero_policy, "puct" beside mctx.muzero_policy. A call is a whole
search of all trees in lockstep; `simulations_per_s` counts lockstep ones.
"""

import itertools

import common
import jax
import jax.numpy as jnp

from o1jax.search.contracts import Expansion, StepModel
from o1jax.search.driver import run_on_device
from o1jax.search.mcts import mcts
from o1jax.types import ProblemBatch


def mix(x: jax.Array) -> jax.Array:
  """A cheap uint32 hash."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x45D9F3B)
  return x ^ (x >> 16)


def uniform(x: jax.Array) -> jax.Array:
  return (mix(x) >> 8).astype(jnp.float32) / (1 << 24)


def children(parent: jax.Array, num_candidates: int) -> jax.Array:
  actions = jnp.arange(1, num_candidates + 1, dtype=jnp.uint32)
  actions = actions.reshape(*[1] * parent.ndim, -1)
  return mix(parent[..., None] * jnp.uint32(31) + actions)


def hash_model(num_candidates: int) -> StepModel:
  """A step model whose nodes are hashes."""

  def root_fn(params, problems, capacity):
    del params
    seeds = problems.seeds
    state = jnp.zeros((seeds.shape[0], capacity), jnp.uint32)
    state = state.at[:, 0].set(seeds)
    return uniform(seeds), jnp.zeros_like(seeds, jnp.int32), state

  def step_fn(params, keys, request, state):
    del params, keys
    rows = jnp.arange(request.node.shape[0])[:, None]
    child = children(state[rows, request.node], num_candidates)
    at = (
      request.first_child[:, :, None] + jnp.arange(num_candidates)[None, None]
    )
    state = state.at[rows[:, :, None], at].set(child, mode="drop")
    zeros = jnp.zeros((request.node.shape[0],), jnp.int32)
    no = jnp.zeros(child.shape, bool)
    return (
      Expansion(
        prior_logits=2 * uniform(child + 1),
        is_valid=~no,
        is_terminal=no,
        is_solution=no,
        value=uniform(child),
        outcome=jnp.zeros(child.shape),
        generated_tokens=zeros,
        forward_tokens=zeros,
      ),
      state,
    )

  return StepModel(num_candidates, root_fn, step_fn, 1)


def mctx_search(rule: str, num_candidates: int, num_simulations: int):
  """The same hashes as an mctx model."""
  import mctx

  def recurrent_fn(params, key, action, node):
    del params, key
    child = mix(node * jnp.uint32(31) + action.astype(jnp.uint32) + 1)
    prior = 2 * uniform(children(child, num_candidates) + 1)
    return mctx.RecurrentFnOutput(
      reward=jnp.zeros(child.shape),
      discount=jnp.ones(child.shape),
      prior_logits=prior,
      value=uniform(child),
    ), child

  def search(key, problems):
    seeds = problems.seeds
    root = mctx.RootFnOutput(
      prior_logits=2 * uniform(children(seeds, num_candidates) + 1),
      value=uniform(seeds),
      embedding=seeds,
    )
    given = ((), key, root, recurrent_fn, num_simulations)
    if rule == "gumbel":
      output = mctx.gumbel_muzero_policy(
        *given, max_num_considered_actions=num_candidates
      )
    else:
      output = mctx.muzero_policy(*given)
    return output.search_tree

  return jax.jit(search)


def make_runs(rule, num_trees, num_candidates, num_simulations):
  """Our search and mctx's as calls that block."""
  problems = ProblemBatch(
    tokens=jnp.zeros((num_trees, 1), jnp.int32),
    lengths=jnp.ones((num_trees,), jnp.int32),
    seeds=jnp.arange(num_trees, dtype=jnp.uint32),
  )
  calls = [0]
  strategy = mcts(
    hash_model(num_candidates), num_simulations=num_simulations, rule=rule
  )
  search = run_on_device(strategy)

  def new_key():
    calls[0] += 1
    return jax.random.key(calls[0])

  def ours():
    jax.block_until_ready(search((), new_key(), problems))

  peer = mctx_search(rule, num_candidates, num_simulations)

  def theirs():
    jax.block_until_ready(peer(new_key(), problems))

  return {"ours": ours, "mctx": theirs}


def main(argv=None):
  parser = common.make_parser(__doc__, repeats=9)
  parser.add_argument("--rules", default="gumbel,puct")
  parser.add_argument("--trees", type=common.integers, default=[32, 128])
  parser.add_argument("--candidates", type=common.integers, default=[4, 8, 32])
  parser.add_argument("--simulations", type=common.integers, default=[32, 128])
  args = parser.parse_args(argv)
  common.start(args.clock)
  report = common.Report("search_bookkeeping", args.clock)
  for rule, *sizes in itertools.product(
    args.rules.split(","), args.trees, args.candidates, args.simulations
  ):
    num_trees, num_candidates, num_simulations = sizes
    runs = make_runs(rule, *sizes)
    series = common.take_turns(runs, repeats=args.repeats, clock=args.clock)
    report.add_series(
      series,
      amounts=dict.fromkeys(series, num_simulations),
      unit="simulations",
      extra={
        name: {"us_per_simulation": round(1e6 * min(s) / num_simulations, 1)}
        for name, s in series.items()
      },
      rule=rule,
      trees=num_trees,
      candidates=num_candidates,
      simulations=num_simulations,
    )
  report.close()


if __name__ == "__main__":
  main()
