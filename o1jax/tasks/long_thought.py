"""Long thoughts about the numbers game: six behaviours in one text.

The behaviours are those of Zeng et al., arXiv 2412.14135, Section 3.3. Every
line of a thought is true unless it is meant to be found out, and all of it is
computed: the subgoal by an exact solution, the dead end by the exact solver.

  numbers 3 7 2, target 13            problem analysis
  13 = 7 + 6, need 6 from 3 2         task decomposition
  3 + 7 = 10 (left: 2 10)             task completion, on to a dead end
  check: 10 + 2 = 12, not 13          self-evaluation
  that fails, back to 3 7 2           self-correction
  instead try 3 * 2                   alternative proposal
  3 * 2 = 6 (left: 7 6)               task completion
  7 + 6 = 13 (left: 13)
  check 3 * 2 = 6, 7 + 6 = 13, ok     self-evaluation
  <answer>
  3 * 2 = 6 (left: 7 6)
  7 + 6 = 13 (left: 13)
  </answer>

What is corrected is a dead end, as here, or a slip of arithmetic:

  3 * 2 = 7 (left: 7 7)
  check: 3 * 2 = 6, not 7
  fix: 3 * 2 = 6 (left: 7 6)

Words are few, and each line is drawn from some paraphrases. The answer is what
the checker reads of the text. `request` asks for the behaviours by prompt.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from o1jax.behaviors import BEHAVIORS
from o1jax.tasks import numbers_game, numbers_text
from o1jax.tasks.numbers_faults import Step
from o1jax.tasks.numbers_game import Number, step_text
from o1jax.tasks.reflection import with_answer
from o1jax.types import Problem

KINDS = ("long_thought", "long_thought_wrong")

_ANALYSIS = (
  "numbers {numbers}, target {target}",
  "we have {numbers} and need {target}",
  "given {numbers}, goal {target}",
  "{numbers} add up to {sum}, we need {target}",
  "largest of {numbers} is {largest}, target {target}",
)
_DECOMPOSITION = (
  "{end}, need {parts}",
  "{end}, so first get {parts}",
  "subgoal {parts}, then {end}",
  "plan: {end} with {parts}",
)
_NOTHING_TO_MAKE = ("plan: {end}", "one step is left: {end}")
_ALTERNATIVE = (
  "instead try {operation}",
  "another way: {operation}",
  "alternatively {operation}",
  "what about {operation}",
)
_REFUTATION = (
  "{equation}, not {number}",
  "check: {equation}, not {number}",
  "verify {equation}, not {number}",
)
_MISS = (*_REFUTATION, "{equation}, but we need {number}")
_CONFIRMATION = (
  "check {equations}, ok",
  "verify {equations}, correct",
  "to be sure {equations}, right",
  "{equations}, yes",
)
_TAKEN_BACK = (
  "no good, back to {numbers}",
  "that fails, back to {numbers}",
  "wrong path, back to {numbers}",
)
_REPAIR = ("fix: ", "corrected: ", "my mistake: ", "wait, wrong: ")
_SLIPS = (-10, -2, -1, 1, 2, 10)
_MAX_PLAYS = 200
# About what a tokenizer makes of a text: numbers, words and signs.
_PIECE = re.compile(r"[0-9]+|[A-Za-z]+|[^\w ]|\n")

_REQUESTS = {
  "problem_analysis": "restate what is given and what is asked",
  "task_decomposition": "name the subgoals and their order",
  "task_completion": "carry out the steps one a line, with what is left",
  "alternative_proposal": "propose another way where one leads nowhere",
  "self_evaluation": "check results by computing them again",
  "self_correction": "say where something is wrong, and repair it",
}


def long_thought(
  rng: np.random.Generator,
  numbers: tuple[int, ...],
  target: int,
  solution: str,
  *,
  integers_only: bool,
  canonical: bool,
  behaviors: Iterable[str] = BEHAVIORS,
  max_dead_ends: int = 1,
  slip_share: float = 0.5,
  is_wrong: bool = False,
  max_pieces: int | None = None,
) -> str:
  """Writes one long thought.

  Args:
    rng: draws words, dead ends and the slip.
    numbers: the numbers of the problem.
    target: what is to be reached.
    solution: a right one, in lines.
    integers_only: the rule in force.
    canonical: dead ends take canonical steps, as in `numbers_game`.
    behaviors: those it shows. Steps are the solution, so `task_completion` is
      always among them.
    max_dead_ends: there are from one to this many, where there are any.
    slip_share: how often a slip is corrected, and not a dead end. Without dead
      ends it is always a slip.
    is_wrong: the same behaviours, and then a legal play that does not reach the
      target; it is confirmed line by line, but for its end.
    max_pieces: numbers, words and signs of the text; dead ends and the slip are
      left out, in this order, where it would be longer.

  Raises:
    ValueError: an option that is out of range, or a thought that does not fit.
  """
  shown = _checked(behaviors, max_dead_ends, slip_share, max_pieces)
  writer = _Writer(rng, numbers, target, integers_only, canonical, shown)
  path = _steps_of(solution)
  num_dead_ends = (
    int(rng.integers(1, max_dead_ends + 1)) if max_dead_ends else 0
  )
  is_slip = bool(rng.random() < slip_share)
  tries = [(count, is_slip) for count in range(num_dead_ends, -1, -1)]
  for count, slips in [*tries, (0, None)]:
    text = writer.write(path, count, slips, is_wrong)
    if max_pieces is None or num_pieces(text) <= max_pieces:
      return text
  raise ValueError(
    f"max_pieces={max_pieces}: the shortest thought about {len(numbers)} "
    f"numbers has {num_pieces(text)}; raise it"
  )


def num_pieces(text: str) -> int:
  """Numbers, words and signs of a text: about its tokens."""
  return len(_PIECE.findall(text))


def request(
  problem: Problem,
  examples: Sequence[tuple[Problem, str]] = (),
  behaviors: Iterable[str] = BEHAVIORS,
) -> str:
  """A prompt that asks a policy for behaviours, with examples if there are any.

  Args:
    problem: what is to be thought about.
    examples: pairs as demonstrations write them.
    behaviors: what is asked for, in this order.

  Raises:
    ValueError: a behaviour that does not exist.
  """
  asked = [_REQUESTS[name] for name in _known(behaviors)]
  lines = ["Think about the problem in writing:"]
  lines += [f"- {words}" for words in asked]
  lines.append("End with the solution between <answer> and </answer>.")
  for example, text in examples:
    lines += ["", f"Problem: {example.prompt.strip()}", text]
  return "\n".join([*lines, "", f"Problem: {problem.prompt.strip()}", ""])


def _known(behaviors: Iterable[str]) -> list[str]:
  names = [behaviors] if isinstance(behaviors, str) else list(behaviors)
  for name in names:
    if name not in BEHAVIORS:
      raise ValueError(f"behavior {name!r} is none of {', '.join(BEHAVIORS)}")
  return names


def _checked(
  behaviors, max_dead_ends, slip_share, max_pieces
) -> frozenset[str]:
  shown = frozenset(_known(behaviors))
  if "task_completion" not in shown:
    raise ValueError(
      "behaviors lack task_completion: the steps are the solution itself"
    )
  if type(max_dead_ends) is not int or max_dead_ends < 0:
    raise ValueError(f"max_dead_ends={max_dead_ends} must be 0 or more")
  if not 0.0 <= slip_share <= 1.0:
    raise ValueError(f"slip_share={slip_share} is not in [0, 1]")
  if max_pieces is not None and max_pieces < 1:
    raise ValueError(f"max_pieces={max_pieces} must be above 0")
  return shown


def _steps_of(solution: str) -> list[Step]:
  steps = []
  for line in solution.split("\n"):
    operation = numbers_text.read_operation(line)
    if operation is None:
      raise ValueError(f"not a step: {line!r}")
    _, _, tail = line.partition(" = ")
    result, _, left = tail.rstrip(")").partition(" (left: ")
    left = tuple(map(numbers_text.read_number, left.split(" ")))
    steps.append((*operation, numbers_text.read_number(result), left))
  return steps


def _words(numbers: Iterable[Number]) -> str:
  return " ".join(map(str, numbers))


def _equation(step: Step) -> str:
  a, op, b, result, _ = step
  return f"{a} {op} {b} = {result}"


class _Writer:
  """Writes thoughts about one problem."""

  def __init__(self, rng, numbers, target, integers_only, canonical, shown):
    self._rng = rng
    self._numbers = numbers
    self._target = target
    self._rules = integers_only, canonical
    self._shown = shown
    state = numbers_game.make_state(numbers)
    self._solver = numbers_game.solver_for(state, target, integers_only)

  def write(
    self, path: list[Step], num_dead_ends: int, is_slip: bool | None, is_wrong
  ) -> str:
    """The whole text; `is_slip` None corrects nothing."""
    final = self._other_end() if is_wrong else path
    lines = [*self._analysis(), *self._decomposition(path)]
    dead_ends = self._dead_ends(final, num_dead_ends)
    if is_slip is not None and not any(dead_ends):
      is_slip = True
    corrects = "self_correction" in self._shown and is_slip is not None
    slip = int(self._rng.integers(len(final))) if corrects and is_slip else -1
    takes_back = corrects and not is_slip
    for place, step in enumerate(final):
      before = final[place - 1][-1] if place else self._numbers
      branches = [*dead_ends[place], [step]]
      for number, branch in enumerate(branches):
        if number:
          if takes_back:
            lines.append(self._draw(_TAKEN_BACK, numbers=_words(before)))
            takes_back = False
          lines += self._alternative(branch[0])
        if number < len(branches) - 1:
          lines += self._refuted(branch)
      lines += self._slipped(step) if place == slip else [step_text(*step)]
    if "self_evaluation" in self._shown:
      equations = ", ".join(map(_equation, final))
      lines.append(self._draw(_CONFIRMATION, equations=equations))
    answer = "\n".join(step_text(*step) for step in final)
    return with_answer("\n".join(lines), answer)

  def _draw(self, phrases: Sequence[str], **words) -> str:
    return phrases[self._rng.integers(len(phrases))].format(**words)

  def _analysis(self) -> Iterator[str]:
    if "problem_analysis" in self._shown:
      yield self._draw(
        _ANALYSIS,
        numbers=_words(self._numbers),
        target=self._target,
        sum=sum(self._numbers),
        largest=max(self._numbers),
      )

  def _decomposition(self, path: list[Step]) -> Iterator[str]:
    """What the last step combines, and what that is made from."""
    if "task_decomposition" not in self._shown:
      return
    made = [(n, (n,)) for n in self._numbers]
    for a, _, b, result, _ in path[:-1]:
      first, second = _take(made, a), _take(made, b)
      made.append((result, first + second))
    a, op, b, _, _ = path[-1]
    sources = [(n, _take(made, n)) for n in (a, b)]
    parts = " and ".join(
      f"{n} from {_words(given)}" for n, given in sources if len(given) > 1
    )
    phrases = _DECOMPOSITION if parts else _NOTHING_TO_MAKE
    end = f"{self._target} = {a} {op} {b}"
    yield self._draw(phrases, end=end, parts=parts)

  def _alternative(self, step: Step) -> Iterator[str]:
    if "alternative_proposal" in self._shown:
      operation = _words(step[:3])
      yield self._draw(_ALTERNATIVE, operation=operation)

  def _refuted(self, branch: list[Step]) -> Iterator[str]:
    """A dead end; its last step is the check that finds it out."""
    *steps, last = branch
    for step in steps:
      yield step_text(*step)
    if "self_evaluation" in self._shown:
      yield self._draw(_MISS, equation=_equation(last), number=self._target)
    else:
      yield step_text(*last)

  def _slipped(self, step: Step) -> Iterator[str]:
    """A step with a false result, found out and repaired."""
    *operation, result, left = step
    near = [result + slip for slip in _SLIPS if result + slip >= 0]
    claim = near[self._rng.integers(len(near))] if near else result + 1
    others = list(left)
    others.remove(result)
    yield step_text(*operation, claim, (*others, claim))
    if "self_evaluation" in self._shown:
      yield self._draw(_REFUTATION, equation=_equation(step), number=claim)
    yield self._draw(_REPAIR) + step_text(*step)

  def _dead_ends(self, path: list[Step], count: int) -> list[list[list[Step]]]:
    """For each place of a path, plays from there that miss the target."""
    found: list[list[list[Step]]] = [[] for _ in path]
    places = self._rng.permutation(len(path)).tolist()
    while count and places:
      place = places[self._rng.integers(len(places))]
      left = path[place - 1][-1] if place else self._numbers
      used = [branch[0][:3] for branch in found[place]]
      branch = self._dead_end(left, [*used, path[place][:3]])
      if branch:
        found[place].append(branch)
        count -= 1
      else:
        places.remove(place)
    return found

  def _dead_end(self, left, used: list) -> list[Step]:
    """A play whose first step the solver knows to be fatal, [] for none."""
    steps = list(numbers_game.legal_steps(left, *self._rules))
    for i in self._rng.permutation(len(steps)):
      state = numbers_game.make_state(steps[i][-1])
      is_used = any(sorted(map(str, steps[i][:3])) == sorted(map(str, one))
                    for one in used)  # fmt: skip
      if not is_used and not self._solver.can_reach(state):
        return [steps[i], *self._play(steps[i][-1])]
    return []

  def _play(self, left) -> Iterator[Step]:
    while len(left) > 1:
      steps = list(numbers_game.legal_steps(left, *self._rules))
      step = steps[self._rng.integers(len(steps))]
      yield step
      left = step[-1]

  def _other_end(self) -> list[Step]:
    """A legal play that does not reach the target."""
    for _ in range(_MAX_PLAYS):
      play = list(self._play(self._numbers))
      if play[-1][3] != self._target:
        return play
    raise ValueError(
      f"no play of {_words(self._numbers)} was found that misses {self._target}"
    )


def _take(made: list[tuple[Number, tuple]], number: Number) -> tuple:
  """Takes a number out of those that are left: what it was made from."""
  for i, (value, sources) in enumerate(made):
    if value == number:
      del made[i]
      return sources
  raise ValueError(f"not a solution: {number} is not left")
