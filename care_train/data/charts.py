"""Bar charts drawn by matplotlib, and questions whose answer must be read off and derived.

A chart has 2 to 6 bars of different colors and of heights 1 to 8, beside a scale. Its rationale
reads the bars that the question is about and derives the answer step by step. The failed rationale
misreads one height and goes on from there without another mistake: a near miss. No chart's colors
and heights are both in train and in test.

Every row is a pure function of its number of bars, split and number.
"""

import random
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from care_train.data.digits import add_up, png
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

KINDS = ("value", "tallest", "difference", "above", "sum")
"""What is asked."""

_TEST_SHARE = 0.2  # of all charts
_TILE = 28  # pixels a side, 3 of them per unit of height: one token of Qwen's vision towers

Bar = tuple[str, int]
"""Color and height."""


class Question(NamedTuple):
    """What is asked about a chart."""

    kind: str
    """One of `KINDS`."""
    first: str
    second: str
    """Colors of two bars, for questions that name one bar or two."""
    limit: int
    """A height, for the question how many bars are taller."""


def charts_sample(num_bars: int, split: str, row: int) -> Sample:
    """A chart of so many bars with a question.

    Its `columns` hold the question's `kind`, the two colors and the height that it may name, the
    `colors` and `heights` from left to right, and the `failed_answer` that the failed rationale
    leads to.

    Args:
        num_bars: one of `config.LEVELS`.
        split: `train` or `test`.
        row: from 1.
    """
    id = f"charts-{num_bars}/{split}/{row}"
    rng = random.Random(id)
    colors = rng.sample(list(COLORS), num_bars)
    bars = [(color, rng.choice(HEIGHTS)) for color in colors]
    while _is_test(bars) != (split == "test"):
        bars = [(color, rng.choice(HEIGHTS)) for color in colors]
    first, second = rng.sample(colors, 2)
    question = Question(rng.choice(KINDS), first, second, rng.choice(_LIMITS))
    text, rationale, answer = derive(question, bars)
    # Of two bars of heights 8 one stays the tallest whatever is misread: another kind is asked.
    while not (slips := misreadings(question, bars)):
        question = question._replace(kind=rng.choice(KINDS))
        text, rationale, answer = derive(question, bars)
    _, failed_rationale, failed_answer = derive(question, rng.choice(slips))
    return Sample(
        id=id,
        prompt=text,
        answer=answer,
        images=(png(_Canvas.of(num_bars).draw(bars, rng)),),
        rationale=rationale,
        failed_rationale=failed_rationale,
        source="charts",
        location=f"charts-{num_bars} {split}: row {row}",
        columns={
            **question._asdict(),
            "colors": colors,
            "heights": [height for _, height in bars],
            "failed_answer": failed_answer,
        },
    )


def derive(question: Question, bars: Sequence[Bar]) -> tuple[str, str, str]:
    """The question's text, the rationale and the answer.

    Args:
        question: what is asked.
        bars: what is read from left to right.
    """
    kind, first, second, limit = question
    height = dict(bars)
    if kind == "value":
        return f"how tall is the {first} bar?", f"i see {first} {height[first]}", str(height[first])
    if kind == "difference":
        low, high = sorted((height[first], height[second]))
        text = f"by how much do the {first} bar and the {second} bar differ?"
        seen = f"i see {first} {height[first]} {second} {height[second]}"
        return text, f"{seen} . {high} minus {low} is {high - low}", str(high - low)
    seen, heights = (
        "i see " + " ".join(f"{color} {value}" for color, value in bars),
        height.values(),
    )
    if kind == "tallest":
        answer = str(max(heights))
        return "how tall is the tallest bar?", f"{seen} . the tallest is {answer}", answer
    if kind == "above":
        above = [value for value in heights if value > limit]
        listed = " ".join(map(str, above)) or "none"
        rationale = f"{seen} . above {limit} : {listed} . that makes {len(above)}"
        return f"how many bars are taller than {limit}?", rationale, str(len(above))
    assert kind == "sum"
    steps, total = add_up(list(heights))
    return "what is the sum of all bars?", " . ".join([seen, *steps]), str(total)


def misreadings(question: Question, bars: Sequence[Bar]) -> list[list[Bar]]:
    """The chart with one height taken for another, as often as that leads to another answer."""
    answer = derive(question, bars)[2]
    charts = [
        [*bars[:place], (color, wrong), *bars[place + 1 :]]
        for place, (color, right) in enumerate(bars)
        for wrong in HEIGHTS
        if wrong != right
    ]
    return [chart for chart in charts if derive(question, chart)[2] != answer]


def _is_test(bars: Sequence[Bar]) -> bool:
    return random.Random(f"charts/{bars}").random() < _TEST_SHARE


class _Canvas:
    """Scale and bars, laid out once: a chart is the bars' heights, widths and colors."""

    def __init__(self, num_bars: int) -> None:
        # Here, as matplotlib takes a while to import and other data sets do without it.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(1 + num_bars, 1), dpi=_TILE)
        self._canvas: Any = FigureCanvasAgg(figure)
        axes: Any = figure.add_axes((0, 0, 1, 1), xlim=(-1.5, num_bars - 0.5), ylim=(-1, 25 / 3))
        axes.set_axis_off()
        pixel = 72 / _TILE  # in points
        for height, align in ((0, "bottom"), (4, "center"), (8, "top")):
            axes.plot((-0.6, num_bars), (height, height), color="0.75", linewidth=pixel)
            axes.text(-1, height, str(height), fontsize=8 * pixel, ha="center", va=align)
        self._canvas.draw()
        self._scale = self._canvas.copy_from_bbox(figure.bbox)
        self._bars = axes.bar(range(num_bars), 1)

    @classmethod
    @cache
    def of(cls, num_bars: int) -> "_Canvas":
        """The canvas for so many bars."""
        return cls(num_bars)

    def draw(self, bars: Sequence[Bar], rng: random.Random) -> np.ndarray:
        """[28, 28 + 28 * bars, 3] uint8; `rng` chooses the bars' width and shades."""
        self._canvas.restore_region(self._scale)
        width = rng.uniform(0.5, 0.9)
        for place, (patch, (color, height)) in enumerate(zip(self._bars, bars, strict=True)):
            shade = [min(max(part + rng.uniform(-0.06, 0.06), 0), 1) for part in COLORS[color]]
            patch.set(x=place - width / 2, width=width, height=height, facecolor=shade)
            patch.draw(self._canvas.get_renderer())
        return np.asarray(self._canvas.buffer_rgba())[..., :3].copy()
