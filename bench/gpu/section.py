"""Sections in processes and time limits of their own; what each found is on disk after it.

A crash, a hang or a lost CUDA context ends one section. `gpu.json` is replaced after every section,
and holds what a killed one had recorded until then. One process of one section is
`python -m bench.gpu.section TASK`, a JSON object.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

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


@dataclass
class Record:
    """A section's figures, written to its file after every entry: a killed section keeps them."""

    path: Path
    figures: dict[str, Any] = field(default_factory=dict)

    def put(self, key: str, value: Any) -> None:
        """Set one figure and write all of them."""
        self.figures[key] = value
        write_json(self.path, self.figures)


@dataclass(frozen=True)
class Bench:
    """One section's process."""

    dry: bool
    record: Record
    until: float
    """When the section is ended, in seconds since the epoch."""

    @property
    def device(self) -> str:
        """Where tensors live."""
        return "cpu" if self.dry else "cuda"

    def seconds_left(self) -> float:
        """Until the section is ended."""
        return self.until - time.time()


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file whole: a reader never sees half of it."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value))
    os.replace(unfinished, path)


def run_sections(sections: list[Section], run: Run) -> dict[str, Any]:
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
            print(f"-- {section.name}: left out, {max(left, 0):.0f} s are left")
            found[section.name] = {"status": "left out", "seconds": 0.0, "figures": {}}
        else:
            limit = min(section.seconds, left)
            print(f"\n== {section.name}, at most {limit:.0f} s")
            found[section.name] = _run_section(section, run, limit)
            print(_log(run, section).read_text(errors="replace").rstrip())
            outcome = found[section.name]
            print(f"-- {section.name}: {outcome['status']} after {outcome['seconds']:.0f} s")
        results["seconds"] = round(time.time() - start, 1)
        write_json(run.folder / "gpu.json", results)
    return results


def _run_section(section: Section, run: Run, limit: float) -> dict[str, Any]:
    """Run it in the first process of a session, which is killed whole at the limit."""
    start = time.time()
    path = run.folder / f"{section.name}.part"
    path.unlink(missing_ok=True)
    task = {"run": section.run, "record": str(path), "dry": run.dry, "until": start + limit}
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if run.dry:
        environment["TRITON_INTERPRET"] = "1"
    if run.site is not None:
        inherited = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(run.site), inherited]))
    with _log(run, section).open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu.section", json.dumps(task)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = "crashed" if process.wait(timeout=max(limit, 0.1)) else "ok"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = "timed out"
    figures = json.loads(path.read_text()) if path.is_file() else {}
    path.unlink(missing_ok=True)
    return {"status": status, "seconds": round(time.time() - start, 1), "figures": figures}


def _log(run: Run, section: Section) -> Path:
    return run.folder / f"{section.name}.log"


def main() -> int:
    """Run the section; its exit status is 0 if it came to its end."""
    task = json.loads(sys.argv[1])
    record = Record(Path(task.pop("record")))
    run, bench = resolve_name(task.pop("run")), Bench(record=record, **task)
    interpreter: Any = nullcontext
    if bench.dry:
        from bench.interpreter import mended_interpreter as interpreter
        from bench.measure import quieten

        quieten()
    with interpreter():
        run(bench)
    return 0


if __name__ == "__main__":
    sys.exit(main())
