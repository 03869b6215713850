"""Rows that are made anew in every iteration, from what was just searched.

Kinds of rows of a mix (`rows`) that need more than the experience keeps:

  policy_gradient  every draw of this iteration, with its advantage
  best             the best draw of each problem, to be cloned
  process          every finished solution, each of its steps with the share of
                   right solutions through it as the value's target
  linearized       each tree with a right solution as a chain of thought
  pairs            a preferred and a dispreferred solution, or step

What they need of the trainer, its values and the reference's log-probs, is
computed once, before the iteration's first update. Draws whose values nothing
reads keep the search's log-probs; the trainer then looks at a few of them, to
see that searching and learning agree.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from o1jax import combinations, rollouts, scoring
from o1jax.encoding import Policy
from o1jax.experience import Experience, make_learner_batch
from o1jax.learned_texts import chain_document, chain_entries
from o1jax.learning.baselines import MovingBaseline
from o1jax.learning.objective import Objective, PolicyGradient
from o1jax.learning.update import TrainState
from o1jax.linearize import linearize
from o1jax.packing import empty_rows, pack_rows
from o1jax.process_rewards import Process, with_step_labels
from o1jax.rollouts import Advantages, Deck, Pairs, ScoreFn
from o1jax.rows import FRESH
from o1jax.searched import Searched
from o1jax.tasks.task import Task
from o1jax.types import Problem, ScoredSolution, Verdict

# Wrong solutions told in a chain of thought that is made of a tree.
MAX_DEAD_ENDS = 3
# Draws that the trainer itself looks at where nothing reads its values.
NUM_COMPARED = 2
REFERENCES = ("none", "start", "iteration")
# Baselines and rewards that compare the draws of a problem.
OF_GROUPS = ("group", "group_std", "leave_one_out", "vbon")


class FreshRows:
  """Makes the decks of one mix, iteration by iteration."""

  def __init__(
    self,
    policy: Policy,
    task: Task,
    mix: Mapping[str, int],
    score_fn: ScoreFn,
    *,
    reference: str,
    advantages: Advantages,
    pairs: Pairs,
    process: Process,
    max_value_change: float,
  ):
    """Takes options that `check` accepts; `score_fn` is from `make_score`.

    `max_value_change` is that of `PolicyGradient`; above 0 it reads values.

    Raises:
      ValueError: the length penalty has no lengths between its ends.
    """
    lengths = policy.lengths
    self._max_tokens = lengths.num_steps * lengths.step_tokens
    if advantages.free_length >= self._max_tokens:
      raise ValueError(
        f"learn.advantages.free_length={advantages.free_length} must be below "
        f"the {self._max_tokens} tokens of the longest solution"
      )
    self._reference = reference
    self._policy = policy
    self._task = task
    self._kinds = [kind for kind in FRESH if mix.get(kind)]
    self._score_fn = score_fn
    self._advantages = advantages
    self._pairs = pairs
    self._process = process
    self._reads_values = (
      advantages.baseline == "value"
      or advantages.truncated == "bootstrap"
      or max_value_change > 0
    )

  def __bool__(self) -> bool:
    """Whether the mix has any such rows."""
    return bool(self._kinds)

  def decks(
    self,
    state: TrainState,
    searched: Sequence[Searched],
    verdicts: Sequence[Sequence[Verdict]],
    experience: Experience,
    moving: MovingBaseline,
    rng: np.random.Generator,
    iteration: int,
  ) -> tuple[dict[str, Deck], MovingBaseline, dict[str, float]]:
    """Rows of each kind, the moving baseline, and numbers for the log.

    Args:
      state: of the trainer; its moving average is what searched.
      searched: this iteration's searches.
      verdicts: of each of their solutions.
      experience: with this iteration's solutions in it.
      moving: baseline of earlier iterations.
      rng: draws pairs.
      iteration: the present one.
    """
    decks, values = {}, {}
    for kind in self._kinds:
      if kind == "policy_gradient":
        rows, moving, numbers = self._drawn(state, searched, verdicts, moving)
      elif kind == "best":
        rows, numbers = self._best(searched, verdicts, iteration)
      elif kind == "process":
        rows, numbers = self._labelled(searched, verdicts, iteration)
      elif kind == "linearized":
        rows, numbers = self._linearized(searched, verdicts)
      else:
        rows, numbers = self._paired(
          state, searched, experience, rng, iteration
        )
      decks[kind] = Deck(rows)
      values |= {f"learn/{name}": number for name, number in numbers.items()}
    return decks, moving, values

  def _drawn(self, state, searched, verdicts, moving):
    lengths = self._policy.lengths
    draws = rollouts.collect(
      searched,
      verdicts,
      [self._prompt(one.problem) for one in searched],
      length=lengths.row_tokens,
      pad_id=self._policy.tokenizer.pad_id,
    )
    rows = draws.tokens, draws.lengths
    count = len(draws.tokens) if self._reads_values else NUM_COMPARED
    log_probs = draws.policy_log_probs.copy()
    values = np.zeros_like(log_probs)
    log_probs[:count], values[:count] = self._score(
      state.average_params, *(array[:count] for array in rows)
    )
    reference = log_probs
    # Another regime of the run may keep one that this regime does not.
    if self._reference != "none":
      reference, _ = self._score(state.reference_params, *rows)
    return rollouts.policy_gradient_rows(
      draws,
      self._advantages,
      moving,
      values=values,
      log_probs=log_probs,
      reference_log_probs=reference,
      max_tokens=self._max_tokens,
    )

  def _best(self, searched, verdicts, iteration):
    found = rollouts.best_draws(searched, verdicts)
    nothing = np.zeros(0, np.float32)
    entries = [
      ScoredSolution(
        problem=problem,
        text=solution.text,
        tokens=solution.tokens,
        step_weights=nothing,
        behavior_log_probs=solution.behavior_log_probs,
        policy_log_probs=solution.policy_log_probs,
        outcome_reward=float(verdict.is_correct),
        verdict=verdict.reason,
        iteration=iteration,
        source="search",
      )
      for problem, solution, verdict in found
    ]
    rows, num_dropped = make_learner_batch(
      [self._prompt(problem) for problem, *_ in found],
      entries,
      length=self._policy.lengths.row_tokens,
      policy_weights="ones",
      value_positions="none",
      pad_id=self._policy.tokenizer.pad_id,
    )
    return rows, {"best": len(found), "best_too_long": num_dropped}

  def _labelled(self, searched, verdicts, iteration):
    entries = scoring.score(
      self._task, searched, verdicts, iteration, relabels=False
    )
    prompts = [self._prompt(entry.problem) for entry in entries]
    rows, num_dropped = make_learner_batch(
      prompts,
      entries,
      length=self._policy.lengths.row_tokens,
      policy_weights="zeros",
      value_positions="none",
      pad_id=self._policy.tokenizer.pad_id,
    )
    rows = with_step_labels(
      rows,
      searched,
      verdicts,
      [len(prompt) for prompt in prompts],
      estimate=self._process.estimate,
    )
    return rows, {"process": len(entries), "process_too_long": num_dropped}

  def _linearized(self, searched, verdicts):
    lengths, mark = self._policy.lengths, self._task.thinking_mark
    width = lengths.reflection_tokens or lengths.row_tokens
    pad_id = self._policy.tokenizer.pad_id
    chains = []
    for one, judged in zip(searched, verdicts, strict=True):
      found = linearize(
        one,
        {s.node: v for s, v in zip(one.solutions, judged, strict=True)},
        max_dead_ends=MAX_DEAD_ENDS,
      )
      if found is not None:
        problem, text = found
        chains.append((problem, mark + text))
    entries = chain_entries(self._policy, self._task, chains)
    made = [
      chain_document(self._prompt(problem), entry)
      for (problem, _), entry in zip(chains, entries, strict=True)
    ]
    fitting = [document for document in made if len(document.tokens) <= width]
    numbers = {
      "linearized": len(made),
      "linearized_too_long": len(made) - len(fitting),
    }
    if not fitting:
      return empty_rows(0, width, pad_id=pad_id), numbers
    return pack_rows(fitting, width, pad_id=pad_id), numbers

  def _paired(self, state, searched, experience, rng, iteration):
    options = self._pairs
    if options.level == "step":
      pairs = rollouts.step_pairs(searched, min_margin=options.min_margin)
      counts = {}
    else:
      found, counts = experience.pairs(
        rng,
        max_per_problem=options.max_per_problem,
        max_age=options.max_age,
        iteration=iteration,
      )
      pairs = rollouts.solution_pairs(found)
    rows, num_dropped = rollouts.preference_rows(
      pairs,
      self._prompt,
      lambda *rows: self._score(state.reference_params, *rows)[0],
      length=self._policy.lengths.row_tokens,
      pad_id=self._policy.tokenizer.pad_id,
    )
    numbers = {"pairs": len(pairs), "pairs_too_long": num_dropped}
    if counts:
      skipped = counts["all_right"] + counts["all_wrong"]
      numbers["problems_without_pairs"] = skipped
    return rows, numbers

  def _score(self, params: Any, tokens, lengths):
    return rollouts.score_rows(self._score_fn, params, tokens, lengths)

  def _prompt(self, problem: Problem) -> np.ndarray:
    ids = self._policy.tokenizer.encode(problem.prompt)
    return np.array(ids, np.int32)


def check(
  mix: Mapping[str, int],
  *,
  reference: str,
  advantages: Advantages,
  process: Process,
  objective: Objective,
  search: Mapping[str, Any],
) -> str | None:
  """Refuses options of fresh rows that do not go together.

  Args:
    mix: rows of a batch by kind.
    reference: learn.reference.
    advantages: learn.advantages.
    process: learn.process.
    objective: options of the losses.
    search: fields of the search.

  Returns:
    A sentence about what is only approximately right, None where nothing is.

  Raises:
    ValueError: a field that must change.
  """
  if reference not in REFERENCES:
    raise ValueError(
      f"learn.reference={reference!r} is unknown; take one of "
      f"{', '.join(REFERENCES)}"
    )
  if mix.get("pairs") and reference == "none":
    raise ValueError(
      "learn.rows.pairs with learn.reference='none': preferences are measured "
      "against a reference; set it to 'start' or 'iteration'"
    )
  if process != Process() and not mix.get("process"):
    raise ValueError(
      f"learn.process.estimate={process.estimate!r} is not read without such "
      "rows: set learn.rows.process above 0, or leave it out"
    )
  if not mix.get("policy_gradient"):
    return None
  options = objective.policy_gradient
  _check_learning(reference, advantages, options)
  _check_draws(advantages, options, search)
  exists, reason = combinations.density(
    search["strategy"],
    search["top_k"],
    search["top_p"],
    search["min_p"],
    temperature=search["temperature"],
    options=search["options"],
  )
  if exists:
    return None
  if not advantages.allows_choice:
    raise ValueError(
      f"learn.rows.policy_gradient: {reason}, and a policy gradient would be "
      "of another distribution; take search.strategy=best_of_n with plain "
      "sampling, or set learn.advantages.allows_choice to accept that"
    )
  return f"policy gradients are approximate: {reason}"


def _check_learning(
  reference: str, advantages: Advantages, options: PolicyGradient
) -> None:
  """Refuses advantages that the loss or the reference do not go with."""
  if options.kl_coefficient and reference == "none":
    raise ValueError(
      f"learn.policy_gradient.kl_coefficient={options.kl_coefficient} with "
      "learn.reference='none': set it to 'start' or 'iteration', or the "
      "coefficient to 0"
    )
  if advantages.reward == "vbon" and reference != "iteration":
    raise ValueError(
      f"learn.advantages.reward='vbon' with learn.reference={reference!r}: "
      "quantiles are taken among draws of the reference, which are this "
      "iteration's; set learn.reference to 'iteration'"
    )
  if advantages.estimator == "vtrace" and (
    options.loss != "reinforce" or options.importance != "none"
  ):
    raise ValueError(
      "learn.advantages.estimator='vtrace' weighs by importance already, and "
      f"so do learn.policy_gradient.loss={options.loss!r} and importance="
      f"{options.importance!r}: set these to 'reinforce' and 'none', or the "
      "estimator to 'gae'"
    )


def _check_draws(
  advantages: Advantages, options: PolicyGradient, search: Mapping[str, Any]
) -> None:
  """Refuses draws that are too few, or of another temperature's policy."""
  num_draws = search["num_candidates"] * search["options"].get("num_rounds", 1)
  for name, others in (
    ("reward", "'outcome'"),
    ("baseline", "'moving' or 'value'"),
  ):
    chosen = getattr(advantages, name)
    if chosen in OF_GROUPS and num_draws < 2:
      raise ValueError(
        f"learn.advantages.{name}={chosen!r} with search.num_candidates="
        f"{search['num_candidates']}: it compares the draws of a problem, and "
        f"a group of one has no advantage; draw 2 or more, or take {others}"
      )
  is_plain = options.loss == "reinforce" and options.importance == "none"
  if is_plain and search["temperature"] != 1 and advantages.estimator == "gae":
    raise ValueError(
      f"learn.policy_gradient.importance='none' with search.temperature="
      f"{search['temperature']}: the draws are of another distribution than "
      "the policy; set importance to 'token' or 'sequence', or the temperature "
      "to 1"
    )
