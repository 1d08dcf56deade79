"""bench.step and bench.trl_curves: real trainers and real TRL in miniature, figures by hand."""

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16,<1.17'")

from bench import step, trl_curves
from bench.step_ours import QUICKSTART, Case, FixedLengthVerifier, StepFigures, case_config
from care_train.config import load_config
from care_train.data import Sample
from care_train.training.timer import MODEL_PARTS

_SIZE = ["--prompts", "2", "--group-size", "4", "--length", "6", "--micro-batch", "8"]
_SHORT = ["--rounds", "1", "--cold-steps", "0", "--no-scaling"]
_OURS = ["--ours", "care-transformers", "grpo-transformers"]


def test_the_json_holds_the_ratio_the_overhead_and_the_shares(capsys: Any, tmp_path: Path) -> None:
    """TRL and ours step in turns, all sample equally many tokens per sequence, shares add up."""
    assert step.main([*_SIZE, *_SHORT, *_OURS, "--folder", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("care-transformers" in line for line in lines[:-1])
    figures = json.loads(lines[-1])
    assert figures["contenders"].keys() == {"trl", "care-transformers", "grpo-transformers"}
    assert figures["ratio_to_trl"] == figures["contenders"]["care-transformers"]["ratio_to_trl"] > 0
    assert figures["grpo_ratio_to_trl"] > 0
    assert 0 < figures["overhead"] < 1
    for contender in figures["contenders"].values():
        assert sum(contender["shares"].values()) == pytest.approx(1, abs=0.02)
    overhead = 1 - sum(figures["shares"].get(part, 0.0) for part in MODEL_PARTS)
    assert figures["overhead"] == pytest.approx(overhead, abs=0.01)


def test_what_cannot_be_measured_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    """A contender that fails leaves no figures, names the cause and exits with 1."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(step, "OurTrainer", fail)
    assert step.main([*_SIZE, *_SHORT, *_OURS, "--folder", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert "could not measure: out of order" in output.err
    assert "ratio_to_trl" not in output.out


def test_the_ratio_is_of_tokens_per_second_in_the_same_round() -> None:
    """A slow moment of the machine slows a round of both, and the median of the rounds stands."""

    def taken(seconds: list[float], tokens: int) -> list[StepFigures]:
        return [StepFigures(s, tokens, {"generate": s}, 4) for s in seconds]

    counted = {"trl": taken([2.0, 20.0, 2.0], 100), "ours": taken([1.0, 10.0, 4.0], 110)}
    results = {name: step.summarize(name, figures, counted) for name, figures in counted.items()}
    assert results["ours"].ratio == pytest.approx(2.2)
    assert results["ours"].ratios == pytest.approx([2.2, 2.2, 0.55])
    assert results["trl"].ratio is None and results["ours"].overhead == pytest.approx(0)


def test_a_response_that_goes_on_is_scored_up_to_its_answer() -> None:
    """Without EOS, what follows the first answer is not the response's."""
    config = case_config(Case())
    verifier = FixedLengthVerifier(config.prompt, config.reward)
    sample = Sample(id="0", prompt="?", answer="blue")
    text = "<think>a</think> <answer>blue</answer>"
    for more in ("", " <answer>red</answer>", "blue"):
        score = verifier.score(text + more, sample, finished=False)
        assert (score.accuracy, score.format_score) == (1.0, 1.0)
    assert verifier.score("<answer>blue", sample, finished=False).accuracy == 0.0


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


@pytest.mark.parametrize(
    ("algorithm", "loss_type", "level"),
    [("grpo", "grpo", "token"), ("dapo", "dapo", "token"), ("gspo", "grpo", "sequence")],
)
def test_trl_gets_the_algorithms_loss(algorithm, loss_type, level):
    """DAPO's mean over tokens, GSPO's ratio of a sequence, each with its range and KL (Table 5)."""
    config = load_config(QUICKSTART, [f"algorithm={algorithm}"])
    found = trl_curves._arguments(config, [])
    assert (found["loss_type"], found["importance_sampling_level"]) == (loss_type, level)
    ranges = (found["epsilon"], found["epsilon_high"], found["beta"])
    assert ranges == (config.loss.clip_eps_low, config.loss.clip_eps_high, config.loss.kl_coef)


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
        made = {"case": trl_curves._case(options, tmp_path)} | run(0.5, [1])
        (tmp_path / "care-0.json").write_text(json.dumps(made))

    monkeypatch.setattr(trl_curves.subprocess, "run", start)
    options = Namespace(output=tmp_path, steps=1, prompts=4, questions=5)
    for _ in range(2):
        found = trl_curves._finished(options, tmp_path, "care", 0)
        assert found.items() >= run(0.5, [1]).items() and len(calls) == 1
    options.steps = 2
    trl_curves._finished(options, tmp_path, "care", 0)
    assert len(calls) == 2
