"""docs/verifier.md says what is true."""

import re
from pathlib import Path

import pytest

from care_train.verifier import AnswerType, infer_type, verify

DOCS = Path(__file__).parents[2] / "docs" / "verifier.md"
_CODE = re.compile(r"`([^`]+)`")
_DECLARED = {("set", "red, green"), ("list", "1, 2, 3"), ("relaxed", "100"), ("relaxed", "Germany")}


def _rows() -> list[tuple[str, str, tuple[str, ...], list[str], list[str]]]:
    rows = []
    for line in DOCS.read_text().splitlines():
        cells = line.strip("|").split("|")
        if line.startswith("| `") and len(cells) == 4:
            kind, keys, right, wrong = (_CODE.findall(cell) for cell in cells)
            rows.append((kind[0], keys[0], tuple(keys[1:]), right, wrong))
    return rows


ROWS = _rows()


def test_every_type_has_examples():
    """The table covers all types."""
    assert {row[0] for row in ROWS} == set(AnswerType)
    assert len(ROWS) > 25


@pytest.mark.parametrize(
    ("kind", "key", "options", "right", "wrong"), ROWS, ids=[f"{row[0]}-{row[1]}" for row in ROWS]
)
def test_table(kind: str, key: str, options: tuple[str, ...], right: list[str], wrong: list[str]):
    """Each example of the table gets the verdict of its column, and types are inferred as said."""
    assert right and wrong
    if (kind, key) not in _DECLARED:
        assert infer_type(key, options) == kind
    for answers, accuracy in ((right, 1.0), (wrong, 0.0)):
        for answer in answers:
            verdict = verify(answer, key, AnswerType(kind), options=options)
            assert verdict.accuracy == accuracy, (answer, verdict.reason)
            assert verdict.reason and not verdict.reason.startswith(("timeout", "crashed"))
