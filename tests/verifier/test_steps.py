"""`care_train:verified_steps`, and how a reward function names a response's first wrong step."""

from pathlib import Path

import pytest

from care_train.config import DataSettings, PromptSettings, RewardFunctionSettings, RewardSettings
from care_train.data import Sample, load_samples
from care_train.verifier import Response, Verifier
from care_train.verifier.steps import verified_steps
from tests.verifier.test_functions import SAMPLE

RIGHT = "<think>i see 8 3 . 8 plus 3 is 11</think> <answer>11</answer>"
STRIP = {"source": "digits", "kind": "sum", "digits": [8, 3]}


def row(sample: Sample, response: str) -> dict:
    return {**sample.columns, "source": sample.source, "response": response}


def text(rationale: str | None, answer: str) -> str:
    return f"<think>{rationale}</think> <answer>{answer}</answer>"


@pytest.mark.parametrize("name", ["digits-3", "charts-3", "geometry-3"])
def test_a_slip_goes_wrong_at_what_it_misreads(name: str):
    """Every row's own rationale has no wrong step; a slip's is the value that it reads wrong."""
    samples = load_samples(DataSettings(path=name, max_samples=100))
    right = verified_steps([row(s, text(s.rationale, s.answer)) for s in samples])
    assert all(one == {"score": 1.0, "wrong_step": None} for one in right)
    for sample in samples:
        assert sample.rationale is not None
        slip = text(sample.failed_rationale, sample.columns["failed_answer"])
        (found,) = verified_steps([row(sample, slip)])
        start, end = found["wrong_step"]
        seen = "<think>" + sample.rationale.partition(" . ")[0]
        assert slip[:start] == seen[:start] and slip[start:end] != seen[start:end]
        assert 0 <= found["score"] < 1


@pytest.mark.parametrize(
    ("response", "wrong", "score"),
    [
        ("<think>i see 8 3 . 8 plus 3 is 12</think> <answer>12</answer>", " is 12", 4 / 6),
        (
            "<think>i see 8 3 . 8 plus 3 is 11</think> <answer>12</answer>",
            "</think> <answer>12",
            5 / 6,
        ),
        ("<think>I look: 8, 3. So 8 + 3 = 11.</think><answer>11</answer>", None, 1.0),
        (RIGHT + " or 12", "</answer> or 12", 1.0),
        ("<think>i see 8</think>", "</think>", 1 / 6),
        ("no idea", "no idea", 0.0),
        ("", None, 0.0),
        ("<think>i see 8 5 . 8 plus 5 is 13 that was wrong, " + RIGHT[len("<think>") :], None, 1.0),
    ],
)
def test_values_count_and_words_do_not(response: str, wrong: str | None, score: float):
    """Reading, arithmetic and answer are checked in order, of a repair those behind the cue."""
    (found,) = verified_steps([STRIP | {"response": response}])
    span = found["wrong_step"]
    assert (None if span is None else response[slice(*span)]) == wrong
    assert found["score"] == pytest.approx(score)


def test_rows_of_another_source_are_an_error():
    """Nothing is known of what their pictures show."""
    with pytest.raises(ValueError, match="source 'colors', wanted digits, charts or geometry"):
        verified_steps([{"source": "colors", "response": "red"}])


def test_it_is_a_reward_function_by_name():
    """With weight 0 it leaves the reward alone and names the wrong step."""
    settings = RewardFunctionSettings(
        function="care_train:verified_steps", target="bonus", weight=0
    )
    (sample,) = load_samples(DataSettings(path="digits-2", max_samples=1))
    assert sample.rationale is not None
    verifier = Verifier(PromptSettings(), RewardSettings(functions=[settings]))
    slip = text(sample.failed_rationale, sample.columns["failed_answer"])
    scores = verifier.score_batch(
        [Response(text(sample.rationale, sample.answer), sample), Response(slip, sample)]
    )
    assert [one.accuracy for one in scores] == [1.0, 0.0]
    assert [one.reward for one in scores] == pytest.approx([1.0, 0.1])
    assert scores[0].wrong_step is None and scores[1].wrong_step is not None
    with pytest.raises(ValueError, match="got no function other in it"):
        other = RewardFunctionSettings(function="care_train:other")
        Verifier(PromptSettings(), RewardSettings(functions=[other]))


NAMES = """
def f(reward_inputs, spans):
    return [{"score": 0.5, "wrong_step": span} for span in spans]

def late(reward_inputs):
    return [{"score": 0, "wrong_step": (7, 9)} for row in reward_inputs]
"""


def scored(path: Path, spans: list, text: str = "<think>no</think>"):
    path.write_text(NAMES)
    first = RewardFunctionSettings(function=f"{path}:f", target="bonus", arguments={"spans": spans})
    second = RewardFunctionSettings(function=f"{path}:late", target="bonus")
    verifier = Verifier(PromptSettings(), RewardSettings(functions=[first, second]))
    return verifier.score_batch([Response(text, SAMPLE)] * len(spans))


def test_the_earliest_step_counts(tmp_path: Path):
    """Of several functions that name one; a function that names none says nothing."""
    found = scored(tmp_path / "rewards.py", [(8, 10), (2, 9), None])
    assert [one.wrong_step for one in found] == [(7, 9), (2, 9), (7, 9)]


@pytest.mark.parametrize("span", [(3, 3), (-1, 2), (0, 99), (1.5, 2), 4, "ab"])
def test_a_step_outside_the_response_is_an_error(span, tmp_path: Path):
    """It names the function, the row, what it got and what it wanted."""
    with pytest.raises(ValueError, match=r"f: a: got .*wanted start and end .* \[0, 17\]"):
        scored(tmp_path / "rewards.py", [span])
