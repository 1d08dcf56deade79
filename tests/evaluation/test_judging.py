"""Each benchmark's normalisation: which answers are right."""

from dataclasses import replace

import pytest

from care_train.data import Sample
from care_train.evaluation import answers
from care_train.evaluation.answers import choose, edit_distance, judge_free_form, settle
from care_train.evaluation.benchmarks import BENCHMARKS
from care_train.evaluation.question import Question
from care_train.verifier import WorkerPool, verify_batch

COLORS = ("red", "green", "blue", "yellow")


def _judge(name: str, predicted: str, expected: str, **values):
    question = Question(Sample(id="1", prompt="?", answer=expected), **values)
    return settle([BENCHMARKS[name].judge(predicted, question)])[0]


@pytest.mark.parametrize(
    ("kind", "precision", "predicted", "expected", "right"),
    [
        ("choice", None, "C", "blue", True),
        ("choice", None, "(c)", "blue", True),
        ("choice", None, "(C) blue", "blue", True),
        ("choice", None, "blue", "blue", True),
        ("choice", None, "bleu", "blue", True),  # the nearest option by edit distance
        ("choice", None, "B", "blue", False),
        ("choice", None, "(B) blue", "blue", False),  # the letter decides
        ("integer", None, "14", "14", True),
        ("integer", None, "14.0", "14", True),
        ("integer", None, "14.9", "14", True),  # the authors cut decimals off
        ("integer", None, "15", "14", False),
        ("integer", None, "1e999", "14", False),
        ("float", 1, "0.54", "0.5", True),
        ("float", 1, "0.56", "0.5", False),
        ("float", 2, "1.450", "1.45", True),
        ("float", 2, "nan", "1.45", False),
        ("list", None, "[2007, 2008]", "[2007, 2008]", True),
        ("list", None, "[2008, 2007]", "[2007, 2008]", False),
    ],
)
def test_mathvista(kind, precision, predicted, expected, right):
    """Letters, option texts, cut integers, rounded floats, lists as they are written."""
    options = COLORS if kind == "choice" else ()
    verdict = _judge(
        "mathvista", predicted, expected, options=options, kind=kind, precision=precision
    )
    assert verdict.accuracy == right and verdict.is_exact == right


@pytest.mark.parametrize(
    ("kind", "predicted", "expected", "right", "exact"),
    [
        ("choice", "B", "B", True, True),
        ("choice", "B: green", "B", True, True),
        ("choice", "green", "B", True, True),
        ("choice", "A", "B", False, False),
        ("choice", "purple", "B", False, False),
        ("free-form", "14", "14", True, True),
        ("free-form", "14.0", "14", True, False),
        ("free-form", "1,400", "1400", True, False),
        ("free-form", "15", "14", False, False),
        ("free-form", "(-2,1]", "(-2,1)", False, False),
    ],
)
def test_mathverse(kind, predicted, expected, right, exact):
    """Choices by letter or text; free-form answers as the verifier reads them, told apart."""
    options = COLORS if kind == "choice" else ()
    verdict = _judge("mathverse", predicted, expected, options=options, kind=kind)
    assert (verdict.accuracy, verdict.is_exact) == (right, exact)


@pytest.mark.parametrize(
    ("name", "kind", "predicted", "expected", "right"),
    [
        ("mathvista", "integer", "14 cm", "14", True),
        ("mathvista", "integer", "about 14 or 15", "14", False),
        ("mathvista", "list", "2007, 2008", "[2007, 2008]", True),
        ("mathverse", "free-form", r"2\sqrt{2}", r"\sqrt{8}", True),
        ("mathverse", "free-form", "(-2, 1]", "(-2,1]", True),
        ("mathverse", "free-form", "(-2, 1)", "(-2,1]", False),
        ("math_vision", "", r"\frac{\pi}{2}", r"0.5\pi", True),
        ("math_vision", "", r"\frac{\pi}{3}", r"0.5\pi", False),
        ("mmmu", "open", "twelve and a half", "12.5", False),
    ],
)
def test_free_form_answers_are_read_by_the_verifier(name, kind, predicted, expected, right):
    """Units, lists, algebra: right, and told apart from the benchmark's own exact match."""
    verdict = _judge(name, predicted, expected, kind=kind, precision=1)
    assert verdict.accuracy == right and not verdict.is_exact


def test_mathverse_choices_within_the_image_count_by_letter():
    """Without the options' texts letters are all there is."""
    assert _judge("mathverse", "(D)", "D", kind="choice").accuracy == 1.0
    assert _judge("mathverse", "C", "D", kind="choice").accuracy == 0.0


@pytest.mark.parametrize(
    ("predicted", "expected", "options", "right"),
    [
        ("C", "C", COLORS, True),
        ("c", "C", COLORS, True),
        (r"\boxed{C}", "C", COLORS, True),
        ("blue", "C", COLORS, True),
        ("B", "C", COLORS, False),
        ("7.00", "A", ("7", "8"), True),
        (r"\frac{1}{2}", "B", ("0.4", "0.5"), True),
        ("4", "4", (), True),
        ("4.001", "4", (), True),  # equal at two decimals
        ("4.01", "4", (), False),
        (r"$x = 12^{\circ}$", "12", (), True),
        (r"\dfrac{9}{16}", r"\frac{9}{16}", (), True),
        ("9/16", r"\frac{9}{16}", (), True),
        ("0.5625", r"\frac{9}{16}", (), True),
        ("0.6", r"\frac{9}{16}", (), False),
        (r"\boxed{12 \text{ km}}", "12", (), True),
        ("", "4", (), False),
        ("9" * 5000, "4", (), False),
    ],
)
def test_math_vision(predicted, expected, options, right):
    """Letter or value of the option; LaTeX stripped; numbers at two decimals."""
    verdict = _judge("math_vision", predicted, expected, options=options)
    assert verdict.accuracy == right


@pytest.mark.parametrize("name", ["mmmu", "mmmu_pro_standard", "mmmu_pro_vision"])
@pytest.mark.parametrize(
    ("predicted", "right"),
    [
        ("B", True),
        ("b", True),
        ("(B)", True),
        ("B.", True),
        ("(A) or rather (B)", True),
        ("(B), not (A)", False),
        ("The answer is B", True),
        ("it clearly is the green one here", True),
        ("green", True),
        ("A", False),
        ("K", False),
        ("purple", False),
        ("Bad", False),
    ],
)
def test_mmmu_choices(name, predicted, right):
    """Letters in brackets, alone, or texts; of several the last; none is wrong, never a guess."""
    verdict = _judge(name, predicted, "B", options=COLORS, kind="choice")
    assert verdict.accuracy == right and verdict.is_exact == right


@pytest.mark.parametrize(
    ("predicted", "expected", "right"),
    [
        ("red", "red", True),
        ("Dark red.", "['red', 'blue']", True),
        ("green", "['red', 'blue']", False),
        ("12.5", "12.50", True),
        ("1,200", "1200", True),
        ("The result is 12.504", "12.5", True),
        ("12.6", "12.5", False),
        ("$1.06", "['1.06']", True),
        ("tear", "a", False),  # one character is no evidence inside a word
        ("x" * 5000 + "red", "red", False),
    ],
)
def test_mmmu_open(predicted, expected, right):
    """Numbers at two decimals, words within the answer, any of several keys."""
    assert _judge("mmmu", predicted, expected, kind="open").accuracy == right


def test_an_option_as_a_whole_comes_before_its_first_letter():
    """ "A triangle" is the option of that text, not option A."""
    options = ("a square", "a triangle")
    assert choose("A triangle", options) == 1
    assert choose("A", options) == 0
    assert choose("", options) is None
    assert choose("I am not sure", ()) is None


def test_equal_answers_vote_alike():
    """What a majority counts: letters for choices, normalised text otherwise."""
    votes = [
        _judge("mmmu", text, "B", options=COLORS, kind="choice").vote
        for text in ("B", "(B) green", "green")
    ]
    assert votes == ["B", "B", "B"]
    assert len({_judge("mathverse", text, "7").vote for text in ("Red", " red. ", "RED")}) == 1


def test_edit_distance():
    """Insertions, deletions and substitutions count 1 each."""
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3 and edit_distance("abc", "abc") == 0


def test_a_batch_goes_to_the_verifier_at_once(monkeypatch: pytest.MonkeyPatch):
    """One call for all open answers, whose workers share it; verdicts keep their places."""
    batches = []

    def batch(items, pool):
        batches.append(len(items))
        return verify_batch(items, pool)

    monkeypatch.setattr(answers, "verify_batch", batch)
    pool = WorkerPool(workers=2)
    asked = [judge_free_form(f"{i}\\sqrt{{2}}", "\\sqrt{8}", i == 5) for i in range(8)]
    two_keys = replace(asked[0], asked=tuple(item for one in asked[:3] for item in one.asked))
    settled = settle([*asked, two_keys], pool)
    assert [one.accuracy for one in settled] == [0, 0, 1, 0, 0, 1, 0, 0, 1]
    assert [one.is_exact for one in settled] == [i == 5 for i in range(9)]
    assert batches == [10] and len(pool.pids) == 2 and all(one.reason for one in settled)
    pool.close()
