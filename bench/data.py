"""`care-train data build` on a synthetic corpus with images: time, memory, counts, same bytes.

    python -m bench.data
    python -m bench.data --rows 200000 --small 20000 --folder /data/bench

Each build is the command itself, in a process of its own; its memory is the largest sum of resident
memory over it and its workers. The large corpus is built twice, the second time with a SIGKILL half
way and a restart; the small one twice too. Then the built files are read as the trainer does, each
in a process of its own. The last line is one JSON object.
"""

import argparse
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.data_corpus import Corpus, build_config, make_corpus
from care_train.data.build import CHUNK_ROWS

MIB = 2**20

_READ = """
import json, sys, time
from care_train.data import PromptOrder, load_images, load_samples, sample_digests
from care_train.config import DataSettings
start = time.perf_counter()
samples = load_samples(DataSettings(path=sys.argv[1]))
for _ in sample_digests(samples):
    pass
opened = time.perf_counter() - start
draws = PromptOrder(len(samples), 0).take(0, 2000)
start = time.perf_counter()
for index in draws:
    load_images(samples[index])
seconds = time.perf_counter() - start
# getrusage's maximum would begin with the parent's.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = int(status["VmHWM"].split()[0]) / 1024
print(json.dumps({"peak_mib": peak, "open_s": opened, "ms_per_row": 1000 * seconds / len(draws)}))
"""


@dataclass(frozen=True)
class Run:
    """One build, or what was left of one."""

    seconds: float
    cpu_seconds: float
    """Of the command and its workers, which other load changes little; 0 where it was killed."""
    peak_mib: float
    leaked: int
    """Processes that outlived a killed build by ten seconds."""


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="bench-data-", dir=options.folder) as temporary:
        figures = measure(Path(temporary), options.rows, options.small, options.workers)
    print(json.dumps(figures))
    return 0 if figures["ok"] else 1


def measure(folder: Path, rows: int, small: int, workers: int) -> dict[str, Any]:
    """All figures; `ok` where the counts are exact and the bytes the same."""
    start = time.perf_counter()
    corpora = {size: make_corpus(folder / f"corpus{size}", size, workers) for size in (small, rows)}
    print(f"{rows:,} and {small:,} rows drawn in {time.perf_counter() - start:.0f} s", flush=True)
    small_once = _build(corpora[small], folder / "small-1", workers)
    small_twice = _build(corpora[small], folder / "small-2", workers)
    _say(f"{small:,} rows", small_once)
    once = _build(corpora[rows], folder / "large-1", workers)
    _say(f"{rows:,} rows", once)
    killed = _build(corpora[rows], folder / "large-2", workers, kill_at=rows // 2 // CHUNK_ROWS)
    restarted = _build(corpora[rows], folder / "large-2", workers)
    _say(f"{rows:,} rows, killed half way", killed)
    _say(f"{rows:,} rows, the rest", restarted)
    counts = json.loads((folder / "large-1" / "manifest.json").read_text())["counts"]
    wrong = _wrong_counts(corpora[rows], counts)
    _say_counts(counts, wrong)
    same_twice = _digests(folder / "small-1") == _digests(folder / "small-2")
    same_after_kill = _digests(folder / "large-1") == _digests(folder / "large-2")
    reading = {small: _read(folder / "small-1"), rows: _read(folder / "large-1")}
    for size, figures in reading.items():
        print(
            f"reading {size:,} rows as the trainer does: {figures['peak_mib']:.0f} MiB, opened in "
            f"{figures['open_s']:.2f} s, {figures['ms_per_row']:.1f} ms per row drawn"
        )
    return {
        "rows": rows,
        "workers": workers,
        "seconds": round(once.seconds, 1),
        "cpu_seconds": round(once.cpu_seconds, 1),
        "rows_per_second": round(rows / once.seconds),
        "peak_mib": round(once.peak_mib),
        "small_rows": small,
        "small_seconds": round((small_once.seconds + small_twice.seconds) / 2, 1),
        "small_peak_mib": round(small_once.peak_mib),
        "read_peak_mib": round(reading[rows]["peak_mib"]),
        "small_read_peak_mib": round(reading[small]["peak_mib"]),
        "read_ms_per_row": round(reading[rows]["ms_per_row"], 2),
        "kept": counts["total"]["kept"],
        "duplicates": counts["total"]["duplicates"],
        "rejected": counts["total"]["rejected"],
        "wrong_counts": wrong,
        "same_twice": same_twice,
        "same_after_kill": same_after_kill,
        "leaked_processes": killed.leaked,
        "ok": same_twice and same_after_kill and not wrong and not killed.leaked,
    }


def _build(corpus: Corpus, output: Path, workers: int, kill_at: int | None = None) -> Run:
    """Run the command; with `kill_at`, until that many parts are written."""
    config = output.with_suffix(".yaml")
    config.write_text(build_config(corpus, output))
    command = [sys.executable, "-m", "care_train", "data", "build", "--config", str(config)]
    start, before, peak = time.perf_counter(), _children_cpu(), 0
    # A killed parent's leftovers are reported by Python on standard error.
    errors = None if kill_at is None else subprocess.DEVNULL
    process = subprocess.Popen(
        [*command, f"workers={workers}"], stdout=subprocess.DEVNULL, stderr=errors
    )
    family = psutil.Process(process.pid)
    while process.poll() is None:
        members = [family, *family.children(recursive=True)]
        peak = max(peak, sum(_resident(member) for member in members))
        if kill_at is not None and len(list(output.glob(".unfinished/*.arrow"))) >= kill_at:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            left = psutil.wait_procs(members[1:], timeout=10)[1]
            return Run(time.perf_counter() - start, 0.0, peak / MIB, len(left))
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return Run(time.perf_counter() - start, _children_cpu() - before, peak / MIB, 0)


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def _read(output: Path) -> dict[str, float]:
    command = [sys.executable, "-c", _READ, str(output / "train.parquet")]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _digests(output: Path) -> dict[str, str]:
    names = ("train.parquet", "quarantine.jsonl", "manifest.json")
    return {name: hashlib.sha256((output / name).read_bytes()).hexdigest() for name in names}


def _wrong_counts(corpus: Corpus, counts: dict[str, Any]) -> list[str]:
    """Every count that is not what was planted."""
    wrong = []
    for name, expected in corpus.expected.items():
        one = counts["sources"][name]
        got = {"kept": one["kept"], "images": one["images"]} | one["rejected"] | one["duplicates"]
        for key in {**expected, **got}:
            if got.get(key, 0) != expected.get(key, 0):
                wrong.append(f"{name}: {key}: got {got.get(key, 0)}, wanted {expected.get(key, 0)}")
    return wrong


def _say(what: str, run: Run) -> None:
    cpu = f" ({run.cpu_seconds:.1f} s of CPU)" if run.cpu_seconds else ""
    print(f"{what}: {run.seconds:.1f} s{cpu}, peak {run.peak_mib:.0f} MiB", flush=True)


def _say_counts(counts: dict[str, Any], wrong: list[str]) -> None:
    for name, one in counts["sources"].items():
        left = one["rejected"] | one["duplicates"]
        found = ", ".join(f"{n:,} {key}" for key, n in left.items()) or "none rejected"
        print(f"{name}: {one['read']:,} read, {one['kept']:,} kept; {found}")
    print("every count is as planted" if not wrong else "\n".join(wrong))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=50_000, help="default %(default)s")
    parser.add_argument("--small", type=int, default=10_000, help="default %(default)s")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where to put the corpus; default: temporary")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
