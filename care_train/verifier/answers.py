"""acc of Eq. 1: does an answer equal the key? Model output is untrusted, so nothing is evaluated.

Exact match after normalisation, then choice letters, then plain decimal numbers.
"""

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal

MAX_ANSWER_CHARS = 1024
"""An answer longer than this, and than twice its key, is wrong unread."""

RELATIVE_TOLERANCE = Decimal("1e-6")
"""How far a decimal number may lie from the key, relative to the key."""

# Only whole pairs are dropped: a lone quote is a prime, feet or inches.
_PAIRS = ('""', "''", "``", "\u201c\u201d", "\u2018\u2019", "«»", "**")

# Without `!`, which is a factorial after a number.
_FINAL_PUNCTUATION = ".,;: "

# An article goes only before a longer word: in "a b", `a` may be a choice.
_ARTICLE = re.compile(r"(?:a|an|the) (?=\w\w)")

_CHOICE = re.compile(r"\(([a-z])\)|\[([a-z])\]|([a-z])\)?")

_NUMBER = re.compile(r"([+-]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)) ?(%?)")


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and why."""

    accuracy: float
    """acc in [0, 1]."""
    reason: str
    """For people."""


def compare(predicted: str, expected: str) -> Verdict:
    """Compare an answer with its key.

    Equal are: texts that differ in case, spacing, Unicode form, surrounding quotes, a final
    `.,;:` or a leading article; one choice letter written as B, (B), [B], B. or B); whole numbers
    of the same value; and decimals within a relative 1e-6. Commas may group thousands. A percentage
    equals the same number without its sign, or that number over 100.

    Args:
        predicted: the text of the answer span, of any length.
        expected: the key, trusted.
    """
    if len(predicted) > max(MAX_ANSWER_CHARS, 2 * len(expected)):
        return Verdict(0.0, f"answer too long: {len(predicted)} characters")
    if not predicted.strip():
        return Verdict(0.0, "empty answer")
    got, wanted = normalize(predicted), normalize(expected)
    if got == wanted:
        return Verdict(1.0, "exact match")
    choice = _choice(wanted)
    if choice is not None and _choice(got) == choice:
        return Verdict(1.0, "same choice")
    if _same_number(got, wanted):
        return Verdict(1.0, "equal numbers")
    return Verdict(0.0, f"got {_shorten(predicted)}, wanted {_shorten(expected)}")


def normalize(text: str) -> str:
    """Text with what does not change an answer taken away; never empty unless `text` is blank."""
    folded = unicodedata.normalize("NFKC", text).casefold().replace("\N{MINUS SIGN}", "-")
    plain = " ".join(folded.split())
    bare = plain
    while True:
        inner = bare.strip().rstrip(_FINAL_PUNCTUATION)
        if len(inner) >= 2 and inner[0] + inner[-1] in _PAIRS:
            inner = inner[1:-1]
        if inner == bare:
            break
        bare = inner
    return _ARTICLE.sub("", bare, count=1) if _ARTICLE.match(bare) else bare or plain


def _choice(text: str) -> str | None:
    match = _CHOICE.fullmatch(text)
    return match[match.lastindex or 0] if match else None


def _same_number(got: str, wanted: str) -> bool:
    got_match, wanted_match = _NUMBER.fullmatch(got), _NUMBER.fullmatch(wanted)
    if got_match is None or wanted_match is None:
        return False
    value, key = _decimal(got_match[1]), _decimal(wanted_match[1])
    if _close(value, key):
        return True
    if got_match[2] == wanted_match[2]:
        return False
    return _close(value / 100, key) if got_match[2] else _close(value, key / 100)


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))


def _close(value: Decimal, key: Decimal) -> bool:
    # Counts and large whole numbers are exact: a tolerance would accept 10000001 for 10000000.
    if value == value.to_integral_value() and key == key.to_integral_value():
        return value == key
    return abs(value - key) <= RELATIVE_TOLERANCE * abs(key)


def _shorten(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:60] + "...")
