"""What is said of the results: problems, the command's last line, and `docs/gpu.md`.

Every figure of that page was measured on the GPU that it names.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.contest import FLOOR, OURS

_KERNELS_SHOWN = 8
_TILES_SHOWN = 6
_MODE_KEYS = ("dry", "date", "seconds")


def figures_of(results: dict[str, Any], section: str) -> dict[str, Any]:
    """A section's figures; empty where it did not run."""
    return results["sections"].get(section, {}).get("figures", {})


def tables_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every contest's table by its shape, the headline's first."""
    tables: dict[str, dict[str, Any]] = {}
    for section in ("headline", "shapes"):
        for key, value in figures_of(results, section).items():
            if " N=" in key and isinstance(value, dict):
                tables[key] = value
    return tables


def failed_checks(results: dict[str, Any]) -> list[str]:
    """The correctness checks over their tolerance."""
    cases = figures_of(results, "correct").get("cases", {})
    return [name for name, figures in cases.items() if figures["worst"] > 1]


def problems_of(results: dict[str, Any]) -> list[str]:
    """What could not be measured or is not correct; a peer that fails is no problem of ours."""
    problems = [
        f"{name}: {section['status']}"
        for name, section in results["sections"].items()
        if section["status"] != "ok"
    ]
    problems += [f"correct: {name} is over its tolerance" for name in failed_checks(results)]
    tests = figures_of(results, "correct").get("kernel_tests", {})
    problems += [f"kernel tests: {name}" for name in tests.get("failed", [])]
    for name, figures in figures_of(results, "deep").items():
        if isinstance(figures, dict) and figures.get("ok") is False:
            problems.append(f"deep: {name} is over its tolerance")
    for section, outcome in results["sections"].items():
        failed = outcome["figures"].get("failed", {})
        problems += [f"{section}: {what}: {why}" for what, why in failed.items()]
    return problems


def summary_of(results: dict[str, Any]) -> dict[str, Any]:
    """The figures that matter most, in one line's length."""
    machine = figures_of(results, "facts").get("machine", {})
    correct = figures_of(results, "correct")
    cases = correct.get("cases", {})
    model = figures_of(results, "model")
    summary = {key: results[key] for key in _MODE_KEYS if key in results}
    summary |= {
        "device": machine.get("device"),
        "torch": machine.get("torch"),
        "triton": machine.get("versions", {}).get("triton"),
        "sections": {name: outcome["status"] for name, outcome in results["sections"].items()},
        "checks": {"passed": len(cases) - len(failed_checks(results)), "of": len(cases)},
        "kernel_tests": correct.get("kernel_tests", {}).get("counts"),
        "ceilings": figures_of(results, "facts").get("ceilings"),
        "ms": {
            key: {name: row["ms"] for name, row in table.items() if "ms" in row}
            for key, table in tables_of(results).items()
        },
        "table": figures_of(results, "sweep").get("table"),
        "updates": model.get("updates"),
    }
    return summary


class PageError(RuntimeError):
    """There is nothing to write a page from."""


def write_page(results: dict[str, Any], path: Path) -> None:
    """Write the page.

    Raises:
        PageError: the results are a dry run's, or name no GPU.
    """
    if results["dry"]:
        raise PageError("the results are of a dry run: no GPU was measured")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page_of(results))


def page_of(results: dict[str, Any]) -> str:
    """The whole page in Markdown.

    Raises:
        PageError: the results name no GPU.
    """
    machine = figures_of(results, "facts").get("machine")
    if machine is None:
        raise PageError("the results name no GPU: the section `facts` did not run")
    parts = [
        *_head(results, machine),
        *_contests(results),
        *_correctness(results),
        *_model(results),
        *_profile(results),
        *_sweep(results),
        *_quickstart(results),
        *_not_measured(results),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _head(results: dict[str, Any], machine: dict[str, Any]) -> list[str]:
    versions = machine["versions"]
    ceilings = figures_of(results, "facts").get("ceilings")
    lines = [
        "# On a GPU",
        "",
        "Written by `python -m bench.gpu --page docs/gpu.md` from the results of "
        f"`python -m bench.gpu` on {results['date']}: one {machine['device']} "
        f"({machine.get('memory_gib')} GiB, {machine.get('multiprocessors')} multiprocessors), "
        f"Python {machine['python']}, torch {machine['torch']}, triton {versions['triton']}, "
        f"CUDA {machine['cuda']}. Times are medians of calls taken in turns, by CUDA events, with "
        "the 20th and 80th percentile; memory is the peak that PyTorch's allocator saw beyond the "
        "inputs. Peers: "
        + ", ".join(f"{name} {versions[name] or 'not installed'}" for name in machine["peers"])
        + ".",
        "",
    ]
    if ceilings:
        lines += [
            f"Ceilings seen in the same run: a copy moves {ceilings['copy_tb_s']} TB/s, an "
            "8,192 x 8,192 x 8,192 bfloat16 product runs at "
            f"{ceilings['product_tflop_s']} TFLOP/s.",
            "",
        ]
    return lines


def _contests(results: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for key, table in tables_of(results).items():
        head, rows = key.split(" N=")
        lines += [
            f"## Head of Qwen2.5-VL-{head.upper()}, {int(rows):,} rows, bfloat16",
            "",
            "Forward and backward, both gradients, unless said. TFLOP/s count the bare products "
            "that the call stands for.",
            "",
            *_table(
                ("", "ms", "p20-p80", "x floor", "TFLOP/s", "peak MiB", "log-prob RMS", "dX", "dW"),
                (_contest_row(name, row) for name, row in table.items()),
            ),
        ]
    return lines


def _contest_row(name: str, row: dict[str, Any]) -> list[str]:
    def cell(key: str, form: str) -> str:
        return "" if row.get(key) is None else format(row[key], form)

    note = row.get("note")
    spread = f"{row['p20']:.2f}-{row['p80']:.2f}" if "p20" in row else ""
    bold = "**" if name == OURS else ""
    return [
        f"{bold}{name}{bold}" + (f" ({note})" if note else ""),
        cell("ms", ".2f"),
        spread,
        "1.00" if name == FLOOR else cell("of_floor", ".2f"),
        cell("tflop_s", ".0f"),
        _count(row.get("peak_mib")),
        cell("log_prob_rms", ".1e"),
        cell("d_hidden", ".1e"),
        cell("d_weight", ".1e"),
    ]


def _correctness(results: dict[str, Any]) -> list[str]:
    correct, deep = figures_of(results, "correct"), figures_of(results, "deep")
    cases = correct.get("cases", {})
    if not cases and not deep:
        return []
    failed = failed_checks(results)
    lines = ["## Correctness", ""]
    if cases:
        lines += [
            f"{len(cases) - len(failed)} of {len(cases)} checks of the public functions against "
            "float64 pass (bfloat16, float16 and float32; every KL, entropy, softcap, bias, "
            "sequence ratio, skipping, each loss twice for the same bits); an error may be twice "
            "that of torch in the same dtype plus the floor of `tests/kernels/tolerances.py`.",
            "",
        ]
        lines += [f"- over its tolerance: {name}: {cases[name]}" for name in failed]
        lines += [""] if failed else []
    counts = correct.get("kernel_tests", {}).get("counts")
    if counts:
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        lines += [f"`pytest tests/kernels` on the same machine: {told}.", ""]
    rows = [
        [name, *(_number(row.get(key)) for key in ("log_prob_max", "d_hidden", "d_weight"))]
        for name, row in deep.items()
        if isinstance(row, dict) and "ok" in row
    ]
    if rows:
        lines += _table(("against float64", "log-prob, largest", "dX", "dW"), rows)
    return lines


def _model(results: dict[str, Any]) -> list[str]:
    figures = figures_of(results, "model")
    updates, model = figures.get("updates"), figures.get("model", {})
    if not updates:
        return []
    return [
        "## One CARE update of a whole model",
        "",
        f"Qwen2.5-VL's architecture with {model['parameters'] / 1e9:.2f} B parameters and random "
        f"weights, {model['tokens']:,} tokens with images, bfloat16 weights and AdamW states, "
        "gradient checkpointing: forward, loss, backward, step.",
        "",
        *_table(
            ("", "ms", "peak MiB beyond weights and states", "loss", "gradient norm"),
            (
                [
                    name,
                    f"{row['ms']:,.0f}",
                    _count(row["peak_mib_beyond_weights_and_states"]),
                    _number(row["loss"]),
                    _number(row["gradient_norm"]),
                ]
                for name, row in updates.items()
            ),
        ),
    ]


def _profile(results: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, figures in figures_of(results, "profile").items():
        if not isinstance(figures, dict) or "kernels" not in figures:
            continue
        lines += [
            f"### {name}: {figures['ms']} ms on the device",
            "",
            *_table(
                ("kernel", "ms", "share", "launches"),
                (_kernel_row(row) for row in figures["kernels"][:_KERNELS_SHOWN]),
            ),
        ]
    overhead = figures_of(results, "profile").get("overhead_us")
    if overhead is not None:
        lines += [f"A call too small to matter takes {overhead} us.", ""]
    return ["## By kernel", "", *lines] if lines else []


def _kernel_row(row: dict[str, Any]) -> list[Any]:
    share = f"{100 * row['share']:.1f} %"
    return [f"`{row['kernel'][:70]}`", row["ms"], share, row["launches"]]


def _sweep(results: dict[str, Any]) -> list[str]:
    figures = figures_of(results, "sweep")
    lines: list[str] = []
    for key, tiles in figures.items():
        if not key.startswith("tiles, "):
            continue
        timed = {name: row for name, row in tiles.items() if "ms" in row}
        fastest = sorted(timed.items(), key=lambda item: item[1]["ms"])[:_TILES_SHOWN]
        shown = dict(fastest) | {n: row for n, row in timed.items() if "shipped" in n}
        rows = [[name, row["ms"], row["tflop_s"]] for name, row in shown.items()]
        lines += [*_table((key, "ms", "TFLOP/s"), rows)]
    for key, chunks in figures.items():
        if key.startswith("chunk rows, "):
            rows = [[name, row["ms"], _count(row["peak_mib"])] for name, row in chunks.items()]
            lines += _table((key, "ms", "peak MiB"), rows)
    return ["## Tiles and chunks", "", *lines] if lines else []


def _quickstart(results: dict[str, Any]) -> list[str]:
    figures = figures_of(results, "quickstart").get("quickstart")
    if not figures:
        return []
    summary = ", ".join(
        f"{name} {value}"
        for name, value in figures["summary"].items()
        if isinstance(value, int | float)
    )
    told = " ".join(figures["settings"])
    return ["## The quickstart", "", f"`care-train quickstart {told}`: {summary}.", ""]


def _not_measured(results: dict[str, Any]) -> list[str]:
    missing: dict[str, str] = {}
    for name, outcome in results["sections"].items():
        for what, why in outcome["figures"].get("missing", {}).items():
            missing[f"{name}: {what}"] = why
        for what, why in outcome["figures"].get("peers_failed", {}).items():
            missing[what] = why
    lines = [f"- {problem}" for problem in problems_of(results)]
    lines += [f"- {what}: {why}" for what, why in missing.items()]
    return ["## Not measured, or not right", "", *lines] if lines else []


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return [*lines, ""]
