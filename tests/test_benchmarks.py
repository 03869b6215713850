"""The benchmarks run at tiny sizes, and their peers do what they stand for."""

import importlib
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.search.driver import run_on_device
from o1jax.search.mcts import mcts
from o1jax.types import ProblemBatch

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"
TINY = {
  "generation": "--size=tiny --prompts=2 --prompt=3 --new=4 --peers=naive_jax",
  "training": "--size=tiny --rows=2 --length=5 --microbatches=2"
  " --peers=plain_jax",
  "uneven_lengths": "--size=tiny --jobs=4 --slots=2 --prompt=3 --new=6"
  " --mean=3",
  "expansion": "--size=tiny --trees=2 --children=2 --prompt=3 --step=2"
  " --depths=2 --nodes=3",
  "tree_search": "--size=tiny --trees=2 --expansions=2 --children=2 --depth=2"
  " --step=2 --prompt=3 --names=ours,mctx,host_tree",
  "search_bookkeeping": "--rules=puct --trees=2 --candidates=2 --simulations=3",
  "on_policy": "--size=tiny --prompts=2 --group=2 --prompt=3 --new=4"
  " --peers=plain_jax",
  "compile_times": "--sizes=tiny --programs=rows,update --prompts=2 --prompt=4"
  " --children=2 --new=3",
}


@pytest.fixture(autouse=True)
def as_if_by_hand(monkeypatch):
  """Peers are not held to our strictness, and nobody has to be fast."""
  monkeypatch.syspath_prepend(str(FOLDER))
  cache = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_disable_most_optimizations", True)
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # other processes
  with jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
    yield
  jax.config.update("jax_disable_most_optimizations", False)
  jax.config.update("jax_enable_compilation_cache", cache)


@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_runs_and_prints_lines_and_a_table(name, capsys):
  options = ["--clock=wall", *TINY[name].split()]
  if name != "compile_times":
    options.append("--repeats=1")
  importlib.import_module(name).main(options)
  printed = capsys.readouterr().out.splitlines()
  lines = [json.loads(line) for line in printed if line.startswith("{")]
  assert {"machine", "cores", "jax", "load"} <= lines[0].keys()
  assert all(line["benchmark"] == name for line in lines[1:])
  assert not any("skipped" in line for line in lines)
  assert sum(line.startswith("| tiny") for line in printed) + sum(
    line.startswith("| puct") for line in printed
  ) == len(lines[1:])


def test_every_benchmark_is_tried():
  scripts = {
    path.stem
    for path in FOLDER.glob("*.py")
    if "def main(argv" in path.read_text()
  }
  assert scripts == TINY.keys()


def test_a_ratio_is_the_median_over_rounds_for_one_amount():
  common = importlib.import_module("common")
  series = {"ours": [1.0, 2.0, 4.0], "peer": [3.0, 4.0, 40.0]}
  amounts = {"ours": 10.0, "peer": 5.0}
  assert common.ratio(series, "peer", "ours", amounts) == 6.0


def test_a_python_without_the_peer_says_so(tmp_path):
  python = tmp_path / "python"
  # Without site packages.
  python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')
  python.chmod(0o755)
  peer = importlib.import_module("on_policy").Peer
  with pytest.raises(ImportError, match="No module named"):
    peer("trl", str(python), {"clock": "wall"})


def test_a_peer_that_has_ended_says_so():
  kind = importlib.import_module("on_policy").Peer
  peer = kind.__new__(kind)
  pipe = subprocess.PIPE
  peer._process = subprocess.Popen(
    [sys.executable, "-S", "-c", ""], stdin=pipe, stdout=pipe, text=True
  )
  peer._process.wait()
  with pytest.raises(RuntimeError, match="a peer ended"):
    peer.step()
  peer.close()


def test_a_full_copy_per_node_searches_the_same_tree():
  common = importlib.import_module("common")
  copied_cache = importlib.import_module("copied_cache")
  fixed_steps = importlib.import_module("fixed_steps")
  network, params = common.random_network("tiny")
  sizes = dict(num_candidates=2, step_tokens=3, max_depth=3)
  problems = ProblemBatch(
    tokens=common.random_prompts("tiny", 2, 4),
    lengths=jnp.full((2,), 4, jnp.int32),
    seeds=jnp.arange(2, dtype=jnp.uint32),
  )

  def searched(model):
    search = run_on_device(mcts(model, num_simulations=12))
    return search(params, jax.random.key(0), problems)

  ours = searched(fixed_steps.fixed_step_model(network, memory="tree", **sizes))
  copy = searched(copied_cache.copy_step_model(network, **sizes))
  count = int(ours.tree.next_free.min())
  assert count > 6 and int(ours.node_state.depth.max()) == 3
  np.testing.assert_array_equal(ours.tree.num_visits, copy.tree.num_visits)
  np.testing.assert_array_equal(
    ours.node_state.tokens[:, :count], copy.node_state[1][:, :count]
  )


def test_the_python_tree_expands_what_its_rule_prefers():
  python_tree = importlib.import_module("python_tree")
  worth = {5: 0.9, 6: 0.1}

  def sampler(sequences):
    steps = [[[5], [6]] for _ in sequences]
    return steps, np.array([[worth[5], worth[6]] for _ in sequences])

  (root,) = python_tree.search(sampler, [[1, 2]], num_expansions=3, max_depth=3)
  good, bad = root.children
  assert (root.num_visits, good.num_visits, bad.num_visits) == (6, 5, 1)
  assert good.children[0].sequence() == [1, 2, 5, 5]
  assert abs(root.total - 3 * (worth[5] + worth[6])) < 1e-9
