"""What is said of the results: problems, the command's last line, and `docs/gpu.md`.

Every figure of that page was measured on the GPU that it names. A section's figures are written as
they were recorded: what is one record by name becomes a table.
"""

from collections.abc import Mapping
from itertools import islice
from typing import Any

from bench.gpu.contest import OURS, OURS_START

_LONGEST_TABLE = 16
_SECTIONS = {
    "correct": "Correctness: `pytest tests/kernels` on the device",
    "headline": "The loss beside its peers: forward and backward, both gradients, unless said",
    "shapes": "From few rows to many",
    "deep": "More than 2^31 logits, and real heads, against float64",
    "model": "One CARE update of a whole Qwen2.5-VL with random weights and images",
    "profile": "By kernel",
    "sweep": "Tiles and chunks",
    "quickstart": "The quickstart",
}


def figures_of(results: dict[str, Any], section: str) -> dict[str, Any]:
    """A section's figures; empty where it did not run."""
    return results["sections"].get(section, {}).get("figures", {})


def tables_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every contest's table by its shape, the headline's first."""
    found = figures_of(results, "headline") | figures_of(results, "shapes")
    return {key: table for key, table in found.items() if " N=" in key}


def problems_of(results: dict[str, Any]) -> list[str]:
    """What could not be measured or is not correct; a peer that fails is no problem of ours."""
    problems = [
        f"{name}: {section['status']}"
        for name, section in results["sections"].items()
        if section["status"] != "ok"
    ]
    tests = figures_of(results, "correct").get("kernel_tests", {})
    problems += [f"kernel tests: {name}" for name in tests.get("failed", [])]
    for name, figures in figures_of(results, "deep").items():
        if isinstance(figures, dict) and figures.get("ok") is False:
            problems.append(f"deep: {name} is over its tolerance")
    problems += [
        f"{key}: {name}: {row['note']}"
        for key, table in tables_of(results).items()
        for name, row in table.items()
        if name.startswith(OURS_START) and "note" in row
    ]
    for section, outcome in results["sections"].items():
        failed = outcome["figures"].get("failed", {})
        problems += [f"{section}: {what}: {why}" for what, why in failed.items()]
    return problems


def summary_of(results: dict[str, Any]) -> dict[str, Any]:
    """The figures that matter most, in one line's length."""
    facts = figures_of(results, "facts")
    machine = facts.get("machine", {})
    return {
        **{key: results[key] for key in ("dry", "date", "seconds") if key in results},
        "device": machine.get("device"),
        "torch": machine.get("torch"),
        "triton": machine.get("versions", {}).get("triton"),
        "sections": {name: outcome["status"] for name, outcome in results["sections"].items()},
        "kernel_tests": figures_of(results, "correct").get("kernel_tests", {}).get("counts"),
        "ceilings": facts.get("ceilings"),
        "ms": {
            key: {name: row["ms"] for name, row in table.items() if "ms" in row}
            for key, table in tables_of(results).items()
        },
        "table": figures_of(results, "sweep").get("table"),
        "updates": figures_of(results, "model").get("updates"),
    }


class PageError(RuntimeError):
    """There is nothing to write a page from."""


def page_of(results: dict[str, Any]) -> str:
    """The whole page in Markdown.

    Raises:
        PageError: the results are a dry run's, or name no GPU.
    """
    if results["dry"]:
        raise PageError("the results are of a dry run: no GPU was measured")
    machine = figures_of(results, "facts").get("machine")
    if machine is None:
        raise PageError("the results name no GPU: the section `facts` did not run")
    lines = _head(results, machine)
    for section, title in _SECTIONS.items():
        figures = figures_of(results, section)
        shown = [line for item in figures.items() for line in _figure(*item)]
        lines += [f"## {title}", "", *shown, ""] if shown else []
    left_out = [f"- {problem}" for problem in problems_of(results)]
    for section, outcome in results["sections"].items():
        for kind in ("missing", "peers_failed"):
            reasons = outcome["figures"].get(kind, {})
            left_out += [f"- {section}: {what}: {why}" for what, why in reasons.items()]
    lines += ["## Not measured, or not right", "", *left_out] if left_out else []
    return "\n".join(lines).rstrip() + "\n"


def _head(results: dict[str, Any], machine: dict[str, Any]) -> list[str]:
    versions = machine["versions"]
    ceilings = figures_of(results, "facts").get("ceilings", {})
    peers = ", ".join(f"{name} {versions[name] or 'not installed'}" for name in machine["peers"])
    return [
        "# On a GPU",
        "",
        "Written by `python -m bench.gpu --page docs/gpu.md` from the results of "
        f"`python -m bench.gpu` on {results['date']}: one {machine['device']} "
        f"({machine.get('memory_gib')} GiB, {machine.get('multiprocessors')} multiprocessors), "
        f"Python {machine['python']}, torch {machine['torch']}, triton {versions['triton']}, "
        f"CUDA {machine['cuda']}. `ms` is the median of calls taken in turns, by CUDA events, "
        "beside the 20th and 80th percentile; `of_floor` is relative to three bare matrix "
        "products, whose FLOPs `tflop_s` counts; `peak_mib` is what PyTorch's allocator saw beyond "
        f"the inputs; errors are against float64. Peers: {peers}.",
        "",
        *[f"- {name} {value}: a ceiling seen in the same run" for name, value in ceilings.items()],
        "",
    ]


def _figure(name: str, value: Any) -> list[str]:
    """One recorded figure: a record by name as a table, a record as its numbers, a number."""
    if name in ("failed", "missing", "peers_failed"):
        return []
    if isinstance(value, dict) and "kernels" in value:
        rows = {f"`{row['kernel'][:70]}`": row for row in value["kernels"]}
        return _table(f"{name}, {value['ms']} ms on the device", rows)
    if isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):
        return _table(name, value)
    if isinstance(value, dict):
        return [f"- {name}: {', '.join(f'{key} {_cell(part)}' for key, part in value.items())}"]
    return [f"- {name}: {_cell(value)}"]


def _table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows.values() for key in row if key != "kernel"))
    lines = ["", f"| {title} | {' | '.join(columns)} |", f"|{'---|' * (1 + len(columns))}"]
    for name, row in islice(rows.items(), _LONGEST_TABLE):
        bold = "**" if name == OURS else ""
        cells = [_cell(row.get(column)) for column in columns]
        lines.append(f"| {bold}{name}{bold} | {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if is_count else f"{value:.4g}" if isinstance(value, float) else str(value)
