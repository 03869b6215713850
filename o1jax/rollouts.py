"""Rows with advantages, and pairs, from what an iteration's search drew.

Policy gradients need every draw, equal ones as often as they came, with its
probability under what drew it; so these rows are made of the searches
themselves and not of the experience, which keeps a text once. What an outcome
was worth beyond expectation is told by `Advantages`: other draws of the same
problem, earlier iterations, or the value along the solution. Log-probs under
the reference and values are those of the trainer's own forward pass.

Laid out once an iteration, rows are then drawn in epochs (`Deck`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from o1jax.learning import baselines, distillation, policy_gradient, returns
from o1jax.searched import FoundSolution, Searched
from o1jax.types import (
  PolicyGradientBatch,
  PreferenceBatch,
  Problem,
  ScoredSolution,
  Verdict,
)

BASELINES = (
  "none",
  "moving",
  "group",
  "group_std",
  "leave_one_out",
  "value",
)
REWARDS = ("outcome", "vbon")
ESTIMATORS = ("gae", "vtrace")
TRUNCATED = ("mask", "bootstrap", "wrong")
NORMALIZATIONS = ("tokens", "rows")
LEVELS = ("solution", "step")

# Rows of one call of the scoring program, at most.
SCORE_ROWS = 256

ScoreFn = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Advantages:
  """How outcomes become advantages.

  Attributes:
    baseline: what is subtracted: "none"; "moving", the mean of earlier
      iterations; "group" (Dr. GRPO), "group_std" (GRPO) or "leave_one_out"
      (RLOO), of the draws of the same problem; "value" (actor-critic), of the
      value head along the solution.
    reward: "outcome", or "vbon": the log quantile of the outcome among the
      draws of the same problem, which are draws of the reference; it needs
      learn.reference="iteration".
    num_draws: N of "vbon".
    truncated: what a solution is that was cut off: "mask" leaves it out,
      "bootstrap" ends it with its last value, "wrong" gives it reward 0.
    estimator: of baseline "value": "gae" or "vtrace".
    discount: per token, of baseline "value".
    lambda_: of "gae" and "vtrace".
    normalize_by: "tokens" weighs tokens alike, "rows" solutions.
    skips_flat: leaves out problems of which no draw has an advantage, as where
      all are right or all are wrong (dynamic sampling, DAPO, arXiv 2503.14476,
      section 3.2).
    length_penalty: reward taken from a solution of full length; 0 for none.
    free_length: tokens up to which nothing is taken.
    allows_choice: also learn from strategies that chose which draws to go on
      with, as if they had not: an approximation, and reported as one.

  Raises:
    ValueError: an option that is unknown, out of range, or not read.
  """

  baseline: str = "leave_one_out"
  reward: str = "outcome"
  num_draws: int = 1
  truncated: str = "mask"
  estimator: str = "gae"
  discount: float = 1.0
  lambda_: float = 0.95
  normalize_by: str = "tokens"
  skips_flat: bool = True
  length_penalty: float = 0.0
  free_length: int = 0
  allows_choice: bool = False

  def __post_init__(self):
    for name, known in (
      ("baseline", BASELINES),
      ("reward", REWARDS),
      ("truncated", TRUNCATED),
      ("estimator", ESTIMATORS),
      ("normalize_by", NORMALIZATIONS),
    ):
      if getattr(self, name) not in known:
        raise ValueError(
          f"{name}={getattr(self, name)!r} is unknown; take one of "
          f"{', '.join(known)}"
        )
    for name in ("discount", "lambda_"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f"{name}={getattr(self, name)} is not in [0, 1]")
    if min(self.length_penalty, self.free_length) < 0:
      raise ValueError(
        f"length_penalty={self.length_penalty} and free_length="
        f"{self.free_length} must be 0 or more"
      )
    if self.num_draws < 1 or (self.num_draws > 1 and self.reward != "vbon"):
      raise ValueError(
        f"num_draws={self.num_draws} with reward={self.reward!r}: it is that "
        "of 'vbon', at least 1; set it to 1 otherwise"
      )
    if self.reward == "vbon" and self.baseline == "value":
      raise ValueError(
        "reward='vbon' with baseline='value': the value head learns outcomes, "
        "not quantiles; take another baseline"
      )
    if self.free_length and not self.length_penalty:
      raise ValueError(
        f"free_length={self.free_length} is not read without a length_penalty: "
        "set it to 0, or length_penalty above 0"
      )
    for name in ("estimator", "discount", "lambda_"):
      # The class holds the default, which says nothing.
      given, default = getattr(self, name), getattr(Advantages, name)
      if given != default and self.baseline != "value":
        raise ValueError(
          f"{name}={given!r} is read by baseline='value' alone: leave it out, "
          "or take that baseline"
        )


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Which pairs preferences are learned from.

  Attributes:
    level: "solution", right against wrong solutions of a problem, from
      D_search; or "step", steps below one node of a tree of this iteration.
    max_per_problem: pairs of solutions of one problem.
    max_age: iterations that a solution may be old; 0 for this iteration's.
    min_margin: least difference of two steps in mean value.

  Raises:
    ValueError: an option that is unknown or out of range.
  """

  level: str = "solution"
  max_per_problem: int = 4
  max_age: int = 0
  min_margin: float = 0.2

  def __post_init__(self):
    if self.level not in LEVELS:
      raise ValueError(
        f"level={self.level!r} is unknown; take one of {', '.join(LEVELS)}"
      )
    if self.max_per_problem < 1 or self.max_age < 0 or self.min_margin < 0:
      raise ValueError(
        f"max_per_problem={self.max_per_problem} must be 1 or more, max_age="
        f"{self.max_age} and min_margin={self.min_margin} 0 or more"
      )


class Deck:
  """Rows that are drawn in epochs: each as often as every other, in new order.

  Args:
    rows: pytree of arrays `[N, ...]`; N may be 0, and then empty rows are
      drawn, which weigh nothing.
  """

  def __init__(self, rows: Any):
    self.rows = rows
    self._order = np.zeros(0, np.int64)

  def __len__(self) -> int:
    return len(jax.tree.leaves(self.rows)[0])

  def draw(self, rng: np.random.Generator, n: int) -> Any:
    """The next n rows, `[n, ...]`."""
    if not len(self):
      return jax.tree.map(
        lambda x: np.zeros((n, *x.shape[1:]), x.dtype), self.rows
      )
    while len(self._order) < n:
      self._order = np.append(self._order, rng.permutation(len(self)))
    index, self._order = self._order[:n], self._order[n:]
    return jax.tree.map(lambda x: x[index], self.rows)


@dataclasses.dataclass(frozen=True)
class Draws:
  """All solutions of an iteration's searches as rows; N of them.

  Attributes:
    tokens: `[N, T]` prompt and solution, padded on the right.
    starts: `[N]` tokens of the prompt.
    lengths: `[N]` tokens of the row.
    groups: `[N]` index of the problem.
    outcomes: `[N]` 1 where the checker says correct.
    is_truncated: `[N]` cut off before an end.
    behavior_log_probs: `[N, T]` at the position before the token, 0 elsewhere.
    policy_log_probs: `[N, T]` the same under the policy itself.
    num_problems: searched, those without a draw included.
    num_dropped: draws longer than a row.
  """

  tokens: np.ndarray
  starts: np.ndarray
  lengths: np.ndarray
  groups: np.ndarray
  outcomes: np.ndarray
  is_truncated: np.ndarray
  behavior_log_probs: np.ndarray
  policy_log_probs: np.ndarray
  num_problems: int
  num_dropped: int

  @property
  def is_learned(self) -> np.ndarray:
    """`[N, T]` True at positions whose following token was drawn."""
    index = np.arange(self.tokens.shape[1])[None, :]
    after_prompt = index >= self.starts[:, None] - 1
    return after_prompt & (index < self.lengths[:, None] - 1)

  @property
  def has_value(self) -> np.ndarray:
    """`[N, T]` True where a value is learned: from the prompt's end on.

    The end of a solution that was cut off is no end: nothing is known there.
    """
    index = np.arange(self.tokens.shape[1])[None, :]
    end = self.lengths[:, None] - self.is_truncated[:, None]
    return (index >= self.starts[:, None] - 1) & (index < end)


def collect(
  searched: Sequence[Searched],
  verdicts: Sequence[Sequence[Verdict]],
  prompts: Sequence[np.ndarray],
  *,
  length: int,
  pad_id: int,
) -> Draws:
  """Lays the solutions of all searches out, unfinished ones included.

  Args:
    searched: the searches.
    verdicts: of each of their solutions.
    prompts: tokens of each problem's prompt.
    length: T; longer rows are dropped and counted.
    pad_id: token of the padding.
  """
  kept: list[tuple[int, FoundSolution, Verdict]] = []
  num_dropped = 0
  for group, (one, judged) in enumerate(zip(searched, verdicts, strict=True)):
    for solution, verdict in zip(one.solutions, judged, strict=True):
      if len(prompts[group]) + len(solution.tokens) > length:
        num_dropped += 1
      else:
        kept.append((group, solution, verdict))
  shape = (len(kept), length)
  tokens = np.full(shape, pad_id, np.int32)
  behavior = np.zeros(shape, np.float32)
  policy = np.zeros(shape, np.float32)
  starts = np.zeros(len(kept), np.int32)
  lengths = np.zeros(len(kept), np.int32)
  for row, (group, solution, _) in enumerate(kept):
    start = len(prompts[group])
    end = start + len(solution.tokens)
    tokens[row, :start] = prompts[group]
    tokens[row, start:end] = solution.tokens
    behavior[row, start - 1 : end - 1] = solution.behavior_log_probs
    policy[row, start - 1 : end - 1] = solution.policy_log_probs
    starts[row], lengths[row] = start, end
  finished = np.array([s.is_finished for _, s, _ in kept], bool)
  correct = np.array([v.is_correct for *_, v in kept], bool)
  return Draws(
    tokens=tokens,
    starts=starts,
    lengths=lengths,
    groups=np.array([group for group, *_ in kept], np.int64),
    outcomes=(correct & finished).astype(np.float32),
    is_truncated=~finished,
    behavior_log_probs=behavior,
    policy_log_probs=policy,
    num_problems=len(searched),
    num_dropped=num_dropped,
  )


def score_rows(
  score_fn: ScoreFn, params: Any, tokens: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Log-probs and values `[N, T]` of any number of rows.

  Rows go through one program of `SCORE_ROWS` rows, or of the next power of two
  where there are fewer.
  """
  count = len(tokens)
  size = min(SCORE_ROWS, 1 << max(count - 1, 0).bit_length())
  results = []
  for first in range(0, count, size):
    part = slice(first, first + size)
    missing = size - len(tokens[part])
    padded = np.pad(tokens[part], ((0, missing), (0, 0)))
    results.append(
      score_fn(params, padded, np.pad(lengths[part], (0, missing)))
    )
  if not results:
    return (np.zeros(tokens.shape, np.float32),) * 2
  log_probs, values = zip(*jax.device_get(results), strict=True)
  return np.concatenate(log_probs)[:count], np.concatenate(values)[:count]


def policy_gradient_rows(
  draws: Draws,
  options: Advantages,
  moving: baselines.MovingBaseline,
  *,
  values: np.ndarray,
  log_probs: np.ndarray,
  reference_log_probs: np.ndarray,
  max_tokens: int,
) -> tuple[PolicyGradientBatch, baselines.MovingBaseline, dict[str, float]]:
  """Draws with their advantages.

  Args:
    draws: from `collect`.
    options: how outcomes become advantages.
    moving: baseline of earlier iterations; read and moved by "moving".
    values: `[N, T]` of the trainer, before it learns from them; 0 where nothing
      reads them.
    log_probs: `[N, T]` the same, log-probs of the tokens that follow; those of
      the draws where nothing reads them.
    reference_log_probs: `[N, T]` under the reference.
    max_tokens: length of a solution at which the whole length penalty is due.

  Returns:
    The rows in NumPy, those without a use left out; the moving baseline; and
    numbers of the iteration.
  """
  mask = draws.is_learned
  is_used = np.ones(len(mask), bool)
  if options.truncated == "mask":
    is_used &= ~draws.is_truncated
  outcomes = _outcomes(options, draws, values)
  rewards = outcomes + _penalties(options, draws, max_tokens)
  if options.baseline == "value":
    advantages, targets = _along_solutions(
      options, draws, rewards, values, log_probs
    )
  else:
    advantages, moving = _among_draws(options, moving, draws, rewards, is_used)
    advantages = np.broadcast_to(advantages[:, None], mask.shape)
    targets = np.broadcast_to(outcomes[:, None], mask.shape)

  weights = mask.astype(np.float32)
  if options.normalize_by == "rows":
    weights /= np.maximum(weights.sum(1, keepdims=True), 1)
  # Of a problem, not of a draw: the value head would else learn of the draws
  # with an advantage alone, which without a baseline are the right ones.
  is_moved = is_used & np.any(mask & (advantages != 0), axis=1)
  is_flat = ~np.isin(draws.groups, draws.groups[is_moved])
  kept = is_used & ~is_flat if options.skips_flat else is_used
  rows = PolicyGradientBatch(
    tokens=draws.tokens,
    lengths=draws.lengths,
    policy_weights=weights,
    advantages=np.where(mask, advantages, 0).astype(np.float32),
    behavior_log_probs=draws.behavior_log_probs,
    reference_log_probs=reference_log_probs.astype(np.float32),
    behavior_values=values.astype(np.float32),
    value_targets=np.clip(targets, 0, 1).astype(np.float32),
    value_weights=draws.has_value.astype(np.float32),
  )
  gap = np.abs(np.where(mask, log_probs - draws.policy_log_probs, 0))
  numbers = {
    "draws": len(mask),
    "draws_kept": int(kept.sum()),
    "draws_too_long": draws.num_dropped,
    "flat_share": float(np.mean(is_flat)) if len(mask) else 0.0,
    "truncated_draws": float(np.mean(draws.is_truncated)) if len(mask) else 0.0,
    "mean_reward": float(np.mean(rewards)) if len(mask) else 0.0,
    "log_prob_gap": float(gap.max(initial=0.0)),
  }
  return jax.tree.map(lambda x: x[kept], rows), moving, numbers


def _is_open(options, draws) -> np.ndarray:
  """`[N]` True where a solution was cut off and counts as one that goes on."""
  return draws.is_truncated & (options.truncated == "bootstrap")


def _outcomes(options, draws, values) -> np.ndarray:
  """`[N]` what the checker said, or the last value of what goes on."""
  last = np.maximum(draws.lengths - 1, 0)[:, None]
  last_values = np.take_along_axis(values, last, 1)[:, 0]
  return np.where(_is_open(options, draws), last_values, draws.outcomes)


def _penalties(options, draws, max_tokens) -> np.ndarray:
  """`[N]` what the lengths of the solutions take away, 0 or less."""
  if not options.length_penalty:
    return np.zeros_like(draws.outcomes)
  penalties = policy_gradient.length_penalties(
    draws.lengths - draws.starts,
    free_length=options.free_length,
    max_length=max_tokens,
  )
  return options.length_penalty * np.asarray(penalties)


def _along_solutions(
  options, draws, rewards, values, log_probs
) -> tuple[np.ndarray, np.ndarray]:
  """Advantages and targets `[N, T]` by the value of every position."""
  mask, is_open = draws.is_learned, _is_open(options, draws)
  last_learned = draws.lengths[:, None] - 2
  index = np.arange(mask.shape[1])[None, :]
  # A solution that goes on has its value behind it, and earned nothing yet but
  # its penalty.
  bootstraps = np.where(
    is_open, values[np.arange(len(mask)), last_learned[:, 0] + 1], 0
  )
  at_end = np.where(index == last_learned, (rewards - bootstraps)[:, None], 0)
  estimate = _estimator(options.estimator, options.discount, options.lambda_)
  weights = np.exp(np.where(mask, log_probs - draws.behavior_log_probs, 0))
  advantages, targets = estimate(
    at_end.astype(np.float32),
    values.astype(np.float32),
    weights.astype(np.float32),
    mask,
    bootstraps.astype(np.float32),
  )
  # Behind the last token the outcome itself is known.
  at_last = index == draws.lengths[:, None] - 1
  targets = np.where(at_last, rewards[:, None], np.asarray(targets))
  return np.asarray(advantages), targets


@functools.cache
def _estimator(name: str, discount: float, lambda_: float):
  """The estimator over rows, compiled once for all iterations."""
  common = {"discount": discount, "lambda_": lambda_}
  if name == "gae":

    def estimate(rewards, values, _, mask, bootstrap):
      return returns.generalized_advantages(
        rewards, values, mask, bootstrap_value=bootstrap, **common
      )
  else:

    def estimate(rewards, values, weights, mask, bootstrap):
      return returns.vtrace(
        rewards, values, weights, mask, bootstrap_value=bootstrap, **common
      )

  return jax.jit(jax.vmap(estimate))


def _among_draws(options, moving, draws, rewards, is_used):
  """One advantage for each draw, `[N]`, and the moving baseline."""
  table, mask, places = grouped(rewards, draws, is_used)
  if options.reward == "vbon":
    table = _quantile_rewards(table, mask, options.num_draws)
  match options.baseline:
    case "none":
      found = table
    case "moving":
      moving, found = baselines.moving_advantages(moving, table, mask)
    case "leave_one_out":
      found = baselines.leave_one_out_advantages(table, mask)
    case name:
      found = baselines.group_advantages(
        table, mask, scale_by_std=name == "group_std"
      )
  advantages = np.zeros(len(rewards), np.float32)
  advantages[is_used] = np.asarray(found)[places]
  return advantages, jax.device_get(moving)


def grouped(
  rewards: np.ndarray, draws: Draws, is_used: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
  """Rewards by problem.

  Returns:
    `(rewards [B, G], mask [B, G], places)`: `places` are row and column of each
    draw that is used, in the order of the draws.
  """
  groups = draws.groups[is_used]
  order = np.argsort(groups, kind="stable")
  sizes = np.bincount(groups, minlength=draws.num_problems)
  firsts = np.cumsum(sizes) - sizes
  columns = np.empty(len(groups), np.int64)
  columns[order] = np.arange(len(groups)) - np.repeat(firsts, sizes)
  width = int(np.bincount(draws.groups, minlength=1).max(initial=1))
  table = np.zeros((draws.num_problems, width), np.float32)
  mask = np.zeros(table.shape, bool)
  places = (groups, columns)
  table[places] = rewards[is_used]
  mask[places] = True
  return table, mask, places


def _quantile_rewards(table, mask, num_draws):
  """vBoN's rewards where policy and reference are one: `[B, G]`.

  Each draw is judged by the others of its problem. The term of the divergence
  is 0 at the draw, and enters as `kl_coefficient`.
  """
  width = table.shape[1]
  others = np.stack([np.delete(np.arange(width), i) for i in range(width)])
  rewards = table.reshape(-1)
  reference = table[:, others].reshape(len(rewards), -1)
  reference_mask = mask[:, others].reshape(len(rewards), -1)
  arguments = (rewards, reference, reference_mask)
  zeros = jnp.zeros(len(rewards))
  found = distillation.vbon_rewards(
    distillation.log_quantiles(*arguments),
    zeros,
    zeros,
    mask.reshape(-1),
    num_draws=num_draws,
    strict_shares=distillation.strict_shares(*arguments),
  )
  return np.asarray(found).reshape(table.shape)


def best_draws(
  searched: Sequence[Searched], verdicts: Sequence[Sequence[Verdict]]
) -> list[tuple[Problem, FoundSolution, Verdict]]:
  """The best finished draw of each problem; of equals the first.

  They are draws of best-of-N, right or wrong: the forward part of BOND (Sessa
  et al., arXiv 2407.14622, section 4) clones them.
  """
  found = []
  for one, judged in zip(searched, verdicts, strict=True):
    pairs = [
      (solution, verdict)
      for solution, verdict in zip(one.solutions, judged, strict=True)
      if solution.is_finished
    ]
    if pairs:
      best = max(pairs, key=lambda pair: pair[1].is_correct)
      found.append((one.problem, *best))
  return found


def step_pairs(
  searched: Sequence[Searched], *, min_margin: float
) -> list[tuple[Problem, np.ndarray, np.ndarray, np.ndarray]]:
  """Pairs of steps below one node of a tree: the best against the worst.

  Step-DPO, Lai et al., arXiv 2406.18629; values from the tree as in MCTS-DPO
  (Xie et al., arXiv 2405.00451, section 2.2). A node whose visited steps do not
  differ by `min_margin` in mean value has no pair.

  Args:
    searched: trees of steps.
    min_margin: least difference of mean values.

  Returns:
    `(problem, tokens before, preferred step, dispreferred step)` of each pair,
    steps as tokens.
  """
  pairs = []
  for one in searched:
    nodes = one.nodes
    lengths, tokens = nodes["lengths"], nodes["tokens"]
    scores = nodes["mean_value"] + nodes["reward"]
    is_seen = nodes["is_valid"] & (nodes["num_visits"] > 0)
    children: dict[int, list[int]] = {}
    for node in np.flatnonzero(is_seen & (nodes["depth"] > 0)).tolist():
      children.setdefault(int(nodes["parent"][node]), []).append(node)
    for parent, below in children.items():
      best = max(below, key=lambda n: scores[n])
      worst = min(below, key=lambda n: scores[n])
      if scores[best] - scores[worst] < max(min_margin, 1e-6):
        continue
      path = []
      node = parent
      while node > 0:
        path.append(tokens[node, : lengths[node]])
        node = int(nodes["parent"][node])
      before = np.concatenate([np.zeros(0, np.int32), *reversed(path)])
      steps = (tokens[n, : lengths[n]] for n in (best, worst))
      pairs.append((one.problem, before, *steps))
  return pairs


def solution_pairs(
  pairs: Sequence[tuple[ScoredSolution, ScoredSolution]],
) -> list[tuple[Problem, np.ndarray, np.ndarray, np.ndarray]]:
  """Whole solutions in the form of `step_pairs`: nothing stands before them."""
  nothing = np.zeros(0, np.int32)
  return [
    (better.problem, nothing, better.tokens, worse.tokens)
    for better, worse in pairs
  ]


def preference_rows(
  pairs: Sequence[tuple[Problem, np.ndarray, np.ndarray, np.ndarray]],
  prompt_fn: Callable[[Problem], np.ndarray],
  score_reference: Callable[[np.ndarray, np.ndarray], np.ndarray],
  *,
  length: int,
  pad_id: int,
) -> tuple[PreferenceBatch, int]:
  """Pairs as rows, the reference's log-probs among them.

  Args:
    pairs: `(problem, tokens before, preferred, dispreferred)`.
    prompt_fn: tokens of a problem's prompt.
    score_reference: `(tokens [N, T], lengths [N]) -> log_probs [N, T]`.
    length: T; pairs with a longer row are dropped and counted.
    pad_id: token of the padding.

  Returns:
    `(rows, number dropped)`.
  """
  kept = []
  for problem, before, *both in pairs:
    prefix = np.concatenate([prompt_fn(problem), before]).astype(np.int32)
    if len(prefix) + max(map(len, both)) <= length:
      kept.append((prefix, both))
  shape = (len(kept), 2, length)
  tokens = np.full(shape, pad_id, np.int32)
  weights = np.zeros(shape, np.float32)
  lengths = np.zeros(shape[:2], np.int32)
  for row, (prefix, both) in enumerate(kept):
    for side, span in enumerate(both):
      start, end = len(prefix), len(prefix) + len(span)
      tokens[row, side, :start] = prefix
      tokens[row, side, start:end] = span
      weights[row, side, start - 1 : end - 1] = 1
      lengths[row, side] = end
  reference = score_reference(tokens.reshape(-1, length), lengths.reshape(-1))
  rows = PreferenceBatch(
    tokens=tokens,
    lengths=lengths,
    token_weights=weights,
    reference_log_probs=reference.reshape(shape),
    pair_weights=np.ones(len(kept), np.float32),
  )
  return rows, len(pairs) - len(kept)


def moving_from(record: Mapping[str, float] | None) -> baselines.MovingBaseline:
  """The moving baseline that a checkpoint keeps as numbers."""
  if record is None:
    return baselines.empty_baseline()
  return baselines.MovingBaseline(
    **{name: jnp.float32(value) for name, value in record.items()}
  )


def moving_record(moving: baselines.MovingBaseline) -> dict[str, float]:
  """The moving baseline as numbers; float32 survives JSON exactly."""
  return {
    name: float(getattr(moving, name)) for name in ("reward_sum", "weight")
  }
