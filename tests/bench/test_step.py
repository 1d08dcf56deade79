"""`bench.step` in miniature: real trainers, real TRL, a few sequences."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import step
from bench.step_case import Case, FixedLengthVerifier, StepFigures, case_config
from care_train.data import Sample
from care_train.training.timer import MODEL_PARTS

_SIZE = ["--prompts", "2", "--group-size", "4", "--length", "6", "--micro-batch", "8"]
_SHORT = ["--rounds", "1", "--cold-steps", "0", "--no-scaling"]
_OURS = ["--ours", "care-transformers", "grpo-transformers"]


def _run(monkeypatch: Any, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["bench.step", *arguments])
    return step.main()


def test_the_json_holds_the_ratio_the_overhead_and_the_shares(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    """TRL and ours step in turns, all sample equally many tokens per sequence, shares add up."""
    assert _run(monkeypatch, *_SIZE, *_SHORT, *_OURS, "--folder", str(tmp_path)) == 0
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
    assert _run(monkeypatch, *_SIZE, *_SHORT, *_OURS, "--folder", str(tmp_path)) == 1
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
