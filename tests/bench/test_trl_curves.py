"""bench.trl_curves: the same settings on both sides, figures by hand, finished runs reused."""

import json
from argparse import Namespace
from types import SimpleNamespace

import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16,<1.17'")

from bench import trl_curves
from bench.step_case import QUICKSTART
from care_train.config import load_config
from care_train.data import Sample


def run(after: float, seconds: list[float], tokens: int = 100) -> dict:
    records = [
        {"phase": "train", "step": i, "accuracy": 0.5, "seconds": s}
        | {"decoded_tokens": tokens, "sampled_sequences": 10}
        for i, s in enumerate(seconds, start=1)
    ]
    return {"accuracy_before": 0.25, "accuracy_after": after, "records": records}


def test_figures_by_hand():
    """Means over seeds; of a run's steps the first, which warms up, is left out."""
    ours = trl_curves._figures([run(0.4, [9, 1, 3]), run(0.6, [9, 2, 2])])
    assert ours["accuracy_before"]["mean"] == 0.25
    assert ours["accuracy_after"]["mean"] == pytest.approx(0.5)
    assert ours["accuracy_after"]["interval"] == pytest.approx(0.196)
    assert (ours["seconds_per_step"], ours["ms_per_token"]) == (2, 20)
    peer = trl_curves._figures([run(0.6, [9, 3]), run(0.7, [9, 3])])
    found = trl_curves._comparison(ours, peer)
    assert found["seconds_per_token_ratio"] == 1.5
    assert found["within_our_interval"]
    assert found["accuracy_difference"]["mean"] == pytest.approx(0.15)
    far = trl_curves._figures([run(0.7, [9, 3]), run(0.7, [9, 3])])
    assert not trl_curves._comparison(ours, far)["within_our_interval"]


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
    """What the rewards were asked for between two logs, TRL's completions and reflections."""
    config = load_config(QUICKSTART)
    rows = [Sample("0", "what shape?", "circle")]
    rewards = trl_curves._Rewards(config, rows)
    recorder, state = trl_curves._Recorder(rewards), SimpleNamespace(global_step=3)
    recorder.on_log(None, state, None, {"train_runtime": 1.0})
    text = "<think>it is round</think> <answer>circle</answer>"
    completions = [[{"content": text}], [{"content": "circle"}]]
    for ids in ([[1, 2], [3]], [[4], [5, 6]]):
        assert rewards.accuracy(completions, ids, [0, 0]) == [1, 0]
    assert rewards.form(completions, [0, 0]) == [1, 0]
    recorder.on_log(None, state, None, {"rewards/accuracy/mean": 0.25})
    recorder.on_log(None, state, None, {"rewards/accuracy/mean": 0.25})
    record, empty = recorder.records
    assert (record["step"], record["accuracy"]) == (3, 0.25)
    assert (record["sampled_sequences"], record["decoded_tokens"]) == (4, 6)
    assert empty["decoded_tokens"] == 0


def test_a_finished_run_is_reused_and_one_of_another_size_is_not(tmp_path, monkeypatch):
    """By its steps, prompts and model."""
    calls = []

    def start(command, check, env):
        calls.append(command)
        trl_curves._raw(tmp_path / "care-0.json").write_text(json.dumps(run(0.5, [1])))

    monkeypatch.setattr(trl_curves.subprocess, "run", start)
    options = Namespace(output=tmp_path, steps=1, prompts=4, questions=5)
    for _ in range(2):
        found = trl_curves._finished(options, tmp_path, "care", 0)
        assert found.items() >= run(0.5, [1]).items() and len(calls) == 1
    options.steps = 2
    trl_curves._finished(options, tmp_path, "care", 0)
    assert len(calls) == 2
