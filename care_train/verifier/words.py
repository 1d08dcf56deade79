"""Answers in words: yes and no, and texts that differ in case, spacing and marks alone."""

import re
import unicodedata

from care_train.verifier.notation import normalize, normalize_words

YES_NO = {"yes": True, "true": True, "no": False, "false": False}
# The word itself, or the word before its explanation.
_LEADING_WORD = re.compile(
    r"(?:yes|no|true|false)(?:$|[,.;:!]|\s+[-\u2013\u2014]\s|\s+(?:because|since)\s)"
)


def same_yes_no(got: str, wanted: str) -> str:
    """Why an answer says the same yes or no; "" where it does not."""
    key = YES_NO.get(normalize(wanted))
    words = re.findall(r"[a-z']+", normalize(got))
    said = {YES_NO[word] for word in words if word in YES_NO}
    leads = _LEADING_WORD.match(normalize(got))
    hedges = {"unknown", "maybe", "unless", "but", "or"} | ({"not"} if key else set())
    return "the same" if leads and said == {key} and hedges.isdisjoint(words) else ""


def same_words(got: str, wanted: str) -> bool:
    """Whether two texts have the same words, and the same signs between them."""
    spelled = (_spell(text) for text in (got, wanted))
    got, wanted = (re.sub(r"\s*([-:/])\s*", r"\1", normalize(text)) for text in spelled)
    if got == wanted:
        return True
    words, key = normalize_words(got), normalize_words(wanted)
    # Words alone would make AB ∥ CD of AB ⊥ CD.
    if _signs(got) != _signs(wanted):
        return False
    if len(key) < 2 or not any(char.isalpha() for char in key):
        return False
    joined = "-" in got + wanted and words.replace(" ", "") == key.replace(" ", "")
    return words == key or joined


def _spell(text: str) -> str:
    for sign, word in (("°", " degrees "), ("△", " triangle "), ("∠", " angle ")):
        text = text.replace(sign, word)
    return text


def _signs(text: str) -> list[str]:
    """Of relations and operations."""
    return [c for c in text if unicodedata.category(c) in ("Sm", "So") and c not in "|®©™"]
