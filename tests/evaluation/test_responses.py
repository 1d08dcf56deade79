"""Responses of a batch: by the benchmark's rule, the run's verifier, or a judge."""

from collections.abc import Iterator

import pytest

from care_train.data import Sample
from care_train.evaluation.benchmarks import BENCHMARKS
from care_train.evaluation.judging import judge_responses
from care_train.evaluation.question import Question
from care_train.evaluation.question_set import QuestionSet
from care_train.rollout.engine import Completion
from care_train.verifier.judge import Judge
from tests.train.builders import make_session
from tests.verifier.judge_server import Server, serving


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def _questions(name: str) -> QuestionSet:
    judge = None if name == "data" else BENCHMARKS[name].judge
    return QuestionSet(name, name, "rows", (), (), lambda place: _question("", ""), judge)


def _question(prompt: str, answer: str, kind: str = "", **columns) -> Question:
    sample = Sample(id="1", prompt=prompt, answer=answer, columns=columns)
    return Question(sample, kind=kind, options=("red", "blue") if kind == "choice" else ())


def _judged(session, name: str, judge: Judge | None, *asked: tuple[Question, str]):
    encode, eos = session.encoder.encode_text, session.loaded.eos_token_ids[:1]
    think, answer = session.config.prompt.think_tag, session.config.prompt.answer_tag
    texts = [f"<{think}>so</{think}> <{answer}>{a}</{answer}>" for _, a in asked]
    responses = [
        (question, Completion(encode(text) + eos, finished=True))
        for (question, _), text in zip(asked, texts, strict=True)
    ]
    return judge_responses(session, _questions(name), judge, responses)


def test_the_judge_is_asked_about_open_answers_alone(server, tiny_folder):
    """Sec. 8.3: what no rule finds right among words; letters and numbers are decided by rule."""
    reward = {"judge": {"base_url": server.url, "model": "m"}}
    session = make_session(tiny_folder(), {"reward": reward})
    server.reply = lambda prompt: "CORRECT" if "wading bird" in prompt else "INCORRECT"
    bird = _question("what is it?", "heron", "open")
    judged = _judged(
        *(session, "mmmu", Judge(session.config.reward.judge)),
        (bird, "a wading bird"),
        (bird, "a fish"),
        (bird, "a heron"),
        (bird, " "),
        (_question("how many?", "12", "open"), "13"),
        (_question("which?", "A", "choice"), "blue"),
    )
    assert [one.judgement.accuracy for one in judged] == [1, 0, 1, 0, 0, 0]
    assert [one.judgement.is_exact for one in judged] == [False, False, True] + 3 * [False]
    assert judged[0].judgement.reason == "the judge agrees"
    assert len(server.prompts) == 2 and all("what is it?" in text for text in server.prompts)


@pytest.mark.parametrize(
    ("key", "columns", "answer", "accuracy"),
    [
        ("A", {"options": ["red", "blue"]}, "red", 1),
        ("A", {"options": ["red", "blue"]}, "blue", 0),
        ("14", {"answer_type": "relaxed"}, "14.5", 1),
        ("14", {}, "14.5", 0),
        ("14", {"tolerance": 0.1}, "15", 1),
    ],
)
def test_own_rows_are_scored_as_in_training(key, columns, answer, accuracy, tiny_folder):
    """The row's options, type and tolerance count in `--benchmarks data` as in a reward."""
    session = make_session(tiny_folder())
    (one,) = _judged(session, "data", None, (_question("?", key, **columns), answer))
    assert one.judgement.accuracy == accuracy and one.answer == answer
    assert one.format_score == 1.0


def test_own_rewards_score_own_rows(tiny_folder, tmp_path):
    """`reward.functions` say what is right in evaluation too."""
    path = tmp_path / "reward.py"
    path.write_text("def score(prompts, completions, **rest): return [0.25 for _ in completions]\n")
    reward = {"functions": [{"function": f"{path}:score"}]}
    session = make_session(tiny_folder(), {"reward": reward})
    (one,) = _judged(session, "data", None, (_question("?", "red"), "red"))
    assert one.judgement.accuracy == 0.25


def test_other_tags_count_too(tiny_folder):
    """Qwen3-VL's `<reasoning>`: its format and its answer span."""
    session = make_session(tiny_folder("tiny-qwen3-vl"), {"prompt": {"think_tag": "reasoning"}})
    (one,) = _judged(session, "mmmu", None, (_question("?", "A", "choice"), "(A)"))
    assert one.format_score == 1.0 and one.judgement.accuracy == 1.0
