"""Multiple choice, by a letter, a letter with the option's text or the text alone; yes or no."""

import re
from collections.abc import Callable, Sequence

from care_train.verifier.expressions import canonical, looks_mathematical
from care_train.verifier.notation import normalize, normalize_words, plain_latex, unfold_case
from care_train.verifier.numbers import same_number

_LETTER = re.compile(r"\(\s*([a-z])\s*\)|\[\s*([a-z])\s*\]|([a-z])[.):]?", re.IGNORECASE)
_LETTER_AND_TEXT = re.compile(
    r"(?:\(([A-Za-z])\)\s*|\[([A-Za-z])\]\s*|([A-Za-z])\)\s*"
    r"|([A-Z])\s*(?:[.:]\s+|:(?=[A-Za-z][a-z]))|([A-Z])\s+-\s+)(\S.*)",
    re.DOTALL,
)
# Where the options' texts are known, what follows a letter is compared: the mark between is free.
_LETTER_THEN_OPTION = re.compile(r"[(\[]?([A-Z])(?:\s*[)\].:,;=-]+\s*|\s+)(\S.*)", re.DOTALL)
_OPTION_THEN_LETTER = re.compile(r"(.*\S)\s*\(([A-J])\)\.?", re.DOTALL)
_REASON = re.compile(r"(?<=\w\w),? (?:because|since) .*", re.DOTALL | re.IGNORECASE)
_NAMED = re.compile(
    r"(?:option|choice|answer)\s+(?=[(\[]?[A-Za-z][)\].:]?(?:\s|$))|(?:选项?|选择|答案)\s*[:是为]?\s*",
    re.IGNORECASE,
)
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{\s*([^{}]*?)\s*\}")
# A full-width colon, stop, comma or bracket behind a letter has its space within.
_WIDE_STOP = re.compile("^(\\W*[A-Ja-j\uff21-\uff2a][\uff1a\uff0e\u3001\uff0c\uff09])(?=\\S)")
_AFTER = re.compile(r"\s*(?:选项|正确|是正确的?)$")
_EXPLAINED = re.compile(
    r"\(?([A-Z])\)?[,.]? (?:because|since|as|not|rather than) (\S.*)", re.DOTALL
)
# A second letter in the text after the first: a hedge between options.
_OTHER_LETTER = re.compile(
    r"(?:^|[\s,;|/&])(?:\([A-Z]\)|\[[A-Z]\]|[A-Z][).:](?=\s|$)|[a-j]:(?=\s))"
)
# Where no option's text is known, what in the text may take the letter back: another letter as an
# alternative or as the answer. A letter within the text (vitamin C, points A and C) is no choice.
_CHOOSES = re.compile(
    r"(?:\b(?:or|maybe|perhaps|possibly|option|choice|answer(?: is)?:?|then|also|both|either|else"
    r"|neither|even|and also)\s+|[;|/]\s*|\n\s*|\w\w,\s*(?=\S\W*$)"
    r"|(?<=[A-J]),\s*(?:and\s+)?)([A-J])(?=$|[\s.,;!?])"
    r"|\b([A-J]) (?:is|are|may|might|could|can|would|works?|too\b)",
)
_BOTH = re.compile(r"\b[Bb]oth ([A-J]) and ([A-J])\b")
"""An option's text as in `D. Both A and B`, no second choice, unless it names the chosen letter."""
_IS_DENIED = re.compile(r"\s(?:is|are|was)(?: (?:not|wrong|incorrect|false|too|impossible)\b|n't)")
_TAKES_BACK = re.compile(
    r"is (?:not|wrong|incorrect|false)\b|.*\b(?:not sure|unsure)\b|(?:if|unless) ", re.I
)

_LETTER_LIST = re.compile(r"[A-H]{2,}|[A-H](?:(?:[\s,;&\u3001]|and)+[A-H])+")

YES_NO = {"yes": True, "true": True, "no": False, "false": False}
# The word itself, or the word before its explanation.
_LEADING_WORD = re.compile(
    r"(?:yes|no|true|false)(?:$|[,.;:!]|\s+[-\u2013\u2014]\s|\s+(?:because|since)\s)"
)

SameExpression = Callable[[str, str], bool]


def same_yes_no(got: str, wanted: str) -> str:
    """Why an answer says the same yes or no; "" where it does not."""
    got, key = normalize(got), YES_NO.get(normalize(wanted))
    words = re.findall(r"[a-z']+", got)
    said = {YES_NO[word] for word in words if word in YES_NO}
    hedges = {"unknown", "maybe", "unless", "but", "or"} | ({"not"} if key else set())
    leads = _LEADING_WORD.match(got)
    return "the same" if leads and said == {key} and hedges.isdisjoint(words) else ""


def same_letters(got: str, wanted: str) -> bool:
    """Whether two texts are the same options by their letters: AC, A, C, A and C."""
    bare = [re.sub(r"\(([A-H])\)", r"\1", text).strip("()") for text in (got, wanted)]
    first, second = ("".join(re.findall("[A-H]", text)) for text in bare)
    in_order = "".join(sorted(set(first)))
    return first == second == in_order and all(map(_LETTER_LIST.fullmatch, bare))


def is_choice_key(key: str, options: Sequence[str]) -> bool:
    """Whether a key names an option: a letter among the options (A to J without any), or a text."""
    key = _TEXT.sub(r"\1", key)
    letter, text = split_choice(key)
    if options:
        return bool(_wanted_places(key, options))
    bare = bool(letter) and not text and key.strip(" ()[].:*")[:1].isupper()
    return "A" <= letter <= "J" and (bare or bool(text))


def split_choice(text: str) -> tuple[str, str]:
    """(letter, text after it); ("", text) without a letter, ("", "") where there are several."""
    text = _WIDE_STOP.sub(r"\1 ", _TEXT.sub(r"\1", text))
    text = unfold_case(text).strip().strip("*").strip()
    if named := _NAMED.match(text):
        text = text[named.end() :]
    text = _AFTER.sub("", text)
    stripped = text.rstrip(",; ").removesuffix(".") or text
    if match := _LETTER.fullmatch(stripped):
        return match[match.lastindex or 0].upper(), ""
    if match := _EXPLAINED.match(text):
        return (match[1], "") if not _contradicts(match[2], match[1]) else ("", "")
    if match := _LETTER_AND_TEXT.fullmatch(text):
        letter = next(group for group in match.groups()[:5] if group).upper()
        rest = match[6].strip().strip("*").strip()
        if _LETTER.fullmatch(rest.removesuffix(".")) or _OTHER_LETTER.search(rest):
            return "", ""
        return letter, rest
    return "", text


def same_choice(
    predicted: str, expected: str, options: Sequence[str], same_expression: SameExpression
) -> str:
    """Why an answer names the key's option, or ""; a letter with another option's text is wrong."""
    if options:
        return _same_option(predicted, expected, options, same_expression)
    wanted_letter, wanted_text = split_choice(expected)
    letter, text = split_choice(predicted)
    if letter and letter != wanted_letter:
        return ""
    if text and wanted_text:
        reason = "same choice" if letter else "the option's text"
        return reason if _same_text(text, wanted_text, same_expression) else ""
    if not letter or (not wanted_text and _contradicts(text, letter)):
        return ""
    return "same choice"


def _same_option(
    predicted: str, expected: str, options: Sequence[str], same_expression: SameExpression
) -> str:
    if trailing := _OPTION_THEN_LETTER.fullmatch(predicted.strip()):
        predicted = f"{trailing[2]}. {trailing[1]}"
    predicted = _REASON.sub("", predicted)
    wanted = _wanted_places(expected, options)
    letter, text = split_choice(predicted)
    places = _places_of(predicted, options)
    if not letter and not places:
        match = _LETTER_THEN_OPTION.fullmatch(plain_latex(predicted).strip("*"))
        if match and ord(match[1]) - 65 < len(options):
            letter, text = match[1], match[2]
    if letter and not (places and not text):
        place = ord(letter) - 65
        if place in wanted and (not text or _same_text(text, options[place], same_expression)):
            return "same choice"
        return ""
    if places:
        exact = [place for place in places if _is_same_spelling(predicted, options[place])]
        return "the option's text" if set(exact or places) <= set(wanted) else ""
    same = text and any(_same_text(text, options[place], same_expression) for place in wanted)
    return "the option's text" if same else ""


def _contradicts(text: str, letter: str) -> bool:
    """Whether what follows a letter, of which no option's text is known, unsays it."""
    text = _BOTH.sub(lambda both: both[0] if letter in both.groups() else "", text)
    chosen = {
        group
        for match in _CHOOSES.finditer(text)
        for place, group in enumerate(match.groups(), start=1)
        if group and not _IS_DENIED.match(text, match.end(place))
    }
    return bool(chosen - {letter} or _TAKES_BACK.match(text))


def _wanted_places(key: str, options: Sequence[str]) -> list[int]:
    """The options that a key means: as it is written, by its letter, or by its text.

    Options of the same text are all meant.
    """
    if found := [place for place, one in enumerate(options) if one.strip() == key.strip()]:
        return found
    letter = split_choice(key)[0]
    # An option's text may be a letter too: `B. Q`.
    match = None if letter else _LETTER_THEN_OPTION.fullmatch(key.strip())
    if match and match[2] in options[ord(match[1]) - 65 :][:1]:
        letter = match[1]
    if letter and ord(letter) - 65 < len(options):
        text = options[ord(letter) - 65]
        return [place for place, one in enumerate(options) if _is_same_spelling(one, text)]
    found = _places_of(key, options)
    same = [place for place in found if _is_same_spelling(key, options[place])]
    if same or len(found) == 1:
        return same or found
    return []


def _places_of(text: str, options: Sequence[str]) -> list[int]:
    return [place for place, option in enumerate(options) if _same_text(text, option)]


def _is_same_spelling(one: str, other: str) -> bool:
    return any(normalize(form(one)) == normalize(form(other)) for form in (str, plain_latex))


def _same_text(got: str, wanted: str, same_expression: SameExpression | None = None) -> bool:
    if _is_same_spelling(got, wanted):
        return True
    got, wanted = plain_latex(got), plain_latex(wanted)
    if canonical(got) == canonical(wanted):
        return True
    if (reason := same_number(got, wanted)) is not None:
        return bool(reason)
    words = normalize_words(wanted)
    if len(words) >= 3 and any(char.isalpha() for char in words) and normalize_words(got) == words:
        return True
    return (
        same_expression is not None
        and looks_mathematical(got)
        and looks_mathematical(wanted)
        and same_expression(got, wanted)
    )
