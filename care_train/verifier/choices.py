"""Multiple choice: a letter, a letter with the option's text, or the text alone."""

import re
from collections.abc import Sequence

from care_train.verifier.normalize import normalize, normalize_words
from care_train.verifier.notation import plain_latex
from care_train.verifier.numbers import parse_quantity, same_quantity

_LETTER = re.compile(r"\(([a-z])\)|\[([a-z])\]|([a-z])[.):]?", re.IGNORECASE)
_LETTER_AND_TEXT = re.compile(
    r"(?:\(([A-Za-z])\)\s*|\[([A-Za-z])\]\s*|([A-Za-z])\)\s*|([A-Z])\s*(?:[.:]\s+|:(?=[A-Za-z][a-z]))|([A-Z])\s+[-\u2013\u2014]\s+)(\S.*)",
    re.DOTALL,
)
_NAMED = re.compile(r"(?:option|choice|answer)\s+(?=[(\[]?[A-Za-z][)\].:]?(?:\s|$))", re.IGNORECASE)
_EXPLAINED = re.compile(r"\(?([A-Z])\)?[,.]? (?:because|since) (?!.*\b[A-Z]\b)", re.DOTALL)
# A second letter in the text after the first: a hedge between options.
_OTHER_LETTER = re.compile(
    r"(?:^|[\s,;|/&])(?:\([A-Z]\)|\[[A-Z]\]|[A-Z][).:](?=\s|$)|[a-j]:(?=\s))"
)
# Where no option's text is known, what in the text may take the letter back: another letter as an
# alternative or as the answer. A letter within the text (vitamin C, points A and C) is no choice.
_CHOOSES = re.compile(
    r"(?:\b(?:or|maybe|perhaps|possibly|option|choice|answer(?: is)?:?)\s+|[;|/]\s*|\n\s*"
    r"|\w\w,\s*(?=\S\W*$))([A-J])(?=$|[\s.,;!?])"
    r"|\b([A-J]) is (?:right|correct|true|the (?:\w+ )?(?:answer|option|choice)\b)",
)
_TAKES_BACK = re.compile(r"is (?:not|wrong|incorrect|false)\b|.*\b(?:not sure|unsure)\b")


def is_choice_key(key: str, options: Sequence[str]) -> bool:
    """Whether a key names an option: a letter among the options (A to J without any), or a text."""
    letter, text = split_choice(key)
    if options:
        by_letter = bool(letter) and "A" <= letter <= chr(64 + len(options))
        return by_letter or _option_of(key, options) is not None
    bare = bool(letter) and not text and key.strip(" ()[].:*")[:1].isupper()
    return "A" <= letter <= "J" and (bare or bool(text))


def split_choice(text: str) -> tuple[str, str]:
    """(letter, text after it); ("", text) without a letter, ("", "") where there are several."""
    text = text.strip().strip("*").strip()
    if named := _NAMED.match(text):
        text = text[named.end() :]
    stripped = text.rstrip(",; ").removesuffix(".") or text
    if match := _LETTER.fullmatch(stripped):
        return match[match.lastindex or 0].upper(), ""
    if match := _EXPLAINED.match(text):
        return match[1], ""
    if match := _LETTER_AND_TEXT.fullmatch(text):
        letter = next(group for group in match.groups()[:5] if group).upper()
        rest = match[6].strip().strip("*").strip()
        if _LETTER.fullmatch(rest.removesuffix(".")) or _OTHER_LETTER.search(rest):
            return "", ""
        return letter, rest
    return "", text


def same_choice(predicted: str, expected: str, options: Sequence[str]) -> tuple[float, str]:
    """Accuracy and reason; a letter whose text is another option's is wrong."""
    wanted_letter, wanted_text = split_choice(expected)
    letter, text = split_choice(predicted)
    if options:
        wanted = _place(wanted_letter, expected, options)
        wanted_text = options[wanted] if wanted is not None else wanted_text
        wanted_letter = chr(65 + wanted) if wanted is not None else wanted_letter
    if letter:
        if letter != wanted_letter:
            return 0.0, f"chose {letter}, wanted {wanted_letter or wanted_text}"
        if text and wanted_text and not _same_text(text, wanted_text):
            return 0.0, f"chose {letter} with another option's text"
        if not wanted_text and _contradicts(text, letter):
            return 0.0, f"chose {letter} and took it back or named another"
        return 1.0, "same choice"
    if text and wanted_text and _same_text(text, wanted_text):
        others = [option for option in options if option != wanted_text]
        exact = normalize(text) == normalize(wanted_text)
        if not exact and any(_same_text(text, option) for option in others):
            return 0.0, "the text of several options"
        return 1.0, "the option's text"
    return 0.0, "no single choice"


def _contradicts(text: str, letter: str) -> bool:
    """Whether what follows a letter, of which no option's text is known, unsays it."""
    chosen = {group for match in _CHOOSES.finditer(text) for group in match.groups() if group}
    return bool(chosen - {letter} or _TAKES_BACK.match(text))


def _place(letter: str, key: str, options: Sequence[str]) -> int | None:
    if letter and ord(letter) - 65 < len(options):
        return ord(letter) - 65
    return _option_of(key, options)


def _option_of(text: str, options: Sequence[str]) -> int | None:
    found = [place for place, option in enumerate(options) if _same_text(text, option)]
    return found[0] if len(found) == 1 else None


def _same_text(got: str, wanted: str) -> bool:
    if normalize(got) == normalize(wanted):
        return True
    quantity, key = parse_quantity(plain_latex(got)), parse_quantity(plain_latex(wanted))
    if quantity and key:
        return bool(same_quantity(quantity, key, None))
    words = normalize_words(wanted)
    return (
        len(words) >= 3 and any(char.isalpha() for char in words) and normalize_words(got) == words
    )
