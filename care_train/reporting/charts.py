"""Curves against the training step, as plain data for the page and a run's picture: values, moving
averages, bands over seeds; and the intervals of a mean and of a share."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import numpy as np

Json = dict[str, Any]
Records = Sequence[Mapping[str, Any]]

_Z = 1.96
_MAX_POINTS = 1000
"""Of a line: a chart has fewer pixels across."""


@dataclass(frozen=True)
class Chart:
    """One chart: metrics of training steps, and of evaluations as points."""

    title: str
    lines: Mapping[str, str]
    """Metric -> what its line is called; `a/b` is the quotient of two metrics of a step."""
    unit: str = ""
    """share | what a value counts."""
    evaluated: str = ""
    """The metric of evaluations, sampled and greedy, that is drawn as points."""
    note: str = ""
    stacked: bool = False
    phase: str = "train"


_EVALUATED = {"{}": "evaluation, sampled", "greedy_{}": "evaluation, greedy"}

CHARTS: Mapping[str, Sequence[Chart]] = {
    "Learning": (
        Chart("Accuracy", {"accuracy": "training"}, "share", "accuracy"),
        Chart("Reward", {"reward": "mean", "reward_std": "deviation within a group"}),
        Chart("Well-formed responses", {"format": "training"}, "share", "format"),
        Chart("Lengths", {"response_length": "response", "think_length": "rationale"}, "tokens"),
        Chart("KL to the reference", {"kl": "KL"}, "nats per token"),
        Chart(
            "Entropy",
            {"entropy": "estimate"},
            "nats per token",
            note="The mean surprise, -log prob, of the sampled tokens under the sampling policy.",
        ),
        Chart(
            "Clipped tokens", {"clipped_low": "lower bound", "clipped_high": "upper bound"}, "share"
        ),
        Chart(
            "Log-prob gap",
            {"gap_mean": "mean"},
            "nats per token",
            note="Trainer and rollout engine, each token's log-prob under the same weights.",
        ),
        Chart("Largest log-prob gap of a step", {"gap_max": "largest"}, "nats"),
        Chart("Gradient norm", {"grad_norm": "before clipping"}),
        Chart("Loss", {"loss": "loss"}),
        Chart("Cold start", {"loss": "loss"}, "nats per token", phase="sft"),
    ),
    "Signal": (
        Chart(
            "What became of the groups",
            {
                "groups_plain/groups": "trained",
                "groups_rescued/groups": "trained through a rescue",
                "groups_skipped/groups": "skipped",
            },
            "share",
            stacked=True,
        ),
        Chart(
            "Groups without contrast",
            {"groups_all_correct/groups": "all correct", "groups_all_wrong/groups": "all wrong"},
            "share",
        ),
        Chart("Reflection success", {"reflection_success": "that turned out correct"}, "share"),
        Chart(
            "Sequences trained",
            {"trained_sequences/sampled_sequences": "of those sampled"},
            "share",
        ),
        Chart("Negatives per trained group, K'", {"num_negatives": "mean"}),
        Chart(
            "Clipped negative answer tokens",
            {"clipped_negative_answer": "clipped"},
            "share",
            note="Fig. 6, left: tokens of negatives' answers at the lower clip bound.",
        ),
        Chart(
            "Variance ratio",
            {"advantage_variance_ratio": "Var A[y-] / Var A[y+]"},
            note="Fig. 6, right: of the advantages that are trained, a step's negatives against "
            "its positives.",
        ),
    ),
    "Time": (
        Chart("Tokens generated per second", {"tokens_per_second": "of a whole step"}, "tokens/s"),
        Chart("Seconds of a step", {}, "s", stacked=True),
    ),
}
_TIMES = {
    "seconds_generate": "generation",
    "seconds_score": "scoring",
    "seconds_old_forward": "old policy's forward",
    "seconds_select": "selection",
    "seconds_reflect": "reflection",
    "seconds_reference": "reference",
    "seconds_collate": "collation",
    "seconds_update": "forward and backward",
    "seconds_optimizer": "optimiser",
    "seconds_sync": "weight sync",
}


def charts(conditions: Sequence[Sequence[Records]]) -> list[Json]:
    """Every chart that a run has values for, of conditions to compare: the records of each seed.

    Returns:
        Per chart: section, title, unit, note, stacked, x (steps) and series; of each series the
        label, the place of its condition and of its metric, kind (line | points | faint) and
        values at each x (None: none there); low and high where several seeds make a band.
    """
    compared = list(enumerate(conditions))
    known = {key for seeds in conditions for records in seeds for one in records for key in one}
    found: list[Json] = []
    for section, templates in CHARTS.items():
        for chart in (part for template in templates for part in _split(template, known)):
            # Stacks on top of each other compare nothing: one chart each.
            for places in [[one] for one in compared] if chart.stacked else [compared]:
                if series := list(_series(chart, places)):
                    found.append({"section": section} | _aligned(chart, series))
    return found


def seed_curves(
    seeds: Sequence[Records], phase: str, key: str
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The steps every seed has a value of `key` at, and each seed's values there; maybe none."""
    values = [
        {
            one["step"]: float(one[key])
            for one in records
            if one["phase"] == phase and one.get(key) is not None
        }
        for records in seeds
    ]
    steps = sorted(set.intersection(*(set(one) for one in values))) if values else []
    return np.array(steps), [np.array([one[step] for step in steps]) for one in values]


def average_window(count: int) -> int:
    """An odd number of points, about a twentieth of them."""
    return 1 if count < 10 else 2 * (count // 40 + 1) + 1


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Moving average over an odd number of points around each; at the ends over those there are."""
    kernel = np.ones(min(window, 2 * len(values) - 1))
    half = len(kernel) // 2
    weights = np.convolve(np.ones(len(values)), kernel)[half : half + len(values)]
    return np.convolve(values, kernel)[half : half + len(values)] / weights


def mean_band(values: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """`mean_interval` at every step of several seeds."""
    mean, half = np.array([mean_interval(at) for at in np.array(values).T.tolist()]).T
    return mean, half


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and the half width of its 95 % interval, as the paper reports them.

    That is 1.96 s / sqrt(n), s the sample standard deviation; NaN for one seed, which says nothing
    about the spread. No seed is a ValueError.
    """
    if len(values) == 1:
        return float(values[0]), math.nan
    return fmean(values), _Z * stdev(values) / math.sqrt(len(values))


def proportion_interval(successes: float, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a binomial share: unlike 1.96 sigma, it stays inside [0, 1].

    Successes may be fractions (partial credit); those outside [0, total] are a ValueError.
    """
    if total < 1:
        raise ValueError(f"total: got {total}, wanted at least 1")
    if not 0 <= successes <= total:
        raise ValueError(f"successes: got {successes}, wanted 0 to {total}")
    share = successes / total
    scale = 1 + _Z**2 / total
    centre = (share + _Z**2 / (2 * total)) / scale
    half = _Z * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def _split(chart: Chart, known: Collection[str]) -> Iterator[Chart]:
    """`chart`, with the parts of a step's time that are known; behind it the reward functions'."""
    if chart.title.startswith("Seconds"):
        chart = replace(chart, lines={key: _TIMES[key] for key in _TIMES if key in known})
    yield chart
    if chart.title == "Reward":
        names = sorted(k[7:-5] for k in known if k.startswith("reward_") and k.endswith("_mean"))
        for name in names:
            yield Chart(f"Reward function {name}", {f"reward_{name}_mean": "mean"})


def _series(chart: Chart, conditions: Sequence[tuple[int, Sequence[Records]]]) -> Iterator[Json]:
    for place, seeds in conditions:
        for metric, (key, label) in enumerate(chart.lines.items()):
            found = {"condition": place, "metric": metric, "label": label}
            counted = [_with_ratio(records, key) for records in seeds]
            for line in _lines(found, counted, chart.phase, key, smooth=chart.phase == "train"):
                if not chart.stacked:
                    yield line
                elif line["kind"] == "line":
                    # What is stacked adds up, which single steps and bands beside it would not.
                    yield {name: line[name] for name in line if name not in ("low", "high")}
        evaluated = _EVALUATED if chart.evaluated else {}
        for metric, (name, label) in enumerate(evaluated.items(), len(chart.lines)):
            found = {"condition": place, "metric": metric, "label": label, "kind": "points"}
            yield from _lines(found, seeds, "eval", name.format(chart.evaluated), smooth=False)


def _lines(
    found: Json, seeds: Sequence[Records], phase: str, key: str, *, smooth: bool
) -> Iterator[Json]:
    """The mean over seeds with its band; a single seed's own values, faint, below its average."""
    steps, values = seed_curves(seeds, phase, key)
    if not len(steps):
        return
    window = average_window(len(steps)) if smooth else 1
    every = -(-len(steps) // _MAX_POINTS)
    if len(seeds) == 1 and window > 1:
        yield found | {"kind": "faint", "steps": steps[::every], "y": values[0][::every]}
    mean, half = mean_band([smoothed(one, window)[::every] for one in values])
    line = {"kind": "line"} | found | {"steps": steps[::every], "y": mean}
    yield line | ({"low": mean - half, "high": mean + half} if len(seeds) > 1 else {})


def _aligned(chart: Chart, series: Sequence[Json]) -> Json:
    """All series over the same steps, as the charting library wants them."""
    x = sorted({int(step) for one in series for step in one["steps"]})
    aligned = []
    for one in series:
        steps = one.pop("steps").tolist()
        curves = {key: _at(x, steps, one[key]) for key in ("y", "low", "high") if key in one}
        aligned.append(one | curves)
    shown = {"title": chart.title, "unit": chart.unit, "note": chart.note}
    return shown | {"stacked": chart.stacked, "xLabel": "step", "x": x, "series": aligned}


def _at(x: Sequence[int], steps: Sequence[int], values: np.ndarray) -> list[float | None]:
    known = {s: float(f"{v:.5g}") for s, v in zip(steps, values, strict=True) if np.isfinite(v)}
    return [known.get(step) for step in x]


def _with_ratio(records: Records, key: str) -> Records:
    """`records` with the quotient that `key` names, where it names one."""
    above, _, below = key.partition("/")
    if not below:
        return records
    return [
        {**record, key: _count(record, above) / record[below]}
        for record in records
        if record.get(below)
    ]


def _count(record: Mapping[str, Any], key: str) -> float:
    """A count of a step; `groups_plain` are those neither skipped nor rescued."""
    if key != "groups_plain":
        return record.get(key) or 0
    others = (record.get("groups_rescued") or 0) + (record.get("groups_skipped") or 0)
    return record["groups"] - others
