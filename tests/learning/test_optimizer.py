"""Schedule and rule against closed forms and a scalar loop."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from o1jax import mesh as meshes
from o1jax.learning import optimizer as optimizers

pytestmark = pytest.mark.usefixtures("quick_programs")


def expected_rate(n, schedule, peak, warmup, total, end):
  if n < warmup:
    return peak * (n + 1) / warmup
  if schedule == "constant":
    return peak
  x = min(1.0, (n - warmup) / (total - warmup))
  if schedule == "linear":
    return peak * (1 - x) + peak * end * x
  return peak * (end + (1 - end) * (1 + math.cos(math.pi * x)) / 2)


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_schedule_equals_its_closed_form(schedule, warmup):
  rate = optimizers.make_schedule(
    learning_rate=3e-3,
    warmup_updates=warmup,
    total_updates=12,
    schedule=schedule,
    end_fraction=0.1,
  )
  found = [float(rate(n)) for n in range(15)]
  expected = [
    expected_rate(n, schedule, 3e-3, warmup, 12, 0.1) for n in range(15)
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_constant_schedule_needs_no_total():
  optimizer = optimizers.make_optimizer(learning_rate=1e-2, warmup_updates=2)
  assert float(optimizer.schedule(0)) == pytest.approx(5e-3)
  assert float(optimizer.schedule(1000)) == pytest.approx(1e-2)


def arrays():
  """Draws of the normal law, by shape."""
  rng = np.random.default_rng(0)

  def array(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return array


def run(optimizer, params, gradients):
  @jax.jit
  def moved(params, gradients):
    def step(carry, grads):
      params, state = carry
      changes, state = optimizer.update(grads, state, params)
      return (jax.tree.map(jnp.add, params, changes), state), None

    start = params, optimizer.init(params)
    return jax.lax.scan(step, start, gradients)[0][0]

  stacked = jax.tree.map(lambda *x: np.stack(x), *gradients)
  return jax.device_get(moved(params, stacked))


def test_adamw_equals_a_scalar_loop_with_clipping_and_decay():
  b1, b2, decay, clip = 0.8, 0.9, 0.3, 1.5
  optimizer = optimizers.make_optimizer(
    learning_rate=0.1,
    warmup_updates=2,
    weight_decay=decay,
    clip_norm=clip,
    b1=b1,
    b2=b2,
  )
  gradients = [(0.4, -0.2), (3.0, 4.0), (-1.0, 0.0)]
  # Only the kernel decays, although this bias has two axes as well.
  found = run(
    optimizer,
    {"kernel": jnp.full((1, 1), 0.5), "bias": jnp.full((1, 1), 0.5)},
    [
      {"kernel": jnp.full((1, 1), g), "bias": jnp.full((1, 1), h)}
      for g, h in gradients
    ],
  )
  params, first, second = [0.5, 0.5], [0.0, 0.0], [0.0, 0.0]
  for n, pair in enumerate(gradients):
    norm = math.hypot(*pair)
    rate = 0.1 * min(1, (n + 1) / 2)
    for i in range(2):
      g = pair[i] * min(1, clip / norm)
      first[i] = b1 * first[i] + (1 - b1) * g
      second[i] = b2 * second[i] + (1 - b2) * g * g
      mean = first[i] / (1 - b1 ** (n + 1))
      square = second[i] / (1 - b2 ** (n + 1))
      change = mean / (math.sqrt(square) + 1e-8)
      change += decay * params[i] if i == 0 else 0
      params[i] -= rate * change
  np.testing.assert_allclose(found["kernel"], [[params[0]]], rtol=1e-5)
  np.testing.assert_allclose(found["bias"], [[params[1]]], rtol=1e-5)


def test_lion_moves_by_the_sign_of_its_momentum():
  optimizer = optimizers.make_optimizer(
    name="lion", learning_rate=0.01, clip_norm=None, b1=0.5, b2=0.5
  )
  gradients = [{"w": jnp.array([2.0])}, {"w": jnp.array([-0.1])}]
  found = run(optimizer, {"w": jnp.array([1.0])}, gradients)
  # The momentum 0.5 * 1.0 + 0.5 * -0.1 is still above zero.
  np.testing.assert_allclose(found["w"], [0.98], rtol=1e-6)


def test_no_clipping_leaves_the_gradient_its_size():
  """Lion hides sizes, so adamw's second moment tells: scale then drop."""
  gradients = [{"w": jnp.array([100.0])}, {"w": jnp.array([1.0])}]
  start = {"w": jnp.array([0.0])}
  clipped, free = (
    run(
      optimizers.make_optimizer(learning_rate=0.1, clip_norm=clip_norm),
      start,
      gradients,
    )["w"]
    for clip_norm in (1.0, None)
  )
  np.testing.assert_allclose(clipped, [-0.2], rtol=1e-4)
  assert float(free[0]) > -0.199


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ({"name": "adam"}, "adamw"),
    ({"schedule": "cosin"}, "cosine"),
    ({"trainable": "head"}, "heads"),
    ({"schedule": "linear", "warmup_updates": 9}, "total_updates=9"),
  ],
)
def test_bad_arguments_are_refused_with_what_to_change(arguments, words):
  arguments = {"learning_rate": 0.1, "total_updates": 9} | arguments
  with pytest.raises(ValueError, match=words):
    optimizers.make_optimizer(**arguments)


def test_muon_orthogonalises_the_layers_and_leaves_the_rest_to_adam():
  array = arrays()
  params = {
    "trunk": {
      "embedding": array(7, 8),
      "layer_0": {
        "qkv": {"kernel": array(8, 24)},
        "gate_up": {"kernel": array(8, 2, 16), "bias": array(2, 16)},
      },
    },
    "value_head": {"out": {"kernel": array(8, 1)}},
  }
  gradient = jax.tree.map(lambda x: array(*x.shape), params)
  optimizer = optimizers.make_optimizer(
    name="muon", learning_rate=0.1, weight_decay=0.5, clip_norm=None, b2=0.9
  )
  moved = run(optimizer, params, [gradient])

  # All directions of a gradient move about equally, whatever their size.
  layer, old = moved["trunk"]["layer_0"], params["trunk"]["layer_0"]
  pairs = [(layer["qkv"]["kernel"], old["qkv"]["kernel"])]
  for part in range(2):
    both = [x["gate_up"]["kernel"][:, part] for x in (layer, old)]
    pairs.append(tuple(both))
  for new, start in pairs:
    change = np.asarray(new - (1 - 0.1 * 0.5) * start)
    directions = np.linalg.svd(change / 0.1, compute_uv=False)
    scale = 0.2 * np.sqrt(max(change.shape))
    assert np.all((directions > 0.6 * scale) & (directions < 1.25 * scale))

  # Adam's first change is the sign of the gradient; nothing here decays.
  for path in (
    ("trunk", "embedding"),
    ("trunk", "layer_0", "gate_up", "bias"),
    ("value_head", "out", "kernel"),
  ):
    new, start, grads = moved, params, gradient
    for name in path:
      new, start, grads = new[name], start[name], grads[name]
    sizes = (new - start) / (-0.1 * jnp.sign(grads))
    np.testing.assert_allclose(sizes, sizes.ravel()[0], rtol=1e-3)


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_muon_moves_alike_where_devices_share_its_matrices(num_devices):
  array = arrays()
  params = {
    "trunk": {
      "embedding": array(7, 8),
      "layer_0": {
        "qkv": {"kernel": array(8, 24)},
        "gate_up": {"kernel": array(8, 2, 16), "bias": array(2, 16)},
        "down": {"kernel": array(16, 8)},
      },
    },
    "value_head": {"out": {"kernel": array(8, 1)}},
  }
  gradients = [
    jax.tree.map(lambda x: array(*x.shape), params) for _ in range(3)
  ]
  options = {"name": "muon", "learning_rate": 0.1, "weight_decay": 0.5}
  mesh = meshes.make_mesh({"data": num_devices})
  for trainable in ("all", "trunk"):
    plain, shared = (
      optimizers.make_optimizer(trainable=trainable, **options, **extra)
      for extra in ({}, {"mesh": mesh})
    )
    params = jax.device_put(params, meshes.params_sharding(params, mesh))
    # Weights are about 1, and round-off is of their size where they cancel.
    chex.assert_trees_all_close(
      run(shared, params, gradients),
      run(plain, params, gradients),
      rtol=1e-4,
      atol=1e-5,
    )
    assert is_shared_out(shared, params) == (num_devices > 1)
    assert not is_shared_out(plain, params)


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_muons_matrices_are_not_shared_out_where_weights_are_split(axis):
  mesh = meshes.make_mesh({"data": 2, axis: 2})
  optimizer = optimizers.make_optimizer(
    name="muon", learning_rate=0.1, mesh=mesh
  )
  params = {"trunk": {"layer_0": {"qkv": {"kernel": jnp.zeros((8, 24))}}}}
  assert not is_shared_out(optimizer, params)


def is_shared_out(optimizer, params):
  """Whether devices move matrices of their own."""
  state = jax.eval_shape(optimizer.init, params)
  return "shard_map" in str(
    jax.make_jaxpr(optimizer.update)(params, state, params)
  )


@pytest.mark.parametrize("num_devices", [1, 2, 3, 9])
def test_each_of_muons_matrices_has_one_owner(num_devices):
  shapes = {"qkv": (8, 24), "out": (8, 8), "gate_up": (8, 2, 16)}
  layer = {k: {"kernel": jnp.zeros(shape)} for k, shape in shapes.items()}
  names = [f"layer_{i}" for i in range(2)]
  tree = {"trunk": {"bias": jnp.zeros(3)} | dict.fromkeys(names, layer)}
  owners = optimizers.owners(tree, num_devices)
  assert owners[0] is None and len(owners) == 7
  # In the order of the leaves; costs are sizes times 8.
  costs = np.array(
    [shapes[k][-1] * (1 + (k == "gate_up")) for k in sorted(shapes)] * 2
  )
  loads = np.bincount(owners[1:], costs, num_devices)
  # The largest first, to whom has least: within the largest of all.
  assert loads.max() - loads.min() <= costs.max()
  assert set(owners[1:]) == set(range(min(num_devices, 6)))


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
@pytest.mark.parametrize(
  ("trainable", "moved"),
  [
    ("all", {"trunk", "policy_head", "value_head"}),
    ("heads", {"policy_head", "value_head"}),
    ("trunk", {"trunk"}),
  ],
)
def test_what_is_frozen_stays_and_does_not_count(name, trainable, moved):
  """The rest moves as if it were alone: the frozen gradient is not clipped."""
  params = {
    "trunk": {"layer_0": {"out": {"kernel": jnp.full((2, 2), 0.5)}}},
    "policy_head": {"kernel": jnp.full((2, 3), 0.5)},
    "value_head": {"out": {"kernel": jnp.full((2, 1), 0.5)}},
  }
  grads = jax.tree.map(lambda x: 3.0 * x, params)
  frozen = params.keys() - moved
  grads |= {k: jax.tree.map(lambda x: 1e3 * x, grads[k]) for k in frozen}
  options = {"name": name, "learning_rate": 0.1, "weight_decay": 0.1}
  rule = optimizers.make_optimizer(trainable=trainable, **options)
  found = run(rule, params, [grads] * 2)
  alone = optimizers.make_optimizer(**options)
  want = run(
    alone,
    {k: params[k] for k in moved},
    [{k: grads[k] for k in moved}] * 2,
  )
  for part in moved:
    for a, b in zip(
      jax.tree.leaves(found[part]), jax.tree.leaves(want[part]), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=1e-6)
      assert (np.asarray(a) != 0.5).all()
  for part in frozen:
    for leaf in jax.tree.leaves(found[part]):
      np.testing.assert_array_equal(leaf, np.full(leaf.shape, 0.5))
  # Nor are there moments of what is frozen.
  size = sum(x.size for x in jax.tree.leaves(rule.init(params)))
  rest = {k: params[k] for k in moved}
  assert size == sum(x.size for x in jax.tree.leaves(alone.init(rest)))


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_adapters_move_as_if_alone_with_the_value_head(name):
  adapters = {"lora_a": jnp.full((2, 1), 0.5), "lora_b": jnp.full((1, 2), 0.5)}
  kernel = {"kernel": jnp.full((2, 2), 0.5)}
  params = {
    "trunk": {"embedding": kernel["kernel"], "layer_0": {"out": kernel}},
    "policy_head": kernel,
    "value_head": {"out": kernel},
  }
  small = {
    "trunk": {"layer_0": {"out": adapters}},
    "value_head": {"out": kernel},
  }
  params["trunk"]["layer_0"] = {"out": kernel | adapters}
  options = {"name": name, "learning_rate": 0.1, "weight_decay": 0.1}
  rule = optimizers.make_optimizer(trainable="adapters", **options)
  alone = optimizers.make_optimizer(**options)
  found = run(rule, params, [jax.tree.map(lambda x: 3.0 * x, params)] * 2)
  want = run(alone, small, [jax.tree.map(lambda x: 3.0 * x, small)] * 2)
  product = found["trunk"]["layer_0"]["out"]
  moved = want["trunk"]["layer_0"]["out"]
  pairs = [(product[k], moved[k]) for k in adapters]
  pairs.append(
    (found["value_head"]["out"]["kernel"], want["value_head"]["out"]["kernel"])
  )
  for a, b in pairs:
    np.testing.assert_allclose(a, b, rtol=1e-6)
    assert (np.asarray(a) != 0.5).all()
  for frozen in (
    product["kernel"],
    found["trunk"]["embedding"],
    found["policy_head"]["kernel"],
  ):
    np.testing.assert_array_equal(frozen, np.full((2, 2), 0.5))
  # Muon leaves the factors to adamw, whose first change is the rate.
  state = rule.init(params)
  sizes = [
    sum(x.size for x in jax.tree.leaves(s)) for s in (state, alone.init(small))
  ]
  assert sizes[0] == sizes[1]
  with pytest.raises(ValueError, match="set network.lora_rank"):
    rule.init(params | {"trunk": {"layer_0": {"out": kernel}}})


def test_adapters_decay_and_are_no_matrices_to_muon():
  params = {"trunk": {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 3))}}
  nothing = jax.tree.map(jnp.zeros_like, params)
  options = {"learning_rate": 0.1, "weight_decay": 0.5}
  for name, left in (("adamw", 0.95), ("lion", 0.95), ("muon", 1.0)):
    rule = optimizers.make_optimizer(name=name, **options)
    moved = run(rule, params, [nothing])
    for leaf in jax.tree.leaves(moved):
      np.testing.assert_allclose(leaf, np.full(leaf.shape, left), rtol=1e-6)


def test_clipping_is_that_of_optax():
  grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
  for limit in (1.0, 5.0, 7.0):
    rule, oracle = optimizers._clip(limit), optax.clip_by_global_norm(limit)
    found, expected = (
      r.update(grads, r.init(grads))[0] for r in (rule, oracle)
    )
    for name in grads:
      np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)
  nothing = jax.tree.map(jnp.zeros_like, grads)
  found, _ = optimizers._clip(1.0).update(nothing, optax.EmptyState())
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(found))
