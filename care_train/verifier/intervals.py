"""Sets of real numbers, as intervals, as inequalities or in words."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from care_train.verifier.notation import split_top

_INFINITY = re.compile(r"\+?\s*(?:\\infty|∞|(?<![a-zA-Z])(?:inf|infty|infinity|oo)(?![a-zA-Z]))")
_UNION = re.compile(r"(?<=[)\]])\s*(?:U|u|\u222a|\\cup|or|and|,)\s*(?=[(\[])")
_IN = re.compile(r"([a-zA-Z])\s*(?:\\in|∈)\s*(?![a-z])|\\?\{\s*([a-zA-Z])\s*(?:\||:|\\mid)\s*")
_REALS = r"\\mathbb\s*\{?\s*R\s*\}?"
_ALL = re.compile(
    rf"(?:all|any|every|the set of(?: all)?) (?:{_REALS}|reals?(?: numbers?| values?)?)"
    r"(?: of [a-z])?"
    rf"|{_REALS}|reals|real numbers",
    re.IGNORECASE,
)
_ALL_BUT = re.compile(
    rf"(?:{_ALL.pattern})\s*(?:\\setminus|\\backslash|except(?: for)?|other than|-)\s*"
    r"(?:\\?\{)?([^{},]{1,20}?)(?:\\?\})?",
    re.IGNORECASE,
)
_EMPTY = re.compile(
    r"\\emptyset|(?:the )?empty set|no (?:real )?(?:solutions?|values?)|\\?\{\s*\\?\}", re.I
)
_RELATION = re.compile(r"\\leq|\\geq|\\neq|<|>")
_FLIPPED = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq", "\\neq": "\\neq"}
_LOWEST, _HIGHEST = "-∞", "∞"


@dataclass(frozen=True)
class Interval:
    """From `low` to `high`, texts of expressions or -∞ and ∞, with or without its ends."""

    low: str
    has_low: bool
    high: str
    has_high: bool


@dataclass(frozen=True)
class RealSet:
    """A union of intervals."""

    intervals: tuple[Interval, ...]
    variable: str = ""
    """The name in an inequality."""
    is_certain: bool = True
    """False for one pair of finite ends in brackets, which may also be a point or a list."""


def read_real_set(text: str) -> RealSet | None:
    """The set that a text with LaTeX in plain form spells, or None.

    Reads `(-\\infty, 3) \\cup [5, 7)`, `x \\in (1, 2)`, `x < 3 or 5 \\leq x < 7`, `x \\neq 2`, `all
    real numbers`, `\\emptyset`.
    """
    text = text.strip().removesuffix(".")
    if len(text) > 400:
        return None
    name = ""
    if match := _IN.match(text):
        name, text = match[1] or match[2], text[match.end() :].strip()
        text = text.removesuffix("\\}").removesuffix("}").strip() if match[2] else text
    if _ALL.fullmatch(text):
        return RealSet((Interval(_LOWEST, False, _HIGHEST, False),), name)
    if match := _ALL_BUT.fullmatch(text):
        return RealSet(tuple(_half_lines("\\neq", match[1])), name)
    if _EMPTY.fullmatch(text):
        return RealSet((), name)
    if _RELATION.search(text):
        return _of_inequalities(text, name)
    text = re.sub(r"-\s*" + _INFINITY.pattern, _LOWEST, text)
    text = _INFINITY.sub(_HIGHEST, text)
    found = [_of_brackets(part) for part in split_top(_UNION.sub("\n", text), "\n")]
    intervals = tuple(one for one in found if one is not None)
    if len(intervals) < len(found):
        return None
    # Two pairs of finite ends with a comma between them are points.
    is_union = len(found) > 1 and not re.search(r"[)\]]\s*(?:,|and|or)\s*[(\[]", text)
    one_sided = any(one.low == _LOWEST or one.high == _HIGHEST for one in intervals)
    mixed = any(one.has_low != one.has_high for one in intervals)
    return RealSet(intervals, name, bool(name) or is_union or one_sided or mixed)


def same_real_set(got: RealSet, wanted: RealSet, same_end: Callable[[str, str], bool]) -> bool:
    """Whether two sets have the same intervals, in whatever order."""
    if got.variable and wanted.variable and got.variable != wanted.variable:
        return False
    if len(got.intervals) != len(wanted.intervals):
        return False
    left = list(got.intervals)
    for key in wanted.intervals:
        match = next((one for one in left if _same(one, key, same_end)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same(one: Interval, key: Interval, same_end: Callable[[str, str], bool]) -> bool:
    if (one.has_low, one.has_high) != (key.has_low, key.has_high):
        return False
    pairs = ((one.low, key.low), (one.high, key.high))
    endless = (_LOWEST, _HIGHEST)
    if any((a in endless or b in endless) and a != b for a, b in pairs):
        return False
    return all(a == b or same_end(a, b) for a, b in pairs)


def _of_brackets(text: str) -> Interval | None:
    if len(text) < 5 or text[0] not in "([" or text[-1] not in ")]":
        return None
    ends = split_top(text[1:-1], ",;")
    if len(ends) != 2 or not all(ends):
        return None
    return Interval(ends[0], text[0] == "[", ends[1], text[-1] == "]")


def _of_inequalities(text: str, name: str) -> RealSet | None:
    found: list[Interval] = []
    for part in re.split(r"\s+or\s+|\s*(?:\u222a|\\cup|\\lor|\\vee)\s*|\s*,\s*(?:or\s+)?", text):
        one = _of_chain(part, name)
        if one is None or (found and one[0] != name):
            return None
        name = one[0]
        found += one[1]
    # Two conditions with a comma or `and` between them are an intersection, which is not computed.
    if len(found) > 1 and "," in text and not re.search(r"\bor\b|\\cup|\u222a", text):
        return None
    return RealSet(tuple(found), name)


def _of_chain(text: str, name: str) -> tuple[str, list[Interval]] | None:
    """(variable, intervals) of `x < 3`, `2 > x`, `1 < x \\leq 2`, `x > 1 and x < 2`."""
    joined = re.fullmatch(r"(.+?)\s+(?:and|\\land|\\wedge)\s+(.+)", text)
    if joined:
        parts = [_of_chain(part, name) for part in joined.groups()]
        if parts[0] is None or parts[1] is None or parts[0][0] != parts[1][0]:
            return None
        return _intersection(parts[0], parts[1])
    ends = [end.strip() for end in _RELATION.split(text)]
    relations = _RELATION.findall(text)
    places = [place for place, end in enumerate(ends) if re.fullmatch(name or "[a-zA-Z]", end)]
    if len(places) != 1 or not all(ends) or len(relations) not in (1, 2):
        return None
    variable = ends[places[0]]
    if any(re.search(rf"(?<![a-zA-Z\\]){variable}(?![a-zA-Z])", e) for e in ends if e != variable):
        return None
    if len(relations) == 2:
        return (
            (variable, [_between(ends, relations)])
            if places == [1] and _ordered(relations)
            else None
        )
    relation = relations[0] if places == [0] else _FLIPPED[relations[0]]
    return variable, _half_lines(relation, ends[1 - places[0]])


def _ordered(relations: list[str]) -> bool:
    return all(r in ("<", "\\leq") for r in relations) or all(
        r in (">", "\\geq") for r in relations
    )


def _between(ends: list[str], relations: list[str]) -> Interval:
    closed = [relation in ("\\leq", "\\geq") for relation in relations]
    if relations[0] in (">", "\\geq"):
        return Interval(ends[2], closed[1], ends[0], closed[0])
    return Interval(ends[0], closed[0], ends[2], closed[1])


def _half_lines(relation: str, end: str) -> list[Interval]:
    below = Interval(_LOWEST, False, end, relation == "\\leq")
    above = Interval(end, relation == "\\geq", _HIGHEST, False)
    return (
        [below, above] if relation == "\\neq" else [below if relation in ("<", "\\leq") else above]
    )


def _intersection(
    first: tuple[str, list[Interval]], second: tuple[str, list[Interval]]
) -> tuple[str, list[Interval]] | None:
    """Of one half-line up and one down; others are not computed."""
    if len(first[1]) != 1 or len(second[1]) != 1:
        return None
    one, other = first[1][0], second[1][0]
    if one.low == _LOWEST:
        one, other = other, one
    if one.high != _HIGHEST or other.low != _LOWEST or _LOWEST in (one.low, other.high):
        return None
    return first[0], [Interval(one.low, one.has_low, other.high, other.has_high)]
