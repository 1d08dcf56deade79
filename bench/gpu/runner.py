"""Sections in processes and time limits of their own; what each found is on disk after it.

A crash, a hang or a lost CUDA context ends one section. `gpu.json` is replaced after every section,
and holds what a killed one had recorded until then.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu.section import write_json

# A section that would have less is left out.
_LEAST_SECONDS = 15.0


@dataclass(frozen=True)
class Section:
    """One section."""

    name: str
    run: str
    """`module:function` of a `Bench`."""
    seconds: float
    """At most."""


@dataclass(frozen=True)
class Run:
    """Where and how long the sections run."""

    folder: Path
    """For `gpu.json` and one log per section."""
    limit_seconds: float
    dry: bool
    site: Path | None = None
    """A folder of unpacked wheels."""


def run_sections(
    sections: list[Section], run: Run, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run them in order; returns what `gpu.json` holds: for each its status, seconds and figures.

    A status is "ok", "crashed", "timed out" or "left out" (for want of time).
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    start = time.time()
    found: dict[str, Any] = {}
    results: dict[str, Any] = {
        "dry": run.dry,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "limit_seconds": run.limit_seconds,
        "sections": found,
    }
    for section in sections:
        left = run.limit_seconds - (time.time() - start)
        if left < min(_LEAST_SECONDS, section.seconds):
            say(f"-- {section.name}: left out, {max(left, 0):.0f} s are left")
            found[section.name] = {"status": "left out", "seconds": 0.0, "figures": {}}
        else:
            limit = min(section.seconds, left)
            say(f"\n== {section.name}, at most {limit:.0f} s")
            found[section.name] = _run_section(section, run, limit)
            say(_log(run, section).read_text(errors="replace").rstrip())
            outcome = found[section.name]
            say(f"-- {section.name}: {outcome['status']} after {outcome['seconds']:.0f} s")
        results["seconds"] = round(time.time() - start, 1)
        write_json(run.folder / "gpu.json", results)
    return results


def _run_section(section: Section, run: Run, limit: float) -> dict[str, Any]:
    start = time.time()
    path = run.folder / f"{section.name}.part"
    path.unlink(missing_ok=True)
    with _log(run, section).open("w") as log:
        code = _wait(_start(section, run, path, start + limit, log), limit)
    status = "timed out" if code is None else "crashed" if code else "ok"
    figures = json.loads(path.read_text()) if path.is_file() else {}
    path.unlink(missing_ok=True)
    return {"status": status, "seconds": round(time.time() - start, 1), "figures": figures}


def _start(
    section: Section, run: Run, record: Path, until: float, log: Any
) -> "subprocess.Popen[bytes]":
    """The section's process, the first of a session of its own."""
    task = {"run": section.run, "record": str(record), "dry": run.dry, "until": until}
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if run.dry:
        environment["TRITON_INTERPRET"] = "1"
    if run.site is not None:
        inherited = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(run.site), *([inherited] if inherited else [])]
        )
    return subprocess.Popen(
        [sys.executable, "-m", "bench.gpu.section", json.dumps(task)],
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> int | None:
    """Its exit code; None where it had to be killed, its children with it."""
    try:
        return process.wait(timeout=max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def _log(run: Run, section: Section) -> Path:
    return run.folder / f"{section.name}.log"
