"""Text and LaTeX with what does not change an answer taken away."""

import re
import unicodedata
from functools import lru_cache
from itertools import accumulate, pairwise

from care_train.verifier.numbers import COUNTS

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
# Marks with one meaning that NFKC leaves apart: dashes, CJK stops, the fraction slash; and what
# cannot be seen: zero width, direction, soft hyphen.
_SAME_MARKS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-")
    | dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad", "")
    | {"。": ".", "、": ",", "\N{FRACTION SLASH}": "/"}
)
_THOUSANDS = re.compile(
    r"(?<=[0-9])(?:\{,\}|,\\!|\\[,!]|[\u2009\u202f\u00a0\u2007])(?=[0-9]{3}(?![0-9]))"
)

# What may stand before an answer without changing it.
_LEAD = re.compile(r"(?:so|thus|therefore|hence|then|and so|finally)(?:,\s*|:\s*|\s+)(?=\S)", re.I)
_PHRASE = re.compile(
    r"(?:it is |it's )(?=\S)|(?:the |my )?(?:final |correct |right )?"
    r"(?:answer|ans|option|choice)(?: is|:|=)+\s*:?\s*(?=\S)|#{2,4}\s+(?=\S)"
    r"|\*\*(?:the )?(?:final )?answer(?:\*\*:|:\*\*)\s*(?=\S)"
    r"|(?:正确)?(?:答案|选项)(?:是|为|:|\uff1a)+\s*(?=\S)",
    re.IGNORECASE,
)
_AFTERTHOUGHT = re.compile(
    r"(\S.*?) (?:is|are) (?:the |my )?(?:(?:final|correct|right|only) )*"
    r"(?:answer|choice|option|solution|result|correct|right)s?\s*[.!]*",
    re.IGNORECASE | re.DOTALL,
)
_STATEMENT = re.compile(
    r"(?:the|this|that|its|their|it|there|these|those|an?)\b([^.;:!?=<>0-9]{0,80}?)\s"
    r"(?:is|are|was|were|equals|measures|has|contains)(?: (?:equal to|exactly))?:?\s+(\S.*)",
    re.IGNORECASE | re.DOTALL,
)
_HEDGES = re.compile(
    r"\b(?:not|no|never|nor|or|either|neither|if|unless|but|except|maybe|perhaps|possibly|might|may"
    r"|could|would|should|than|instead|rather|wrong|incorrect|false|opposite|unsure|without|isn|aren"
    r"|other|another|double|twice|half|negative|inverse|reciprocal)\b",
    re.IGNORECASE,
)
_NAMED_TUPLE = re.compile(
    r"(?:the )?(?:points?|coordinates|vertex|center|interval|ordered pairs?|solutions?|vector)"
    r"(?: is| are)?\s*:?\s*(?=[(\[])|[A-Z]\s*(?=\([^()]*,[^()]*\)$)",
    re.IGNORECASE,
)

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))
_TEXT_COMMAND = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|up|normal)?|math(?:rm|bf|it|sf|tt)|mbox|operatorname\*?)\s*\{"
)
_DELIMITERS = re.compile(r"(?<!\\)\\[()\[\]]")
_SPAN = re.compile(r"\$([^$]+)\$(?![0-9])")
_CURRENCY = "\ue000"
_REWRITES = [
    (re.compile(r"(\\[a-zA-Z]+|\})\s+\{"), r"\1{"),
    (re.compile(r"\{\s+"), "{"),
    (re.compile(r"\s+\}"), "}"),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\frac\s*([0-9])\s*([0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*\{([^{}]*)\}\s*([0-9a-zA-Z])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*([0-9])\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"\\sqrt\s*([0-9]+|[a-z](?![a-z]))"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*\{"), r"\\sqrt{"),
    (re.compile(r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|limits)(?![a-zA-Z])"), ""),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])"), "°"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<!\\)\\(?:[,;:! ]|quad|qquad)(?![a-zA-Z])|~"), " "),
    (re.compile(r"\\(?:approx|sim|simeq)(?![a-zA-Z])"), "≈"),
    (re.compile(r"\\([%#&_])"), r"\1"),
    (re.compile(r"\\(?:le|leq|leqslant)(?![a-zA-Z])|≤|<="), r"\\leq "),
    (re.compile(r"\\(?:ge|geq|geqslant)(?![a-zA-Z])|≥|>="), r"\\geq "),
    (re.compile(r"\\langle(?![a-zA-Z])|^<(?=[^<>=]+,[^<>=]+>$)"), "("),
    (re.compile(r"\\rangle(?![a-zA-Z])|(?<=[^<>=])>$"), ")"),
    (re.compile(r"\\(?:lt)(?![a-zA-Z])"), "<"),
    (re.compile(r"\\(?:gt)(?![a-zA-Z])"), ">"),
    (re.compile(r"\\neq?(?![a-zA-Z])|≠|!="), r"\\neq "),
    (re.compile(r"\\(?:varnothing|emptyset)(?![a-zA-Z])|∅"), r"\\emptyset "),
    (re.compile(r"\\pm(?![a-zA-Z])|\+/-|\+-"), "±"),
    (re.compile(r"\\triangle(?![a-zA-Z])"), "△"),
    (re.compile(r"\s*(?:\\parallel(?![a-zA-Z])|∥)\s*"), " ∥ "),
    (re.compile(r"\s*(?:\\perp(?![a-zA-Z])|⊥)\s*"), " ⊥ "),
    (re.compile(r"(?<=[0-9a-zA-Z])\s*\(?base (?:\\?_?)([0-9]{1,2})\)?$"), r"_\1"),
    (re.compile(r"(?<=[a-zA-Z])\s+\^"), "^"),
    (re.compile(r"^([A-Za-z]) (?:equals|is equal to) (?=\S)"), r"\1 = "),
]
_UNUSUAL = re.compile(r"[^\w\s.,;:()\[\]'-]|√|base|equal")
_DOUBLE_BRACES = re.compile(r"\{\{([^{}]*)\}\}")
_VARIABLE = r"[A-Za-z\u0391-\u03c9](?:_?\{?[A-Za-z0-9]{1,3}\}?)?'?"
_LEFT_SIDE = re.compile(
    rf"({_VARIABLE}|[a-zA-Z]\s?\([a-z]\)|\\(?!angle|frac|sqrt|sin|cos|tan|log|ln)[a-z]{{2,7}}"
    r"|m?\s*(?:[∠△]|\\angle|\\triangle)\s*\w{1,4}|\|\s*[A-Z]{1,2}\s*\|"
    r"|\\(?:overline|overrightarrow|vec|hat|bar|widehat|wideparen)\s*\{?[A-Za-z]{1,3}\}?"
    rf"|\(\s*{_VARIABLE}(?:\s*,\s*{_VARIABLE})+\s*\)"
    r"|(?=[^=]*[A-Za-z]{3})(?:the )?[A-Za-z]+(?: [A-Za-z]+){0,6})\s*=\s*"
)


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


def tight(text: str) -> str:
    """`normalize` without the spaces beside a mark or bracket, which carry no meaning.

    A space stays between words, between a full stop and a digit ("3. 5"), and, outside brackets,
    where a comma and three digits without it would be thousands ("10, 200").
    """
    text = normalize(text)
    text = re.sub(r"(?<=[^\w\s.,]) +| +(?=[^\w\s])", "", text)
    text = re.sub(r"\. +(?![0-9])", ".", text)
    is_bracketed = any(bracket in text for bracket in "([{")
    return re.sub(r", +" if is_bracketed else r", +(?![0-9]{3}(?![0-9]))", ",", text)


def fold(text: str) -> str:
    """Lower case in compatibility form; exponents and fractions of one character spelled out."""
    return unfold_case(text).casefold()


def unfold_case(text: str) -> str:
    """`fold` with the case left alone."""
    text = _SUPERSCRIPT_RUN.sub(_exponent, text)
    text = _VULGAR.sub(lambda match: " " + unicodedata.normalize("NFKC", match[0]), text)
    return unicodedata.normalize("NFKC", text.translate(_SAME_MARKS)).translate(_SAME_MARKS)


def normalize_words(text: str) -> str:
    """As VQA compares: words only, articles and punctuation gone, counts as digits.

    Source: the VQA evaluation of Antol et al. (2015). A full stop or comma between digits stays.
    """
    text = fold(text)
    text = re.sub(r"(?<![0-9])[.,]|[.,](?![0-9])|[^\w\s.,%$°+/<>=^-]", "", text)
    text = re.sub(r"(?<=\w)-(?=[^\W\d])", " ", text)
    words = (COUNTS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def same_words(got: str, wanted: str) -> bool:
    """Whether two texts have the same words, and the same signs between them."""
    for sign, word in (("°", " degrees "), ("△", " triangle "), ("∠", " angle ")):
        got, wanted = got.replace(sign, word), wanted.replace(sign, word)
    got, wanted = (re.sub(r"\s*([-:/])\s*", r"\1", normalize(text)) for text in (got, wanted))
    if got == wanted:
        return True
    words, key = normalize_words(got), normalize_words(wanted)
    # Words alone would make AB ∥ CD of AB ⊥ CD.
    if _signs(got) != _signs(wanted) or len(key) < 2 or not any(map(str.isalpha, key)):
        return False
    joined = "-" in got + wanted and words.replace(" ", "") == key.replace(" ", "")
    return words == key or joined


def _signs(text: str) -> list[str]:
    """Of relations and operations."""
    return [c for c in text if unicodedata.category(c) in ("Sm", "So") and c not in "|®©™"]


def unwrap(text: str) -> str:
    """The answer itself: no `\\boxed{}`, math delimiters, emphasis, or "the answer is"."""
    text = text.strip()
    for _ in range(6):
        inner = _unwrap_once(text)
        if inner == text:
            break
        text = inner
    return text


def value_of_statement(text: str) -> str:
    """`5 cm` of `The length of AB is 5 cm.`; "" where the text is no such sentence, or hedges."""
    match = _STATEMENT.fullmatch(text)
    if match is None or _HEDGES.search(match[1]):
        return ""
    return unwrap(match[2].rstrip(" .") if not match[2].endswith("..") else match[2])


@lru_cache(maxsize=1024)
def plain_latex(text: str) -> str:
    """One spelling of LaTeX: \\frac{}{}, no \\left, thin spaces, delimiters or \\text; °, ±, ≈."""
    text = unfold_case(_without_delimiters(_THOUSANDS.sub("", text)))
    for _ in range(20):
        match = _TEXT_COMMAND.search(text)
        end = closing_brace(text, match.end() - 1) if match else -1
        if match is None or end < 0:
            break
        text = f"{text[: match.start()]} {text[match.end() : end]} {text[end + 1 :]}"
    # Most answers are a letter, a word or a plain number: no rule is about those.
    if _UNUSUAL.search(text):
        for pattern, replacement in _REWRITES:
            text = pattern.sub(replacement, text)
    while (inner := _DOUBLE_BRACES.sub(r"{\1}", text)) != text:
        text = inner
    text = " ".join(text.split())
    named = _NAMED_TUPLE.match(text)
    return text[named.end() :] if named else text


def split_equation(text: str) -> tuple[str, str]:
    """("x", "5") of `x = 5`, ("area", "12") of `Area = 12`; ("", text) without one such label.

    A label is a name of one quantity before the one `=`: a variable, an angle, words.
    """
    match = _LEFT_SIDE.match(text)
    if match and text.count("=") == 1 and text[match.end() :].strip():
        name = re.sub(r"[\s\\{}|]|overline|^m(?=∠|angle)", "", match[1])
        is_words = re.search(r"[A-Za-z]{3} |[A-Za-z]{5}", match[1]) and "\\" not in match[1]
        name = " ".join(match[1].casefold().removeprefix("the ").split()) if is_words else name
        return name, text[match.end() :].strip()
    return "", text


def may_be_one(name: str, other: str) -> bool:
    """Whether two labels may be of one quantity: `area` and `area of sector`, y and f(x)."""
    if name == other or not name or not other:
        return True
    words = [set(label.split()) for label in (name, other) if re.search(r"[a-z]{3}", label)]
    if words:
        return len(words) == 1 or words[0] <= words[1] or words[1] <= words[0]
    return all(re.fullmatch(r"y|[a-zA-Z]\(x\)", label) for label in (name, other))


def levels(text: str, opening: str = "([{", closing: str = ")]}") -> list[int]:
    """After each character, how many brackets are open."""
    return list(accumulate((char in opening) - (char in closing) for char in text))


def depth(text: str) -> int:
    """How deep brackets nest."""
    return max(levels(text), default=0)


def split_top(text: str, separators: str = ",;") -> list[str]:
    """Parts between separators outside all brackets, stripped."""
    places = enumerate(zip(text, levels(text), strict=True))
    cuts = [place for place, (char, level) in places if char in separators and level == 0]
    return [text[start + 1 : end].strip() for start, end in pairwise([-1, *cuts, len(text)])]


def closing_brace(text: str, opening: int) -> int:
    """Where the brace opened at `opening` closes, or -1."""
    open_braces = levels(text[opening:], "{", "}")
    return opening + open_braces.index(0) if 0 in open_braces else -1


def _unwrap_once(text: str) -> str:
    if (opened := _open_boxes(text)) != text:
        return opened
    for opening, closing in _WRAPPERS:
        inner = text[len(opening) : len(text) - len(closing)]
        whole = text.startswith(opening) and text.endswith(closing)
        if whole and inner.strip() and opening not in inner:
            return inner.strip()
    if match := _TEXT_COMMAND.match(text):
        end = closing_brace(text, match.end() - 1)
        if end == len(text) - 1:
            return text[match.end() : end].strip()
    if match := _LEAD.match(text) or _PHRASE.match(text):
        return text[match.end() :]
    if match := _AFTERTHOUGHT.fullmatch(text):
        return match[1]
    trimmed = text.rstrip(" .") if not text.endswith("..") else text
    return trimmed if trimmed and trimmed[-1] in "$)]}*" else text


def _open_boxes(text: str) -> str:
    """Each box's content in its place; prose before the only box goes, a hedge or a number stays.

    What follows a box stays: it may be a unit, or a second answer.
    """
    pieces, contents, end = [], [], 0
    for match in _BOX.finditer(text):
        close = closing_brace(text, match.end() - 1)
        if close < 0 or match.start() < end:
            continue
        between = text[end : match.start()]
        pieces.append(", " if contents and not between.strip(" $\n\t") else between)
        contents.append(text[match.end() : close].strip())
        pieces.append(contents[-1])
        end = close + 1
    if not contents:
        return text
    before = pieces[0].strip(" $*")
    is_prose = re.fullmatch(r"[^0-9=]*", before) and not re.search(r"\b[A-J]\b", before)
    if len(contents) == 1 and is_prose and not _HEDGES.search(before):
        pieces[0] = ""
        if contents[0] and text[end:].strip(" $*.\n") == "":
            return contents[0]
    return ("".join(pieces) + text[end:]).strip()


def _without_delimiters(text: str) -> str:
    """Without `$`, `\\(` and `\\[`; two formulas with nothing between them become a list."""
    text = _DELIMITERS.sub("$", text.replace("\\$", _CURRENCY))
    text = re.sub(r"\$\$(.+?)\$\$", r"$\1$", text, flags=re.DOTALL)
    text = re.sub(r"(?<=[^\s$])\$\s+\$(?=[^\s$])", "$, $", text)
    return _SPAN.sub(r" \1 ", text).replace(_CURRENCY, "$")


def _exponent(match: re.Match[str]) -> str:
    digits = match[0].removeprefix("⁻").translate(_SUPERSCRIPTS)
    return "^" + ("-" if match[0][0] == "⁻" else "") + digits
