"""Number features, starting values, and the heads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.policy.config import TransformerConfig
from o1jax.policy.network import (
  make_network,
  next_token_log_probs,
  number_features,
  selected_log_probs,
)

VALUES = np.full(70, np.nan)
VALUES[5:65] = np.arange(60)


def make_config(**fields):
  sizes = {
    "vocab_size": 70,
    "num_layers": 1,
    "width": 48,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_width": 8,
    "ffn_width": 16,
  }
  return TransformerConfig(**sizes, **fields)


def test_number_embeddings_lie_in_the_span_of_their_features():
  network = make_network(make_config(number_features=True), VALUES)
  found = network.init(jax.random.key(0))["trunk"]["embedding"]
  plain = make_network(make_config()).init(jax.random.key(0))
  plain = plain["trunk"]["embedding"]
  rows = np.asarray(found[5:65], np.float64)
  size = np.sqrt((rows**2).mean(1))
  np.testing.assert_allclose(size, np.std(plain), rtol=1e-3)
  rank = number_features(VALUES[5:65]).shape[1]
  assert np.linalg.matrix_rank(rows, tol=1e-3) <= rank < 48
  assert np.linalg.matrix_rank(np.asarray(plain[5:65]), tol=1e-3) == 48
  np.testing.assert_array_equal(found[:5], plain[:5])
  np.testing.assert_array_equal(found[65:], plain[65:])


def test_features_tell_size_and_remainders():
  features = number_features(np.arange(120))
  assert np.allclose(features[:, 0], np.log1p(np.arange(120)))
  even = np.isclose(features[:, 2], 1)  # cosine of period 2
  assert even.tolist() == [v % 2 == 0 for v in range(120)]
  assert len(np.unique(features.round(6), axis=0)) == 120


def test_features_need_values_of_this_vocabulary():
  with pytest.raises(ValueError, match=r"shape \(70,\), got None"):
    make_network(make_config(number_features=True))
  with pytest.raises(ValueError, match=r"got \(9,\)"):
    make_network(make_config(number_features=True), np.zeros(9))


@pytest.mark.parametrize(
  "tied, hidden_width, num_bins", [(False, 5, 0), (True, 0, 3)]
)
def test_start(tied, hidden_width, num_bins):
  config = make_config(
    tied_embeddings=tied,
    value_hidden_width=hidden_width,
    value_bins=num_bins,
  )
  network = make_network(config)
  params = network.init(jax.random.key(1))
  assert isinstance(params, dict)
  assert bool(params["policy_head"]) != tied
  hidden = jax.random.normal(jax.random.key(2), (3, 48))
  np.testing.assert_array_equal(network.value(params, hidden), np.full(3, 0.5))
  assert network.policy_logits(params, hidden).shape == (3, 70)
  # Spreads: logits and projections of unit inputs have about unit size.
  trunk = params["trunk"]
  want = 48**-0.5 if tied else 1.0
  assert np.std(trunk["embedding"]) == pytest.approx(want, rel=0.1)
  layer = trunk["layer_0"]
  assert np.std(layer["qkv"]["kernel"]) == pytest.approx(48**-0.5, rel=0.1)
  assert np.std(layer["down"]["kernel"]) == pytest.approx(32**-0.5, rel=0.1)
  assert (np.asarray(layer["mlp_norm"]["scale"]) == 1).all()


def test_selected_log_probs_and_their_gradient():
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 2, (4, 3, 11)).astype(np.float32)
  tokens = rng.integers(0, 11, (4, 3))
  whole = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  want = np.take_along_axis(whole, tokens[..., None], -1)[..., 0]
  np.testing.assert_allclose(
    selected_log_probs(logits, tokens), want, atol=1e-5
  )
  gradient = jax.grad(lambda x: selected_log_probs(x, tokens).sum())(
    jnp.asarray(logits)
  )
  onehot = np.eye(11)[tokens]
  np.testing.assert_allclose(gradient, onehot - np.exp(whole), atol=1e-5)


def test_the_entropy_is_that_of_the_next_token():
  network = make_network(make_config(value_hidden_width=5))
  params = network.init(jax.random.key(3))
  rng = np.random.default_rng(4)
  tokens = rng.integers(0, 70, (3, 6)).astype(np.int32)
  lengths = np.array([6, 3, 0], np.int32)
  index = np.broadcast_to(np.arange(6, dtype=np.int32), tokens.shape)
  # Far from even, or every entropy would be about log 70.
  params["policy_head"]["kernel"] *= 4

  @jax.jit
  def logits_fn(params):
    hidden, _ = network.apply(params, tokens, index)
    return network.policy_logits(params, hidden)

  logits = np.asarray(logits_fn(params), np.float64)
  probs = np.exp(logits - logits.max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)
  want = -(probs * np.log(probs)).sum(-1)
  assert want.std() > 0.1
  is_known = index + 1 < lengths[:, None]
  found_fn = jax.jit(
    functools.partial(next_token_log_probs, network, with_entropy=True)
  )
  _, _, entropies = found_fn(params, tokens, lengths)
  expected = np.where(is_known, want, 0)
  np.testing.assert_allclose(entropies, expected, atol=1e-4)
