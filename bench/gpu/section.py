"""One process of one section: `python -m bench.gpu.section TASK`, a JSON object from the runner."""

import importlib
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from bench.gpu.record import Bench, Record


def main() -> int:
    """Run the section; its exit status is 0 if it came to its end."""
    task = json.loads(sys.argv[1])
    bench = Bench(
        dry=task["dry"],
        record=Record(Path(task["record"])),
        until=task["until"],
        part=task["part"],
        parts=task["parts"],
    )
    section = importlib.import_module(task["module"])
    with _interpreter(bench.dry):
        section.run(bench)
    return 0


def _interpreter(dry: bool) -> AbstractContextManager[None]:
    if not dry:
        return nullcontext()
    from bench.interpreter import mended_interpreter
    from bench.measure import quieten

    quieten()
    return mended_interpreter()


if __name__ == "__main__":
    sys.exit(main())
