"""The sharding table, the mesh, and what bad sizes say."""

import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from o1jax import mesh as mesh_lib
from o1jax import policy


def test_mesh_fills_the_free_axis_with_the_devices_left():
  mesh = mesh_lib.make_mesh({"data": -1, "tensor": 2})
  assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
  assert set(mesh.axis_types) == {AxisType.Auto}


def test_mesh_may_use_fewer_devices_than_there_are():
  mesh = mesh_lib.make_mesh({"data": 2})
  assert list(mesh.devices.flat) == jax.devices()[:2]


@pytest.mark.parametrize(
  "shape, message",
  [
    ({"model": 2}, "unknown mesh axis 'model'"),
    ({"data": 3, "tensor": -1}, "8 devices do not divide by 3"),
    ({"data": 16}, "needs 16 devices, but there are 8"),
    ({"data": -1, "fsdp": -1}, "at most one may be -1"),
    ({"data": 0}, "at least 1"),
  ],
)
def test_bad_mesh_shapes_say_what_is_wrong(shape, message):
  with pytest.raises(ValueError, match=message):
    mesh_lib.make_mesh(shape)


@pytest.mark.parametrize("num_devices, has_one_heap", [(1, True), (2, False)])
def test_a_single_device_has_a_single_heap(
  num_devices, has_one_heap, monkeypatch
):
  options = {}
  library = types.SimpleNamespace(mallopt=options.__setitem__)
  monkeypatch.setattr(mesh_lib.ctypes, "CDLL", lambda name: library)
  mesh_lib.keep_freed_memory(num_devices)
  # The numbers of M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX.
  expected = {-1: -1, -3: 2**30} | ({-8: 1} if has_one_heap else {})
  assert options == expected


def test_table_refuses_two_axes_of_an_array_on_one_mesh_axis():
  spec = mesh_lib.partition_spec(("batch", None, "heads"))
  assert spec == PartitionSpec(("data", "fsdp"), None, "tensor")
  with pytest.raises(ValueError, match="'batch' and 'width' both lie on"):
    mesh_lib.partition_spec(("batch", "width"))
  with pytest.raises(ValueError, match="'ffn' and 'heads'"):
    mesh_lib.partition_spec(("ffn", "heads"))


def test_batch_that_does_not_divide_is_named_with_its_neighbours():
  mesh = mesh_lib.make_mesh({"data": 4, "fsdp": 2})
  mesh_lib.check_divides("batch_size", 24, mesh)
  with pytest.raises(
    ValueError,
    match="^batch_size=28 does not divide over 8 devices: make it 24 or 32$",
  ):
    mesh_lib.check_divides("batch_size", 28, mesh)
  with pytest.raises(ValueError, match="make it 8$"):
    mesh_lib.check_divides("batch_size", 3, mesh)


def test_batch_is_shared_out_over_data_and_fsdp_only():
  mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  rows = mesh_lib.shard_batch({"x": np.arange(24).reshape(8, 3)}, mesh)["x"]
  assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 3)}
  np.testing.assert_array_equal(rows, np.arange(24).reshape(8, 3))
  whole = mesh_lib.replicate(np.arange(5), mesh)
  assert {shard.data.shape for shard in whole.addressable_shards} == {(5,)}


def specs_of(tree, mesh):
  shardings = mesh_lib.params_sharding(tree, mesh)
  return jax.tree.map(lambda sharding: sharding.spec, shardings)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_every_matrix_of_the_network_is_shared_out_by_the_table(activation):
  config = policy.TransformerConfig(
    vocab_size=16,
    num_layers=2,
    width=8,
    num_heads=4,
    num_kv_heads=2,
    head_width=4,
    ffn_width=12,
    activation=activation,
    qkv_bias=True,
    value_bins=4,
  )
  network = policy.make_network(config)
  params = jax.eval_shape(network.init, jax.random.key(0))
  mesh = mesh_lib.make_mesh({"fsdp": 2, "tensor": 4})
  specs = specs_of(params, mesh)
  into = PartitionSpec("fsdp", "tensor")
  out_of = PartitionSpec("tensor", "fsdp")
  layer = specs["trunk"]["layer_1"]
  assert specs["trunk"]["embedding"] == out_of
  assert layer["qkv"]["kernel"] == into
  assert layer["qkv"]["bias"] == PartitionSpec()
  assert layer["out"]["kernel"] == out_of
  assert layer["down"]["kernel"] == out_of
  if activation == "gelu":
    assert layer["up"]["kernel"] == into
  else:
    gates = PartitionSpec("fsdp", None, "tensor")
    assert layer["gate_up"]["kernel"] == gates
  assert specs["policy_head"]["kernel"] == into
  # Nothing with two dimensions stays whole, the value head's columns apart.
  whole = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, spec in jax.tree_util.tree_leaves_with_path(
      specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    if spec == PartitionSpec()
  ]
  shapes = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  assert [name for name in whole if len(shapes[name]) > 1] == [
    "value_head/out/kernel"
  ]


def test_moments_follow_their_weights_and_odd_sizes_stay_whole():
  mesh = mesh_lib.make_mesh({"fsdp": 2, "tensor": 4})
  weights = {"trunk": {"layer_0": {"up": {"kernel": np.zeros((8, 10))}}}}
  specs = specs_of(({"mu": weights, "count": np.zeros(())},), mesh)[0]
  assert specs["count"] == PartitionSpec()
  # 10 columns do not divide over 4 devices.
  kernel = specs["mu"]["trunk"]["layer_0"]["up"]["kernel"]
  assert kernel == PartitionSpec("fsdp", None)


def test_eight_devices_compute_what_one_does():
  weights = {"layer_0": {"up": {"kernel": np.ones((8, 16), np.float32)}}}
  rows = np.arange(64, dtype=np.float32).reshape(8, 8)
  results = []
  for shape in ({"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
    mesh = mesh_lib.make_mesh(shape)
    placed = jax.device_put(weights, mesh_lib.params_sharding(weights, mesh))
    kernel = placed["layer_0"]["up"]["kernel"]
    assert len(kernel.sharding.device_set) == mesh.size
    product = jax.jit(jnp.matmul)(mesh_lib.shard_batch(rows, mesh), kernel)
    results.append(np.asarray(product))
  np.testing.assert_array_equal(results[0], results[1])


def test_number_of_host_devices_is_refused_when_jax_has_started():
  mesh_lib.configure_host_devices(jax.device_count())
  with pytest.raises(ValueError, match="already started with 8 CPU devices"):
    mesh_lib.configure_host_devices(3)


PROGRAM = """
import sys
import jax
from o1jax import mesh
mesh.configure_host_devices(3)
mesh.enable_compilation_cache(sys.argv[1])
assert jax.device_count() == 3, jax.devices()
assert jax.config.jax_compilation_cache_dir == sys.argv[2]
"""


UNWRITABLE = """
import sys
import jax
from o1jax import mesh
mesh.enable_compilation_cache(sys.argv[1])
assert not jax.config.jax_enable_compilation_cache
"""


def test_without_a_folder_for_programs_it_goes_on(tmp_path, monkeypatch):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  (tmp_path / "file").touch()
  command = [sys.executable, "-c", UNWRITABLE, str(tmp_path / "file" / "cache")]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  (line,) = done.stderr.splitlines()
  assert line.startswith("warning: compiled programs are not kept (")
  assert str(tmp_path / "file") in line


def test_host_devices_and_cache_are_set_before_jax_starts(
  tmp_path, monkeypatch
):
  named = tmp_path / "named"
  for environment in (None, tmp_path / "environment"):
    if environment is None:
      monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    else:
      monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(environment))
    expected = str(environment or named)
    command = [sys.executable, "-c", PROGRAM, str(named), expected]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
