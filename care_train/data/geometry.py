"""Rectangles on squared paper, and questions about their areas.

A sheet shows 2 to 6 rectangles side by side, each 1 to 4 squares wide and high. Its rationale reads
both sides of each, multiplies them and derives the answer. The failed rationale misreads one side
and goes on from there without another mistake: a near miss. No sheet's sides are both in train and
in test.

Every row is a pure function of its number of rectangles, split and number.
"""

import random
from collections.abc import Sequence
from functools import partial

import numpy as np
from PIL import Image, ImageDraw

from care_train.data.charts import COLORS
from care_train.data.digits import Derived, derived, derived_sample, is_test, misread, near_misses
from care_train.data.schema import Sample

QUESTIONS = {
    "total": "what is the area of all rectangles?",
    "largest": "what is the largest area?",
    "smallest": "what is the smallest area?",
    "difference": "what is the largest area minus the smallest?",
}
KINDS = tuple(QUESTIONS)
"""What is asked of the areas."""

SIDES = range(1, 5)
"""Of a rectangle, in squares."""

_TILE = 28  # pixels a side for each rectangle: one token of Qwen's vision towers
_SQUARE, _MARGIN = 6, 2  # pixels

Rectangle = tuple[int, int]
"""Width and height."""


def geometry_sample(count: int, split: str, row: int) -> Sample:
    """A sheet of so many rectangles with a question.

    Its `columns` hold the question's kind, the `rectangles` from left to right, and the
    `failed_answer` that the failed rationale leads to.

    Args:
        count: one of `config.LEVELS`.
        split: `train` or `test`.
        row: from 1.
    """
    rng = random.Random(f"geometry-{count}/{split}/{row}")
    rectangles = _sheet(count, rng)
    while is_test(f"geometry/{rectangles}") != (split == "test"):
        rectangles = _sheet(count, rng)
    kind = rng.choice(KINDS)
    # Of two squares of 16 one stays the largest whatever is misread: another kind is asked.
    while not (slips := _slips(kind, rectangles)):
        kind = rng.choice(KINDS)
    pixels, right = _draw(rectangles, rng), derive(kind, rectangles)
    columns = {"kind": kind, "rectangles": [list(sides) for sides in rectangles]}
    return derived_sample(
        f"geometry-{count}", (split, row), pixels, right, rng.choice(slips), columns
    )


def derive(kind: str, rectangles: Sequence[Sequence[int]]) -> Derived:
    """Question (one of `KINDS`), rationale and answer of (width, height) read left to right."""
    seen = "i see " + " ".join(f"{width} by {height}" for width, height in rectangles)
    products = [f"{width} times {height} is {width * height}" for width, height in rectangles]
    steps, answer = derived(kind, [width * height for width, height in rectangles])
    return QUESTIONS[kind], " . ".join([seen, *products, *steps]), str(answer)


def _slips(kind: str, rectangles: Sequence[Rectangle]) -> list[Derived]:
    """Derivations with one side taken for another."""
    sides = [side for rectangle in rectangles for side in rectangle]
    sheets = [list(zip(one[::2], one[1::2], strict=True)) for one in misread(sides, SIDES)]
    return near_misses(partial(derive, kind), rectangles, sheets)


def _sheet(count: int, rng: random.Random) -> list[Rectangle]:
    return [(rng.choice(SIDES), rng.choice(SIDES)) for _ in range(count)]


def _draw(rectangles: Sequence[Rectangle], rng: random.Random) -> np.ndarray:
    """[28, 28 * rectangles, 3] uint8; `rng` chooses their colors."""
    image = Image.new("RGB", (_TILE * len(rectangles), _TILE), "white")
    pen = ImageDraw.Draw(image)
    lines = [_MARGIN + square * _SQUARE for square in range(5)]
    for tile, (width, height) in enumerate(rectangles):
        left, bottom = tile * _TILE + _MARGIN, _TILE - _MARGIN
        for line in lines:
            pen.line((tile * _TILE + line, lines[0], tile * _TILE + line, lines[-1]), "lightgrey")
            pen.line((left, line, left + lines[-1] - _MARGIN, line), "lightgrey")
        color = tuple(round(255 * part) for part in rng.choice(list(COLORS.values())))
        corner = (left + width * _SQUARE, bottom - height * _SQUARE)
        pen.rectangle((left, corner[1], corner[0], bottom), color)
    return np.asarray(image)
