"""Sample completions, for people: what a record holds, and how its text is made safe to show."""

import unicodedata
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from care_train.reporting.files import JsonlWriter, read_jsonl

SAMPLES_FILE = "samples.jsonl"
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
    """Its part in the update: anchor | negative | reflected_success | ..., or eval."""


def append_sample(run_dir: Path, sample: SampleRecord) -> None:
    """Add `sample` to the run's samples.jsonl, its text as it is: readers bound and escape it."""
    with closing(JsonlWriter(run_dir / SAMPLES_FILE)) as writer:
        writer.write(asdict(sample))


def read_samples(path: Path) -> list[SampleRecord]:
    """The samples of a samples.jsonl; a cut last line is dropped, a missing file has none.

    Raises:
        ValueError: a line is bad; the message names file and line.
    """
    names = [field.name for field in fields(SampleRecord)]
    samples = []
    for number, record in enumerate(read_jsonl(path) if path.exists() else [], start=1):
        if missing := [name for name in names if name not in record]:
            raise ValueError(f"{path}:{number}: no {missing[0]!r}")
        samples.append(SampleRecord(**{name: record[name] for name in names}))
    return samples


def printable(text: str, max_chars: int, max_lines: int) -> str:
    """`text` as a terminal or a page may show it, no longer than asked for.

    Control characters go: model output could otherwise move the cursor or rewrite the screen.
    What is too long loses its middle, because a response's answer stands at its end.

    Args:
        text: untrusted text.
        max_chars: bound on its characters.
        max_lines: bound on its lines.
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
