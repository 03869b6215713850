"""What the loop has found so far, and what it learns from.

`Experience` holds checked solutions on the host in pools by their source, each
under a size limit with the oldest leaving first: search and hindsight make up
D_search, demonstrations stand beside it, and D_expert is derived, the best
correct solutions of each problem. All of it goes into plain arrays for a
checkpoint; `o1jax.jsonl` has the form for people and other programs.
`make_learner_batch` lays entries out as rows for the update; position t
predicts the token at t + 1.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from o1jax.jsonl import FLOAT_ARRAYS, SOURCES
from o1jax.types import LearnerBatch, Problem, ScoredSolution

EXPERT = "expert"
POLICY_WEIGHTS = ("ones", "step_weights", "zeros")
VALUE_POSITIONS = ("all", "steps", "none")

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
    self._lists = {}

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

  def sample(
    self, rng: np.random.Generator, n: int, pool: str
  ) -> list[ScoredSolution]:
    """Draws n entries of a pool without repeats, as far as they reach.

    Where n exceeds the pool, every entry is taken as often as every other,
    give or take one.

    Raises:
      ValueError: the pool is empty or unknown.
    """
    entries = self.pool(pool)
    if not entries:
      raise ValueError(f"pool {pool!r} is empty: nothing to draw {n} from")
    whole = [rng.permutation(len(entries)) for _ in range(n // len(entries))]
    rest = rng.choice(len(entries), n % len(entries), replace=False)
    return [entries[i] for i in np.concatenate([*whole, rest]).tolist()]

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
      at the last token, or "none".
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
