"""Votes over answers."""

import pytest

from o1jax.search.voting import vote


@pytest.mark.parametrize(
  "answers, weights, winner",
  [
    ([], None, None),
    ([None, None], None, None),
    (["4"], None, "4"),
    (["4", "5", "5"], None, "5"),
    (["4", "5"], None, "4"),
    ([None, "5", None, None], None, "5"),
    (["4", "5", "5"], [0.9, 0.3, 0.3], "4"),
    (list("bbbaaa"), [0.3, 0.2, 0.1, 0.1, 0.2, 0.3], "b"),
    (["4", "5"], [-2.0, -1.0], "5"),
  ],
)
def test_the_greatest_sum_wins_and_the_first_of_equals(
  answers, weights, winner
):
  assert vote(answers, weights) == winner


def test_bad_weights_are_refused():
  with pytest.raises(ValueError, match="2 answers with 1 weights"):
    vote(["4", "5"], [1.0])
  with pytest.raises(ValueError, match="weight nan of answer '4'"):
    vote(["4"], [float("nan")])
