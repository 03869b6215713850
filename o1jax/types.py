"""The words of the project, as frozen records.

Letters for shapes, used in every docstring: B problems, G solutions per
problem, N nodes of a tree, A candidate steps per node, R reasoning steps of a
solution, S tokens of one step, P prompt positions, T tokens of a sequence, V
vocabulary. Inside the transformer: L layers, D width, H query heads, J
key/value heads, E head width, F feed-forward width, C cache positions.

The road of the data: Problem (host strings) -> ProblemBatch [B, P] -> a search
tree -> ScoredSolution (host, with its checked outcome) -> LearnerBatch [B, T],
PolicyGradientBatch [B, T], PreferenceBatch [B, 2, T]. Documents that are read
from a file stand in a PackedBatch [B, T].
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import struct


@dataclasses.dataclass(frozen=True)
class Problem:
  """A question with a checkable answer, on the host.

  Attributes:
    id: stable name derived from the content; random keys derive from it.
    task: name of the task that made it and can check it.
    prompt: the text that the policy reads.
    data: what the checker needs, as plain JSON values.
  """

  id: str
  task: str
  prompt: str
  data: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a checker says about one solution text.

  Attributes:
    is_correct: True where the text solves the problem.
    reason: one short phrase; "correct", or the first thing that is wrong.
    answer: final answer in the task's normal form, None where none was read;
      solutions vote by it. It is read, not checked, and where the problem tells
      what is to be reached it is the way there (an expression, for numbers).
  """

  is_correct: bool
  reason: str
  answer: str | None


@dataclasses.dataclass(frozen=True)
class ScoredSolution:
  """A complete solution with its checked outcome and where it came from.

  Attributes:
    problem: the problem it answers; for relabelled solutions the new one.
    text: the solution as text, without the end mark.
    tokens: `[T]` int32 solution tokens, end mark included where there is one.
    step_weights: `[T]` weight of each token's log-prob in the AlphaGo Zero
      loss: the visit probability of the step that holds the token, 0 where
      another solution of the same tree carries that step.
    behavior_log_probs: `[T]` under the distribution the token was drawn from.
    policy_log_probs: `[T]` under the model itself at that time.
    outcome_reward: judgement of the final answer, in [0, 1].
    verdict: the checker's reason.
    iteration: the iteration that found it.
    source: "search", "hindsight" (relabelled with the target it reached) or
      "demonstration".
    num_visits: visits of its last node; 1 without a tree.
  """

  problem: Problem
  text: str
  tokens: np.ndarray
  step_weights: np.ndarray
  behavior_log_probs: np.ndarray
  policy_log_probs: np.ndarray
  outcome_reward: float
  verdict: str
  iteration: int
  source: str
  num_visits: int = 1


@struct.dataclass
class ProblemBatch:
  """Problems as arrays.

  Attributes:
    tokens: `[B, P]` int32 prompt tokens, padded on the right.
    lengths: `[B]` int32 tokens of each prompt.
    seeds: `[B]` uint32 hash of each problem's id; keys derive from it, so that
      a problem searches alike in any row of any batch.
  """

  tokens: jax.Array
  lengths: jax.Array
  seeds: jax.Array


@struct.dataclass
class Cost:
  """What a search spent, per problem; all `[B]` int32.

  Attributes:
    generated_tokens: tokens sampled from the policy.
    forward_tokens: tokens the network evaluated, prompts included.
    simulations: select-expand-evaluate-backup passes.
  """

  generated_tokens: jax.Array
  forward_tokens: jax.Array
  simulations: jax.Array


@struct.dataclass
class LearnerBatch:
  """Rows for one update; positions t predict the token at t + 1.

  Attributes:
    tokens: `[B, T]` int32 prompt and solution, padded on the right.
    lengths: `[B]` int32 tokens of each row; 0 for an empty row.
    policy_weights: `[B, T]` weight of log p(tokens[t + 1] | tokens[:t + 1]);
      0 where nothing is to be learned.
    value_targets: `[B, T]` expected return after tokens[:t + 1].
    value_weights: `[B, T]` weight of each value error; 0 where unknown.
  """

  tokens: jax.Array
  lengths: jax.Array
  policy_weights: jax.Array
  value_targets: jax.Array
  value_weights: jax.Array


@struct.dataclass
class PolicyGradientBatch:
  """Rows that were drawn by a known policy, with what they earned.

  Arrays are laid out as in `LearnerBatch`; where a weight is 0 the arrays that
  it weighs may hold anything.

  Attributes:
    tokens: `[B, T]` int32 prompt and solution, padded on the right.
    lengths: `[B]` int32 tokens of each row; 0 for an empty row.
    policy_weights: `[B, T]` weight of the token that follows; 0 on prompt and
      padding.
    advantages: `[B, T]` what the following token earned beyond a baseline.
    behavior_log_probs: `[B, T]` of the following token under what drew it.
    reference_log_probs: `[B, T]` under the reference policy.
    behavior_values: `[B, T]` value when the rows were drawn.
    value_targets: `[B, T]` expected return after tokens[:t + 1].
    value_weights: `[B, T]` weight of each value error; 0 where unknown.
  """

  tokens: jax.Array
  lengths: jax.Array
  policy_weights: jax.Array
  advantages: jax.Array
  behavior_log_probs: jax.Array
  reference_log_probs: jax.Array
  behavior_values: jax.Array
  value_targets: jax.Array
  value_weights: jax.Array


@struct.dataclass
class PreferenceBatch:
  """Pairs of rows of one problem: index 0 is preferred to index 1.

  Attributes:
    tokens: `[B, 2, T]` int32 prompt and solution, padded on the right.
    lengths: `[B, 2]` int32 tokens of each row.
    token_weights: `[B, 2, T]` not 0 where the following token is compared: on
      the solutions, or on one step of each.
    reference_log_probs: `[B, 2, T]` of the following token under the reference.
    pair_weights: `[B]` weight of each pair; 0 for an empty one.
  """

  tokens: jax.Array
  lengths: jax.Array
  token_weights: jax.Array
  reference_log_probs: jax.Array
  pair_weights: jax.Array


@struct.dataclass
class PackedBatch:
  """Rows of several documents each, which do not read each other.

  Attributes:
    tokens: `[B, T]` int32 documents one behind the other, padded on the right.
    segment_ids: `[B, T]` int32 document of each token, from 0 in each row; -1
      in padding.
    positions: `[B, T]` int32 place of each token in its document.
    policy_weights: `[B, T]` weight of the token that follows; 0 at the last
      token of a document and in padding.
  """

  tokens: jax.Array
  segment_ids: jax.Array
  positions: jax.Array
  policy_weights: jax.Array
