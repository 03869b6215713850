"""Drivers: the same strategy as one compiled loop, or stepped from the host.

With equal outcomes both give equal trees, up to the last bit of the statistics
(two programs may round differently). From the host, `propose` of one batch
runs on the device while the host judges the outcomes of another.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from o1jax.search.contracts import SearchState, Strategy
from o1jax.types import ProblemBatch


def run_on_device(strategy: Strategy) -> Callable[..., SearchState]:
  """`(params, key, problems) -> state`, whole searches in one program."""

  def search(
    params: Any, key: jax.Array, problems: ProblemBatch
  ) -> SearchState:
    def one_round(state):
      return strategy.absorb(strategy.propose(params, state))

    return jax.lax.while_loop(
      lambda state: ~jnp.all(strategy.is_done(state)),
      one_round,
      strategy.init(params, key, problems),
    )

  return jax.jit(search)


def run_batches_with_host(
  strategy: Strategy, outcome_fn: Callable[[SearchState], Any]
) -> Callable[..., list[SearchState]]:
  """`(params, keys, batches) -> states`, stepped from the host.

  Args:
    strategy: the search.
    outcome_fn: `state -> outcome` on the host, called between `propose` and
      `absorb`; see `Strategy.absorb` for its shape. None leaves a round to the
      device. It must not keep the state's arrays: they are donated next.

  Returns:
    A function of the parameters, one key per batch and the batches. While
    `outcome_fn` judges one batch, the device works on the others: give it two
    half-batches rather than one. A batch's result does not depend on the
    others.
  """
  init = jax.jit(strategy.init)
  is_done = jax.jit(lambda state: jnp.all(strategy.is_done(state)))

  def propose(params, state):
    state = strategy.propose(params, state)
    return state.replace(expansion=None), state.expansion

  def absorb(state, expansion, outcome):
    return strategy.absorb(state.replace(expansion=expansion), outcome)

  # The expansion comes and goes; only what both halves share can be donated.
  propose = jax.jit(propose, donate_argnums=1)
  absorb = jax.jit(absorb, donate_argnums=0)

  def search(
    params: Any, keys: Sequence[jax.Array], batches: Sequence[ProblemBatch]
  ) -> list[SearchState]:
    if len(keys) != len(batches):
      raise ValueError(
        f"{len(batches)} batches with {len(keys)} keys: give one for each"
      )
    states = [
      init(params, key, problems)
      for key, problems in zip(keys, batches, strict=True)
    ]
    proposed: dict[int, Any] = {
      i: propose(params, state) for i, state in enumerate(states)
    }
    while proposed:
      for i in list(proposed):
        state, expansion = proposed.pop(i)
        outcome = outcome_fn(state.replace(expansion=expansion))
        states[i] = absorb(state, expansion, outcome)
        if not is_done(states[i]):
          proposed[i] = propose(params, states[i])
    return states

  return search


def run_with_host(
  strategy: Strategy, outcome_fn: Callable[[SearchState], Any]
) -> Callable[..., SearchState]:
  """`(params, key, problems) -> state`; one batch, otherwise as above."""
  search = run_batches_with_host(strategy, outcome_fn)

  def search_one(
    params: Any, key: jax.Array, problems: ProblemBatch
  ) -> SearchState:
    (state,) = search(params, [key], [problems])
    return state

  return search_one
