"""When an answer equals its key: docs/verifier.md's table, more spellings, collected cases."""

import io
import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from care_train.config import Config
from care_train.verifier import AnswerType, infer_type, verify
from care_train.verifier.answers import MAX_ANSWER_CHARS
from care_train.verifier.command import verify_lines

DOCS = Path(__file__).parents[2] / "docs" / "verifier.md"
CASES = Path(__file__).parents[3] / "shared" / "cases" / "verifier.jsonl"
_CODE = re.compile(r"`([^`]+)`")
_DECLARED = {("set", "red, green"), ("list", "1, 2, 3"), ("relaxed", "100"), ("relaxed", "Germany")}


def _documented() -> list[tuple[str, str, tuple[str, ...], list[str], list[str]]]:
    rows = []
    for line in DOCS.read_text().splitlines():
        cells = line.strip("|").split("|")
        if line.startswith("| `") and len(cells) == 4:
            kind, keys, right, wrong = (_CODE.findall(cell) for cell in cells)
            rows.append((kind[0], keys[0], tuple(keys[1:]), right, wrong))
    return rows


ROWS = _documented()


def test_every_type_has_examples_in_the_docs():
    """The table covers all types."""
    assert {row[0] for row in ROWS} == set(AnswerType) - {AnswerType.FUNCTION}
    assert len(ROWS) > 25


@pytest.mark.parametrize(
    ("kind", "key", "options", "right", "wrong"), ROWS, ids=[f"{row[0]}-{row[1]}" for row in ROWS]
)
def test_the_docs_say_what_is_true(
    kind: str, key: str, options: tuple[str, ...], right: list[str], wrong: list[str]
):
    """Each example of the table gets the verdict of its column, and types are inferred as said."""
    assert right and wrong
    if (kind, key) not in _DECLARED:
        assert infer_type(key, options) == kind
    for answers, accuracy in ((right, 1.0), (wrong, 0.0)):
        for answer in answers:
            verdict = verify(answer, key, AnswerType(kind), options=options)
            assert verdict.accuracy == accuracy, (answer, verdict.reason)
            assert verdict.reason and not verdict.reason.startswith("unverified")


@pytest.mark.skipif(not CASES.is_file(), reason="the cases are not here")
def test_collected_cases():
    """Pairs that an earlier form judged wrongly; those of the benchmarks are test_judging.py's."""
    cases = [json.loads(line) for line in CASES.read_text().splitlines()]
    cases = [case for case in cases if "benchmark" not in case]
    fields = ("response", "answer", "options", "type")
    rows = [{name: case[name] for name in fields if case.get(name)} for case in cases]
    target = io.StringIO()
    verify_lines(Config(), io.StringIO("\n".join(map(json.dumps, rows))), target)
    verdicts = [json.loads(line) for line in target.getvalue().splitlines()]
    wrong = [
        (case, verdict["reason"])
        for case, verdict in zip(cases, verdicts, strict=True)
        if (verdict["acc"] == 1) != bool(case["expected"])
    ]
    assert not wrong


# Beside the documented ones: a key, right answers, wrong ones, with a bar between answers.
SPELLINGS = [
    (
        "blue",
        " Blue\n|BLUE.|**blue**|\u201cblue\u201d|\uff42\uff4c\uff55\uff45",
        "red|not blue|bluee",
    ),
    ("blue", '"blue."', "|  \n|blue or red"),
    ("blue  circle", "the blue circle", "circle"),
    ("STRASSE", "stra\u00dfe", "strase"),
    ("caf\u00e9", "cafe\u0301", "caf"),
    ("ab", "AB", "a b"),
    ("A", "(A)", "(A) (B)|A, B|A or B|AB|a b"),
    ("B", "b|(B)|[B]|B)|B:|B. red|**(B)**|\uff22\uff0e7", "A|A B|((B))|(B"),
    ("(B)", "B.", "A"),
    ("C", "C\uff1a12 cm", "C\uff1a12 cm, or B"),
    ("5", "5.|5.0|005|5 apples", "6|5!|5\"|2+3|nan|inf|\u0665|--5|__import__('os')"),
    ("0.50", ".5|50%", "5"),
    ("1000", "1e3", "1_000"),
    ("1234567", "1,234,567", "12,34,567"),
    ("1234", "1,234.00", "1 234|123,4"),
    ("10,200", "10,200", "10, 200"),
    ("-3", "\N{MINUS SIGN}3", "3"),
    ("1,200 apples", "1200|1,200 apples", "1|200|12,00"),
    ("ABD", "A, B, D|A and B and D|A\u3001B\u3001D", "AB|A, B|A, B, C, D"),
    # A variable at the end is no unit.
    (r"\frac{1}{3}\pi r^2 h", r"\frac{\pi r^2 h}{3}|\pi hr^2/3", r"\frac{1}{3}\pi r^2"),
    ("x^2 + 3 t", "3t + x^2", "x^2 + 3"),
    (r"\frac{1}{2} m v^2", r"\frac{mv^2}{2}", r"1/2|0.5|\frac{1}{2} m"),
    (r"A^T B", r"A^{T}B", r"AB|A^T B^T"),
    ("3x'", "3 x'", "3x|3x''"),
    ("6s^2", "6 s^2|6s^{2}", "6|6t^2"),
    ("12 v/t", "12v/t", "12"),
    ("5 N\u00b7s", r"5|5 N s|5 \mathrm{~N}\cdot\mathrm{s}", "5 N|5 J s"),
    ("0.5 J/m^3", "0.5", "0.5 J/m^2"),
    (r"9\pi", r"9\pi \text{ m}|9\pi m", "9|9 m"),
    (r"(x+2)\text{ m}", r"x+2|2+x \text{ m}", r"x+2\text{ cm}|x m"),
    (r"2x \text{ h}", "2x", "2x h^2|2"),
    ("5 m", "5 (m)", "6 (m)"),
    ("I^2R", "I^2 R", "I2R"),
    (r"\triangle ABC", "triangle ABC", "triangle ABD"),
    ("Coca-Cola", "Coca-Cola\u00ae", "Cola"),
    ("(AB)(CD)", "(AB)(CD)", "AB CD"),
    ("AB CD", "AB  CD", "ABCD"),
    ('["5", "five people"]', "5|Five people", "4|5, five people"),
    ("10 m/s", r"10 m s^{-1}|36 km/h|10", "10 m|10 m/h"),
    ("5 N m", "5|5 N\u00b7m|500 N cm", "5 N|5 J s"),
    (r"2\sqrt{3} cm", r"\sqrt{12}|\sqrt{12} cm|2\sqrt{3}", r"2\sqrt{3} m"),
    ("4 cm", r"\sqrt{16}|\sqrt{16} cm|40 mm", r"\sqrt{16} m"),
    ("20 \u00b0C", "20 degrees Celsius", "20 \u00b0F|20 degrees Fahrenheit"),
    ("CO2", r"CO_2|$\mathrm{CO}_2$|CO_{2}", "CO|CO3|C2O"),
    ("H_2O", "H2O", "H2O2|HO"),
    (r"AB \parallel CD", "AB \u2225 CD", "AB \u22a5 CD|AB CD"),
    ("120\u00b0 clockwise", "120 degrees clockwise", "120\u00b0 counterclockwise"),
    ("0", "-0", "0.0000001|.|%"),
    ("9" * 40, "9" * 40 + ".0", "9" * 39 + "8"),
    ("3.14159265", "3.1415927", "3.1416"),
    ("12", "\uff11\uff12", "1 2|1,2"),
    ("16", "16.", "0x10"),
    ("50%", "50|0.5|50.0%", "0.5%|5000"),
    ("0.5%", "0.50%", "50%"),
    ("20-25", "20\u201325", "2025"),
    ("[[1,0],[0,25]]", "[[1, 0], [0, 25]]", "[[1,0],[0,2]]"),
    ("P(3,-4)", "P(3, -4)", "P(3, 4)"),
    ("EF\u22a5GH", "EF \u22a5 GH", "EF"),
    ("12\u21929\u21926", "12 \u2192 9 \u2192 6", "12\u21929"),
    ("45\u00b0 30'", "45\u00b030'", "45\u00b0"),
    ("2x-7", "2x-7\u3002", "2x"),
    ("y", "Y", "y'"),
    ("\ufeff5", "5|\u200b5\u200b", "6"),
    ("x^2+1", "x^2\u2060+1", "x^2"),
    # Half of an inequality is no set of numbers.
    ("x < 3", "x<3", "x < 3 or x|x|x, x < 3|x < 3 and x|x or x < 1 < 2"),
]


@pytest.mark.parametrize(("key", "right", "wrong"), SPELLINGS)
def test_spellings_of_one_answer(key: str, right: str, wrong: str):
    """Other answers, hedges and expressions are wrong; each verdict says why."""
    for answers, accuracy in ((right, 1.0), (wrong, 0.0)):
        for answer in answers.split("|"):
            verdict = verify(answer, key)
            assert verdict.accuracy == accuracy and verdict.reason, (answer, verdict.reason)


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


ANY = st.text(max_size=40) | st.from_regex(r"[-+]?[0-9,.]{0,30}%?", fullmatch=True)


@given(ANY, st.text(max_size=40) | st.decimals(-999, 999, places=3).map(str))
def test_any_text_gets_a_verdict(predicted: str, expected: str):
    """No text raises, malformed numbers neither; every non-blank text equals itself."""
    assert verify(predicted, expected).accuracy in (0.0, 1.0)
    assert verify(expected, expected).accuracy == float(bool(expected.strip()))


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
