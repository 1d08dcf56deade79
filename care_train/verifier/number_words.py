"""Numbers written in words."""

import re
from fractions import Fraction

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_VALUES = {word: value for value, word in enumerate(_SMALL)} | {
    word: 10 * place for place, word in enumerate(_TENS, start=2)
}
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "eighth": 8, "tenth": 10}
_WORD = re.compile(r"[a-z]+")

COUNTS = {word: str(value) for word, value in _VALUES.items() if value <= 20}
"""Digits of the words that VQA's and our own comparison of texts read as numbers."""


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
        if word in _VALUES and _may_follow(last, word):
            current += _VALUES[word]
        elif word in _SCALES and end:
            current = current * _SCALES[word]
            if word != "hundred":
                total, current = total + current, 0
        elif end and word.removesuffix("s") in _PARTS and total + current < 20:
            part = _PARTS[word.removesuffix("s")]
            return Fraction(total + current, part), text[match.end() :]
        elif word == "and" and last in _SCALES:
            continue
        else:
            break
        end, last = match.end(), word
    return (Fraction(total + current), text[end:]) if end else None


def _may_follow(last: str, word: str) -> bool:
    if not last or last in _SCALES:
        return True
    return last in _TENS and 0 < _VALUES[word] < 10
