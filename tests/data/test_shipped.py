"""The shipped data sets: answers follow from the picture, slips are near misses, splits share
nothing; easy-VQA's figures follow from its own answers."""

import io
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageColor
from sklearn.datasets import load_digits

from care_train.config import DataSettings, load_config
from care_train.data import Sample, charts, digits, geometry, load_image, load_images
from care_train.data.charts import Question
from care_train.data.easy_vqa import (
    FIGURES,
    Figure,
    agrees,
    derive_figures,
    easy_vqa_samples,
    wrong_figure,
)
from tests.data.published import load

SPLITS = ("train", "test")


class Made(NamedTuple):
    """A module that draws a data set, and how a test reads its rows."""

    module: Any
    level: int
    """The usual one."""
    num_questions: int
    content: Callable[[Any], tuple[Any, Any]]
    """(question, what the picture shows) of a row's columns."""
    read: Callable[[str], list[Any]]
    """What the first step of a rationale says that the picture shows."""
    parts: Callable[[Sample], list[Any]]
    """What no other split has."""
    num_parts: tuple[int, int]
    """At least so many in the rows of `train` and of `test` below."""


def tiles(sample: Sample) -> list[bytes]:
    """The images of a strip's digits."""
    strip = np.asarray(Image.open(io.BytesIO(sample.images[0])))
    return [strip[:, 28 * n : 28 * n + 28].tobytes() for n in range(strip.shape[1] // 28)]


def bars(columns: Any) -> list[tuple[str, int]]:
    return list(zip(columns["colors"], columns["heights"], strict=True))


MADE = {
    "digits": Made(
        *(digits, 4, 5),
        lambda columns: (columns["kind"], columns["digits"]),
        lambda text: [int(digit) for digit in re.findall(r"\d", text)],
        *(tiles, (1000, 350)),
    ),
    "charts": Made(
        *(charts, 3, 15),
        lambda columns: (Question(*(columns[name] for name in Question._fields)), bars(columns)),
        lambda text: [(c, int(h)) for c, h in re.findall(r"([a-z]+) (\d)", text)],
        *(lambda sample: [str(bars(sample.columns))], (500, 200)),
    ),
    "geometry": Made(
        *(geometry, 3, 4),
        lambda columns: (columns["kind"], columns["rectangles"]),
        lambda text: [[int(w), int(h)] for w, h in re.findall(r"(\d) by (\d)", text)],
        *(lambda sample: [str(sample.columns["rectangles"])], (100, 30)),
    ),
}


def made_rows(name: str, level: int, split: str, count: int) -> list[Sample]:
    make = getattr(MADE[name].module, f"{name}_sample")
    return [make(level, split, row) for row in range(1, count + 1)]


BARS = [("red", 3), ("blue", 7), ("green", 3)]
SHEET = [(3, 2), (1, 4), (2, 4)]
SEEN_BARS = "i see red 3 blue 7 green 3"
SEEN_SHEET = "i see 3 by 2 1 by 4 2 by 4 . 3 times 2 is 6 . 1 times 4 is 4 . 2 times 4 is 8"


@pytest.mark.parametrize(
    ("name", "question", "shown", "rationale", "answer"),
    (
        ("digits", "sum", (4, 0, 7), "i see 4 0 7 . 4 plus 0 is 4 . 4 plus 7 is 11", "11"),
        ("digits", "largest", (3, 9, 9), "i see 3 9 9 . the largest is 9", "9"),
        ("digits", "smallest", (3, 0), "i see 3 0 . the smallest is 0", "0"),
        ("digits", "difference", (8, 2, 5), "i see 8 2 5 . 8 minus 2 is 6", "6"),
        ("digits", "even", (1, 3), "i see 1 3 . even ones : none . that makes 0", "0"),
        ("charts", "sum", BARS, f"{SEEN_BARS} . 3 plus 7 is 10 . 10 plus 3 is 13", "13"),
        ("charts", "tallest", BARS, f"{SEEN_BARS} . the tallest is 7", "7"),
        ("charts", "shortest", BARS, f"{SEEN_BARS} . the shortest is 3", "3"),
        ("charts", "difference", BARS, f"{SEEN_BARS} . 7 minus 3 is 4", "4"),
        ("charts", "above", BARS, f"{SEEN_BARS} . above 5 : 7 . that makes 1", "1"),
        ("charts", "above", BARS[:1], "i see red 3 . above 5 : none . that makes 0", "0"),
        ("charts", "value", BARS, f"{SEEN_BARS} . blue is 7", "7"),
        ("geometry", "total", SHEET, f"{SEEN_SHEET} . 6 plus 4 is 10 . 10 plus 8 is 18", "18"),
        ("geometry", "largest", SHEET, f"{SEEN_SHEET} . the largest is 8", "8"),
        ("geometry", "smallest", SHEET, f"{SEEN_SHEET} . the smallest is 4", "4"),
        ("geometry", "difference", SHEET, f"{SEEN_SHEET} . 8 minus 4 is 4", "4"),
    ),
)
def test_derivations_by_hand(name: str, question: str, shown: Any, rationale: str, answer: str):
    """The rationale reads the picture, then derives the answer; only what is needed is named."""
    asked = Question(question, "blue", limit=5) if name == "charts" else question
    text, *derived = MADE[name].module.derive(asked, shown)
    assert derived == [rationale, answer]
    assert ("blue" in text) == (question == "value") and ("5" in text) == (question == "above")


@pytest.mark.parametrize("name", MADE)
def test_rows_hold_together(name: str):
    """Answer, rationale and columns agree; the slip misreads one value, and changes the answer. A
    row is a pure function of its name, picture included, whatever was drawn before it."""
    derive = MADE[name].module.derive
    for level in (6, 2, 3):
        rows = made_rows(name, level, "test", 100)
        assert rows[:20] == made_rows(name, level, "test", 20)
        for sample in rows:
            asked, shown = MADE[name].content(sample.columns)
            assert len(shown) == level
            assert derive(asked, shown) == (sample.prompt, sample.rationale, sample.answer)
            assert sample.failed_rationale is not None
            slip = MADE[name].read(sample.failed_rationale.partition(" . ")[0])
            assert np.sum(np.array(slip, str) != np.array(shown, str)) == 1
            failed = sample.failed_rationale, sample.columns["failed_answer"]
            assert derive(asked, slip)[1:] == failed and failed[1] != sample.answer
            assert name != "charts" or len(set(sample.columns["colors"])) == level


@pytest.mark.parametrize("name", MADE)
def test_splits_share_nothing_and_a_constant_answer_is_poor(name: str):
    """No image of a digit, no chart's bars and no sheet's sides are in train and in test. Every
    kind is asked, and the commonest answer of each question is right for less than a third."""
    made, answers = MADE[name], defaultdict[str, Counter[str]](Counter)
    rows = {split: made_rows(name, made.level, split, 1500) for split in SPLITS}
    train, test = ({part for row in rows[split] for part in made.parts(row)} for split in SPLITS)
    assert not train & test
    assert len(train) > made.num_parts[0] and len(test) > made.num_parts[1]
    for sample in rows["test"]:
        answers[sample.prompt][sample.answer] += 1
    assert {sample.columns["kind"] for sample in rows["test"]} == set(made.module.KINDS)
    assert len(answers) == made.num_questions
    best = sum(max(given.values()) for given in answers.values())
    assert best / len(rows["test"]) < 0.33


def test_a_bar_of_two_is_not_asked_for_by_its_color():
    """Of two bars, the kind of question that names a color is left out."""
    rows = made_rows("charts", 2, "test", 300)
    assert {sample.columns["kind"] for sample in rows} == set(charts.KINDS[:-1])


def test_images_show_the_digits():
    """Each tile is an image of scikit-learn's with that label: nearest by pixels, label equal."""
    data: Any = load_digits()
    for sample in made_rows("digits", 3, "train", 40):
        strip = np.asarray(Image.open(io.BytesIO(sample.images[0])).convert("L"), dtype=float)
        assert strip.shape == (28, 84)
        for place, digit in enumerate(sample.columns["digits"]):
            tile = Image.fromarray(strip[:, 28 * place : 28 * place + 28].astype(np.uint8))
            small = 255 - np.asarray(tile.resize((8, 8), Image.Resampling.BOX), dtype=float)
            gaps = ((data.images * 255 / 16 - small) ** 2).sum((1, 2))
            assert data.target[gaps.argmin()] == digit


@pytest.mark.parametrize("num_bars", (2, 5))
def test_pictures_show_the_bars(num_bars: int):
    """In the middle of each bar's place its color reaches as high as the columns say."""
    names, shades = list(charts.COLORS), np.array(list(charts.COLORS.values()))
    for sample in made_rows("charts", num_bars, "train", 60):
        picture = np.asarray(load_image(sample.images[0], location=sample.id)) / 255
        assert picture.shape == (28, 28 + 28 * num_bars, 3)
        seen = []
        for place in range(num_bars):
            column = picture[:, 28 * (place + 1) + 14]
            gaps = np.abs(column[:, None] - shades).max(2)
            painted = gaps.min(1) < 0.08
            color = names[gaps[painted].argmin(1)[0]]
            seen.append((color, round(painted.sum() / 3)))
        assert seen == bars(sample.columns)


def test_pictures_show_the_rectangles():
    """Each tile's colored pixels span as many squares of 6 pixels as the columns say."""
    for sample in made_rows("geometry", 3, "train", 60):
        picture = np.asarray(load_image(sample.images[0], location=sample.id)).astype(int)
        assert picture.shape == (28, 84, 3)
        is_grey = (np.ptp(picture, axis=2) == 0) & (picture[..., 0] > 100)  # paper and lines
        for tile, sides in enumerate(sample.columns["rectangles"]):
            painted = np.argwhere(~is_grey[:, 28 * tile : 28 * (tile + 1)])
            height, width = np.ptp(painted, axis=0) // 6
            assert [width, height] == sides


@pytest.mark.parametrize("name", MADE)
def test_a_made_data_set_is_a_source(name: str):
    """It is a name like `easy_vqa`, with a usual level, its own held-out split and no other."""
    samples = load(f"{name}@test", max_samples=5)
    assert len(samples) == 5
    assert all(sample.id.startswith(f"{name}-{MADE[name].level}/test/") for sample in samples)
    held_out = load_config(None, [f"data.path={name}-2"]).held_out
    assert held_out == DataSettings(path=f"{name}-2@test")
    with pytest.raises(ValueError, match=f"{name}: got split 'dev'"):
        load(f"{name}-6@dev")
    with pytest.raises(ValueError, match=f"^data.path: got {name}-7, wanted {name}-2 to {name}-6$"):
        load(f"{name}-7")


def test_easy_vqa_is_a_source():
    """It needs no file, its rows are drawn whole, and there is no other split."""
    samples = load("easy_vqa@test", max_samples=7)
    assert len({sample.id for sample in samples}) == 7
    assert all(sample.id.startswith("easy_vqa/test/") for sample in samples)
    with pytest.raises(ValueError, match=r"easy_vqa: got split 'val', wanted 'train' or 'test'"):
        load("easy_vqa@val")


COUNTS = {"train": (38575, 4000, 3578), "test": (9673, 1000, 888)}


@pytest.fixture(scope="module")
def easy_vqa() -> dict[str, list[Sample]]:
    return {split: easy_vqa_samples(split) for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_agrees_with_the_derived_figure(easy_vqa: dict[str, list[Sample]], split: str):
    """All 48,248 answers, negated ones too, hold for their image's figure, and no image's answers
    contradict; the rationale states that figure, the failed one another. Images whose answers are
    too few for a figure have none."""
    figures = derive_figures(split)
    statements = {figure.describe() for figure in FIGURES}
    asked: dict[int, list[Sample]] = defaultdict(list)
    for sample in easy_vqa[split]:
        asked[sample.columns["image_id"]].append(sample)
    for image, samples in asked.items():
        left = [f for f in FIGURES if all(agrees(f, s.prompt, s.answer) for s in samples)]
        assert left, samples
        figure = figures[image]
        assert (left == [figure]) if figure else (len(left) > 1)
        for sample in samples:
            if figure is None:
                assert sample.rationale is None and sample.failed_rationale is None
            else:
                assert sample.rationale == f"the shape is a {figure.color} {figure.shape}"
                assert sample.failed_rationale in statements - {sample.rationale}
    derived = sum(figure is not None for figure in figures.values())
    assert (len(easy_vqa[split]), len(figures), derived) == COUNTS[split]


def test_failed_rationales_err_in_every_way():
    """Shape, colour or both are wrong, about equally often, and the same for the same id."""
    figure = Figure("circle", "blue")
    drawn = [wrong_figure(figure, f"easy_vqa/train/{row}") for row in range(600)]
    assert figure not in drawn
    kinds = [(f.shape != figure.shape, f.color != figure.color) for f in drawn]
    for kind in ((True, False), (False, True), (True, True)):
        assert 150 < kinds.count(kind) < 250
    assert drawn[5] == wrong_figure(figure, "easy_vqa/train/5")


def test_figures_match_the_pixels(easy_vqa: dict[str, list[Sample]]):
    """The derived colour, by its CSS name, is in the picture; `green` is drawn as lime."""
    figures = derive_figures("test")
    for sample in easy_vqa["test"][::10]:
        if figure := figures[sample.columns["image_id"]]:
            color = ImageColor.getrgb({"green": "lime"}.get(figure.color, figure.color))
            [image] = load_images(sample)
            assert color in {pixel for _, pixel in image.getcolors(64 * 64) or []}


def test_easy_vqa_shares_no_image(easy_vqa: dict[str, list[Sample]]):
    """No test image has the pixels of a train image."""
    train, test = (
        {load_image(path, location=path, max_pixels=64 * 64).tobytes() for path in paths}
        for paths in ({s.images[0] for s in easy_vqa[split]} for split in SPLITS)
    )
    assert not train & test
