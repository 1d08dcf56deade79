"""`care-train table`: trainings of several seeds as one row beside the paper's."""

import json
import re
from pathlib import Path

import pytest

from bench.protocol_fixtures import math_vision_rows, mathverse_rows, write_parquet
from care_train.cli import main
from care_train.evaluation.table import (
    combine_runs,
    macro_average,
    results_markdown,
    summarize,
    trainings_markdown,
)
from care_train.models.tiny import build_tiny_model

RUNS = {"one": 1, "two": 2, "again": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two trainings' evaluations, one of them done twice, and one with other decodes."""
    out = tmp_path_factory.mktemp("runs")
    rows = {"math_vision": math_vision_rows(), "mathverse": mathverse_rows()}
    sources = {n: str(write_parquet(n, r, out / f"{n}.parquet")) for n, r in rows.items()}
    for seed in (1, 2):
        build_tiny_model("tiny-qwen2.5-vl", out / f"model-{seed}", seed=seed, hidden_size=32)
    for name, seed in (*RUNS.items(), ("other", 2)):
        arguments = ["eval", "--benchmarks", ",".join(rows), f"eval.sources={json.dumps(sources)}"]
        arguments += [f"model.path={out / f'model-{seed}'}", f"output_dir={out}", f"name={name}"]
        arguments += ["rollout.max_new_tokens=4", "prompt.system=null", "logging.progress=false"]
        decodes = "eval.seeds=[3]" if name == "other" else "eval.seeds=[0,1]"
        assert main([*arguments, decodes]) == 0
    return out


def test_trainings_become_one_row(runs, capsys):
    """Real runs of two models: their row, each one's numbers, the paper's rows."""
    assert main(["table", f"tiny={runs / 'one'},{runs / 'two'}", f"single={runs / 'one'}"]) == 0
    table = capsys.readouterr().out
    assert "| tiny (n = 2) | — | 0.0 ± 0.0 | 0.0 ± 0.0 | — |" in table
    assert "| single (n = 1) | — | 0.0 | 0.0 | — |" in table
    assert "| Qwen2.5-VL-7B + CARE | 74.7 |" in table
    assert f"|  | {runs / 'one'} | {runs / 'two'} | mean |" in table


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("one", "again"), r"again: got the model of .*one, wanted one evaluation of each"),
        (("one", "other"), r"other: seeds: got \[3\], wanted \[0, 1\] as in .*one"),
        (("one", "none"), r"none: has no results.json"),
    ],
)
def test_only_like_runs_are_averaged(names, message, runs, capfd):
    """The same questions and decodes of different models; anything else is named."""
    assert main(["table", "x=" + ",".join(str(runs / name) for name in names)]) == 2
    assert re.search(message, capfd.readouterr().err)


def test_groups_need_names(capfd):
    """`NAME=RUN,RUN`."""
    assert main(["table", "runs/one"]) == 2
    assert "got 'runs/one', wanted NAME=RUN,RUN" in capfd.readouterr().err


def test_the_interval_is_over_trainings(tmp_path):
    """Mean and 1.96 s / sqrt(n) of the runs' means, of benchmarks and of their macro average."""
    shared = {"questions": {}, "decoding": {}, "seeds": [0], "samples": 1}
    for number, (one, two) in enumerate([(0.70, 0.2), (0.74, 0.3), (0.78, 0.1)]):
        benchmarks = {
            name: {"accuracy": value, "num_questions": 100}
            for name, value in (("mathvista", one), ("mmmu", two))
        }
        found = shared | {"weights": number, "benchmarks": benchmarks}
        folder = tmp_path / str(number)
        folder.mkdir()
        text = json.dumps(found | {"macro": {"accuracy": (one + two) / 2}})
        (folder / "results.json").write_text(text)
    combined = combine_runs([tmp_path / str(number) for number in range(3)])
    assert combined["benchmarks"]["mathvista"]["accuracy"] == pytest.approx(0.74)
    assert combined["benchmarks"]["mathvista"]["half_width"] == pytest.approx(1.96 * 0.04 / 3**0.5)
    assert combined["macro"]["accuracy"] == pytest.approx(0.47)
    assert "| mathvista | 70.0 | 74.0 | 78.0 | 74.0 ± 4.5 |" in trainings_markdown({"x": combined})


def test_names_in_the_results_are_shown_to_the_letter():
    """HTML, line breaks and pipes in a run's or a subject's name make no part of the page."""
    hostile = "a\n# b | <img src=x>"
    record = {"id": "1", "seed": 0, "sample": 0, "vote": "A", "finished": True, "tokens": 1}
    record |= dict.fromkeys(("accuracy", "exact", "format"), 1.0)
    records = [record | {"group": hostile}, record | {"id": "2", "group": "other"}]
    summary = summarize(records, [1]) | {"odd_keys": 1}
    results = {"benchmarks": {"mmmu": summary}, "macro": macro_average({"mmmu": summary})}
    results |= {"decoding": {"greedy": True}, "seeds": [0], "samples": 1}
    text = results_markdown(hostile, results)
    assert text.startswith(r"# a # b \| &lt;img src=x&gt;: accuracy, percent")
    assert r"| a # b \| &lt;img src=x&gt; | 1 | 100.0 |" in text and "<img" not in text
    assert "Keys that name no option, for the judge alone: MMMU val: 1." in text
