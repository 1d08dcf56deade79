"""`digits`: answers follow from the image, slips are near misses, splits share nothing."""

import io
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from care_train.data import Sample
from care_train.data.digits import KINDS, derive, digits_sample


def rows(length: int, split: str, count: int) -> list[Sample]:
    return [digits_sample(length, split, row) for row in range(1, count + 1)]


@pytest.mark.parametrize(
    ("kind", "digits", "rationale", "answer"),
    (
        ("sum", (4, 0, 7), "i see 4 0 7 . 4 plus 0 is 4 . 4 plus 7 is 11", "11"),
        ("largest", (3, 9, 9), "i see 3 9 9 . the largest is 9", "9"),
        ("smallest", (3, 0), "i see 3 0 . the smallest is 0", "0"),
        ("difference", (8, 2, 5), "i see 8 2 5 . 8 minus 2 is 6", "6"),
        ("even", (1, 3), "i see 1 3 . even ones : none . that makes 0", "0"),
    ),
)
def test_derivations_by_hand(kind: str, digits: tuple[int, ...], rationale: str, answer: str):
    """The rationale reads the strip, then derives the answer."""
    assert derive(kind, digits)[1:] == (rationale, answer)


@pytest.mark.parametrize("length", (2, 4, 6))
def test_rows_hold_together(length: int):
    """Answer, rationale, columns and image agree; the slip changes one digit, and the answer."""
    for sample in rows(length, "test", 300):
        digits, kind = sample.columns["digits"], sample.columns["kind"]
        assert derive(kind, digits) == (sample.prompt, sample.rationale, sample.answer)
        assert sample.failed_rationale is not None
        reading = re.match(r"i see ([\d ]+?)(?: \.|$)", sample.failed_rationale)
        assert reading is not None
        seen = [int(digit) for digit in reading[1].split()]
        assert sum(a != b for a, b in zip(seen, digits, strict=True)) == 1
        assert derive(kind, seen)[1:] == (sample.failed_rationale, sample.columns["failed_answer"])
        assert sample.columns["failed_answer"] != sample.answer
        image = Image.open(io.BytesIO(sample.images[0]))
        assert image.size == (28 * length, 28)


def test_images_show_the_digits():
    """Each tile is an image of scikit-learn's with that label: nearest by pixels, label equal."""
    data: Any = load_digits()
    for sample in rows(3, "train", 40):
        strip = np.asarray(Image.open(io.BytesIO(sample.images[0])).convert("L"), dtype=float)
        for place, digit in enumerate(sample.columns["digits"]):
            tile = Image.fromarray(strip[:, 28 * place : 28 * place + 28].astype(np.uint8))
            small = 255 - np.asarray(tile.resize((8, 8), Image.Resampling.BOX), dtype=float)
            gaps = ((data.images * 255 / 16 - small) ** 2).sum((1, 2))
            assert data.target[gaps.argmin()] == digit


def test_splits_share_no_image_of_a_digit():
    """What is asked in the test has not been seen in training."""

    def tiles(split: str) -> set[bytes]:
        found = set()
        for sample in rows(2, split, 1500):
            strip = np.asarray(Image.open(io.BytesIO(sample.images[0])))
            found |= {strip[:, :28].tobytes(), strip[:, 28:].tobytes()}
        return found

    train, test = tiles("train"), tiles("test")
    assert len(train) > 1000 and len(test) > 350 and not train & test


def test_every_kind_is_asked_and_a_constant_answer_is_poor():
    """Blind guessing: the commonest answer of each question is right for less than a third."""
    samples = rows(4, "test", 2000)
    answers: dict[str, list[str]] = {}
    for sample in samples:
        answers.setdefault(sample.prompt, []).append(sample.answer)
    assert len(answers) == len(KINDS)
    best = sum(max(map(given.count, set(given))) for given in answers.values())
    assert best / len(samples) < 0.33
