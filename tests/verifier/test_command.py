"""`care-train verify`: lines in, verdicts out."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from care_train.config import Config
from care_train.verifier.command import verify_lines

ROOT = Path(__file__).parents[2]


def _run(text: str | bytes, *arguments: str) -> tuple[int, list[dict], str]:
    command = [sys.executable, "-m", "care_train", "verify", *arguments]
    data = text.encode() if isinstance(text, str) else text
    done = subprocess.run(command, cwd=ROOT, input=data, capture_output=True)
    lines = [json.loads(line) for line in done.stdout.decode().splitlines()]
    return done.returncode, lines, done.stderr.decode()


def _line(answer: str, key: object, **more: object) -> str:
    text = f"<think>so</think><answer>{answer}</answer>"
    return json.dumps({"response": text, "answer": key} | more)


def test_verdicts_in_order():
    """Algebra, choices with options, declared types and tolerances: each line gets its verdict."""
    lines = [
        _line("1/\\sqrt{2}", "\\frac{\\sqrt{2}}{2}"),
        _line("red", "A", options=["red", "blue"]),
        "",
        _line("104", 100, type="relaxed"),
        _line("104", 100),
        _line("103", 100, tolerance=0.03),
        json.dumps({"response": "blue", "answer": "blue"}),
    ]
    code, verdicts, error = _run("\n".join(lines))
    assert code == 0, error
    assert [v["acc"] for v in verdicts] == [1.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    assert verdicts[0]["reason"] == "equal expressions"
    assert verdicts[-1]["reason"] == "no complete <answer> span" and verdicts[-1]["fmt"] == 0.0
    assert verdicts[0]["fmt"] == 1.0 and verdicts[0]["reward"] == 1.0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 2: not JSON (Expecting property name enclosed in double quotes"),
        ('{"answer": ' + "1" * 5000 + "}", "line 2: not JSON (Exceeds the limit"),
        ("[" * 100_000, "line 2: not JSON (nested too deeply): correct or drop the line"),
        ("[]", "line 2: got a list, wanted an object with named columns"),
        ('{"answer": "x"}', "line 2: response: got nothing beside answer, wanted text"),
        ('{"respons": "x", "answer": "x"}', "response: got nothing beside respons, answer, wanted"),
        ('{"response": 5, "answer": "x"}', "response: got 5 beside answer, wanted text"),
        ('{"response": "x", "answer": null}', "line 2: answer: got nothing in 'answer', and the"),
        ('{"response": "x", "answer": "x", "type": "maths"}', "2: answer_type: got 'maths', want"),
        ('{"response": "x", "answer": "x", "tolerance": "5%"}', "line 2: tolerance: got '5%'"),
        ('{"response": "x", "answer": "x", "options": 3}', "line 2: options: got 3, wanted a list"),
    ],
)
def test_bad_lines(bad: str, message: str):
    """A bad line is an error that names it, after the verdicts before it."""
    lines = f"{_line('5', 5)}\n{bad}\n{_line('5', 5)}\n"
    output = io.StringIO()
    with pytest.raises(ValueError, match=r"^standard input: line 2: ") as error:
        verify_lines(Config(), io.StringIO(lines), output)
    assert message in str(error.value)
    assert len(output.getvalue().splitlines()) == 1


def test_errors_end_the_command():
    """Status 2 and one line on standard error, without a traceback; so does an empty input."""
    code, verdicts, error = _run(f"{_line('5', 5)}\n{{\n")
    assert code == 2 and len(verdicts) == 1
    assert error.startswith("care-train verify: error: standard input: line 2: not JSON")
    assert "Traceback" not in error
    for nothing in ("", "\n \n"):
        code, verdicts, error = _run(nothing)
        assert code == 2 and not verdicts and "standard input: got no line, wanted {" in error


def test_many_lines_and_what_editors_add():
    """5,000 lines keep their order; a byte order mark and carriage returns are no content."""
    lines = [_line(str(i), i + (i % 7 == 0)) for i in range(5000)]
    output = io.StringIO()
    verify_lines(Config(), io.StringIO("\ufeff" + "\r\n".join(lines)), output)
    accuracies = [json.loads(line)["acc"] for line in output.getvalue().splitlines()]
    assert accuracies == [float(i % 7 != 0) for i in range(5000)]


def test_settings_apply():
    """Tags are those of the configuration."""
    text = json.dumps({"response": "<r>so</r><a>5</a>", "answer": "5"})
    _, verdicts, _ = _run(text, "prompt.think_tag=r", "prompt.answer_tag=a")
    assert verdicts[0]["acc"] == verdicts[0]["fmt"] == 1.0


def test_it_streams():
    """A verdict comes before the next line is there."""
    command = [sys.executable, "-m", "care_train", "verify"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for answer, accuracy in (("5", 1.0), ("6", 0.0)):
            process.stdin.write(_line(answer, 5) + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["acc"] == accuracy
