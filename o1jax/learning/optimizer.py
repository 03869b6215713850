"""The optimizer: clipping, then adamw, lion or muon under a schedule.

Part of the parameters may be frozen (`TRAINABLE`): then the rest alone has
moments, is clipped and moves. Weight decay touches matrices only, which it
knows by their names; norms and biases keep their scale. An `Optimizer` is
optax's pair of functions with the schedule beside it, so that the update
program can report the learning rate it applied.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

_NAMES = ("adamw", "lion", "muon")
_SCHEDULES = ("constant", "cosine", "linear")
# Axis of the mesh that shares out muon's matrices.
_DATA = "data"
TRAINABLE = ("all", "heads", "trunk", "adapters")

# Factors of the low-rank adapters beside a kernel.
ADAPTERS = ("lora_a", "lora_b")
# Names of the matrices; a bias may have two axes as well.
_DECAYED = ("kernel", "embedding", *ADAPTERS)

# Muon: momentum of the matrices, and the size of a change in units of the rate.
# Adam's changes are about 0.2 too, so that one rate serves both (Liu et al.,
# arXiv 2502.16982).
_MUON_MOMENTUM = 0.95
_MUON_RMS = 0.2


class Optimizer(NamedTuple):
  """An optax transformation with its schedule.

  Attributes:
    init: `params -> opt_state`.
    update: `(grads, opt_state, params) -> (changes, opt_state)`.
    schedule: `num_updates -> learning rate` of the next update.
  """

  init: Callable[[Any], Any]
  update: Callable[[Any, Any, Any], tuple[Any, Any]]
  schedule: Callable[[jax.Array], jax.Array]


def make_schedule(
  *,
  learning_rate: float,
  warmup_updates: int,
  total_updates: int,
  schedule: str,
  end_fraction: float,
) -> Callable[[jax.Array], jax.Array]:
  """Returns the learning rate as a function of the updates already made.

    lr(n) = learning_rate * min(1, (n + 1) / warmup_updates) * decay(x)
    x     = (n - warmup_updates) / (total_updates - warmup_updates), in [0, 1]
    decay = 1 (constant), 1 - (1 - e) x (linear),
            e + (1 - e) (1 + cos(pi x)) / 2 (cosine),  e = end_fraction

  The first update already moves: its rate is `learning_rate / warmup_updates`.

  Args:
    learning_rate: the peak.
    warmup_updates: length of the linear rise; 0 for none.
    total_updates: where the decay ends; the rate stays there afterwards. Not
      read by "constant".
    schedule: "constant", "cosine" or "linear".
    end_fraction: last rate as a part of the peak. Not read by "constant".

  Raises:
    ValueError: unknown schedule, or a decay that ends before it begins.
  """
  if schedule not in _SCHEDULES:
    raise ValueError(
      f"schedule={schedule!r} is unknown; take one of {', '.join(_SCHEDULES)}"
    )
  if schedule != "constant" and total_updates <= warmup_updates:
    raise ValueError(
      f"total_updates={total_updates} leaves nothing to decay after "
      f"warmup_updates={warmup_updates}; raise total_updates"
    )

  def rate(num_updates):
    count = jnp.asarray(num_updates, jnp.float32)
    rise = jnp.minimum(1.0, (count + 1) / max(warmup_updates, 1))
    if schedule == "constant":
      return learning_rate * rise
    span = total_updates - warmup_updates
    progress = jnp.clip((count - warmup_updates) / span, 0.0, 1.0)
    if schedule == "cosine":
      progress = 0.5 * (1 - jnp.cos(jnp.pi * progress))
    return learning_rate * rise * (1 - (1 - end_fraction) * progress)

  return rate


def make_optimizer(
  *,
  name: str = "adamw",
  learning_rate: float,
  warmup_updates: int = 0,
  total_updates: int = 0,
  schedule: str = "constant",
  end_fraction: float = 0.0,
  weight_decay: float = 0.0,
  clip_norm: float | None = 1.0,
  b1: float = 0.9,
  b2: float = 0.99,
  trainable: str = "all",
  mesh: Mesh | None = None,
) -> Optimizer:
  """Builds the optimizer; schedule arguments as in `make_schedule`.

  Args:
    name: "adamw" (Loshchilov and Hutter, arXiv 1711.05101), "lion" (Chen et
      al., arXiv 2302.06675; wants a tenth of adamw's rate) or "muon" (Jordan et
      al., 2024: matrices of the layers move by orthogonalised momentum, the
      rest by adamw; takes adamw's rate).
    learning_rate: the peak.
    warmup_updates: length of the linear rise.
    total_updates: where the decay ends.
    schedule: "constant", "cosine" or "linear".
    end_fraction: last rate as a part of the peak.
    weight_decay: decay of the matrices per update, times the learning rate;
      muon leaves the embedding, the value head and adapters alone.
    clip_norm: largest global norm of a gradient; None to leave it.
    b1: decay of the first moment; muon's own is 0.95 for what it moves.
    b2: decay of the second moment.
    trainable: what moves: "all", "heads" (the trunk is frozen; where embeddings
      are tied they are the trunk's, and the value head alone moves), "trunk" or
      "adapters" (the factors of `TransformerConfig.lora_rank` and the value
      head). `init` refuses parameters without adapters then.
    mesh: where given, and weights are whole on every device of it, muon's
      matrices are shared out: each device orthogonalises some of them.

  Raises:
    ValueError: unknown name or part, or a schedule that `make_schedule`
      refuses.
  """
  if name not in _NAMES:
    raise ValueError(
      f"optimizer {name!r} is unknown; take one of {', '.join(_NAMES)}"
    )
  if trainable not in TRAINABLE:
    raise ValueError(
      f"trainable={trainable!r} is unknown; take one of {', '.join(TRAINABLE)}"
    )
  rate = make_schedule(
    learning_rate=learning_rate,
    warmup_updates=warmup_updates,
    total_updates=total_updates,
    schedule=schedule,
    end_fraction=end_fraction,
  )
  if name == "muon":
    rule = optax.contrib.muon(
      rate,
      beta=_MUON_MOMENTUM,
      weight_decay=weight_decay,
      adam_b1=b1,
      adam_b2=b2,
      muon_weight_dimension_numbers=_muon_axes,
      consistent_rms=_MUON_RMS,
    )
    if mesh is not None and mesh.shape[_DATA] == mesh.size > 1:
      rule = _shared_out(rule, mesh)
  else:
    make = optax.adamw if name == "adamw" else optax.lion
    rule = make(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=_is_decayed)
  if clip_norm is not None:
    rule = optax.chain(_clip(clip_norm), rule)
  if trainable != "all":
    rule = freeze(rule, lambda path: is_trained(path, trainable))
  init = _needing_adapters(rule.init) if trainable == "adapters" else rule.init
  return Optimizer(init, rule.update, rate)


def freeze(
  rule: optax.GradientTransformation, is_moved: Callable[[str], bool]
) -> optax.GradientTransformation:
  """`rule` for the parameters whose path passes, no change for the others.

  Args:
    rule: any optax transformation.
    is_moved: of a path such as "trunk/layer_0/qkv/kernel".
  """

  def labels(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: is_moved("/".join(str(entry.key) for entry in path)),
      params,
    )

  return optax.partition({True: rule, False: optax.set_to_zero()}, labels)


def is_trained(path: str, trainable: str) -> bool:
  """Whether the parameter at `path` is in that part of the network."""
  part, name = path.partition("/")[0], path.rpartition("/")[2]
  if trainable == "adapters":
    return name in ADAPTERS or part == "value_head"
  is_trunk = part == "trunk"
  return trainable == "all" or is_trunk == (trainable == "trunk")


def _needing_adapters(init):
  """`init` that refuses parameters without adapters."""

  def checked(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not any(path[-1].key in ADAPTERS for path, _ in leaves):
      raise ValueError(
        "trainable='adapters', but the network has none: set network.lora_rank "
        "to 1 or more"
      )
    return init(params)

  return checked


def _clip(max_norm):
  """As optax's, by one product, which XLA joins with what reads it."""

  def update(grads, state, params=None):
    del params
    norm = optax.tree.norm(grads)
    scale = jnp.minimum(1.0, max_norm / jnp.where(norm > 0, norm, 1.0))
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _is_decayed(params):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key in _DECAYED, params
  )


def _shared_out(
  rule: optax.GradientTransformation, mesh: Mesh
) -> optax.GradientTransformation:
  """`rule`, of which each device works off some matrices of the layers.

  For a rule that moves every array by its own gradient alone.
  """

  def update(grads, state, params):
    owner_of = owners(grads, mesh.size)
    # The products of this call are nobody's and fall away; what is left is the
    # state, and the changes of arrays that all devices work off.
    changes, new_state = rule.update(grads, state, params)
    leaves, structure = jax.tree.flatten(changes)
    shared = [i for i, owner in enumerate(owner_of) if owner is not None]

    def part(device):
      def run(grads, state, params):
        found = jax.tree.leaves(rule.update(grads, state, params)[0])
        return [
          found[i] if owner_of[i] == device else jnp.zeros_like(found[i])
          for i in shared
        ]

      return run

    def on_device(*arguments):
      place = jax.lax.axis_index(_DATA)
      parts = [part(device) for device in range(mesh.size)]
      return jax.lax.psum(jax.lax.switch(place, parts, *arguments), _DATA)

    whole = PartitionSpec()
    found = jax.shard_map(
      on_device,
      mesh=mesh,
      in_specs=(whole, whole, whole),
      out_specs=whole,
      check_vma=False,
    )(grads, state, params)
    for i, leaf in zip(shared, found, strict=True):
      leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves), new_state

  return optax.GradientTransformation(rule.init, update)


def owners(tree, num_devices: int) -> list[int | None]:
  """Of each array, the device that works it off; None for all of them.

  Matrices that muon moves have one owner each: the largest come first, to the
  device that has least to do.

  Args:
    tree: gradients.
    num_devices: that share them out.

  Returns:
    In the order of the leaves.
  """
  leaves, structure = jax.tree.flatten(tree)
  axes = structure.flatten_up_to(_muon_axes(tree))
  costs = {
    i: leaf.size * min(leaf.shape[0], leaf.shape[-1])
    for i, leaf in enumerate(leaves)
    if axes[i] is not None
  }
  found: list[int | None] = [None] * len(leaves)
  loads = [0] * num_devices
  for i in sorted(costs, key=costs.__getitem__, reverse=True):
    least = loads.index(min(loads))
    found[i] = least
    loads[least] += costs[i]
  return found


def _muon_axes(params):
  """In and out axis of each matrix of the layers, None for all the rest.

  Gate and up lie in one array `[in, 2, out]` and are two matrices to muon.
  """

  def axes(path, param):
    is_matrix = path[-1].key == "kernel" and path[0].key == "trunk"
    last = param.ndim - 1
    return optax.contrib.MuonDimensionNumbers(0, last) if is_matrix else None

  return jax.tree_util.tree_map_with_path(axes, params)
