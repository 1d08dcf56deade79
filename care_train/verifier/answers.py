"""acc of Eq. 1: does an answer equal the key? Model output is untrusted, so nothing is evaluated.

Symbolic equality is asked of the caller: a worker process has it, the trainer's never.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from care_train.data.answers import AnswerType, accepted_answers
from care_train.verifier.choices import (
    YES_NO,
    is_choice_key,
    same_choice,
    same_letters,
    same_yes_no,
)
from care_train.verifier.expressions import (
    Tuple,
    canonical,
    looks_mathematical,
    read_real_set,
    same_formula,
    same_real_set,
    split_set,
    split_tuple,
    unread_marks,
    wants_evaluation,
    why_not_parsed,
)
from care_train.verifier.notation import (
    depth,
    may_be_one,
    normalize,
    plain_latex,
    same_words,
    split_equation,
    split_top,
    tight,
    unwrap,
    value_of_statement,
)
from care_train.verifier.numbers import (
    CHARTQA_TOLERANCE,
    Quantity,
    parse_quantity,
    same_number,
    same_quantity,
)
from care_train.verifier.responses import Item, Verdict
from care_train.verifier.units import split_unit

if TYPE_CHECKING:
    from care_train.verifier.verify import MathVerify

MAX_ANSWER_CHARS = 1024
"""An answer longer than this, and than twice its key, is wrong unread."""

_MAX_ELEMENTS = 32
_MAX_NESTING = 8

# A unit at the end, apart from letters beside it: (x+2)\text{ m}.
_MARKED = re.compile(r"\\(?:text|mathrm)\s*\{[^{}]*\}(?:\^\{?[23]\}?)?[\s.$)}]*$")
_IN_A_BASE = re.compile(r"[0-9]_\{?[0-9]")
_AS_LETTER = re.compile(r"\([a-z]\)|\[[a-z]\]|[a-z]\)?")


class AlgebraNeededError(Exception):
    """The comparison takes symbolic algebra, which only a worker process runs."""


def compare(item: Item, symbolic: "MathVerify | None") -> Verdict:
    """Compare an answer with its key; docs/verifier.md says what counts as equal.

    Raises:
        AlgebraNeededError: it takes algebra, and `symbolic` is None.
    """
    predicted, expected = item.predicted, item.expected
    if len(predicted) > max(MAX_ANSWER_CHARS, 2 * len(expected)):
        return Verdict(0.0, f"answer too long: {len(predicted)} characters")
    if not predicted.strip():
        return Verdict(0.0, "empty answer")
    if item.answer_type is AnswerType.FUNCTION:
        return Verdict(0.0, "only a reward function reads this key", item.answer_type)
    accepted = accepted_answers(expected)
    if accepted != (expected,) and item.answer_type not in (AnswerType.SET, AnswerType.LIST):
        return _compare_with_any(accepted, item, symbolic)
    kind = item.answer_type or infer_type(expected, item.options)
    if kind is not AnswerType.MATH and tight(predicted) == tight(expected):
        return Verdict(1.0, "exact match", kind)
    # GSM8K's keys end a solution.
    expected = expected.rpartition("\n#### ")[2]
    item = replace(item, predicted=unwrap(predicted), expected=unwrap(expected), answer_type=kind)
    for answer in (item.predicted, value_of_statement(item.predicted)):
        if answer and (reason := _Comparison(replace(item, predicted=answer), symbolic).reason()):
            return Verdict(1.0, reason, kind)
    return Verdict(0.0, f"got {_shorten(predicted)}, wanted {_shorten(expected)}", kind)


def _compare_with_any(
    accepted: Sequence[str], item: Item, symbolic: "MathVerify | None"
) -> Verdict:
    verdicts = [compare(replace(item, expected=one), symbolic) for one in accepted]
    # Of what is wrong, words: a judge is asked about these alone.
    best = max(verdicts, key=lambda v: (v.accuracy, v.answer_type is AnswerType.TEXT))
    if best.accuracy:
        return best
    wanted = _shorten(" or ".join(accepted))
    return replace(best, reason=f"got {_shorten(item.predicted)}, wanted {wanted}")


@lru_cache(maxsize=1024)
def infer_type(expected: str, options: tuple[str, ...] = ()) -> AnswerType:
    """The type of a key that has none: words unless it clearly is something else."""
    text = unwrap(expected.rpartition("\n#### ")[2])
    if is_choice_key(text, options):
        return AnswerType.CHOICE
    if normalize(text) in YES_NO:
        return AnswerType.YES_NO
    if _has_parts(text):
        return AnswerType.LIST
    plain = plain_latex(text)
    bare = split_equation(plain)[1]
    quantity = parse_quantity(bare, is_key=True)
    if quantity and not quantity.is_variable and (quantity.unit is None or quantity.unit.known):
        return AnswerType.NUMBER
    if re.fullmatch(r"(?:[A-Za-z]\s*(?:=|\\in|∈)\s*)?\\?\{.*\}", plain) and "," in plain:
        return AnswerType.SET
    if (real_set := read_real_set(plain)) and real_set.is_certain:
        return AnswerType.MATH
    # In "1,200 apples" the comma parts thousands.
    if (not quantity and _is_enumeration(plain)) or (
        "±" in plain and looks_mathematical(plain + "^")
    ):
        return AnswerType.SET
    if _is_expression(plain) or _is_expression(split_unit(bare)[0]):
        return AnswerType.MATH
    return AnswerType.TEXT


def _has_parts(text: str) -> bool:
    """Whether a key has a line for each part of a question."""
    lines = [plain_latex(line) for line in text.splitlines() if line.strip()]
    return 1 < len(lines) <= _MAX_ELEMENTS and all(
        parse_quantity(line, is_key=True) or looks_mathematical(line) for line in lines
    )


def _is_enumeration(text: str) -> bool:
    parts = split_top(re.sub(r",?\s+(?:and|or)\s+", ", ", text))
    if not 1 < len(parts) <= _MAX_ELEMENTS:
        return False
    if all(re.fullmatch(r"[A-J]", part) for part in parts):
        return True
    values = [split_equation(part)[1] for part in parts]
    return all(part and (parse_quantity(part) or _is_expression(part)) for part in values)


def _is_expression(text: str) -> bool:
    """Whether it is a formula, or a tuple of numbers and formulas."""
    if looks_mathematical(text):
        return True
    found = split_tuple(text)
    return found is not None and all(
        parse_quantity(part) or looks_mathematical(part) or re.fullmatch(r"[-+]?[a-zA-Z∞]", part)
        for part in found[1]
    )


class _Comparison:
    """Why an answer equals its key, by the key's type; "" where it does not."""

    def __init__(self, item: Item, symbolic: "MathVerify | None") -> None:
        self.item, self.symbolic = item, symbolic
        self.got, self.wanted = item.predicted, item.expected

    def reason(self) -> str:
        by_type: dict[AnswerType | None, Callable[[], str]] = {
            AnswerType.CHOICE: self._choice,
            AnswerType.NUMBER: self._number,
            AnswerType.RELAXED: self._relaxed,
            AnswerType.MATH: self._math,
            AnswerType.SET: self._set,
            AnswerType.LIST: self._list,
            AnswerType.YES_NO: lambda: same_yes_no(self.got, self.wanted),
            AnswerType.TEXT: self._text,
        }
        return by_type[self.item.answer_type]()

    def _choice(self) -> str:
        return same_choice(self.got, self.wanted, self.item.options, self._are_equal)

    def _number(self) -> str:
        name, got_text = split_equation(plain_latex(self.got))
        key_name, key_text = split_equation(plain_latex(self.wanted))
        if not may_be_one(name, key_name):
            return ""
        wanted = parse_quantity(key_text, is_key=True)
        if wanted is None:
            return self._math()
        got = parse_quantity(got_text)
        if got is None:
            if not wants_evaluation(got_text) or why_not_parsed(got_text):
                return ""
            expression, unit = split_unit(got_text)
            value = parse_quantity(self._algebra().value(expression))
            # An expression is exact: it may be rounded to the key, but is no decimal itself.
            got = value and Quantity(value.value, unit=unit)
        return same_quantity(got, wanted, self._tolerance()) if got else ""

    def _relaxed(self) -> str:
        tolerance = self._tolerance(CHARTQA_TOLERANCE)
        reason = same_number(plain_latex(self.got), plain_latex(self.wanted), tolerance)
        return self._text() if reason is None else reason

    def _math(self) -> str:
        got, wanted = (plain_latex(text.rstrip(" .。")) for text in (self.got, self.wanted))
        if canonical(got) == canonical(wanted) or same_formula(got, wanted):
            return "the same expression"
        name, got_right = split_equation(got)
        key_name, key_right = split_equation(wanted)
        if "=" in got and "=" in wanted and not (name and key_name and may_be_one(name, key_name)):
            return "equal expressions" if self._are_equal(got, wanted) else ""
        if name or key_name:
            got, wanted = got_right, key_right
            if canonical(got) == canonical(wanted):
                return "the same expression"
        if (reason := same_number(got, wanted)) is not None:
            return reason
        real_set, key_set = read_real_set(got), read_real_set(wanted)
        if real_set and key_set and (real_set.is_certain or key_set.is_certain):
            same = same_real_set(real_set, key_set, self._is_same)
            return "the same set of numbers" if same else ""
        got, unit = split_unit(got, is_marked=bool(_MARKED.search(self.got)))
        wanted, key_unit = split_unit(wanted, is_marked=bool(_MARKED.search(self.wanted)))
        if unit and key_unit and unit != key_unit:
            return ""
        if (unit or key_unit) and canonical(got) == canonical(wanted):
            return "the same expression"
        pair, key_pair = split_tuple(got), split_tuple(wanted)
        if key_pair is not None:
            return self._in_order(_coordinates(got, pair, key_pair), key_pair[1])
        if pair is not None or "," in re.sub(r"\{[^{}]*\}", "", got):
            return ""
        return "equal expressions" if self._are_equal(got, wanted) else ""

    def _set(self) -> str:
        if same_letters(self.got, self.wanted):
            return "the same set"
        got, wanted = split_set(self.got), split_set(self.wanted)
        if not got or not wanted or max(len(got), len(wanted)) > _MAX_ELEMENTS:
            return ""
        # Cheap ways to differ come before any symbolic comparison.
        if len(set(map(canonical, got))) < len(set(map(canonical, wanted))) / 2:
            return ""
        # Each pair once: sets within sets would be compared twice as often at each level.
        same = cache(self._is_same)
        found = all(any(same(one, key) for one in got) for key in wanted)
        known = found and all(any(same(one, key) for key in wanted) for one in got)
        return "the same set" if known else ""

    def _list(self) -> str:
        return self._in_order(_elements(self.got), _elements(self.wanted))

    def _text(self) -> str:
        got, wanted = plain_latex(self.got), plain_latex(self.wanted)
        if normalize(got) == normalize(wanted) or same_formula(got, wanted):
            return "exact match"
        if same_letters(got, wanted):
            return "the same options"
        letters = [normalize(text) for text in (got, wanted)]
        if all(map(_AS_LETTER.fullmatch, letters)):
            letter, key_letter = (text.strip("()[]") for text in letters)
            return "same choice" if letter == key_letter else ""
        if (reason := same_number(got, wanted)) is not None:
            return reason
        return "the same words" if same_words(got, wanted) else ""

    def _in_order(self, parts: list[str], wanted: list[str]) -> str:
        if len(parts) != len(wanted) or len(wanted) > _MAX_ELEMENTS:
            return ""
        return "equal parts" if all(map(self._is_same, parts, wanted)) else ""

    def _is_same(self, got: str, wanted: str) -> bool:
        """Whether one element equals another, as the types of elements say."""
        kind = infer_type(wanted)
        # Shorter and not deep: the comparison of sets within sets ends.
        is_nested = len(wanted) < len(self.wanted) and depth(wanted) <= _MAX_NESTING
        if kind is AnswerType.CHOICE or (kind is AnswerType.SET and not is_nested):
            kind = AnswerType.TEXT
        if normalize(got) == normalize(wanted):
            return True
        element = Item(got, wanted, kind, tolerance=self.item.tolerance)
        return bool(_Comparison(element, self.symbolic).reason())

    def _are_equal(self, got: str, wanted: str) -> bool:
        # The parser would read 101_2 and 101_3 as the same number.
        if why_not_parsed(got) or why_not_parsed(wanted) or _IN_A_BASE.search(f"{got} {wanted}"):
            return False
        return unread_marks(got) == unread_marks(wanted) and self._algebra().equal(got, wanted)

    def _algebra(self) -> "MathVerify":
        if self.symbolic is None:
            raise AlgebraNeededError
        return self.symbolic

    def _tolerance(self, default: Fraction | None = None) -> Fraction | None:
        # As written: the nearest binary number to 0.03 is below it.
        own = self.item.tolerance
        return default if own is None else Fraction(repr(own))


def _coordinates(got: str, pair: Tuple | None, key: Tuple) -> list[str]:
    """The parts of an answer to compare with a key in brackets; none where the brackets differ."""
    if pair is None:
        # The brackets of a point may be missing, those of an interval say which ends are in.
        parts = split_top(got) if (key[0], key[2]) == ("(", ")") else []
    else:
        parts = pair[1] if (pair[0], pair[2]) == (key[0], key[2]) else []
    named = [split_equation(part) for part in parts]
    names = [name for name, _ in named]
    # Coordinates by name: x = 1, y = 2.
    return [v for _, v in named] if all(names) and names == sorted(set(names)) else parts


def _elements(text: str) -> list[str]:
    text = plain_latex(", ".join(text.splitlines()))
    # A list of one has brackets without a comma.
    found = split_tuple(text) or split_tuple(f"{text[:-1]},{text[-1:]}")
    inner = found[1] if found else split_top(re.sub(r",?\s+and\s+", ", ", text))
    return [part for part in inner if part]


def _shorten(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:60] + "...")
