"""Weights of a tree's steps, by hand."""

import numpy as np

from o1jax.searched import FoundSolution, Searched, step_weights
from o1jax.types import Problem


def test_a_step_shared_with_a_cut_off_solution_keeps_its_weight():
  # The root has 1 and 2, node 1 has 3 (cut off), 4 and 5.
  nodes = {
    "parent": np.array([-1, 0, 0, 1, 1, 1]),
    "depth": np.array([0, 1, 1, 2, 2, 2]),
    "num_visits": np.array([9, 6, 2, 2, 3, 0]),
    "lengths": np.array([0, 2, 1, 1, 1, 1]),
    "is_valid": np.ones(6, bool),
  }

  def solution(node, is_finished):
    nothing = np.zeros(3, np.float32)
    return FoundSolution(
      node, "", (1, node), nothing, nothing, nothing, is_finished, 0.0, 0
    )

  solutions = [solution(3, False), solution(4, True), solution(5, True)]
  one = Searched(Problem("toy/0", "toy", "", {}), solutions, None, nodes, {})
  weights = step_weights(one)
  assert list(weights) == [4, 5]
  np.testing.assert_allclose(weights[4], [6 / 8, 6 / 8, 3 / 5], rtol=1e-6)
  np.testing.assert_array_equal(weights[5], 0)
