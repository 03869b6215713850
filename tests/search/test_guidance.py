"""Guidances against their formulas, and their weighted mean."""

import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.search import guidance
from o1jax.search.guidance import Signals, weighted_mean

SIGNALS = Signals(
  value=jnp.array([0.25, 0.5]),
  log_prob=jnp.array([-2.0, -400.0]),
  num_tokens=jnp.array([4, 8]),
  confidence=jnp.array([3.0, 2.0]),
  entropy=jnp.array([1.0, 16.0]),
  hidden=jnp.array([[1.0, 2.0], [3.0, 4.0]]),
)


@pytest.mark.parametrize(
  "name, expected",
  [
    ("value", [0.25, 0.5]),
    ("log_prob", [-2.0, -100.0]),
    ("mean_prob", np.exp([-0.5, -50.0])),
    ("confidence", [0.75, 0.25]),
    ("certainty", np.exp([-0.25, -2.0])),
  ],
)
def test_each_guidance_is_its_formula(name, expected):
  guide, least = weighted_mean({name: 1.0})
  np.testing.assert_allclose(guide(SIGNALS), expected, rtol=1e-6)
  assert np.all(np.asarray(guide(SIGNALS)) >= least)


def test_weights_are_relative_and_functions_join():
  guide, least = weighted_mean(
    {"value": 2.0, "own": 0.5, "log_prob": 0.1, "certainty": 0.0},
    {"own": lambda signals: signals.hidden[..., 0]},
  )
  expected = 2 * np.array([0.25, 0.5]) + 0.5 * np.array([1.0, 3.0])
  expected += 0.1 * np.array([-2.0, -100.0])
  np.testing.assert_allclose(guide(SIGNALS), expected / 2.6, rtol=1e-6)
  assert least == pytest.approx(-10.0 / 2.6)


@pytest.mark.parametrize(
  "weights, message",
  [
    ({}, "no weight above 0"),
    ({"value": 0.0}, "no weight above 0"),
    ({"valu": 1.0}, "unknown guidance 'valu'; did you mean 'value'?"),
    ({"value": -1.0}, "guidance.value=-1.0: give a weight of 0 or more"),
  ],
)
def test_bad_weights_say_what_to_change(weights, message):
  with pytest.raises(ValueError, match=message):
    weighted_mean(weights)


def test_every_guidance_has_a_name():
  assert set(guidance.OF_TOKENS) | set(guidance.LEAST) < set(guidance.GUIDANCES)
