"""One process of one section: `python -m bench.gpu.section TASK`, a JSON object from the runner."""

import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any


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
