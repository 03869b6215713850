"""What an update minimizes: the terms of each group of rows, and their weights.

A batch may hold groups of four kinds, and a config mixes them by how many rows
of each it takes:

  LearnerBatch         policy (cloning, AlphaGo Zero) and value
  PolicyGradientBatch  policy_gradient (REINFORCE, actor-critic, PPO, the
                       backward part of BOND), value, and the divergence from
                       a reference
  PreferenceBatch      preference (DPO and its variants)
  PackedBatch          policy (pre-training on documents)

Each term is a mean whose denominator is a sum of weights and known before any
forward pass (`weights`); `sums` gives the numerators, which add over groups,
microbatches and devices. The options of advantages and pairs are the
dataclasses `PolicyGradient` and `Preference`, and fields of a config.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from o1jax.learning import (
  alphazero,
  cloning,
  dpo,
  policy_gradient,
  ppo,
  value_losses,
)
from o1jax.types import (
  LearnerBatch,
  PackedBatch,
  PolicyGradientBatch,
  PreferenceBatch,
)
from o1jax.value_bins import value_of

Group = LearnerBatch | PolicyGradientBatch | PreferenceBatch | PackedBatch
# See `sums`.
LogProbsFn = Callable[..., tuple[jax.Array, ...]]

LOSSES = ("reinforce", "ppo")
IMPORTANCE = ("none", *policy_gradient.LEVELS)


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
  """How rows with advantages are learned from.

  Attributes:
    loss: "reinforce" or "ppo".
    coefficient: weight of the term.
    importance: weights of REINFORCE against the distribution that drew the
      rows: "none", "token" or "sequence". PPO has ratios of its own and takes
      "none".
    max_weight: largest importance weight; 0 truncates none.
    clip_low: PPO; how far a ratio may fall below 1.
    clip_high: PPO; how far a ratio may rise above 1.
    dual_clip: PPO; largest ratio that counts where the advantage is negative;
      0 for no such bound.
    kl_coefficient: weight of the divergence from the reference as a term of the
      loss; 0 leaves it out.
    kl_estimator: "k2" or "k3"; see `ppo.kl_penalty`.
    entropy_coefficient: weight of the entropy bonus; 0 leaves it out.
    max_value_change: largest change of a value that may lower its loss, which
      is the squared error then, unless values are in bins; 0 for the cross
      entropy without a bound.

  Raises:
    ValueError: an option that is unknown, out of range, or not read.
  """

  loss: str = "ppo"
  coefficient: float = 1.0
  importance: str = "none"
  max_weight: float = 0.0
  clip_low: float = 0.2
  clip_high: float = 0.2
  dual_clip: float = 0.0
  kl_coefficient: float = 0.0
  kl_estimator: str = "k3"
  entropy_coefficient: float = 0.0
  max_value_change: float = 0.0

  def __post_init__(self):
    for name, known in (
      ("loss", LOSSES),
      ("importance", IMPORTANCE),
      ("kl_estimator", ppo.ESTIMATORS),
    ):
      if getattr(self, name) not in known:
        raise ValueError(
          f"{name}={getattr(self, name)!r} is unknown; take one of "
          f"{', '.join(known)}"
        )
    for name in (
      "coefficient",
      "max_weight",
      "clip_low",
      "clip_high",
      "kl_coefficient",
      "entropy_coefficient",
      "max_value_change",
    ):
      if getattr(self, name) < 0:
        raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
    if self.dual_clip and self.dual_clip <= 1:
      raise ValueError(
        f"dual_clip={self.dual_clip} must be above 1, or 0 for none"
      )
    if self.loss == "ppo" and self.importance != "none":
      raise ValueError(
        f"importance={self.importance!r} is not read by loss='ppo', which "
        "weighs by its own ratios: set it to 'none', or loss to 'reinforce'"
      )
    if self.max_weight and self.importance == "none":
      raise ValueError(
        f"max_weight={self.max_weight} is not read with importance='none': set "
        "it to 0, or importance to 'token' or 'sequence'"
      )
    for name in ("clip_low", "clip_high", "dual_clip"):
      # The class holds the default, which says nothing.
      given, default = getattr(self, name), getattr(PolicyGradient, name)
      if self.loss == "reinforce" and given != default:
        raise ValueError(
          f"{name}={given} is not read by loss='reinforce': set it to "
          f"{default:g}, or loss to 'ppo'"
        )


@dataclasses.dataclass(frozen=True)
class Preference:
  """How pairs are learned from; see `dpo.dpo_loss`.

  Attributes:
    variant: "dpo", "ipo" or "conservative".
    coefficient: weight of the term.
    beta: strength of the pull towards the reference, above 0.
    label_noise: share of flipped labels; "conservative" only.
    is_length_normalized: log-probs of solutions are means over their tokens.

  Raises:
    ValueError: an option that is unknown, out of range, or not read.
  """

  variant: str = "dpo"
  coefficient: float = 1.0
  beta: float = 0.1
  label_noise: float = 0.0
  is_length_normalized: bool = False

  def __post_init__(self):
    if self.coefficient < 0:
      raise ValueError(f"coefficient={self.coefficient} must be 0 or more")
    dpo.check_options(self.beta, self.variant, self.label_noise)


@dataclasses.dataclass(frozen=True)
class Objective:
  """The weights of the terms and the options of each.

  Attributes:
    value_coefficient: weight of the value loss.
    policy_gradient: of groups with advantages.
    preference: of groups of pairs.
  """

  value_coefficient: float = 1.0
  policy_gradient: PolicyGradient = PolicyGradient()
  preference: Preference = Preference()

  def coefficients(self) -> dict[str, float]:
    """Weight of each term in the loss; the entropy is a bonus."""
    options = self.policy_gradient
    return {
      "policy": 1.0,
      "value": self.value_coefficient,
      "policy_gradient": options.coefficient,
      "kl": options.kl_coefficient,
      "entropy": -options.entropy_coefficient,
      "preference": self.preference.coefficient,
    }


@struct.dataclass
class Sums:
  """What a group of rows adds to a loss.

  Attributes:
    terms: numerator of each term, by name; these have a gradient.
    metrics: numerators of what is reported, by the term whose denominator they
      share and by name.
    maxima: what merges by its maximum, by name.
  """

  terms: dict[str, jax.Array]
  metrics: dict[str, dict[str, jax.Array]]
  maxima: dict[str, jax.Array]


def weights(group: Group) -> dict[str, jax.Array]:
  """The denominator of each term that a group has; scalars."""
  match group:
    case PreferenceBatch():
      return {"preference": jnp.sum(group.pair_weights)}
    case PolicyGradientBatch():
      total = jnp.sum(group.policy_weights)
      names = ("policy_gradient", "kl", "entropy")
      return dict.fromkeys(names, total) | {
        "value": jnp.sum(group.value_weights)
      }
    case PackedBatch():
      return {"policy": jnp.sum(group.policy_weights)}
  return {
    "policy": jnp.sum(group.policy_weights),
    "value": jnp.sum(group.value_weights),
  }


def sums(
  objective: Objective, log_probs_fn: LogProbsFn, params: Any, group: Group
) -> Sums:
  """The numerators of a group's terms, one forward pass over its rows.

  Args:
    objective: options.
    log_probs_fn: `(params, tokens [B, T], lengths [B]) -> (log_probs [B, T],
      value_logits [B, T], in bins [B, T, K])`, and as a third the entropy `[B,
      T]` of the next token where the objective has an entropy bonus. For a
      `PackedBatch`, and for no other group, it is also given `segment_ids` and
      `positions`, `[B, T]` each, by name.
    params: of the network.
    group: rows.
  """
  match group:
    case PreferenceBatch():
      return _preference(objective.preference, log_probs_fn, params, group)
    case PolicyGradientBatch():
      options = objective.policy_gradient
      return _policy_gradient(options, log_probs_fn, params, group)
    case PackedBatch():
      return _packed(log_probs_fn, params, group)
  log_probs, value_logits, *_ = log_probs_fn(
    params, group.tokens, group.lengths
  )
  parts = alphazero.alphazero_loss(
    log_probs,
    group.policy_weights,
    value_logits,
    group.value_targets,
    group.value_weights,
  )
  terms = {"policy": parts.policy_sum, "value": parts.value_sum}
  return Sums(terms=terms, metrics={}, maxima={})


def _packed(log_probs_fn: LogProbsFn, params: Any, group: PackedBatch) -> Sums:
  log_probs, *_ = log_probs_fn(
    params,
    group.tokens,
    jnp.sum(group.segment_ids >= 0, axis=-1),
    segment_ids=group.segment_ids,
    positions=group.positions,
  )
  total, _ = cloning.cloning_loss(log_probs, group.policy_weights)
  return Sums(terms={"policy": total}, metrics={}, maxima={})


def _policy_gradient(
  options: PolicyGradient,
  log_probs_fn: LogProbsFn,
  params: Any,
  group: PolicyGradientBatch,
) -> Sums:
  log_probs, value_logits, *entropies = log_probs_fn(
    params, group.tokens, group.lengths
  )
  mask = group.policy_weights
  is_valid = mask != 0
  fixed = jax.lax.stop_gradient(log_probs)
  terms, maxima = {}, {}

  ratios = policy_gradient.importance_weights(
    log_probs,
    group.behavior_log_probs,
    mask,
    level="sequence" if options.importance == "sequence" else "token",
  )
  terms["policy_gradient"], metrics = _surrogate(
    options, log_probs, ratios, group
  )
  maxima["max_ratio"] = jnp.max(ratios, where=is_valid, initial=1.0)
  maxima["negative_min_ratio"] = -jnp.min(ratios, where=is_valid, initial=1.0)
  metrics["ratio"] = jnp.sum(mask * ratios)
  metrics["ratio_square"] = jnp.sum(mask * jnp.square(ratios))

  def divergence(other, estimator):
    return jnp.sum(
      mask * ppo.kl_penalty(log_probs, other, mask, estimator=estimator)
    )

  if options.kl_coefficient:
    terms["kl"] = divergence(group.reference_log_probs, options.kl_estimator)
  # Of tokens that another policy drew these are estimates with its bias.
  metrics["kl_to_reference"] = jax.lax.stop_gradient(
    divergence(group.reference_log_probs, "k3")
  )
  metrics["kl_to_behavior"] = jax.lax.stop_gradient(
    divergence(group.behavior_log_probs, "k3")
  )
  if options.entropy_coefficient:
    terms["entropy"] = jnp.sum(mask * jnp.where(is_valid, entropies[0], 0.0))
    metrics["entropy"] = jax.lax.stop_gradient(terms["entropy"])
  else:
    metrics["entropy"] = -jnp.sum(mask * jnp.where(is_valid, fixed, 0.0))

  terms["value"] = _value(options, value_logits, group)
  return Sums(terms=terms, metrics={"policy_gradient": metrics}, maxima=maxima)


def _surrogate(
  options: PolicyGradient,
  log_probs: jax.Array,
  ratios: jax.Array,
  group: PolicyGradientBatch,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The sum whose gradient is the policy's, and of how much it was bounded."""
  mask = group.policy_weights
  if options.loss == "ppo":
    total, _, found = ppo.ppo_loss(
      log_probs,
      group.behavior_log_probs,
      group.advantages,
      mask,
      clip_low=options.clip_low,
      clip_high=options.clip_high,
      dual_clip=options.dual_clip or None,
    )
    return total, {"clip_share": found.clipped_sum}
  used, metrics = None, {}
  if options.importance != "none":
    used = ratios
    if options.max_weight:
      used = jnp.minimum(ratios, options.max_weight)
      metrics["truncated_share"] = jnp.sum(mask * (ratios > options.max_weight))
  total, _ = policy_gradient.reinforce_loss(
    log_probs, group.advantages, mask, importance_weights=used
  )
  return total, metrics


def _value(
  options: PolicyGradient, value_logits: jax.Array, group: PolicyGradientBatch
) -> jax.Array:
  """The sum of the value loss."""
  targets, weights = group.value_targets, group.value_weights
  old, max_change = group.behavior_values, options.max_value_change
  if not max_change:
    total, _ = value_losses.value_loss(value_logits, targets, weights)
  elif value_logits.ndim > targets.ndim:
    total, _ = value_losses.clipped_two_hot_loss(
      value_logits, old, targets, weights, max_change=max_change
    )
  else:
    values = value_of(value_logits, targets.ndim)
    total, _ = ppo.clipped_value_loss(
      values, old, targets, weights, max_change=max_change
    )
  return total


def _preference(
  options: Preference,
  log_probs_fn: LogProbsFn,
  params: Any,
  group: PreferenceBatch,
) -> Sums:
  shape = group.tokens.shape
  log_probs, *_ = log_probs_fn(
    params, group.tokens.reshape(-1, shape[2]), group.lengths.reshape(-1)
  )

  def totals(array):
    rows = dpo.sequence_log_probs(
      array.reshape(-1, shape[2]),
      group.token_weights.reshape(-1, shape[2]),
      mean=options.is_length_normalized,
    )
    pairs = rows.reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]

  total, _, metrics = dpo.dpo_loss(
    *totals(log_probs),
    *totals(group.reference_log_probs),
    group.pair_weights,
    beta=options.beta,
    variant=options.variant,
    label_noise=options.label_noise,
  )
  named = {f"preference_{name}": value for name, value in metrics.items()}
  return Sums(
    terms={"preference": total}, metrics={"preference": named}, maxima={}
  )
