"""Pictures of a run, and of several runs against each other."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from care_train.reporting.charts import (
    Records,
    average_window,
    charts,
    mean_band,
    seed_curves,
    smoothed,
)
from care_train.reporting.signature import Signature

# Okabe and Ito's palette: told apart with any colour vision. Dashes tell lines apart in grey.
_BLUE, _VERMILION, _GREEN, _ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
_RUN_COLORS = (_BLUE, _VERMILION, _GREEN, "#CC79A7", _ORANGE, "#56B4E9")
_RUN_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
_GREY = "#666666"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _GREY,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ECECEC",
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
_MAX_COLUMNS = 3
_PANELS = (
    *("Reward", "Accuracy", "Well-formed responses", "KL to the reference", "Lengths"),
    *("What became of the groups", "Log-prob gap"),
)
"""Of the report page's charts, those of a run's picture."""
_STACK_COLORS = ("#A6D4F0", _ORANGE, "#E2E2E2")
_LABELS = {
    "reward": "mean reward",
    "format": "well-formed responses",
    "kl": "KL to the reference (nats per token)",
    "response_length": "response length (tokens)",
}
_SHARES = ("accuracy", "format", "greedy_accuracy", "greedy_format")


def plot_learning_curves(metrics: Records, path: Path) -> None:
    """A PNG of a run: a panel per quantity that it logged, against the training step.

    The light line is each step, the strong one its moving average, diamonds are evaluations.

    Raises:
        ValueError: no record holds anything to plot.
    """
    found = {chart["title"]: chart for chart in charts([[metrics]])}
    panels = [found[title] for title in _PANELS if title in found]
    panels = panels or [found[title] for title in ("Cold start",) if title in found]
    if not panels:
        raise ValueError("metrics: got no record with a value to plot")
    columns = min(_MAX_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(_STYLE):
        figure = _figure(4.2 * columns, 3.1 * rows)
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, chart in zip(axes, panels, strict=False):
            _draw_chart(axis, chart)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        if any(one["kind"] == "faint" for chart in panels for one in chart["series"]):
            legend = "Light line: each step. Strong line: moving average."
            figure.suptitle(legend, x=0.01, ha="left", fontsize=9, color=_GREY)
        _save(figure, path)


def plot_comparison(
    runs: Mapping[str, Sequence[Records]],
    path: Path,
    key: str = "accuracy",
    *,
    phase: str = "train",
) -> None:
    """Several algorithms in one picture: mean over seeds, and its 95% interval as a band.

    Training curves are moving averages over about a twentieth of the run.

    Args:
        runs: label -> one list of records per seed, in the order of drawing.
        path: the PNG to write.
        key: what to compare.
        phase: train | eval | sft.

    Raises:
        ValueError: a label has no seed, or its seeds share no step with a value for `key`.
    """
    if not runs:
        raise ValueError("runs: got none, wanted at least one label")
    curves = {label: seed_curves(seeds, phase, key) for label, seeds in runs.items()}
    for label, (steps, seeds) in curves.items():
        if not seeds:
            raise ValueError(f"runs[{label!r}]: got no seeds, wanted at least one")
        if not len(steps):
            raise ValueError(f"runs[{label!r}]: its seeds share no {phase} step with a {key!r}")
    longest = max(len(steps) for steps, _ in curves.values())
    window = average_window(longest) if phase == "train" else 1
    with matplotlib.rc_context(_STYLE):
        figure = _figure(7.6, 4.4)
        axis = figure.subplots()
        for index, (label, (steps, seeds)) in enumerate(curves.items()):
            _draw_run(axis, index, label, steps, [smoothed(values, window) for values in seeds])
        _label(axis, _LABELS.get(key, key))
        axis.set_title(axis.get_title(loc="left"), fontsize=12, pad=24)
        if key in _SHARES:
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        elif key in ("kl", "response_length"):
            axis.set_ylim(bottom=min(0.0, axis.dataLim.y0))
        if len(runs) > len(_RUN_COLORS):
            figure.legend(loc="outside right upper", fontsize=10)
        else:
            axis.legend(loc="best", fontsize=10)
        counts = sorted({len(seeds) for seeds in runs.values()})
        seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        spread = f"Mean over {seeds} seeds, band: 95% interval" if counts[-1] > 1 else "One seed"
        average = f"; moving average over {window} steps" if window > 1 else ""
        text = spread + average
        axis.text(0, 1.025, text, transform=axis.transAxes, fontsize=9, color=_GREY)
        _save(figure, path)


def plot_signature(signature: Signature, path: Path) -> None:
    """A PNG of Fig. 2 of the paper from a run's own groups, and the check of alpha beside it."""
    with matplotlib.rc_context(_STYLE):
        figure = _figure(12.6, 3.6)
        anchor, negative, alpha = figure.subplots(1, 3)
        buckets = signature.buckets
        roots = np.sqrt([bucket.num_negatives for bucket in buckets])
        for axis, role, x, color in (
            (anchor, "anchor", roots, _BLUE),
            (negative, "negative", 1 / roots, _VERMILION),
        ):
            means = [getattr(bucket, role) for bucket in buckets]
            bars = [getattr(bucket, f"{role}_half_width") for bucket in buckets]
            axis.errorbar(x, means, bars, color=color, fmt="o", capsize=3, markersize=5)
            fit, over_groups = getattr(signature, role), getattr(signature, f"{role}_groups")
            shares = f"{fit.r_squared:.3f} (of all groups {over_groups.r_squared:.3f})"
            label = f"slope {fit.slope:.3f}, $R^2$ {shares}"
            axis.plot(x, fit.intercept + fit.slope * x, color=color, label=label)
            axis.legend(loc="best")
        anchor.set(title="anchor: mean A_raw", xlabel="sqrt(K')")
        negative.set(title="negatives: minus mean A_raw", xlabel="1 / sqrt(K')")
        alpha.plot(signature.alpha, signature.scaled_anchor, ".", color=_GREEN, alpha=0.4)
        alpha.set(title="anchor's A_raw / sqrt(K')", xlabel="alpha-hat (Eq. 9)")
        alpha.text(0.04, 0.9, f"r = {signature.alpha_r:.3f}", transform=alpha.transAxes)
        count = sum(bucket.num_groups for bucket in buckets)
        title = f"K' in {count:,} anchored groups; bars: 95% interval; lines: fits of the means"
        figure.suptitle(title, x=0.01, ha="left", fontsize=9, color=_GREY)
        _save(figure, path)


def plot_replay(
    recorded: Sequence[float], replayed: Sequence[float], overlaps: Sequence[float], path: Path
) -> None:
    """A PNG of the advantages of the sequences that a run trained and that its replay would train,
    and of how far the two sets overlap in each group."""
    with matplotlib.rc_context(_STYLE):
        figure = _figure(8.4, 3.4)
        advantages, sets = figure.subplots(1, 2)
        edges = np.histogram_bin_edges([*recorded, *replayed, 0.0], bins=40)
        for values, label, color in (
            (recorded, "the run", _BLUE),
            (replayed, "replayed", _VERMILION),
        ):
            advantages.hist(values, edges, label=label, color=color, histtype="step", linewidth=2)
        advantages.set(title="advantages of trained sequences", ylabel="sequences")
        advantages.legend(loc="best")
        sets.hist(overlaps, np.linspace(0, 1, 11), color=_GREEN)
        sets.set(title="overlap of the rollouts that train", ylabel="groups")
        _save(figure, path)


def _draw_chart(axis: Axes, chart: Mapping[str, Any]) -> None:
    """A chart of the report page."""
    series = chart["series"]
    for one in () if chart["stacked"] else series:
        known = [place for place, value in enumerate(one["y"]) if value is not None]
        steps, values = [chart["x"][place] for place in known], [one["y"][place] for place in known]
        color = _RUN_COLORS[one["metric"]]
        if one["kind"] == "faint":
            axis.plot(steps, values, color=color, alpha=0.25, linewidth=1)
        elif one["kind"] == "points":
            face = "white" if "greedy" in one["label"] else color
            style = {"markerfacecolor": face, "markersize": 6, "zorder": 4, "clip_on": False}
            axis.plot(steps, values, "D", color=color, label=one["label"], **style)
        else:
            marker = "o" if len(steps) == 1 else ""
            axis.plot(steps, values, color=color, linewidth=2, marker=marker, label=one["label"])
    if chart["stacked"]:
        labels = [one["label"] for one in series]
        heights = [one["y"] for one in series]
        axis.stackplot(chart["x"], *heights, colors=_STACK_COLORS, labels=labels)
        axis.grid(False)
        axis.set_ylim(0, 1)
    is_share = chart["unit"] == "share"
    _label(axis, chart["title"] + (f" ({chart['unit']})" if chart["unit"] and not is_share else ""))
    if is_share:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    elif chart["unit"]:
        axis.set_ylim(bottom=min(0.0, axis.dataLim.y0))
    axis.legend(loc="best", frameon=chart["stacked"])


def _draw_run(
    axis: Axes, index: int, label: str, steps: np.ndarray, seeds: list[np.ndarray]
) -> None:
    """Mean and band of one label."""
    mean, half = mean_band(seeds)
    color = _RUN_COLORS[index % len(_RUN_COLORS)]
    # A second round of the colors has other dashes.
    dashes = _RUN_DASHES[(index + index // len(_RUN_COLORS)) % len(_RUN_DASHES)]
    marker = "o" if len(steps) <= 12 else ""
    axis.plot(steps, mean, color=color, linestyle=dashes, marker=marker, linewidth=2, label=label)
    if len(seeds) > 1:
        axis.fill_between(steps, mean - half, mean + half, color=color, alpha=0.18, linewidth=0)


def _label(axis: Axes, title: str) -> None:
    axis.set_title(title[0].upper() + title[1:])
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.set_xlabel("step")


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.1)
    return figure


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", facecolor="white")
