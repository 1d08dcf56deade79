"""Pictures of a run, and of several runs against each other."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from care_train.reporting.interval import mean_interval

Records = Sequence[Mapping[str, Any]]

# Okabe and Ito's palette: told apart with any colour vision.
_BLUE, _VERMILION, _GREEN, _ORANGE, _PURPLE, _SKY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#56B4E9",
)
_RUN_COLORS = (_BLUE, _VERMILION, _GREEN, _PURPLE, _ORANGE, _SKY)
_RUN_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
_INK, _GREY, _PALE, _PALE_BLUE = "#222222", "#666666", "#E2E2E2", "#A6D4F0"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _GREY,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titlecolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ECECEC",
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
_DPI = 150
_COLUMNS = 3
_TITLE_CHARS = 62
_FEW_POINTS = 12
_LABELS = {
    "reward": "mean reward",
    "accuracy": "accuracy",
    "format": "well-formed responses",
    "greedy_accuracy": "greedy accuracy",
    "greedy_format": "well-formed greedy responses",
    "kl": "KL to the reference (nats per token)",
    "response_length": "response length (tokens)",
    "gap_mean": "trainer and rollouts apart (nats per token)",
    "loss": "loss (nats per token)",
}
_PLACES = {"train": "on the training rollouts", "eval": "on the evaluation questions"}
_SHARES = ("accuracy", "format", "greedy_accuracy", "greedy_format", "reflection_success")


def plot_learning_curves(metrics: Records, path: Path) -> None:
    """One figure of a run: a panel per quantity the run logged, against the training step.

    The light line is each step, the strong one its moving average, diamonds are evaluations.

    Args:
        metrics: the run's records; missing names and nulls leave gaps.
        path: the PNG to write.

    Raises:
        ValueError: no record holds anything to plot.
    """
    panels = _panels(metrics)
    if not panels:
        raise ValueError("metrics: got no record with a value to plot")
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(_STYLE):
        figure = _figure(4.2 * columns, 3.1 * rows)
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, draw in zip(axes, panels, strict=False):
            draw(axis)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        if any(line.get_alpha() is not None for axis in axes for line in axis.get_lines()):
            legend = "Light line: each step. Strong line: moving average."
            figure.suptitle(legend, x=0.01, ha="left", fontsize=9, color=_GREY)
        _save(figure, path)


def plot_comparison(
    runs: Mapping[str, Sequence[Records]],
    path: Path,
    key: str = "accuracy",
    *,
    phase: str = "train",
    window: int | None = None,
) -> None:
    """Several algorithms in one picture: mean over seeds, and its 95% interval as a band.

    Args:
        runs: label -> one list of records per seed, in the order of drawing.
        path: the PNG to write.
        key: what to compare.
        phase: train | eval | sft.
        window: steps of each seed's moving average; by default about a twentieth of the run for
            train, none for evaluations.

    Raises:
        ValueError: a label has no seed, or its seeds share no step with a value for `key`.
    """
    if not runs:
        raise ValueError("runs: got none, wanted at least one label")
    curves = {label: _seed_curves(label, seeds, phase, key) for label, seeds in runs.items()}
    longest = max(len(steps) for steps, _ in curves.values())
    window = window or (_window(longest) if phase == "train" else 1)
    with matplotlib.rc_context(_STYLE):
        figure = _figure(7.6, 4.4)
        axis = figure.subplots()
        ends = [
            _draw_run(axis, index, label, *curve, window)
            for index, (label, curve) in enumerate(curves.items())
        ]
        title = _title(key, dict(zip(runs, ends, strict=True)))
        _frame(axis, key, title, _subtitle(runs, phase, window))
        _save(figure, path)


def _panels(metrics: Records) -> list[Callable[[Axes], None]]:
    keys = ("reward", "accuracy", "format", "kl", "response_length")
    panels: list[Callable[[Axes], None]] = [
        _curve_panel(metrics, "train", key)
        for key in keys
        if _has(metrics, "train", key) or _has(metrics, "eval", key)
    ]
    if _has(metrics, "train", "groups"):
        panels.append(lambda axis: _draw_groups(axis, metrics))
    if _has(metrics, "train", "gap_mean"):
        panels.append(_curve_panel(metrics, "train", "gap_mean"))
    if not panels and _has(metrics, "sft", "loss"):
        panels.append(_curve_panel(metrics, "sft", "loss"))
    return panels


def _curve_panel(metrics: Records, phase: str, key: str) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        _draw_curve(axis, *_series(metrics, phase, key), _BLUE, "")
        if key == "response_length" and _has(metrics, phase, "think_length"):
            axis.get_lines()[-1].set_label("response")
            _draw_curve(axis, *_series(metrics, phase, "think_length"), _ORANGE, "rationale")
        for name, label, face in (
            (key, "evaluation, sampled", _VERMILION),
            (f"greedy_{key}", "evaluation, greedy", "white"),
        ):
            steps, values = _series(metrics, "eval", name)
            if len(steps):
                axis.plot(
                    steps, values, "D", label=label, color=_VERMILION, markerfacecolor=face,
                    markersize=6, clip_on=False, zorder=4,
                )  # fmt: skip
        _label_axis(axis, key)
        axis.set_title(_capitalized(key))
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="best")

    return draw


def _draw_curve(axis: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    if not len(steps):
        return
    window = _window(len(steps))
    if window > 1:
        axis.plot(steps, values, color=color, alpha=0.25, linewidth=1)
    marker = "o" if len(steps) == 1 else ""
    smooth = _smoothed(values, window)
    axis.plot(steps, smooth, color=color, linewidth=2, marker=marker, label=label)


def _draw_groups(axis: Axes, metrics: Records) -> None:
    """What became of each step's groups, as shares; and how often a reflection succeeded."""
    steps, groups = _series(metrics, "train", "groups")
    window = _window(len(steps))
    counts = {
        key: _aligned(steps, *_series(metrics, "train", key))
        for key in ("groups_skipped", "groups_rescued")
    }
    total = np.maximum(_smoothed(groups, window), 1e-9)
    skipped = _smoothed(counts["groups_skipped"], window) / total
    rescued = _smoothed(counts["groups_rescued"], window) / total
    axis.stackplot(
        steps, 1 - skipped - rescued, rescued, skipped,
        colors=(_PALE_BLUE, _ORANGE, _PALE), labels=("trained", "rescued", "skipped"),
    )  # fmt: skip
    tried, success = _series(metrics, "train", "reflection_success")
    if len(tried):
        axis.plot(
            tried, _smoothed(success, _window(len(tried))),
            color=_INK, linewidth=1.8, linestyle="--", label="reflection success",
        )  # fmt: skip
    _label_axis(axis, "accuracy")
    axis.grid(False)
    axis.set_ylim(0, 1)
    axis.set_title("What became of the groups")
    axis.legend(
        loc="upper center", bbox_to_anchor=(0.48, -0.2), ncols=4, fontsize=8,
        handlelength=1.2, handletextpad=0.4, columnspacing=0.9,
    )  # fmt: skip


def _draw_run(
    axis: Axes, index: int, label: str, steps: np.ndarray, seeds: list[np.ndarray], window: int
) -> float:
    """Mean and band of one label; returns the mean at the last step."""
    smooth = [_smoothed(values, window) for values in seeds]
    intervals = [mean_interval([float(value) for value in at]) for at in zip(*smooth, strict=True)]
    mean = np.array([mean for mean, _ in intervals])
    half = np.array([half for _, half in intervals])
    color = _RUN_COLORS[index % len(_RUN_COLORS)]
    dashes = _RUN_DASHES[index % len(_RUN_DASHES)]
    marker = "o" if len(steps) <= _FEW_POINTS else ""
    axis.plot(
        steps, mean,
        color=color, linewidth=2.2, linestyle=dashes, marker=marker, label=label,
    )  # fmt: skip
    if len(seeds) > 1:
        axis.fill_between(steps, mean - half, mean + half, color=color, alpha=0.18, linewidth=0)
    return float(mean[-1])


def _frame(axis: Axes, key: str, title: str, subtitle: str) -> None:
    _label_axis(axis, key)
    axis.set_xlabel("training step")
    axis.set_ylabel(_LABELS.get(key, key))
    axis.legend(loc="best", fontsize=10)
    axis.set_title(title, fontsize=12, pad=24)
    axis.text(0, 1.025, subtitle, transform=axis.transAxes, fontsize=9, color=_GREY)


def _seed_curves(
    label: str, seeds: Sequence[Records], phase: str, key: str
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The steps every seed has, and each seed's values there."""
    if not seeds:
        raise ValueError(f"runs[{label!r}]: got no seeds, wanted at least one")
    series = [dict(zip(*_series(records, phase, key), strict=True)) for records in seeds]
    steps = sorted(set.intersection(*(set(values) for values in series)))
    if not steps:
        raise ValueError(f"runs[{label!r}]: its seeds share no {phase} step with a {key!r}")
    return np.array(steps), [np.array([values[step] for step in steps]) for values in series]


def _title(key: str, ends: Mapping[str, float]) -> str:
    """Where the runs end, as far as that fits above the picture."""
    form = "{:.1%}" if key in _SHARES else "{:.3g}"
    reached = ", ".join(f"{label} {form.format(end)}" for label, end in ends.items())
    title = f"{_capitalized(key)} at the end: {reached}"
    return title if len(title) <= _TITLE_CHARS else f"{_capitalized(key)} over the training"


def _capitalized(key: str) -> str:
    label = _LABELS.get(key, key)
    return label[0].upper() + label[1:]


def _subtitle(runs: Mapping[str, Sequence[Records]], phase: str, window: int) -> str:
    counts = sorted({len(seeds) for seeds in runs.values()})
    seeds = " to ".join(str(count) for count in (counts[0], counts[-1])[: len(counts)])
    parts = [f"Mean over {seeds} seeds, band: 95% interval" if counts[-1] > 1 else "One seed"]
    if phase in _PLACES:
        parts.append(_PLACES[phase])
    if window > 1:
        parts.append(f"moving average over {window} steps")
    return "; ".join(parts)


def _label_axis(axis: Axes, key: str) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.set_xlabel("step")
    if key in _SHARES:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    elif key in ("kl", "response_length", "gap_mean"):
        axis.set_ylim(bottom=min(0.0, axis.dataLim.y0))


def _series(metrics: Records, phase: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of `key`, where a record of `phase` has one, by step."""
    points = sorted(
        (record["step"], float(record[key]))
        for record in metrics
        if record["phase"] == phase and record.get(key) is not None
    )
    return np.array([step for step, _ in points]), np.array([value for _, value in points])


def _has(metrics: Records, phase: str, key: str) -> bool:
    return any(r["phase"] == phase and r.get(key) is not None for r in metrics)


def _aligned(steps: np.ndarray, some_steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` at all of `steps`, 0 where there is none."""
    known = dict(zip(some_steps, values, strict=True))
    return np.array([known.get(step, 0.0) for step in steps])


def _window(count: int) -> int:
    """An odd number of points, about a twentieth of them."""
    return 1 if count < 10 else 2 * (count // 40 + 1) + 1


def _smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average; towards the ends over the points there are."""
    kernel = np.ones(min(window, 2 * len(values) - 1))
    half = len(kernel) // 2
    weights = np.convolve(np.ones(len(values)), kernel)[half : half + len(values)]
    return np.convolve(values, kernel)[half : half + len(values)] / weights


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=_DPI)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.1)
    return figure


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", facecolor="white")
