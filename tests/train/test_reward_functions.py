"""Users' reward functions through a real optimiser step of `care-train train`."""

import json
from pathlib import Path
from statistics import fmean, pstdev

import pytest

from tests.train.runs import SMALL, FastRun, data_arguments

REWARDS = """
import json

def odd(text, level, seen):
    value = sum(map(ord, text)) % 2
    with open(seen, "a") as log:
        log.write(json.dumps([value, level == "easy"]) + "\\n")
    return float(value)


def easyr1(reward_inputs, seen):
    values = [odd(one["response"], one["level"], seen) for one in reward_inputs]
    return [{"overall": 9, "accuracy": value, "format": 0.5} for value in values]


def easyr1_one(reward_input, seen):
    return {"overall": odd(reward_input["response"], reward_input["level"], seen)}


def trl(prompts, completions, level, seen, **columns):
    assert len(prompts) == len(completions) == len(columns["ground_truth"])
    values = [odd(*one, seen) for one in zip(completions, level, strict=True)]
    return [2.0 + v if one == "easy" else None for one, v in zip(level, values)]


def verl(data_source, solution_str, ground_truth, extra_info=None, seen=None):
    assert ground_truth == extra_info["answer"]
    return odd(solution_str, extra_info["level"], seen)
"""

FORMS = {
    # Eq. 1 with lambda = 0.1; easyr1's own format counts, the verifier's finds none as asked.
    "easyr1": ("accuracy", lambda odd, easy: (odd, 0.5, 0.9 * odd + 0.05)),
    "easyr1_one": ("accuracy", lambda odd, easy: (odd, 0.0, 0.9 * odd)),
    "verl": ("accuracy", lambda odd, easy: (odd, 0.0, 0.9 * odd)),
    # The verifier finds nothing right: the bonus is the reward.
    "trl": ("bonus", lambda odd, easy: (0.0, 0.0, easy * 0.1 * (2.0 + odd))),
}
"""The target, and a response's accuracy, format score and reward."""


@pytest.mark.parametrize("form", FORMS)
def test_one_step(form: str, tmp_path: Path):
    """A file and a name are all it takes: weights are updated, metrics show the function's reward.

    What each response must get is computed here from what the function noted of it.
    """
    target, expected = FORMS[form]
    path, rows, config = (tmp_path / name for name in ("rewards.py", "rows.jsonl", "config.yaml"))
    path.write_text(REWARDS)
    lines = [
        {"prompt": f"what is {i} and one?", "answer": f"{i}7", "level": ("easy", "hard")[i % 2]}
        for i in range(4)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = tmp_path / "seen.jsonl"
    function = {"function": f"{path}:{form}", "target": target, "arguments": {"seen": str(seen)}}
    function |= {"weight": 0.1} if target == "bonus" else {}
    config.write_text(json.dumps({"reward": {"functions": [function]}}))
    run = FastRun(
        *("train", "--config", str(config), *SMALL, *data_arguments(rows), "algorithm=grpo"),
        *(f"output_dir={tmp_path}", "name=run", "model.path=tiny-qwen2", "train.steps=1"),
        "rollout.max_new_tokens=8",
    )
    ((status, errors),) = run.end()
    assert status == 0, errors
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [record["phase"] for record in records] == ["eval", "train", "eval"]
    noted = [json.loads(line) for line in seen.open()]
    step, own = records[1], noted[len(lines) : -len(lines)]
    assert len(own) == step["sampled_sequences"] == 16 and 0 < sum(value for value, _ in own) < 16
    scores = [expected(*one) for one in own]
    for name, column in zip(
        ("accuracy", "format", "reward"), zip(*scores, strict=True), strict=True
    ):
        assert step[name] == pytest.approx(sum(column) / 16), name
    values = [2.0 + odd for odd, easy in own if easy] if form == "trl" else [odd for odd, _ in own]
    assert step[f"reward_{form}_mean"] == pytest.approx(fmean(values))
    assert step[f"reward_{form}_std"] == pytest.approx(pstdev(values))
    assert step["trained_sequences"] > 0 and step["grad_norm"] > 0 and not step["skipped_updates"]
