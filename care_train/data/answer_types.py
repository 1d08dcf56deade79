"""How a key should be compared, where that is plain to see; the verifier infers the rest.

The names are those of the verifier's answer types.
"""

import re
import unicodedata

CHOICE, NUMBER, RELAXED, MATH = "choice", "number", "relaxed", "math"
SET, LIST, YES_NO, TEXT = "set", "list", "yes_no", "text"

ANSWER_TYPES = (CHOICE, NUMBER, RELAXED, MATH, SET, LIST, YES_NO, TEXT)

_YES_NO = {"yes", "no", "true", "false"}
_NUMBER = re.compile(r"[-+]?[$€£]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?\s*(?:%|°)?")
_FRACTION = re.compile(r"[-+]?\d+\s*/\s*\d+")
_MATH = re.compile(r"\\[a-zA-Z]+|[\^=√π]|\d\s*[a-z]\b")
_WORDS = re.compile(r"[^\W\d_][\w'\u2019.-]*(?:[\s,&/-]+[^\W_][\w'\u2019.-]*)*")
_OPTION = re.compile(
    r"(?:^|\n|(?<=\s))\(?([A-J])[).:]\s*(\S[^\n]*?)(?=\s*(?:\n|$|\s\(?[A-J][).:]\s))"
)
_LETTER = re.compile(r"\(?([A-J])\)?\.?")
_YEAR = re.compile(r"(?:1[89]|20|21)\d\d")


def answer_type(answer: str, options: tuple[str, ...] = ()) -> str | None:
    """The type of a key, or None where it could be more than one.

    Args:
        answer: the key.
        options: the texts of a multiple-choice question, in the order of their letters.
    """
    text = unicodedata.normalize("NFKC", answer).strip().strip("$").strip()
    if options:
        letter = _LETTER.fullmatch(text)
        known = letter is not None and ord(letter[1]) - ord("A") < len(options)
        return CHOICE if known or text in options else None
    if text.lower() in _YES_NO:
        return YES_NO
    if any(char.isdigit() for char in text) and (
        _NUMBER.fullmatch(text) or _FRACTION.fullmatch(text)
    ):
        return NUMBER
    if text.startswith(("{", "\\{")) and text.endswith("}") and "," in text:
        return SET
    if _MATH.search(text):
        return MATH
    # A single letter may name an option, a point or a variable.
    return TEXT if len(text) > 1 and _WORDS.fullmatch(text) else None


def chart_answer_type(answer: str) -> str | None:
    """ChartQA's: its measure allows numbers 5 %, which no year should have."""
    kind = answer_type(answer)
    return RELAXED if kind == NUMBER and not _YEAR.fullmatch(answer.strip()) else kind


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
