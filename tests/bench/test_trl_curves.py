"""bench.trl_curves: the same settings on both sides, figures by hand, finished runs reused."""

import json
from argparse import Namespace
from types import SimpleNamespace

import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16,<1.17'")

from bench import trl_curves
from bench.step_case import QUICKSTART
from care_train.config import load_config


def records(accuracies: list[float], sampled: int = 10) -> list[dict]:
    return [
        {"phase": "train", "step": i, "accuracy": a, "seconds": i, "sampled_sequences": sampled}
        for i, a in enumerate(accuracies, start=1)
    ]


def test_figures_by_hand():
    """Tenths of 20 steps are 2; medians and means over all seeds' steps."""
    runs = [records([0.1, 0.3] + [0.5] * 16 + [0.6, 0.8]), records([0.2] * 20, 12)]
    found = trl_curves._figures(runs)
    assert found["accuracy_first_tenth"]["mean"] == pytest.approx(0.2)
    assert found["accuracy_last_tenth"]["mean"] == pytest.approx(0.45)
    assert (found["seconds_per_step"], found["sampled_per_step"]) == (10.5, 11)


def test_trl_gets_our_configuration():
    """Sequences per step, learning rate, reward mix, KL and the tokens that may not be sampled."""
    config = load_config(QUICKSTART, ["train.prompts_per_step=32", "seed=2"])
    found = trl_curves._arguments(config, [5, 6])
    size = found["per_device_train_batch_size"] * found["gradient_accumulation_steps"]
    assert size == 32 * config.rollout.group_size
    assert found["learning_rate"] == config.train.learning_rate
    assert found["reward_weights"] == pytest.approx([0.8, 0.2])
    assert (found["beta"], found["seed"]) == (config.loss.kl_coef, 2)
    assert found["generation_kwargs"] == {"suppress_tokens": [5, 6]}


def test_the_recorder_counts_reflections():
    """TRL's own sequences, and one for each reflected group."""
    config = load_config(QUICKSTART, ["train.prompts_per_step=32"])
    recorder, state = trl_curves._Recorder(config), SimpleNamespace(global_step=3)
    recorder.on_log(None, state, None, {"train_runtime": 1.0})
    logs = {"rewards/accuracy/mean": 0.25, "care/reflected_groups": 0.5}
    recorder.on_log(None, state, None, logs)
    (record,) = recorder.records
    assert (record["step"], record["accuracy"]) == (3, 0.25)
    assert record["sampled_sequences"] == 32 * config.rollout.group_size + 16


def test_a_finished_run_is_reused_and_one_of_another_size_is_not(tmp_path, monkeypatch):
    """By its steps, prompts and model."""
    calls = []

    def run(command, check, env):
        calls.append(command)
        raw = trl_curves._raw(tmp_path / "care-0.json")
        raw.write_text(json.dumps(records([0.5])))

    monkeypatch.setattr(trl_curves.subprocess, "run", run)
    options = Namespace(output=tmp_path, steps=1, prompts=4)
    for _ in range(2):
        found = trl_curves._records(options, tmp_path, "care", 0)
        assert found == records([0.5]) and len(calls) == 1
    options.steps = 2
    trl_curves._records(options, tmp_path, "care", 0)
    assert len(calls) == 2
