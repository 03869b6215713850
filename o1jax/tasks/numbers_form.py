"""Normal forms of what texts of the numbers game write, by which they vote.

The target of a problem is given, so a vote over the numbers that texts reach
would be a checker in disguise. Texts vote by the expression they write: two
have the same normal form where they differ only in the order of the operands
of sums and products and in brackets that such chains do not need,

  3 + (7 - 2), (7 + 3) - 2 and 3 - (2 - 7) are all 3 + 7 - 2.

Operands are numbers as they are written. Nothing is evaluated: 2 * 2 and 2 + 2
are two forms, and so are (7 - 3) * (5 - 2) and (3 - 7) * (2 - 5).
"""

from collections.abc import Sequence
from typing import NamedTuple

# Operands of the largest form that is read. Solutions have five at most; the
# bound is for texts that are none.
MAX_OPERANDS = 32


class Form(NamedTuple):
  """The normal form of an expression: one number, or a chain of + - or * /.

  Attributes:
    sign: "+" for a chain of + and -, "*" for one of * and /, "" for a number.
    front: what is added (or multiplied), as texts in order.
    back: what is subtracted (or divided by), as texts in order.
    num_operands: numbers written in it.
  """

  sign: str
  front: tuple[str, ...]
  back: tuple[str, ...]
  num_operands: int

  def text(self) -> str:
    """The form as an expression without brackets around it."""
    sign, inverse = (" + ", " - ") if self.sign == "+" else (" * ", " / ")
    return inverse.join([sign.join(self.front), *self.back])


def leaf(number: int | str) -> Form:
  """The form of a number that stands for itself."""
  return Form("", (str(number),), (), 1)


def join(a: Form | None, op: str, b: Form | None) -> Form | None:
  """The form of `a op b`, None where it would be too large (or a part is)."""
  if a is None or b is None:
    return None
  num_operands = a.num_operands + b.num_operands
  if num_operands > MAX_OPERANDS:
    return None
  sign = "+" if op in "+-" else "*"
  front, back = _chain(a, sign)
  more, less = _chain(b, sign)
  if op in "-/":
    more, less = less, more
  return Form(sign, _ordered(front + more), _ordered(back + less), num_operands)


def _chain(form: Form, sign: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """The two sides of a form as part of a chain with this sign."""
  if form.sign == sign:
    return form.front, form.back
  return ((f"({form.text()})",) if form.sign else form.front), ()


def _ordered(texts: tuple[str, ...]) -> tuple[str, ...]:
  """Shorter texts first: small numbers, large numbers, expressions."""
  if len(texts) < 2:
    return texts
  return tuple(sorted(texts, key=lambda text: (len(text), text)))


class Path:
  """Follows the claims of step lines: which form each number left stands for.

  Nothing is checked. An operand that is not among the numbers left, and a
  number that a line claims to be left without an origin, are leaves of their
  own text. Where equal numbers are left, the one with the smallest form is
  taken first, so that the order in which a line leaves them does not matter.
  """

  def __init__(self, numbers: Sequence[int]):
    left = [str(number) for number in numbers]
    # One state for the beginning and for each line since that still stands:
    # the numbers left, sorted, and for each of them the forms it stands for,
    # smallest first.
    self._states = [(sorted(left), _forms_of({}, left))]

  def step(
    self, a: str, op: str, b: str, result: str, left: Sequence[str]
  ) -> None:
    """Follows the line `a op b = result (left: ...)`."""
    forms = dict(self._states[-1][1])
    joined = join(_take(forms, a), op, _take(forms, b))
    same = forms.get(result)
    forms[result] = sorted([*same, joined], key=_size) if same else [joined]
    self._states.append((sorted(left), _forms_of(forms, left)))

  def go_back(self, left: Sequence[str]) -> None:
    """Returns to the last state above that has these numbers, if one has."""
    wanted = sorted(left)
    for depth in range(len(self._states) - 2, -1, -1):
      if self._states[depth][0] == wanted:
        del self._states[depth + 1 :]
        return

  def answer(self) -> str | None:
    """The form of the one number left; None where it is not one.

    None also where the form would be too large.
    """
    left, forms = self._states[-1]
    form = forms[left[0]][0] if len(left) == 1 else None
    return None if form is None else form.text()


def _take(forms: dict[str, list[Form | None]], number: str) -> Form | None:
  """Takes the smallest form of a number out of a state, else makes a leaf."""
  if not forms.get(number):
    return leaf(number)
  form, *forms[number] = forms[number]
  return form


def _forms_of(
  forms: dict[str, list[Form | None]], left: Sequence[str]
) -> dict[str, list[Form | None]]:
  """The forms of the numbers that are left, leaves where there are none."""
  counts: dict[str, int] = {}
  for text in left:
    counts[text] = counts.get(text, 0) + 1
  kept = {}
  for text, count in counts.items():
    known = forms.get(text, [])[:count]
    kept[text] = [leaf(text)] * (count - len(known)) + known
  return kept


def _size(form: Form | None) -> tuple[int, str]:
  """The order of forms; those too large come last."""
  if form is None:
    return MAX_OPERANDS + 1, ""
  return form.num_operands, form.text()
