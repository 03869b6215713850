"""Rows for an update: how many of each kind, and where they come from.

A mix names kinds of rows and how many of each stand in a batch. Some are
written by the task (demonstrations), some are what searches found
(experience). They differ in their weights (see `LearnerBatch`) and in width:
rows with judgements, revisions or comparisons, which are long, and openings,
which are short, stand in groups of their own widths, so that the others stay
cheap. Chains of thought, whose lengths differ most, are packed: several of them
in a row, as documents are. The kinds:

  random_play     demonstrations: legal play, target independent of the play
  consequences    the same, learned only where a step follows from its choice:
                  results and remaining numbers, not operands and operations
  optimal         demonstrations: a solver's path
  hindsight_play  demonstrations: legal play, relabelled with what it reached
  openings        the same, cut off behind what its first step chooses: what
                  most depends on, and is hardest, in few tokens
  search_trace    demonstrations: dead ends and backtracking in one text
  judging         demonstrations: a solution, right or wrong, and its judgement;
                  the judgement is learned
  revising        demonstrations: wrong solutions, criticism and a right one;
                  criticism and the right solution are learned
  revised         demonstrations: the same, the last solution right or wrong: it
                  is the value's target at the last step, nothing else
  retrying        demonstrations: chains of thought, wrong attempts and a right
                  one; of the attempts only results and remaining numbers are
                  learned
  retried         D_search: the same, of solutions that search found
  comparing       demonstrations: two solutions, and whether they say the same;
                  the comparison is learned
  long_thought    demonstrations: analysis, dead ends, checks and corrections
                  before the answer; the whole text is learned
  search          D_search: each step weighted by its share of visits, and the
                  outcome as the value's target (AlphaGo Zero)
  expert          D_expert: cloning of correct solutions
  hindsight       D_search: cloning of failures relabelled with what they reach
  value           D_search: the outcome as the value's target, nothing else
  questions       problems as texts behind the question mark: those of D_search,
                  weighted by 4 p (1 - p) with p the share of right solutions;
                  in the first phase any that the task draws
  policy_gradient this iteration: every draw, with its advantage
  best            this iteration: the best draw of each problem, cloned
  process         this iteration: the share of right solutions through each step
                  of a solution as the value's target, nothing else
  linearized      this iteration: trees as chains of thought, with their dead
                  ends, cloned
  pairs           a preferred and a dispreferred solution, or step: a row each
  documents       texts of a file, several in a row: pre-training
  instructions    dialogs of files, of which the responses are learned
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from o1jax.encoding import Lengths, Policy
from o1jax.experience import Experience, make_learner_batch
from o1jax.learned_texts import (
  after_mark,
  chain_document,
  chain_entries,
  demonstration,
  question_entry,
)
from o1jax.packing import Document, empty_rows, pack_batches
from o1jax.rollouts import Deck
from o1jax.tasks import reflection
from o1jax.tasks.task import Task
from o1jax.text_rows import TextRows
from o1jax.types import (
  LearnerBatch,
  PackedBatch,
  PolicyGradientBatch,
  PreferenceBatch,
  Problem,
  ScoredSolution,
)

# Kind of row -> kind of demonstration of the task.
DEMONSTRATIONS = {
  "random_play": "random_play",
  "consequences": "random_play",
  "optimal": "optimal",
  "hindsight_play": "hindsight",
  "openings": "hindsight",
  "search_trace": "search_trace",
  **{kind: kind for kind in reflection.KINDS},
  "long_thought": "long_thought",
  "retrying": "retrying",
}
# Those of play to the end, right or wrong.
PLAYED = ("random_play", "consequences", "hindsight_play")
# Those of words of their own, which the tokenizer has to see. Where there are
# marks in the text, only a part of it is learned.
REFLECTIONS = (*reflection.KINDS, "long_thought", "retrying")
# Those of chains of thought, several in a row, and who makes them.
CHAINS = ("retrying", "retried", "linearized")
# Wrong attempts in a row of `retried`: uniform from none to this many.
MAX_ATTEMPTS = 3
# Kind of row -> (pool of the experience, policy weights, value positions).
POOLS = {
  "search": ("search", "step_weights", "all"),
  "expert": ("expert", "ones", "none"),
  "hindsight": ("hindsight", "ones", "none"),
  "value": ("search", "zeros", "all"),
}
# Kinds that are made anew in every iteration (`fresh_rows`), and their group.
FRESH = {
  "policy_gradient": PolicyGradientBatch,
  "best": LearnerBatch,
  "process": LearnerBatch,
  "linearized": PackedBatch,
  "pairs": PreferenceBatch,
}
# Kinds that are drawn from files (`text_rows`), and their group.
TEXTS = {"documents": PackedBatch, "instructions": LearnerBatch}
# Kind of the problems that the policy learns to write.
QUESTIONS = "questions"
# Demonstrations by which the length of such rows is judged.
_NUM_TRIED = 500


def check_mix(mix: Mapping[str, int], task: Task, name: str) -> int:
  """Returns the rows of a batch.

  Raises:
    ValueError: an unknown kind of row, one that the task cannot write, a
      negative number, or no rows at all; names the config field.
  """
  for kind, count in mix.items():
    known = [*DEMONSTRATIONS, *POOLS, *FRESH, *TEXTS, "retried", QUESTIONS]
    if kind not in known:
      raise ValueError(f"{name}.{kind} is unknown: rows are {', '.join(known)}")
    if count < 0:
      raise ValueError(f"{name}.{kind}={count} must be 0 or more")
    if kind in DEMONSTRATIONS and count:
      wanted = DEMONSTRATIONS[kind]
      if wanted not in task.demonstration_kinds:
        raise ValueError(
          f"{name}.{kind}={count}, but task {task.name} has no such "
          f"demonstrations (it has {', '.join(task.demonstration_kinds)}): "
          "set it to 0"
        )
  total = sum(mix.values())
  if not total:
    raise ValueError(f"{name} has no rows: set at least one of them above 0")
  return total


def group_sizes(
  mix: Mapping[str, int], lengths: Lengths
) -> dict[tuple[type, int], int]:
  """Type and width of each group of a batch -> how many rows it has."""
  sizes: dict[tuple[type, int], int] = {}
  for kind, count in mix.items():
    if count:
      group = _group(kind, lengths)
      sizes[group] = sizes.get(group, 0) + count
  return sizes


def _group(kind: str, lengths: Lengths) -> tuple[type, int]:
  """The group of a batch in which rows of a kind stand."""
  groups = dict.fromkeys(CHAINS, PackedBatch) | FRESH | TEXTS
  return groups.get(kind, LearnerBatch), _width(kind, lengths)


def _width(kind: str, lengths: Lengths) -> int:
  """Positions of a row of a kind."""
  if kind == "openings":
    return lengths.opening_tokens
  if kind in (*REFLECTIONS, *CHAINS, *TEXTS):
    return lengths.reflection_tokens or lengths.row_tokens
  return lengths.row_tokens


class RowMaker:
  """Makes the batches of one mix."""

  def __init__(
    self,
    policy: Policy,
    task: Task,
    mix: Mapping[str, int],
    replay: Mapping[str, Any] | None = None,
    text_rows: TextRows | None = None,
    *,
    rates_questions: bool = False,
    play_outcomes: bool = False,
  ):
    """Takes a mix that `check_mix` accepts.

    `replay` are options of `Experience.sample`, for all rows of a pool;
    `text_rows` has what a mix with rows of texts draws from. With
    `rates_questions` rows of questions are problems of D_search by their
    success, else problems of the task's sampler, all alike. With
    `play_outcomes` the outcome of legal play (`PLAYED`) is the value's target
    at its last token, where it does not depend on who plays.

    Raises:
      ValueError: rows with judgements, revisions or problems, or openings, are
        longer than the config's lengths give them room for, or the tokenizer
        does not show where openings end.
    """
    self._policy = policy
    self._task = task
    self._mix = {kind: count for kind, count in mix.items() if count}
    self._replay = dict(replay or {})
    self._text_rows = text_rows
    self._rates_questions = rates_questions
    self._play_outcomes = play_outcomes
    self._prompts: dict[str, np.ndarray] = {}
    for kind in (*REFLECTIONS, QUESTIONS, "openings"):
      if kind in self._mix:
        self._check_length(kind)

  def batches(
    self,
    rng: np.random.Generator,
    experience: Experience,
    num_batches: int,
    decks: Mapping[str, Deck] | None = None,
  ) -> tuple[Any, int]:
    """Batches `[K, B, T]`, and the number of rows dropped as too long.

    Kinds come in the order of the mix, so that equal generators give equal
    batches. Rows of a pool that is still empty are left empty. Where groups of
    rows differ in width or in kind there is a tuple of such batches.

    Args:
      rng: draws.
      experience: what pools are drawn from.
      num_batches: K.
      decks: rows of this iteration by kind, for a mix that has such kinds.
    """
    parts: dict[tuple[type, int], list[Any]] = {}
    num_dropped = 0
    for kind, count in self._mix.items():
      if kind in ("retrying", "retried"):
        rows, dropped = self._chains(rng, experience, kind, num_batches, count)
      elif kind == "documents":
        packed = self._text_rows.documents(rng, num_batches, count)
        rows, dropped = jax.tree.map(np.concatenate, packed), 0
      elif kind == "instructions":
        rows, dropped = self._text_rows.instructions(rng, num_batches * count)
      elif kind == QUESTIONS:
        rows, dropped = self._questions(rng, experience, num_batches * count)
      elif kind in FRESH:
        rows, dropped = decks[kind].draw(rng, num_batches * count), 0
      elif kind in DEMONSTRATIONS:
        rows, dropped = self._demonstrations(rng, kind, num_batches * count)
      else:
        rows, dropped = self._pool_rows(
          rng, experience, kind, num_batches * count
        )
      parts.setdefault(_group(kind, self._policy.lengths), []).append(
        jax.tree.map(lambda x: x.reshape(num_batches, -1, *x.shape[1:]), rows)
      )
      num_dropped += dropped
    groups = tuple(
      jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), *group)
      for group in parts.values()
    )
    return groups if len(groups) > 1 else groups[0], num_dropped

  def _demonstrations(self, rng, kind, count):
    pairs = self._task.demonstrations(DEMONSTRATIONS[kind], rng, count)
    # Plays of the same numbers come one after another: spread them out.
    pairs = [pairs[i] for i in rng.permutation(count)]
    policy_weights, value_positions = "ones", "none"
    if kind == "revised":
      prompts, entries = self._encode(pairs)
      entries = list(map(self._judged, entries))
      policy_weights, value_positions = "zeros", "all"
    elif kind in REFLECTIONS:
      prompts, entries = self._encode_chains(pairs)
      policy_weights = "step_weights"
    else:
      prompts, entries = self._encode(pairs)
      if kind == "openings":
        entries = list(map(self._opening, entries))
      elif self._play_outcomes and kind in PLAYED:
        entries = list(map(self._judged, entries))
        value_positions = "end"
    batch, dropped = self._lay_out(
      kind, prompts, entries, policy_weights, value_positions
    )
    if kind == "consequences":
      batch = self._without_choices(batch)
    elif kind == "revised":
      batch = self._at_last_step(batch)
    return batch, dropped

  def _encode(self, pairs):
    """Prompts and entries of demonstrations."""
    prompts = self._encode_prompts(problem for problem, _ in pairs)
    texts = self._policy.tokenizer.encode_batch(text for _, text in pairs)
    return prompts, [
      demonstration(self._policy, *pair, tokens)
      for pair, tokens in zip(pairs, texts, strict=True)
    ]

  def _encode_chains(self, pairs):
    """The same for texts with marks, of which parts are learned."""
    prompts = self._encode_prompts(problem for problem, _ in pairs)
    return prompts, chain_entries(self._policy, self._task, pairs)

  def _encode_prompts(self, problems):
    encode = self._policy.tokenizer.encode_batch
    return list(map(np.array, encode(one.prompt for one in problems)))

  def _check_length(self, kind: str) -> None:
    rng = np.random.default_rng(0)
    if kind == QUESTIONS:
      encoded = self._encode_questions(self._sampled(rng, _NUM_TRIED))
    else:
      encoded = self._encode(
        self._task.demonstrations(DEMONSTRATIONS[kind], rng, _NUM_TRIED)
      )
    prompts, entries = encoded
    if kind == "openings":
      entries = list(map(self._opening, entries))
      if not all(len(entry.tokens) for entry in entries):
        raise ValueError(
          "the tokenizer has no piece with the mark "
          f"{self._task.consequence_mark!r} before which rows of openings end: "
          "set rows.openings to 0"
        )
    rows = zip(prompts, entries, strict=True)
    longest = max(len(prompt) + len(entry.tokens) for prompt, entry in rows)
    lengths = self._policy.lengths
    if kind == "openings":
      name = "opening_tokens"
    elif lengths.reflection_tokens and kind != QUESTIONS:
      name = "reflection_tokens"
    else:
      name = "row_tokens"
    width = _width(kind, lengths)
    if longest > width:
      raise ValueError(
        f"lengths.{name}={width} is too short for rows of {kind}, which have "
        f"up to {longest} tokens: raise it to {longest}, or set rows.{kind} "
        "to 0"
      )

  def _opening(self, entry: ScoredSolution) -> ScoredSolution:
    """What the first step chooses, without the mark of its consequences."""
    is_after = after_mark(self._policy, self._task, entry.tokens)
    end = int(np.argmax(is_after))
    return dataclasses.replace(
      entry, tokens=entry.tokens[:end], step_weights=entry.step_weights[:end]
    )

  def _judged(self, entry: ScoredSolution) -> ScoredSolution:
    """With the checker's verdict on the last solution."""
    solution = self._task.final_solution(entry.text)
    verdict = self._task.check(entry.problem, solution)
    return dataclasses.replace(
      entry,
      outcome_reward=float(verdict.is_correct),
      verdict=verdict.reason,
    )

  def _at_last_step(self, batch: LearnerBatch) -> LearnerBatch:
    """No value before the last step: of earlier solutions it is not."""
    index = np.arange(batch.tokens.shape[1])
    is_end = batch.tokens == self._policy.tokenizer.newline_id
    last_end = np.where(is_end, index, -1).max(1, keepdims=True)
    is_last = (index > last_end).astype(np.float32)
    return batch.replace(
      value_targets=batch.value_targets * is_last,
      value_weights=batch.value_weights * is_last,
    )

  def _without_choices(self, batch: LearnerBatch) -> LearnerBatch:
    """Weight 0 on every token of a step up to the mark of its consequences.

    The weight of a token lies at the position before it.
    """
    is_after = after_mark(self._policy, self._task, batch.tokens)
    weights = np.where(is_after, batch.policy_weights, np.float32(0))
    return batch.replace(policy_weights=weights)

  def _chains(self, rng, experience, kind, num_batches, num_rows):
    """Rows `[K * B, T]` of chains of thought, several in each."""
    width = _width(kind, self._policy.lengths)
    pad_id = self._policy.tokenizer.pad_id
    num_dropped = 0

    def fitting() -> list[Document]:
      nonlocal num_dropped
      made = self._chain_documents(
        rng, experience, kind, num_batches * num_rows
      )
      fit = [document for document in made if len(document.tokens) <= width]
      num_dropped += len(made) - len(fit)
      return fit

    first = fitting()
    if not first:
      rows = empty_rows(num_batches * num_rows, width, pad_id=pad_id)
      return rows, num_dropped
    # What follows the first is made as it is needed.
    more = (document for _ in itertools.count() for document in fitting())
    packed = pack_batches(
      itertools.chain(first, more),
      width,
      num_rows,
      num_batches,
      pad_id=pad_id,
    )
    return jax.tree.map(np.concatenate, packed), num_dropped

  def _chain_documents(self, rng, experience, kind, count):
    """So many of them; none where search has not solved what it failed in."""
    if kind == "retrying":
      pairs = self._task.demonstrations(kind, rng, count)
      pairs = [pairs[i] for i in rng.permutation(count)]
    else:
      pairs = self._retried(rng, experience.attempts(), count)
    return list(map(chain_document, *self._encode_chains(pairs)))

  def _retried(self, rng, tried, count):
    """Chains of thought from problems with right and wrong solutions."""
    pairs = []
    for place in rng.integers(0, len(tried), count if tried else 0):
      right, wrong = tried[place]
      limit = min(int(rng.integers(0, MAX_ATTEMPTS + 1)), len(wrong))
      drawn = rng.permutation(len(wrong))[:limit]
      solution = right[rng.integers(0, len(right))]
      attempts = [wrong[i].text for i in drawn]
      text = self._task.chain(solution.problem, attempts, solution.text)
      pairs.append((solution.problem, text))
    return pairs

  def _pool_rows(self, rng, experience, kind, count):
    pool, policy_weights, value_positions = POOLS[kind]
    if not experience.pool(pool):
      return self._empty(kind, count), 0
    entries = experience.sample(rng, count, pool, **self._replay)
    prompts = [self._prompt(entry.problem) for entry in entries]
    return self._lay_out(
      kind, prompts, entries, policy_weights, value_positions
    )

  def _questions(self, rng, experience, count):
    """Even draws: by weight, the first few would fill all rows for long."""
    if self._rates_questions:
      rated = experience.success_rates()
    else:
      rated = self._sampled(rng, count)
    if not rated:
      return self._empty(QUESTIONS, count), 0
    places = np.concatenate(
      [rng.permutation(len(rated)) for _ in range(-(-count // len(rated)))]
    )
    drawn = [rated[i] for i in places[:count].tolist()]
    return self._lay_out(
      QUESTIONS, *self._encode_questions(drawn), "step_weights", "none"
    )

  def _sampled(self, rng, count):
    """Problems of the sampler, each as if half of its solutions were right."""
    return [(one, 0.5) for one in self._task.sample_problems(rng, count)]

  def _encode_questions(self, rated):
    """Prompts and entries of problems with their rates of success."""
    entries = [
      question_entry(self._policy, self._task, *pair) for pair in rated
    ]
    return [self._prompt(entry.problem) for entry in entries], entries

  def _prompt(self, problem: Problem) -> np.ndarray:
    if len(self._prompts) > 100_000:
      self._prompts.clear()
    if problem.prompt not in self._prompts:
      ids = self._policy.tokenizer.encode(problem.prompt)
      self._prompts[problem.prompt] = np.array(ids)
    return self._prompts[problem.prompt]

  def _lay_out(self, kind, prompts, entries, policy_weights, value_positions):
    tokenizer = self._policy.tokenizer
    return make_learner_batch(
      prompts,
      entries,
      length=_width(kind, self._policy.lengths),
      policy_weights=policy_weights,
      value_positions=value_positions,
      step_end_ids=(tokenizer.newline_id, tokenizer.eos_id),
      pad_id=tokenizer.pad_id,
    )

  def _empty(self, kind: str, count: int) -> LearnerBatch:
    shape = (count, _width(kind, self._policy.lengths))
    zeros = np.zeros(shape, np.float32)
    return LearnerBatch(
      tokens=np.full(shape, self._policy.tokenizer.pad_id, np.int32),
      lengths=np.zeros(count, np.int32),
      policy_weights=zeros,
      value_targets=zeros,
      value_weights=zeros,
    )
