"""`charts`: answers follow from the picture, slips are near misses, splits share no chart."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from care_train.data import Sample
from care_train.data.charts import COLORS, KINDS, Question, charts_sample, derive

BARS = (("red", 3), ("blue", 7), ("green", 3))


def rows(num_bars: int, split: str, count: int) -> list[Sample]:
    return [charts_sample(num_bars, split, row) for row in range(1, count + 1)]


@pytest.mark.parametrize(
    ("kind", "named", "rationale", "answer"),
    (
        ("value", ("blue", "red"), "blue 7", "7"),
        ("difference", ("blue", "red"), "blue 7 red 3 . 7 minus 3 is 4", "4"),
        ("difference", ("red", "green"), "red 3 green 3 . 3 minus 3 is 0", "0"),
        ("tallest", ("red", "green"), "red 3 blue 7 green 3 . the tallest is 7", "7"),
        ("above", ("red", "blue"), "red 3 blue 7 green 3 . above 5 : 7 . that makes 1", "1"),
        ("sum", ("red", "blue"), "red 3 blue 7 green 3 . 3 plus 7 is 10 . 10 plus 3 is 13", "13"),
    ),
)
def test_derivations_by_hand(kind: str, named: tuple[str, str], rationale: str, answer: str):
    """The rationale reads the bars that the question is about, then derives the answer."""
    found = derive(Question(kind, *named, limit=5), BARS)
    assert found[1:] == (f"i see {rationale}", answer)
    assert (named[0] in found[0]) == (kind in ("value", "difference"))
    assert (named[1] in found[0]) == (kind == "difference")
    assert ("5" in found[0]) == (kind == "above")


def test_no_bar_above_is_none():
    """An empty list has a word."""
    question = Question("above", "red", "blue", limit=7)
    assert derive(question, BARS)[1].endswith(" . above 7 : none . that makes 0")


@pytest.mark.parametrize("num_bars", (2, 3, 6))
def test_rows_hold_together(num_bars: int):
    """Answer, rationale and columns agree; the slip misreads one height, and changes the answer."""
    for sample in rows(num_bars, "test", 200):
        columns = sample.columns
        question = Question(*(columns[name] for name in Question._fields))
        height = dict(zip(columns["colors"], columns["heights"], strict=True))
        assert len(height) == num_bars
        assert derive(question, list(height.items())) == (
            sample.prompt,
            sample.rationale,
            sample.answer,
        )
        assert sample.failed_rationale is not None
        read = re.findall(r"([a-z]+) (\d)", sample.failed_rationale.partition(" . ")[0])
        slip = height | {color: int(value) for color, value in read}
        assert sum(slip[color] != height[color] for color in height) == 1
        failed = sample.failed_rationale, columns["failed_answer"]
        assert derive(question, list(slip.items()))[1:] == failed and failed[1] != sample.answer


@pytest.mark.parametrize("num_bars", (2, 5))
def test_pictures_show_the_bars(num_bars: int):
    """In the middle of each bar's place its color reaches as high as the columns say."""
    names, shades = list(COLORS), np.array(list(COLORS.values()))
    for sample in rows(num_bars, "train", 60):
        picture = np.asarray(Image.open(io.BytesIO(sample.images[0]))) / 255
        assert picture.shape == (28, 28 + 28 * num_bars, 3)
        seen = []
        for place in range(num_bars):
            column = picture[:, 28 * (place + 1) + 14]
            gaps = np.abs(column[:, None] - shades).max(2)
            painted = gaps.min(1) < 0.08
            color = names[gaps[painted].argmin(1)[0]]
            seen.append((color, round(painted.sum() / 3)))
        assert seen == list(zip(sample.columns["colors"], sample.columns["heights"], strict=True))


def test_splits_share_no_chart():
    """The colors and heights of a test's chart are in no training row; it is one in five."""
    train, test = (
        {(*sample.columns["colors"], *sample.columns["heights"]) for sample in rows(2, split, 1000)}
        for split in ("train", "test")
    )
    assert not train & test and len(train) > 500 and 200 < len(test) < 500


def test_every_kind_is_asked_and_a_constant_answer_is_poor():
    """Blind guessing: the commonest answer of each question is right for less than a third."""
    samples = rows(3, "test", 2000)
    answers: dict[str, list[str]] = {}
    for sample in samples:
        answers.setdefault(sample.prompt, []).append(sample.answer)
    assert {sample.columns["kind"] for sample in samples} == set(KINDS)
    best = sum(max(map(given.count, set(given))) for given in answers.values())
    assert best / len(samples) < 0.33


def test_rows_are_the_same_every_time():
    """A row is a pure function of its name, picture included, whatever was drawn before it."""
    again = [rows(4, split, 20) for split in ("test", "train", "test")]
    assert again[0] == again[2] != again[1]
