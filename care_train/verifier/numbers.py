"""Numbers in any notation, exactly, with percent signs and units."""

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from care_train.verifier.units import Unit, parse_unit

RELATIVE_TOLERANCE = Fraction(1, 10**6)
"""How far a decimal number may lie from the key, relative to the key."""

CHARTQA_TOLERANCE = Fraction(1, 20)
"""ChartQA's relaxed accuracy (Masry et al., 2022; Methani et al., 2020)."""

_MAX_CHARS = 1100
_MAX_EXPONENT = 300

_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_INTEGER = r"[0-9]+"
_POWER = r"(?:\{([+-]?[0-9]{1,3})\}|([+-]?[0-9]{1,3}))"
_PREFIX = re.compile(r"([+-]?)\s*(us\$|[$€£¥])?\s*([+-]?)\s*")
"""Sign, currency and, where the first is no minus, another sign."""
_PATTERNS = [
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("mixed", rf"({_INTEGER})(?: +| ?and )({_INTEGER}) ?/ ?({_INTEGER})(?![0-9.])"),
        ("mixed", rf"({_INTEGER}) ?\\frac ?\{{ ?({_INTEGER}) ?\}} ?\{{ ?({_INTEGER}) ?\}}"),
        ("ratio", rf"\\frac ?\{{ ?(-?{_DECIMAL}) ?\}} ?\{{ ?({_DECIMAL}) ?\}}"),
        ("ratio", rf"({_DECIMAL}) ?/ ?({_DECIMAL})(?![0-9.])"),
        ("ratio", rf"\( ?({_DECIMAL}) ?/ ?({_DECIMAL}) ?\)"),
        ("ratio", rf"\( ?(-?{_DECIMAL}) ?\) ?/ ?\( ?({_DECIMAL}) ?\)"),
        ("power", rf"({_DECIMAL}) ?(?:\\times|\\cdot|\*|\u00d7|\u00b7|x) ?10 ?\^ ?{_POWER}"),
        ("power", rf"()10 ?\^ ?{_POWER}"),
        ("power", rf"({_DECIMAL})e{_POWER}"),
        ("plain", rf"({_DECIMAL})"),
    )
]
_VARIABLES = tuple("nkatvwj'\"")
_REMARK = re.compile(r" ?\(([a-z][a-z ]+|[mgslhv])\)$")
_ABOUT = re.compile(r"(?:≈|about |approximately |around |roughly |approx\.? )\s*")
_SCALE = re.compile(r"(hundred|thousand|million|billion|trillion|mn|bn)s?(?![a-z])")
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "mn": 10**6}
_SCALES |= {"billion": 10**9, "bn": 10**9, "trillion": 10**12}
_AFTER_UNIT = re.compile(
    r"(?<=\w) (?:(?:in|on|at|from|inside|under) (?:the|this|that|each|his|her|their)"
    r"(?: [a-z]{3,}){1,2}|long|tall|high|wide|deep|thick|old|away|apart|each|left|(?:in )?total"
    r"|altogether)$"
)
_PERCENT = re.compile(r"(?:%|percent(?:age)?(?: points?)?|per cent)(?![a-z])\.?")

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORD_VALUES = {word: value for value, word in enumerate(_SMALL)} | {
    word: 10 * place for place, word in enumerate(_TENS, start=2)
}
_WORD_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "eighth": 8}
_WORD_PARTS |= {"tenth": 10}
_WORD = re.compile(r"[a-z]+")

COUNTS = {word: str(value) for word, value in _WORD_VALUES.items() if value <= 20}
"""Digits of the words that VQA's and our own comparison of texts read as numbers."""


@dataclass(frozen=True)
class Quantity:
    """A number with what stood around it."""

    value: Fraction
    decimals: int | None = None
    """Digits after the point of a plain decimal, else None."""
    significant: int = 0
    """Digits of a plain number, leading zeros left out."""
    percent: bool = False
    unit: Unit | None = None
    is_variable: bool = False
    """The unit may be none: a variable in 5n and 3t, a mark in 5'."""


def parse_quantity(text: str, *, is_key: bool = False) -> Quantity | None:
    """The one number that `text` is, or None.

    Reads 5, 1,234.5, -3/4, 1 1/2, 2.5e3, 1.2 × 10^3, 3 million, five, $5, 5 %, 5 cm and LaTeX of
    these, exactly. Arithmetic is not done: `2+3` is no number.

    Args:
        text: with LaTeX in plain form, untrusted.
        is_key: any words after it are its unit. In an answer they must be a unit that is known, or
            a plural such as `apples`: other words may unsay the number.
    """
    text = text.strip()
    if not text or len(text) > _MAX_CHARS:
        return None
    last, text = text[-1], _without_remark(text.casefold())
    text = _ABOUT.sub("", text, count=1) if _ABOUT.match(text) else text
    prefix = _PREFIX.match(text)
    assert prefix is not None
    first, currency, second = prefix.groups()
    text = text[prefix.end() :]
    if words := read_words(text):
        value = words[0] * (-1 if first == "-" else 1)
        return _with_tail(Quantity(value), words[1].strip(), "", is_key)
    if first == "-" and second:
        return None
    sign = -1 if "-" in (first, second) else 1
    for kind, pattern in _PATTERNS:
        match = pattern.match(text)
        if match is None:
            continue
        value = _value(kind, match)
        if value is None:
            return None
        decimals, significant = _digits(match[0]) if kind == "plain" else (None, 0)
        tail = text[match.end() :].strip()
        is_variable = tail == last and tail in _VARIABLES
        quantity = Quantity(sign * value, decimals, significant, is_variable=is_variable)
        return _with_tail(quantity, tail, currency or "", is_key)
    return None


def same_number(got: str, wanted: str, tolerance: Fraction | None = None) -> str | None:
    """`same_quantity` of an answer and its key; None where one of them is no number."""
    quantity, key = parse_quantity(got), parse_quantity(wanted, is_key=True)
    return same_quantity(quantity, key, tolerance) if quantity and key else None


def same_quantity(got: Quantity, wanted: Quantity, tolerance: Fraction | None) -> str:
    """Why `got` equals `wanted`, or "" where it does not.

    Whole numbers must be equal; decimals lie within the relative tolerance, or round to a key of at
    least one decimal and three digits. Percentages equal the same number without the sign, or over
    100. A unit may be missing on one side; two units must be worth the same.
    """
    value, key = got.value, wanted.value
    if got.unit is not None and wanted.unit is not None:
        if got.unit.dimensions != wanted.unit.dimensions:
            return ""
        if got.unit.worth != wanted.unit.worth:
            value *= got.unit.worth / wanted.unit.worth
            return "equal in another unit" if _close(value, key, tolerance) else ""
    elif got.is_variable or wanted.is_variable:
        return ""
    elif (got.percent and wanted.unit is not None) or (wanted.percent and got.unit is not None):
        return ""
    if _close(value, key, tolerance):
        return "equal numbers" if tolerance is None else f"within {float(tolerance):.3g} of the key"
    if _rounds_to(got, wanted):
        return "equal to the key's decimals"
    if got.percent == wanted.percent:
        return ""
    same = _close(value / 100, key, tolerance) if got.percent else _close(value, key / 100, None)
    return "equal percentages" if same else ""


def _without_remark(text: str) -> str:
    """Without words in brackets at the end, which repeat or explain: 5 (five)."""
    match = _REMARK.search(text)
    if match is None or match.start() == 0:
        return text
    repeated = read_words(match[1])
    if repeated is not None:
        said = parse_quantity(text[: match.start()])
        same = said is not None and said.value == repeated[0] and not repeated[1].strip()
        return text[: match.start()] if same else text
    hedged = not set(match[1].split()).isdisjoint(("or", "not", "maybe", "and", "but"))
    return text if hedged else text[: match.start()]


def _value(kind: str, match: re.Match[str]) -> Fraction | None:
    parts = [None if part is None else part.replace(",", "") for part in match.groups()]
    if kind == "plain":
        return Fraction(parts[0] or "0")
    if kind == "power":
        exponent = int(parts[1] or parts[2] or "0")
        if abs(exponent) > _MAX_EXPONENT:
            return None
        return Fraction(parts[0] or "1") * Fraction(10) ** exponent
    below = Fraction(parts[-1] or "0")
    if below == 0:
        return None
    above = Fraction(parts[-2] or "0") / below
    return Fraction(parts[0] or "0") + above if kind == "mixed" else above


def _digits(text: str) -> tuple[int | None, int]:
    whole, point, rest = text.replace(",", "").partition(".")
    return len(rest) if point else None, len((whole + rest).lstrip("0"))


def _with_tail(quantity: Quantity, tail: str, currency: str, is_key: bool) -> Quantity | None:
    if scale := _SCALE.match(tail):
        tail = tail[scale.end() :].strip()
        quantity = Quantity(quantity.value * _SCALES[scale[1]])
    if percent := _PERCENT.match(tail):
        tail = tail[percent.end() :].strip()
    unit = parse_unit(currency) if currency else None
    if tail.strip(" .)"):
        is_free = is_key or abs(quantity.value) == 1
        said = parse_unit(tail if unit else _AFTER_UNIT.sub("", tail), is_free=not unit and is_free)
        if said is None or (unit and said.dimensions != unit.dimensions):
            return None
        unit = unit or said
    return replace(quantity, percent=bool(percent), unit=unit)


def _close(value: Fraction, key: Fraction, tolerance: Fraction | None) -> bool:
    # Counts and large whole numbers are exact: a tolerance would accept 10000001 for 10000000.
    if tolerance is None and value.denominator == 1 and key.denominator == 1:
        return value == key
    if tolerance is None and key.denominator == 1:
        return abs(value - key) <= min(RELATIVE_TOLERANCE * abs(key), Fraction(1, 1000))
    return abs(value - key) <= (tolerance or RELATIVE_TOLERANCE) * abs(key)


def _rounds_to(got: Quantity, wanted: Quantity) -> bool:
    """The key is the finer answer, rounded: 3.14159 or 22/7 for a key of 3.14."""
    if (wanted.decimals or 0) < 1 or wanted.significant < 3 or got.percent != wanted.percent:
        return False
    finer = got.decimals is None or got.decimals > (wanted.decimals or 0)
    return finer and abs(got.value - wanted.value) <= Fraction(1, 2 * 10 ** (wanted.decimals or 0))


def read_words(text: str) -> tuple[Fraction, str] | None:
    """The value of the number words that begin a text in lower case, and what follows them.

    `five apples` is 5, `twenty-five` 25, `one half` 1/2; None where no number word begins it.
    """
    total = current = 0
    end = 0
    last = ""
    for match in _WORD.finditer(text):
        word, gap = match[0], text[end : match.start()]
        if gap not in ("", " ", "-") or (gap == "" and end):
            break
        is_ones = last in _TENS and 0 < _WORD_VALUES.get(word, 0) < 10
        if word in _WORD_VALUES and (is_ones or not last or last in _SCALES):
            current += _WORD_VALUES[word]
        elif word in _SCALES and end:
            current = current * _SCALES[word]
            if word != "hundred":
                total, current = total + current, 0
        elif end and word.removesuffix("s") in _WORD_PARTS and total + current < 20:
            part = _WORD_PARTS[word.removesuffix("s")]
            return Fraction(total + current, part), text[match.end() :]
        elif word == "and" and last in _SCALES:
            continue
        else:
            break
        end, last = match.end(), word
    return (Fraction(total + current), text[end:]) if end else None
