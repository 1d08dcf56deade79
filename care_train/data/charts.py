"""Bar charts drawn by matplotlib, and questions whose answer must be read off and derived.

A chart has 2 to 6 bars of different colours and of heights 1 to 8, beside a scale. Its rationale
reads the bars and derives the answer step by step. The failed rationale misreads one height and
goes on from there without another mistake: a near miss. No chart's colors and heights are both in
train and in test.

Every row is a pure function of its number of bars, split and number.
"""

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

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

KINDS = ("value", "tallest", "difference", "above", "sum")
"""What is asked."""

_TEST_SHARE = 0.2  # of all charts
_TILE = 28  # pixels a side, 3 of them per unit of height: one token of Qwen's vision towers

Bar = tuple[str, int]
"""Color and height."""


def charts_sample(num_bars: int, split: str, row: int) -> Sample:
    """A chart of so many bars with a question.

    Its `columns` hold the question's kind, the `colors` and `heights` from left to right, the two
    colors that the question may name, and the `failed_answer` that the failed rationale leads to.

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
    named = rng.sample(colors, 2)
    # Of two bars of heights 8 and 1 the first is the taller one whatever is misread.
    kinds = rng.sample(KINDS, len(KINDS))
    kind, slips = next((kind, slips) for kind in kinds if (slips := misreadings(kind, bars, named)))
    question, rationale, answer = derive(kind, bars, named)
    _, failed_rationale, failed_answer = derive(kind, rng.choice(slips), named)
    return Sample(
        id=id,
        prompt=question,
        answer=answer,
        images=(png(_Canvas.of(num_bars).draw(bars, rng)),),
        rationale=rationale,
        failed_rationale=failed_rationale,
        source="charts",
        location=f"charts-{num_bars} {split}: row {row}",
        columns={
            "kind": kind,
            "colors": colors,
            "heights": [height for _, height in bars],
            "named": named,
            "failed_answer": failed_answer,
        },
    )


def derive(kind: str, bars: Sequence[Bar], named: Sequence[str]) -> tuple[str, str, str]:
    """Question, rationale and answer about a chart.

    Args:
        kind: one of `KINDS`.
        bars: what is read from left to right.
        named: two colors, for questions that name one bar or two.
    """
    height, (first, second) = dict(bars), named
    seen = "i see " + " ".join(f"{color} {value}" for color, value in bars)
    if kind == "value":
        answer = str(height[first])
        return f"how tall is the {first} bar?", f"{seen} . {first} is {answer}", answer
    if kind == "tallest":
        tallest = max(height, key=lambda color: height[color])
        return "which bar is the tallest?", f"{seen} . the tallest is {tallest}", tallest
    if kind == "difference":
        low, high = sorted((height[first], height[second]))
        question = f"by how much do the {first} bar and the {second} bar differ?"
        return question, f"{seen} . {high} minus {low} is {high - low}", str(high - low)
    if kind == "above":
        above = [color for color, value in bars if value > height[first]]
        listed = " ".join(above) or "none"
        rationale = f"{seen} . above {height[first]} : {listed} . that makes {len(above)}"
        return f"how many bars are taller than the {first} one?", rationale, str(len(above))
    assert kind == "sum"
    steps, total = add_up([value for _, value in bars])
    return "what is the sum of all bars?", " . ".join([seen, *steps]), str(total)


def misreadings(kind: str, bars: Sequence[Bar], named: Sequence[str]) -> list[list[Bar]]:
    """The chart with one height taken for another, as often as that leads to another answer.

    None where several bars are the tallest and the question is which one is.
    """
    if not _has_answer(kind, bars):
        return []
    answer = derive(kind, bars, named)[2]
    charts = [
        [*bars[:place], (color, wrong), *bars[place + 1 :]]
        for place, (color, right) in enumerate(bars)
        for wrong in HEIGHTS
        if wrong != right
    ]
    return [c for c in charts if _has_answer(kind, c) and derive(kind, c, named)[2] != answer]


def _has_answer(kind: str, bars: Sequence[Bar]) -> bool:
    heights = [height for _, height in bars]
    return kind != "tallest" or heights.count(max(heights)) == 1


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
