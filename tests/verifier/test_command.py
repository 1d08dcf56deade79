"""`care-train verify`: lines in, verdicts out."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from care_train.config import Config, load_config
from care_train.verifier.command import verify_lines

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "care_train", "verify"]


def _line(answer: str, key: object, **more: object) -> str:
    text = f"<think>so</think><answer>{answer}</answer>"
    return json.dumps({"response": text, "answer": key} | more)


def _verdicts(text: str, *settings: str) -> list[dict]:
    output = io.StringIO()
    verify_lines(load_config(None, settings), io.StringIO(text), output)
    return [json.loads(line) for line in output.getvalue().splitlines()]


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
    verdicts = _verdicts("\n".join(lines))
    assert [v["acc"] for v in verdicts] == [1.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    assert verdicts[0]["reason"] == "equal expressions"
    assert verdicts[-1]["reason"] == "no complete <answer> span" and verdicts[-1]["fmt"] == 0.0
    assert verdicts[0]["fmt"] == 1.0 and verdicts[0]["reward"] == 1.0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 2: not JSON (Expecting property name enclosed in double quotes"),
        ("[" * 100_000, "line 2: not JSON (nested too deeply): correct or drop the line"),
        ("[]", "line 2: got a list, wanted an object with named columns"),
        ('{"respons": "x", "answer": "x"}', "response: got nothing beside respons, answer, wanted"),
        ('{"response": 5, "answer": "x"}', "response: got 5 beside answer, wanted text"),
        ('{"response": "x", "answer": null}', "line 2: answer: got nothing in 'answer', and the"),
        ('{"response": "x", "answer": {"x": 1}}', "answer: got '{\"x\": 1}', which only a reward"),
        (
            '{"response": "x", "answer": "x", "type": "maths"}',
            "2: type: got 'maths', wanted one",
        ),
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
    """Status 2 and one line on standard error, without a traceback; an empty input is one too."""
    done = subprocess.run(COMMAND, cwd=ROOT, input=b"{\n", capture_output=True)
    assert done.returncode == 2 and not done.stdout
    error = done.stderr.decode()
    assert error.startswith("care-train verify: error: standard input: line 1: not JSON")
    assert "Traceback" not in error
    with pytest.raises(ValueError, match="standard input: got no line, wanted "):
        _verdicts("\n \n")


def test_many_lines_and_what_editors_add():
    """5,000 lines keep their order; a byte order mark and carriage returns are no content."""
    lines = [_line(str(i), i + (i % 7 == 0)) for i in range(5000)]
    verdicts = _verdicts("\ufeff" + "\r\n".join(lines))
    assert [verdict["acc"] for verdict in verdicts] == [float(i % 7 != 0) for i in range(5000)]


def test_settings_apply():
    """Tags are those of the configuration."""
    text = json.dumps({"response": "<r>so</r><a>5</a>", "answer": "5"})
    (verdict,) = _verdicts(text, "prompt.tags=[r,a]")
    assert verdict["acc"] == verdict["fmt"] == 1.0


def test_it_streams():
    """A verdict comes before the next line is there."""
    with subprocess.Popen(
        COMMAND, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for answer, accuracy in (("5", 1.0), ("6", 0.0)):
            process.stdin.write(_line(answer, 5) + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["acc"] == accuracy


# What a worker would import first: standard modules, its dependencies, and this package.
_MODULES = ("json", "re", "fractions", "pickle", "math_verify", "sympy", "latex2sympy2_extended")


@pytest.mark.parametrize("path", ["", "."], ids=["unset", "dot"])
def test_a_working_folder_changes_no_verdict(tmp_path: Path, path: str):
    """Files in the folder where a run is started are not imported by its worker processes."""
    for name in _MODULES:
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'seen')!r}, 'a').write(__file__)"
        )
    rewards = tmp_path / "own" / "rewards.py"
    rewards.parent.mkdir()
    rewards.write_text("import json\n\ndef f(completions):\n    return [json.loads('1.0')]\n")
    line = {"response": "<answer>1/\\sqrt{2}</answer>", "answer": "\\frac{\\sqrt{2}}{2}"}
    # A console script or `python -P` keeps the folder from the first process.
    code = (
        f"import sys; sys.path += {[path] if path else []}; from care_train.cli import main; main()"
    )
    for more in ([], [f"reward.functions=[{{function: {rewards}:f}}]"]):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, "verify", *more],
            cwd=tmp_path,
            input=json.dumps(line),
            capture_output=True,
            text=True,
        )
        assert json.loads(done.stdout)["acc"] == 1.0, done.stderr
    assert not (tmp_path / "seen").exists()
