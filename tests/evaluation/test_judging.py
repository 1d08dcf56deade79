"""Which answers are right: each benchmark's rule, then the verifier, then a judge."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.protocol_fixtures import benchmark_rows
from care_train.data import Sample
from care_train.evaluation.answering import judge_responses
from care_train.evaluation.benchmarks import BENCHMARKS
from care_train.evaluation.question import Question, choose_option, right_options
from care_train.rollout.engine import Completion
from care_train.verifier import AnswerType
from tests.train.builders import make_session
from tests.verifier.judge_server import Server, serving

COLORS = ("red", "green", "blue", "yellow")
BARE = ("A", "B", "C", "D", "E")


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
    return BENCHMARKS[name].to_question(row | columns, f"{name}: row 1", Path())


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


def _mathvista(kind: str, precision: float | None = None) -> dict:
    return {"answer_type": kind, "precision": precision}


@pytest.mark.parametrize(
    ("name", "predicted", "key", "options", "columns", "exact"),
    [
        # MathVista: the letter, or else the option of the least edit distance.
        ("mathvista", "C", "blue", COLORS, {}, True),
        ("mathvista", "(c)", "blue", COLORS, {}, True),
        ("mathvista", "(C) blue", "blue", COLORS, {}, True),
        ("mathvista", "blue", "blue", COLORS, {}, True),
        ("mathvista", "bleu", "blue", COLORS, {}, True),
        ("mathvista", "B", "blue", COLORS, {}, False),
        ("mathvista", "(B) blue", "blue", COLORS, {}, False),
        ("mathvista", "D", "7", ("5", "6", "7", "7"), {}, True),  # two options hold the key
        ("mathvista", "B", "7", ("5", "6", "7", "7"), {}, False),
        # Integers are cut, floats rounded, lists as they are written.
        ("mathvista", "14", "14", (), _mathvista("integer"), True),
        ("mathvista", "14.0", "14", (), _mathvista("integer"), True),
        ("mathvista", "14.9", "14", (), _mathvista("integer"), True),
        ("mathvista", "15", "14", (), _mathvista("integer"), False),
        ("mathvista", "1e999", "14", (), _mathvista("integer"), False),
        ("mathvista", "0.54", "0.5", (), _mathvista("float", 1.0), True),
        ("mathvista", "0.56", "0.5", (), _mathvista("float", 1.0), False),
        ("mathvista", "1.450", "1.45", (), _mathvista("float", 2.0), True),
        ("mathvista", "nan", "1.45", (), _mathvista("float", 2.0), False),
        ("mathvista", "[2007, 2008]", "[2007, 2008]", (), _mathvista("list"), True),
        ("mathvista", "[2008, 2007]", "[2007, 2008]", (), _mathvista("list"), False),
        # MathVerse: letters or texts, also as keys; the same string.
        ("mathverse", "B", "B", COLORS, {}, True),
        ("mathverse", "B: green", "B", COLORS, {}, True),
        ("mathverse", "green", "B", COLORS, {}, True),
        ("mathverse", "A", "B", COLORS, {}, False),
        ("mathverse", "purple", "B", COLORS, {}, False),
        ("mathverse", "B", "(B)", COLORS, {}, True),
        ("mathverse", "(B)", "green", COLORS, {}, True),
        ("mathverse", "A", "green", COLORS, {}, False),
        ("mathverse", "(D)", "D", (), {"question_type": "multi-choice"}, True),
        ("mathverse", "C", "D", (), {"question_type": "multi-choice"}, False),
        ("mathverse", "A", "True", (), {"question_type": "multi-choice"}, True),
        ("mathverse", "B", "Yes", (), {"question_type": "multi-choice"}, False),
        ("mathverse", "14", "14", (), {}, True),
        # MATH-Vision: letter or value of the option; numbers at two decimals.
        ("math_vision", "C", "C", COLORS, {}, True),
        ("math_vision", "c", "C", COLORS, {}, True),
        ("math_vision", r"\boxed{C}", "C", COLORS, {}, True),
        ("math_vision", "blue", "C", COLORS, {}, True),
        ("math_vision", "B", "C", COLORS, {}, False),
        ("math_vision", "7.00", "A", ("7", "8"), {}, True),
        ("math_vision", r"\frac{1}{2}", "B", ("0.4", "0.5"), {}, True),
        ("math_vision", r"$3\sqrt{5}$", "B", ("6", r"$3\sqrt{5}$"), {}, True),
        ("math_vision", "$x+y=40^{\\circ}$", "A", (r"$x+y=40^{\circ}$", r"$x=y$"), {}, True),
        ("math_vision", r"$\sqrt{A C}$", "B", ("$A C$", r"$\sqrt{A C}$"), {}, True),
        ("math_vision", "D", "C", ("A", "B", "D", "no other"), {}, True),  # the key's own text
        ("math_vision", "D", "D", ("A", "B", "D", "no other"), {}, True),
        ("math_vision", "4", "4", (), {}, True),
        ("math_vision", "4.001", "4", (), {}, True),
        ("math_vision", r"$x = 12^{\circ}$", "12", (), {}, True),
        ("math_vision", r"\dfrac{9}{16}", r"\frac{9}{16}", (), {}, True),
        ("math_vision", "9/16", r"\frac{9}{16}", (), {}, True),
        ("math_vision", "0.5625", r"\frac{9}{16}", (), {}, True),
        ("math_vision", "0.6", r"\frac{9}{16}", (), {}, False),
        ("math_vision", r"\boxed{12 \text{ km}}", "12", (), {}, True),
        ("math_vision", " ", "4", (), {}, False),
        ("math_vision", "9" * 5000, "4", (), {}, False),
        # MMMU's open questions: numbers at two decimals, words within, any of several keys.
        ("mmmu", "red", "red", (), {}, True),
        ("mmmu", "Dark red.", "['red', 'blue']", (), {}, True),
        ("mmmu", "12.5", "12.50", (), {}, True),
        ("mmmu", "1,200", "1200", (), {}, True),
        ("mmmu", "The result is 12.504", "12.5", (), {}, True),
        ("mmmu", "12.6", "12.5", (), {}, False),
        ("mmmu", "$1.06", "['1.06']", (), {}, True),
        ("mmmu", "tear", "a", (), {}, False),  # one character is no evidence inside a word
        ("mmmu", "x" * 5000 + "red", "red", (), {}, False),
        ("mmmu", "[0, 1]", "[0, 1]", (), {}, True),  # no list of keys
        # Free-form answers without an exact match are read by the verifier: units, lists, algebra.
        ("mathvista", "14 cm", "14", (), _mathvista("integer"), None),
        ("mathvista", "about 14 or 15", "14", (), _mathvista("integer"), False),
        ("mathvista", "2007, 2008", "[2007, 2008]", (), _mathvista("list"), None),
        ("mathverse", "14.0", "14", (), {}, None),
        ("mathverse", "1,400", "1400", (), {}, None),
        ("mathverse", "15", "14", (), {}, False),
        ("mathverse", r"2\sqrt{2}", r"\sqrt{8}", (), {}, None),
        ("mathverse", "(-2, 1]", "(-2,1]", (), {}, None),
        ("mathverse", "67", "Volume $=67$ cm$^{3}$", (), {}, None),  # keys with a label
        ("mathverse", "y=3x-5", "$y=3 x-5$", (), {}, None),
        ("mathverse", "5", "Volume $=67$ cm$^{3}$", (), {}, False),
        ("mathverse", "(-2, 1)", "(-2,1]", (), {}, False),
        ("math_vision", r"\frac{\pi}{2}", r"0.5\pi", (), {}, None),
        ("math_vision", r"\frac{\pi}{3}", r"0.5\pi", (), {}, False),
        ("mmmu", "0.5", "['x', '1/2']", (), {}, None),
        ("mmmu", "twelve and a half", "12.5", (), {}, False),
    ],
)
def test_exact_match(name, predicted, key, options, columns, exact, session):
    """Each benchmark's own rule decides, and else the verifier (None: right by it alone)."""
    record = _record(session, name, predicted, key, options, **columns)
    assert (record["accuracy"], record["exact"]) == (exact is not False, bool(exact))
    assert record["reason"]


@pytest.mark.parametrize(
    ("predicted", "options", "place"),
    [
        # MMMU's rule: letters in brackets, letters alone, texts; of several the last.
        ("B", COLORS, 1),
        ("b", COLORS, 1),
        ("(B)", COLORS, 1),
        ("B.", COLORS, 1),
        ("(A) or rather (B)", COLORS, 1),
        ("(B), not (A)", COLORS, 0),
        ("The answer is B", COLORS, 1),
        ("Answer: (b)", COLORS, 1),
        ("I think it is C", COLORS, 2),
        ("A is right", COLORS, 0),
        ("it clearly is the green one here", COLORS, 1),
        ("green", COLORS, 1),
        ("it is dark red", ("red", "dark red"), 1),
        ("K", COLORS, None),
        ("purple", COLORS, None),
        ("Bad", COLORS, None),
        ("credible", COLORS, None),  # no option within a word
        ("7.5", ("7", "5", "8"), None),
        # An option's text as a whole comes before its letters.
        ("A triangle", ("a square", "a triangle"), 1),
        ("A", ("a square", "a triangle"), 0),
        ("$5 A$", ("$3 A$", "$5 A$"), 1),
        # A letter and its own text, whatever capitals the text has.
        ("F. 3 A", ("1 A", "2 A", "4 A", "5 A", "6 A", "3 A"), 5),
        ("B. Vitamin A", ("Vitamin C", "Vitamin A"), 1),
        ("(C) From B to A", ("Up", "Down", "From B to A"), 2),
        ("C. A", ("C", "B", "A"), 2),
        ("option B: a moving average", ("A trend", "A moving average"), 1),
        ("B. about 3 A", ("2 A", "3 A"), 1),
        # Options that are letters alone: no word that holds or is a letter.
        ("hexagon", BARE, None),
        ("dog", BARE, None),
        ("image1", BARE, None),
        ("A hexagon", BARE, None),
        ("I'm unable to see it", tuple("ABCDEFGHIJ"), None),
        ("I cannot tell", tuple("ABCDEFGHIJ"), None),
        ("20 °C", BARE, None),
        ("C", BARE, 2),
        ("(D)", BARE, 3),
        ("e", BARE, 4),
        ("", BARE, None),
        ("I am not sure", (), None),
    ],
)
def test_the_option_an_answer_names(predicted, options, place):
    """None is wrong, never a guess."""
    question = Question(Sample(id="1", prompt="?", answer="A"), options)
    assert choose_option(predicted, question) == place


@pytest.mark.parametrize(
    ("key", "options", "places"),
    [
        ("C", COLORS, {2}),
        ("(C)", COLORS, {2}),
        ("Blue", COLORS, {2}),
        ("7", ("5", "7", "7"), {1, 2}),
        ("B, C", COLORS, set()),
        ("E", COLORS, set()),
        ("", ("", "a"), set()),
    ],
)
def test_the_options_a_key_names(key, options, places):
    """By letter, with brackets or without, or by text; several options may share it."""
    assert right_options(key, options) == places


@pytest.mark.parametrize("name", ["mmmu", "mmmu_pro_standard", "mmmu_pro_vision", "math_vision"])
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
    ("key", "columns", "answer", "accuracy"),
    [
        ("A", {"options": ("red", "blue")}, "red", 1),
        ("A", {"options": ("red", "blue")}, "blue", 0),
        ("14", {"answer_type": AnswerType.RELAXED}, "14.5", 1),
        ("14", {}, "14.5", 0),
        ("14", {"tolerance": 0.1}, "15", 1),
    ],
)
def test_own_rows_are_scored_as_in_training(key, columns, answer, accuracy, session):
    """The row's options, type and tolerance count in `--benchmarks data` as in a reward."""
    question = Question(Sample(id="1", prompt="?", answer=key, **columns))
    (record,) = _judged(session, "data", (question, answer))
    assert (record["accuracy"], record["answer"], record["format"]) == (accuracy, answer, 1.0)


def test_own_rewards_score_own_rows(tiny_folder, tmp_path):
    """`reward.functions` say what is right in evaluation too."""
    path = tmp_path / "reward.py"
    path.write_text("def score(prompts, completions, **rest): return [0.25 for _ in completions]\n")
    reward = {"functions": [{"function": f"{path}:score"}]}
    session = make_session(tiny_folder(), {"reward": reward})
    question = Question(Sample(id="1", prompt="?", answer="red"))
    assert _judged(session, "data", (question, "red"))[0]["accuracy"] == 0.25


def test_settings_of_the_run(tiny_folder):
    """Qwen3-VL's `<reasoning>`, and the last box with `reward.answer=boxed`, are read; the
    tolerance of rewards loosens nothing."""
    session = make_session(tiny_folder("tiny-qwen3-vl"), {"prompt": {"think_tag": "reasoning"}})
    record = _record(session, "mmmu", "(A)", "A", COLORS)
    assert record["format"] == 1.0 and record["accuracy"] == 1.0
    reward = {"answer": "boxed", "tolerance": 0.2}
    session = make_session(tiny_folder(), {"reward": reward})
    record = _record(session, "mathverse", r"\boxed{14}", "14")
    assert (record["format"], record["accuracy"], record["answer"]) == (1.0, 1.0, "14")
    assert _record(session, "mathverse", r"\boxed{15}", "14")["accuracy"] == 0


def _cases() -> list[dict]:
    """Pairs of public scorers and model outputs, where they lie beside the repository."""
    path = Path(__file__).parents[3] / "shared" / "cases" / "verifier.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [case for case in map(json.loads, lines) if case.get("benchmark")]


@pytest.mark.parametrize("case", _cases(), ids=str)
def test_collected_cases(case, session):
    """Answers that an earlier form of the rules judged wrongly."""
    predicted = case["response"].split("<answer>")[1].split("</answer>")[0]
    options = case.get("options") or ()
    odd = {} if options else {"question_type": "multi-choice"}
    record = _record(session, case["benchmark"], predicted, case["answer"], options, **odd)
    assert record["accuracy"] == case["expected"], case["why"]
