"""bench.audit, bench.batches and bench.data: what they count is right; no answer is no figure."""

import io
import json
import subprocess
from pathlib import Path

import pytest

from bench import audit, batches, data
from bench.data_corpus import Corpus, build_config, make_corpus
from care_train.config import ModelSettings, load_build_settings
from care_train.data.build import build
from care_train.models.load import load_model

FOUND = {"id": "PYSEC-2026-1", "aliases": ["CVE-2026-1"], "fix_versions": ["2.0"]}
CLEAN = {"name": "good", "version": "1.0", "vulns": []}
BAD = {"name": "bad", "version": "1.0", "vulns": [FOUND]}
SKIPPED = {"name": "own", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("dependencies", "explained", "status", "open_ids"),
    [
        ([CLEAN, SKIPPED], {}, 0, []),
        ([CLEAN, BAD], {}, 1, ["PYSEC-2026-1"]),
        ([CLEAN, BAD], {"CVE-2026-1": "not reached: it is about Windows"}, 0, []),
        ([SKIPPED, SKIPPED], {}, 3, []),
    ],
)
def test_findings_count_unless_explained(
    dependencies, explained, status, open_ids, monkeypatch, capsys
):
    monkeypatch.setattr(audit, "EXPLAINED", explained)
    assert audit.report(dependencies) == status
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["open"] == open_ids


@pytest.mark.parametrize("answer", [b"{}", b"<html>", None])
def test_an_index_without_the_service_is_said_plainly(answer, monkeypatch, capsys):
    """A mirror of files alone, a login page, no network: status 3, not 0, and no pip-audit."""

    def urlopen(url, timeout):
        if answer is None:
            raise OSError("Name or service not known")
        return io.BytesIO(answer)

    monkeypatch.setattr(audit.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(audit.subprocess, "run", None)
    assert audit.main() == 3
    assert "not audited: PyPI's vulnerability service does not answer" in capsys.readouterr().out


def test_a_pip_audit_that_fails_is_no_audit(monkeypatch, capsys):
    """Not 3, which `make lint` lets pass."""
    failed = subprocess.CompletedProcess([], 1, "", "No module named pip_audit")
    monkeypatch.setattr(audit, "unreachable", lambda: None)
    monkeypatch.setattr(audit.subprocess, "run", lambda *_, **__: failed)
    assert audit.main() == 2
    printed = capsys.readouterr()
    assert "No module named pip_audit" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["audited"] == 0


def test_every_way_has_all_tokens_and_packs_have_no_padding(tiny_folder, monkeypatch):
    """Padding shares are right for known lengths, and every ratio is to `count`."""
    monkeypatch.setattr(batches, "PROMPT", 4)
    monkeypatch.setattr(batches, "LONGEST", 16)
    monkeypatch.setattr(batches, "responses", lambda spread, generator: [16, 6] * 4)
    loaded = load_model(ModelSettings(path=str(tiny_folder("tiny-qwen2"))))
    found = batches.compare(loaded, "any", repeats=1)
    # 4 x (20 + 10) tokens in 8 rows of 20; sorted, the short ones lie in rows of 10.
    assert found["count"].padding == pytest.approx(1 - 120 / 160)
    assert found["budget"].padding == 0 and found["packed"].padding == 0
    assert [found[way].micro_batches for way in batches.WAYS] == [2, 2, 2]
    assert found["count"].time_ratio == 1 and all(f.seconds > 0 for f in found.values())


def test_planted_rows_are_found_one_by_one(tmp_path: Path) -> None:
    """Every reason and kind of duplicate has the planted count, and a wrong count would show."""
    corpus = make_corpus(tmp_path / "corpus", 500, workers=1)
    assert corpus.sizes == {"chartqa": 76, "geometry3k": 22, "virl39k": 402}
    config = tmp_path / "build.yaml"
    config.write_text(build_config(corpus, tmp_path / "built"))
    counts = build(load_build_settings(config, ["workers=1"]))["counts"]
    assert data._wrong_counts(corpus, counts) == []
    assert counts["sources"]["virl39k"]["duplicates"] == {
        "conflicting_answer of chartqa": 2,
        "duplicate of chartqa": 4,
        "near_duplicate of geometry3k": 4,
    }
    expected = json.loads(json.dumps(corpus.expected))
    expected["virl39k"]["kept"] += 1
    wrong = data._wrong_counts(Corpus(corpus.folder, corpus.sizes, expected), counts)
    kept = counts["sources"]["virl39k"]["kept"]
    assert wrong == [f"virl39k: kept: got {kept}, wanted {kept + 1}"]
