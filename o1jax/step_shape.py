"""What a step of a search is: where it ends, how many follow each other.

Granularity is the choice of delimiters, length and depth: steps (delimiter and
end mark), whole solutions (end mark alone, depth 1), segments or tokens (a
fixed length after which the next step goes on). With an opening, steps are
whole solutions that follow each other: a node is an answer and its children are
revisions of it, written behind all answers on the path without their end marks.
"""

import dataclasses

from o1jax.encoding import Lengths

# Of searches whose nodes are parts of a solution.
GRANULARITIES = ("step", "segment", "token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepShape:
  """The candidates of an expansion, as tokens.

  Attributes:
    max_step_tokens: S, tokens of a step at most.
    max_depth: steps after which a solution is cut off.
    stop_ids: tokens that end a step (none for whole solutions).
    goes_on_where_cut: True lets the next step go on where one runs out of room
      without a delimiter: segments of S tokens, single tokens where S is 1.
      False cuts the solution off there.
    enumerates: the candidates begin with the A likeliest tokens, one each, in
      place of sampled ones; each node then expands once.
    opening: tokens that begin each revision, behind the answer that it revises;
      () where an answer is final. A step is a whole solution then (no
      stop_ids), and `max_depth` is the first answer and its revisions.
    feedback_tokens: F, most tokens of the feedback that the host gives on an
      answer, which follow the opening; 0 where the policy writes its own.

  Raises:
    ValueError: a size below 1, or an opening that does not fit.
  """

  max_step_tokens: int
  max_depth: int
  stop_ids: tuple[int, ...] = ()
  goes_on_where_cut: bool = False
  enumerates: bool = False
  opening: tuple[int, ...] = ()
  feedback_tokens: int = 0

  def __post_init__(self):
    if min(self.max_depth, self.max_step_tokens) < 1:
      raise ValueError(
        f"max_depth={self.max_depth} and max_step_tokens="
        f"{self.max_step_tokens} must each be at least 1"
      )
    is_part = self.stop_ids or self.goes_on_where_cut or self.enumerates
    if self.opening and is_part:
      raise ValueError(
        "an opening is for whole solutions: leave stop_ids, goes_on_where_cut "
        "and enumerates out"
      )
    if self.feedback_tokens and not self.opening:
      raise ValueError(
        f"feedback_tokens={self.feedback_tokens} without an opening: feedback "
        "begins a revision; set it to 0"
      )
    given = len(self.opening) + self.feedback_tokens
    if given >= self.max_step_tokens:
      raise ValueError(
        f"max_step_tokens={self.max_step_tokens} leaves no room behind the "
        f"{given} tokens of the opening and feedback: raise it"
      )

  @property
  def revises(self) -> bool:
    """Whether a finished answer may be followed by another."""
    return bool(self.opening)

  @property
  def max_tokens_behind(self) -> int:
    """The most tokens that can follow a step."""
    return self.max_step_tokens * (self.max_depth - 1)


def whole_solutions(lengths: Lengths) -> StepShape:
  """Candidates that are whole solutions."""
  num_tokens = lengths.step_tokens * lengths.num_steps
  return StepShape(max_step_tokens=num_tokens, max_depth=1)


def parts_of_solutions(
  lengths: Lengths, granularity: str, *, delimiter_id: int
) -> StepShape:
  """Candidates that are parts of a solution.

  Args:
    lengths: of the task's format.
    granularity: "step", what ends with the delimiter; "segment", as many tokens
      as a step may have; "token", the likeliest tokens, one each.
    delimiter_id: the token that ends a step.

  Raises:
    ValueError: an unknown granularity.
  """
  if granularity not in GRANULARITIES:
    raise ValueError(
      f"granularity={granularity!r}: choose one of {', '.join(GRANULARITIES)}"
    )
  if granularity == "token":
    return StepShape(
      max_step_tokens=1,
      max_depth=lengths.step_tokens * lengths.num_steps,
      goes_on_where_cut=True,
      enumerates=True,
    )
  is_step = granularity == "step"
  return StepShape(
    max_step_tokens=lengths.step_tokens,
    max_depth=lengths.num_steps,
    stop_ids=(delimiter_id,) if is_step else (),
    goes_on_where_cut=not is_step,
  )


def revisions(
  lengths: Lengths,
  opening: tuple[int, ...],
  *,
  num_revisions: int,
  takes_feedback: bool = False,
) -> StepShape:
  """Answers and their revisions: opening, a line of criticism, a solution.

  The policy writes the criticism itself, or it is feedback that it is given.

  Raises:
    ValueError: a negative number of revisions.
  """
  if num_revisions < 0:
    raise ValueError(f"num_revisions={num_revisions} must be 0 or more")
  num_lines = lengths.num_steps + 1
  return StepShape(
    max_step_tokens=len(opening) + lengths.step_tokens * num_lines,
    max_depth=1 + num_revisions,
    opening=opening,
    feedback_tokens=lengths.step_tokens if takes_feedback else 0,
  )
