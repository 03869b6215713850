r"""Counts the behaviours of reasoning in any text.

A text is read sentence by sentence. What a sentence does is told by its words
and by the arithmetic in it, which is computed exactly:

  problem_analysis      says what is given or asked
  task_decomposition    names parts, subgoals or an order of steps
  task_completion       carries out a step and states its result
  alternative_proposal  proposes another way
  self_evaluation       a check that computes, with a verdict that agrees
  self_correction       owns an error, or repairs it, or goes back

(Zeng et al., arXiv 2412.14135, Section 3.3.) A check needs arithmetic in it
(`12 * 4 = 48, yes`; `12, not 13`), in the sentence that announces it or the
next two. One whose verdict disagrees with its arithmetic (`3 + 4 = 8, ok`) is a
false_evaluation, one that computes nothing (`I checked it, all fine`) an
empty_evaluation; neither is a self_evaluation.

Texts are untrusted: nothing is evaluated by Python, numbers, sentences and
texts are cut at a length, patterns have bounded repeats, no text raises. Words
in double quotes are somebody else's and do not count.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

BEHAVIORS = (
  "problem_analysis",
  "task_decomposition",
  "task_completion",
  "alternative_proposal",
  "self_evaluation",
  "self_correction",
)
# Checks that are none.
FAILURES = ("false_evaluation", "empty_evaluation")
COUNTED = (*BEHAVIORS, *FAILURES)

MAX_TEXT = 100_000  # characters that are read
MAX_SENTENCE = 400  # characters; a longer one is read in parts
# Sentences after the one that announces a check, in which it may compute.
_OPEN_FOR = 2
_MAX_DIGITS = 12
_MAX_DEPTH = 20
_MAX_EXPONENT = 20
_MAX_SIZE = 10**40

_QUOTED = re.compile('"[^"\n]{0,300}"|\u201c[^\u201d\n]{0,300}\u201d')
_SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n+")
_PLAIN = str.maketrans(
  {
    "\u2019": "'",
    "\u00d7": "*",
    "\u00b7": "*",
    "\u00f7": "/",
    "\u2212": "-",
    "\u2013": "-",
    "\u2014": "-",
    "$": " ",
  }
)

# Arithmetic.

_TOKEN = re.compile(
  r"(?P<number>(?<![\w.])\d+(?:,\d{3}(?!\d))*(?:\.\d+)?(?:/\d+)?(?![\w]))"
  r"|(?P<sign>\*\*|[-+*/^()=\u2248])"
  r"|(?P<word>\b(?:plus|minus|times|x|divided by|multiplied by|equals"
  r"|is equal to|is|gives|yields|makes)\b(?= ))"
  r"|(?P<space>[ \t]+)"
)
_SIGN = {
  "**": "^",
  "plus": "+",
  "minus": "-",
  "times": "*",
  "x": "*",
  "multiplied by": "*",
  "divided by": "/",
}
_ABOUT = "\u2248"
_EQUAL = (
  "=",
  _ABOUT,
  "equals",
  "is equal to",
  "is",
  "gives",
  "yields",
  "makes",
)
_OPERATORS = "+-*/^"
_NUM = r"-?\d{1,12}(?:/\d{1,12}|\.\d{1,6})?"


class Equation(NamedTuple):
  """An equation in a sentence.

  Attributes:
    start, end: where it stands.
    left: its left side, as one word without blanks.
    value: of its right side.
    is_true: whether both sides are the same number; one that is written with
      decimals, or said to be about right, up to its last digit.
    is_result: whether it computes: an operation on the left, a number on the
      right.
  """

  start: int
  end: int
  left: str
  value: Fraction
  is_true: bool
  is_result: bool


class Event(NamedTuple):
  """One behaviour at one place.

  Attributes:
    behavior: one of `COUNTED`.
    is_failed: of a self_evaluation, whether it found something wrong.
  """

  behavior: str
  is_failed: bool = False


class _Token(NamedTuple):
  start: int
  end: int
  text: str
  value: Fraction | None  # of a number


def find_equations(sentence: str) -> Iterator[Equation]:
  """The equations of one sentence, in order; lower case is expected."""
  for run in _runs(sentence):
    sides: list[list[_Token]] = [[]]
    signs: list[str] = []
    for token in run:
      if token.text in _EQUAL:
        sides.append([])
        signs.append(token.text)
      else:
        sides[-1].append(token)
    for first, second, sign in zip(sides, sides[1:], signs, strict=False):
      left, right = _suffix(first), _prefix(second)
      values = _value(left), _value(right)
      if None not in values:
        has_left = any(token.value is None for token in left)
        has_right = any(token.value is None for token in right[1:])
        if has_left or has_right:
          yield Equation(
            left[0].start,
            right[-1].end,
            "".join(token.text for token in left),
            values[1],
            _are_equal(*values, "" if has_right else right[-1].text, sign),
            has_left and not has_right,
          )


def _are_equal(a: Fraction, b: Fraction, written: str, sign: str) -> bool:
  """Whether a is b, as the digits of b are written where it is one number."""
  _, point, digits = written.partition(".")
  if not point and sign != _ABOUT:
    return a == b
  return a == b or abs(a - b) < Fraction(1, 10 ** len(digits))


def _runs(sentence: str) -> Iterator[list[_Token]]:
  """Stretches of arithmetic without other words in between."""
  run: list[_Token] = []
  end = 0
  for match in _TOKEN.finditer(sentence):
    if match.start() != end and run:
      yield run
      run = []
    end = match.end()
    # A word joins numbers; it is no sign: `..., minus 23 * 3 = 69`.
    if match.lastgroup == "space" or (match.lastgroup == "word" and not run):
      continue
    text = match.group()
    value = None
    if match.lastgroup == "number":
      value = _read(text)
    run.append(_Token(match.start(), end, _SIGN.get(text, text), value))
  if run:
    yield run


def _read(text: str) -> Fraction | None:
  text = text.replace(",", "")
  if max(map(len, re.split(r"[./]", text))) > _MAX_DIGITS:
    return None
  number, _, divisor = text.partition("/")
  if divisor and not int(divisor):
    return None
  return Fraction(number) / int(divisor or 1)


def _prefix(tokens: Sequence[_Token]) -> list[_Token]:
  """The longest beginning that is an expression."""
  depth, best, wants_number = 0, 0, True
  for i, token in enumerate(tokens):
    if wants_number:
      if token.value is not None:
        wants_number = False
      elif token.text == "(":
        depth += 1
      elif token.text != "-" or (i and tokens[i - 1].text != "("
                                 and _is_unary(tokens, i - 1)):  # fmt: skip
        break
    elif token.text == ")" and depth:
      depth -= 1
    elif token.text in _OPERATORS:
      wants_number = True
    else:
      break
    if not wants_number and not depth:
      best = i + 1
  return list(tokens[:best])


def _suffix(tokens: Sequence[_Token]) -> list[_Token]:
  """The longest end that is an expression."""
  depth, best, wants_number = 0, len(tokens), True
  for i in range(len(tokens) - 1, -1, -1):
    token = tokens[i]
    if wants_number:
      if token.value is not None:
        wants_number = False
      elif token.text == ")":
        depth += 1
      else:
        break
    elif token.text == "(" and depth:
      depth -= 1
    elif token.text == "-" and _is_unary(tokens, i):
      pass  # The sign of what stands behind it.
    elif token.text in _OPERATORS:
      wants_number = True
    else:
      break
    if not wants_number and not depth:
      best = i
  return list(tokens[best:])


def _is_unary(tokens: Sequence[_Token], i: int) -> bool:
  return i == 0 or (tokens[i - 1].value is None and tokens[i - 1].text != ")")


def _value(tokens: Sequence[_Token]) -> Fraction | None:
  """The exact value of an expression, None for none."""
  try:
    return _Reader(tokens).read() if tokens else None
  except (_NoValueError, ZeroDivisionError):
    return None


class _NoValueError(ValueError):
  """Not an expression, or too large."""


class _Reader:
  """Recursive descent over tokens; a minus may stand before any number."""

  def __init__(self, tokens: Sequence[_Token]):
    self._tokens = tokens
    self._at = 0

  def read(self) -> Fraction:
    value = self._sum(0)
    if self._at < len(self._tokens):
      raise _NoValueError
    return value

  def _next(self, signs: str) -> str | None:
    if self._at < len(self._tokens):
      token = self._tokens[self._at]
      if token.value is None and token.text in signs:
        self._at += 1
        return token.text
    return None

  def _sum(self, depth: int) -> Fraction:
    value = self._product(depth)
    while sign := self._next("+-"):
      other = self._product(depth)
      value = _bounded(value + other if sign == "+" else value - other)
    return value

  def _product(self, depth: int) -> Fraction:
    value = self._power(depth)
    while sign := self._next("*/"):
      other = self._power(depth)
      value = _bounded(value * other if sign == "*" else value / other)
    return value

  def _power(self, depth: int) -> Fraction:
    value = self._atom(depth)
    if self._next("^"):
      exponent = self._atom(depth)
      if exponent.denominator != 1 or not 0 <= exponent <= _MAX_EXPONENT:
        raise _NoValueError
      value = _bounded(value**exponent.numerator)
    return value

  def _atom(self, depth: int) -> Fraction:
    if depth > _MAX_DEPTH:
      raise _NoValueError
    if self._next("-"):
      return -self._atom(depth + 1)
    if self._next("("):
      value = self._sum(depth + 1)
      if not self._next(")"):
        raise _NoValueError
      return value
    if self._at < len(self._tokens):
      value = self._tokens[self._at].value
      if value is not None:
        self._at += 1
        return value
    raise _NoValueError


def _bounded(value: Fraction) -> Fraction:
  if max(abs(value.numerator), value.denominator) > _MAX_SIZE:
    raise _NoValueError
  return value


# Words.


def _any(*patterns: str) -> re.Pattern[str]:
  return re.compile("|".join(f"(?:{p})" for p in patterns))


_I = r"(?:i|we|let me|let's|let us|i'll|we'll|i'd|we'd|i can|we can|i will)"
_WAY = (
  r"(?:approach|way|option|idea|possibility|route|method|strategy|attempt"
  r"|plan|path|solution)"
)
_ANALYSIS = _any(
  r"\b(?:we|i)(?: are|'re|'m| am| were) (?:given|asked)\b(?! a warm)",
  r"\b(?:problem|question|task|puzzle|exercise|statement)\b.{0,20}"
  r"\b(?:asks?|is to|wants?|says|states|requires)\b",
  r"\b(?:understand|restate|reread|re-read|reading|read)\b.{0,20}"
  r"\b(?:problem|question|puzzle|statement|task)\b",
  r"\bwhat (?:do we know|do i know|is given|is asked|are we asked)",
  r"\bbeing asked\b|\bit's asking\b|\basked:|\bin this problem\b",
  r"\bthe (?:unknown|known quantit)",
  r"^(?:okay, |ok, |so |now |here |well, ){0,3}(?:we|i) (?:need|want|have|must)"
  r" to (?:find|reach|make|get|determine|compute|prove|show|obtain)\b",
  r"\b(?:goal|target|aim)(?: is|:| of)? (?:make |reach |get |to \w+ )?\d",
  r"^given:? (?:the numbers |are )?(?:\d|two|three|an?\b.{0,40}asked)",
  r"\b(?:we|i) have \d.{0,30}\b(?:need|want)\b",
  rf"^(?:okay, |so )?we need {_NUM} (?:from|out of|using)\b",
  r"\bnumbers? (?:i|we) (?:can|may|must)\b",
  r"\badd up to -?\d.{0,10}\bneed\b",
  r"\bused (?:exactly|only) once\b",
  r"\bsummari[sz]e what\b|\bwhat is given\b",
)
_DECOMPOSITION = _any(
  rf"\b{_I}(?: could| can| should| now| first)?"
  r" (?:split|break|divide|decompose|separate)\b",
  r"^(?:split|break|divide|decompose|separate) (?:it|this|the (?:problem|task"
  r"|sum|work|expression|shape|question|computation))\b",
  r"\bto (?:split|decompose|break down)\b",
  r"\bsub-?(?:goal|problem|task)s?\b|\bsmaller (?:problem|step|task|part)s?\b",
  r"\b(?:my|our) plan is\b|^plan:|\bone step is left\b",
  r"(?<!the )\bfirst\b(?! of all).{0,80}\b(?:then|next|after that)\b",
  rf"\bfirst,? {_I}\b|\b{_I} first (?:get|make|build|find|need|compute)\b",
  r"\bstep 1:.{0,80}\bstep 2\b|^step 1: (?![\d(])",
  rf"\bif {_I} (?:can |could )?(?:make|get|build|reach|find)\b",
  rf"(?<!goal: )\b(?:need|make|making|build|get|getting) (?:an? )?{_NUM}"
  r" (?:first |only )?(?:from|out of)\b",
  r"\bwork(?:ing)? backwards?\b",
  r"\bone (?:piece|part|case|step) at a time\b",
  r"\bcases? separately\b|\b(?:two|three|four) (?:cases|parts)\b",
  r"\boutline the\b|\breduces to\b",
)
_ALTERNATIVE = _any(
  r"\balternatively\b",
  rf"\b(?:another|different|second|third|other|new|next) (?:\w+ )?{_WAY}\b"
  r"(?! (?:home|to say))",
  r"\bone more (?:possibility|option|idea|way)\b",
  r"\bwhat if (?:we|i|you)\b|\b(?:what|how) about (?:\w+ing\b|-?\d)",
  rf"\b(?:{_I}|try|use|take|suppose|swap)\b.{{0,60}}\binstead\b(?! of)",
  r"^instead,? (?:try|use|take|let|we|i|start|consider)\b",
  rf"^instead of\b.{{0,40}}, {_I}\b",
  r"\bor maybe (?:i|we)\b|\b(?:perhaps|maybe) (?:i|we) (?:can|could|should)\b",
  r"\bon second thought\b|\belse try\b|\bshortcut\b",
  r"\b(?:i|we) (?:could|might) (?:also|instead)\b",
  r"\bon the other hand,? (?:we|i) (?:could|might|can)\b",
  r"\bthink about (?:it|this) differently\b|\blet's switch\b",
)
_WRONG = (
  r"(?:wrong|incorrect|not (?:quite )?right|not correct|a mistake|an error"
  r"|can't be right"
  r"|cannot be right|false|off)"
)
_CORRECTION = _any(
  rf"\b(?:wait|hold on|hmm|oops|no|actually|ah)\b.{{0,40}}\b{_WRONG}\b"
  r"(?![^?]{0,40}\?)",
  r"\bi don't think (?:that's|this is|that is) (?:quite )?right\b",
  r"\blet me (?:reconsider|re-?examine|rethink|think again|start over"
  r"|try (?:that )?again)\b",
  r"\boops\b|\bscratch that\b|\bstrike that\b|\bactually,? no\b",
  r"\b(?:my|a|the|an) (?:mistake|error|slip)\b.{0,20}\b(?:in|above|there|here"
  r"|earlier)\b",
  r"\bi (?:have )?(?:made|see|found|spot) (?:my|an?|the)"
  r" (?:mistake|error|slip)",
  r"\bmy mistake\b",
  r"\bcontains an? (?:error|mistake)\b",
  r"\bi (?:forgot|misread|miscounted|miscalculated|mixed up|overlooked)\b",
  r"\bi should have\b|\bi (?:was|went) wrong\b|\bi used the\b.{0,20}\btwice\b",
  rf"\b(?:{_I}|to) (?:now )?(?:fix|correct|redo|rework|revise)\b",
  r"^(?:fix|fixed|correction|corrected|redoing)\b ?(?::|it|that|the)",
  r"\bneeds to be (?:fixed|corrected)\b",
  r"^back \(left:|\bback to (?:-?\d|the start|the beginning|step)",
  r"\bgo(?:ing)? back\b.{0,30}\b(?:step|redo|fix|start)\b|\btake it back\b",
  r"\bthat can't be right\b",
)
_COMPLETION = _any(
  r"\b(?:gives|yields|leaves|get|obtain|makes)\b(?: us| an?)?"
  rf" (?:\w = )?{_NUM}\b",
  rf"\banswer is {_NUM}\b",
  rf"\b(?:hence|therefore|thus|so)\b.{{0,30}}\b\w = {_NUM}",
  rf"\b(?:hence|therefore|thus|so)\b.{{0,40}}\b(?:gets?|is) {_NUM}\b",
)
_VERB = r"(?:check|verify|confirm|test|validate|recompute)"
_CHECK = _any(
  rf"\b(?:{_I}|i should|i must|i have|i need to|to|we should|now)"
  rf" (?:quickly |also |now |just |once more )?(?:double[- ]|re-?)?{_VERB}"
  r"(?:ed)?\b(?! in\b| out\b)",
  r"\bi (?:have )?(?:re|double[- ])?(?:verified|checked|tested|confirmed)\b",
  r"^(?:so |now |then |quick )?(?:double[- ]|re-?)?"
  r"(?:check|verify|test|confirm)"
  r"(?::|,| again| that| this| it| whether| -?[\d(])",
  r"^(?:double[- ]|re-?)?(?:checking|verifying|testing|confirming|recomputing)"
  r"\b",
  r"\bsanity[- ]check\b|\bdouble[- ]check(?:ing|ed)?\b|\bto be sure\b",
  r"\bplugging\b.{0,20}\bback\b|\bsplit the check\b",
  r"^(?:is (?:it|that|this) (?:right|correct)|does (?:it|that|this)"
  r" (?:satisfy|hold|work))\b",
)
_YES = (
  r"(?:ok|okay|correct|right|yes|good|fine|true|matches|works|holds|agrees"
  r"|stands|as required|\u2713|\u2714)"
)
_NO = r"(?:wrong|incorrect|no|false|fails|off|\u2717|\u2718)"
_SUBJECT = r"(?:(?:so|and|which|that|this|it|the result) ){0,3}(?:(?:is|'s) )?"
# Behind an equation, or at the head of the sentence after it.
_VERDICT = re.compile(
  rf"[ ,.:?!()-]{{0,4}}(?:{_SUBJECT}(?P<no>{_NO}|not (?:right|correct))"
  rf"|{_SUBJECT}(?P<yes>{_YES}))(?![\w'])(?! now)"
)
_ANYWHERE = re.compile(rf"\b(?:(?P<no>{_NO}|not right)|(?P<yes>{_YES}))(?!\w)")
_LINKS = {
  "ne": r"(?:which )?(?:is |was )?not|(?:which )?isn't|!=|\u2260"
  r"|but (?:we|i) (?:need|want|wanted)|but the target is|and not",
  "lt": r"<|(?:which )?is (?:less|smaller) than|(?:which )?is below"
  r"|(?:which )?(?:is )?too (?:small|low),?(?: since| because| as)? we need",
  "gt": r">|(?:which )?is (?:more|greater|larger) than|(?:which )?is above"
  r"|(?:which )?(?:is )?too (?:large|big|high),?(?: since| because| as)? we"
  r" need",
}
_COMPARISON = re.compile(
  rf"(?<![\w./])({_NUM}),? ?(?:"
  + "|".join(f"(?P<{name}>{link})" for name, link in _LINKS.items())
  + rf") ({_NUM})(?![\w/])"
)
_WANTED = re.compile(rf"\b(?:need|want|target is|target) ({_NUM})\b")


def _number(text: str) -> Fraction | None:
  """A number as `_NUM` has it."""
  value = _read(text.removeprefix("-"))
  return -value if value is not None and text.startswith("-") else value


def _comparisons(sentence: str) -> Iterator[bool]:
  """For each two numbers that a sentence compares: is it true?"""
  for match in _COMPARISON.finditer(sentence):
    first, second = _number(match.group(1)), _number(match[match.re.groups])
    if first is None or second is None:
      continue
    is_true = (
      (match["ne"] and first != second)
      or (match["lt"] and first < second)
      or (match["gt"] and first > second)
    )
    yield bool(is_true)


# Reading a text.


class _Check(NamedTuple):
  """What a sentence computes, and what it says of that.

  Attributes:
    is_computed: whether there is arithmetic to judge.
    is_consistent: whether the verdict agrees with it.
    is_failed: whether it finds something wrong.
    is_explicit: whether it has a verdict of its own.
  """

  is_computed: bool
  is_consistent: bool
  is_failed: bool
  is_explicit: bool


def find_behaviors(text: str) -> list[Event]:
  """The behaviours of a text in the order of its sentences.

  A sentence shows each behaviour at most once. Never raises, whatever the text.
  """
  if not isinstance(text, str):
    return []
  sentences = list(_sentences(text))
  events: list[Event] = []
  claims: dict[str, Fraction] = {}
  open_for, is_verdict = 0, False
  for place, sentence in enumerate(sentences):
    after = sentences[place + 1] if place + 1 < len(sentences) else ""
    equations = list(find_equations(sentence))
    # A step is one whatever stands above it.
    is_step = "(left:" in sentence
    announces = _CHECK.search(sentence) is not None
    check = _read_check(sentence, after, equations, claims)
    is_check = check.is_computed and (
      announces or (not is_step and (check.is_explicit or open_for > 0))
    )
    if is_check:
      open_for = 0
      if check.is_consistent:
        events.append(Event("self_evaluation", check.is_failed))
      else:
        events.append(Event("false_evaluation"))
    elif announces:
      if open_for:
        events.append(Event("empty_evaluation"))
      open_for = _OPEN_FOR + 1
    events += map(Event, _by_words(sentence, equations, is_check or is_verdict))
    if open_for:
      open_for -= 1
      if not open_for or not after:
        events.append(Event("empty_evaluation"))
        open_for = 0
    # The sentence with the verdict on this one carries out nothing.
    is_verdict = is_check and _VERDICT.match(after) is not None
    claims.update((one.left, one.value) for one in equations)
  return events


def _sentences(text: str) -> Iterator[str]:
  text = text[:MAX_TEXT].translate(_PLAIN).lower()
  text = _QUOTED.sub(" quoted ", text)
  for sentence in _SENTENCE.split(text):
    for start in range(0, len(sentence), MAX_SENTENCE):
      if part := sentence[start : start + MAX_SENTENCE].strip():
        yield part


def _read_check(
  sentence: str,
  after: str,
  equations: Sequence[Equation],
  claims: dict[str, Fraction],
) -> _Check:
  """Judges a sentence as if it were a check.

  Args:
    sentence: the sentence.
    after: the next one, whose head may be the verdict.
    equations: those of the sentence.
    claims: left sides that were computed before, with what was claimed.
  """
  compared = list(_comparisons(sentence))
  are_true = all(one.is_true for one in equations)
  if compared:
    return _Check(True, all(compared) and are_true, True, True)
  if not equations:
    return _Check(False, False, False, False)
  end = equations[-1].end
  verdict = _VERDICT.match(sentence, end) or _VERDICT.match(after)
  is_explicit = verdict is not None
  verdict = verdict or _ANYWHERE.search(sentence, end)
  if verdict is None or verdict.group("yes"):
    return _Check(True, are_true, False, is_explicit)
  # A verdict of wrong: of the arithmetic, of what was claimed of it before, or
  # of a result that is not the one wanted.
  misses = any(
    _number(wanted) not in (None, equations[-1].value)
    for wanted in _WANTED.findall(sentence[end:])
  )
  differs = any(
    claims.get(one.left, one.value) != one.value for one in equations
  )
  is_wrong = not are_true or misses or differs
  return _Check(True, is_wrong, True, is_explicit)


def _by_words(
  sentence: str, equations: Sequence[Equation], is_check: bool
) -> Iterator[str]:
  """Behaviours other than checks, in the order they stand."""
  found = []
  analyses = None if is_check else _ANALYSIS.search(sentence)
  decomposes = _DECOMPOSITION.search(sentence)
  if not decomposes and not is_check:
    decomposes = _reversed(sentence, equations)
  for name, match in (
    ("problem_analysis", analyses),
    ("task_decomposition", decomposes),
    ("alternative_proposal", _ALTERNATIVE.search(sentence)),
    ("self_correction", _CORRECTION.search(sentence)),
  ):
    if match:
      found.append((match.start(), name))
  if not is_check and not decomposes:
    results = [one.start for one in equations if one.is_result]
    words = None if analyses else _COMPLETION.search(sentence)
    if results or words:
      start = results[0] if results else words.start()
      found.append((start, "task_completion"))
  return (name for _, name in sorted(found))


_PLANNED = re.compile(r"[ ,]*(?:so\b|need\b|with\b|where\b|$)")


def _reversed(
  sentence: str, equations: Sequence[Equation]
) -> re.Match[str] | None:
  """`13 = 6 + 7, so ...`: the target, and what it is to be made of."""
  if equations and not equations[0].is_result:
    return _PLANNED.match(sentence, equations[0].end)
  return None


def count_behaviors(text: str) -> dict[str, int]:
  """How often a text shows each behaviour of `COUNTED`; never raises."""
  return _counts(find_behaviors(text))


def _counts(events: Sequence[Event]) -> dict[str, int]:
  counts = Counter(event.behavior for event in events)
  return {name: counts[name] for name in COUNTED}


def count_transitions(text: str) -> dict[tuple[str, str], int]:
  """How often one behaviour follows another in a text; never raises.

  Repeats of one behaviour count as one. A self_evaluation is named by what it
  found: `failed_check` or `passed_check`.
  """
  return _transitions(find_behaviors(text))


def _transitions(events: Sequence[Event]) -> dict[tuple[str, str], int]:
  names: list[str] = []
  for event in events:
    name = event.behavior
    if name == "self_evaluation":
      name = "failed_check" if event.is_failed else "passed_check"
    if names[-1:] != [name]:
      names.append(name)
  return dict(Counter(zip(names, names[1:], strict=False)))


def summarize(texts: Iterable[str]) -> dict[str, float]:
  """Means over texts, as metrics.

  `behaviors/<name>` for all of `COUNTED`; `transitions/<a>_to_<b>` for those
  that occur. No texts give zeros.
  """
  counts: Counter[str] = Counter()
  num_texts = 0
  for text in texts:
    num_texts += 1
    events = find_behaviors(text)
    for name, count in _counts(events).items():
      counts[f"behaviors/{name}"] += count
    for (first, second), count in _transitions(events).items():
      counts[f"transitions/{first}_to_{second}"] += count
  names = [f"behaviors/{name}" for name in COUNTED]
  names += sorted(name for name in counts if name.startswith("transitions/"))
  return {name: counts[name] / max(num_texts, 1) for name in names}
