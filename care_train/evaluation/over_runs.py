"""Several trainings, evaluated alike: means over their seeds beside the paper's rows.

The paper trains five seeds (Sec. 4.1). Each evaluation is a run of its own; what their spread says
is another thing than what `eval.seeds`, repeated decodes of one model, say.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from care_train.evaluation.table import comparison, markdown_table, score
from care_train.reporting.interval import mean_interval

_SHARED = ("questions", "decoding", "seeds", "samples")
"""What must be alike for accuracies to be averaged."""


def combine_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """The mean over runs of each benchmark's accuracy, and its 95 % interval.

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
        model = json.dumps(result["weights"])
        if model in models:
            raise ValueError(
                f"{folder}: got the model of {models[model]}, wanted one evaluation of each "
                "training: repeated decodes of one model belong in eval.seeds"
            )
        models[model] = folder
        for key in _SHARED:
            if result[key] != first[key]:
                raise ValueError(
                    f"{folder}: {key}: got {result[key]}, wanted {first[key]} as in {where}"
                )
    benchmarks = {
        name: _over_runs([result["benchmarks"][name]["accuracy"] for result in results])
        | {"num_questions": summary["num_questions"]}
        for name, summary in first["benchmarks"].items()
    }
    macro = first["macro"] and _over_runs([result["macro"]["accuracy"] for result in results])
    runs = [str(folder) for folder in folders]
    return {"runs": runs, "benchmarks": benchmarks, "macro": macro}


def table_markdown(groups: Mapping[str, Mapping[str, Any]]) -> str:
    """`combine_runs` of each group as a row above the paper's, and each run's own numbers."""
    note = (
        "Mean over trainings; ± is the half width of the 95 % interval over them "
        "(1.96 s / sqrt(n)). The other rows are the paper's Tables 1 and 2, measured there with "
        "LMMs-Eval over five seeds."
    )
    named = {f"{name} (n = {len(group['runs'])})": group for name, group in groups.items()}
    sections = [comparison(named), note]
    for name, group in groups.items():
        header = ["", *group["runs"], "mean"]
        rows = [
            [key, *(f"{100 * value:.1f}" for value in summary["per_run"]), score(summary)]
            for key, summary in group["benchmarks"].items()
        ]
        sections += [f"## {name}", markdown_table(header, rows)]
    return "\n\n".join(sections) + "\n"


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    if not path.is_file():
        raise ValueError(f"{folder}: has no results.json: wanted a finished run of care-train eval")
    return json.loads(path.read_text())


def _over_runs(values: Sequence[float]) -> dict[str, Any]:
    _, half = mean_interval(values)
    one = len(values) == 1
    return {"accuracy": fmean(values), "half_width": None if one else half, "per_run": list(values)}
