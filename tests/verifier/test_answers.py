"""When an answer equals its key."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from care_train.verifier import verify
from care_train.verifier.answers import MAX_ANSWER_CHARS
from care_train.verifier.intervals import read_real_set

EQUAL = [
    ("blue", "blue"),
    (" Blue\n", "blue"),
    ("BLUE.", "blue"),
    ('"blue."', "blue"),
    ("**blue**", "blue"),
    ("\u201cblue\u201d", "blue"),
    ("the blue circle", "blue  circle"),
    ("a circle", "circle"),
    ("Yes", "yes"),
    ("\uff42\uff4c\uff55\uff45", "blue"),
    ("stra\u00dfe", "STRASSE"),
    ("cafe\u0301", "caf\u00e9"),
    ("...", "..."),
    ("B", "B"),
    ("b", "B"),
    ("(B)", "B"),
    ("[B]", "B"),
    ("B.", "(B)"),
    ("B)", "B"),
    ("B:", "B"),
    ("B. red", "B"),
    ("1e3", "1000"),
    ("5 apples", "5"),
    ("**(B)**", "B"),
    ("A", "(A)"),
    ("5", "5"),
    ("5.", "5"),
    ("5.0", "5"),
    ("[[1, 0], [0, 25]]", "[[1,0],[0,25]]"),
    ("P(3, -4)", "P(3,-4)"),
    ("EF ⊥ GH", "EF⊥GH"),
    ("12 → 9 → 6", "12→9→6"),
    ("45°30'", "45° 30'"),
    ("3,6,9,...", "3, 6, 9, ..."),
    ("C\uff1a12 cm", "C"),
    ("\uff22\uff0e7", "B"),
    ("2x-7\u3002", "2x-7"),
    ("no\u3002", "no"),
    ("20\u201325", "20-25"),
    ("+5", "5"),
    ("005", "5"),
    (".5", "0.50"),
    ("1,234,567", "1234567"),
    ("1,234.50", "1234.5"),
    ("\N{MINUS SIGN}3", "-3"),
    ("-0", "0"),
    ("3.1415927", "3.14159265"),
    ("50%", "50"),
    ("50", "50 %"),
    ("50%", "0.5"),
    ("0.5", "50%"),
    ("12.50%", "12.5%"),
    ("\uff11\uff12", "12"),
    ("9" * 40, "9" * 40 + ".0"),
]

DIFFERENT = [
    ("10, 200", "10,200"),
    ("3. 5", "3.5"),
    ("1 2", "12"),
    ("a b", "ab"),
    ("C\uff1a12 cm, or B", "C"),
    ("blue", "red"),
    ("", "blue"),
    ("  \n", "blue"),
    ("blue or red", "blue"),
    ("not blue", "blue"),
    ("bluee", "blue"),
    ("the", "a"),
    ("A", "B"),
    ("(A) (B)", "A"),
    ("A B", "B"),
    ("a b", "b"),
    ("A, B", "A"),
    ("A or B", "A"),
    ("AB", "A"),
    ("((B))", "B"),
    ("(B", "B"),
    ("5", "6"),
    ("5", "-5"),
    ("5!", "5"),
    ("y'", "y"),
    ('5"', "5"),
    ("1,23", "123"),
    ("1,2", "12"),
    ("12,34,567", "1234567"),
    ("1 234", "1234"),
    ("10000001", "10000000"),
    ("3.1416", "3.14159265"),
    ("0.0000001", "0"),
    ("9" * 40, "9" * 39 + "8"),
    ("50%", "5000"),
    ("50%", "0.5%"),
    ("0.5%", "50%"),
    ("2+3", "5"),
    ("nan", "5"),
    ("inf", "5"),
    ("0x10", "16"),
    ("1_000", "1000"),
    ("\u0665", "5"),
    (".", "0"),
    ("%", "0"),
    ("--5", "5"),
    ("__import__('os')", "5"),
]


@pytest.mark.parametrize(("predicted", "expected"), EQUAL)
def test_equal(predicted: str, expected: str):
    """Spelling variants of one answer are right, and say why."""
    verdict = verify(predicted, expected)
    assert verdict.accuracy == 1.0
    reasons = ("exact match", "same choice", "equal numbers", "equal percentages")
    assert verdict.reason in (*reasons, "the same expression")


@pytest.mark.parametrize(("predicted", "expected"), DIFFERENT)
def test_different(predicted: str, expected: str):
    """Other answers, hedges and expressions are wrong, and say why."""
    verdict = verify(predicted, expected)
    assert verdict.accuracy == 0.0
    assert verdict.reason


def test_overlong_answers_are_wrong():
    """An answer beyond the bound is wrong with a reason; a key that long can still be matched."""
    assert verify("5" * (MAX_ANSWER_CHARS + 1), "5").reason.startswith("answer too long: 1025")
    assert verify("5." + "0" * (MAX_ANSWER_CHARS - 2), "5").accuracy == 1.0
    assert verify("word " * 1000, "word " * 1000).accuracy == 1.0


def test_reasons_are_short_and_printable():
    """A reason shows both answers, cut and escaped: it goes to a terminal."""
    reason = verify("\x1b[31m" + "x" * 500, "blue").reason
    assert reason.startswith(r"got '\x1b[31mxxx") and reason.endswith("wanted 'blue'")
    assert len(reason) < 120 and "\x1b" not in reason


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_gets_a_verdict(predicted: str, expected: str):
    """No text raises, and every non-blank answer equals itself."""
    assert verify(predicted, expected).accuracy in (0.0, 1.0)
    assert verify(predicted, predicted).accuracy == float(bool(predicted.strip()))


@given(st.from_regex(r"[-+]?[0-9,.]{0,30}%?", fullmatch=True), st.decimals(-999, 999, places=3))
def test_any_number_like_text_gets_a_verdict(predicted: str, expected: object):
    """Malformed numbers are wrong, not errors."""
    assert verify(predicted, str(expected)).accuracy in (0.0, 1.0)


@pytest.mark.parametrize(
    "text",
    ["1" * 10**6, "1,111" * 10**5, '"' * 1024, "\ufdfa" * 1024, ". " * 512, "(" * 1024],
    ids=["digits", "groups", "quotes", "expanding", "points", "brackets"],
)
def test_hostile_answers_are_quick(text: str):
    """Long or expanding answers cost milliseconds."""
    start = time.perf_counter()
    assert verify(text, "5").accuracy == 0.0
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize("answer", ["x < 3 or x", "x", "x, x < 3", "x < 3 and x", "x or x < 1 < 2"])
def test_a_variable_without_a_relation_is_no_condition(answer):
    """Half of an inequality is no set of numbers: wrong, not an error."""
    assert read_real_set(answer) is None
    assert verify(answer, "x < 3").accuracy == 0
