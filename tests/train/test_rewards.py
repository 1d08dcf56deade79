"""The verifier in training and evaluation: one function, given whole batches."""

from pathlib import Path

import pytest

from care_train.data import Sample
from care_train.distributed import initialize_process_group
from care_train.evaluation.evaluate import evaluate
from care_train.rollout.engine import Completion
from care_train.training.groups import Answer
from tests.train.builders import make_session

REWARDS = """
SEEN = []

def compute_score(reward_inputs):
    SEEN.append(len(reward_inputs))
    return [float(row["level"] == "easy" and row["response_length"] > 0) for row in reward_inputs]
"""

TEXTS = (
    "<think>so</think> <answer>1/\\sqrt{2}</answer>",
    "<think>so</think> <answer>\\sqrt{2}</answer>",
    "<think>so</think> <answer>(b) blue",
)


def _completions(session, sample: Sample):
    tokenizer = session.loaded.tokenizer
    ids = [tuple(tokenizer.encode(text)) for text in TEXTS]
    eos = tokenizer.eos_token_id
    return [Answer(sample, Completion((*one, eos), True)) for one in ids]


def test_rollouts_with_symbolic_keys(tiny_folder):
    """A batch of rollouts is verified by algebra where it takes it; reasons go with them."""
    session = make_session(tiny_folder("tiny-qwen2"))
    sample = Sample(id="a", prompt="?", answer="\\frac{\\sqrt{2}}{2}")
    rollouts = session.scorer.score_all(_completions(session, sample))
    assert [rollout.accuracy for rollout in rollouts] == [1.0, 0.0, 0.0]
    assert [rollout.format_score for rollout in rollouts] == [1.0, 1.0, 0.0]
    assert rollouts[0].verdict == "equal expressions"
    assert rollouts[2].verdict == "no complete <answer> span"
    # In perfect form and wrong, it stays below every right answer.
    assert rollouts[1].reward == pytest.approx(0.1) and rollouts[0].reward == pytest.approx(1.0)


def test_columns_reach_reward_functions(tiny_folder, tmp_path: Path):
    """In training a batch at once, and the same in evaluation."""
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    function = {"function": f"{path}:compute_score"}
    session = make_session(tiny_folder("tiny-qwen2"), {"reward": {"functions": [function]}})
    samples = [
        Sample(id=level, prompt="?", answer="5", columns={"level": level})
        for level in ("easy", "hard")
    ]
    for sample, accuracy in zip(samples, (1.0, 0.0), strict=True):
        rollouts = session.scorer.score_all(_completions(session, sample))
        assert [rollout.accuracy for rollout in rollouts] == [accuracy] * 3
    engine = session.rollout_engine(session.loaded, 2)
    device = initialize_process_group()
    result = evaluate(session, engine, samples, device, greedy=True)
    assert result["accuracy"] == 0.5
