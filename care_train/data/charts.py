"""Bar charts drawn by matplotlib, and questions whose answer must be read off and derived.

A chart has 2 to 6 bars of different colors and of heights 1 to 8, beside a scale. Its rationale
reads the bars and derives the answer step by step. The failed rationale misreads one height and
goes on from there without another mistake: a near miss. No chart's colors and heights are both in
train and in test.

Every row is a pure function of its number of bars, split and number.
"""

import random
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from care_train.data.digits import Derived, add_up, derived_sample, misread, png
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

KINDS = ("sum", "tallest", "shortest", "difference", "above", "value")
"""What is asked; the last, about one bar by its color, of three bars or more."""

_TEST_SHARE = 0.2  # of all charts
_TILE = 28  # pixels a side, 3 of them per unit of height: one token of Qwen's vision towers

Bar = tuple[str, int]
"""Color and height."""


class Question(NamedTuple):
    """What is asked about a chart."""

    kind: str
    """One of `KINDS`."""
    named: str
    """The color of a bar, for `value`."""
    limit: int
    """A height, for `above`."""


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
    while _is_test(bars) != (split == "test"):
        bars = [(color, rng.choice(HEIGHTS)) for color in colors]
    kinds = KINDS if num_bars > 2 else KINDS[:-1]
    question = Question(rng.choice(kinds), rng.choice(colors), rng.choice(_LIMITS))
    # Of two bars of height 8 one stays the tallest whatever is misread: another kind is asked.
    while not (slips := misreadings(question, bars)):
        question = question._replace(kind=rng.choice(kinds))
    slip = rng.choice(slips)
    return derived_sample(
        f"charts-{num_bars}",
        (split, row),
        png(_Canvas.of(num_bars).draw(bars, rng)),
        derive(question, bars),
        derive(question, slip),
        question._asdict() | {"colors": colors, "heights": [height for _, height in bars]},
    )


def derive(question: Question, bars: Sequence[Bar]) -> Derived:
    """The question's text, the rationale and the answer.

    Args:
        question: what is asked.
        bars: what is read from left to right.
    """
    kind, named, limit = question
    seen = "i see " + " ".join(f"{color} {height}" for color, height in bars)
    heights = [height for _, height in bars]
    high, low = max(heights), min(heights)
    if kind == "sum":
        steps, total = add_up(heights)
        return "what is the sum of all bars?", " . ".join([seen, *steps]), str(total)
    if kind == "tallest":
        return "how tall is the tallest bar?", f"{seen} . the tallest is {high}", str(high)
    if kind == "shortest":
        return "how tall is the shortest bar?", f"{seen} . the shortest is {low}", str(low)
    if kind == "difference":
        text = "how much taller is the tallest bar than the shortest?"
        return text, f"{seen} . {high} minus {low} is {high - low}", str(high - low)
    if kind == "above":
        above = [height for height in heights if height > limit]
        listed = " ".join(map(str, above)) or "none"
        rationale = f"{seen} . above {limit} : {listed} . that makes {len(above)}"
        return f"how many bars are taller than {limit}?", rationale, str(len(above))
    assert kind == "value"
    height = dict(bars)[named]
    return f"how tall is the {named} bar?", f"{seen} . {named} is {height}", str(height)


def misreadings(question: Question, bars: Sequence[Bar]) -> list[list[Bar]]:
    """The chart with one height taken for another, as often as that leads to another answer."""
    answer = derive(question, bars)[2]
    colors, heights = zip(*bars, strict=True)
    charts = [list(zip(colors, wrong, strict=True)) for wrong in misread(heights, HEIGHTS)]
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
