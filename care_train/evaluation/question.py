"""A benchmark's questions, and how multiple-choice answers and keys are read."""

import hashlib
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from care_train.data import ImageRef, Sample
from care_train.verifier import normalize
from care_train.verifier.notation import plain_latex, unwrap

Row = Mapping[str, Any]
ReadImages = Callable[[object], tuple[ImageRef, ...]]

_AROUND = " \n\t$*'\""

# What may stand before the answer itself: "The correct answer is", "Option".
_LEAD_IN = re.compile(
    r"(?:the )?(?:(?:correct|final|best|right) )?(?:answer|option|choice)(?: is)?:?\s+",
    re.IGNORECASE,
)
# "C. text", "(c) text", "C - text", "C text".
_LETTER_AND_TEXT = re.compile(
    r"[(\[{]?([A-Z])[\s)\]}.:,;\u3001\uff09\uff0e\uff1a-]*(.+)", re.DOTALL | re.IGNORECASE
)
_BRACKETED = re.compile(r"(?<![\w^])[(\[{]([A-Z])[)\]}]")
_PUNCTUATED = re.compile(r"([A-Z])[.:)](?:\s|$)")
# No unit after a number ("3 A"), no exponent, and no word: "A hexagon", "I am", "I'm".
_ALONE = re.compile(
    r"(?<![\w'\u2019°^\\{])(?<!\d )([A-Z])(?![\w'\u2019])"
    r"(?!(?<=[AI])\s+(?!(?:is|and|or|as|because|since)\b)[a-z])"
)


@dataclass(frozen=True)
class Question:
    """What is asked, and what the answer is compared with."""

    sample: Sample
    """Prompt, images and key; its columns say how the verifier compares a free-form answer."""
    options: tuple[str, ...] = ()
    """The texts of a multiple-choice question, in the order of their letters."""
    right: frozenset[int] = frozenset()
    """Places of the options that the key names; empty where the question is free-form."""
    keys: tuple[str, ...] = ()
    """Keys of a free-form question, any of which is right; none: the sample's answer."""
    kind: str = ""
    """The benchmark's own word for the answer's form, such as `integer`."""
    precision: int | None = None
    """Decimals an answer is rounded to."""
    group: str = ""
    """The part of the benchmark it is reported under, such as a subject."""
    problem: str = ""
    """What the versions of one problem share, whose answers go together; none: it is the only one.
    """
    is_odd: bool = False
    """Whether it is multiple choice and its key names none of its options."""


def choose_option(predicted: str, question: Question) -> int | None:
    """The place of the option that an answer names; None where it names none.

    MMMU's rule (eval_utils.py: parse_multi_choice_response) on the answer span: letters in
    brackets, then letters alone, then option texts within the answer; of several the last. What
    differs: an answer that is one option's text as a whole, or a letter and that option's text, is
    that option whatever capitals the text holds ("A triangle", "F. 3 A"); "A" and "I" are no
    letters where they are words ("A hexagon", "I'm unable"), and no option is found within a word;
    an answer that names no option is wrong, where theirs draws an option at random.
    """
    texts = [_plain(option) for option in question.options]
    allowed = letters(len(texts))
    whole = _plain(predicted)
    same = [i for i, text in enumerate(texts) if text == whole and not _is_letter(text)]
    if len(same) == 1:
        return same[0]
    text = unwrap(predicted).strip(_AROUND)
    if lead_in := _LEAD_IN.match(text):
        text = text[lead_in.end() :]
    both = _LETTER_AND_TEXT.match(text)
    place = allowed.find(both[1].upper()) if both else -1
    if both and place >= 0 and texts[place] == _plain(both[2]):
        return place
    text = plain_latex(text)
    single = text.strip("()[]{}.:").upper()
    found = [
        *_BRACKETED.findall(text)[-1:],
        *([match[1]] if (match := _PUNCTUATED.match(text)) else []),
        *_ALONE.findall(text)[-1:],
        *([single] if len(single) == 1 else []),
    ]
    named = [letter for letter in found if letter in allowed]
    return allowed.index(named[0]) if named else _last_within(whole, texts)


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's rows are published, and how they are read and scored."""

    name: str
    title: str
    """As Table 1 heads its column."""
    dataset: str
    """Its id on the Hugging Face Hub."""
    split: str
    columns: Mapping[str, str]
    """What `check_row` holds every row to."""
    to_question: Callable[[Row, str, ReadImages], Question]
    """From a checked row, its location, and what reads the images of a column's value."""
    matches: Callable[[str, Question], bool]
    """Whether a free-form answer is right by the authors' exact match. Others are the verifier's.
    Like `choose`, it is given the text of an answer span: untrusted, but neither blank nor long."""
    choose: Callable[[str, Question], int | None] = choose_option
    """The place of the option that an answer names, if any."""
    subsets: tuple[str, ...] = ()
    """Configurations to read; none: the only one, or all."""


@dataclass(frozen=True)
class QuestionSet:
    """The questions of a benchmark, or of `eval.data`, read one at a time by their place."""

    name: str
    source: str
    """Where the rows are from."""
    ids: tuple[str, ...]
    digests: tuple[str, ...]
    """Of each question's words, images and key: what a record of its answer was made from."""
    read: Callable[[int], Question]
    benchmark: Benchmark | None
    """Whose rule says what is right; None: the run's own verifier and rewards."""
    num_odd_keys: int = 0
    """Multiple-choice questions whose key names none of their options: only a judge finds an answer
    to them right."""

    @property
    def digest(self) -> str:
        """Of all questions: evaluations with the same one asked the same."""
        return hashlib.blake2b("".join(self.digests).encode(), digest_size=8).hexdigest()


def right_options(key: str, options: Sequence[str]) -> frozenset[int]:
    """Places of the options that a key names by its letter, such as "B" or "(B)", or by its text.

    Empty where it names none; several where options share the text.
    """
    letter = key.strip(_AROUND + "()[].").upper()
    if len(letter) == 1 and letter in letters(len(options)):
        return frozenset([letters(len(options)).index(letter)])
    texts = [_plain(option) for option in options]
    return frozenset(i for i, text in enumerate(texts) if text and text == _plain(key))


def lettered_options(keys: Sequence[str], options: Sequence[str], location: str) -> frozenset[int]:
    """The `right_options` of published keys, each of which must name one.

    Raises:
        ValueError: one names none.
    """
    right = [right_options(key, options) for key in keys]
    if all(right):
        return frozenset().union(*right)
    raise ValueError(
        f"{location}: column 'answer': got {keys[right.index(frozenset())]!r}, wanted the letter "
        f"of one of {len(options)} options"
    )


def letters(count: int) -> str:
    """The letters of so many options."""
    return string.ascii_uppercase[:count]


def list_options(options: Sequence[str]) -> str:
    """Options a line each, such as `(A) red`."""
    pairs = zip(letters(len(options)), options, strict=True)
    return "\n".join(f"({letter}) {text}" for letter, text in pairs)


def _plain(text: str) -> str:
    return normalize(unwrap(text).strip(_AROUND).rstrip(".,!?;: "))


def _is_letter(text: str) -> bool:
    return len(text) == 1 and text.isalpha()


def _last_within(answer: str, texts: Sequence[str]) -> int | None:
    """The option whose text ends last in an answer; the longest of those that end there."""
    ends = []
    for place, text in enumerate(texts):
        if text and not _is_letter(text):
            found = re.finditer(rf"(?<![\w.-]){re.escape(text)}(?!\w|[.,]\d)", answer)
            ends += [(match.end(), len(text), place) for match in found]
    return max(ends)[2] if ends else None
