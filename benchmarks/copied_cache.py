"""What a search library does that knows nothing of caches: each node has all.

The memory of a node is the keys and values of its whole sequence, copied from
its parent and extended by its own step. `copy_step_model` is that behind the
seam of `search.contracts`, for our own searches; `mctx_search` is mctx with the
sequence as its embedding, one candidate step per simulation.

Steps have a fixed number of tokens: no token ends them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from o1jax.policy import (
  Network,
  Prefix,
  decode_rows,
  join,
  make_controls,
  prefix_from_prompt,
)
from o1jax.search.contracts import Expansion, StepModel


@struct.dataclass
class Memory:
  """Sequences read so far, any leading axes `[...]`.

  Attributes:
    keys, values: one `[..., J, C, E]` per layer.
    length: `[...]` slots in use.
    hidden: `[..., D]` at the last token.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  length: jax.Array
  hidden: jax.Array


def empty_memory(
  prompt: Prefix, hidden: jax.Array, lead: tuple[int, ...], capacity: int
) -> Memory:
  """Room for `capacity` tokens in each of `lead` sequences."""

  def room(x):
    return jnp.zeros((*lead, x.shape[1], capacity, x.shape[3]), x.dtype)

  return Memory(
    tuple(map(room, prompt.keys)),
    tuple(map(room, prompt.values)),
    jnp.zeros(lead, jnp.int32),
    jnp.zeros((*lead, hidden.shape[-1]), hidden.dtype),
  )


def extend(
  network: Network,
  params: Any,
  keys: jax.Array,
  memory: Memory,
  prompt: Prefix | None,
  step_tokens: int,
) -> tuple[jax.Array, Memory]:
  """Draws one step behind each of B sequences.

  Args:
    network: the network.
    params: its parameters.
    keys: `[B]`.
    memory: of `[B]` sequences, without the prompt where that is given.
    prompt: what all that lies in `memory` comes behind, or None.
    step_tokens: S.

  Returns:
    Tokens `[B, S]`, and the memory with the step.
  """
  capacity = memory.keys[0].shape[2]
  begin = 0 if prompt is None else prompt.positions.shape[1]
  slots = jnp.arange(capacity, dtype=jnp.int32)[None, :]
  shape = (keys.shape[0], capacity)
  prefix = Prefix(
    memory.keys,
    memory.values,
    jnp.broadcast_to(begin + slots, shape),
    slots < memory.length[:, None],
  )
  rows = decode_rows(
    network,
    params,
    keys[:, None],
    memory.hidden,
    begin + memory.length,
    prefix if prompt is None else join([prompt, prefix]),
    num_rows=1,
    max_new_tokens=step_tokens,
    stop_ids=(),
    eos_id=-1,
    pad_id=0,
    controls=make_controls(),
  )
  # Past the deepest step mctx goes on calling; its last step is overwritten.
  at = jnp.minimum(memory.length, capacity - step_tokens)

  @jax.vmap
  def put(old, new, slot):
    return jax.lax.dynamic_update_slice(old, new, (0, slot, 0))

  def put_all(old, new):
    return tuple(put(a, b[:, 0], at) for a, b in zip(old, new, strict=True))

  return rows.tokens[:, 0], Memory(
    put_all(memory.keys, rows.keys),
    put_all(memory.values, rows.values),
    at + step_tokens,
    rows.last_hidden[:, 0],
  )


def copy_step_model(
  network: Network, *, num_candidates: int, step_tokens: int, max_depth: int
) -> StepModel:
  """Our search with a full copy per node; the prompt is kept once.

  Draws the same tokens as `make_step_model` with either of its memories.
  """

  def root_fn(params, problems, capacity):
    prompt, hidden = prefix_from_prompt(
      network, params, problems.tokens, problems.lengths
    )
    lead = (hidden.shape[0], capacity + num_candidates)
    memory = empty_memory(prompt, hidden, lead, max_depth * step_tokens)
    memory = memory.replace(hidden=memory.hidden.at[:, 0].set(hidden))
    tokens = jnp.zeros((*lead, step_tokens), jnp.int32)
    state = (memory, tokens, prompt)
    return network.value(params, hidden), problems.lengths, state

  def step_fn(params, keys, request, state):
    store, tokens, prompt = state
    num_trees = request.node.shape[0]
    tree = jnp.arange(num_trees)
    repeat = functools.partial(jnp.repeat, repeats=num_candidates, axis=0)
    chosen = jax.tree.map(lambda x: x[tree, request.node[:, 0]], store)
    step_keys = jax.vmap(
      lambda key: jax.random.split(jax.random.split(key)[0], num_candidates)
    )(keys[:, 0])
    drawn, memory = extend(
      network,
      params,
      step_keys.reshape(-1),
      jax.tree.map(repeat, chosen),
      jax.tree.map(repeat, prompt),
      step_tokens,
    )

    @jax.vmap
    def put(array, block, slot):
      start = (slot, *(0 for _ in array.shape[1:]))
      return jax.lax.dynamic_update_slice(array, block, start)

    def put_all(array, rows):
      rows = rows.reshape(num_trees, num_candidates, *rows.shape[1:])
      return put(array, rows, request.first_child[:, 0])

    state = (
      jax.tree.map(put_all, store, memory),
      put_all(tokens, drawn),
      prompt,
    )
    shape = (num_trees, 1, num_candidates)
    value = network.value(params, memory.hidden).reshape(shape)
    is_last = memory.length.reshape(shape) >= max_depth * step_tokens
    cost = num_candidates * step_tokens * (request.num_rows[:, 0] > 0)
    return (
      Expansion(
        prior_logits=jnp.zeros(shape),
        is_valid=jnp.ones(shape, bool),
        is_terminal=is_last,
        is_solution=is_last,
        value=value,
        outcome=value,
        generated_tokens=cost,
        forward_tokens=cost,
      ),
      state,
    )

  return StepModel(num_candidates, root_fn, step_fn, step_tokens)


def mctx_search(
  network: Network,
  *,
  num_candidates: int,
  step_tokens: int,
  max_depth: int,
  num_simulations: int,
):
  """Builds `(params, key, prompts [B, P]) -> tree` of mctx.muzero_policy."""
  import mctx

  def recurrent_fn(params, key, action, memory):
    keys = jax.random.split(key, action.shape[0])
    keys = jax.vmap(jax.random.fold_in)(keys, action)
    _, memory = extend(network, params, keys, memory, None, step_tokens)
    value = network.value(params, memory.hidden)
    output = mctx.RecurrentFnOutput(
      reward=jnp.zeros_like(value),
      discount=jnp.ones_like(value),
      prior_logits=jnp.zeros((*value.shape, num_candidates)),
      value=value,
    )
    return output, memory

  @jax.jit
  def search(params, key, prompts):
    batch, width = prompts.shape
    lengths = jnp.full((batch,), width, jnp.int32)
    prompt, hidden = prefix_from_prompt(network, params, prompts, lengths)
    room = ((0, 0), (0, 0), (0, max_depth * step_tokens), (0, 0))
    root = mctx.RootFnOutput(
      prior_logits=jnp.zeros((batch, num_candidates)),
      value=network.value(params, hidden),
      embedding=Memory(
        tuple(jnp.pad(k, room) for k in prompt.keys),
        tuple(jnp.pad(v, room) for v in prompt.values),
        lengths,
        hidden,
      ),
    )
    output = mctx.muzero_policy(
      params, key, root, recurrent_fn, num_simulations, max_depth=max_depth
    )
    return output.search_tree.node_visits, output.action_weights

  return search
