r"""Reads and judges texts of the numbers game, whoever wrote them.

Three forms are read: a step solution, one operation a line with the numbers
that remain,

  3 + 7 = 10 (left: 2 10)
  10 + 2 = 12 (left: 12)

a search trace, which is the same with lines such as `back (left: 3 7 2)` that
return to a state further up, and one expression, `(3 + 7) * 2`, alone or with
`= 20` behind it. The last `\boxed{...}` or `<answer>...</answer>` of a longer
text holds the answer, and nothing but closing marks may follow it.

Numbers must stand in normal form (`7/3`, `-4`; not `14/6`, `07` or `2.0`), so
that equal text is equal number. Texts are untrusted: nothing is evaluated by
Python, lengths and depths are bounded, and no text makes `check_text` raise.
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from o1jax.tasks import numbers_form
from o1jax.tasks.numbers_game import Number, combine
from o1jax.types import Verdict

MAX_TEXT = 100_000  # characters of a text with a marked answer
MAX_LINES = 1_000  # lines of a step solution or trace
MAX_EXPRESSION = 400  # characters of an expression
MAX_DEPTH = 40  # brackets inside brackets

_NUMBER = r"-?[0-9]{1,24}(?:/[0-9]{1,24})?"
_LEFT = rf"\(left: ({_NUMBER}(?: {_NUMBER})*)\)"
_LINE = re.compile(rf"({_NUMBER}) ([-+*/]) ({_NUMBER}) = ({_NUMBER}) {_LEFT}")
_BACK = re.compile(rf"back {_LEFT}")
_PLAIN_NUMBER = re.compile(_NUMBER)
_TOKEN = re.compile(r" *(?:([0-9]{1,12})|([-+*/()]))")
# Marks that may follow a marked answer; the last may be cut off.
_CLOSING = re.compile(
  r"(?:[\s$.}]|\\[\])]|</[a-z]*>|<\|[a-z_]{1,20}\|>)*(?:</?[a-z]*)?"
)
_REWRITES = (
  ("\\times", "*"),
  ("\\cdot", "*"),
  ("\\div", "/"),
  ("\\left(", "("),
  ("\\right)", ")"),
  ("\u00d7", "*"),
  ("\u00f7", "/"),
  ("\u2212", "-"),
)


class Step(NamedTuple):
  """What there is to say about one line.

  Attributes:
    reason: "" for a right line, or what is wrong with it.
    left: the numbers that the line says are left; for a line that cannot be
      read, those from before it.
  """

  reason: str
  left: tuple[str, ...]


def read_number(text: str) -> Number | None:
  """The number that a text is the normal form of, or None."""
  if not _PLAIN_NUMBER.fullmatch(text) or text.endswith("/0"):
    return None
  try:
    value = Fraction(text)
  except ZeroDivisionError:  # such as 3/00
    return None
  value = value.numerator if value.denominator == 1 else value
  return value if str(value) == text else None


@functools.lru_cache(maxsize=2**16)
def _result_text(a: str, op: str, b: str, integers_only: bool) -> str | None:
  """`a op b` in normal form, None where a number or the step is not legal."""
  x, y = read_number(a), read_number(b)
  if x is None or y is None:
    return None
  result = combine(x, op, y, integers_only)
  return None if result is None else str(result)


def judge_line(
  state: tuple[str, ...], line: str, integers_only: bool = False
) -> Step:
  """Judges one operation line against the numbers that stand before it."""
  match = _LINE.fullmatch(line)
  if match is None:
    return Step("unreadable step", state)
  a, op, b, result, left_text = match.groups()
  left = tuple(left_text.split(" "))
  rest = list(state)
  for operand in (a, b):
    if operand not in rest:
      return Step(f"illegal number {operand}", left)
    rest.remove(operand)
  expected = _result_text(a, op, b, integers_only)
  if expected is None:
    return Step(f"illegal step {a} {op} {b}", left)
  if expected != result:
    return Step(f"wrong result {a} {op} {b} = {result}", left)
  if sorted(left) != sorted([*rest, result]):
    return Step("wrong remaining numbers", left)
  return Step("", left)


def judge_lines(
  numbers: Sequence[int], target: int | None, text: str, integers_only: bool
) -> Iterator[Step]:
  """Judges the lines of a step solution or trace, one after another.

  After a wrong line the next one is judged against the numbers that the wrong
  line claims are left, which is what its writer saw.

  Args:
    numbers: the numbers of the problem.
    target: nothing may follow a line that reaches it; None for no target.
    text: the lines.
    integers_only: the rule in force.
  """
  start = tuple(map(str, numbers))
  path = [(start, sorted(start))]
  for line in text.split("\n", MAX_LINES):
    back = _BACK.fullmatch(line)
    state, _ = path[-1]
    if len(state) == 1 and (back is None or state[0] == str(target)):
      yield Step("text after the answer", state)
    elif back is None:
      step = judge_line(state, line, integers_only)
      path.append((step.left, sorted(step.left)))
      yield step
    else:
      yield _go_back(path, tuple(back.group(1).split(" ")))


def _go_back(
  path: list[tuple[tuple[str, ...], list[str]]], left: tuple[str, ...]
) -> Step:
  """Cuts the path after the last state above that has these numbers."""
  wanted = sorted(left)
  for depth in range(len(path) - 2, -1, -1):
    state, in_order = path[depth]
    if in_order == wanted:
      del path[depth + 1 :]
      return Step("", state)
  return Step("back to numbers that never stood there", path[-1][0])


def read_operation(line: str) -> tuple[Number, str, Number] | None:
  """`(3, "+", 7)` of a readable line, None of any other."""
  match = _LINE.fullmatch(line)
  if match is None:
    return None
  a, b = read_number(match.group(1)), read_number(match.group(3))
  return None if a is None or b is None else (a, match.group(2), b)


def state_after(
  numbers: Sequence[int], prefix: str, integers_only: bool
) -> tuple[Number, ...] | None:
  """The numbers left after some lines, None where one of them is wrong."""
  left: tuple[str, ...] = tuple(map(str, numbers))
  if prefix.strip("\n"):
    for step in judge_lines(numbers, None, prefix.strip("\n"), integers_only):
      if step.reason:
        return None
      left = step.left
  return tuple(read_number(number) for number in left)


def marked_answer(text: str) -> tuple[str, str]:
  r"""Splits a longer text into its marked answer and what follows.

  The answer is inside the last `\boxed{}`, or without one inside the last
  `<answer></answer>`; without either the whole text is the answer. A mark that
  is not closed holds nothing.
  """
  start = text.rfind("\\boxed{")
  if start >= 0:
    return _inside_braces(text, start + len("\\boxed{"))
  start = text.rfind("<answer>")
  if start >= 0:
    answer, end, rest = text[start + len("<answer>") :].partition("</answer>")
    return (answer, rest) if end else ("", "")
  return text, ""


def _inside_braces(text: str, start: int) -> tuple[str, str]:
  depth = 1
  for position in range(start, len(text)):
    depth += {"{": 1, "}": -1}.get(text[position], 0)
    if depth == 0:
      return text[start:position], text[position + 1 :]
  return "", ""


def check_text(
  numbers: Sequence[int], target: int, text: str, integers_only: bool = False
) -> Verdict:
  """Judges a solution text of any of the forms in the head of this file.

  The answer in the verdict is the normal form (see `numbers_form`) of the
  expression that the text writes; of a search trace, that of its last path. It
  is read from what the text claims and not checked, so that a vote by answers
  learns nothing from the checker. It is None where the last line cannot be
  read or leaves more than one number; other lines that cannot be read are
  stepped over.
  """
  answer, reason = _answer_text(text)
  if reason:
    return Verdict(False, reason, None)
  if _is_steps(answer):
    return _check_steps(numbers, target, answer, integers_only)
  return _check_expression(numbers, target, answer, integers_only)


def first_fault(
  numbers: Sequence[int], target: int, text: str, integers_only: bool = False
) -> str:
  """The reason of `check_text`, after the number of the wrong step if any.

  Steps are the lines of the answer, counted from 1: `step 2: illegal step
  3 / 0`. It is one line, whatever the text.
  """
  answer, unread = _answer_text(text)
  if not unread and _is_steps(answer):
    steps = judge_lines(numbers, target, answer, integers_only)
    for place, step in enumerate(steps, start=1):
      if step.reason:
        return f"step {place}: {step.reason}"
  return check_text(numbers, target, text, integers_only).reason


def claimed_number(text: str) -> str | None:
  """The number that a text ends at, None where there is none to be read.

  Of steps it is what the last line claims, right or wrong; of an expression
  its value.
  """
  answer, reason = _answer_text(text)
  if reason:
    return None
  if _is_steps(answer):
    match = _last_line(answer)
    return None if match is None else match.group(5)
  try:
    expression, _ = _split_claim(answer)
    return str(_value(_tokens(expression)))
  except _UnreadableError:
    return None


def _answer_text(text: str) -> tuple[str, str]:
  """The marked answer, and why there is none to be read ("" where it is)."""
  if not isinstance(text, str) or len(text) > MAX_TEXT:
    return "", "too long"
  answer, rest = marked_answer(text)
  if not _CLOSING.fullmatch(rest):
    return "", "text after the answer"
  answer = answer.strip()
  return answer, "" if answer else "empty"


def _is_steps(answer: str) -> bool:
  return "(left" in answer or "\n" in answer


def _check_steps(
  numbers: Sequence[int], target: int, text: str, integers_only: bool
) -> Verdict:
  answer = _steps_form(numbers, text)
  left: tuple[str, ...] = ()
  for step in judge_lines(numbers, target, text, integers_only):
    if step.reason:
      return Verdict(False, step.reason, answer)
    left = step.left
  if len(left) > 1:
    return Verdict(False, f"unfinished, {len(left)} numbers left", None)
  if left[0] != str(target):
    return Verdict(False, f"reaches {left[0]}, not {target}", answer)
  return Verdict(True, "correct", answer)


def _last_line(text: str) -> re.Match[str] | None:
  """The last line, where it is a step that leaves a single number."""
  match = _LINE.fullmatch(text[text.rfind("\n") + 1 :])
  if match is None or read_number(match.group(5)) is None:
    return None
  return match


def _steps_form(numbers: Sequence[int], text: str) -> str | None:
  """The normal form of what the lines claim, None where they are no answer."""
  lines = text.split("\n", MAX_LINES)
  if len(lines) > MAX_LINES or _last_line(text) is None:
    return None
  path = numbers_form.Path(numbers)
  for line in lines:
    if step := _LINE.fullmatch(line):
      *claims, left = step.groups()
      path.step(*claims, left.split(" "))
    elif back := _BACK.fullmatch(line):
      path.go_back(back.group(1).split(" "))
  return path.answer()


def _check_expression(
  numbers: Sequence[int], target: int, text: str, integers_only: bool
) -> Verdict:
  answer = None
  try:
    expression, claim = _split_claim(text)
    tokens = _tokens(expression)
    form = _Parser(tokens, numbers_form.leaf, numbers_form.join).read()
    answer = None if form is None else form.text()
    value = _value(tokens)
  except _UnreadableError as error:
    return Verdict(False, str(error), answer)
  reason = _misused([t for t in tokens if isinstance(t, int)], numbers)
  if not reason and claim is not None and claim != value:
    reason = f"wrong result {expression.strip()} = {claim}"
  if not reason and integers_only:
    reason = _broken_rule(tokens)
  if not reason and value != target:
    reason = f"reaches {value}, not {target}"
  return Verdict(not reason, reason or "correct", answer)


class _UnreadableError(ValueError):
  """A text that is no expression; the message is the verdict's reason."""


def _split_claim(text: str) -> tuple[str, Number | None]:
  """Splits `3 + 7 = 10` into the expression and the number it claims."""
  if len(text) > MAX_EXPRESSION:
    raise _UnreadableError("too long")
  for written, meant in _REWRITES:
    text = text.replace(written, meant)
  expression, equals, claim = text.strip("$ ").partition("=")
  if not equals:
    return expression, None
  value = read_number(claim.strip(" "))
  if value is None:
    raise _UnreadableError("unreadable result")
  return expression, value


def _tokens(expression: str) -> list[int | str]:
  """Numbers and signs of an expression, in order."""
  tokens: list[int | str] = []
  position, expression = 0, expression.rstrip(" ")
  while position < len(expression):
    match = _TOKEN.match(expression, position)
    if match is None:
      raise _UnreadableError("unreadable expression")
    number, sign = match.groups()
    if number is not None and str(int(number)) != number:
      raise _UnreadableError(f"unreadable number {number}")
    tokens.append(sign if number is None else int(number))
    position = match.end()
  return tokens


class _Parser:
  """Reads tokens by recursive descent; no sign stands before a number.

  What is read is up to `leaf_fn(number)` and `join_fn(a, op, b)`.
  """

  def __init__(
    self,
    tokens: list[int | str],
    leaf_fn: Callable[[int], Any],
    join_fn: Callable[[Any, str, Any], Any],
  ):
    self._tokens = tokens
    self._position = 0
    self._leaf_fn = leaf_fn
    self._join_fn = join_fn

  def read(self) -> Any:
    result = self._sum(0)
    if self._position < len(self._tokens):
      raise _UnreadableError("unreadable expression")
    return result

  def _next(self, accepted: str) -> str | None:
    """Takes the next token where it is one of the accepted signs."""
    if self._position < len(self._tokens):
      token = self._tokens[self._position]
      if isinstance(token, str) and token in accepted:
        self._position += 1
        return token
    return None

  def _sum(self, depth: int) -> Any:
    result = self._product(depth)
    while op := self._next("+-"):
      result = self._join_fn(result, op, self._product(depth))
    return result

  def _product(self, depth: int) -> Any:
    result = self._atom(depth)
    while op := self._next("*/"):
      result = self._join_fn(result, op, self._atom(depth))
    return result

  def _atom(self, depth: int) -> Any:
    if self._next("("):
      if depth >= MAX_DEPTH:
        raise _UnreadableError("too many brackets")
      result = self._sum(depth + 1)
      if not self._next(")"):
        raise _UnreadableError("unreadable expression")
      return result
    if self._position < len(self._tokens):
      token = self._tokens[self._position]
      if isinstance(token, int):
        self._position += 1
        return self._leaf_fn(token)
    raise _UnreadableError("unreadable expression")


def _value(tokens: list[int | str], integers_only: bool = False) -> Number:
  """The exact value of an expression; _UnreadableError on an illegal step."""

  def join(a: Number, op: str, b: Number) -> Number:
    result = combine(a, op, b, integers_only)
    if result is None:
      raise _UnreadableError(f"illegal step {a} {op} {b}")
    return result

  return _Parser(tokens, lambda number: number, join).read()


def _broken_rule(tokens: list[int | str]) -> str:
  """What breaks the rule of whole numbers, "" where nothing does."""
  try:
    _value(tokens, integers_only=True)
  except _UnreadableError as error:
    return str(error)
  return ""


def _misused(used: list[int], numbers: Sequence[int]) -> str:
  """What is wrong with the use of the numbers, "" where each is used once."""
  rest = list(numbers)
  for number in used:
    if number not in rest:
      return f"illegal number {number}"
    rest.remove(number)
  return f"number {rest[0]} not used" if rest else ""
