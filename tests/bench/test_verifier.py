"""bench.verifier: its pairs, its figures, and what the verifier makes of them."""

import json
from collections import Counter

import pytest

from bench import verifier as bench
from bench.hostile import hostile_answers
from bench.verifier_forms import formed_pairs
from care_train.verifier import AnswerType, WorkerPool, verify_batch

PAIRS = bench.read_pairs()


def test_pairs_cover_all_types():
    """At least 400 pairs, of every type that is compared, right and wrong, none twice."""
    assert len(PAIRS) >= 400 and len({pair.item for pair in PAIRS}) == len(PAIRS)
    counts = Counter((pair.category, pair.correct) for pair in PAIRS)
    kinds = set(AnswerType) - {AnswerType.FUNCTION}
    assert all(counts[kind, right] >= 5 for kind in kinds for right in (True, False))


def test_verdicts_on_the_pairs():
    """Nothing wrong is accepted, and what is missed of the pairs stays below 5 %."""
    pool = WorkerPool(timeout=60.0)
    verdicts = [v.accuracy == 1.0 for v in verify_batch([pair.item for pair in PAIRS], pool)]
    pool.close()
    accepted = [p.item for p, v in zip(PAIRS, verdicts, strict=True) if v and not p.correct]
    assert accepted == []
    precision, recall = bench.precision_recall(PAIRS, verdicts)
    assert precision == 1.0 and recall is not None and recall > 0.95


def test_precision_and_recall():
    """Of two accepted one is right, and of two right ones one is accepted."""
    right, wrong = (next(p for p in PAIRS if p.correct is value) for value in (True, False))
    figures = bench.precision_recall([right, right, wrong, wrong], [True, False, True, False])
    assert figures == (0.5, 0.5)
    assert bench.precision_recall([right, wrong], [False, False]) == (None, 0.0)
    assert bench.precision_recall([wrong], [True]) == (0.0, None)


def test_hostile_answers_are_the_same_each_time():
    """Deterministic, and some of megabytes."""
    answers = list(hostile_answers(200))
    assert answers == list(hostile_answers(200))
    assert max(map(len, answers)) >= 1_000_000


def test_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The last line is one JSON object; no pair of any form and no attack is wrongly accepted; a
    small attack does no harm."""
    few = [pair for pair in PAIRS if pair.category in ("number", "math")][:40]
    monkeypatch.setattr(bench, "read_pairs", lambda: few)
    monkeypatch.setattr(bench, "MIN_PAIRS", 40)
    monkeypatch.setattr(bench, "_SECONDS", 0.2)
    # One key of each form, where the bench takes twelve; math-verify, which is slow, sees ten.
    monkeypatch.setattr(bench, "formed_pairs", lambda: formed_pairs(repeats=1))
    theirs, unseen = bench.math_verify_verdicts, [False]
    monkeypatch.setattr(
        *(bench, "math_verify_verdicts"),
        lambda pairs: theirs(pairs[:10]) + unseen * (len(pairs) - 10),
    )
    assert bench.main(["--hostile", "150", "--timeout", "20"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["precision"] == figures["forms_all_precision"] == 1.0
    assert figures["attacks_accepted"] == 0 < figures["attacks"] and figures["per_second"] > 0
    assert figures["hangs"] == figures["crashes"] == figures["leaked_processes"] == 0
    assert {"recall", "math_verify_precision", "math_verify_recall"} <= figures.keys()


def test_what_cannot_be_measured_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Too few pairs, and a verifier that accepts nothing, are no perfect precision."""
    monkeypatch.setattr(bench, "read_pairs", lambda: PAIRS[:399])
    assert bench.main([]) == 2
    assert "got 399 pairs, wanted at least 400" in capsys.readouterr().err
    wrong = [pair for pair in PAIRS if pair.category == "text" and not pair.correct][:5]
    monkeypatch.setattr(bench, "read_pairs", lambda: wrong)
    monkeypatch.setattr(bench, "MIN_PAIRS", 5)
    assert bench.main([]) == 2
    captured = capsys.readouterr()
    assert "precision: got no accepted answer among 5 pairs" in captured.err
    assert "{" not in captured.out.splitlines()[-1]
