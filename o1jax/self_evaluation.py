"""The policy judges its own solutions in writing, as guidance for a search.

Behind a finished solution, in place of its end mark, stands the task's judge
mark; then the policy writes what `tasks/reflection.py` taught it: the solution
recomputed, a line of criticism, and the verdict, one word on a line. The score
is

  P(yes) / (P(yes) + P(no))

at the verdict's place (P(True) of Kadavath et al., arXiv 2207.05221). The
judgement is decoded greedily: so the score is one of the solution, without the
luck of a draw. Where no verdict comes the policy has said nothing for the
solution and nothing against it, and the score is one half.
"""

import dataclasses

import jax
import jax.numpy as jnp

from o1jax.encoding import Lengths
from o1jax.policy import sample
from o1jax.policy.cache import Prefix
from o1jax.policy.network import Network, Params
from o1jax.policy.tokenizer import Tokenizer

UNDECIDED = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
  """A written judgement, as tokens.

  Attributes:
    mark: what stands before it, the end of the solution's last line included.
    verdicts: for right and for wrong.
    newline_id: what stands before a verdict.
    max_tokens: most tokens of a judgement, its mark included.
  """

  mark: tuple[int, ...]
  verdicts: tuple[int, int]
  newline_id: int
  max_tokens: int


def make_judgement(
  tokenizer: Tokenizer,
  lengths: Lengths,
  judge_mark: str,
  verdict_words: tuple[str, str],
) -> Judgement:
  """Room for a line a step, a line of criticism and a verdict.

  Args:
    tokenizer: the policy's.
    lengths: the policy's.
    judge_mark, verdict_words: of the task.

  Raises:
    ValueError: the task has no mark, or its verdicts are not one token each.
  """
  if not judge_mark:
    raise ValueError(
      "guidance.self_evaluation: the task has no judge mark, so that nothing "
      "taught its policy to judge; set it to 0"
    )
  return judgement_behind(
    tokenizer,
    judge_mark,
    verdict_words,
    max_tokens=lengths.step_tokens * (lengths.num_steps + 1) + 1,
    asker="guidance.self_evaluation",
    kind="judging",
  )


def judgement_behind(
  tokenizer: Tokenizer,
  mark: str,
  verdict_words: tuple[str, str],
  *,
  max_tokens: int,
  asker: str,
  kind: str,
) -> Judgement:
  """What is written behind a mark, up to a verdict.

  Args:
    tokenizer: the policy's.
    mark: of the task, a line.
    verdict_words: of the task.
    max_tokens: most tokens behind the mark.
    asker: who reads it, for the error.
    kind: of the rows that teach it.

  Raises:
    ValueError: the verdicts are not one token each.
  """
  encoded = [tokenizer.encode(word) for word in verdict_words]
  for word, tokens in zip(verdict_words, encoded, strict=True):
    if len(tokens) != 1:
      raise ValueError(
        f"{asker}: the verdict {word!r} has {len(tokens)} tokens and must "
        f"have 1; train the policy with rows.{kind} above 0, or do without it"
      )
  ids = tuple(tokenizer.encode(f"\n{mark}"))
  (right,), (wrong,) = encoded
  return Judgement(
    mark=ids,
    verdicts=(right, wrong),
    newline_id=tokenizer.newline_id,
    max_tokens=len(ids) + max_tokens,
  )


def judge(
  network: Network,
  params: Params,
  judgement: Judgement,
  last_hidden: jax.Array,
  next_positions: jax.Array,
  prefix: Prefix,
  is_active: jax.Array,
  *,
  eos_id: int,
  pad_id: int,
) -> tuple[jax.Array, jax.Array]:
  """Writes a judgement behind each solution.

  Args:
    network: the policy.
    params: its parameters.
    judgement: its form.
    last_hidden: `[rows, D]` at the last token of each solution.
    next_positions: `[rows]` position of what follows it.
    prefix: prompts and solutions, without end marks.
    is_active: `[rows]` which solutions to judge.
    eos_id: token that ends a text.
    pad_id: fills a text after its end.

  Returns:
    Scores in [0, 1], of those that are active, and tokens written, `[rows]`
    each.
  """
  num_rows = is_active.shape[0]
  mark = jnp.array(judgement.mark, jnp.int32)[None, None]
  rows = sample.decode_rows(
    network,
    params,
    # Not read: the likeliest token is taken.
    jax.random.split(jax.random.key(0), (num_rows, 1)),
    last_hidden,
    next_positions,
    prefix,
    num_rows=1,
    max_new_tokens=judgement.max_tokens,
    stop_ids=judgement.verdicts,
    eos_id=eos_id,
    pad_id=pad_id,
    controls=sample.make_controls(temperature=0.0),
    is_active=is_active[:, None],
    forced_tokens=jnp.broadcast_to(mark, (num_rows, 1, mark.shape[2])),
    forced_lengths=jnp.full((num_rows, 1), mark.shape[2]),
    watched_ids=judgement.verdicts,
  )
  lengths = rows.lengths[:, 0]
  before = sample.at_slots(rows.tokens[:, 0], lengths[:, None] - 2)[:, 0]
  has_verdict = rows.stopped[:, 0] & (before == judgement.newline_id)
  yes, no = rows.watched[:, 0, 0], rows.watched[:, 0, 1]
  return jnp.where(has_verdict, jax.nn.sigmoid(yes - no), UNDECIDED), lengths
