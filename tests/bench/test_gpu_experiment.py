"""bench.gpu_experiment: its rows by hand, its budget, and the whole of it on a tiny model."""

import json
import re
import time
from types import SimpleNamespace

import pytest

from bench import gpu_experiment
from bench.gpu_experiment import Budget, arithmetic_rows, derive


def test_derivation_by_hand():
    """Two steps; a slip in the first one is gone on from."""
    assert derive([17, 25, 50], ["+", "-"], (0, 0)) == ("17 + 25 = 42, 42 - 50 = -8", "-8")
    assert derive([17, 25, 50], ["+", "-"], (10, 0)) == ("17 + 25 = 52, 52 - 50 = 2", "2")


def test_rows_hold_together():
    """The answer is the question's, one step of the failed rationale is off, splits are apart."""
    seen = {}
    for split in ("train", "test"):
        rows = arithmetic_rows(300, split)
        assert rows == arithmetic_rows(301, split)[:300]
        for row in rows:
            expression = re.fullmatch(r"What is ([\d +-]+)\?", row["prompt"])
            assert expression is not None
            first, *terms = re.findall(r"[+-]? ?\d+", expression[1])
            value = int(first) + sum(int(term.replace(" ", "")) for term in terms)
            assert value == int(row["answer"]) != int(row["failed_answer"])
            assert row["rationale"].endswith(f"= {row['answer']}")
            assert row["failed_rationale"].endswith(f"= {row['failed_answer']}")
        seen[split] = {tuple(re.findall(r"\d+", row["prompt"])) for row in rows}
    assert not seen["train"] & seen["test"]


@pytest.mark.parametrize(
    ("seconds", "sequences", "stops"),
    ((60, None, [False, False, False]), (-1, None, [True]), (60, 20, [False, True])),
)
def test_a_budget_ends_training(seconds: float, sequences: int | None, stops: list[bool]):
    """At its time, or with the step that has sampled enough."""
    budget = Budget(time.monotonic() + seconds, sequences)
    for stop in stops:
        control = SimpleNamespace(should_training_stop=False)
        budget.on_log(None, None, control, logs={"sampled_sequences": 10.0})
        assert control.should_training_stop == stop


def test_it_runs_whole(tmp_path, capsys, monkeypatch):
    """Both algorithms from one cold start, GRPO with CARE's budget; the last line is JSON.

    Without a GPU and --quick it says how to try it, and measures nothing.
    """
    monkeypatch.setattr(gpu_experiment.torch.cuda, "is_available", lambda: False)
    assert gpu_experiment.main([]) == 1
    assert "--quick" in capsys.readouterr().err
    words = ["--quick", "--model", "tiny-qwen2", "--output", str(tmp_path)]
    assert gpu_experiment.main([*words, "--overrides", "rollout.max_new_tokens=8"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["matched"] and found["quick"] and found["versions"]["device"]
    assert found["care"]["accuracy_before"] == found["grpo"]["accuracy_before"]
    assert found["care"]["steps"] == 2 and found["care"]["decoded_tokens"] > 0
    assert 0 <= found["grpo"]["sampled_sequences"] - found["care"]["sampled_sequences"] < 8
