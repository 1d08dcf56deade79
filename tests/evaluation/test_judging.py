"""Which answers are right: each benchmark's rule, then the verifier, then a judge."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.protocol_fixtures import benchmark_rows
from care_train.data import Sample
from care_train.data.images import image_refs
from care_train.evaluation.benchmarks import BENCHMARKS
from care_train.evaluation.evaluate import judge_responses
from care_train.evaluation.question import Question, choose_option
from care_train.rollout.engine import Completion
from care_train.verifier import AnswerType
from tests.train.builders import make_session
from tests.verifier.judge_server import Server, serving

COLORS = ("red", "green", "blue", "yellow")


def _question(name: str, key: str, options=(), **columns) -> Question:
    """The first fixture of a benchmark with another key and other options."""
    row = dict(benchmark_rows()[name][0]) | {"answer": key}
    if name == "mathvista":
        row |= {"choices": list(options), "question_type": "multi_choice" if options else "free"}
        row |= {"answer_type": "text"}
    elif name == "mathverse":
        lines = "\n".join(f"{letter}:{text}" for letter, text in zip("ABCDEFGH", options))  # noqa: B905
        row |= {"question_for_eval": f"?\nChoices:\n{lines}" if options else "?"}
        row |= {"question_type": "multi-choice" if options else "free-form"}
    elif name == "math_vision":
        row |= {"options": list(options)}
    else:
        kind = "multiple-choice" if options else "open"
        row |= {"options": repr(list(options)), "question_type": kind}
    at = f"{name}: row 1"
    images = partial(image_refs, column="image", base_dir=Path(), at=at)
    return BENCHMARKS[name].to_question(row | columns, at, images)


@pytest.fixture(scope="module")
def session(tiny_folder):
    return make_session(tiny_folder())


def _judged(session, name, *asked: tuple[Question, str]) -> list[dict]:
    """Records of well-formed responses with these answers."""
    encode, eos = session.encoder.encode_text, session.loaded.eos_token_ids[:1]
    think, answer = session.config.prompt.think_tag, session.config.prompt.answer_tag
    return judge_responses(
        session,
        BENCHMARKS.get(name),
        [
            (question, Completion(encode(text) + eos, finished=True))
            for question, given in asked
            for text in [f"<{think}>so</{think}> <{answer}>{given}</{answer}>"]
        ],
    )


def _record(session, name: str, predicted: str, key: str, options=(), **columns) -> dict:
    question = _question(name, key, options, **columns)
    return _judged(session, name, (question, predicted))[0]


def _cases(name: str) -> Any:
    """A file's cases; every scalar is text."""
    return yaml.load((Path(__file__).parent / name).read_text(), yaml.BaseLoader)


CASES = [(name, case) for name, cases in _cases("answers.yaml").items() for case in cases]


@pytest.mark.parametrize(("name", "case"), CASES, ids=lambda case: str(case)[:60])
def test_answers(name, case, session):
    """Each benchmark's own rule decides, and else the verifier."""
    columns = {key: case[key] for key in ("answer_type", "question_type") if key in case}
    columns |= {"precision": float(case["precision"])} if "precision" in case else {}
    question = _question(name, case["key"], case.get("options", ()), **columns)
    for found in ("exact", "right", "wrong"):
        for answer in case.get(found, ()):
            answer = answer.replace("NINES", "9" * 5000).replace("LONG ", "x" * 5000)
            [record] = _judged(session, name, (question, answer))
            assert record["exact"] == (found == "exact"), answer
            assert record["accuracy"] == (found != "wrong"), answer
            assert record["reason"]


@pytest.mark.parametrize("case", _cases("options.yaml"), ids=str)
def test_the_option_an_answer_names(case):
    """None is wrong, never a guess."""
    question = Question(Sample(id="1", prompt="?", answer="A"), tuple(case.pop("options")))
    for letter, answers in case.items():
        place = None if letter == "none" else ord(letter) - ord("A")
        for answer in answers:
            assert choose_option(answer, question) == place, answer


@pytest.mark.parametrize("name", ["mmmu_pro_vision", "math_vision"])
def test_choices_vote_by_letter(name, session):
    """Equal answers are one vote, whatever their form; no option is no vote."""
    given = ("B", "(B) green", "green", "purple")
    votes = [_record(session, name, text, "B", COLORS)["vote"] for text in given]
    assert votes == ["B", "B", "B", ""]
    texts = ("Red", " red. ", "RED")
    assert len({_record(session, "mathverse", text, "7")["vote"] for text in texts}) == 1


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def test_the_judge_is_asked_about_open_answers_alone(server, tiny_folder):
    """Sec. 8.3: what no rule finds right among words, and keys that name no option; letters and
    numbers are decided by rule."""
    reward = {"judge": {"base_url": server.url, "model": "m"}}
    session = make_session(tiny_folder(), {"reward": reward})
    server.reply = lambda prompt: "CORRECT" if "wading bird" in prompt else "INCORRECT"
    bird = _question("mmmu", "heron", question="what is it? <image 1> <image 2>")
    judged = _judged(
        *(session, "mmmu"),
        (bird, "a wading bird"),
        (bird, "a fish"),
        (bird, "a heron"),
        (bird, " "),
        (_question("mmmu", "12"), "13"),
        (_question("mmmu", "A", COLORS), "blue"),
    )
    assert [record["accuracy"] for record in judged] == [1, 0, 1, 0, 0, 0]
    assert [record["exact"] for record in judged] == [False, False, True] + 3 * [False]
    assert judged[0]["reason"] == "the judge agrees"
    assert len(server.prompts) == 2 and all("what is it?" in text for text in server.prompts)
    odd = _question("mathverse", "B, C", COLORS, query_cot="which two?")
    assert odd.is_odd and not odd.right
    server.reply = lambda prompt: "CORRECT" if "B and C" in prompt else "INCORRECT"
    judged = _judged(session, "mathverse", (odd, "B and C"), (odd, "B"))
    assert [record["accuracy"] for record in judged] == [1, 0]


@pytest.mark.parametrize(
    ("key", "columns", "answer", "accuracy", "exact"),
    [
        ("A", {"options": ("red", "blue")}, "red", 1, False),
        ("A", {"options": ("red", "blue")}, "blue", 0, False),
        ("14", {"answer_type": AnswerType.RELAXED}, "14.5", 1, False),
        ("14", {}, "14.5", 0, False),
        ("14", {"tolerance": 0.1}, "15", 1, False),
        ('["red", "blue"]', {}, "Blue", 1, True),
    ],
)
def test_own_rows_are_scored_as_in_training(key, columns, answer, accuracy, exact, session):
    """The row's options, type and tolerance count in `--benchmarks data` as in a reward; the exact
    match is with any of several keys."""
    question = Question(Sample(id="1", prompt="?", answer=key, **columns))
    (record,) = _judged(session, "data", (question, answer))
    assert (record["accuracy"], record["answer"], record["format"]) == (accuracy, answer, 1.0)
    assert record["exact"] == exact


def test_own_rewards_score_own_rows(tiny_folder, tmp_path):
    """`reward.functions` say what is right in evaluation too."""
    path = tmp_path / "reward.py"
    path.write_text("def score(prompts, completions, **rest): return [0.25 for _ in completions]\n")
    reward = {"functions": [{"function": f"{path}:score"}]}
    session = make_session(tiny_folder(), {"reward": reward})
    question = Question(Sample(id="1", prompt="?", answer="red"))
    assert _judged(session, "data", (question, "red"))[0]["accuracy"] == 0.25


def test_settings_of_the_run(tiny_folder):
    """Qwen3-VL's `<reasoning>`, and the last box with `prompt.tags=[think,boxed]`, are read; the
    tolerance of rewards loosens nothing."""
    session = make_session(
        tiny_folder("tiny-qwen3-vl"), {"prompt": {"tags": ["reasoning", "answer"]}}
    )
    record = _record(session, "mmmu", "(A)", "A", COLORS)
    assert record["format"] == 1.0 and record["accuracy"] == 1.0
    boxed = {"prompt": {"tags": ["think", "boxed"]}, "reward": {"tolerance": 0.2}}
    session = make_session(tiny_folder(), boxed)
    record = _record(session, "mathverse", r"\boxed{14}", "14")
    assert (record["format"], record["accuracy"], record["answer"]) == (1.0, 1.0, "14")
    assert _record(session, "mathverse", r"\boxed{15}", "14")["accuracy"] == 0
