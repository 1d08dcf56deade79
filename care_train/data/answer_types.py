"""The types of answers, and what can be told of a row's before anything is verified.

The verifier infers the type of a key from the key and the options; a row says it where that would
be wrong.
"""

import re
from enum import StrEnum

_NUMBER = re.compile(r"[-+]?[$€£]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?\s*%?")
_YEAR = re.compile(r"(?:1[89]|20|21)\d\d")
_OPTION = re.compile(
    r"(?:^|\n|(?<=\s))\(?([A-J])[).:]\s*(\S[^\n]*?)(?=\s*(?:\n|$|\s\(?[A-J][).:]\s))"
)


class AnswerType(StrEnum):
    """How an answer is compared with its key; docs/verifier.md has examples of each."""

    CHOICE = "choice"
    """A letter, a letter with the option's text, or the text alone."""
    NUMBER = "number"
    """A number with or without unit, in any notation."""
    RELAXED = "relaxed"
    """ChartQA's measure: a number within 5 %, or else the same text."""
    MATH = "math"
    """An expression, equation, point or interval, compared symbolically."""
    SET = "set"
    """Several answers in any order."""
    LIST = "list"
    """Several answers in this order."""
    YES_NO = "yes_no"
    """Yes or no, true or false."""
    TEXT = "text"
    """Words."""


def chart_answer_type(answer: str) -> AnswerType | None:
    """ChartQA's: its measure allows numbers 5 %, which no year should have."""
    text = answer.strip()
    is_number = any(char.isdigit() for char in text) and _NUMBER.fullmatch(text)
    return AnswerType.RELAXED if is_number and not _YEAR.fullmatch(text) else None


def options_of(prompt: str) -> tuple[str, ...]:
    """The texts of the options a prompt lists as A, B, ...; () unless they are plain to see."""
    found = list(_OPTION.finditer(prompt))
    expected = [chr(ord("A") + place) for place in range(len(found))]
    if len(found) < 2 or [match[1] for match in found] != expected:
        return ()
    # Two initials in running text are no options; two in brackets or on lines of their own are.
    plain = len(found) > 2 or all(
        match[0].lstrip().startswith("(") or match.start() == 0 or match[0].startswith("\n")
        for match in found
    )
    return tuple(match[2].strip() for match in found) if plain else ()
