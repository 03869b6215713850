"""Selection rules: which candidate a simulation enters next.

A rule scores the A candidates of one node; the search takes the valid one with
the highest score, the first of equal ones. PUCT, UCT and Gumbel are score
functions of one signature, `(candidates, noise) -> [A]`; each rule has one for
the root, where `noise` is what the rule drew for this tree, and one for the
nodes below, where there is none.

PUCT: AlphaZero and MuZero (Schrittwieser et al., arXiv 1911.08265, appendix B).
UCT: Kocsis and Szepesvari, 2006. Gumbel: Danihelka et al., ICLR 2022,
openreview.net/forum?id=bERaNdoegnO. Formulas and constants are mctx's, and the
tests compare visit counts with it.
"""

import difflib
import functools
import inspect
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from o1jax.search.tree import Candidates


class SelectionRule(NamedTuple):
  """A rule as pure functions on one node.

  Attributes:
    root_scores: `(candidates, noise [A]) -> [A]` at the root.
    scores: `(candidates, noise=None) -> [A]` below it.
    draw_noise: `(key, dtype) -> [A]`, once per tree; None for no noise.
    mix_prior: `(prior_logits [A], is_valid [A], noise [A]) -> prior_logits`
      of the root's candidates, or None where the prior stays as it is.
  """

  root_scores: Callable[..., jax.Array]
  scores: Callable[..., jax.Array]
  draw_noise: Callable[..., jax.Array] | None
  mix_prior: Callable[..., jax.Array] | None


def choose(scores: jax.Array, is_valid: jax.Array) -> jax.Array:
  """The first valid candidate with the highest score; 0 if none is valid."""
  return jnp.argmax(jnp.where(is_valid, scores, -jnp.inf)).astype(jnp.int32)


def puct_scores(
  candidates: Candidates,
  noise: jax.Array | None = None,
  *,
  exploration_init: float,
  exploration_base: float,
) -> jax.Array:
  """Q in [0, 1] plus prior-weighted exploration.

    score = Q' + P * sqrt(n) / (1 + n_a) * (c1 + log((n + c2 + 1) / c2))

  Q' is Q scaled by the least and greatest of the node's mean and its visited
  candidates' Q; an unvisited candidate has Q' = 0.
  """
  del noise
  visits = candidates.num_visits.astype(candidates.q_values.dtype)
  total = candidates.node_visits.astype(visits.dtype)
  rate = exploration_init + jnp.log(
    (total + exploration_base + 1.0) / exploration_base
  )
  prior = jnp.exp(candidates.prior_logits)
  explore = jnp.sqrt(total) * rate * prior / (visits + 1)

  is_visited = candidates.num_visits > 0
  q_values = jnp.where(is_visited, candidates.q_values, candidates.node_mean)
  least = jnp.minimum(candidates.node_mean, jnp.min(q_values))
  greatest = jnp.maximum(candidates.node_mean, jnp.max(q_values))
  q_values = jnp.where(is_visited, candidates.q_values, least)
  return (q_values - least) / jnp.maximum(greatest - least, 1e-8) + explore


def uct_scores(
  candidates: Candidates,
  noise: jax.Array | None = None,
  *,
  exploration: float,
) -> jax.Array:
  """Q + c sqrt(log(sum of visits) / n_a); first each candidate once.

  Unvisited candidates come in the order of their prior.
  """
  del noise
  visits = candidates.num_visits.astype(candidates.q_values.dtype)
  total = jnp.maximum(jnp.sum(visits), 1.0)
  explore = exploration * jnp.sqrt(jnp.log(total) / jnp.maximum(visits, 1.0))
  is_new = candidates.is_valid & (candidates.num_visits == 0)
  return jnp.where(
    jnp.any(is_new),
    jnp.where(is_new, candidates.prior_logits, -jnp.inf),
    candidates.q_values + explore,
  )


def reduce_together(
  *terms: tuple[jax.Array, float, Callable[..., jax.Array]],
) -> list[jax.Array]:
  """Several reductions over the candidates in one operation.

  Arrays are small here, and a search takes as long as it has operations.

  Args:
    *terms: `(operand [A], neutral element, operator)` each, the operator a
      binary one of `jax.lax`.

  Returns:
    The reduced operands, `[]` each.
  """
  operands, neutral, operators = zip(*terms, strict=True)
  starts = [
    jnp.asarray(start, operand.dtype)
    for start, operand in zip(neutral, operands, strict=True)
  ]

  def combine(left, right):
    pairs = zip(operators, left, right, strict=True)
    return tuple(operator(x, y) for operator, x, y in pairs)

  return jax.lax.reduce(operands, tuple(starts), combine, (0,))


def completed_q_values(
  candidates: Candidates, *, value_scale: float, visits_init: float
) -> tuple[jax.Array, jax.Array]:
  """Q with the gaps filled, scaled to act as logits (appendix D).

  An unvisited candidate gets the mixed value: the model's estimate of the node
  averaged with the prior-weighted Q of the visited ones, which counts once per
  visit. Then Q is scaled to [0, 1] and times `(visits_init + max visits) *
  value_scale`.

  Returns:
    These `[A]`, and the sum `[]` of the candidates' visits.
  """
  q_values = candidates.q_values
  is_visited = candidates.num_visits > 0
  visits = candidates.num_visits.astype(q_values.dtype)
  prior = jnp.exp(candidates.prior_logits)
  prior = jnp.maximum(jnp.finfo(prior.dtype).tiny, prior)
  prior = jnp.where(is_visited, prior, 0.0)
  total, most, prior_sum, weighted_sum = reduce_together(
    (visits, 0, jax.lax.add),
    (visits, 0, jax.lax.max),
    (prior, 0, jax.lax.add),
    (prior * jnp.where(is_visited, q_values, 0.0), 0, jax.lax.add),
  )
  weighted_q = weighted_sum / jnp.where(total > 0, prior_sum, 1.0)
  mixed = (candidates.node_value + total * weighted_q) / (total + 1)
  completed = jnp.where(is_visited, q_values, mixed)
  least, greatest = reduce_together(
    (completed, jnp.inf, jax.lax.min),
    (completed, -jnp.inf, jax.lax.max),
  )
  completed = (completed - least) / jnp.maximum(greatest - least, 1e-8)
  return (visits_init + most) * value_scale * completed, total


def gumbel_scores(
  candidates: Candidates,
  noise: jax.Array | None = None,
  *,
  value_scale: float,
  visits_init: float,
) -> jax.Array:
  """Visits follow the improved policy pi' = softmax(log prior + completed Q).

  score = pi'(a) - n_a / (1 + sum of n): deterministic (section 5).
  """
  del noise
  visits = candidates.num_visits.astype(candidates.q_values.dtype)
  completed, total = completed_q_values(
    candidates, value_scale=value_scale, visits_init=visits_init
  )
  improved = jax.nn.softmax(candidates.prior_logits + completed)
  return improved - visits / (1 + total)


def sequential_halving_scores(
  candidates: Candidates,
  noise: jax.Array,
  *,
  visits_table: np.ndarray,
  value_scale: float,
  visits_init: float,
) -> jax.Array:
  """Gumbel noise + log prior + completed Q of those whose turn it is.

  Args:
    candidates: the root's.
    noise: `[A]` Gumbel noise, the same in all simulations.
    visits_table: `[considered + 1, num_simulations]`, see `halving_visits`.
    value_scale: see `completed_q_values`.
    visits_init: see `completed_q_values`.
  """
  num_valid = jnp.sum(candidates.is_valid, dtype=jnp.int32)
  num_considered = jnp.minimum(visits_table.shape[0] - 1, num_valid)
  simulation = jnp.sum(candidates.num_visits)
  turn = jnp.asarray(visits_table)[num_considered, simulation]
  logits = candidates.prior_logits - jnp.max(candidates.prior_logits)
  completed, _ = completed_q_values(
    candidates, value_scale=value_scale, visits_init=visits_init
  )
  # Bounded below, so that an only candidate may be visited at any score.
  scores = jnp.maximum(-1e9, noise + logits + completed)
  return jnp.where(candidates.num_visits == turn, scores, -jnp.inf)


def halving_visits(num_considered: int, num_simulations: int) -> list[int]:
  """How many visits the candidate must have whose turn each simulation is.

  Sequential Halving (Karnin et al., ICML 2013): all considered candidates get
  equal visits, then the better half again, down to two.
  """
  if num_considered <= 1:
    return list(range(num_simulations))
  num_rounds = math.ceil(math.log2(num_considered))
  visits = [0] * num_considered
  remaining = num_considered
  sequence: list[int] = []
  while len(sequence) < num_simulations:
    for _ in range(max(1, num_simulations // (num_rounds * remaining))):
      sequence.extend(visits[:remaining])
      visits[:remaining] = [count + 1 for count in visits[:remaining]]
    remaining = max(2, remaining // 2)
  return sequence[:num_simulations]


def puct(
  num_candidates: int,
  num_simulations: int,
  *,
  exploration_init: float = 1.25,
  exploration_base: float = 19652.0,
  dirichlet_fraction: float = 0.0,
  dirichlet_alpha: float = 0.3,
) -> SelectionRule:
  """PUCT, with Dirichlet noise on the root's prior if its fraction is above 0.

  Args:
    num_candidates: A.
    num_simulations: not used by this rule.
    exploration_init: c1 of `puct_scores`.
    exploration_base: c2 of `puct_scores`.
    dirichlet_fraction: share of the noise in the root's prior, in [0, 1].
    dirichlet_alpha: concentration of the noise.
  """
  del num_simulations
  if not 0 <= dirichlet_fraction <= 1:
    raise ValueError(
      f"dirichlet_fraction={dirichlet_fraction} is not in [0, 1]; 0 switches"
      " the root noise off"
    )
  scores = functools.partial(
    puct_scores,
    exploration_init=exploration_init,
    exploration_base=exploration_base,
  )

  def draw_noise(key, dtype):
    alpha = jnp.full((num_candidates,), dirichlet_alpha, dtype)
    return jax.random.dirichlet(key, alpha, dtype=dtype)

  def mix_prior(prior_logits, is_valid, noise):
    prior = jax.nn.softmax(prior_logits, where=is_valid)
    noise = jnp.where(is_valid, noise, 0.0)
    tiny = jnp.finfo(noise.dtype).tiny
    noise = noise / jnp.maximum(jnp.sum(noise), tiny)
    mixed = (1 - dirichlet_fraction) * prior + dirichlet_fraction * noise
    return jnp.log(jnp.maximum(mixed, tiny))

  if dirichlet_fraction == 0:
    return SelectionRule(scores, scores, None, None)
  return SelectionRule(scores, scores, draw_noise, mix_prior)


def uct(
  num_candidates: int,
  num_simulations: int,
  *,
  exploration: float = math.sqrt(2.0),
) -> SelectionRule:
  """UCT, for values in [0, 1]; the prior only orders the first visits.

  Args:
    num_candidates: A.
    num_simulations: not used by this rule.
    exploration: c of `uct_scores`.
  """
  del num_simulations
  scores = functools.partial(uct_scores, exploration=exploration)
  return SelectionRule(scores, scores, None, None)


def gumbel(
  num_candidates: int,
  num_simulations: int,
  *,
  num_considered_actions: int | None = None,
  gumbel_scale: float = 1.0,
  value_scale: float = 0.1,
  visits_init: float = 50.0,
) -> SelectionRule:
  """Sequential Halving with Gumbel noise at the root, `gumbel_scores` below.

  Args:
    num_candidates: A.
    num_simulations: the budget that Sequential Halving divides.
    num_considered_actions: candidates that start at the root; A if None.
    gumbel_scale: 0 for a search without noise.
    value_scale: see `completed_q_values`.
    visits_init: see `completed_q_values`.
  """
  if num_considered_actions is None:
    num_considered_actions = num_candidates
  if not 1 <= num_considered_actions <= num_candidates:
    raise ValueError(
      f"num_considered_actions={num_considered_actions} is not between 1 and"
      f" the {num_candidates} candidates of a node; lower it or let the step"
      " model propose more candidates"
    )
  visits_table = np.array(
    [
      halving_visits(considered, num_simulations)
      for considered in range(num_considered_actions + 1)
    ],
    np.int32,
  )
  scales = {"value_scale": value_scale, "visits_init": visits_init}

  def draw_noise(key, dtype):
    return gumbel_scale * jax.random.gumbel(key, (num_candidates,), dtype)

  return SelectionRule(
    root_scores=functools.partial(
      sequential_halving_scores, visits_table=visits_table, **scales
    ),
    scores=functools.partial(gumbel_scores, **scales),
    draw_noise=draw_noise,
    mix_prior=None,
  )


RULES = {"puct": puct, "uct": uct, "gumbel": gumbel}


def make_rule(
  name: str,
  num_candidates: int,
  num_simulations: int,
  options: Mapping[str, Any],
) -> SelectionRule:
  """The rule of that name with its keyword options.

  Raises:
    ValueError: unknown name or option; the message names the nearest one.
  """
  make = named("selection rule", name, RULES)
  check_options(f"selection rule {name!r}", make, options)
  return make(num_candidates, num_simulations, **options)


def named(kind: str, name: str, table: Mapping[str, Any]) -> Any:
  """`table[name]`, or a ValueError that names what comes nearest."""
  if name in table:
    return table[name]
  close = difflib.get_close_matches(name, table, n=1)
  hint = f"; did you mean {close[0]!r}?" if close else ""
  raise ValueError(
    f"unknown {kind} {name!r}{hint} (there are: {', '.join(sorted(table))})"
  )


def check_options(
  owner: str, make: Callable[..., Any], options: Mapping[str, Any]
) -> None:
  """Refuses options that are not keyword arguments of `make`, by type too."""
  parameters = inspect.signature(make).parameters.values()
  known = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
  for option, value in options.items():
    wanted = named(f"option of {owner}", option, known).annotation
    if not _is_of(value, wanted):
      kind = getattr(wanted, "__name__", wanted)
      raise ValueError(
        f"option {option!r} of {owner} is {value!r}: it takes {kind}"
      )


def _is_of(value: Any, annotation: Any) -> bool:
  """Whether a plain value is of the annotated type; True for any other type."""
  is_union = isinstance(annotation, types.UnionType)
  kinds = annotation.__args__ if is_union else (annotation,)
  if not set(kinds) <= {bool, int, float, str, types.NoneType}:
    return True
  if float in kinds and type(value) is int:
    return True
  return type(value) in kinds
