"""Adapters from the config to a run, and from one run to another."""

import jax
import numpy as np
import pytest

from o1jax import build, iterate, load
from o1jax import config as config_lib
from o1jax import mesh as mesh_lib
from o1jax.policy import pretrained
from policies import tiny_config, tiny_workdir

pytestmark = pytest.mark.usefixtures("quick_programs")

ADAPTERS = ("network.lora_rank=2", "learn.optimizer.trainable=adapters")


def leaves_of(params):
  leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(params))
  return {
    jax.tree_util.keystr(place, simple=True, separator="/"): leaf
    for place, leaf in leaves
  }


def parts_of(workdir, *changed):
  config = tiny_config(*changed)
  return build.build(config, workdir, mesh_lib.make_mesh({"data": 2}))


def test_a_run_moves_the_adapters_alone(tmp_path):
  config = tiny_config(
    *ADAPTERS,
    "initialize.num_updates=6",
    "num_iterations=0",
    "evaluation.interval=0",
    "mesh.data=1",
    "mesh.fsdp=2",
    "mesh.tensor=2",
  )
  config.evaluation.strategies = ()  # greedy alone
  workdir = tmp_path / "run"
  params = iterate.run(config, workdir).params
  parts = build.build(config, workdir, mesh_lib.make_mesh({}))
  start = leaves_of(iterate.first_params(config, parts))
  for name, leaf in leaves_of(params).items():
    # Values are not learned in this phase: only the head's kernels decay.
    if not name.startswith("value_head"):
      is_moved = not np.array_equal(leaf, start[name])
      assert is_moved == ("lora" in name), name
  # What is saved is read again, from the workdir and from a folder.
  trained = load.from_workdir(workdir)
  card = {"config": config.to_dict(), "versions": {}, "iteration": 0}
  folder = tmp_path / "policy"
  model = trained.policy.tokenizer.to_bytes()
  pretrained.save(folder, trained.params, model, card)
  found, again = leaves_of(trained.params), load.from_path(str(folder)).params
  assert found.keys() == start.keys()
  for name, leaf in leaves_of(again).items():
    np.testing.assert_array_equal(leaf, found[name])


def test_adapters_need_a_rank(tmp_path):
  words = (
    "trainable='adapters', but the network has none: set network.lora_rank"
  )
  with pytest.raises(config_lib.UserError, match=words):
    parts_of(tmp_path, "learn.optimizer.trainable=adapters")


def begin(path, workdir, *changed):
  """Fresh parameters of a run, and those with which it begins."""
  network = parts_of(workdir, f"initialize.path={path}", *changed).policy
  fresh = network.network.init(jax.random.key(7))
  return fresh, load.first_params(str(path), network, fresh)


def test_adapters_may_begin_beside_the_policy_of_another(tmp_path):
  base = tmp_path / "base"
  tiny_workdir(base, 1)
  fresh, params = begin(base, tmp_path / "run", *ADAPTERS)
  old, new = leaves_of(load.from_path(str(base)).params), leaves_of(params)
  assert jax.tree.structure(params) == jax.tree.structure(fresh)
  for name, leaf in new.items():
    is_fresh = "lora" in name
    expected = leaves_of(fresh)[name] if is_fresh else old[name]
    np.testing.assert_array_equal(leaf, expected)
  assert len(new) > len(old)
  assert not np.array_equal(
    new["trunk/embedding"], leaves_of(fresh)["trunk/embedding"]
  )


@pytest.mark.parametrize(
  "changed, words",
  [
    (
      ("network.lora_rank=4",),
      "has adapters of lora_rank=2, lora_alpha=16.0, this config has "
      "lora_rank=4",
    ),
    (("network.lora_rank=0",), "this config has lora_rank=0"),
    (("network.lora_alpha=4.0",), "lora_alpha=16.0, this config has .*=4.0"),
  ],
)
def test_adapters_of_another_kind_are_refused(changed, words, tmp_path):
  parts = parts_of(tmp_path, "network.lora_rank=2")
  params = parts.policy.network.init(jax.random.key(0))
  config = tiny_config("network.lora_rank=2")
  card = {"config": config.to_dict(), "versions": {}, "iteration": 0}
  folder = tmp_path / "policy"
  pretrained.save(folder, params, parts.policy.tokenizer.to_bytes(), card)
  _, same = begin(folder, tmp_path / "run", "network.lora_rank=2")
  jax.tree.map(np.testing.assert_array_equal, same, params)
  with pytest.raises(config_lib.UserError, match=words):
    begin(folder, tmp_path / "run", "network.lora_rank=2", *changed)
