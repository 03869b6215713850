"""Guidance: how good a search thinks a candidate is, from what is known of it.

A guidance is a function from `Signals` to one score a candidate, higher for
better; a search compares scores and never asks where they come from. Scores
are in [0, 1] except log_prob, which is bounded by `LEAST`. A config names
guidances with weights, and their weighted mean guides; a function of one's own
(a reward model) joins under a name of its own (Section 5.1 of the paper).
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import struct

from o1jax.search.selection import named


@struct.dataclass
class Signals:
  """What is known of texts that end with a candidate; all `[...]`.

  Attributes:
    value: the value head after the last token.
    log_prob: natural log-prob of the solution so far under the policy.
    num_tokens: tokens of the solution so far, at least 1.
    confidence: sum over these of the token's probability among the five
      likeliest ones; None where the policy was not asked for it.
    entropy: sum over these of the entropy drawn from, in nats, or None.
    hidden: `[..., D]` the network's last hidden state.
    self_evaluation: how surely the policy, asked in writing, calls a finished
      candidate right; the value head's score of an unfinished one, of which it
      cannot be asked. None where it was not asked.
  """

  value: jax.Array
  log_prob: jax.Array
  num_tokens: jax.Array
  confidence: jax.Array | None
  entropy: jax.Array | None
  hidden: jax.Array
  self_evaluation: jax.Array | None = None


Guidance = Callable[[Signals], jax.Array]


def value(signals: Signals) -> jax.Array:
  """The value head: expected return."""
  return signals.value


def log_prob(signals: Signals) -> jax.Array:
  """Log-prob of the whole text, at least -100: beam search by likelihood."""
  return jnp.maximum(signals.log_prob, LEAST["log_prob"])


def mean_prob(signals: Signals) -> jax.Array:
  """Geometric mean of the tokens' probabilities: likelihood, length apart."""
  return jnp.exp(signals.log_prob / signals.num_tokens)


def confidence(signals: Signals) -> jax.Array:
  """Mean probability of a token among its five likeliest alternatives.

  Marco-o1, arXiv 2411.14405, Eqs. 1 and 2.
  """
  assert signals.confidence is not None
  return signals.confidence / signals.num_tokens


def certainty(signals: Signals) -> jax.Array:
  """exp(-mean entropy of the tokens): 1 where the policy never hesitated."""
  assert signals.entropy is not None
  return jnp.exp(-signals.entropy / signals.num_tokens)


def self_evaluation(signals: Signals) -> jax.Array:
  """P(yes) of the verdict that the policy writes; see o1jax/self_evaluation.py.

  Kadavath et al., arXiv 2207.05221.
  """
  assert signals.self_evaluation is not None
  return signals.self_evaluation


GUIDANCES: Mapping[str, Guidance] = {
  "value": value,
  "log_prob": log_prob,
  "mean_prob": mean_prob,
  "confidence": confidence,
  "certainty": certainty,
  "self_evaluation": self_evaluation,
}
# Those that need what the policy only computes on demand.
OF_TOKENS = ("confidence", "certainty")
# The lowest score, which a solution that was cut off gets, where it is not 0.
LEAST = {"log_prob": -100.0}


def weighted_mean(
  weights: Mapping[str, float],
  functions: Mapping[str, Guidance] | None = None,
) -> tuple[Guidance, float]:
  """The guidance that a config names, and its lowest score.

  Args:
    weights: by name, relative to each other; 0 leaves a guidance out.
    functions: guidances of one's own by name, with scores in [0, 1].

  Raises:
    ValueError: an unknown name, a weight below 0, or none above 0.
  """
  known = {**GUIDANCES, **(functions or {})}
  for name, weight in weights.items():
    named("guidance", name, known)
    if not 0 <= weight < float("inf"):
      raise ValueError(f"guidance.{name}={weight}: give a weight of 0 or more")
  names = sorted(name for name, weight in weights.items() if weight)
  if not names:
    raise ValueError("guidance has no weight above 0: set guidance.value=1.0")

  total = sum(weights[name] for name in names)
  share = {name: weights[name] / total for name in names}

  def guide(signals: Signals) -> jax.Array:
    # In the order of the names, so that equal weights give equal bits.
    parts = [share[name] * known[name](signals) for name in names]
    return sum(parts[1:], parts[0])

  least = sum(share[name] * LEAST.get(name, 0.0) for name in names)
  return guide, least
