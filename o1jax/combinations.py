"""What searches there are, and which of their fields go together."""

from collections.abc import Mapping
from typing import Any

from o1jax.search import strategies
from o1jax.search.host_guidance import READ_ROLLOUTS
from o1jax.step_shape import GRANULARITIES

REWARDS = ("checker", "value")
# Strategies whose candidates are whole solutions, the last by temperature 0.
WHOLE = ("best_of_n", "majority_vote", "greedy")
# Those whose candidates are revisions of whole solutions.
REVISIONS = ("revision", "mctsr")
# Those that sample candidates side by side, so that equal ones stay apart.
SIDE_BY_SIDE = ("speculative_rejection", "revision")
STRATEGIES = (*strategies.STRATEGIES, "majority_vote")
# Those whose solutions are draws of the policy, all of them kept: the density
# that importance weights need exists. The others choose with which draws they
# go on (by argmax over scores or over visits), and of a choice there is none.
DRAWN = ("best_of_n", "majority_vote")
# Who criticises an answer that is revised.
FEEDBACKS = ("policy", "checker")


def search_name(strategy: str) -> str:
  """The name of its search in search/strategies.py."""
  return "best_of_n" if strategy == "majority_vote" else strategy


def density(
  strategy: str,
  top_k: int,
  top_p: float,
  min_p: float,
  *,
  temperature: float = 1.0,
  options: Mapping[str, Any] | None = None,
) -> tuple[bool, str]:
  """Whether a search's solutions have a density under what drew them, and why.

  Args:
    strategy: its name.
    top_k: of sampling, as min_p and top_p.
    top_p: as above.
    min_p: as above.
    temperature: of sampling; 0 takes the likeliest token.
    options: more of the strategy.

  Returns:
    `(exists, one sentence)`.
  """
  if strategy not in DRAWN:
    return False, (
      f"search.strategy={strategy!r} chooses which draws it goes on with, so "
      "its solutions have no density"
    )
  for name in strategies.STOP_OPTIONS:
    if options is not None and options.get(name) is not None:
      return False, (
        f"search.options.{name}={options[name]} ends a search by what it "
        "found, so how many draws there are depends on them"
      )
  if not temperature:
    return False, (
      "search.temperature=0 takes the likeliest token, which is no draw"
    )
  if top_k or top_p < 1 or min_p:
    return False, (
      f"search.top_k={top_k}, top_p={top_p} and min_p={min_p} leave out tokens "
      "that the policy gives mass to"
    )
  return True, f"solutions of search.strategy={strategy!r} are draws"


def check_combination(
  strategy: str,
  granularity: str,
  reward: str,
  guidance: Mapping[str, float] | None,
  num_rollouts: int,
  rollout_weight: float,
  feedback: str,
) -> None:
  """Refuses what is unknown or does not go together, with the reason.

  Raises:
    ValueError: a field that must change, or two of which one must.
  """
  for field, value, known in (
    ("strategy", strategy, STRATEGIES),
    ("granularity", granularity, GRANULARITIES),
    ("reward", reward, REWARDS),
    ("feedback", feedback, FEEDBACKS),
  ):
    if value not in known:
      raise ValueError(f"{field}={value!r}: choose one of {', '.join(known)}")
  if feedback == "checker" and strategy not in REVISIONS:
    raise ValueError(
      f"feedback='checker': strategy={strategy!r} does not revise; use one of "
      f"{', '.join(REVISIONS)}, or feedback='policy'"
    )
  readers = [n for n in READ_ROLLOUTS if guidance and guidance.get(n)]
  is_read = bool(rollout_weight or readers)
  is_lacking = rollout_weight and not num_rollouts
  if is_lacking or (num_rollouts and not is_read):
    raise ValueError(
      f"num_rollouts={num_rollouts} and rollout_weight={rollout_weight}: set "
      "both above 0, or both to 0; rollouts without a weight of their own are "
      f"for guidance.{' and guidance.'.join(READ_ROLLOUTS)}"
    )
  taken = strategies.option_names(search_name(strategy))
  if rollout_weight and "rollout_weight" not in taken:
    raise ValueError(
      f"rollout_weight={rollout_weight}: strategy={strategy!r} does not read "
      "rollouts; set rollout_weight to 0"
    )
  if num_rollouts and strategy in (*WHOLE, *REVISIONS):
    raise ValueError(
      f"num_rollouts={num_rollouts}: the candidates of strategy={strategy!r} "
      "are whole solutions, which leave nothing to roll out; set it to 0"
    )
  if granularity == "token" and strategy in (
    "speculative_rejection",
    "treebon",
  ):
    raise ValueError(
      f"granularity='token': strategy={strategy!r} begins many solutions at "
      "the root, which the likeliest tokens would make equal; use step or "
      "segment"
    )
  if guidance is not None and guidance.get("log_prob"):
    for field, value, what in (
      ("reward", reward, "checker"),
      ("strategy", strategy, "mctsr"),
      ("rollout_weight", rollout_weight > 0, True),
    ):
      if value == what:
        raise ValueError(
          f"guidance.log_prob with {field}={value!r}: a log-prob is below any "
          "outcome; use guidance.mean_prob, which is in [0, 1]"
        )


def check_says(
  strategy: str,
  reward: str,
  num_rollouts: int,
  guidance: Mapping[str, float],
) -> None:
  """Refuses guidances of which none has a word for some of the candidates.

  Args:
    strategy: its name.
    reward: its name.
    num_rollouts: of each candidate.
    guidance: weights by name.

  Raises:
    ValueError: what to change.
  """
  names = {name for name, weight in guidance.items() if weight}
  if "semantic_entropy" in names and num_rollouts < 2:
    raise ValueError(
      f"guidance.semantic_entropy with num_rollouts={num_rollouts}: it is that "
      "of a candidate's rollouts; set num_rollouts to 2 or more, with a "
      "strategy that grows solutions step by step"
    )
  of_finished = names - {"semantic_entropy"}
  if reward == "value" and not of_finished:
    raise ValueError(
      "guidance.semantic_entropy says nothing of finished solutions: give "
      "another guidance a weight too, or set reward='checker'"
    )
  is_grown = strategy not in (*WHOLE, *REVISIONS)
  if is_grown and names == {"self_consistency"} and not num_rollouts:
    raise ValueError(
      "guidance.self_consistency says nothing of unfinished solutions without "
      "rollouts: set num_rollouts to 1 or more, or give another guidance a "
      "weight too"
    )


def check_single_expansion(options: Mapping[str, Any]) -> None:
  """A node of tokens expands once: another time shows the same tokens.

  Raises:
    ValueError: an option that would expand it again.
  """
  for name in ("max_blocks", "num_root_blocks"):
    if options.get(name, 1) != 1:
      raise ValueError(
        f"granularity='token': {name}={options[name]} would expand a node "
        "again, to the same likeliest tokens; set it to 1"
      )


def check_stop_rules(
  strategy: str, answer_by: str, options: Mapping[str, Any]
) -> None:
  """A rule looks at scores, which a vote does not.

  The solution that it stops at would be one vote of many.

  Raises:
    ValueError: a stop rule of a search that has no use for one.
  """
  if strategy == "majority_vote":
    way, change = "strategy='majority_vote'", "leave it out"
  elif answer_by == "vote":
    way = "answer_by='vote'"
    change = "leave it out, or set answer_by to search, score or weighted_vote"
  else:
    return
  for name in strategies.STOP_OPTIONS:
    if options.get(name) is not None:
      raise ValueError(
        f"{name}={options[name]}: {way} answers by counting and has no best "
        f"solution to stop at; {change}"
      )
