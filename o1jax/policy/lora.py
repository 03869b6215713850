"""Low-rank adapters: a large base stays as it is, small factors learn.

A kernel W becomes W + (alpha / rank) A B (Hu et al., arXiv 2106.09685). The
adapters are a tree of their own beside the base: whoever learns takes them for
the parameters and merges before the network is applied, so that gradients,
moments and averages are theirs alone:

  lora = make_lora(network, rank=8)
  adapters = lora.init(key)
  log_probs_fn = lambda adapters, tokens, lengths: next_token_log_probs(
    network, lora.merge(base, adapters), tokens, lengths)
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from o1jax.policy.network import Network, Params

TARGETS = ("qkv", "out", "gate_up", "up", "down")


class Lora(NamedTuple):
  """Functions of adapters.

  Attributes:
    init: `(key) -> adapters`, by layer and product: A `[in, rank]` normal with
      variance 1 / in, B `[rank, *out]` zero, so that the start is the base.
    merge: `(base params, adapters) -> params`, for `network.apply` and all that
      takes parameters; the base gets no gradient.
  """

  init: Callable[[jax.Array], Any]
  merge: Callable[[Params, Any], Params]


def make_lora(
  network: Network,
  *,
  rank: int,
  alpha: float | None = None,
  targets: Sequence[str] = TARGETS,
) -> Lora:
  """Adapters of the layers' products.

  Args:
    network: whose parameters are adapted.
    rank: inner width of every adapter.
    alpha: the product A B counts alpha / rank; None for alpha = rank.
    targets: products that have adapters, of `TARGETS`; those that the network
      lacks are passed over.

  Raises:
    ValueError: a rank below 1, an unknown target, or none that is there.
  """
  if rank < 1:
    raise ValueError(f"rank={rank} must be 1 or more")
  unknown = [name for name in targets if name not in TARGETS]
  if unknown:
    raise ValueError(
      f"targets {', '.join(unknown)} are unknown; take some of "
      f"{', '.join(TARGETS)}"
    )
  scale = 1.0 if alpha is None else alpha / rank
  trunk = jax.eval_shape(network.init, jax.random.key(0))["trunk"]
  shapes = {
    layer: {
      name: product["kernel"].shape
      for name, product in products.items()
      if name in targets
    }
    for layer, products in trunk.items()
    if layer.startswith("layer_")
  }
  if not any(shapes.values()):
    raise ValueError(
      f"no product of the layers is among targets={tuple(targets)}: the "
      f"network has {', '.join(n for n in trunk['layer_0'] if n in TARGETS)}"
    )

  def init(key):
    adapters = {}
    for i, (layer, products) in enumerate(shapes.items()):
      adapters[layer] = {}
      layer_key = jax.random.fold_in(key, i)
      for k, (name, (width, *out)) in enumerate(products.items()):
        noise = jax.random.normal(
          jax.random.fold_in(layer_key, k), (width, rank), jnp.float32
        )
        adapters[layer][name] = {
          "a": noise * width**-0.5,
          "b": jnp.zeros((rank, *out), jnp.float32),
        }
    return adapters

  def merge(base, adapters):
    params = jax.lax.stop_gradient(base)
    trunk = dict(params["trunk"])
    for layer, products in adapters.items():
      trunk[layer] = dict(trunk[layer])
      for name, factors in products.items():
        b = factors["b"]
        flat = b.reshape(rank, math.prod(b.shape[1:]))
        change = scale * (factors["a"] @ flat)
        kernel = trunk[layer][name]["kernel"]
        trunk[layer][name] = trunk[layer][name] | {
          "kernel": kernel + change.reshape(kernel.shape)
        }
    return params | {"trunk": trunk}

  return Lora(init, merge)
