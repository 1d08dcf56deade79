"""`geometry`: answers follow from the picture, slips are near misses, splits share no sheet."""

import re

import numpy as np
import pytest

from care_train.data import Sample, load_image
from care_train.data.geometry import KINDS, derive, geometry_sample

SHEET = ((3, 2), (1, 4), (2, 4))


def rows(count: int, split: str, number: int) -> list[Sample]:
    return [geometry_sample(count, split, row) for row in range(1, number + 1)]


@pytest.mark.parametrize(
    ("kind", "steps", "answer"),
    (
        ("total", "6 plus 4 is 10 . 10 plus 8 is 18", "18"),
        ("largest", "the largest is 8", "8"),
        ("smallest", "the smallest is 4", "4"),
        ("difference", "8 minus 4 is 4", "4"),
    ),
)
def test_derivations_by_hand(kind: str, steps: str, answer: str):
    """The rationale reads the sides, multiplies them and derives the answer."""
    products = "3 times 2 is 6 . 1 times 4 is 4 . 2 times 4 is 8"
    expected = f"i see 3 by 2 1 by 4 2 by 4 . {products} . {steps}", answer
    assert derive(kind, SHEET)[1:] == expected


@pytest.mark.parametrize("count", (2, 5))
def test_rows_hold_together(count: int):
    """Answer, rationale and columns agree; the slip misreads one side, and changes the answer."""
    for sample in rows(count, "test", 150):
        kind, sheet = sample.columns["kind"], sample.columns["rectangles"]
        assert derive(kind, sheet) == (sample.prompt, sample.rationale, sample.answer)
        assert sample.failed_rationale is not None and len(sheet) == count
        seen = re.findall(r"(\d) by (\d)", sample.failed_rationale)
        slip = [(int(width), int(height)) for width, height in seen]
        assert np.sum(np.array(slip) != np.array(sheet)) == 1
        failed = sample.failed_rationale, sample.columns["failed_answer"]
        assert derive(kind, slip)[1:] == failed and failed[1] != sample.answer


def test_pictures_show_the_rectangles():
    """Each tile's colored pixels span as many squares of 6 pixels as the columns say."""
    for sample in rows(3, "train", 60):
        picture = np.asarray(load_image(sample.images[0], location=sample.id)).astype(int)
        assert picture.shape == (28, 84, 3)
        is_grey = (np.ptp(picture, axis=2) == 0) & (picture[..., 0] > 100)  # paper and lines
        for tile, sides in enumerate(sample.columns["rectangles"]):
            painted = np.argwhere(~is_grey[:, 28 * tile : 28 * (tile + 1)])
            height, width = np.ptp(painted, axis=0) // 6
            assert [width, height] == sides


def test_splits_share_no_sheet_and_a_constant_answer_is_poor():
    """A test's sides are in no training row; the commonest answer is right in less than a third."""
    train, test = rows(2, "train", 1000), rows(2, "test", 1000)
    sheets = [{str(s.columns["rectangles"]) for s in samples} for samples in (train, test)]
    assert not sheets[0] & sheets[1] and len(sheets[1]) > 30
    answers: dict[str, list[str]] = {}
    for sample in test:
        answers.setdefault(sample.prompt, []).append(sample.answer)
    assert {sample.columns["kind"] for sample in test} == set(KINDS) and len(answers) == len(KINDS)
    best = sum(max(map(given.count, set(given))) for given in answers.values())
    assert best / len(test) < 0.33
