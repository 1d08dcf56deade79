"""`charts`: answers follow from the picture, slips are near misses, splits share no chart."""

import re

import numpy as np
import pytest

from care_train.data import Sample, load_image
from care_train.data.charts import COLORS, KINDS, Question, charts_sample, derive

BARS = (("red", 3), ("blue", 7), ("green", 3))


def rows(num_bars: int, split: str, count: int) -> list[Sample]:
    return [charts_sample(num_bars, split, row) for row in range(1, count + 1)]


@pytest.mark.parametrize(
    ("kind", "steps", "answer"),
    (
        ("sum", "3 plus 7 is 10 . 10 plus 3 is 13", "13"),
        ("tallest", "the tallest is 7", "7"),
        ("shortest", "the shortest is 3", "3"),
        ("difference", "7 minus 3 is 4", "4"),
        ("above", "above 5 : 7 . that makes 1", "1"),
        ("value", "blue is 7", "7"),
    ),
)
def test_derivations_by_hand(kind: str, steps: str, answer: str):
    """The rationale reads the chart, then derives the answer; only what is needed is named."""
    text, *derived = derive(Question(kind, "blue", limit=5), BARS)
    assert derived == [f"i see red 3 blue 7 green 3 . {steps}", answer]
    assert ("blue" in text) == (kind == "value") and ("5" in text) == (kind == "above")


def test_no_bar_above_is_none():
    """An empty list has a word."""
    question = Question("above", "red", limit=7)
    assert derive(question, BARS)[1].endswith(" . above 7 : none . that makes 0")


@pytest.mark.parametrize("num_bars", (2, 3, 6))
def test_rows_hold_together(num_bars: int):
    """Answer, rationale and columns agree; the slip misreads one height, and changes the answer."""
    for sample in rows(num_bars, "test", 200):
        columns = sample.columns
        question = Question(*(columns[name] for name in Question._fields))
        bars = list(zip(columns["colors"], columns["heights"], strict=True))
        assert derive(question, bars) == (sample.prompt, sample.rationale, sample.answer)
        assert sample.failed_rationale is not None
        read = re.findall(r"([a-z]+) (\d)", sample.failed_rationale.partition(" . ")[0])
        slip = [(color, int(height)) for color, height in read]
        assert [color for color, _ in slip] == columns["colors"]
        assert len(set(columns["colors"])) == num_bars
        assert sum(a != b for a, b in zip(slip, bars, strict=True)) == 1
        failed = sample.failed_rationale, columns["failed_answer"]
        assert derive(question, slip)[1:] == failed and failed[1] != sample.answer


@pytest.mark.parametrize("num_bars", (2, 5))
def test_pictures_show_the_bars(num_bars: int):
    """In the middle of each bar's place its color reaches as high as the columns say."""
    names, shades = list(COLORS), np.array(list(COLORS.values()))
    for sample in rows(num_bars, "train", 60):
        picture = np.asarray(load_image(sample.images[0], location=sample.id)) / 255
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


@pytest.mark.parametrize("num_bars", (2, 3))
def test_every_kind_is_asked_and_a_constant_answer_is_poor(num_bars: int):
    """Blind guessing: the commonest answer of each question is right for less than a third. A bar
    of two is not asked for by its color."""
    samples = rows(num_bars, "test", 2000)
    answers: dict[str, list[str]] = {}
    for sample in samples:
        answers.setdefault(sample.prompt, []).append(sample.answer)
    kinds = {sample.columns["kind"] for sample in samples}
    assert kinds == set(KINDS if num_bars == 3 else KINDS[:-1])
    best = sum(max(map(given.count, set(given))) for given in answers.values())
    assert best / len(samples) < 0.33


def test_rows_are_the_same_every_time():
    """A row is a pure function of its name, picture included, whatever was drawn before it."""
    again = [rows(4, split, 20) for split in ("test", "train", "test")]
    assert again[0] == again[2] != again[1]
