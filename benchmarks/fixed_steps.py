"""Our step model where every step has the same number of tokens.

A random network hardly ever writes a delimiter, and a step that runs out of
slots would end its solution: here it ends like any other step.
"""

import jax.numpy as jnp

from o1jax.policy import Network, make_controls
from o1jax.search.contracts import StepModel
from o1jax.step_model import make_step_model
from o1jax.step_shape import StepShape


def fixed_step_model(
  network: Network,
  *,
  num_candidates: int,
  step_tokens: int,
  max_depth: int,
  memory: str,
) -> StepModel:
  """`make_step_model` with `memory`, and with steps of `step_tokens`."""
  model = make_step_model(
    network,
    StepShape(max_step_tokens=step_tokens, max_depth=max_depth),
    num_candidates=num_candidates,
    eos_id=-1,  # no token: every row runs to its full length
    pad_id=0,
    controls=make_controls(),
    memory=memory,
  )

  def step_fn(params, keys, request, store):
    tree = jnp.arange(request.node.shape[0])[:, None]
    depth = store.depth[tree, request.node] + 1
    expansion, store = model.step_fn(params, keys, request, store)
    shape = expansion.is_terminal.shape
    is_last = jnp.broadcast_to((depth >= max_depth)[..., None], shape)
    return expansion.replace(
      is_terminal=is_last, is_solution=is_last, outcome=expansion.value
    ), store

  return model._replace(step_fn=step_fn)
