"""What a step is, from the sizes of a task's format."""

import pytest

from o1jax.encoding import Lengths
from o1jax.step_shape import (
  StepShape,
  parts_of_solutions,
  revisions,
  whole_solutions,
)

LENGTHS = Lengths(prompt_tokens=4, step_tokens=6, num_steps=3, row_tokens=22)


def test_every_granularity_has_room_for_the_same_solution():
  parts = [
    parts_of_solutions(LENGTHS, name, delimiter_id=9)
    for name in ("step", "segment", "token")
  ]
  for shape in (whole_solutions(LENGTHS), *parts):
    assert shape.max_step_tokens * shape.max_depth == 18
    assert shape.max_step_tokens + shape.max_tokens_behind == 18
  assert [shape.stop_ids for shape in parts] == [(9,), (), ()]
  assert [shape.goes_on_where_cut for shape in parts] == [False, True, True]
  assert [shape.enumerates for shape in parts] == [False, False, True]


def test_a_revision_has_room_for_opening_criticism_and_solution():
  shape = revisions(LENGTHS, (4, 5), num_revisions=2)
  assert shape.max_step_tokens == 2 + 6 + 18
  assert shape.max_depth == 3 and shape.revises
  assert not whole_solutions(LENGTHS).revises


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"max_depth": 0}, "max_depth=0"),
    ({"max_step_tokens": 0}, "max_step_tokens=0"),
    ({"opening": (4,), "stop_ids": (3,)}, "leave stop_ids"),
    ({"opening": (4,), "enumerates": True}, "leave stop_ids"),
    ({"opening": (4,) * 6}, "no room behind the 6 tokens of the opening"),
  ],
)
def test_what_does_not_fit_is_refused(fields, words):
  with pytest.raises(ValueError, match=words):
    StepShape(**{"max_step_tokens": 6, "max_depth": 2} | fields)


def test_unknown_names_and_numbers_are_refused():
  with pytest.raises(ValueError, match="granularity='word': choose one of"):
    parts_of_solutions(LENGTHS, "word", delimiter_id=9)
  with pytest.raises(ValueError, match="num_revisions=-1 must be 0 or more"):
    revisions(LENGTHS, (4,), num_revisions=-1)
