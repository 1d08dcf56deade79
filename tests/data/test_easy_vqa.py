"""easy-VQA's figures follow from its own answers."""

from collections import defaultdict

import pytest
from PIL import ImageColor

from care_train.data import Sample, load_image, load_images
from care_train.data.easy_vqa import (
    FIGURES,
    Figure,
    agrees,
    derive_figure,
    derive_figures,
    easy_vqa_samples,
    wrong_figure,
)

SPLITS = ("train", "test")
COUNTS = {"train": (38575, 4000, 3578), "test": (9673, 1000, 888)}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Sample]]:
    return {split: easy_vqa_samples(split) for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_agrees_with_the_derived_figure(rows: dict[str, list[Sample]], split: str):
    """All 48,248 answers hold for their image's figure, and no image's answers contradict; the
    rationale states that figure, the failed one another."""
    figures = derive_figures(split)
    statements = {figure.describe() for figure in FIGURES}
    asked: dict[int, list[Sample]] = defaultdict(list)
    for sample in rows[split]:
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
    assert (len(rows[split]), len(figures), derived) == COUNTS[split]


def test_failed_rationales_err_in_every_way():
    """Shape, colour or both are wrong, about equally often, and the same for the same id."""
    figure = Figure("circle", "blue")
    drawn = [wrong_figure(figure, f"easy_vqa/train/{row}") for row in range(600)]
    assert figure not in drawn
    kinds = [(f.shape != figure.shape, f.color != figure.color) for f in drawn]
    for kind in ((True, False), (False, True), (True, True)):
        assert 150 < kinds.count(kind) < 250
    assert drawn[5] == wrong_figure(figure, "easy_vqa/train/5")


def test_figures_match_the_pixels(rows: dict[str, list[Sample]]):
    """The derived colour, by its CSS name, is in the picture; `green` is drawn as lime."""
    for sample in rows["test"][:200]:
        figure = derive_figure([(sample.prompt, sample.answer)])
        if figure:
            color = ImageColor.getrgb({"green": "lime"}.get(figure.color, figure.color))
            [image] = load_images(sample)
            assert color in {pixel for _, pixel in image.getcolors(64 * 64) or []}


@pytest.mark.parametrize(
    ("question", "answer", "true"),
    [
        ("what color is the circle?", "blue", True),
        ("what color is the rectangle?", "blue", False),
        ("what is the color of the shape?", "red", False),
        ("what is the blue shape?", "circle", True),
        ("what is the red shape?", "circle", False),
        ("is there a circle?", "yes", True),
        ("is there a red shape in the image?", "no", True),
        ("is there not a circle in the image?", "yes", False),
        ("is there not a red shape?", "yes", True),
        ("is no circle present?", "no", True),
        ("is no blue shape present?", "yes", False),
        ("does the image not contain a triangle?", "yes", True),
        ("does the image not contain a blue shape?", "yes", False),
        ("does the image contain a blue shape?", "no", False),
    ],
)
def test_what_an_answer_says(question: str, answer: str, true: bool):
    """Each form of question, negated ones too, read for a blue circle."""
    assert agrees(Figure("circle", "blue"), question, answer) is true


def test_figure_needs_all_its_facts():
    """A figure is derived from several answers, and not from too few or contradicting ones."""
    shape = [("is no circle present?", "yes"), ("is there not a triangle?", "yes")]
    assert derive_figure(shape) is None
    assert derive_figure([*shape, ("what color is the shape?", "red")]) == Figure(
        "rectangle", "red"
    )
    assert derive_figure([("is there a circle?", "yes"), ("is there a circle?", "no")]) is None


def test_splits_share_no_image(rows: dict[str, list[Sample]]):
    """No test image has the pixels of a train image."""
    train, test = (
        {load_image(path, location=path, max_pixels=64 * 64).tobytes() for path in paths}
        for paths in ({s.images[0] for s in rows[split]} for split in SPLITS)
    )
    assert not train & test


def test_unknown_split():
    """Another split is refused with the two that exist."""
    with pytest.raises(ValueError, match=r"easy_vqa: got split 'val', wanted 'train' or 'test'"):
        easy_vqa_samples("val")
