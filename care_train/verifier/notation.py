"""Notation taken off an answer: wrappers, phrases and LaTeX that does not change its meaning."""

import re

from care_train.verifier.normalize import unfold_case

_PHRASE = re.compile(
    r"(?:so |thus,? |therefore,? |hence,? )?(?:the |my )?(?:final |correct |right )?"
    r"(?:answer|option|choice)(?: is|:|=)+\s*:?\s*(?=\S)",
    re.IGNORECASE,
)
_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox)\s*\{")
_REWRITES = [
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|limits)(?![a-zA-Z])"), ""),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])"), "°"),
    (re.compile(r"\{,\}|(?<=[0-9])\\[,!](?=[0-9]{3})"), ","),
    (re.compile(r"\\(?:[,;:! ]|quad|qquad)(?![a-zA-Z])|~"), " "),
    (re.compile(r"\\(?:approx|sim|simeq)(?![a-zA-Z])"), "≈"),
    (re.compile(r"\\([%$#&_])"), r"\1"),
    (re.compile(r"\\(?:le|leq|leqslant)(?![a-zA-Z])|≤"), r"\\leq "),
    (re.compile(r"\\(?:ge|geq|geqslant)(?![a-zA-Z])|≥"), r"\\geq "),
    (re.compile(r"\\(?:pm)(?![a-zA-Z])"), "±"),
]
_LEFT_SIDE = re.compile(r"([A-Za-z](?:_?\{?[A-Za-z0-9]{1,3}\}?)?|\\[a-z]{2,7}|[∠△]\w{1,4})\s*=\s*")


def unwrap(text: str) -> str:
    """The answer itself: no `\\boxed{}`, math delimiters, emphasis, or "the answer is"."""
    text = text.strip()
    for _ in range(6):
        inner = _unwrap_once(text)
        if inner == text:
            break
        text = inner
    return text


def plain_latex(text: str) -> str:
    """One spelling of LaTeX: \\frac, no \\left, no thin spaces, °, ±, text without \\text."""
    text = unfold_case(text)
    text = _drop_commands(text, _TEXT_COMMAND)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def split_equation(text: str) -> tuple[str, str]:
    """("x", "5") of `x = 5`; ("", text) where there is no single name before one `=`."""
    match = _LEFT_SIDE.match(text)
    if match and text.count("=") == 1 and text[match.end() :].strip():
        return match[1], text[match.end() :].strip()
    return "", text


def split_top(text: str, separators: str = ",;") -> list[str]:
    """Parts between separators outside all brackets, stripped."""
    parts, depth, start = [], 0, 0
    for place, char in enumerate(text):
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char in separators and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    return [*parts, text[start:].strip()]


def closing_brace(text: str, opening: int) -> int:
    """Where the brace opened at `opening` closes, or -1."""
    depth = 0
    for place in range(opening, len(text)):
        if text[place] == "{":
            depth += 1
        elif text[place] == "}":
            depth -= 1
            if depth == 0:
                return place
    return -1


def depth(text: str) -> int:
    """How deep brackets nest."""
    deepest = level = 0
    for char in text:
        if char in "([{":
            level += 1
            deepest = max(deepest, level)
        elif char in ")]}":
            level -= 1
    return deepest


def _unwrap_once(text: str) -> str:
    for command in ("\\boxed", "\\fbox"):
        start = text.rfind(command + "{")
        if start >= 0:
            end = closing_brace(text, start + len(command))
            if end > 0:
                return text[start + len(command) + 1 : end].strip()
    for opening, closing in _WRAPPERS:
        inner = text[len(opening) : len(text) - len(closing)]
        whole = text.startswith(opening) and text.endswith(closing)
        if whole and inner.strip() and opening not in inner:
            return inner.strip()
    if match := _TEXT_COMMAND.match(text):
        end = closing_brace(text, match.end() - 1)
        if end == len(text) - 1:
            return text[match.end() : end].strip()
    if match := _PHRASE.match(text):
        return text[match.end() :]
    trimmed = text.rstrip(" .") if not text.endswith("..") else text
    return trimmed if trimmed and trimmed[-1] in "$)]}*" else text


def _drop_commands(text: str, pattern: re.Pattern[str]) -> str:
    for _ in range(20):
        match = pattern.search(text)
        if match is None:
            return text
        end = closing_brace(text, match.end() - 1)
        if end < 0:
            return text
        text = f"{text[: match.start()]} {text[match.end() : end]} {text[end + 1 :]}"
    return text
