"""A network, an optimizer and rows so small that updates can be counted out.

The network averages what stands before a position: enough for positions to
depend on each other, and on nothing behind them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from o1jax.learning import optimizer as optimizers
from o1jax.types import LearnerBatch, PolicyGradientBatch, PreferenceBatch

VOCAB, WIDTH, ROWS, LENGTH = 7, 4, 8, 6


def log_probs_fn(params, tokens, lengths):
  del lengths  # Causal: what stands behind a row's end changes nothing in it.
  log_probs, _, value_logits = _whole(params, tokens)
  return log_probs, value_logits


def with_entropy_fn(params, tokens, lengths):
  """As `log_probs_fn`, with the entropy of the next token."""
  del lengths
  log_probs, whole, value_logits = _whole(params, tokens)
  entropies = -jnp.sum(jnp.exp(whole) * whole, axis=2)
  return log_probs, value_logits, entropies


def _whole(params, tokens):
  embedded = params["trunk"]["embedding"][tokens]
  count = jnp.arange(1, tokens.shape[1] + 1, dtype=embedded.dtype)
  hidden = jnp.cumsum(embedded, axis=1) / count[None, :, None]
  hidden = jnp.tanh(hidden @ params["hidden"] + params["bias"][None, None, :])
  whole = jax.nn.log_softmax(hidden @ params["policy_head"]["kernel"])
  following = jnp.roll(tokens, -1, axis=1)[:, :, None]
  log_probs = jnp.take_along_axis(whole, following, axis=2)[:, :, 0]
  return log_probs, whole, hidden @ params["value"]


def numpy_forward(params, tokens):
  """The same of one row in NumPy: `(log_probs [T, V], value_logits [T])`.

  In bins the value's logits are `[T, K]`.
  """
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  embedded = params["trunk"]["embedding"][tokens]
  count = np.arange(1, len(tokens) + 1)[:, None]
  hidden = np.cumsum(embedded, axis=0) / count
  hidden = np.tanh(hidden @ params["hidden"] + params["bias"])
  logits = hidden @ params["policy_head"]["kernel"]
  log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  return log_probs, hidden @ params["value"]


def next_log_probs(params, tokens):
  """Log-probs `[B, T]` of the tokens that follow, by `numpy_forward`."""
  rows = [
    numpy_forward(params, row)[0][np.arange(len(row)), np.roll(row, -1)]
    for row in tokens
  ]
  return np.array(rows)


def make_params(num_bins=0):
  """Parameters; `num_bins` of the value, 0 for one logit."""
  rng = np.random.default_rng(2)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  # Two of the names stand in the sharding table.
  return {
    "trunk": {"embedding": draw(VOCAB + 1, WIDTH)},
    "hidden": draw(WIDTH, WIDTH),
    "bias": draw(WIDTH),
    "policy_head": {"kernel": draw(WIDTH, VOCAB)},
    "value": draw(WIDTH, num_bins) if num_bins else draw(WIDTH),
  }


def make_batch(seed=3):
  """Rows of very different lengths: every microbatch has other weights."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(2, LENGTH + 1, ROWS)
  lengths[0], lengths[1] = 0, LENGTH
  inside = np.arange(LENGTH)[None, :] < lengths[:, None]
  predicting = np.arange(LENGTH)[None, :] < lengths[:, None] - 1
  shape = (ROWS, LENGTH)
  return LearnerBatch(
    tokens=(rng.integers(1, VOCAB, shape) * inside).astype(np.int32),
    lengths=lengths.astype(np.int32),
    policy_weights=(rng.uniform(size=shape) * predicting).astype(np.float32),
    value_targets=rng.uniform(size=shape).astype(np.float32),
    value_weights=inside.astype(np.float32),
  )


def make_drawn(seed=5):
  """Rows with advantages, drawn by a policy that is near `make_params`.

  Where a weight is 0 stands NaN.
  """
  batch = make_batch(seed)
  rng = np.random.default_rng(seed)
  shape = batch.tokens.shape
  own = next_log_probs(make_params(), batch.tokens)

  def known(array, weights):
    return np.where(weights != 0, array, np.nan).astype(np.float32)

  policy_weights, value_weights = batch.policy_weights, batch.value_weights
  return PolicyGradientBatch(
    tokens=batch.tokens,
    lengths=batch.lengths,
    policy_weights=policy_weights,
    advantages=known(rng.normal(size=shape), policy_weights),
    behavior_log_probs=known(
      own + 0.4 * rng.normal(size=shape), policy_weights
    ),
    reference_log_probs=known(
      own + 0.4 * rng.normal(size=shape), policy_weights
    ),
    behavior_values=known(rng.uniform(size=shape), value_weights),
    value_targets=known(batch.value_targets, value_weights),
    value_weights=value_weights,
  )


def make_pairs(seed=6):
  """Pairs of rows; the first is empty."""
  rng = np.random.default_rng(seed)
  better, worse = make_batch(seed), make_batch(seed + 1)
  tokens = np.stack([better.tokens, worse.tokens], 1)
  lengths = np.stack([better.lengths, worse.lengths], 1)
  inside = np.arange(LENGTH)[None, None, :] < lengths[:, :, None] - 1
  own = next_log_probs(make_params(), tokens.reshape(-1, LENGTH))
  reference = own.reshape(tokens.shape) + 0.4 * rng.normal(size=tokens.shape)
  pair_weights = rng.uniform(0.5, 1.5, ROWS).astype(np.float32)
  pair_weights[0] = 0
  return PreferenceBatch(
    tokens=tokens,
    lengths=lengths,
    token_weights=inside.astype(np.float32),
    reference_log_probs=np.where(inside, reference, np.nan).astype(np.float32),
    pair_weights=pair_weights,
  )


def make_optimizer(**arguments):
  return optimizers.make_optimizer(
    **{"learning_rate": 0.05, "warmup_updates": 3} | arguments
  )


def assert_close(found, expected, atol=1e-6):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol),
    found,
    expected,
  )
