"""Text with what does not change an answer taken away: our own form, and the benchmarks'."""

import re
import unicodedata

# Only whole pairs are dropped: a lone quote is a prime, feet or inches.
_PAIRS = ('""', "''", "``", "\u201c\u201d", "\u2018\u2019", "«»", "**")

# Without `!`, which is a factorial after a number.
_FINAL_PUNCTUATION = ".,;: "

# An article goes only before a longer word: in "a b", `a` may be a choice.
_ARTICLE = re.compile(r"(?:a|an|the) (?=\w\w)")

# NFKC alone would turn 5² into 52, and 3½ into 31/2.
_SUPERSCRIPTS = str.maketrans({"⁰": "0", "¹": "1", "²": "2", "³": "3"}) | {
    ord("⁴") + i: str(4 + i) for i in range(6)
}
_SUPERSCRIPT_RUN = re.compile("⁻?[⁰¹²³⁴-⁹]+")
_VULGAR = re.compile("[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]")

_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
).split()
NUMBER_WORDS = {word: str(value) for value, word in enumerate(_WORDS)}
"""Counts written as words."""


def normalize(text: str) -> str:
    """Case, spacing, Unicode form, quotes, final `.,;:` and a leading article taken away.

    Never empty unless `text` is blank.
    """
    folded = fold(text)
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


def fold(text: str) -> str:
    """Lower case in compatibility form; exponents and fractions of one character spelled out."""
    return unfold_case(text).casefold()


def unfold_case(text: str) -> str:
    """`fold` with the case left alone."""
    text = _SUPERSCRIPT_RUN.sub(_exponent, text)
    text = _VULGAR.sub(lambda match: " " + unicodedata.normalize("NFKC", match[0]), text)
    text = unicodedata.normalize("NFKC", text)
    return text.replace("\N{MINUS SIGN}", "-").replace("\N{FRACTION SLASH}", "/")


def normalize_words(text: str) -> str:
    """As VQA compares: words only, articles and punctuation gone, counts as digits.

    Source: the VQA evaluation of Antol et al. (2015). A full stop or comma between digits stays.
    """
    text = fold(text)
    text = re.sub(r"(?<![0-9])[.,]|[.,](?![0-9])|[^\w\s.,%$°+/<>=^-]", "", text)
    text = re.sub(r"(?<=\w)-(?=[^\W\d])", " ", text)
    words = (NUMBER_WORDS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def normalize_mmmu(text: str) -> str:
    """As MMMU compares open answers: a number to two decimals, other text in lower case.

    Source: `normalize_str` of MMMU's eval_utils.py (Yue et al., 2024).
    """
    plain = text.strip()
    number = plain.replace(",", "")
    if re.fullmatch(r"[+-]?(?:[0-9]{1,300}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,2})?", number):
        return str(round(float(number), 2))
    return plain.lower()


def _exponent(match: re.Match[str]) -> str:
    digits = match[0].removeprefix("⁻").translate(_SUPERSCRIPTS)
    return "^" + ("-" if match[0][0] == "⁻" else "") + digits
