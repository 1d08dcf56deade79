"""Text that others wrote (names, paths, model output), made safe for a terminal and Markdown."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

_CUT = " […] "


@dataclass(frozen=True)
class SampleRecord:
    """One completion worth a look."""

    step: int
    prompt: str
    completion: str
    answer: str
    """The reference answer."""
    reward: float
    role: str
    """Its part in the update, as the archive calls it (docs/archive.md)."""


def printable(text: str, max_chars: int, max_lines: int) -> str:
    """`text` as a terminal or a page may show it, no longer than asked for.

    Control characters go: model output could otherwise move the cursor or rewrite the screen.
    What is too long loses its middle, because a response's answer stands at its end.
    """
    # The bound comes first so that a huge text costs no more than a small one.
    if len(text) > max_chars:
        head = (max_chars - len(_CUT)) // 2
        text = text[:head] + _CUT + text[head + len(_CUT) - max_chars :]
    text = "".join(_shown(character) for character in text)
    lines = text.split("\n")
    if len(lines) <= max_lines:
        return text
    head = max_lines // 2
    return "\n".join([*lines[:head], _CUT.strip(), *lines[len(lines) - (max_lines - head - 1) :]])


def _shown(character: str) -> str:
    if character in "\n\t" or not unicodedata.category(character).startswith("C"):
        return character
    return "\N{REPLACEMENT CHARACTER}"


def markdown_text(text: str) -> str:
    """`text` on one line, to the letter: no HTML, link, image, emphasis or code comes of it."""
    text = " ".join(printable(text, max_chars=2000, max_lines=100).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*|]|(?<=\])\()", r"\\\1", text)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Every cell as `markdown_text`, the first column to the left, the others to the right.

    Without rows there is no table: the text is empty.
    """
    if not rows:
        return ""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(markdown_text, line))} |" for line in lines)


def fenced(text: str, language: str) -> str:
    """A code block that no backticks in `text` can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
