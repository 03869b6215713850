"""What Countdown and the Game of 24 share: everything but their problems.

A subclass says how numbers are drawn in a split and which targets the split
allows; sampling, judging, solving and demonstrations follow from the rules in
`numbers_game`.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from o1jax.tasks import (
  long_thought,
  numbers_faults,
  numbers_game,
  numbers_play,
  numbers_rewording,
  numbers_text,
  reflection,
  task,
)
from o1jax.types import Problem, Verdict

# Dead ends of one search trace: uniform from none to this many.
MAX_DEAD_ENDS = 3
# Random plays of each row of numbers for balanced hindsight, and the rows that
# are played at once.
PLAYS_PER_ROW = 64
_BALANCED_ROWS = 256
_MAX_EMPTY_DRAWS = 50
# Wrong attempts in a chain of thought: uniform from none to this many.
MAX_ATTEMPTS = 3


class NumbersTask(reflection.Reflection):
  """Base of the tasks played by the rules of `numbers_game`."""

  name: str
  integers_only: bool
  demonstration_kinds: tuple[str, ...]
  consequence_mark: ClassVar[str] = " = "
  # A subclass may make these options; `Countdown` says what they mean.
  sorted_numbers = False
  canonical_play = False
  balanced_hindsight = False

  def draw_numbers(
    self, rng: np.random.Generator, n: int, split: str
  ) -> np.ndarray:
    """About n rows of numbers of a split: `[<= n, k]`.

    Their order is random, or ascending with `sorted_numbers`.
    """
    raise NotImplementedError

  def targets(self, split: str) -> np.ndarray:
    """The targets that a split allows, ascending."""
    raise NotImplementedError

  def allows(self, numbers: Sequence[int], target: int) -> bool:
    """Whether the problem of these may be trained on."""
    raise NotImplementedError

  def make_problem(self, numbers: list[int], target: int) -> Problem:
    """The record of a problem; its id ignores the order of the numbers."""
    raise NotImplementedError

  # Problems.

  def sample_problems(
    self, rng: np.random.Generator, n: int, split: str = "train"
  ) -> list[Problem]:
    """Draws n solvable problems; repeats are possible.

    The numbers are drawn first, then a target, uniform over the distinct
    targets of the split that they can reach; numbers that reach none are
    dropped.
    """
    task.require_known("split", split, task.SPLITS)
    numbers, targets, _ = self._draw_solved(rng, n, split)
    return self._problems(numbers, targets)

  def is_train(self, problem: Problem) -> bool:
    """Whether a problem may be trained on.

    Raises:
      ValueError: the data of the problem is not of this task.
    """
    try:
      return self.allows(**problem.data)
    except (TypeError, ValueError, OverflowError) as error:
      raise task.foreign_data(problem, self.name) from error

  def heldout_problems(self, n: int) -> list[Problem]:
    """The first n of one fixed list of distinct held-out problems."""
    return task.distinct_heldout(self, n)

  def _arranged(self, numbers: np.ndarray) -> np.ndarray:
    """`[..., k]` in the order of prompts."""
    return np.sort(numbers, axis=-1) if self.sorted_numbers else numbers

  def _record(self, numbers: list[int], target: int, ending: str) -> Problem:
    """A problem whose id is its numbers, ascending, and `ending`."""
    ascending = sorted(numbers)
    numbers = ascending if self.sorted_numbers else numbers
    return Problem(
      id=f"{self.name}/{','.join(map(str, ascending))}{ending}",
      task=self.name,
      prompt=f"{' '.join(map(str, numbers))} = {target}\n",
      data={"numbers": numbers, "target": target},
    )

  def _problems(self, numbers, targets) -> list[Problem]:
    pairs = zip(numbers.tolist(), targets.tolist(), strict=True)
    return [self.make_problem(row, target) for row, target in pairs]

  def _gather(
    self, n: int, draw: Callable[[int], list[np.ndarray | list]]
  ) -> list:
    """Calls draw(wanted) for columns of rows until there are n rows."""
    columns: list | None = None
    wanted, empty = n, 0
    while columns is None or len(columns[0]) < n:
      drawn = draw(wanted)
      got = len(drawn[0])
      empty = 0 if got else empty + 1
      if empty > _MAX_EMPTY_DRAWS:
        raise ValueError(f"{self.name}: nothing solvable in these ranges")
      columns = drawn if columns is None else list(map(_joined, columns, drawn))
      missing = n - len(columns[0])
      wanted = max(16, int(1.1 * missing * wanted / max(got, 1)))
      wanted = min(wanted, 4 * n + 16)
    return [column[:n] for column in columns]

  def _draw_solved(self, rng, n: int, split: str) -> list:
    """Numbers `[n, k]`, targets `[n]`, and a solution: choices `[n, k - 1]`."""
    targets = self.targets(split)
    if not targets.size:
      raise ValueError(f"{self.name}: the {split} split has no targets")

    def draw(wanted):
      numbers = self.draw_numbers(rng, wanted, split)
      size = numbers_play.chunk_rows(numbers.shape[1])
      starts = range(0, max(len(numbers), 1), size)
      parts = [self._solve(rng, numbers[s : s + size], targets) for s in starts]
      return [np.concatenate(part) for part in zip(*parts, strict=True)]

    return self._gather(n, draw)

  def _solve(self, rng, numbers: np.ndarray, targets: np.ndarray):
    """Gives each row a target and a play that reaches it; drops rows."""
    ends = numbers_play.enumerate_plays(numbers, self.integers_only)
    values = numbers_play.whole_values(ends)
    low, high = int(targets[0]), int(targets[-1])
    reached = np.zeros((len(numbers), high - low + 1), bool)
    rows, plays = np.nonzero((values >= low) & (values <= high))
    reached[rows, values[rows, plays] - low] = True
    allowed = np.zeros(high - low + 1, bool)
    allowed[targets - low] = True
    reached &= allowed[None, :]
    keep = reached.any(axis=1)
    numbers, values, reached = numbers[keep], values[keep], reached[keep]
    target = numbers_play.pick_true(rng, reached) + low
    play = numbers_play.pick_true(rng, values == target[:, None])
    choices = numbers_play.play_choices(play, numbers.shape[1])
    return numbers, target, choices

  # Judging.

  def check(self, problem: Problem, text: str) -> Verdict:
    """Judges a step solution, a search trace or an expression."""
    numbers, target = _content(problem)
    return numbers_text.check_text(numbers, target, text, self.integers_only)

  def relabel(self, problem: Problem, text: str) -> Problem | None:
    """The training problem that a text solves, where it is not `problem`."""
    numbers, old_target = _content(problem)
    reached = numbers_text.claimed_number(text)
    if reached is None or not reached.isdigit() or reached == str(old_target):
      return None
    target = int(reached)
    verdict = numbers_text.check_text(numbers, target, text, self.integers_only)
    if not (verdict.is_correct and self.allows(numbers, target)):
      return None
    return self.make_problem(list(numbers), target)

  def judge_steps(self, problem: Problem, text: str) -> list[bool]:
    """For each line of a text: is it legal and correct where it stands?

    A line after a wrong one is judged against the numbers that the wrong line
    claims are left.
    """
    numbers, target = _content(problem)
    lines = text.strip("\n")
    if not lines:
      return []
    steps = numbers_text.judge_lines(numbers, target, lines, self.integers_only)
    return [not step.reason for step in steps]

  def first_fault(self, problem: Problem, text: str) -> str:
    """The checker's reason, with the number of the wrong step if it is one."""
    numbers, target = _content(problem)
    return numbers_text.first_fault(numbers, target, text, self.integers_only)

  def recompute(self, problem: Problem, solution: str) -> list[str]:
    """A line for each step of a solution, up to the first wrong one."""
    content = _content(problem)
    return list(
      numbers_faults.recompute(*content, solution, self.integers_only)
    )

  def heuristic(self, problem: Problem, prefix: str) -> float:
    """How near one more step comes to the target; 0 after a wrong line.

    See `numbers_game.nearness`.
    """
    numbers, target = _content(problem)
    left = numbers_text.state_after(numbers, prefix, self.integers_only)
    if left is None:
      return 0.0
    return numbers_game.nearness(left, target, self.integers_only)

  def problem_features(self, problem: Problem) -> np.ndarray:
    """Counts and sizes of the numbers, and how the target lies to them: `[11]`.

    The last is `heuristic` before the first step.
    """
    words, target = _content(problem)
    numbers = np.array(words, np.float64)
    logs = np.log1p(numbers)
    goal = np.log1p(float(target))
    total = np.log1p(numbers.sum())
    divides = [x > 0 and target % x == 0 for x in words]
    return np.array(
      [
        len(words),
        len(set(words)),
        logs.min(),
        logs.max(),
        total,
        logs.sum(),
        goal,
        abs(goal - total),
        target % 2,
        np.mean(divides),
        self.heuristic(problem, ""),
      ],
      np.float64,
    )

  # Solving.

  def solutions(self, problem: Problem) -> list[str]:
    """All distinct solutions, with each sum and product in one order."""
    numbers, _ = _content(problem)
    return self._solver(problem).solutions(numbers)

  def true_value(self, problem: Problem, prefix: str = "") -> float:
    """Probability that uniform legal play after a prefix solves the problem.

    0 after a wrong line. The law is the full one in the head of `numbers_game`,
    also where demonstrations play canonically.
    """
    state = self._state(problem, prefix)
    return 0.0 if state is None else self._solver(problem).value(state)

  def can_reach(self, problem: Problem, prefix: str = "") -> bool:
    """Whether the target is still in reach after a prefix of right lines."""
    state = self._state(problem, prefix)
    return state is not None and self._solver(problem).can_reach(state)

  def _state(self, problem: Problem, prefix: str):
    numbers, _ = _content(problem)
    left = numbers_text.state_after(numbers, prefix, self.integers_only)
    return None if left is None else numbers_game.make_state(left)

  def _solver(self, problem: Problem) -> numbers_game.Solver:
    numbers, target = _content(problem)
    state = numbers_game.make_state(numbers)
    return numbers_game.solver_for(state, target, self.integers_only)

  def require_solvable(self, problem: Problem) -> None:
    """Raises Unsolvable, a ValueError, for a problem without a solution."""
    if not self.can_reach(problem):
      raise task.Unsolvable(f"no solution: {problem.prompt.strip()}")

  # Demonstrations.

  def demonstrations(
    self, kind: str, rng: np.random.Generator, n: int
  ) -> list[tuple[Problem, str]]:
    """Writes n demonstrations on training problems.

    Kinds: `random_play` is uniform legal play, beside a target drawn uniformly
    from the training targets whatever the play (success is rare, and the
    problem need not be solvable); `optimal` is a uniformly drawn solution of a
    sampled problem; `hindsight` is random play whose target is the number it
    reached, kept where that is a training target; `search_trace` is a solution
    with dead ends of random play before it and a `back` line after each;
    `judging`, `revising`, `revised` and `comparing` are in `reflection`;
    `retrying` is a chain of thought (see `reflection`) whose attempts are other
    plays of the same numbers, up to `MAX_ATTEMPTS` of them;
    `long_thought` and `long_thought_wrong`, whose answers are wrong, are in the
    file `long_thought`.
    """
    task.require_known("kind of demonstration", kind, self.demonstration_kinds)
    makers = {
      "random_play": self._random_play,
      "optimal": self._optimal,
      "hindsight": self._hindsight,
      "search_trace": self._search_trace,
      "judging": self.judging,
      "revising": self.revising,
      "revised": self.revised,
      "comparing": self.comparing,
      "retrying": self._retrying,
      "long_thought": self.long_thoughts,
      "long_thought_wrong": functools.partial(
        self.long_thoughts, wrong_share=1.0
      ),
    }
    return makers[kind](rng, n)

  def corpus(
    self, rng: np.random.Generator, n: int, kind: str | None = None
  ) -> list[str]:
    """n texts, prompt and solution, to train a tokenizer on.

    With no kind, every eighth text is a search trace and the rest are random
    play, so that a tokenizer knows the words of both.
    """
    if kind is not None:
      pairs = self.demonstrations(kind, rng, n)
    else:
      pairs = self.demonstrations("random_play", rng, n - n // 8)
      pairs += self.demonstrations("search_trace", rng, n // 8)
    return [problem.prompt + text for problem, text in pairs]

  def right_solutions(
    self, rng: np.random.Generator, n: int
  ) -> list[tuple[Problem, str]]:
    """Relabelled play, where the task has any: it is written as play is."""
    if "hindsight" in self.demonstration_kinds:
      return self._hindsight(rng, n)
    return self._optimal(rng, n)

  def long_thoughts(
    self,
    rng: np.random.Generator,
    n: int,
    *,
    wrong_share: float = 0.0,
    **options: Any,
  ) -> list[tuple[Problem, str]]:
    """Writes n long thoughts on training problems.

    Args:
      rng: draws them.
      n: how many.
      wrong_share: how often the answer is wrong, the behaviours being the same.
      **options: of `long_thought.long_thought`.

    Raises:
      ValueError: an option that is out of range.
    """
    if not 0.0 <= wrong_share <= 1.0:
      raise ValueError(f"wrong_share={wrong_share} is not in [0, 1]")
    pairs = []
    for problem, solution in self.right_solutions(rng, n):
      text = long_thought.long_thought(
        rng,
        *_content(problem),
        solution,
        integers_only=self.integers_only,
        canonical=self.canonical_play,
        is_wrong=bool(rng.random() < wrong_share),
        **options,
      )
      pairs.append((problem, text))
    return pairs

  def wrong_solution(
    self, rng: np.random.Generator, problem: Problem, solution: str
  ) -> str:
    """A play with a fault, after some lines of the right solution."""
    while True:
      text = numbers_faults.faulty_play(
        rng,
        *_content(problem),
        solution,
        integers_only=self.integers_only,
        canonical=self.canonical_play,
      )
      if not self.check(problem, text).is_correct:
        return text

  def reworded(
    self, rng: np.random.Generator, problem: Problem, solution: str
  ) -> str:
    """The play with its sums and products in another order, where it is one."""
    numbers, _ = _content(problem)
    text = numbers_rewording.reworded(
      rng,
      numbers,
      solution,
      integers_only=self.integers_only,
      canonical=self.canonical_play,
    )
    # Where equal numbers are left it may be read as another play.
    return text if self._say_the_same(problem, solution, text) else solution

  def other_solution(
    self, rng: np.random.Generator, problem: Problem, solution: str
  ) -> str:
    """A wrong solution, or a right one that says something else."""
    if rng.random() < 0.5:
      numbers, target = _content(problem)
      numbers, _, choices = self._solve(
        rng, np.array([numbers]), np.array([target])
      )
      (text,) = numbers_play.chosen_plays(
        rng, numbers, choices, self.integers_only
      )
      if not self._say_the_same(problem, solution, text):
        return self.reworded(rng, problem, text)
    return self.wrong_solution(rng, problem, solution)

  def _say_the_same(self, problem: Problem, first: str, second: str) -> bool:
    answers = [self.check(problem, text).answer for text in (first, second)]
    return answers[0] == answers[1]

  def _random_play(self, rng, n: int) -> list[tuple[Problem, str]]:
    (numbers,) = self._gather(
      n, lambda wanted: [self.draw_numbers(rng, wanted, "train")]
    )
    texts = self._play(rng, numbers).texts()
    targets = rng.choice(self.targets("train"), n)
    return list(zip(self._problems(numbers, targets), texts, strict=True))

  def _play(self, rng, numbers: np.ndarray) -> numbers_play.Plays:
    return numbers_play.random_plays(
      rng, numbers, self.integers_only, self.canonical_play
    )

  def _hindsight(self, rng, n: int) -> list[tuple[Problem, str]]:
    draw_fn = self._draw_balanced if self.balanced_hindsight else self._draw_any
    numbers, reached, texts = self._gather(
      n, lambda wanted: draw_fn(rng, wanted)
    )
    return list(zip(self._problems(numbers, reached), texts, strict=True))

  def _retrying(self, rng, n: int) -> list[tuple[Problem, str]]:
    pairs = self._hindsight(rng, n)
    of_numbers: dict[tuple[int, ...], list[int]] = {}
    for i, (problem, _) in enumerate(pairs):
      of_numbers.setdefault(tuple(problem.data["numbers"]), []).append(i)
    chains = []
    for problem, solution in pairs:
      others = [
        j
        for j in of_numbers[tuple(problem.data["numbers"])]
        if pairs[j][0].data["target"] != problem.data["target"]
      ]
      count = min(int(rng.integers(0, MAX_ATTEMPTS + 1)), len(others))
      drawn = rng.choice(others, count, replace=False) if count else ()
      attempts = [pairs[j][1] for j in drawn]
      chains.append((problem, self.chain(problem, attempts, solution)))
    return chains

  def _draw_any(self, rng, wanted: int) -> list[np.ndarray | list]:
    """One play of each row, kept where it reaches a training target."""
    numbers = self.draw_numbers(rng, wanted, "train")
    plays = self._play(rng, numbers)
    reached = plays.whole_values()
    keep = np.flatnonzero(np.isin(reached, self.targets("train")))
    return [numbers[keep], reached[keep], plays.texts(keep)]

  def _draw_balanced(self, rng, wanted: int) -> list[np.ndarray | list]:
    """Many plays of each row, one kept for each training target reached."""
    # A row reaches about this many targets; too few rows are drawn again.
    numbers = self.draw_numbers(rng, -(-wanted // 8), "train")
    parts = []
    for start in range(0, max(len(numbers), 1), _BALANCED_ROWS):
      rows = numbers[start : start + _BALANCED_ROWS]
      rows = np.repeat(rows, PLAYS_PER_ROW, axis=0)
      plays = self._play(rng, rows)
      ends = plays.whole_values()
      ends = np.where(np.isin(ends, self.targets("train")), ends, -1)
      keep = numbers_play.one_play_per_end(rng, ends, PLAYS_PER_ROW)
      parts.append((rows[keep], ends[keep], plays.texts(keep)))
    rows, ends, texts = zip(*parts, strict=True)
    return [
      np.concatenate(rows),
      np.concatenate(ends),
      list(itertools.chain.from_iterable(texts)),
    ]

  def _optimal(self, rng, n: int) -> list[tuple[Problem, str]]:
    numbers, targets, choices = self._draw_solved(rng, n, "train")
    texts = numbers_play.chosen_plays(rng, numbers, choices, self.integers_only)
    return list(zip(self._problems(numbers, targets), texts, strict=True))

  def _search_trace(self, rng, n: int) -> list[tuple[Problem, str]]:
    return [
      (problem, "\n".join(self._trace(rng, problem, solution)))
      for problem, solution in self._optimal(rng, n)
    ]

  def _trace(self, rng, problem: Problem, solution: str) -> Iterator[str]:
    """The lines of a solution with dead ends before some of them."""
    numbers, target = _content(problem)
    left: tuple[Any, ...] = numbers
    lines = solution.split("\n")
    places = rng.integers(0, len(lines), rng.integers(0, MAX_DEAD_ENDS + 1))
    for place, line in enumerate(lines):
      for _ in range(np.count_nonzero(places == place)):
        end, dead_lines = self._play_out(rng, left)
        yield from dead_lines
        if end == target:
          return  # found by accident: nothing may follow
        yield f"back (left: {' '.join(map(str, left))})"
      yield line
      words = numbers_text.judge_line(tuple(map(str, left)), line).left
      left = tuple(map(numbers_text.read_number, words))

  def _play_out(self, rng, left: tuple):
    """Random legal play to the end: the number it reaches, and its lines."""
    lines = []
    while len(left) > 1:
      steps = list(
        numbers_game.legal_steps(left, self.integers_only, self.canonical_play)
      )
      *step, left = steps[rng.integers(len(steps))]
      lines.append(numbers_game.step_text(*step, left))
    return left[0], lines


def _content(problem: Problem) -> tuple[tuple[int, ...], int]:
  return tuple(problem.data["numbers"]), problem.data["target"]


def _joined(first, second):
  """Two columns, lists or arrays, one after the other."""
  if isinstance(first, list):
    return first + second
  return np.concatenate([first, second])
