"""Drivers: the same strategy as one compiled loop, or stepped from the host.

With equal scores both give equal trees, up to the last bit of the statistics
(two programs may round differently). From the host, `propose` of one batch
runs on the device while the host judges the candidates of another. All batches
share one key: a problem's own derives from its seed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from o1jax import mesh as mesh_lib
from o1jax.search.contracts import SearchState, Strategy
from o1jax.types import ProblemBatch


class Told(NamedTuple):
  """What the host says of the candidates of a round.

  Each is `[B, W, A]`, or None; NaN where the device's own number stands.

  Attributes:
    outcome: final outcomes, in place of `Expansion.outcome`.
    value: expected returns of candidates that are not finished, in place of
      `Expansion.value`.
  """

  outcome: Any = None
  value: Any = None


def take_in(state: SearchState, told: Told | None) -> tuple[SearchState, Any]:
  """The state and the outcome that `absorb` is to see; pure."""
  if told is None:
    return state, None
  if told.value is not None:
    expansion = state.expansion
    value = jnp.asarray(told.value, expansion.value.dtype)
    value = jnp.where(jnp.isnan(value), expansion.value, value)
    state = state.replace(expansion=expansion.replace(value=value))
  return state, told.outcome


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


def run_with_host(
  strategy: Strategy,
  host_fn: Callable[[SearchState, int], Any],
  take_in: Callable[[SearchState, Any], tuple[SearchState, Any]] = take_in,
) -> Callable[..., list[SearchState]]:
  """`(params, key, batches) -> states`, stepped from the host.

  Args:
    strategy: the search.
    host_fn: `(state, index of the batch) -> Told` on the host, called between
      `propose` and `absorb`; None leaves a round to the device. It must not
      keep the state's arrays: they are donated next.
    take_in: `(state, told) -> (state, outcome)`, what becomes of it on the
      device; compiled together with `absorb`.

  Returns:
    A function of the parameters, one key and batches of one size. While
    `host_fn` judges one batch, the device works on the others: give it two
    half-batches rather than one where judging takes long. A batch's result
    does not depend on the others.
  """
  init = jax.jit(strategy.init)
  is_done = jax.jit(lambda state: jnp.all(strategy.is_done(state)))

  def propose(params, state):
    state = strategy.propose(params, state)
    return state.replace(expansion=None), state.expansion

  def absorb(state, expansion, told):
    state, outcome = take_in(state.replace(expansion=expansion), told)
    return strategy.absorb(state, outcome)

  # The expansion comes and goes; only what both halves share can be donated.
  propose = jax.jit(propose, donate_argnums=1)
  absorb = jax.jit(absorb, donate_argnums=0)

  def search(
    params: Any, key: jax.Array, batches: Sequence[ProblemBatch]
  ) -> list[SearchState]:
    states = [init(params, key, problems) for problems in batches]
    proposed: dict[int, Any] = {
      i: propose(params, state) for i, state in enumerate(states)
    }
    while proposed:
      for i in list(proposed):
        state, expansion = proposed.pop(i)
        told = host_fn(state.replace(expansion=expansion), i)
        states[i] = absorb(state, expansion, told)
        if not is_done(states[i]):
          proposed[i] = propose(params, states[i])
    return states

  return search


def over_mesh(strategy: Strategy, mesh: Mesh) -> Strategy:
  """The strategy with problems shared out over the mesh.

  Every device searches its own problems in loops of its own: nothing is
  exchanged within a round, and rounds go on until all devices are done.
  Parameters are whole on each of them.
  """
  batch = PartitionSpec(mesh_lib.TABLE["batch"])
  whole = PartitionSpec()

  def spread(fn, *in_specs):
    return jax.shard_map(
      fn, mesh=mesh, in_specs=in_specs, out_specs=batch, check_vma=False
    )

  def absorb(state, outcome=None):
    if outcome is None:
      return spread(strategy.absorb, batch)(state)
    return spread(strategy.absorb, batch, batch)(state, outcome)

  return strategy._replace(
    init=spread(strategy.init, whole, whole, batch),
    propose=spread(strategy.propose, whole, batch),
    absorb=absorb,
    is_done=spread(strategy.is_done, batch),
    select=spread(strategy.select, batch),
  )
