"""What the loop has found so far, and what it learns from.

`Experience` holds checked solutions on the host in pools by their source, each
under a size limit with the oldest leaving first: search and hindsight make up
D_search, demonstrations stand beside it, and D_expert is derived, the best
correct solutions of each problem. All of it goes into plain arrays for a
checkpoint; `o1jax.jsonl` has the form for people and other programs.
Entries are drawn evenly, or by their age and by what is left to learn from
them; those of one problem also come together, as groups for a baseline and as
pairs of a better and a worse one. `make_learner_batch` lays entries out as rows
for the update; position t predicts the token at t + 1.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from o1jax.jsonl import FLOAT_ARRAYS, SOURCES
from o1jax.types import LearnerBatch, Problem, ScoredSolution

EXPERT = "expert"
POLICY_WEIGHTS = ("ones", "step_weights", "zeros")
VALUE_POSITIONS = ("all", "steps", "end", "none")
PRIORITIES = ("none", "difficulty", "advantage")

_NUMBERS = {
  "outcome_reward": np.float64,
  "iteration": np.int64,
  "num_visits": np.int64,
}


class Experience:
  """D_search and D_expert under size limits, in host memory.

  A pool keeps one entry per problem and text. The same text found again in a
  later iteration replaces the old entry and counts as new; within one
  iteration the first stays, because its step weights belong with those of the
  other solutions of its tree.
  """

  def __init__(
    self,
    *,
    max_search: int,
    max_hindsight: int,
    max_demonstrations: int,
    max_expert_per_problem: int,
  ):
    """Starts empty.

    Args:
      max_search: entries kept of solutions found by search.
      max_hindsight: entries kept of failed solutions that were relabelled with
        the target they reached.
      max_demonstrations: entries kept of demonstrations.
      max_expert_per_problem: distinct correct texts of one problem in D_expert.
    """
    limits = (max_search, max_hindsight, max_demonstrations)
    if min(limits) < 0 or max_expert_per_problem < 1:
      raise ValueError(
        f"limits {limits} must be 0 or more and max_expert_per_problem="
        f"{max_expert_per_problem} at least 1"
      )
    self._limits = dict(zip(SOURCES, limits, strict=True))
    self._max_expert_per_problem = max_expert_per_problem
    self._pools: dict[str, dict[tuple[str, str], ScoredSolution]] = {
      source: {} for source in SOURCES
    }
    self._lists: dict[str, list[ScoredSolution]] = {}
    # By pool, what weights are made of: iterations, rates of success, outcomes.
    self._columns: dict[str, tuple[np.ndarray, ...]] = {}
    self._attempts: list[tuple[list, list]] | None = None
    self._rates: list[tuple[Problem, float]] | None = None

  def __len__(self) -> int:
    return sum(map(len, self._pools.values()))

  def add(self, entries: Iterable[ScoredSolution]) -> None:
    """Takes entries in, oldest first, and lets the oldest go.

    Raises:
      ValueError: an unknown source, or arrays that do not fit the tokens.
        Nothing is taken in then.
    """
    entries = [_normalize(entry) for entry in entries]
    for entry in entries:
      pool = self._pools[entry.source]
      key = (entry.problem.id, entry.text)
      if key in pool:
        if pool[key].iteration == entry.iteration:
          continue
        del pool[key]  # So that the new one goes to the end.
      pool[key] = entry
    for source, pool in self._pools.items():
      num_extra = len(pool) - self._limits[source]
      if num_extra > 0:
        for key in list(pool)[:num_extra]:
          del pool[key]
    self._lists, self._columns = {}, {}
    self._attempts = self._rates = None

  def pool(self, name: str) -> list[ScoredSolution]:
    """Entries of one source, or "expert"; oldest first. Not to be changed."""
    if name not in self._lists:
      if name == EXPERT:
        self._lists[name] = best_correct(
          [entry for source in SOURCES for entry in self.pool(source)],
          max_per_problem=self._max_expert_per_problem,
        )
      elif name in self._pools:
        self._lists[name] = list(self._pools[name].values())
      else:
        raise ValueError(
          f"pool {name!r} is unknown; take one of "
          f"{', '.join((*SOURCES, EXPERT))}"
        )
    return self._lists[name]

  @property
  def d_search(self) -> list[ScoredSolution]:
    """Everything searched: found solutions, then relabelled ones."""
    return [*self.pool("search"), *self.pool("hindsight")]

  @property
  def d_expert(self) -> list[ScoredSolution]:
    """The best correct solutions of each problem, from all sources."""
    return self.pool(EXPERT)

  @property
  def newest_iteration(self) -> int:
    """The iteration of the newest entry of all; 0 where there is none."""
    found = (e.iteration for source in SOURCES for e in self.pool(source))
    return max(found, default=0)

  def sample(
    self,
    rng: np.random.Generator,
    n: int,
    pool: str,
    *,
    recency: float | None = None,
    priority: str = "none",
    max_age: int | None = None,
    iteration: int | None = None,
  ) -> list[ScoredSolution]:
    """Draws n entries of a pool, evenly or by the weights of `weighted`.

    Evenly, by default, there are no repeats as far as the entries reach; where
    n exceeds the pool, every entry is taken as often as every other, give or
    take one. By weights an entry of share s comes n * s times on average, and
    never more than one from that: systematic sampling, as even as the weights
    allow.

    Args:
      rng: draws.
      n: entries to draw.
      pool: as in `pool`.
      recency: as in `weighted`; so are the three that follow.
      priority: what raises the weight of an entry.
      max_age: age of the oldest entry to be drawn.
      iteration: the present one.

    Raises:
      ValueError: the pool is unknown, or nothing in it may be drawn; or as in
        `weighted`.
    """
    if recency is None and priority == "none" and max_age is None:
      entries = self.pool(pool)
      if not entries:
        raise ValueError(f"pool {pool!r} is empty: nothing to draw {n} from")
      whole = [rng.permutation(len(entries)) for _ in range(n // len(entries))]
      rest = rng.choice(len(entries), n % len(entries), replace=False)
      return [entries[i] for i in np.concatenate([*whole, rest]).tolist()]
    entries, shares, num_stale = self.weighted(
      pool,
      recency=recency,
      priority=priority,
      max_age=max_age,
      iteration=iteration,
    )
    if not entries:
      cause = "is empty"
      if num_stale:
        cause = f"has {num_stale} entries, all older than max_age={max_age}"
      raise ValueError(f"pool {pool!r} {cause}: nothing to draw {n} from")
    # Each entry is an interval of length n * share on a line, in random order;
    # marks a unit apart, from a random start, say how often each is taken.
    order = rng.permutation(len(entries))
    ends = np.cumsum(shares[order])
    ends *= n / ends[-1]
    marks = rng.random() + np.arange(n)
    taken = order[np.searchsorted(ends[:-1], marks, side="right")]
    return [entries[i] for i in rng.permutation(taken).tolist()]

  def weighted(
    self,
    pool: str,
    *,
    recency: float | None = None,
    priority: str = "none",
    max_age: int | None = None,
    iteration: int | None = None,
  ) -> tuple[list[ScoredSolution], np.ndarray, int]:
    """The entries of a pool with the share of draws that each gets.

    The weight of an entry is the product of

      recency     2^(-age / recency)
      difficulty  4 p (1 - p), highest for problems solved half of the time
      advantage   |outcome_reward - p|, highest for what was least expected

    with p = (right + 1) / (all + 2) over the entries of D_search proper (found
    by search, not relabelled) of the same problem: the rule of succession, so
    that no weight is 0 and a problem that was never searched has p = 1/2.
    Entries are distinct texts, so p is a rate among these. Replay in proportion
    to a priority is Schaul et al., arXiv 1511.05952; a draw's importance weight
    is 1 / (len(entries) * share).

    Args:
      pool: as in `pool`.
      recency: half-life of weights, in iterations; None for no decay.
      priority: "none", "difficulty" or "advantage".
      max_age: entries that are more iterations old than this are left out; 0
        keeps the present iteration alone, None keeps all.
      iteration: the present one, that ages count back from; by default that of
        the newest entry of any pool.

    Returns:
      `(entries, shares, num_stale)`: entries oldest first, `[n]` float64 that
      sums to 1, and how many were too old.

    Raises:
      ValueError: the pool or the priority is unknown, or an age is negative.
    """
    _check_choice("priority", priority, PRIORITIES)
    if recency is not None and not 0 < recency < np.inf:
      raise ValueError(
        f"recency={recency} must be a number of iterations above 0, or None "
        "for no decay"
      )
    entries = self.pool(pool)
    iterations, success, outcomes = self._weight_columns(pool)
    ages = np.maximum(self._present(iteration) - iterations, 0)
    weights = np.ones(len(entries))
    if recency is not None and len(entries):
      # From the youngest on, so that a pool that is old as a whole still has
      # weights above 0.
      weights *= 0.5 ** ((ages - ages.min()) / recency)
    if priority == "difficulty":
      weights *= 4 * success * (1 - success)
    elif priority == "advantage":
      weights *= np.abs(outcomes - success)
    kept = np.flatnonzero(_is_fresh(ages, max_age)).tolist()
    weights = weights[kept]
    shares = weights / weights.sum() if kept else weights
    return [entries[i] for i in kept], shares, len(entries) - len(kept)

  def groups(
    self,
    pool: str,
    iteration: int,
    *,
    min_size: int = 2,
    skip_alike: bool = False,
  ) -> tuple[list[list[ScoredSolution]], dict[str, int]]:
    """The solutions of each problem that one iteration found, together.

    A pool keeps a text of a problem once, so a group's mean outcome is over
    distinct texts; `group_solutions` takes a list with repeats. Arguments and
    results are those of `group_solutions`, of the entries of that iteration.
    """
    found = [e for e in self.pool(pool) if e.iteration == iteration]
    return group_solutions(found, min_size=min_size, skip_alike=skip_alike)

  def pairs(
    self,
    rng: np.random.Generator,
    pool: str = "search",
    *,
    max_per_problem: int = 1,
    min_gap: float = 0.0,
    max_age: int | None = None,
    iteration: int | None = None,
  ) -> tuple[list[tuple[ScoredSolution, ScoredSolution]], dict[str, int]]:
    """Pairs of solutions of one problem, the better one first.

    Problems come in the order of their first entry. Of each, pairs are drawn
    without repeats, uniformly from all whose outcomes differ.

    Args:
      rng: draws the pairs.
      pool: as in `pool`.
      max_per_problem: pairs of one problem.
      min_gap: the outcomes of a pair differ by more than this.
      max_age: as in `weighted`.
      iteration: as in `weighted`.

    Returns:
      `(pairs, counts)`: (preferred, dispreferred) each, and the counts
      `pairs`; `problems`, all of them; `all_right` and `all_wrong`, problems
      without a pair, the former where every outcome is 1; and `stale`, entries
      that were too old.

    Raises:
      ValueError: an unknown pool, or a number out of its range.
    """
    if max_per_problem < 1:
      raise ValueError(f"max_per_problem={max_per_problem} must be at least 1")
    if not 0 <= min_gap < 1:
      raise ValueError(f"min_gap={min_gap} is not in [0, 1)")
    entries, _, num_stale = self.weighted(
      pool, max_age=max_age, iteration=iteration
    )
    groups = _by_problem(entries)
    pairs = []
    counts = {"all_right": 0, "all_wrong": 0}
    for group in groups:
      outcomes = np.array([entry.outcome_reward for entry in group])
      gaps = outcomes[:, None] - outcomes[None, :]
      found = np.argwhere(gaps > min_gap)
      if not len(found):
        counts["all_right" if outcomes.min() == 1 else "all_wrong"] += 1
        continue
      num_drawn = min(max_per_problem, len(found))
      drawn = rng.choice(len(found), num_drawn, replace=False)
      pairs += [(group[i], group[j]) for i, j in found[drawn].tolist()]
    counts |= {"pairs": len(pairs), "problems": len(groups), "stale": num_stale}
    return pairs, counts

  def attempts(
    self,
  ) -> list[tuple[list[ScoredSolution], list[ScoredSolution]]]:
    """Right and wrong solutions that search found, by problem.

    Problems without a right one are left out; the others come in the order of
    their first solution.
    """
    if self._attempts is None:
      parted = [
        (
          [entry for entry in group if entry.outcome_reward == 1],
          [entry for entry in group if entry.outcome_reward < 1],
        )
        for group in _by_problem(self.pool("search"))
      ]
      self._attempts = [both for both in parted if both[0]]
    return self._attempts

  def success_rates(self) -> list[tuple[Problem, float]]:
    """Problems that search tried, each with the share of right solutions.

    Solutions are distinct texts; problems come in the order of their first.
    """
    if self._rates is None:
      self._rates = [
        (
          group[0].problem,
          sum(entry.outcome_reward == 1 for entry in group) / len(group),
        )
        for group in _by_problem(self.pool("search"))
      ]
    return self._rates

  def _present(self, iteration: int | None) -> int:
    return self.newest_iteration if iteration is None else iteration

  def _weight_columns(self, pool: str) -> tuple[np.ndarray, ...]:
    if pool not in self._columns:
      tried: dict[str, list[int]] = {}
      for entry in self.pool("search"):
        counts = tried.setdefault(entry.problem.id, [1, 2])
        counts[0] += entry.outcome_reward
        counts[1] += 1
      entries = self.pool(pool)
      rates = [tried.get(entry.problem.id, (1, 2)) for entry in entries]
      self._columns[pool] = (
        np.array([entry.iteration for entry in entries], np.int64),
        np.array([right / count for right, count in rates], np.float64),
        np.array([entry.outcome_reward for entry in entries], np.float64),
      )
    return self._columns[pool]

  def to_arrays(self) -> dict[str, np.ndarray]:
    """Returns all entries as a flat dict of arrays, none of them empty."""
    entries = [entry for source in SOURCES for entry in self.pool(source)]
    if not entries:
      return {"num_entries": np.zeros(1, np.int64)}
    table: dict[tuple, int] = {}
    known: dict[int, int] = {}
    indices = []
    for entry in entries:
      problem = entry.problem
      if id(problem) not in known:
        row = _problem_values(problem)
        key = json.dumps(row)
        known[id(problem)] = table.setdefault(key, len(table))
      indices.append(known[id(problem)])
    arrays = {
      "num_entries": np.array([len(entries)], np.int64),
      "problems": _to_bytes([json.loads(row) for row in table]),
      "problem": np.array(indices, np.int64),
      "texts": _to_bytes([entry.text for entry in entries]),
      "verdicts": _to_bytes([entry.verdict for entry in entries]),
      "source": np.array([SOURCES.index(e.source) for e in entries], np.int8),
      "num_tokens": np.array([len(e.tokens) for e in entries], np.int64),
      "tokens": np.concatenate([entry.tokens for entry in entries]),
    }
    for name, dtype in _NUMBERS.items():
      arrays[name] = np.array([getattr(e, name) for e in entries], dtype)
    for name in FLOAT_ARRAYS:
      arrays[name] = np.concatenate([getattr(e, name) for e in entries])
    return {name: array for name, array in arrays.items() if array.size}

  @classmethod
  def from_arrays(
    cls, arrays: Mapping[str, np.ndarray], **limits: int
  ) -> "Experience":
    """Rebuilds exactly what `to_arrays` gave; limits as in the constructor."""
    experience = cls(**limits)
    if not arrays["num_entries"][0]:
      return experience
    problems = [Problem(*row) for row in _from_bytes(arrays["problems"])]
    num_tokens = arrays["num_tokens"]
    starts = np.cumsum(num_tokens)[:-1]
    # An empty array is not stored: checkpoint formats refuse it.
    stored = num_tokens.any()
    columns = {
      "problem": [problems[i] for i in arrays["problem"].tolist()],
      "text": _from_bytes(arrays["texts"]),
      "verdict": _from_bytes(arrays["verdicts"]),
      "source": [SOURCES[i] for i in arrays["source"].tolist()],
    }
    for name in ("tokens", *FLOAT_ARRAYS):
      columns[name] = np.split(arrays[name] if stored else np.zeros(0), starts)
    for name in _NUMBERS:
      columns[name] = arrays[name].tolist()
    rows = zip(*columns.values(), strict=True)
    experience.add(
      ScoredSolution(**dict(zip(columns, row, strict=True))) for row in rows
    )
    return experience


def best_correct(
  entries: Sequence[ScoredSolution], *, max_per_problem: int
) -> list[ScoredSolution]:
  """Keeps the shortest correct solutions of each problem: D_expert.

  Correct is an `outcome_reward` of 1. Ties in the number of tokens go to the
  earlier entry, equal texts count once, problems come in order of their first
  correct entry.

  Args:
    entries: solutions, oldest first.
    max_per_problem: distinct texts kept of each problem.
  """
  by_problem: dict[str, dict[str, ScoredSolution]] = {}
  for entry in entries:
    if entry.outcome_reward == 1:
      texts = by_problem.setdefault(entry.problem.id, {})
      texts.setdefault(entry.text, entry)
  best = []
  for texts in by_problem.values():
    ranked = sorted(texts.values(), key=lambda entry: len(entry.tokens))
    best.extend(ranked[:max_per_problem])
  return best


def group_solutions(
  entries: Iterable[ScoredSolution],
  *,
  min_size: int = 2,
  skip_alike: bool = False,
) -> tuple[list[list[ScoredSolution]], dict[str, int]]:
  """Solutions of one problem together, for baselines of a group.

  Group-relative advantages are those of GRPO (arXiv 2402.03300) and leave-one-
  out ones those of RLOO (arXiv 2402.14740); to leave out groups that teach
  nothing is the dynamic sampling of DAPO (arXiv 2503.14476).

  Args:
    entries: solutions, repeats included where they were drawn more than once.
    min_size: smaller groups are left out; a baseline of others needs 2.
    skip_alike: leave out groups whose outcomes are all the same: no solution
      of them has an advantage.

  Returns:
    `(groups, counts)`: groups in the order of their first solution, and the
    counts `groups`; `solutions` in them; `small`, groups left out for their
    size; and `alike`, groups of one outcome, whether left out or not.

  Raises:
    ValueError: min_size is below 1.
  """
  if min_size < 1:
    raise ValueError(f"min_size={min_size} must be at least 1")
  found = _by_problem(entries)
  groups = [group for group in found if len(group) >= min_size]
  small = len(found) - len(groups)
  mixed = [g for g in groups if len({e.outcome_reward for e in g}) > 1]
  alike = len(groups) - len(mixed)
  groups = mixed if skip_alike else groups
  counts = {"groups": len(groups), "solutions": sum(map(len, groups))}
  return groups, counts | {"small": small, "alike": alike}


def make_learner_batch(
  prompts: Sequence[np.ndarray],
  entries: Sequence[ScoredSolution],
  *,
  length: int,
  policy_weights: str,
  value_positions: str,
  step_end_ids: Sequence[int] = (),
  pad_id: int = 0,
) -> tuple[LearnerBatch, int]:
  """Lays solutions out as rows, prompt first, padded on the right.

  Token i of a solution after a prompt of p tokens lies at position p + i, and
  the weight of its log-prob at p + i - 1. A row that is longer than `length`
  is left empty, so that every batch has the same shape, and counted.

  Args:
    prompts: tokens of each entry's prompt, one or more each.
    entries: the solutions, B of them.
    length: T, positions of a row.
    policy_weights: "ones" on the tokens of the solution (cloning),
      "step_weights" (AlphaGo Zero) or "zeros" (rows for the value alone).
    value_positions: where the outcome is the value's target: "all" from the
      last token of the prompt on, "steps" only there, at the ends of steps and
      at the last token, "end" at the last token alone, or "none".
    step_end_ids: tokens that end a step; read by "steps".
    pad_id: token of the padding, which has weight 0.

  Returns:
    `(batch, num_dropped)`, the batch in NumPy arrays.

  Raises:
    ValueError: an unknown choice, an empty prompt, unequal numbers of prompts
      and entries.
  """
  _check_choice("policy_weights", policy_weights, POLICY_WEIGHTS)
  _check_choice("value_positions", value_positions, VALUE_POSITIONS)
  if len(prompts) != len(entries):
    raise ValueError(f"{len(prompts)} prompts but {len(entries)} entries")
  starts = np.array([len(prompt) for prompt in prompts], np.int32)
  if not starts.all():
    raise ValueError(
      f"prompt {int(np.argmin(starts))} has no tokens: the first token of a "
      "solution has nothing to be predicted from"
    )
  ends = starts + np.array([len(e.tokens) for e in entries], np.int32)
  fits = ends <= length
  starts, ends = np.where(fits, starts, 1), np.where(fits, ends, 0)
  kept = np.flatnonzero(fits).tolist()
  outcomes = np.array([entry.outcome_reward for entry in entries], np.float32)

  # A boolean mask reads and writes in row-major order: one flat copy fills all.
  positions = np.arange(length, dtype=np.int32)[None, :]
  is_token = positions < ends[:, None]
  shape = is_token.shape
  tokens = np.full(shape, pad_id, np.int32)
  weights = np.zeros(shape, np.float32)
  if kept:
    parts = [part for i in kept for part in (prompts[i], entries[i].tokens)]
    tokens[is_token] = np.concatenate(parts)
  after_prompt = positions >= starts[:, None] - 1
  is_predicting = after_prompt & (positions < ends[:, None] - 1)
  if policy_weights == "ones":
    weights[is_predicting] = 1
  elif policy_weights == "step_weights" and kept:
    weights[is_predicting] = np.concatenate(
      [entries[i].step_weights for i in kept]
    )
  has_value = after_prompt & is_token
  if value_positions == "steps":
    is_end = np.isin(tokens, np.asarray(step_end_ids, np.int32))
    is_edge = (positions == starts[:, None] - 1) | (
      positions == ends[:, None] - 1
    )
    has_value &= is_end | is_edge
  elif value_positions == "end":
    has_value &= positions == ends[:, None] - 1
  elif value_positions == "none":
    has_value &= False
  batch = LearnerBatch(
    tokens=tokens,
    lengths=ends.astype(np.int32),
    policy_weights=weights,
    value_targets=np.where(has_value, outcomes[:, None], np.float32(0)),
    value_weights=has_value.astype(np.float32),
  )
  return batch, len(entries) - len(kept)


def _by_problem(entries) -> list[list[ScoredSolution]]:
  groups: dict[str, list[ScoredSolution]] = {}
  for entry in entries:
    groups.setdefault(entry.problem.id, []).append(entry)
  return list(groups.values())


def _is_fresh(ages: np.ndarray, max_age: int | None) -> np.ndarray:
  if max_age is None:
    return np.ones(len(ages), bool)
  if max_age < 0:
    raise ValueError(
      f"max_age={max_age} must be 0 or more iterations, or None for no limit"
    )
  return ages <= max_age


def _problem_values(problem):
  return [problem.id, problem.task, problem.prompt, dict(problem.data)]


def _to_bytes(rows):
  # JSON in ASCII: any string survives, lone surrogates too.
  return np.frombuffer(json.dumps(rows).encode("ascii"), np.uint8)


def _from_bytes(array):
  return json.loads(np.asarray(array).tobytes().decode("ascii"))


def _check_choice(name, value, choices):
  if value not in choices:
    raise ValueError(
      f"{name}={value!r} is unknown; take one of {', '.join(choices)}"
    )


def _normalize(entry):
  """A copy with arrays of its own, in the dtypes that the checkpoint keeps."""
  _check_choice("source", entry.source, SOURCES)
  if not 0 <= entry.outcome_reward <= 1:
    raise ValueError(f"outcome_reward={entry.outcome_reward} is not in [0, 1]")
  arrays = {"tokens": np.array(entry.tokens, np.int32)}
  for name in FLOAT_ARRAYS:
    arrays[name] = np.array(getattr(entry, name), np.float32)
  shapes = {name: array.shape for name, array in arrays.items()}
  if len(set(shapes.values())) > 1 or arrays["tokens"].ndim != 1:
    raise ValueError(f"the arrays of a solution differ in shape: {shapes}")
  return dataclasses.replace(entry, **arrays)
