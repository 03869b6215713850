"""One sharding table, and what follows from it.

A logical axis is a word for what a dimension means; `TABLE` says which axes of
the device mesh share it out. Problems and batches go over data and fsdp,
weights over fsdp and tensor. The mesh is made with automatic axis types, so
that the same program runs on one device and on many: XLA places what the
shardings of its arguments leave open.

`configure_host_devices` and `enable_compilation_cache` belong to a command's
first lines, before jax starts.
"""

import ctypes
import math
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# Names of options in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8

# Logical axis -> mesh axes. A logical axis that is absent stays whole.
TABLE: Mapping[str, tuple[str, ...]] = {
  "batch": ("data", "fsdp"),
  "width": ("fsdp",),
  "heads": ("tensor",),
  "ffn": ("tensor",),
  "vocab": ("tensor",),
}

# End of a weight's path -> its logical axes, first match wins; others (norms,
# biases, adapters, the value head) stay whole. Weights are stored [in, out].
WEIGHTS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"trunk/embedding$", ("vocab", "width")),
  (r"layer_\d+/qkv/kernel$", ("width", "heads")),
  (r"layer_\d+/out/kernel$", ("heads", "width")),
  (r"layer_\d+/gate_up/kernel$", ("width", None, "ffn")),
  (r"layer_\d+/up/kernel$", ("width", "ffn")),
  (r"layer_\d+/down/kernel$", ("ffn", "width")),
  (r"policy_head/kernel$", ("width", "vocab")),
)


def configure_host_devices(num_devices: int) -> None:
  """Splits the CPU into `num_devices` virtual devices.

  XLA runs a small product on one core, so on CPU a batch is shared out over as
  many virtual devices as there are cores. Without effect on accelerators.

  Raises:
    ValueError: jax has already started with another number of CPU devices.
  """
  try:
    jax.config.update("jax_num_cpu_devices", num_devices)
  except RuntimeError as error:
    if jax.default_backend() != "cpu" or jax.device_count() == num_devices:
      return
    raise ValueError(
      f"num_devices={num_devices}, but jax has already started with "
      f"{jax.device_count()} CPU devices: set the number before the first use "
      "of jax (in a notebook: restart the kernel)"
    ) from error


def keep_freed_memory(num_devices: int = 1) -> None:
  """Lets the C library keep what XLA frees between steps, on Linux.

  Otherwise every large temporary array is given back and asked for again, page
  by page: half the time of a training step of a small model on CPU. Without
  effect where the C library is not glibc.

  Args:
    num_devices: virtual devices of the CPU. A single one has one heap for all
      threads, since heaps of single threads end at 64 MiB and give back what is
      larger. In one heap several devices would be in each other's way: a
      training step of two takes a fifth longer.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):
    return
  if num_devices == 1:
    mallopt(_ARENA_MAX, 1)
  mallopt(_MMAP_THRESHOLD, 2**30)
  mallopt(_TRIM_THRESHOLD, -1)  # none is given back


def enable_compilation_cache(directory: str | os.PathLike) -> None:
  """Keeps compiled programs in `directory` for the next start.

  The environment variable JAX_COMPILATION_CACHE_DIR, where set, names another
  directory. Compiled programs are trusted input: the directory must belong to
  the user. Where it cannot be written, a line says so and nothing is kept.
  """
  directory = os.environ.get("JAX_COMPILATION_CACHE_DIR") or directory
  path = pathlib.Path(directory).expanduser().resolve()
  try:
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except OSError as error:
    print(
      f"warning: compiled programs are not kept ({error}); "
      "--compilation_cache names another folder",
      file=sys.stderr,
    )
    # The environment variable would still name it.
    jax.config.update("jax_enable_compilation_cache", False)
    return
  jax.config.update("jax_compilation_cache_dir", str(path))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def make_mesh(shape: Mapping[str, int]) -> Mesh:
  """Arranges devices as a mesh with the axes data, fsdp and tensor.

  Args:
    shape: size of each axis by name; an absent axis has size 1, and one axis
      may be -1: all devices that the others leave. Fewer devices than there
      are is allowed; the first ones are taken.

  Raises:
    ValueError: an unknown axis, or a size that the devices cannot fill.
  """
  for name in shape:
    if name not in AXES:
      raise ValueError(f"unknown mesh axis {name!r}: the axes are {AXES}")
  sizes = [shape[name] if name in shape else 1 for name in AXES]
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(
      f"mesh sizes {dict(zip(AXES, sizes, strict=True))}: each must be at "
      "least 1, and at most one may be -1"
    )
  available = jax.device_count()
  if -1 in sizes:
    fixed = math.prod(size for size in sizes if size != -1)
    if available % fixed:
      raise ValueError(
        f"mesh {dict(shape)}: {available} devices do not divide by {fixed}"
      )
    sizes[sizes.index(-1)] = available // fixed
  needed = math.prod(sizes)
  if needed > available:
    raise ValueError(
      f"mesh {dict(shape)} needs {needed} devices, but there are {available}"
    )
  # Sizes by position: their keyword changed its name between jax versions.
  return jax.make_mesh(
    tuple(sizes),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=jax.devices()[:needed],
  )


def mesh_for(num_rows: int) -> Mesh:
  """A mesh of as many devices as `num_rows` rows divide over."""
  counts = range(1, jax.device_count() + 1)
  return make_mesh(
    {"data": max(count for count in counts if num_rows % count == 0)}
  )


def partition_spec(
  logical_axes: tuple[str | None, ...],
  table: Mapping[str, tuple[str, ...]] = TABLE,
) -> PartitionSpec:
  """Translates logical axes by the table; None and absent axes stay whole.

  Raises:
    ValueError: two axes of the array would lie on one mesh axis.
  """
  used: dict[str, str] = {}
  entries = []
  for logical in logical_axes:
    axes = table[logical] if logical in table else ()
    for axis in axes:
      if axis in used:
        raise ValueError(
          f"logical axes {used[axis]!r} and {logical!r} both lie on mesh axis "
          f"{axis!r}: an array can be shared out over it once"
        )
      used[axis] = logical
    entries.append(axes if len(axes) > 1 else (axes[0] if axes else None))
  return PartitionSpec(*entries)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Shares out the first dimension; the others stay whole."""
  return NamedSharding(mesh, partition_spec(("batch",)))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_ways(mesh: Mesh) -> int:
  """Number of parts that a batch is cut into."""
  return math.prod(mesh.shape[axis] for axis in TABLE["batch"])


def check_divides(name: str, value: int, mesh: Mesh) -> None:
  """Raises ValueError where a batch of `value` cannot be shared out evenly."""
  ways = batch_ways(mesh)
  if value % ways:
    below, above = value // ways * ways, (value // ways + 1) * ways
    choices = f"{below} or {above}" if below else str(above)
    raise ValueError(
      f"{name}={value} does not divide over {ways} devices: make it {choices}"
    )


def shard_batch(tree: Any, mesh: Mesh) -> Any:
  """Puts arrays `[B, ...]` on the mesh, B over its data and fsdp axes."""
  return jax.device_put(tree, batch_sharding(mesh))


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Puts a whole copy of every array on each device of the mesh."""
  return jax.device_put(tree, replicated_sharding(mesh))


def params_sharding(tree: Any, mesh: Mesh) -> Any:
  """Shardings for weights and for whatever is shaped and named like them.

  The rule of a weight is found by the end of its path, so the moments of an
  optimizer follow their weights. A dimension that does not divide over its mesh
  axis stays whole, as do arrays without a rule.

  Args:
    tree: arrays, or anything with `shape`.

  Returns:
    The same tree with a `NamedSharding` for every array.
  """

  def sharding(path, leaf):
    name = "/".join(_key_name(key) for key in path)
    for pattern, logical_axes in WEIGHTS:
      if re.search(pattern, name) and len(logical_axes) == len(leaf.shape):
        spec = partition_spec(logical_axes)
        return NamedSharding(mesh, _fit(spec, leaf.shape, mesh))
    return replicated_sharding(mesh)

  return jax.tree_util.tree_map_with_path(sharding, tree)


def _fit(
  spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh
) -> PartitionSpec:
  """Drops the entries whose dimension does not divide."""
  entries = []
  for size, entry in zip(shape, spec, strict=True):
    axes = (entry,) if isinstance(entry, str) else entry or ()
    ways = int(np.prod([mesh.shape[axis] for axis in axes], dtype=int))
    entries.append(entry if size % ways == 0 else None)
  return PartitionSpec(*entries)


def _key_name(key: Any) -> str:
  """The bare word of a path entry: dictionary key, field or index."""
  for attribute in ("key", "name", "idx"):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)
