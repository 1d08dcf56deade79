"""Bar charts drawn by matplotlib, and questions whose answer must be read off and derived.

A chart has 2 to 6 bars of different colors and of heights 1 to 8, beside a scale. Its rationale
reads the bars and derives the answer step by step. The failed rationale misreads one height and
goes on from there without another mistake: a near miss. No chart's colors and heights are both in
train and in test.

Every row is a pure function of its number of bars, split and number.
"""

import random
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from care_train.data.digits import (
    Derived,
    counted,
    derived,
    derived_sample,
    is_test,
    misread,
    near_misses,
)
from care_train.data.schema import Sample

COLORS = {
    "red": (0.86, 0.15, 0.15),
    "blue": (0.15, 0.3, 0.85),
    "green": (0.1, 0.6, 0.2),
    "orange": (1.0, 0.6, 0.1),
    "purple": (0.6, 0.2, 0.7),
    "black": (0.15, 0.15, 0.15),
}
"""Red, green and blue, of which a bar's own differ a little."""

HEIGHTS = range(1, 9)
"""Of a bar."""

_LIMITS = range(2, 7)

QUESTIONS = {
    "sum": "what is the sum of all bars?",
    "tallest": "how tall is the tallest bar?",
    "shortest": "how tall is the shortest bar?",
    "difference": "how much taller is the tallest bar than the shortest?",
    "above": "how many bars are taller than {limit}?",
    "value": "how tall is the {named} bar?",
}
KINDS = tuple(QUESTIONS)
"""What is asked; the last, about one bar by its color, of three bars or more."""

_TILE = 28  # pixels a side, 3 of them per unit of height: one token of Qwen's vision towers

Bar = tuple[str, int]
"""Color and height."""


class Question(NamedTuple):
    """What is asked about a chart: one of `KINDS`, a bar's color (`value`), a height (`above`)."""

    kind: str
    named: str
    limit: int


def charts_sample(num_bars: int, split: str, row: int) -> Sample:
    """A chart of so many bars with a question.

    Its `columns` hold the question's `kind`, the color and the height that it may name, the
    `colors` and `heights` from left to right, and the `failed_answer` that the failed rationale
    leads to.

    Args:
        num_bars: one of `config.LEVELS`.
        split: `train` or `test`.
        row: from 1.
    """
    rng = random.Random(f"charts-{num_bars}/{split}/{row}")
    colors = rng.sample(list(COLORS), num_bars)
    bars = [(color, rng.choice(HEIGHTS)) for color in colors]
    while is_test(f"charts/{bars}") != (split == "test"):
        bars = [(color, rng.choice(HEIGHTS)) for color in colors]
    kinds = KINDS if num_bars > 2 else KINDS[:-1]
    question = Question(rng.choice(kinds), rng.choice(colors), rng.choice(_LIMITS))
    # Of two bars of height 8 one stays the tallest whatever is misread: another kind is asked.
    while not (slips := _slips(question, bars)):
        question = question._replace(kind=rng.choice(kinds))
    slip, right = rng.choice(slips), derive(question, bars)
    columns = question._asdict() | {"colors": colors, "heights": [height for _, height in bars]}
    return derived_sample(
        f"charts-{num_bars}", (split, row), _draw(bars, rng), right, slip, columns
    )


def derive(question: Question, bars: Sequence[Bar]) -> Derived:
    """The question's text, rationale and answer of bars that are read from left to right."""
    kind, named, limit = question
    heights = [height for _, height in bars]
    if kind == "above":
        steps, answer = counted(f"above {limit}", [height for height in heights if height > limit])
    elif kind == "value":
        answer = dict(bars)[named]
        steps = [f"{named} is {answer}"]
    else:
        steps, answer = derived(kind, heights)
    seen = "i see " + " ".join(f"{color} {height}" for color, height in bars)
    text = QUESTIONS[kind].format(named=named, limit=limit)
    return text, " . ".join([seen, *steps]), str(answer)


def _slips(question: Question, bars: Sequence[Bar]) -> list[Derived]:
    """Derivations with one height taken for another."""
    colors, heights = zip(*bars, strict=True)
    charts = [list(zip(colors, wrong, strict=True)) for wrong in misread(heights, HEIGHTS)]
    return near_misses(partial(derive, question), bars, charts)


@cache
def _canvas(num_bars: int) -> tuple[Any, Any, Any]:
    """Matplotlib's canvas, the scale drawn on it, and the bars, whose form changes by chart."""
    # Here, as matplotlib takes a while to import and other data sets do without it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + num_bars, 1), dpi=_TILE)
    canvas: Any = FigureCanvasAgg(figure)
    axes: Any = figure.add_axes((0, 0, 1, 1), xlim=(-1.5, num_bars - 0.5), ylim=(-1, 25 / 3))
    axes.set_axis_off()
    pixel = 72 / _TILE  # in points
    for height, align in ((0, "bottom"), (4, "center"), (8, "top")):
        axes.plot((-0.6, num_bars), (height, height), color="0.75", linewidth=pixel)
        axes.text(-1, height, str(height), fontsize=8 * pixel, ha="center", va=align)
    canvas.draw()
    return canvas, canvas.copy_from_bbox(figure.bbox), axes.bar(range(num_bars), 1)


def _draw(bars: Sequence[Bar], rng: random.Random) -> np.ndarray:
    """[28, 28 + 28 * bars, 3] uint8; `rng` chooses the bars' width and shades."""
    canvas, scale, patches = _canvas(len(bars))
    canvas.restore_region(scale)
    width = rng.uniform(0.5, 0.9)
    for place, (patch, (color, height)) in enumerate(zip(patches, bars, strict=True)):
        shade = [min(max(part + rng.uniform(-0.06, 0.06), 0), 1) for part in COLORS[color]]
        patch.set(x=place - width / 2, width=width, height=height, facecolor=shade)
        patch.draw(canvas.get_renderer())
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
