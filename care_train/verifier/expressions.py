"""Mathematical expressions as text: what is equal at sight, and what may be parsed at all."""

import re

from care_train.verifier.notation import closing_brace, depth, plain_latex, split_top, unwrap

MAX_EXPRESSION_CHARS = 400
"""Longer ones are not parsed symbolically."""

Tuple = tuple[str, list[str], str]
"""(bracket, parts, bracket) of `(1, 2)` or `[0, 1)`."""

_MAX_DEPTH = 10
"""Each further level of brackets costs the parser up to twice the time."""
_COMMANDS = re.compile(r"\\[a-zA-Z]+")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[a-z]{1,12}\}")
_FORMULA = re.compile(r"(?:[A-Z][a-z]?[0-9]{0,3}){2,}")
_WORD = re.compile(r"[A-Za-z]{3,}")
_FUNCTIONS = set(
    "sin cos tan cot sec csc arcsin arccos arctan asin acos atan sinh cosh tanh log ln exp sqrt "
    "cbrt frac max min lim gcd lcm mod alpha beta gamma delta theta lambda sigma omega pi phi inf "
    "infty infinity abs abc abcd binom det tr pmatrix bmatrix matrix vmatrix".split()
)
# Digits that would make an integer nobody can write down.
_HUGE = re.compile(
    r"[0-9]{60}|\^\s*\{?\s*[-(]?\s*[0-9]{4}|\^[^,;=+]{0,60}\^[^,;=+]{0,60}\^|[0-9]{4}\s*!|!\s*!"
    r"|\^\s*\{?[^,;=+}]{0,40}!|\^\s*\{?[^,;=+}]{0,40}\^\s*\{?\s*[0-9]{2}"
)
_FRACTION = r"(?<![\w.)}\]^/])([0-9]+)\s*/\s*([0-9]+)"
_PLAIN = [
    (re.compile(r"\*\*"), "^"),
    # A fraction of digits before a symbol is its coefficient.
    (re.compile(_FRACTION + r"(?=\s*(?:√|\\sqrt|sqrt|π|\\pi|pi(?![a-z])))"), r"\\frac{\1}{\2}"),
    (re.compile(_FRACTION + r"\s+(?=[a-zA-Z\\(])"), r"\\frac{\1}{\2} "),
    (re.compile(r"\(\s*([^()]{1,40})\)\s*/\s*\(([^()]{1,40})\)"), r"\\frac{\1}{\2}"),
    (re.compile(r"(?<![\\a-zA-Z])cbrt\s*\(([^()]*)\)|∛\(?([0-9a-zA-Z]+)\)?"), r"\\sqrt[3]{\1\2}"),
    (re.compile(r"√\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*([0-9.]+|[a-zA-Z])"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\a-zA-Z])sqrt\s*\{"), r"\\sqrt{"),
    (re.compile(r"(?<![\\a-zA-Z])sqrt\s*([0-9.]+)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\a-zA-Z])arc(sin|cos|tan)(?![a-zA-Z])"), r"\\arc\1 "),
    (re.compile(r"(?<![\\a-zA-Z])(sin|cos|tan|cot|sec|csc|log|ln|exp)(?![a-zA-Z])"), r"\\\1 "),
    (re.compile(r"(?<![\\a-zA-Z])(pi|theta|alpha|beta|gamma)(?![a-zA-Z])"), r"\\\1 "),
    (re.compile(r"(?<![\\a-zA-Z])(?:inf|infty|infinity)(?![a-zA-Z])|∞"), r"\\infty "),
    (re.compile(r"π"), r"\\pi "),
    (re.compile(r"\s*°"), r"^{\\circ}"),
    (re.compile(r"θ"), r"\\theta "),
    (re.compile(r"\^\(([^()]*)\)"), r"^{\1}"),
    (re.compile(r"\^(-?[0-9]+)"), r"^{\1}"),
    (re.compile(r"\u00b7|\u00d7|(?<=[0-9a-zA-Z)])\s*\*\s*(?=[0-9a-zA-Z(\\])"), r" \\cdot "),
    (re.compile(r"\u222a"), r"\\cup "),
]
_CANONICAL = re.compile(r"\s+|\\(?:cdot|times)(?![a-zA-Z])|(?<=[_^])\{([A-Za-z0-9])\}")
_MATH_MARKS = re.compile(
    r"\\(?:frac|sqrt|pi|infty|cup|cap|log|ln|exp|(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|binom|emptyset)"
    r"|[\^√π∞∛]|sqrt|cbrt"
)


def canonical(text: str) -> str:
    """One spelling of an expression: without spaces, multiplication signs or one-token braces."""
    return _CANONICAL.sub(lambda match: match[1] or "", to_latex(text))


def to_latex(text: str) -> str:
    """Plain notation such as sqrt(2)*pi/3^(x+1) as LaTeX; LaTeX stays."""
    text = plain_latex(unwrap(text))
    for pattern, replacement in _PLAIN:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def looks_mathematical(text: str) -> bool:
    """Whether a key is an expression: LaTeX, powers, roots, or letters and digits with operators.

    Ranges, ratios and dates (`10-15`, `3:4`, `1/2/2024`) are not.
    """
    if has_words(text) or len(text) > MAX_EXPRESSION_CHARS:
        return False
    if _MATH_MARKS.search(text) or _ENVIRONMENT.search(text):
        return True
    # A chemical formula, or the letters of points.
    if _FORMULA.fullmatch(text):
        return False
    if re.fullmatch(r"-?[0-9A-Fa-f]+_\{?[0-9]{1,2}\}?", text):
        return True
    has_letter = re.search(r"(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z])|[0-9][a-zA-Z](?![a-zA-Z])", text)
    return bool(has_letter and re.search(r"[-+*/=<>^]|\\[a-z]+|[0-9][a-zA-Z]", text))


def has_words(text: str) -> bool:
    """Whether it holds words that no formula has."""
    bare = _COMMANDS.sub(" ", _ENVIRONMENT.sub(" ", text))
    return any(word.lower() not in _FUNCTIONS for word in _WORD.findall(bare) if not word.isupper())


def wants_evaluation(text: str) -> bool:
    """Whether a number is written with roots, powers, pi or functions."""
    return bool(_MATH_MARKS.search(text))


def why_not_parsed(text: str) -> str:
    """Why an expression is not given to the parser, or "": it bounds what a parse may cost."""
    if len(text) > MAX_EXPRESSION_CHARS:
        return "too long an expression"
    if depth(text) > _MAX_DEPTH or text.count("^") > 20:
        return "too deep an expression"
    if text.count("{") != text.count("}"):
        return "an open brace"
    if _HUGE.search(text.replace("**", "^")):
        return "too large a number"
    if has_words(text):
        return "words, not an expression"
    return ""


def split_tuple(text: str) -> Tuple | None:
    """Brackets and parts of `(1, 2)` or `[0, 1)`; None where no such pair encloses all."""
    text = text.strip()
    if len(text) < 3 or text[0] not in "([" or text[-1] not in ")]":
        return None
    level = 0
    for place, char in enumerate(text):
        level += (char in "([{") - (char in ")]}")
        if level == 0 and place < len(text) - 1:
            return None
    parts = split_top(text[1:-1])
    return (text[0], parts, text[-1]) if len(parts) > 1 and level == 0 else None


def split_set(text: str) -> list[str]:
    """The elements of {1, 2}, of `1, 2 and 3`, of `x = 1 or x = 2`, of ±3."""
    text = plain_latex(unwrap(text)).replace("\\{", "{").replace("\\}", "}")
    text = re.sub(r"^[A-Za-z]\s*(?:=|\\in|∈)\s*(?=\{)", "", text)
    text = re.sub(r"^\([^()=]*\)\s*(?:=|\\in|∈)\s*(?=\(|\{)", "", text)
    if text.startswith("{") and closing_brace(text, 0) == len(text) - 1:
        text = text[1:-1]
    text = re.sub(r",?\s+(?:and|or)\s+|\s*&\s*", ", ", text)
    parts = [part for part in split_top(text) if part]
    elements = []
    for part in parts:
        if "±" in part:
            elements += [part.replace("±", "+", 1).lstrip("+ "), part.replace("±", "-", 1)]
        else:
            elements.append(part)
    return [re.sub(r"=\s*\+\s*", "= ", element) for element in elements]
