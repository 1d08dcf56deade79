"""Which step of an answer about `digits`, `charts` or `geometry` is the first wrong one.

A reward function by name, `care_train:verified_steps`: the example of what any process verifier can
say, and what `care.credit=steps` reads.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from care_train.data import RowError, charts, digits, geometry

_VALUE = re.compile(rf"\b(?:\d+|none|{'|'.join(charts.COLORS)})\b")
_READING = "i see"


def verified_steps(reward_inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each response the share of its steps before the first wrong one, and where that is.

    A step is a value that is read off the picture or derived: a number, a color, or that there is
    none. It is right where it is the value in that place of the derivation from what the picture
    shows; the wording does not count. In a repaired response the last reading is checked.

    Args:
        reward_inputs: a row's columns and its `response`, in EasyR1's form.

    Raises:
        RowError: a row of another source.
    """
    return [_verified(row["response"], _derivation(row)) for row in reward_inputs]


def _derivation(row: Mapping[str, Any]) -> str:
    """Rationale and answer that follow from what the picture shows."""
    if row["source"] == "digits":
        return " ".join(digits.derive(row["kind"], row["digits"])[1:])
    if row["source"] == "charts":
        question = charts.Question(*(row[name] for name in charts.Question._fields))
        bars = list(zip(row["colors"], row["heights"], strict=True))
        return " ".join(charts.derive(question, bars)[1:])
    if row["source"] == "geometry":
        return " ".join(geometry.derive(row["kind"], row["rectangles"])[1:])
    raise RowError(
        "source",
        f"verified_steps: got a row of source {row['source']!r}, wanted digits, charts or geometry",
    )


def _verified(response: str, derivation: str) -> dict[str, Any]:
    wanted = _VALUE.findall(derivation)
    start = max(response.rfind(_READING), 0)
    found = list(_VALUE.finditer(response, start))
    pairs = zip(found, wanted, strict=False)
    right = next((n for n, (step, value) in enumerate(pairs) if step[0] != value), len(wanted))
    right = min(right, len(found))
    # From the end of the last right step, so that nothing can stand unpunished in a value's place;
    # of a response that stops early, to its end.
    begin = found[right - 1].end() if right else start
    span = begin, found[right].end() if right < len(found) else len(response)
    is_right = right == len(found) == len(wanted) or span[0] == span[1]
    return {"score": right / len(wanted), "wrong_step": None if is_right else span}
