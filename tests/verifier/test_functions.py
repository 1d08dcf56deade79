"""Users' own rewards, in the forms of EasyR1, TRL and verl, and `care_train:verified_steps`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from care_train.config import (
    FROM_PYTHON,
    DataSettings,
    PromptSettings,
    RewardFunctionSettings,
    RewardSettings,
)
from care_train.data import RowError, Sample, load_samples, sample_from_row
from care_train.training.failures import status_of
from care_train.verifier import Response, Score, TrainerState, Verifier
from care_train.verifier.score import check_key
from care_train.verifier.steps import verified_steps

_SETTINGS = ("format_weight", "success_threshold")
VERIFIER = {"function": "care_train:verifier"}
SAMPLE = Sample(
    id="a",
    prompt="which color?",
    answer="blue",
    source="colors",
    images=(Image.new("RGB", (4, 4), (0, 0, 255)),),
    columns={"difficulty": 2},
)
CHAT = replace(SAMPLE, is_conversation=True)
GOOD = "<think>so</think><answer>blue</answer>"
WRONG = "<think>so</think><answer>red</answer>"

REWARDS = """
import asyncio
import numpy

def easyr1_batch(reward_inputs, format_weight=0.1):
    if not isinstance(reward_inputs, list):
        raise ValueError("Please use `reward_type=batch`.")
    scores = []
    for row in reward_inputs:
        assert isinstance(row["response"], str) and isinstance(row["response_length"], int)
        accuracy = float(row["ground_truth"] in row["response"])
        scores.append({"overall": 0.5, "format": 0.25, "accuracy": accuracy})
    return scores

def easyr1_sequential(reward_input, format_weight):
    if not isinstance(reward_input, dict):
        raise ValueError("Please use `reward_type=sequential`.")
    assert format_weight == 0
    accuracy = float(reward_input["ground_truth"] in reward_input["response"])
    return {"overall": accuracy, "accuracy": accuracy, "format": 1.0}

def sees(reward_inputs):
    return [float(row["images"][0].getpixel((0, 0)) == (0, 0, 255)) for row in reward_inputs]

def half(reward_inputs):
    return [0.5 for _ in reward_inputs]

def graded(completions):
    return [0.8 if "blue" in text else 0.3 for text in completions]

def length(completions, difficulty, **columns):
    assert len(columns["prompts"]) == len(completions) == len(difficulty)
    return [len(text) / 1000 * hard for text, hard in zip(completions, difficulty)]

def chat(completions, **columns):
    return [float("blue" in one[0]["content"]) for one in completions]

def some(completions, answer):
    return [1.0 if "blue" in text else None for text in completions]

def verl(data_source, solution_str, ground_truth, extra_info=None, bound=1.0):
    assert data_source == "colors" and extra_info["difficulty"] == 2
    return bound * float(ground_truth in solution_str)

def dapo(solution_str, ground_truth):
    is_right = ground_truth in solution_str
    return {"score": 1.0 if is_right else -1.0, "acc": is_right, "pred": solution_str}

async def waits(completions):
    await asyncio.sleep(0.01)
    return [float("blue" in text) for text in completions]

class Judge:
    async def __call__(self, completions, **columns):
        return [float("blue" in text) for text in completions]

judge = Judge()

def array(completions):
    return numpy.array([float("blue" in text) for text in completions])
"""


def _verifier(tmp_path: Path, source: str, name: str, **more: Any) -> Verifier:
    settings = {key: more.pop(key) for key in _SETTINGS if key in more}
    path = tmp_path / "rewards.py"
    path.write_text(source)
    beside = [RewardFunctionSettings(**entry) for entry in more.pop("beside", ())]
    function = RewardFunctionSettings(function=f"{path}:{name}", **more)
    return Verifier(PromptSettings(), RewardSettings(functions=[function, *beside], **settings))


def _score(
    tmp_path: Path, source: str, name: str, texts: list[str], sample: Sample = SAMPLE, **more: Any
) -> list[Score]:
    verifier = _verifier(tmp_path, source, name, **more)
    return verifier.score_batch([Response(text, sample, True, (5, 6)) for text in texts])


_CUT = {"format_weight": 0.0, "success_threshold": 0.5}
_BONUS = 0.5 * 2 / 1000


@pytest.mark.parametrize(
    ("name", "settings", "accuracies", "rewards"),
    [
        # Accuracy is acc, format is fmt, and Eq. 1 makes the reward; overall is not used.
        ("easyr1_batch", {}, [1, 0], [0.9 + 0.1 * 0.25, 0.1 * 0.25]),
        ("easyr1_sequential", {"arguments": {"format_weight": 0}}, [1, 0], [1.0, 0.1]),
        # A bonus is added to the reward and does not touch acc.
        (
            "length",
            {"target": "bonus", "weight": 0.5},
            [1, 0],
            [1 + _BONUS * len(GOOD), 0.1 + _BONUS * len(WRONG)],
        ),
        # None leaves the verdict to the verifier.
        ("some", {}, [1, 0], [1.0, 0.1]),
        ("verl", {"arguments": {"bound": 0.5}}, [0.5, 0], [0.55, 0.1]),
        # verl's DAPO has its verdict beside a score of 1 or -1.
        ("dapo", {}, [1, 0], [1.0, 0.1]),
        # Coroutines are awaited, a class is made once, an object is called, an array is a list.
        ("waits", {}, [1, 0], [1.0, 0.1]),
        ("Judge", {}, [1, 0], [1.0, 0.1]),
        ("judge", {}, [1, 0], [1.0, 0.1]),
        ("array", {}, [1, 0], [1.0, 0.1]),
        # Images are RGB.
        ("sees", {}, [1, 1], [1.0, 1.0]),
        # A mean by weight with the verifier's verdict.
        ("half", {"weight": 3.0, "beside": [VERIFIER]}, [0.625, 0.375], [0.6625, 0.4375]),
        # With a threshold a graded result is a success or not; its reward stays graded.
        ("graded", {"format_weight": 0.0}, [0.8, 0.3], [0.8, 0.3]),
        ("graded", _CUT, [1, 0], [0.8, 0.3]),
    ],
)
def test_forms_and_settings(
    name: str, settings: dict, accuracies: list, rewards: list, tmp_path: Path
):
    """Every signature is called as its trainer does; targets, weights and thresholds count. What a
    function gave comes before the verifier's reason, and its format replaces the verifier's."""
    scores = _score(tmp_path, REWARDS, name, [GOOD, WRONG], **settings)
    if name == "easyr1_batch":
        assert scores[0].reason.startswith("easyr1_batch 1; ")
        assert (scores[0].format_score, scores[0].format_reason) == (0.25, "by reward.functions")
    assert [score.accuracy for score in scores] == pytest.approx(accuracies)
    assert [score.reward for score in scores] == pytest.approx(rewards)


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
    assert [s.accuracy for s in _score(tmp_path, REWARDS, "chat", [GOOD, WRONG], CHAT)] == [1, 0]
    verifier = _verifier(tmp_path, ALL_OF_TRL, "f")
    sample = replace(CHAT, columns={"solution": "blue", "system": "be brief"})
    verifier.state = TrainerState(3, 9)
    scores = verifier.score_batch([Response(t, sample, True, (5, 6)) for t in (GOOD, WRONG)])
    assert [score.accuracy for score in scores] == [1.0, 0.0]
    assert "said: <answer>blue</answer>" in scores[0].reason
    assert verifier.take_metrics() == {"f": [1.0, 0.0], "f_length": [4.0, 6.0]}
    assert verifier.take_metrics() == {}


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


def test_keys_reach_functions_as_they_stand():
    """TRL's get the row's columns, EasyR1's and verl's the key: an object or list as it stands,
    else its text, whatever a column `ground_truth` beside it holds. A key that no verifier reads is
    an error that names the row without a function, or where none has an opinion."""
    goal, got = {"target": ["blue"], "boxes": [[1, 2]]}, []

    def read(**columns):
        row = {"prompt": "q"} | columns
        return sample_from_row(row, location="r.jsonl: row 3", base_dir=Path(), id="r/3")

    opinion: list[float | None] = [1.0]

    def trl(completions, answer):
        got.append(*answer)
        return opinion

    def easyr1(reward_inputs):
        got.append(reward_inputs[0]["ground_truth"])
        return opinion

    def verl(solution_str, ground_truth):
        got.append(ground_truth)
        return opinion[0]

    def scored(sample, *functions):
        given = {f"{FROM_PYTHON}{one.__name__}": one for one in functions}
        settings = [RewardFunctionSettings(function=name) for name in given]
        reward = RewardSettings(functions=settings)
        check_key(sample, reward)
        return Verifier(PromptSettings(), reward, given).score(GOOD, sample)

    for columns, keys in (
        ({"answer": goal}, [goal] * 3),
        ({"answer": 12, "ground_truth": "B"}, [12, "12", "12"]),
        ({"answer": "so\n#### 12"}, ["so\n#### 12", "12", "12"]),
        ({"answer": [3, 4], "ground_truth": "B"}, [[3, 4]] * 3),
    ):
        got.clear()
        assert scored(read(**columns), trl, easyr1, verl).accuracy == 1 and got == keys
    wanted = (
        r"r\.jsonl: row 3: answer: got '\{\"target\": .*, which only a reward function can read"
        r".* set its answer_type to text"
    )
    with pytest.raises(RowError, match=wanted):
        scored(read(answer=goal))
    opinion = [None]
    with pytest.raises(RowError, match=wanted):
        scored(read(answer=goal), trl)


def test_a_helper_beside_the_file(tmp_path: Path):
    """The function's file imports its neighbours, which hide no module of the standard library."""
    (tmp_path / "my_helper.py").write_text("def right(text):\n    return 'blue' in text\n")
    (tmp_path / "json.py").write_text("raise ImportError('the neighbour')\n")
    source = "import json\nfrom my_helper import right\n\n"
    source += "def f(completions):\n    return [float(right(text)) for text in completions]\n"
    assert [s.accuracy for s in _score(tmp_path, source, "f", [GOOD, WRONG])] == [1.0, 0.0]


def test_a_parameter_that_no_row_fills_is_refused(tmp_path: Path):
    """Before the first step, with the columns there are; a row later in the file may have it."""
    source = "def f(completions, target, size=1):\n    return [1.0 for _ in completions]\n"
    verifier = _verifier(tmp_path, source, "f")
    message = r"rewards\.py:f: got the parameters target, for which no row .*\(a has difficulty\)"
    with pytest.raises(ValueError, match=message):
        verifier.check_columns([SAMPLE, SAMPLE])
    verifier.check_columns([SAMPLE, replace(SAMPLE, columns={"target": 1})])
    _verifier(tmp_path, source, "f", arguments={"target": 2}).check_columns([SAMPLE])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(reward_inputs):\n    return [2.0]\n", r"got 2\.0, wanted a number in \[0, 1\]"),
        ("def f(reward_inputs):\n    return []\n", "got 0 results, wanted a list of 1"),
        ("def f(reward_inputs):\n    return [{'x': 1}]\n", "wanted a key accuracy, acc, overall"),
        # TRL's form alone may have no opinion: here a `return` is missing.
        ("def f(reward_input):\n    pass\n", r"got None, wanted a number in \[0, 1\]: scale it"),
        ("def f(reward_inputs):\n    return [{'acc': None}]\n", "got None, wanted a number"),
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


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(reward_input):\n    return float('x')\n", "rewards.py:f: a: ValueError: could not"),
        ("def f(reward_inputs):\n    open('/no/log')\n", r"rewards.py:f: FileNotFoundError: \["),
        ("float('x')\n", "rewards.py:f: ValueError: could not convert"),
        (
            "class f:\n    def __init__(self):\n        open('/no/key')\n",
            "rewards.py:f: FileNotFoundError",
        ),
    ],
)
def test_a_functions_own_error_is_no_wrong_input(tmp_path: Path, source: str, message: str):
    """Of which the command shows the message alone, without a traceback or the function's name."""
    with pytest.raises(RuntimeError, match=message) as caught:
        _score(tmp_path, source, "f", [GOOD])
    assert status_of(caught.value) == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("/nowhere/r.py:f", "got no file"),
        ("care_train:other", "got no function other in it"),
    ],
)
def test_a_function_that_is_not_there_is_named(function: str, message: str):
    """With the file, or what else is in it."""
    settings = RewardSettings(functions=[RewardFunctionSettings(function=function)])
    with pytest.raises(ValueError, match=message):
        Verifier(PromptSettings(), settings)


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
    [("time.sleep(600)", "got nothing in 1 s"), ("os._exit(1)", "got the end of its process")],
)
def test_a_function_that_hangs_or_dies_is_replaced(tmp_path: Path, caplog, fault, reason):
    """One response at a time: it costs that response alone, with a warning that names the row. Of
    batches it is an error that names function and row."""
    texts = [GOOD, WRONG, GOOD]
    scores = _score(tmp_path, FAULTY.format(fault=fault), "compute_score", texts, timeout=1.0)
    assert [score.accuracy for score in scores] == [1.0, 0.0, 1.0]
    assert reason in scores[1].reason
    assert f"rewards.py:compute_score: a: {reason}" in caplog.text
    # No reward is made up for the others of a batch.
    with pytest.raises(ValueError, match=rf"rewards\.py:batch: a: {reason}, wanted 2"):
        _score(tmp_path, FAULTY.format(fault=fault), "batch", [GOOD, WRONG], timeout=1.0)


RIGHT = "<think>i see 8 3 . 8 plus 3 is 11</think> <answer>11</answer>"
STRIP = {"source": "digits", "kind": "sum", "digits": [8, 3]}


def _text(rationale: str | None, answer: str) -> str:
    return f"<think>{rationale}</think> <answer>{answer}</answer>"


@pytest.mark.parametrize("name", ["digits-3", "charts-3", "geometry-3"])
def test_a_slip_goes_wrong_at_what_it_misreads(name: str):
    """Every row's own rationale has no wrong step; a slip's is the value that it reads wrong."""
    for sample in load_samples(DataSettings(path=name, max_samples=100)):
        assert sample.rationale is not None
        row = {**sample.columns, "source": sample.source}
        slip = _text(sample.failed_rationale, sample.columns["failed_answer"])
        own = _text(sample.rationale, sample.answer)
        right, found = verified_steps([row | {"response": text} for text in (own, slip)])
        assert right == {"score": 1.0, "wrong_step": None}
        start, end = found["wrong_step"]
        seen = "<think>" + sample.rationale.partition(" . ")[0]
        assert slip[:start] == seen[:start] and slip[start:end] != seen[start:end]
        assert 0 <= found["score"] < 1


@pytest.mark.parametrize(
    ("response", "wrong", "score"),
    [
        (RIGHT.replace("11", "12"), " is 12", 4 / 6),
        (RIGHT.replace(">11", ">12"), "</think> <answer>12", 5 / 6),
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
    with pytest.raises(ValueError, match="source 'colors', wanted digits, charts or geometry"):
        verified_steps([{"source": "colors", "response": response}])


def test_verified_steps_is_a_reward_function_by_name():
    """With weight 0 it leaves the reward alone and names the wrong step."""
    function = "care_train:verified_steps"
    settings = RewardFunctionSettings(function=function, target="bonus", weight=0)
    (sample,) = load_samples(DataSettings(path="digits-2", max_samples=1))
    verifier = Verifier(PromptSettings(), RewardSettings(functions=[settings]))
    slip = _text(sample.failed_rationale, sample.columns["failed_answer"])
    texts = (_text(sample.rationale, sample.answer), slip)
    scores = verifier.score_batch([Response(text, sample) for text in texts])
    assert [one.accuracy for one in scores] == [1.0, 0.0]
    assert [one.reward for one in scores] == pytest.approx([1.0, 0.1])
    assert scores[0].wrong_step is None and scores[1].wrong_step is not None
    with pytest.raises(ValueError, match="source 'colors', wanted digits"):  # input, no bug of it
        verifier.score_batch([Response(GOOD, SAMPLE)])


NAMES = """
def f(reward_inputs, spans):
    return [{"score": 0.5, "wrong_step": span} for span in spans]

def late(reward_inputs):
    return [{"score": 0, "wrong_step": (7, 9)} for row in reward_inputs]
"""


def test_the_earliest_wrong_step_counts(tmp_path: Path):
    """Of several functions that name one; a function that names none says nothing. One outside the
    response is an error that names function, row, what it got and wanted."""
    path = tmp_path / "rewards.py"
    path.write_text(NAMES)

    def steps_of(*spans: object) -> list[tuple[int, int] | None]:
        names = {"f": {"spans": list(spans)}, "late": {}}
        functions = [
            RewardFunctionSettings(function=f"{path}:{name}", target="bonus", arguments=arguments)
            for name, arguments in names.items()
        ]
        verifier = Verifier(PromptSettings(), RewardSettings(functions=functions))
        scores = verifier.score_batch([Response("<think>no</think>", SAMPLE)] * len(spans))
        return [score.wrong_step for score in scores]

    assert steps_of((8, 10), (2, 9), None) == [(7, 9), (2, 9), (7, 9)]
    for span in ((3, 3), (-1, 2), (0, 99), (1.5, 2), 4):
        with pytest.raises(ValueError, match=r"f: a: got .*wanted start and end .* \[0, 17\]"):
            steps_of(span)
