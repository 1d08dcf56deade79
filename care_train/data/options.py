"""The options of a multiple-choice question in the forms that data sets have, and keys among them.

Functions that read a value raise a ValueError of what was got and wanted; the caller adds the row.
"""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import takewhile
from typing import Any

from care_train.data.columns import describe, is_empty, plain, spelled

_MAX_OPTIONS = 26

_LETTER_COLUMNS = [
    [name[:-1] + chr(ord(name[-1]) + place) for place in range(_MAX_OPTIONS)]
    for name in ("A", "option_a", "choice_a")
]
_LABEL_FIELDS, _TEXT_FIELDS = ("label", "letter", "key", "id"), ("text", "value", "content")

# ASCII and full-width brackets and stops, as in `(A) cat`, `[A] cat`, `A. cat`, `A: cat`.
_OPEN, _CLOSE, _STOP = r"[(\[\uff08\u3010]", r"[)\]\uff09\u3011]", r"[.):\uff0e\uff09\uff1a\u3001]"
_LETTERED = re.compile(
    rf"\s*(?:{_OPEN}\s*([A-Za-z])\s*{_CLOSE}|([A-Za-z])\s*{_STOP})\s*(\S.*)", re.DOTALL
)
_NUMBERED = re.compile(r"\s*(?:\((\d{1,2})\)|(\d{1,2})[.)])\s+(\S.*)", re.DOTALL)
# A key: `B`, `(B)`, `B.`, `option B`, each with or without the option's text after it.
_KEY = re.compile(
    r"(?:(?:the\s+)?(?:option|choice|answer)\s*(?:is)?[\s:]*)?"
    rf"(?:{_OPEN}\s*([A-Za-z])\s*{_CLOSE}[.:]?|([A-Za-z])(?:{_STOP}|(?=\s*$)))\s*(.*)",
    re.DOTALL | re.IGNORECASE,
)
_LETTERS = re.compile(r"\W*[A-Z](?:(?:\W|and)*[A-Z])+\W*")
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\{?(-?\d+)\}?\{?(\d+)\}?")
_IGNORED = re.compile(r"\s+|\$|\\(?:left|right|,|;|!)|\*\*|[.\u3002]$")

# In a prompt: `(A)`, `(a)`, `A.`; those with a bracket or a full-width mark need no space behind.
_MARK = r"(?:[(\uff08]\s?[A-Ja-j]\s?[)\uff09]|[A-J][).:\uff0e\uff1a\u3001])"
_OPTION = re.compile(
    rf"(?:^|\n|(?<=\s))({_MARK})\s*(\S[^\n]*?)"
    rf"(?=\s*(?:\n|$|\s{_MARK}(?:\s|(?<=[)\uff09\uff0e\uff1a\u3001]))))"
)


@dataclass(frozen=True)
class Options:
    """The options of a multiple-choice question, in the order of their letters."""

    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    """What the data set calls them, where it calls them anything: `A` or `1`, for example."""

    @property
    def last_letter(self) -> str:
        return chr(ord("A") + len(self.texts) - 1)


def read_options(value: object) -> Options:
    """Options as data sets write them.

    Args:
        value: a list of texts, whose letters may stand in front of each; `{"A": text, ...}` or
            `{"0": text, ...}`; `{"text": [...], "label": [...]}`; a list of `{"label", "text"}`;
            or a text that spells one of these as Python or JSON does, or lists `A. ... B. ...`.

    Raises:
        ValueError: anything else.
    """
    value = spelled(value)
    if isinstance(value, str):
        value = options_in(value).texts or value
    if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    if isinstance(value, Mapping):
        pairs = _pairs_of_mapping(value)
    elif isinstance(value, (list, tuple)):
        pairs = [_pair(entry) for entry in value]
    else:
        raise ValueError(f"got {describe(value)}, wanted a list of the options' texts")
    # Parquet fills up a struct's missing fields, and rows of fewer options, with nulls.
    while pairs and plain(pairs[-1][1]) is None:
        pairs.pop()
    texts = [_option_text(plain(text)) for _, text in pairs]
    if len(texts) > _MAX_OPTIONS:
        raise ValueError(f"got {len(texts)} options, wanted at most {_MAX_OPTIONS}")
    if all(label is None for label, _ in pairs):
        return _without_marks(texts)
    labels = [str(label).strip() for label, _ in pairs]
    from_zero, from_one = ([str(first + i) for i in range(len(labels))] for first in (0, 1))
    if [label.upper() for label in labels] not in (_letters(len(labels)), from_zero, from_one):
        raise ValueError(
            f"got options labelled {', '.join(labels)}, wanted A, B, ... or 0, 1, ... or 1, 2, ... "
            "without a gap"
        )
    return Options(_without_marks(texts).texts, tuple(labels))


def options_in(prompt: str) -> Options:
    """The options that a prompt lists as A, B, ...; none unless they are plain to see."""
    found = list(_OPTION.finditer(prompt))
    marked = "".join(char for match in found for char in match[1] if char.isalpha())
    wanted = "".join(_letters(len(found)))
    if len(found) < 2 or marked not in (wanted, wanted.lower()):
        return Options()
    # Two initials in running text are no options; two in brackets or on lines of their own are.
    plain = len(found) > 2 or all(
        match[1][0] in "(\uff08" or match.start() == 0 or match[0].startswith("\n")
        for match in found
    )
    return Options(tuple(match[2].strip() for match in found) if plain else ())


def letter_columns(row: Mapping[str, Any]) -> Options | None:
    """Options that have a column each, as VLMEvalKit's tables (`A`) and SEED-Bench (`choice_a`)."""
    for names in _LETTER_COLUMNS:
        if names[1] not in row:
            continue
        texts = list(takewhile(lambda text: not is_empty(text), map(row.get, names)))
        if len(texts) > 1 and all(isinstance(text, (str, int, float)) for text in texts):
            return Options(tuple(map(_option_text, texts)))
    return None


def option_key(answer: str, options: Options) -> str | None:
    """An answer that names an option, or several by letter; for a label such as `2` its letter.

    None for any other.
    """
    if answer.strip() in options.labels and not answer.strip().isalpha():
        return chr(ord("A") + options.labels.index(answer.strip()))
    if any(_same(answer, text) for text in options.texts):
        return answer
    unmarked = answer.strip().strip("*$ ").strip()
    if match := _KEY.fullmatch(unmarked):
        letter = (match[1] or match[2]).upper()
        text = match[3].strip()
        if "A" <= letter <= options.last_letter:
            named = options.texts[ord(letter) - ord("A")]
            return answer if not text or not named or _same(text, named) else None
    if _LETTERS.fullmatch(unmarked):
        letters = [char for char in unmarked.replace("and", "") if char.isalpha()]
        if len(set(letters)) == len(letters) and max(letters) <= options.last_letter:
            return answer
    return None


def _pairs_of_mapping(value: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """(label, text) of each option, by label."""
    texts, labels = value.get("text"), value.get("label")
    if isinstance(texts, (list, tuple)) and isinstance(labels, (list, tuple)):
        if len(texts) != len(labels):
            raise ValueError(f"got {len(texts)} texts and {len(labels)} labels, wanted as many")
        return list(zip(labels, texts, strict=True))
    pairs = [(str(label), text) for label, text in value.items() if plain(text) is not None]
    return sorted(pairs, key=lambda pair: (len(pair[0]), pair[0].upper()))


def _pair(entry: object) -> tuple[Any, Any]:
    if not isinstance(entry, Mapping):
        return None, entry
    label = next((entry[name] for name in _LABEL_FIELDS if name in entry), None)
    text = next((entry[name] for name in _TEXT_FIELDS if name in entry), None)
    if text is None:
        raise ValueError(
            f"got an option with {', '.join(map(str, entry)) or 'nothing'}, wanted label and text"
        )
    return label, text


def _option_text(value: object) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, (int, float, bool, Decimal)):
        return str(value)
    raise ValueError(f"got an option that is {describe(value)}, wanted text")


def _without_marks(texts: list[str]) -> Options:
    """Texts without the letter or number in front, where each has the one of its own place."""
    numbers = [str(place) for place in range(1, len(texts) + 1)]
    for pattern, wanted, labels in (
        (_LETTERED, _letters(len(texts)), []),
        (_NUMBERED, numbers if len(texts) > 1 else None, numbers),
    ):
        found = [match for match in map(pattern.fullmatch, texts) if match]
        if texts and [(match[1] or match[2]).upper() for match in found] == wanted:
            return Options(tuple(match[3].strip() for match in found), tuple(labels))
    return Options(tuple(texts))


def _letters(count: int) -> list[str]:
    return [chr(ord("A") + place) for place in range(count)]


def _same(one: str, other: str) -> bool:
    """Whether two texts differ in case, spacing, LaTeX's wrapping or a number's notation alone."""
    one, other = _folded(one), _folded(other)
    number = _number(one)
    return one == other or (number is not None and number == _number(other))


def _folded(text: str) -> str:
    text = _WRAPPED.sub(r"\1", unicodedata.normalize("NFKC", text))
    return _IGNORED.sub("", _IGNORED.sub("", text).casefold())


def _number(text: str) -> Fraction | None:
    text = _FRACTION.sub(r"\1/\2", text).replace(",", "")
    try:
        return Fraction(text) if len(text) <= 40 and "e" not in text else None
    except (ValueError, ZeroDivisionError):
        return None
