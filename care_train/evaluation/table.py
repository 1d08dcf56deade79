"""A run's numbers as Markdown, beside the paper's."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from care_train.evaluation.benchmarks import BENCHMARKS
from care_train.evaluation.paper import TABLE_1, TABLE_2, Row

Summaries = Mapping[str, Mapping[str, Any]]


def results_markdown(name: str, results: Mapping[str, Any]) -> str:
    """The results' file for people: this run, the paper's rows, and what lies behind the numbers.

    Args:
        name: the run's.
        results: what `evaluate_benchmarks` returns.
    """
    summaries: Summaries = results["benchmarks"]
    sections = [
        f"# {name}: accuracy, percent",
        comparison({f"{name} (this run)": results}),
        _note(results),
        "## Behind the numbers",
        _details(summaries),
        *(_group_section(results, key) for key in summaries),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def comparison(own: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows of ours by their names, above the paper's.

    Args:
        own: of each row the `benchmarks` with `accuracy` and `half_width`, and their `macro`.
    """
    header = ["", *(b.title for b in BENCHMARKS.values()), "macro average"]
    rows = [_own_row(name, results) for name, results in own.items()]
    rows += map(_paper_row, sorted(TABLE_1 + TABLE_2, key=_backbone))
    return markdown_table(header, rows)


def _own_row(name: str, results: Mapping[str, Any]) -> list[str]:
    summaries: Summaries = results["benchmarks"]
    row = [f"**{name}**"]
    row += [score(summaries[key]) if key in summaries else "—" for key in BENCHMARKS]
    macro = results["macro"]
    return [*row, score(macro) if macro and set(BENCHMARKS) <= set(summaries) else "—"]


def _note(results: Mapping[str, Any]) -> str:
    settings, count = results["decoding"], len(results["seeds"])
    how = "greedy" if settings["greedy"] else f"temperature {settings['temperature']:g}"
    spread = (
        f"± is the half width of the 95 % interval over {count} seeds (1.96 s / sqrt(n))."
        if count > 1
        else "One seed: no interval over seeds; that over questions is below."
    )
    decodes = (
        "Single decode" if results["samples"] == 1 else f"Mean of {results['samples']} decodes"
    )
    return (
        f"{decodes}, {how}, no reflection; exact match in the answer span. {spread} The other "
        "rows are the paper's Tables 1 and 2, measured there with LMMs-Eval."
    )


def _details(summaries: Summaries) -> str:
    ks = sorted({k for summary in summaries.values() for k in summary["pass@k"]})
    header = ["", "questions", "accuracy [95 % over questions]", "by exact match alone"]
    header += ["well-formed", "cut short", "tokens", *(f"pass@{k}" for k in ks)]
    header += [f"majority@{k}" for k in ks]
    rows = []
    for key, summary in summaries.items():
        low, high = summary["interval"]
        rows.append(
            [
                BENCHMARKS[key].title if key in BENCHMARKS else key,
                f"{summary['num_questions']:,}",
                f"{score(summary)} [{100 * low:.1f}, {100 * high:.1f}]",
                *(_percent(summary[name]) for name in ("exact", "format", "truncated")),
                f"{summary['tokens']:,.0f}",
                *(_percent(summary["pass@k"][k]) for k in ks),
                *(_percent(summary["majority@k"][k]) for k in ks),
            ]
        )
    return markdown_table(header, rows)


def _group_section(results: Mapping[str, Any], key: str) -> str:
    groups = results["benchmarks"][key]["groups"]
    if len(groups) < 2:
        return ""
    rows = [
        [name or "—", f"{group['num_questions']:,}", _percent(group["accuracy"])]
        for name, group in groups.items()
    ]
    title = BENCHMARKS[key].title if key in BENCHMARKS else key
    return f"### {title}\n\n{markdown_table(['', 'questions', 'accuracy'], rows)}"


def _paper_row(row: Row) -> list[str]:
    name, values = row
    known = [value for value in values if value is not None]
    macro = f"{fmean(known):.2f}" if len(known) == len(values) else "—"
    return [name, *("—" if value is None else f"{value:.1f}" for value in values), macro]


def _backbone(row: Row) -> bool:
    """Rows of the paper's own backbones first: those a run is compared with."""
    return not row[0].startswith(("Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "Qwen3-VL-8B-Instruct"))


def score(summary: Mapping[str, Any]) -> str:
    """Percent, with the half width of its interval where there is one."""
    half = summary["half_width"]
    return _percent(summary["accuracy"]) + ("" if half is None else f" ± {100 * half:.1f}")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Numbers aligned to the right, the first column to the left."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(c.replace("|", r"\|") for c in row) + " |" for row in lines)
