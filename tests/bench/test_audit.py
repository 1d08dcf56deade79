"""`make lint`'s audit: a finding is an error unless explained; no answer is no clean bill."""

import io
import json

import pytest

from bench import audit

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
