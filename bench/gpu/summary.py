"""The last line of the command, and what counts as a problem."""

from typing import Any

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
