"""Returns and advantages along one solution.

Rewards come in, and what each position was worth goes out: plain returns, the
mixtures over k steps of TD(lambda) and GAE, and V-trace for data of another
policy. Written for a single sequence; batch with `jax.vmap`. T is a position:
a token or a reasoning step, the caller decides. Nothing here stops a gradient;
the losses treat what they get as constants.

In all of them the mask is True (not 0) where the position belongs to the
solution; other positions are stepped over without a discount, yield 0 and may
hold anything, NaN included. Solutions end, so what follows the last valid
position is worth 0; a truncated solution is neither right nor terminal, and
`bootstrap_value`, a scalar, says what its rest is expected to bring.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp


def discounted_returns(
  rewards: jax.Array,
  mask: jax.Array,
  *,
  discount: float = 1.0,
  bootstrap_value: jax.Array | float = 0.0,
) -> jax.Array:
  """Sums what is still to come.

    G_t = r_t + discount * G_{t+1}

  Sutton and Barto, "Reinforcement learning", equation 3.9.

  Args:
    rewards: `[T]` received on leaving position t.
    mask: `[T]`, as in the head of this file.
    discount: per valid position.
    bootstrap_value: what follows the last valid position.

  Returns:
    `[T]` returns.
  """
  chex.assert_rank([rewards, mask], 1)
  chex.assert_equal_shape([rewards, mask])

  def step_back(later, here):
    (later_return,), (reward,) = later, here
    total = reward + discount * later_return
    return (total,), total

  return _scan_back(step_back, (bootstrap_value,), mask, rewards)


def generalized_advantages(
  rewards: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  *,
  discount: float = 1.0,
  lambda_: float = 0.95,
  bootstrap_value: jax.Array | float = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """Mixes k-step errors with weights lambda_^k.

    delta_t = r_t + discount * V_{t+1} - V_t
    A_t     = delta_t + discount * lambda_ * A_{t+1}

  Schulman et al., arXiv 1506.02438, equation 16. At `lambda_` 0 an advantage is
  the error of one step, at 1 the return minus the value.

  Args:
    rewards: `[T]` received on leaving position t.
    values: `[T]` estimates at position t.
    mask: `[T]`, as in the head of this file.
    discount: per valid position.
    lambda_: in [0, 1].
    bootstrap_value: V after the last valid position.

  Returns:
    `(advantages, returns)`, both `[T]`; returns are advantages plus values, and
    advantages are not whitened.
  """
  chex.assert_rank([rewards, values, mask], 1)
  chex.assert_equal_shape([rewards, values, mask])

  def step_back(later, here):
    later_advantage, later_value = later
    reward, value = here
    delta = reward + discount * later_value - value
    advantage = delta + discount * lambda_ * later_advantage
    return (advantage, value), (advantage, advantage + value)

  after = (0.0, bootstrap_value)
  return _scan_back(step_back, after, mask, rewards, values)


def lambda_returns(
  rewards: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  *,
  discount: float = 1.0,
  lambda_: float = 0.95,
  bootstrap_value: jax.Array | float = 0.0,
) -> jax.Array:
  """Targets of TD(lambda): between the next value and the whole return.

    G_t = r_t + discount * ((1 - lambda_) * V_{t+1} + lambda_ * G_{t+1})

  Sutton and Barto, "Reinforcement learning", equation 12.18. They are the
  returns of `generalized_advantages` without the advantages.

  Args:
    rewards: `[T]` received on leaving position t.
    values: `[T]` estimates at position t.
    mask: `[T]`, as in the head of this file.
    discount: per valid position.
    lambda_: in [0, 1].
    bootstrap_value: V and G after the last valid position.

  Returns:
    `[T]` returns.
  """
  chex.assert_rank([rewards, values, mask], 1)
  chex.assert_equal_shape([rewards, values, mask])

  def step_back(later, here):
    later_return, later_value = later
    reward, value = here
    following = (1 - lambda_) * later_value + lambda_ * later_return
    total = reward + discount * following
    return (total, value), total

  after = (bootstrap_value, bootstrap_value)
  return _scan_back(step_back, after, mask, rewards, values)


def vtrace(
  rewards: jax.Array,
  values: jax.Array,
  importance_weights: jax.Array,
  mask: jax.Array,
  *,
  discount: float = 1.0,
  lambda_: float = 1.0,
  max_rho: float = 1.0,
  max_c: float = 1.0,
  bootstrap_value: jax.Array | float = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """Corrects values and advantages for data of another policy.

    rho_t = min(max_rho, w_t),  c_t = lambda_ * min(max_c, w_t)
    delta_t = rho_t * (r_t + discount * V_{t+1} - V_t)
    v_t     = V_t + delta_t + discount * c_t * (v_{t+1} - V_{t+1})
    A_t     = rho_t * (r_t + discount * v_{t+1} - V_t)

  Espeholt et al., IMPALA, arXiv 1802.01561, section 4.1, remarks 1 and 2, and
  section 4.2. `max_rho` decides which policy is valued, `max_c` only how fast
  and with what variance. With weights of 1 and `lambda_` 1 the targets are the
  returns to the end.

  Args:
    rewards: `[T]` received on leaving position t.
    values: `[T]` estimates at position t.
    importance_weights: `[T]` probability of the token (or step) at position t
      under the policy over that under what drew it, not yet truncated.
    mask: `[T]`, as in the head of this file.
    discount: per valid position.
    lambda_: in [0, 1].
    max_rho: largest weight of an error; infinity for none.
    max_c: largest weight of what is passed back; infinity for none.
    bootstrap_value: V and v after the last valid position.

  Returns:
    `(advantages, targets)`, both `[T]`. The advantages carry rho already: a
    loss must not weight them again.
  """
  chex.assert_rank([rewards, values, importance_weights, mask], 1)
  chex.assert_equal_shape([rewards, values, importance_weights, mask])

  def step_back(later, here):
    later_target, later_value = later
    reward, value, weight = here
    rho = jnp.minimum(max_rho, weight)
    c = lambda_ * jnp.minimum(max_c, weight)
    delta = rho * (reward + discount * later_value - value)
    target = value + delta + discount * c * (later_target - later_value)
    advantage = rho * (reward + discount * later_target - value)
    return (target, value), (advantage, target)

  after = (bootstrap_value, bootstrap_value)
  return _scan_back(step_back, after, mask, rewards, values, importance_weights)


def _scan_back(
  step_back: Callable, after: tuple, mask: jax.Array, *arrays: jax.Array
) -> Any:
  """Folds the valid positions from the last to the first; others yield 0.

  `step_back(later, here) -> (state, results)` gets the state of the next valid
  position, `after` behind the last, and the arrays at its own. All is computed
  in float32 or wider, so that long sums of narrow rewards stay exact.
  """
  is_valid = mask != 0
  dtype = jnp.result_type(jnp.float32, *arrays)
  # Zeroed before the arithmetic: else a NaN at a masked position would come
  # back through the gradient.
  arrays = [jnp.where(is_valid, array, 0).astype(dtype) for array in arrays]
  after = tuple(jnp.asarray(scalar, dtype) for scalar in after)
  chex.assert_rank(after, 0)

  def step(later, here):
    is_here, *here = here
    state, results = step_back(later, here)
    state = jax.tree.map(lambda x, y: jnp.where(is_here, x, y), state, later)
    return state, jax.tree.map(lambda x: jnp.where(is_here, x, 0), results)

  return jax.lax.scan(step, after, (is_valid, *arrays), reverse=True)[1]
