"""Time, peak memory and the facts of the machine, measured the same way for every contender.

Run as a program, told by a JSON object, it measures one contender's peak memory on the CPU: in a
process of its own, so that nothing another contender left behind is counted.
"""

import gc
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table

from bench.peers import (
    CONTENDERS,
    MeasurementError,
    Outcome,
    Problem,
    gemms,
    installed_version,
    make_problem,
)

_CPU_FLAGS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


@dataclass(frozen=True)
class Spread:
    """20th, 50th and 80th percentile of repeated runs."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """The percentiles, interpolated."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(values), fifths[3])


def interleave(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    budget_seconds: float,
    device: str,
) -> dict[str, list[float]]:
    """Seconds of each call, taken in turns so that a busy moment of the machine hits all alike.

    The order rotates from round to round. Every call runs at least once; one whose next run would
    exceed its budget leaves the rounds.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            done = seconds[name]
            if done and sum(done) + max(done) > budget_seconds:
                continue
            done.append(seconds_of(calls[name], device))
    return seconds


def seconds_of(call: Callable[[], object], device: str) -> float:
    """How long a call takes, on a GPU by CUDA events; its result is dropped within it."""
    gc.collect()
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak_memory(
    name: str, rows: list[int], width: int, vocab: int, *, device: str, runs: int = 2
) -> dict[int, int]:
    """Bytes that a contender adds to its inputs at its peak, its results included, by rows.

    Args:
        name: of the contender, or "gemms".
        rows: the numbers of rows to measure.
        width: D.
        vocab: V.
        device: "cpu" or "cuda".
        runs: of which the last counts; the ones before load libraries and compile.

    Raises:
        MeasurementError: the measuring process failed.
    """
    task = {"contender": name, "rows": rows, "width": width, "vocab": vocab, "runs": runs}
    if device == "cuda":
        return _peaks(task, device)
    # Tensors from 1 MiB go back to the system when freed, instead of staying in the heap.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-m", "bench.measure", json.dumps(task)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode != 0:
        lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        raise MeasurementError(f"peak memory of {name} could not be measured: {lines[-1]}")
    return {int(n): peak for n, peak in json.loads(child.stdout.splitlines()[-1]).items()}


def _peaks(task: dict[str, Any], device: str) -> dict[int, int]:
    run = gemms if task["contender"] == "gemms" else CONTENDERS[task["contender"]].run
    problem = make_problem(max(task["rows"]), task["width"], task["vocab"], device)
    peaks = {}
    for rows in task["rows"]:
        part = problem.first(rows)
        for _ in range(task["runs"]):
            peaks[rows] = peak_of(lambda part=part: run(part), device)
    return peaks


def peak_of(call: Callable[[], object], device: str) -> int:
    """Bytes that a call adds at its peak, its results included."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Linux: "5" sets the peak resident size (VmHWM) back to the present one.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes (man 5 proc)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise MeasurementError(f"/proc/self/status has no {field}")


def numbers_table(title: str, headings: Iterable[str]) -> Table:
    """A table of names with numbers behind them."""
    return Table("", *(Column(heading, justify="right") for heading in headings), title=title)


def devices() -> list[str]:
    """The CPU, and the GPU where there is one."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def machine_facts(device: str) -> dict[str, Any]:
    """What the figures depend on: processor, cores, instruction sets, versions, load."""
    model, flags = _processor()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else model,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cpu_flags": flags,
        # Of other processes: figures taken on a busy machine mean little.
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "triton": installed_version("triton"),
    }


def describe(facts: Mapping[str, Any]) -> str:
    """One line of `machine_facts` for people."""
    busy = " (other processes are running: expect noise)" if facts["load"] >= 1 else ""
    return (
        f"{facts['device']}; {facts['cores']} CPU cores, {facts['threads']} threads, "
        f"{' '.join(facts['cpu_flags']) or 'no vector extensions known'}; "
        f"load before the run {facts['load']}{busy}; torch {facts['torch']}"
    )


def _processor() -> tuple[str, list[str]]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor() or platform.machine(), []
    pairs = (line.partition(":")[::2] for line in path.read_text().splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in pairs}
    present = set(fields.get("flags", "").split())
    model = fields.get("model name", platform.machine())
    return model, [flag for flag in _CPU_FLAGS if flag in present]


def run_contender(name: str, run: Callable[[Problem], Outcome], problem: Problem) -> Outcome:
    """The contender's outcome.

    Raises:
        MeasurementError: it failed; the message names it.
    """
    try:
        return run(problem)
    except (ImportError, RuntimeError) as error:
        raise MeasurementError(f"{name} failed: {error}") from error


def quieten() -> None:
    """Silence what compiling prints where nothing is wrong."""
    # "No CUDA runtime is found" on a machine with a CUDA toolkit and no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


if __name__ == "__main__":
    quieten()
    print(json.dumps(_peaks(json.loads(sys.argv[1]), "cpu")))
