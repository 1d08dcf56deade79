"""The repository's own kernel tests on the device: every public function against float64.

They run Triton's kernels where there is a GPU: each loss, KL, option, dtype and shape against the
oracle (`tests/kernels`), and what only a GPU has (`test_on_a_gpu.py`). Outcomes are counted as they
come, so that a section that is ended keeps them.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from bench.gpu.section import Bench

_OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
# Two files compare with the trainer's own, and cannot be imported without pydantic.
_OPTIONS = ("-vv", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors")
_MOST_WORKERS = 12
_TESTS = Path("tests/kernels")


def run(bench: Bench) -> None:
    """`pytest tests/kernels`, every outcome counted; a dry run takes one file."""
    if find_spec("pytest") is None or find_spec("hypothesis") is None:
        bench.record.put("missing", {"kernel tests": "pytest or hypothesis is not installed"})
        sys.exit("the kernel tests need pytest and hypothesis, installed or as wheels in .wheels")
    # What only a GPU has comes first: compiling takes long, and the section may be ended.
    files = sorted(_TESTS.glob("test_*.py"), key=lambda path: (path.stem != "test_on_a_gpu", path))
    tests = [_TESTS / "test_objective.py"] if bench.dry else files
    command = [sys.executable, "-m", "pytest", *map(str, tests), *_OPTIONS]
    if find_spec("xdist") is not None and not bench.dry:
        command += ["-n", str(min(_MOST_WORKERS, len(os.sched_getaffinity(0))))]
    counts: Counter[str] = Counter()
    failed: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        in_summary = False
        for line in process.stdout:
            in_summary |= line.startswith("=====") and ("FAILURES" in line or "summary" in line)
            outcome = _OUTCOME.search(line) if "::" in line and not in_summary else None
            if outcome is None:
                print(line, end="")
                continue
            counts[outcome[1].lower()] += 1
            if outcome[1] in ("FAILED", "ERROR"):
                failed.append(line.strip())
            if sum(counts.values()) % 50 == 0:
                _record(bench, counts, failed)
    if process.returncode and not failed:
        failed.append(f"pytest ended with {process.returncode}")
    _record(bench, counts, failed)
    print(f"kernel tests: {dict(counts)}")


def _record(bench: Bench, counts: Counter[str], failed: list[str]) -> None:
    bench.record.put("kernel_tests", {"counts": dict(counts), "failed": failed[:20]})
