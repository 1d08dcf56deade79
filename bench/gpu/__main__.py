"""Check and measure everything on one NVIDIA GPU, the most valuable first, within eight minutes.

    python -m bench.gpu                          # all sections
    python -m bench.gpu --only correct,headline
    python -m bench.gpu --page docs/gpu.md       # measure nothing: the page from the last results
    python -m bench.gpu --dry                    # tiny problems on the CPU in Triton's interpreter

It needs torch and triton; transformers for a whole model, pytest and hypothesis for the kernel
tests. Peers are measured where they are installed or lie as wheels in `.wheels/`:

    pip download --no-deps -d .wheels liger-kernel==0.8.5 cut-cross-entropy==25.1.1 trl==1.16.0

Each section has a process, a time limit and a log of its own, and `gpu.json` in the folder of
results is written anew after each. The last line is one JSON object; the exit status is 1 where
something could not be measured or is not correct. A dry run says that the code works: it prints no
GPU figure and writes no page.
"""

import argparse
import json
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from bench.gpu.page import PageError, page_of, problems_of, summary_of
from bench.gpu.section import Run, Section, run_sections
from bench.peers import installed_version

WHEELS = Path(".wheels")

SECTIONS = (
    Section("facts", "bench.gpu.facts:run", 45),
    Section("correct", "bench.gpu.correct:kernel_tests", 110),
    Section("headline", "bench.gpu.contest:headline", 130),
    Section("profile", "bench.gpu.profiling:run", 35),
    Section("sweep", "bench.gpu.sweep:run", 75),
    Section("shapes", "bench.gpu.contest:shapes", 50),
    Section("deep", "bench.gpu.correct:deep", 45),
    Section("model", "bench.gpu.model:update", 60),
    Section("quickstart", "bench.gpu.model:quickstart", 120),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _options(arguments)
    folder = options.out or Path("runs") / ("gpu-dry" if options.dry else "gpu")
    if options.page is not None:
        return _write_page(folder, options.page)
    if not options.dry and not torch.cuda.is_available():
        print("bench.gpu: no CUDA device; --dry tries the command on a CPU", file=sys.stderr)
        return 1
    if options.dry:
        print("A dry run on a CPU, in Triton's interpreter: no figure below is a GPU's.")
    wanted = [section for section in SECTIONS if section.name in options.only]
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as site:
        wheels = _unpack_wheels(Path(site))
        run = Run(folder, options.limit_seconds, options.dry, Path(site) if wheels else None)
        results = run_sections(wanted, run)
    problems = problems_of(results)
    for problem in problems:
        print(f"bench.gpu: {problem}", file=sys.stderr)
    print(json.dumps(summary_of(results) | {"problems": problems}), flush=True)
    return 1 if problems else 0


def _unpack_wheels(into: Path) -> bool:
    """Make importable in `into` what `WHEELS` has for this Python and is not installed.

    A wheel is a zip archive of what would be installed.
    """
    wanted = [wheel for wheel in sorted(WHEELS.glob("*.whl")) if _is_wanted(wheel)]
    for wheel in wanted:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
    return bool(wanted)


def _is_wanted(wheel: Path) -> bool:
    """By its name: distribution, version, then the tags of Python, ABI and platform."""
    distribution, *_, python, _, _ = wheel.stem.split("-")
    major, minor = sys.version_info[:2]
    fitting = {f"py{major}", f"py{major}{minor}", f"cp{major}{minor}"}
    return bool(fitting & set(python.split("."))) and installed_version(distribution) is None


def _write_page(folder: Path, page: Path) -> int:
    path = folder / "gpu.json"
    try:
        text = page_of(json.loads(path.read_text()))
    except (OSError, PageError) as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return 1
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)
    print(json.dumps({"page": str(page), "from": str(path)}))
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--dry", action="store_true", help="on a CPU, to test the command")
    parser.add_argument("--only", metavar="A,B", help=f"some sections of: {', '.join(names)}")
    parser.add_argument("--limit-seconds", type=float, default=470.0, metavar="S")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/gpu")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page, measure nothing")
    options = parser.parse_args(arguments)
    options.only = names if options.only is None else options.only.split(",")
    unknown = sorted(set(options.only) - set(names))
    if unknown:
        parser.error(f"--only: got {', '.join(unknown)}; wanted some of {', '.join(names)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
