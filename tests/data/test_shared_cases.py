"""Cases from public reports, beside the repository where they are kept; each was read wrongly once.

Every kind has tests of its own, with other values, in test_answers.py and test_files.py.
"""

import io
import json
from pathlib import Path

import pytest

from care_train.config import Config, DataSettings
from care_train.data import load_samples
from care_train.verifier.command import verify_lines

CASES = Path(__file__).parents[3] / "shared" / "cases" / "inputs"

pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not here")


def verdicts(case: str) -> list[float]:
    [path] = CASES.glob(f"{case}-*/in.jsonl")
    target = io.StringIO()
    verify_lines(Config(), io.StringIO(path.read_text()), target)
    return [json.loads(line)["acc"] for line in target.getvalue().splitlines()]


def test_options_with_letters():
    """All four forms of the right answer are right."""
    assert set(verdicts("03")) == {1.0}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("07-*/rows.jsonl", "row 38: answer_type: got 'numeric', wanted one of"),
        ("17-*/1.jsonl", "the columns 'query', 'response', wanted"),
        ("17-*/2.jsonl", "the columns 'prompt', 'label', wanted"),
        ("17-*/3.jsonl", "with an <answer> span"),
        ("17-*/4.jsonl", "prompt: got nothing in 'prompt', and the columns"),
    ],
)
def test_bad_rows_are_named_before_the_first_step(name: str, message: str):
    """With the columns there are, and the names that are read."""
    [path] = CASES.glob(name)
    with pytest.raises(ValueError) as error:
        load_samples(DataSettings(path=str(path)))
    assert message in str(error.value)


def test_a_key_that_is_no_option():
    """An index into the options' list is refused."""
    with pytest.raises(ValueError, match="none of the 4 texts in options"):
        verdicts("05")
