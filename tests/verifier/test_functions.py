"""Users' own rewards, in the forms of EasyR1, TRL and verl."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from care_train.config import PromptSettings, RewardFunctionSettings, RewardSettings, build_config
from care_train.data import Sample
from care_train.verifier import Response, Score, TrainerState, Verifier

_SETTINGS = ("verifier_weight", "format_weight", "success_threshold")
SAMPLE = Sample(
    id="a",
    prompt="which color?",
    answer="blue",
    source="colors",
    images=(Image.new("RGB", (4, 4), (0, 0, 255)),),
    columns={"difficulty": 2},
)
GOOD = "<think>so</think><answer>blue</answer>"
WRONG = "<think>so</think><answer>red</answer>"

EASYR1_BATCH = """
def compute_score(reward_inputs, format_weight=0.1):
    if not isinstance(reward_inputs, list):
        raise ValueError("Please use `reward_type=batch`.")
    scores = []
    for row in reward_inputs:
        assert isinstance(row["response"], str) and isinstance(row["response_length"], int)
        accuracy = float(row["ground_truth"] in row["response"])
        scores.append({"overall": 0.5, "format": 0.25, "accuracy": accuracy})
    return scores
"""

EASYR1_SEQUENTIAL = """
def compute_score(reward_input, format_weight=0.5):
    if not isinstance(reward_input, dict):
        raise ValueError("Please use `reward_type=sequential`.")
    accuracy = float(reward_input["ground_truth"] in reward_input["response"])
    return {"overall": accuracy, "accuracy": accuracy, "format": 1.0}
"""

TRL = """
def length(completions, difficulty, **columns):
    assert len(columns["prompts"]) == len(completions) == len(difficulty)
    return [len(text) / 1000 * hard for text, hard in zip(completions, difficulty)]

def chat(completions, **columns):
    return [float("blue" in one[0]["content"]) for one in completions]

def some(completions, answer):
    return [1.0 if "blue" in text else None for text in completions]
"""

VERL = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, bound=1.0):
    assert data_source == "colors" and extra_info["difficulty"] == 2
    return bound * float(ground_truth in solution_str)
"""

IMAGES = """
def sees(reward_inputs):
    return [float(row["images"][0].getpixel((0, 0)) == (0, 0, 255)) for row in reward_inputs]
"""


def _verifier(tmp_path: Path, source: str, name: str, **more: Any) -> Verifier:
    settings = {key: more.pop(key) for key in _SETTINGS if key in more}
    path = tmp_path / "rewards.py"
    path.write_text(source)
    function = RewardFunctionSettings(function=f"{path}:{name}", **more)
    return Verifier(PromptSettings(), RewardSettings(functions=[function], **settings))


def _score(
    tmp_path: Path, source: str, name: str, texts: list[str], sample: Sample = SAMPLE, **more: Any
) -> list[Score]:
    verifier = _verifier(tmp_path, source, name, **more)
    return verifier.score_batch([Response(text, sample, True, (5, 6)) for text in texts])


def test_easyr1_batch(tmp_path: Path):
    """`list[dict] -> list[dict]`: accuracy is acc, format is fmt, Eq. 1 makes the reward."""
    right, wrong = _score(tmp_path, EASYR1_BATCH, "compute_score", [GOOD, WRONG])
    assert (right.accuracy, right.format_score) == (1.0, 0.25)
    assert right.reward == pytest.approx(0.9 + 0.1 * 0.25)
    assert (wrong.accuracy, wrong.reward) == (0.0, pytest.approx(0.025))
    assert right.reason.startswith("compute_score 1; ")
    assert right.format_reason == "by reward.functions"


def test_easyr1_sequential(tmp_path: Path):
    """`dict -> dict`, called once per response, with its own arguments."""
    scores = _score(
        tmp_path, EASYR1_SEQUENTIAL, "compute_score", [GOOD, WRONG], arguments={"format_weight": 0}
    )
    assert [score.accuracy for score in scores] == [1.0, 0.0]


def test_trl_bonus_with_columns(tmp_path: Path):
    """`f(completions, **columns)`: a bonus is added to the reward and does not touch acc."""
    scores = _score(tmp_path, TRL, "length", [GOOD, WRONG], target="bonus", weight=0.5)
    assert [score.accuracy for score in scores] == [1.0, 0.0]
    assert scores[0].reward == pytest.approx(1.0 + 0.5 * len(GOOD) / 1000 * 2)
    assert scores[1].reward == pytest.approx(0.1 + 0.5 * len(WRONG) / 1000 * 2)


def test_trl_messages_and_no_opinion(tmp_path: Path):
    """Chat messages for rows that are; None leaves the verdict to the verifier."""
    chat = replace(SAMPLE, is_conversation=True)
    assert [s.accuracy for s in _score(tmp_path, TRL, "chat", [GOOD, WRONG], chat)] == [1, 0]
    assert [s.accuracy for s in _score(tmp_path, TRL, "some", [GOOD, WRONG])] == [1.0, 0.0]


def test_verl(tmp_path: Path):
    """`f(data_source, solution_str, ground_truth, extra_info)`."""
    scores = _score(tmp_path, VERL, "compute_score", [GOOD, WRONG], arguments={"bound": 0.5})
    assert [score.accuracy for score in scores] == [0.5, 0.0]


ALL_OF_TRL = """
def f(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, solution, image):
    assert prompts == [[{"role": "system", "content": "be brief"},
                        {"role": "user", "content": "which color?"}]] * 2, prompts
    assert completion_ids == [[5, 6]] * 2 and solution == ["blue", "blue"]
    assert image[0].getpixel((0, 0)) == (0, 0, 255)
    assert (trainer_state.global_step, trainer_state.max_steps) == (3, 9)
    log_metric("length", 4)
    log_metric("length", 6)
    log_extra("said", [one[0]["content"][-21:] for one in completions])
    return [float(key in one[0]["content"]) for one, key in zip(completions, solution)]
"""


def test_all_that_trl_gives(tmp_path: Path):
    """Messages for rows of messages, columns under their own names, ids, state and both logs."""
    verifier = _verifier(tmp_path, ALL_OF_TRL, "f")
    columns = {"solution": "blue", "system": "be brief"}
    sample = replace(SAMPLE, is_conversation=True, columns=columns)
    verifier.state = TrainerState(3, 9)
    scores = verifier.score_batch([Response(t, sample, True, (5, 6)) for t in (GOOD, WRONG)])
    assert [score.accuracy for score in scores] == [1.0, 0.0]
    assert "said: <answer>blue</answer>" in scores[0].reason
    assert verifier.take_metrics() == {"f": [1.0, 0.0], "f_length": [4.0, 6.0]}
    assert verifier.take_metrics() == {}


SEVERAL_KINDS = """
import asyncio

async def waits(completions):
    await asyncio.sleep(0.01)
    return [float("blue" in text) for text in completions]

class Judge:
    def __init__(self):
        self.calls = 0

    async def __call__(self, completions, **columns):
        self.calls += 1
        return [float("blue" in text) for text in completions]

judge = Judge()

def array(completions):
    import numpy
    return numpy.array([float("blue" in text) for text in completions])
"""


@pytest.mark.parametrize("name", ["waits", "Judge", "judge", "array"])
def test_async_functions_objects_and_arrays(tmp_path: Path, name: str):
    """Coroutines are awaited, a class is made once, an object is called, an array is a list."""
    scores = _score(tmp_path, SEVERAL_KINDS, name, [GOOD, WRONG])
    assert [score.accuracy for score in scores] == [1.0, 0.0]


def test_a_helper_beside_the_file(tmp_path: Path):
    """The function's file imports its neighbours, which hide no module of the standard library."""
    (tmp_path / "my_helper.py").write_text("def right(text):\n    return 'blue' in text\n")
    (tmp_path / "json.py").write_text("raise ImportError('the neighbour')\n")
    source = "import json\nfrom my_helper import right\n\n"
    source += "def f(completions):\n    return [float(right(text)) for text in completions]\n"
    assert [s.accuracy for s in _score(tmp_path, source, "f", [GOOD, WRONG])] == [1.0, 0.0]


def test_verl_gets_its_own_columns(tmp_path: Path):
    """`data_source`, `reward_model.ground_truth` and `extra_info` as verl's trainer gives them."""
    source = (
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    assert (data_source, ground_truth, extra_info['index']) == ('mine', ['blue'], 4)\n"
        "    return {'score': float(ground_truth[0] in solution_str), 'recall': 0.5}\n"
    )
    columns = {
        "data_source": "mine",
        "reward_model": {"ground_truth": ["blue"], "style": "rule"},
        "extra_info": {"index": 4},
    }
    verifier = _verifier(tmp_path, source, "compute_score")
    responses = [Response(text, replace(SAMPLE, columns=columns)) for text in (GOOD, WRONG)]
    assert [score.accuracy for score in verifier.score_batch(responses)] == [1.0, 0.0]
    assert verifier.take_metrics()["compute_score_recall"] == [0.5, 0.5]


def test_a_parameter_that_no_row_fills_is_refused(tmp_path: Path):
    """Before the first step, with the columns there are; a row later in the file may have it."""
    source = "def f(completions, target, size=1):\n    return [1.0 for _ in completions]\n"
    verifier = _verifier(tmp_path, source, "f")
    message = r"rewards\.py:f: got the parameters target, for which no row .*\(a has difficulty\)"
    with pytest.raises(ValueError, match=message):
        verifier.check_columns([SAMPLE, SAMPLE])
    verifier.check_columns([SAMPLE, replace(SAMPLE, columns={"target": 1})])
    _verifier(tmp_path, source, "f", arguments={"target": 2}).check_columns([SAMPLE])


def test_a_success_threshold_keeps_the_grade(tmp_path: Path):
    """A graded result counts as a success from the threshold on; its reward stays graded."""
    source = "def f(completions):\n    return [0.8 if 'blue' in t else 0.3 for t in completions]\n"
    texts = [GOOD, WRONG]
    graded = _score(tmp_path, source, "f", texts, format_weight=0.0)
    assert [(s.accuracy, s.reward) for s in graded] == [(0.8, 0.8), (0.3, 0.3)]
    cut = _score(tmp_path, source, "f", texts, format_weight=0.0, success_threshold=0.5)
    assert [(s.accuracy, s.reward) for s in cut] == [(1.0, 0.8), (0.0, 0.3)]


def test_images_are_decoded_when_asked_for(tmp_path: Path):
    """Functions get the row's images as RGB."""
    assert _score(tmp_path, IMAGES, "sees", [WRONG])[0].accuracy == 1.0


def test_weights(tmp_path: Path):
    """acc is the weighted mean, the verifier's verdict among them on request."""
    source = "def half(reward_inputs):\n    return [0.5 for _ in reward_inputs]\n"
    scores = _score(tmp_path, source, "half", [GOOD, WRONG], weight=3.0, verifier_weight=1.0)
    assert [score.accuracy for score in scores] == [pytest.approx(0.625), pytest.approx(0.375)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(reward_inputs):\n    return [2.0]\n", r"got 2\.0, wanted a number in \[0, 1\]"),
        ("def f(reward_inputs):\n    return [float('nan')]\n", "got nan, wanted a number"),
        ("def f(reward_inputs):\n    return []\n", "got 0 results, wanted a list of 1"),
        ("def f(reward_inputs):\n    return [{'x': 1}]\n", "wanted a key accuracy, overall or"),
        ("def f(reward_inputs):\n    return ['no']\n", "got no, wanted a number"),
        ("def f(x, y):\n    return [1]\n", "got the parameters x, y, wanted compute_score"),
        ("def g():\n    return [1]\n", "got no function f in it, wanted one of g"),
        ("def f(reward_input, size):\n    return 1\n", "got the parameters size, which nothing"),
    ],
)
def test_errors_name_the_function(tmp_path: Path, source: str, message: str):
    """What cannot be used is an error that names the function, never a reward."""
    with pytest.raises(ValueError, match=r"^reward\.functions: .*rewards\.py:f: ") as caught:
        _score(tmp_path, source, "f", [GOOD])
    assert caught.match(message)


def test_a_functions_own_error_comes_through(tmp_path: Path):
    """With its traceback and the function's name."""
    with pytest.raises(ZeroDivisionError) as caught:
        _score(tmp_path, "def f(reward_inputs):\n    return 1 / 0\n", "f", [GOOD])
    assert "rewards.py:f" in caught.value.__notes__[0]


def test_settings_from_a_file(tmp_path: Path):
    """The list in a configuration becomes checked settings; wrong ones are errors by key."""
    path = tmp_path / "r.py"
    path.write_text(EASYR1_BATCH)
    values = {"reward": {"functions": [{"function": f"{path}:compute_score", "weight": 2.0}]}}
    config = build_config(values)
    assert config.reward.functions[0].weight == 2.0
    with pytest.raises(
        ValueError, match=r"reward\.functions\.function: .* wanted file\.py:function"
    ):
        build_config({"reward": {"functions": [{"function": "compute_score"}]}})
    with pytest.raises(ValueError, match=r"reward\.verifier_weight"):
        build_config({"reward": {"verifier_weight": 0.0}})
    with pytest.raises(ValueError, match="got no file"):
        missing = RewardFunctionSettings(function="/nowhere/r.py:f")
        Verifier(PromptSettings(), RewardSettings(functions=[missing]))


FAULTY = """
import os, time

def compute_score(reward_input):
    if "red" in reward_input["response"]:
        {fault}
    return {{"accuracy": 1.0}}

def batch(reward_inputs):
    if any("red" in row["response"] for row in reward_inputs):
        {fault}
    return [1.0 for _ in reward_inputs]
"""


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("time.sleep(600)", "got nothing in 2 s"), ("os._exit(1)", "got the end of its process")],
)
def test_a_function_that_hangs_or_dies_is_replaced(tmp_path: Path, caplog, fault, reason):
    """One response at a time: it costs that response alone, with a warning that names the row."""
    texts = [GOOD, WRONG, GOOD]
    scores = _score(tmp_path, FAULTY.format(fault=fault), "compute_score", texts, timeout=2.0)
    assert [score.accuracy for score in scores] == [1.0, 0.0, 1.0]
    assert reason in scores[1].reason
    assert f"rewards.py:compute_score: a: {reason}" in caplog.text


def test_a_function_of_batches_that_hangs_is_an_error(tmp_path: Path):
    """No reward is made up for the others of its batch: function and row are named."""
    source = FAULTY.format(fault="time.sleep(600)")
    with pytest.raises(ValueError, match=r"rewards\.py:batch: a: got nothing in 2 s, wanted 2"):
        _score(tmp_path, source, "batch", [GOOD, WRONG], timeout=2.0)
