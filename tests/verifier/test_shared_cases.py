"""Pairs judged wrongly once, beside the repository where they are kept; benchmarks' stand apart."""

import io
import json
from pathlib import Path

import pytest

from care_train.config import Config
from care_train.verifier.command import verify_lines

CASES = Path(__file__).parents[3] / "shared" / "cases" / "verifier.jsonl"


@pytest.mark.skipif(not CASES.is_file(), reason="the cases are not here")
def test_every_pair_is_judged_as_expected():
    """Each kind has tests of its own, with other values, in this folder."""
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
