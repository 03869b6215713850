"""Reading, writing and walking the trees."""

import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.search.tree import (
  NO_NODE,
  NO_PARENT,
  ROOT,
  UNEXPANDED,
  add_children,
  backup,
  make_tree,
  normalize_logits,
  read,
  visit_probs,
  write,
)


@pytest.fixture(scope="module")
def two_trees():
  """The first: root -> 1, 2 and 2 -> 3, 4; the second: root -> 1, 2."""
  tree = make_tree(jnp.array([0.5, 0.25]), capacity=7, num_candidates=2)
  for node, first_child, is_active in (
    ([[ROOT], [ROOT]], [[1], [1]], [[True], [True]]),
    ([[2], [ROOT]], [[3], [7]], [[True], [False]]),
  ):
    shape = (2, 1, 2)
    tree = add_children(
      tree,
      jnp.array(node, jnp.int32),
      jnp.array(first_child, jnp.int32),
      jnp.array(is_active),
      prior_logits=jnp.broadcast_to(jnp.array([0.0, 1.0]), shape),
      value=jnp.full(shape, 0.5),
      reward=jnp.broadcast_to(jnp.array([0.0, 0.3]), shape),
      is_terminal=jnp.zeros(shape, bool),
      is_solution=jnp.zeros(shape, bool),
      is_valid=jnp.broadcast_to(jnp.array([True, node[0] != [2]]), shape),
    )
  return tree


def test_children_are_written_where_active(two_trees):
  tree = two_trees
  no = NO_PARENT
  np.testing.assert_array_equal(
    tree.parent, [[no, 0, 0, 2, 2, no, no], [no, 0, 0, no, no, no, no]]
  )
  np.testing.assert_array_equal(
    tree.depth, [[0, 1, 1, 2, 2, 0, 0], [0, 1, 1, 0, 0, 0, 0]]
  )
  assert int(tree.first_child[0, 2]) == 3
  np.testing.assert_array_equal(tree.first_child[:, ROOT], [1, 1])
  assert np.sum(np.asarray(tree.first_child) != UNEXPANDED) == 3
  np.testing.assert_array_equal(tree.next_free, [5, 3])
  np.testing.assert_array_equal(
    np.sum(np.asarray(tree.is_valid), axis=-1), [4, 3]
  )
  # Of one valid candidate the prior is 1, of two it is normalised.
  np.testing.assert_allclose(tree.prior_logits[0, 3], 0.0, atol=1e-7)
  np.testing.assert_allclose(
    np.sum(np.exp(np.asarray(tree.prior_logits[0, 1:3]))), 1.0, rtol=1e-6
  )


def test_a_block_without_valid_candidates_leaves_the_next_its_priors():
  tree = make_tree(jnp.array([0.5]), capacity=5, num_candidates=2, max_blocks=2)
  zeros, no = jnp.zeros((1, 1, 2)), jnp.zeros((1, 1, 2), bool)
  for first_child, is_valid in ((1, False), (3, True)):
    tree = add_children(
      tree,
      jnp.array([[ROOT]]),
      jnp.array([[first_child]]),
      jnp.array([[True]]),
      prior_logits=jnp.log(jnp.array([[[3.0, 1.0]]])),
      value=zeros,
      reward=zeros,
      is_terminal=no,
      is_solution=no,
      is_valid=no | is_valid,
    )
  np.testing.assert_array_equal(tree.is_valid, [[1, 0, 0, 1, 1]])
  prior = np.exp(np.asarray(tree.prior_logits))[0, 1:]
  np.testing.assert_allclose(prior, [0, 0, 0.75, 0.25], rtol=1e-6)


def test_backup_is_a_mean_on_the_path(two_trees):
  discount = 0.5
  tree = two_trees
  returns = {node: [] for node in range(5)}
  returns[ROOT].append(0.5)
  parent = {1: 0, 2: 0, 3: 2, 4: 2}
  reward = {0: 0.0, 1: 0.0, 2: 0.3, 3: 0.0, 4: 0.3}
  for leaf, value in ((1, 0.5), (2, 0.8), (3, 0.1), (4, 0.9), (3, 0.2)):
    tree = backup(
      tree,
      jnp.array([leaf, 1]),
      jnp.array([value, 1.0]),
      jnp.array([True, False]),
      discount=discount,
    )
    node, returned = leaf, value
    while True:
      returns[node].append(returned)
      if node == ROOT:
        break
      node, returned = parent[node], reward[node] + discount * returned
  for node, seen in returns.items():
    assert int(tree.num_visits[0, node]) == len(seen)
    np.testing.assert_allclose(
      tree.mean_value[0, node], np.mean(seen), rtol=1e-6
    )
  np.testing.assert_array_equal(tree.num_visits[1], two_trees.num_visits[1])
  np.testing.assert_array_equal(tree.mean_value[1], two_trees.mean_value[1])
  # Node 4 is an invalid candidate: its visits do not count.
  np.testing.assert_allclose(
    visit_probs(tree, jnp.array([2, 1])), [[1.0, 0.0], [0.0, 0.0]]
  )
  np.testing.assert_allclose(
    visit_probs(tree, jnp.array([ROOT, ROOT]))[0], [0.2, 0.8], rtol=1e-6
  )


@pytest.mark.parametrize("depth", [3, 4, 8, 9])
def test_backup_climbs_a_long_path(depth):
  """A chain, whose lower end and middle are backed up in turn."""
  discount = 0.5
  tree = make_tree(jnp.zeros((2,)), capacity=10, num_candidates=1)
  chain = jnp.broadcast_to(jnp.arange(10, dtype=jnp.int32), (2, 10))
  tree = tree.replace(parent=chain - 1, depth=chain, reward=0.1 * chain)
  expected = np.zeros(10)
  returned = 1.0
  for node in range(depth, -1, -1):
    expected[node] = returned
    returned = 0.1 * node + discount * returned
  tree = backup(
    tree,
    jnp.array([depth, 2]),
    jnp.array([1.0, 0.0]),
    jnp.array([True, True]),
    discount=discount,
  )
  visits = (np.arange(10) <= depth).astype(np.int32)
  visits[ROOT] += 1
  np.testing.assert_array_equal(tree.num_visits[0], visits)
  expected[ROOT] /= 2
  np.testing.assert_allclose(tree.mean_value[0], expected, rtol=1e-6)
  np.testing.assert_array_equal(tree.num_visits[1], [2, 1, 1] + [0] * 7)


def test_no_node_reads_the_root_and_writes_nothing():
  array = jnp.array([[1, 2, 3], [4, 5, 6]])
  node = jnp.array([[2, NO_NODE], [3, 0]])
  np.testing.assert_array_equal(read(array, node)[0], [3, 1])
  update = jnp.array([[7, 8], [9, 10]])
  np.testing.assert_array_equal(
    write(array, node, update), [[1, 2, 7], [10, 5, 6]]
  )


def test_logits_normalise_over_the_valid_ones():
  logits = jnp.array([1.0, 5.0, 2.0])
  normal = normalize_logits(logits, jnp.array([True, False, True]))
  expected = np.exp([1.0, 2.0]) / np.sum(np.exp([1.0, 2.0]))
  np.testing.assert_allclose(
    np.exp(np.asarray(normal)), [expected[0], 0.0, expected[1]], rtol=1e-6
  )
  nothing = normalize_logits(logits, jnp.zeros(3, bool))
  assert np.all(np.isfinite(nothing))
