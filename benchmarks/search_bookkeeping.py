"""Time of the search's own bookkeeping, beside mctx at the same sizes.

The step model costs nothing (a hash gives priors and values), so what is
measured is selection, backup and the tree's memory. The two are timed in turn,
pair by pair; a row is the median of each and the median of the ratios.

  python benchmarks/search_bookkeeping.py
"""

import statistics
import time

import jax
import jax.numpy as jnp
import mctx

from o1jax.search.contracts import Expansion, StepModel
from o1jax.search.driver import run_on_device
from o1jax.search.mcts import mcts
from o1jax.types import ProblemBatch

NUM_PAIRS = 15


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

  def step_fn(params, keys, node, first_child, is_active, state):
    del params, keys, is_active
    rows = jnp.arange(node.shape[0])[:, None]
    child = children(state[rows, node], num_candidates)
    at = first_child[:, :, None] + jnp.arange(num_candidates)[None, None]
    state = state.at[rows[:, :, None], at].set(child, mode="drop")
    zeros = jnp.zeros((node.shape[0],), jnp.int32)
    return (
      Expansion(
        prior_logits=2 * uniform(child + 1),
        is_valid=jnp.ones(child.shape, bool),
        is_terminal=jnp.zeros(child.shape, bool),
        value=uniform(child),
        outcome=jnp.zeros(child.shape),
        generated_tokens=zeros,
        forward_tokens=zeros,
      ),
      state,
    )

  return StepModel(num_candidates, root_fn, step_fn)


def mctx_search(policy: str, num_candidates: int, num_simulations: int):
  """The same hashes as an mctx model."""

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
    if policy == "gumbel":
      output = mctx.gumbel_muzero_policy(
        (),
        key,
        root,
        recurrent_fn,
        num_simulations,
        max_num_considered_actions=num_candidates,
      )
    else:
      output = mctx.muzero_policy((), key, root, recurrent_fn, num_simulations)
    return output.search_tree

  return jax.jit(search)


def seconds(fn, *args) -> float:
  start = time.perf_counter()
  jax.block_until_ready(fn(*args))
  return time.perf_counter() - start


def main() -> None:
  print("microseconds per lockstep simulation of the whole batch, medians")
  print("rule     B   A  sims     ours     mctx  ratio")
  for rule, num_problems, num_candidates, num_simulations in (
    ("gumbel", 32, 4, 32),
    ("puct", 32, 4, 32),
    ("gumbel", 32, 4, 128),
    ("puct", 32, 4, 128),
    ("puct", 8, 16, 128),
  ):
    strategy = mcts(
      hash_model(num_candidates), num_simulations=num_simulations, rule=rule
    )
    search = run_on_device(strategy)
    peer = mctx_search(rule, num_candidates, num_simulations)
    problems = ProblemBatch(
      tokens=jnp.zeros((num_problems, 1), jnp.int32),
      lengths=jnp.ones((num_problems,), jnp.int32),
      seeds=jnp.arange(num_problems, dtype=jnp.uint32),
    )
    key = jax.random.key(0)
    seconds(search, (), key, problems)
    seconds(peer, key, problems)
    ours, theirs = [], []
    for _ in range(NUM_PAIRS):
      ours.append(seconds(search, (), key, problems))
      theirs.append(seconds(peer, key, problems))
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    scale = 1e6 / num_simulations
    print(
      f"{rule:6} {num_problems:3} {num_candidates:3} {num_simulations:5}"
      f" {statistics.median(ours) * scale:8.1f}"
      f" {statistics.median(theirs) * scale:8.1f} {ratio:6.2f}",
      flush=True,
    )


if __name__ == "__main__":
  main()
