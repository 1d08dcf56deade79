"""Text that others wrote (names, paths, model output) as Markdown that shows it to the letter."""

import re
from collections.abc import Sequence

from care_train.reporting.samples import printable


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
