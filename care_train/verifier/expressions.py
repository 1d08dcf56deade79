"""Mathematical expressions as text: what is equal at sight, what may be parsed at all, and sets of
real numbers as intervals, as inequalities or in words."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from care_train.verifier.notation import (
    closing_brace,
    depth,
    levels,
    plain_latex,
    split_top,
    unwrap,
)

MAX_EXPRESSION_CHARS = 400
"""Longer ones are not parsed symbolically."""

Tuple = tuple[str, list[str], str]
"""(bracket, parts, bracket) of `(1, 2)` or `[0, 1)`."""

_MAX_DEPTH = 10
"""Each further level of brackets costs the parser up to twice the time."""
_COMMANDS = re.compile(r"\\[a-zA-Z]+")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[a-z]{1,12}\}")
_FORMULA = re.compile(r"(?:[A-Z][a-z]?[0-9]{0,3}){2,}")
_SUBSTANCE = re.compile(
    r"(?:[A-Z][a-z]?[0-9]{0,3}|[()][0-9]{0,2}){2,}(?:[0-9]?[+-])?|[A-Z][a-z]?[0-9]?[+-]"
)
_FORMULA_MARKS = re.compile(r"\s*[_{}]\s*|\^(?=\{?[0-9]?[+-])")
_WORD = re.compile(r"[A-Za-z]{3,}")
_FUNCTIONS = set(
    "sin cos tan cot sec csc arcsin arccos arctan asin acos atan sinh cosh tanh log ln exp sqrt "
    "cbrt frac max min lim gcd lcm mod alpha beta gamma delta theta lambda sigma omega pi phi inf "
    "infty infinity abs abc abcd binom det tr pmatrix bmatrix matrix vmatrix".split()
)
# Digits that would make an integer nobody can write down.
_HUGE = re.compile(
    r"[0-9]{60}|\^\s*\{?\s*[-(]?\s*[0-9]{4}|\^[^,;=+]{0,60}\^[^,;=+]{0,60}\^|[0-9]{4}\s*!|!\s*!"
    r"|\^\s*\{?[^,;=+}]{0,40}!|\^\s*\{?[^,;=+}]{0,40}\^\s*\{?\s*[0-9]{2}"
)
_UNREAD = re.compile(r"'|\^\s*\{?\s*(?:T|\\top)(?![a-zA-Z])|\\[clv]?dots|\.\.\.")
_FRACTION = r"(?<![\w.)}\]^/])([0-9]+)\s*/\s*([0-9]+)"
_PLAIN = [
    (re.compile(r"\*\*"), "^"),
    # A fraction of digits before a symbol is its coefficient.
    (re.compile(_FRACTION + r"(?=\s*(?:√|\\sqrt|sqrt|π|\\pi|pi(?![a-z])))"), r"\\frac{\1}{\2}"),
    (re.compile(_FRACTION + r"\s+(?=[a-zA-Z\\(])"), r"\\frac{\1}{\2} "),
    (re.compile(r"\(\s*([^()]{1,40})\)\s*/\s*\(([^()]{1,40})\)"), r"\\frac{\1}{\2}"),
    (re.compile(r"(?<![\\a-zA-Z])cbrt\s*\(([^()]*)\)|∛\(?([0-9a-zA-Z]+)\)?"), r"\\sqrt[3]{\1\2}"),
    (re.compile(r"√\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*([0-9.]+|[a-zA-Z])"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\a-zA-Z])sqrt\s*\{"), r"\\sqrt{"),
    (re.compile(r"(?<![\\a-zA-Z])sqrt\s*([0-9.]+)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\a-zA-Z])arc(sin|cos|tan)(?![a-zA-Z])"), r"\\arc\1 "),
    (re.compile(r"(?<![\\a-zA-Z])(sin|cos|tan|cot|sec|csc|log|ln|exp)(?![a-zA-Z])"), r"\\\1 "),
    (re.compile(r"(?<![\\a-zA-Z])(pi|theta|alpha|beta|gamma)(?![a-zA-Z])"), r"\\\1 "),
    (re.compile(r"(?<![\\a-zA-Z])(?:inf|infty|infinity)(?![a-zA-Z])|∞"), r"\\infty "),
    (re.compile(r"π"), r"\\pi "),
    (re.compile(r"\\var(?=epsilon|phi|theta|rho|sigma|kappa)"), r"\\"),
    (re.compile(r"\s*°"), r"^{\\circ}"),
    (re.compile(r"θ"), r"\\theta "),
    (re.compile(r"\^\(([^()]*)\)"), r"^{\1}"),
    (re.compile(r"\^(-?[0-9]+)"), r"^{\1}"),
    (re.compile(r"\u00b7|\u00d7|(?<=[0-9a-zA-Z)])\s*\*\s*(?=[0-9a-zA-Z(\\])"), r" \\cdot "),
    (re.compile(r"\u222a"), r"\\cup "),
]
_CANONICAL = re.compile(r"\s+|\\(?:cdot|times)(?![a-zA-Z])|(?<=[_^])\{([A-Za-z0-9])\}")
_MATH_MARKS = re.compile(
    r"\\(?:frac|sqrt|pi|infty|cup|cap|log|ln|exp|(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|binom|emptyset)"
    r"|[\^√π∞∛]|sqrt|cbrt"
)


def canonical(text: str) -> str:
    """One spelling of an expression: without spaces, multiplication signs or one-token braces."""
    return _CANONICAL.sub(lambda match: match[1] or "", to_latex(text))


def to_latex(text: str) -> str:
    """Plain notation such as sqrt(2)*pi/3^(x+1) as LaTeX; LaTeX stays."""
    text = plain_latex(unwrap(text))
    for pattern, replacement in _PLAIN:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def looks_mathematical(text: str) -> bool:
    """Whether a key is an expression: LaTeX, powers, roots, or letters and digits with operators.

    Ranges, ratios and dates (`10-15`, `3:4`, `1/2/2024`) are not.
    """
    if has_words(text) or len(text) > MAX_EXPRESSION_CHARS:
        return False
    if _MATH_MARKS.search(text) or _ENVIRONMENT.search(text):
        return True
    # A chemical formula, or the letters of points.
    if _FORMULA.fullmatch(text):
        return False
    if re.fullmatch(r"-?[0-9A-Fa-f]+_\{?[0-9]{1,2}\}?", text):
        return True
    has_letter = re.search(r"(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z])|[0-9][a-zA-Z](?![a-zA-Z])", text)
    return bool(has_letter and re.search(r"[-+*/=<>^]|\\[a-z]+|[0-9][a-zA-Z]", text))


def has_words(text: str) -> bool:
    """Whether it holds words that no formula has."""
    bare = _COMMANDS.sub(" ", _ENVIRONMENT.sub(" ", text))
    return any(word.lower() not in _FUNCTIONS for word in _WORD.findall(bare) if not word.isupper())


def same_formula(got: str, wanted: str) -> bool:
    """Whether two texts are one chemical formula: H2O, H_2O, H_{2}O; Na+, Na^+."""
    got, wanted = (_FORMULA_MARKS.sub("", text) for text in (got, wanted))
    return got == wanted and bool(_SUBSTANCE.fullmatch(wanted))


def wants_evaluation(text: str) -> bool:
    """Whether a number is written with roots, powers, pi or functions."""
    return bool(_MATH_MARKS.search(text))


def why_not_parsed(text: str) -> str:
    """Why an expression is not given to the parser, or "": it bounds what a parse may cost."""
    if len(text) > MAX_EXPRESSION_CHARS:
        return "too long an expression"
    if depth(text) > _MAX_DEPTH or text.count("^") > 20:
        return "too deep an expression"
    if text.count("{") != text.count("}"):
        return "an open brace"
    if _HUGE.search(text.replace("**", "^")):
        return "too large a number"
    if has_words(text):
        return "words, not an expression"
    return ""


def unread_marks(text: str) -> list[str]:
    """Primes, transposes and dots, behind an `=` if there is one: the parser passes over them."""
    return _UNREAD.findall(text.rpartition("=")[2].replace("\\prime", "'"))


def split_tuple(text: str) -> Tuple | None:
    """Brackets and parts of `(1, 2)` or `[0, 1)`; None where no such pair encloses all."""
    text = text.strip()
    if len(text) < 3 or text[0] not in "([" or text[-1] not in ")]":
        return None
    # The first bracket closes with the last character and not before.
    found = levels(text)
    encloses = 0 in found and found.index(0) == len(text) - 1
    parts = split_top(text[1:-1])
    return (text[0], parts, text[-1]) if len(parts) > 1 and encloses else None


def split_set(text: str) -> list[str]:
    """The elements of {1, 2}, of `1, 2 and 3`, of `x = 1 or x = 2`, of ±3."""
    text = plain_latex(unwrap(text)).replace("\\{", "{").replace("\\}", "}")
    text = re.sub(r"^[A-Za-z]\s*(?:=|\\in|∈)\s*(?=\{)", "", text)
    text = re.sub(r"^\([^()=]*\)\s*(?:=|\\in|∈)\s*(?=\(|\{)", "", text)
    if text.startswith("{") and closing_brace(text, 0) == len(text) - 1:
        text = text[1:-1]
    text = re.sub(r",?\s+(?:and|or)\s+|\s*&\s*", ", ", text)
    parts = [part for part in split_top(text) if part]
    elements = []
    for part in parts:
        if "±" in part:
            elements += [part.replace("±", "+", 1).lstrip("+ "), part.replace("±", "-", 1)]
        else:
            elements.append(part)
    return [re.sub(r"=\s*\+\s*", "= ", element) for element in elements]


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
_BELOW, _ABOVE = ("<", "\\leq"), (">", "\\geq")
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
    if joined := re.fullmatch(r"(.+?)\s+(?:and|\\land|\\wedge)\s+(.+)", text):
        one, other = (_of_chain(part, name) for part in joined.groups())
        if one is None or other is None or one[0] != other[0]:
            return None
        both = _intersection(one[1], other[1])
        return None if both is None else (one[0], [both])
    ends = [end.strip() for end in _RELATION.split(text)]
    relations = _RELATION.findall(text)
    places = [place for place, end in enumerate(ends) if re.fullmatch(name or "[a-zA-Z]", end)]
    if len(places) != 1 or not all(ends) or len(relations) not in (1, 2):
        return None
    variable = ends[places[0]]
    if any(re.search(rf"(?<![a-zA-Z\\]){variable}(?![a-zA-Z])", e) for e in ends if e != variable):
        return None
    if len(relations) == 1:
        relation = relations[0] if places == [0] else _FLIPPED[relations[0]]
        return variable, _half_lines(relation, ends[1 - places[0]])
    bounds = {_FLIPPED[relations[0]]: ends[0], relations[1]: ends[2]}
    low, high = (next((r for r in bounds if r in pair), "") for pair in (_ABOVE, _BELOW))
    if places != [1] or not low or not high:
        return None
    return variable, [Interval(bounds[low], low == "\\geq", bounds[high], high == "\\leq")]


def _half_lines(relation: str, end: str) -> list[Interval]:
    below = Interval(_LOWEST, False, end, relation == "\\leq")
    above = Interval(end, relation == "\\geq", _HIGHEST, False)
    return [line for line, own in ((below, _BELOW), (above, _ABOVE)) if relation in (*own, "\\neq")]


def _intersection(first: list[Interval], second: list[Interval]) -> Interval | None:
    """Of one half-line up and one down; others are not computed."""
    if len(first) != 1 or len(second) != 1:
        return None
    one, other = first[0], second[0]
    if one.low == _LOWEST:
        one, other = other, one
    if one.high != _HIGHEST or other.low != _LOWEST or _LOWEST in (one.low, other.high):
        return None
    return Interval(one.low, one.has_low, other.high, other.has_high)
