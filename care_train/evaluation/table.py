"""The numbers of a run and of several trainings, as Markdown beside the paper's."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path
from statistics import fmean
from typing import Any

from care_train.evaluation.benchmarks import BENCHMARKS
from care_train.reporting import mean_interval, proportion_interval
from care_train.reporting.files import read_json
from care_train.reporting.text import markdown_table, markdown_text

Record = Mapping[str, Any]
"""What is known of one response; evaluate.py writes it."""
Summaries = Mapping[str, Mapping[str, Any]]

_SHARED = ("questions", "decoding", "seeds", "samples")
"""What results must have in common for their accuracies to be averaged."""

PAPER: tuple[tuple[str, tuple[float | None, ...]], ...] = (
    ("Qwen2.5-VL-3B", (62.0, 47.6, 21.2, 46.4, 31.1, 21.3)),
    ("Qwen2.5-VL-7B", (68.6, 49.2, 22.4, 61.3, 36.3, 32.8)),
    ("Qwen3-VL-8B-Instruct", (77.2, 62.1, 53.9, 69.6, None, None)),
    ("Qwen2.5-VL-7B + GRPO", (68.9, 50.8, 25.7, 61.1, 36.4, 32.8)),
    ("Qwen2.5-VL-7B + DAPO", (72.6, 54.2, 29.4, 61.6, 37.3, 34.7)),
    ("Qwen2.5-VL-7B + GSPO", (74.1, 56.0, 31.6, 62.2, 38.9, 36.4)),
    ("Qwen2.5-VL-3B + CARE", (66.5, 49.9, 25.0, 47.2, 33.1, 24.0)),
    ("Qwen2.5-VL-7B + CARE", (74.7, 56.8, 32.6, 62.5, 39.7, 37.1)),
    ("Qwen3-VL-8B-Instruct + CARE", (82.1, 69.7, 61.7, 71.0, 46.7, 41.7)),
    ("Qwen2.5-VL-3B + GRPO", (63.5, 47.9, 22.4, 45.4, 31.9, 21.9)),
    ("Qwen2.5-VL-3B + CARE w/o RGR", (65.3, 48.2, 24.7, 47.4, 32.2, 23.1)),
    ("Qwen2.5-VL-7B + CARE w/o RGR", (74.3, 55.4, 31.9, 62.8, 38.3, 36.4)),
    ("GPT-4o", (63.8, 37.6, None, None, None, None)),
    ("GPT-5-Nano", (73.1, None, 59.7, 72.6, None, None)),
    ("Claude-Sonnet-3.7", (66.8, None, 41.9, 75.0, None, None)),
    ("Gemini-2.0-Pro", (71.3, 67.3, 48.1, 69.9, None, None)),
    ("Qwen3-VL-4B-Instruct", (73.7, 46.8, 51.6, 67.4, None, None)),
    ("InternVL3.5-8B-Instruct", (74.2, None, 46.4, 68.1, None, None)),
    ("MiMo-VL-7B-SFT", (81.8, 67.1, 57.9, 64.6, 45.2, 39.4)),
    ("LLaVA-OneVision-1.5 8B", (69.6, None, 25.6, 55.4, 37.4, 25.2)),
    ("DeepEyes", (70.1, 47.3, 26.6, None, None, None)),
    ("M2-Reasoning", (75.0, None, 31.5, None, None, None)),
    ("Qwen3-VL-4B-Thinking", (79.5, 75.2, 60.0, 70.8, None, None)),
    ("Qwen3-VL-8B-Thinking", (81.4, 77.7, 62.7, 74.1, None, None)),
    ("MiMo-VL-7B-RL", (81.5, 71.5, 60.4, 66.7, 46.2, 40.3)),
    ("Vision-R1-7B", (73.5, None, None, None, None, None)),
    ("Keye-VL-1.5-8B", (80.7, 59.8, 46.0, 71.4, None, None)),
    ("InternVL3.5-8B-MPO", (74.2, None, 46.4, 71.2, None, None)),
)
"""Tables 1 and 2: a model, and its accuracy in percent on each of `BENCHMARKS`; None: not reported.
The paper's own backbones, with which a run is compared, come first."""


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The probability that one of k responses drawn without replacement is right.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) (Chen et al., 2021, arXiv:2107.03374, Eq. 1).
    """
    assert 1 <= k <= num_samples and 0 <= num_correct <= num_samples
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def majority_at_k(votes: Sequence[str], accuracies: Sequence[float], k: int) -> float:
    """How right the commonest of k answers is, a mean over the blocks of k responses.

    Of answers given as often the first counts; "" is no answer, and a block without one is wrong.
    """
    assert 1 <= k <= len(votes)
    scores = []
    for start in range(0, len(votes) - k + 1, k):
        block = range(start, start + k)
        counts = Counter(votes[i] for i in block if votes[i])
        winner = max(counts, key=lambda vote: counts[vote], default=None)
        scores.append(next((accuracies[i] for i in block if votes[i] == winner), 0.0))
    return fmean(scores)


def summarize(records: Sequence[Record], ks: Sequence[int]) -> dict[str, Any]:
    """A benchmark's numbers from all its records, those of each seed a complete pass.

    Args:
        records: of every question, seed and sample.
        ks: for which pass@k and majority@k are wanted.

    Returns:
        Means over seeds, questions and samples: `accuracy`, of it `exact`, `format`, `truncated`
        (cut by the length limit), `tokens`; `per_seed` accuracies; `half_width` of their 95 %
        interval, None for one seed; `interval` of the share of problems (Wilson, one seed);
        `pass@k`, `majority@k`; `groups` with each part's accuracy.
    """
    by_seed, by_group, by_question = defaultdict(list), defaultdict(list), defaultdict(list)
    for record in sorted(records, key=lambda record: record["sample"]):
        by_seed[record["seed"]].append(record)
        by_group[record["group"]].append(record)
        by_question[record["id"], record["seed"]].append(record)
    over_seeds = _mean_over([_mean(by_seed[seed], "accuracy") for seed in sorted(by_seed)], "seed")
    blocks = [
        ([record["vote"] for record in block], [record["accuracy"] for record in block])
        for block in by_question.values()
    ]
    # Versions of one problem, as MathVerse asks five, are right or wrong together.
    count = len({record.get("problem", record["id"]) for record in records})
    return over_seeds | {
        "num_questions": _num_questions(records),
        "interval": proportion_interval(over_seeds["accuracy"] * count, count),
        "exact": _mean(records, "exact"),
        "format": _mean(records, "format"),
        "truncated": 1.0 - _mean(records, "finished"),
        "tokens": _mean(records, "tokens"),
        "pass@k": {
            k: fmean(pass_at_k(len(right), right.count(1.0), k) for _, right in blocks) for k in ks
        },
        "majority@k": {k: fmean(majority_at_k(*block, k) for block in blocks) for k in ks},
        "groups": {
            name: {"num_questions": _num_questions(part), "accuracy": _mean(part, "accuracy")}
            for name, part in sorted(by_group.items())
        },
    }


def macro_average(summaries: Summaries) -> dict[str, Any]:
    """The unweighted mean over benchmarks (Sec. 8.3), with as many seeds each, and over seeds its
    95 % interval."""
    columns = [summary["per_seed"] for summary in summaries.values()]
    per_seed = [fmean(values) for values in zip(*columns, strict=True)]
    return _mean_over(per_seed, "seed") | {"benchmarks": list(summaries)}


def results_markdown(name: str, results: Mapping[str, Any]) -> str:
    """The results' file for people: this run, the paper's rows, and what lies behind the numbers.

    `name` is the run's, `results` what `evaluate_benchmarks` returns.
    """
    summaries: Summaries = results["benchmarks"]
    sections = [
        f"# {markdown_text(name)}: accuracy, percent",
        comparison({f"{name} (this run)": results}) if summaries.keys() & BENCHMARKS else "",
        _note(results),
        "## Behind the numbers",
        _details(summaries),
        *(_groups(_title(key), summary["groups"]) for key, summary in summaries.items()),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def comparison(own: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows of ours by their names, above the paper's; of each row the `benchmarks` with `accuracy`
    and `half_width`, and their `macro`."""
    header = ["", *(b.title for b in BENCHMARKS.values()), "macro average"]
    rows = []
    for name, results in own.items():
        summaries: Summaries = results["benchmarks"]
        row = [_score(summaries[key]) if key in summaries else "—" for key in BENCHMARKS]
        macro = _score(results["macro"]) if results["macro"] and "—" not in row else "—"
        rows.append([name, *row, macro])
    for name, values in PAPER:
        known = [value for value in values if value is not None]
        macro = f"{fmean(known):.2f}" if len(known) == len(values) else "—"
        rows.append([name, *("—" if v is None else f"{v:.1f}" for v in values), macro])
    return markdown_table(header, rows)


def combine_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """The mean over runs of each benchmark's accuracy, and its 95 % interval.

    The paper trains five seeds (Sec. 4.1). Each evaluation is a run of its own; their spread says
    something else than `eval.seeds`, which decodes one model repeatedly.

    Args:
        folders: of `care-train eval` runs, one for each trained model.

    Returns:
        `benchmarks`: each one's `accuracy`, `half_width` (1.96 s / sqrt(n); None for one run),
        `per_run` and `num_questions`; `macro`, the same of the macro average; `runs`.

    Raises:
        ValueError: no results in a folder, a model twice, or runs that were evaluated otherwise.
    """
    results = [_read(folder) for folder in folders]
    first, where = results[0], folders[0]
    models: dict[str, Path] = {}
    for folder, result in zip(folders, results, strict=True):
        same = models.setdefault(json.dumps(result["weights"]), folder)
        if same != folder or folders.count(folder) > 1:
            raise ValueError(
                f"{folder}: got the model of {same}, wanted one evaluation of each training: "
                "repeated decodes of one model belong in eval.seeds"
            )
        for key in _SHARED:
            if result[key] != first[key]:
                raise ValueError(
                    f"{folder}: {key}: got {result[key]}, wanted {first[key]} as in {where}"
                )
    benchmarks = {
        name: _mean_over([result["benchmarks"][name]["accuracy"] for result in results], "run")
        | {"num_questions": summary["num_questions"]}
        for name, summary in first["benchmarks"].items()
    }
    macro = first["macro"] and _mean_over([r["macro"]["accuracy"] for r in results], "run")
    runs = [str(folder) for folder in folders]
    return {"runs": runs, "benchmarks": benchmarks, "macro": macro}


def trainings_markdown(groups: Mapping[str, Mapping[str, Any]]) -> str:
    """`combine_runs` of each group as a row above the paper's, and each run's own numbers."""
    note = (
        "Mean over trainings; ± is the half width of the 95 % interval over them "
        "(1.96 s / sqrt(n)). The other rows are the paper's Tables 1 and 2, measured there with "
        "LMMs-Eval over five seeds."
    )
    named = {f"{name} (n = {len(group['runs'])})": group for name, group in groups.items()}
    sections = [comparison(named), note]
    for name, group in groups.items():
        rows = [
            [key, *map(_percent, summary["per_run"]), _score(summary)]
            for key, summary in group["benchmarks"].items()
        ]
        table = markdown_table(["", *group["runs"], "mean"], rows)
        sections += [f"## {markdown_text(name)}", table]
    return "\n\n".join(sections) + "\n"


def _note(results: Mapping[str, Any]) -> str:
    settings, count, samples = results["decoding"], len(results["seeds"]), results["samples"]
    how = "greedy" if settings["greedy"] else f"temperature {settings['temperature']:g}"
    spread = (
        f"± is the half width of the 95 % interval over {count} seeds (1.96 s / sqrt(n))."
        if count > 1
        else "One seed: no interval over seeds; that over questions is below."
    )
    decodes = "Single decode" if samples == 1 else f"Mean of {samples} decodes"
    odd = {_title(key): s["odd_keys"] for key, s in results["benchmarks"].items() if s["odd_keys"]}
    lost = "; ".join(f"{title}: {number:,}" for title, number in odd.items())
    paper = (
        " The other rows are the paper's Tables 1 and 2, measured there with LMMs-Eval."
        if results["benchmarks"].keys() & BENCHMARKS
        else ""
    )
    return f"{decodes}, {how}, no reflection; only the answer span counts. {spread}{paper}" + (
        f" Keys that name no option, for the judge alone: {lost}." if lost else ""
    )


def _details(summaries: Summaries) -> str:
    ks = sorted({k for summary in summaries.values() for k in summary["pass@k"]})
    header = ["", "questions", "accuracy [95 % over questions]", "by exact match alone"]
    header += ["well-formed", "cut short", "tokens"]
    header += [f"{name}@{k}" for name in ("pass", "majority") for k in ks]
    rows = []
    for key, summary in summaries.items():
        low, high = summary["interval"]
        row = [_title(key), f"{summary['num_questions']:,}"]
        row += [f"{_score(summary)} [{100 * low:.1f}, {100 * high:.1f}]"]
        row += [_percent(summary[name]) for name in ("exact", "format", "truncated")]
        row += [f"{summary['tokens']:,.0f}"]
        row += [_percent(summary[f"{name}@k"][k]) for name in ("pass", "majority") for k in ks]
        rows.append(row)
    return markdown_table(header, rows)


def _groups(title: str, groups: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [name or "—", f"{group['num_questions']:,}", _percent(group["accuracy"])]
        for name, group in groups.items()
    ]
    table = markdown_table(["", "questions", "accuracy"], rows)
    return f"### {title}\n\n{table}" if len(rows) > 1 else ""


def _title(key: str) -> str:
    return BENCHMARKS[key].title if key in BENCHMARKS else key


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    if not path.is_file():
        raise ValueError(f"{folder}: has no results.json: wanted a finished run of care-train eval")
    found = read_json(path)
    if missing := [key for key in (*_SHARED, "weights", "benchmarks", "macro") if key not in found]:
        raise ValueError(f"{path}: got no {missing[0]!r}, wanted one written by this version")
    return found


def _mean_over(values: Sequence[float], what: str) -> dict[str, Any]:
    """The values per seed or run, their mean, and the half width of its interval (None for one)."""
    mean, half = mean_interval(values)
    half_width = half if len(values) > 1 else None
    return {"accuracy": mean, "half_width": half_width, f"per_{what}": list(values)}


def _mean(records: Sequence[Record], key: str) -> float:
    return fmean(float(record[key]) for record in records)


def _num_questions(records: Sequence[Record]) -> int:
    return len({record["id"] for record in records})


def _score(summary: Mapping[str, Any]) -> str:
    """Percent, with the half width of its interval where there is one."""
    half = summary["half_width"]
    return _percent(summary["accuracy"]) + ("" if half is None else f" ± {100 * half:.1f}")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
