"""metrics.jsonl and the trackers."""

import importlib
import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from care_train.config import LoggingSettings
from care_train.reporting import MetricsLogger, SampleRecord, read_metrics

_QUIET = LoggingSettings(report_to=[])

_FAKE_TRACKER = """
calls = []

class Run:
    def define_metric(self, name, step_metric): calls.append(("define", name, step_metric))
    def log(self, values): calls.append(("log", values))
    def finish(self): calls.append(("finish",))

def init(**kwargs):
    calls.append(("init", kwargs))
    return Run()

def log(values, step): calls.append(("log", values, step))
def finish(): calls.append(("finish",))

class Table:
    def __init__(self, columns, data): self.rows = [dict(zip(columns, row)) for row in data]

class Image:
    def __init__(self, image): self.size = image.size

Text = str
"""
_SAMPLES = [
    SampleRecord(3, "what color?", f"<answer>{word}</answer>", "red", float(word == "red"), role)
    for word, role in (("red", "anchor"), ("blue", "hard_negative"))
]


def _logger(run_dir: Path, settings: LoggingSettings = _QUIET) -> MetricsLogger:
    return MetricsLogger(run_dir, settings, {"seed": 0})


def test_records_come_back(tmp_path: Path) -> None:
    """At once, with phase, step and time; NaN and infinities are null: any parser reads a line."""
    with _logger(tmp_path) as metrics:
        metrics.log(1, {"reward": 0.5, "groups": 4, "loss": math.nan, "kl": math.inf})
        metrics.log(1, {"accuracy": 0.25}, phase="eval")
        train, evaluation = read_metrics(tmp_path / "metrics.jsonl")
    assert train.pop("time") > 0
    numbers = {"reward": 0.5, "groups": 4, "loss": None, "kl": None}
    assert train == {"phase": "train", "step": 1} | numbers
    assert (evaluation["phase"], evaluation["accuracy"]) == ("eval", 0.25)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize(
    ("second", "kept"),
    [
        ('{"phase": "train", "st', [1, 3]),  # a kill in the middle of a line
        ("{", [1, 3]),
        ('{"phase": "train", "step": 2}', [1, 2, 3]),  # whole but for its newline
    ],
)
def test_a_cut_last_line(tmp_path: Path, second: str, kept: list[int]) -> None:
    """That record alone is lost, if it is not whole, and the next run goes on."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"phase": "train", "step": 1}}\n{second}')
    assert [record["step"] for record in read_metrics(path)] == kept[:-1]
    with _logger(tmp_path) as metrics:
        metrics.log(3, {})
    assert [record["step"] for record in read_metrics(path)] == kept


@pytest.mark.parametrize("bad", ["{not json", "[1, 2]", '{"step": 1}', ""])
def test_other_bad_line_is_named(tmp_path: Path, bad: str) -> None:
    """A bad line that no kill explains is an error naming file and line."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"phase": "train", "step": 1}}\n{bad}\n{{"phase": "train", "step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        read_metrics(path)


def test_a_restart_replaces_repeated_steps(tmp_path: Path) -> None:
    """A run that restarts earlier logs steps again: the last record counts, in step order, as in
    TensorBoard, which has a folder per phase."""
    for first, reward in ((1, 0.0), (3, 1.0)):
        with _logger(tmp_path, LoggingSettings()) as metrics:
            for step in range(first, 5):
                metrics.log(step, {"reward": reward})
            metrics.log(4, {"accuracy": reward}, phase="eval")
    wanted = [(1, 0), (2, 0), (3, 1), (4, 1)]
    train = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["phase"] == "train"]
    assert [(r["step"], r["reward"]) for r in train] == wanted
    events = EventAccumulator(str(tmp_path / "tensorboard" / "train")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == wanted
    assert (tmp_path / "tensorboard" / "eval").is_dir()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    """A disabled logger leaves no trace, whatever it is asked for; no metric is called step."""
    settings = LoggingSettings(report_to=["wandb"])
    with MetricsLogger(tmp_path / "run", settings, {}, enabled=False) as metrics:
        metrics.log(1, {"reward": 0.5})
        with pytest.raises(ValueError, match="reserved name 'step'"):
            metrics.log(1, {"step": 2.0})
    assert not (tmp_path / "run").exists()


def test_a_missing_tracker_is_explained(tmp_path: Path, monkeypatch) -> None:
    """A tracker asked for but not installed: the error names the setting and the remedy."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"report_to: got mlflow.*`pip install mlflow`"):
        _logger(tmp_path, replace(_QUIET, report_to=["mlflow"]))
    assert not (tmp_path / "metrics.jsonl").exists()


def _two_starts(run_dir: Path, tracker: str) -> None:
    """Log a number and samples of two steps, the second after a restart."""
    for step in (1, 2):
        with _logger(run_dir, LoggingSettings(report_to=[tracker])) as metrics:
            metrics.log(step, {"reward": step / 4})
            records = [replace(one, step=step) for one in _SAMPLES]
            metrics.samples(records, lambda: [Image.new("RGB", (8, 8), "red")])


@pytest.mark.parametrize("package", ["wandb", "swanlab", "trackio"])
def test_a_tracked_run_survives_a_restart(package: str, tmp_path: Path, monkeypatch) -> None:
    """A package that only records its calls: the second start asks for the run of the first, each
    number comes at its step, samples with their images, and the run ends."""
    (tmp_path / f"{package}.py").write_text(_FAKE_TRACKER)
    # Set first, so that what is there now, or that nothing is, comes back after the test.
    monkeypatch.setitem(sys.modules, package, None)
    del sys.modules[package]
    monkeypatch.syspath_prepend(tmp_path)
    _two_starts(tmp_path / "run", package)
    calls = importlib.import_module(package).calls
    first, again = (call[1] for call in calls if call[0] == "init")
    assert first == again and first["resume"] == "allow" and first["project"] == "care"
    assert first["config"] == {"seed": 0} and calls[-1] == ("finish",)
    assert "run" in (first.get("name"), first.get("experiment_name"))
    (shown,) = (call[1] for call in calls[-4:] if call[0] == "log" and "samples" in call[1])
    if package == "wandb":  # each phase has its own step axis
        assert ("define", "train/*", "train/step") in calls and first["id"]
        assert ("log", {"train/step": 2, "train/reward": 0.5}) in calls
    else:
        assert ("log", {"train/reward": 0.5}, 2) in calls
    if package == "swanlab":  # text beside its images
        assert first["id"] and shown["images"][0].size == (8, 8)
        assert all(sample.completion in shown["samples"] for sample in _SAMPLES)
    else:
        rows = shown["samples"].rows
        assert [row["role"] for row in rows] == ["anchor", "hard_negative"]
        assert rows[1]["completion"] == _SAMPLES[1].completion
        assert rows[1]["images"][0].size == (8, 8)


@pytest.mark.parametrize("package", ["wandb", "swanlab", "mlflow", "trackio"])
def test_the_package_itself_keeps_one_run_offline(
    package: str, tmp_path: Path, monkeypatch
) -> None:
    """Where it is installed: both starts are one run of its own store on this disk."""
    for name, value in {
        "WANDB_MODE": "offline",
        "SWANLAB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }.items():
        monkeypatch.setenv(name, value)
    module = pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    _two_starts(run_dir, package)
    if package == "wandb":
        found = {run.name.rpartition("-")[2] for run in run_dir.glob("wandb/offline-run-*")}
    elif package == "swanlab":
        found = {run.name for run in run_dir.glob("swanlab/run-*/run-*.swanlab")}
    elif package == "trackio":
        found = {run.name for run in module.Api().runs("care")}
    else:
        runs = module.search_runs(experiment_names=["care"], output_format="list")
        found = {run.info.run_id for run in runs}
        history = module.MlflowClient().get_metric_history(runs[0].info.run_id, "train/reward")
        assert [(one.step, one.value) for one in history] == [(1, 0.25), (2, 0.5)]
    assert len(found) == 1
