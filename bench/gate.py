"""The gate for a change that must change no number: short runs of two checkouts, bit for bit.

    python -m bench.gate                        # this working tree against where it left main
    python -m bench.gate --against REF --only care,zero2
    python -m bench.gate --record FILE          # this tree's numbers, as hex floats ...
    python -m bench.gate --compare FILE         # ... and later another tree against them

Each side makes one cold start (`care-train sft` with `configs/easy_vqa.yaml`), from which
`care-train train` goes on in four ways: `care`, `grpo`, `zero2` (two ranks) and `vllm`. Compared
are all numbers of `metrics.jsonl` but `LEFT_OUT`, and a digest of the final weights. Other
processors and libraries round differently: a recorded file holds for those it names.

The last line is a JSON object. Exit status: 0 equal, 1 different, 2 a run failed.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from bench.measure import machine_facts

ROOT = Path(__file__).parents[1]

LEFT_OUT = {
    "time": "the clock when the record was written",
    "seconds": "wall seconds of a step",
    "seconds_*": "wall seconds of its parts",
    "tokens_per_second": "tokens over wall seconds",
}
"""Patterns of the keys that no two runs share, and why."""

_COLD = "cold"
RUNS = {
    "care": ("algorithm=care", "train.steps=10"),
    "grpo": ("algorithm=grpo", "train.steps=10"),
    "zero2": ("algorithm=care", "train.steps=5", "deepspeed.zero_stage=2"),
    "vllm": ("algorithm=care", "train.steps=3", "rollout.engine=vllm"),
}
_TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
_SHARED = ("--config", "configs/easy_vqa.yaml", "seed=0", "eval.max_samples=128")
# A run's whole environment beside PATH and HOME: no other variable of the caller's can change it.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
_TIMEOUT_SECONDS = 900  # A run takes half a minute.

Numbers = dict[str, str]
"""A run's numbers as text that keeps every bit, by `phase step: key`."""


class Difference(NamedTuple):
    """One number that the sides do not share; None where a side lacks it."""

    name: str
    old: str | None
    new: str | None

    def __str__(self) -> str:
        texts = [text or "missing" for text in (self.old, self.new)]
        a, b = (float.fromhex(text) if "0x" in text else text[:12] for text in texts)
        relative = ""
        if isinstance(a, float) and isinstance(b, float):
            relative = f" (relative {abs(a - b) / (max(abs(a), abs(b)) or 1.0):.1e})"
        return f"{self.name} {a} -> {b}{relative}"


def numbers_of(lines: Sequence[str]) -> Numbers:
    """The numbers of `metrics.jsonl` that another run must repeat.

    Raises:
        ValueError: one is logged twice.
    """
    numbers: Numbers = {}
    for line in lines:
        values = json.loads(line)
        record = f"{values.pop('phase')} {values.pop('step')}"
        for key, value in values.items():
            if any(fnmatchcase(key, pattern) for pattern in LEFT_OUT):
                continue
            if (name := f"{record}: {key}") in numbers:
                raise ValueError(f"metrics.jsonl: {name} is logged twice")
            # NaN and infinities are logged as null.
            numbers[name] = "null" if value is None else float(value).hex()
    return numbers


def weights_digest(folder: Path) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a model's tensors, in however many files.

    Raises:
        ValueError: the folder holds no weights.
    """
    files = folder.glob("*.safetensors")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    if not tensors:
        raise ValueError(f"{folder} holds no weights")
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def differences(old: Numbers, new: Numbers) -> list[Difference]:
    """What is not the same bit for bit, or missing on one side, in the order logged."""
    pairs = [Difference(name, old.get(name), new.get(name)) for name in {**old, **new}]
    return [pair for pair in pairs if pair.old != pair.new]


def comparison(old: Numbers, new: Numbers) -> dict[str, Any]:
    """Steps, numbers, how many have another value, the first that has, and what one side lacks.

    A key that is new in every step must not hide a value that changed.
    """
    found = differences(old, new)
    changed = [pair for pair in found if pair.old is not None and pair.new is not None]
    records = {name.partition(":")[0] for name in new}
    return {
        "steps": sum(record.startswith(("sft", "train")) for record in records),
        "numbers": len({**old, **new}),
        "changed": len(changed),
        "first": str(changed[0]) if changed else "",
        "missing": _keys(pair for pair in found if pair.new is None),
        "added": _keys(pair for pair in found if pair.old is None),
    }


def _keys(found: Iterable[Difference]) -> dict[str, int]:
    """How many records each key is missing or new in, as `phase: key`."""
    return dict(Counter(re.sub(r"^(\w+) \d+:", r"\1:", pair.name) for pair in found))


def _run(checkout: Path, name: str, output: Path) -> Numbers:
    """The numbers of one run with a checkout's code.

    Raises:
        RuntimeError: it ended with an error.
    """
    command = ("sft",)
    if name != _COLD:
        command = ("train", *RUNS[name], f"model.path={output / _COLD / 'final'}")
    python = (sys.executable, *(_TWO_RANKS if name == "zero2" else ()), "-m", "care_train")
    own = _ENVIRONMENT | {"PYTHONPATH": str(checkout)}
    start = time.perf_counter()
    done = subprocess.run(
        (*python, *command, *_SHARED, f"name={name}", f"output_dir={output}"),
        cwd=checkout,
        env={key: os.environ[key] for key in ("PATH", "HOME")} | own,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
    )
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {done.stderr[-2000:]}")
    numbers = numbers_of((output / name / "metrics.jsonl").read_text().splitlines())
    numbers["final: weights"] = weights_digest(output / name / "final")
    print(f"{output.name}: {name} in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return numbers


def _run_all(
    sides: Mapping[str, Path], names: Sequence[str], output: Path, jobs: int
) -> tuple[dict[str, dict[str, Numbers]], dict[str, str]]:
    """Numbers by side and run, and what failed with its error; the cold starts go first."""
    numbers: dict[str, dict[str, Numbers]] = {side: {} for side in sides}
    errors: dict[str, str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for wave in ([_COLD], names):
            runs = [(side, name) for name in wave for side in sides if not errors]
            tasks = [pool.submit(_run, sides[side], name, output / side) for side, name in runs]
            for (side, name), task in zip(runs, tasks, strict=True):
                try:
                    numbers[side][name] = task.result()
                except (OSError, RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
                    errors[f"{side} {name}"] = str(error)
    return numbers, errors


@contextmanager
def _checkout(ref: str, folder: Path) -> Iterator[Path]:
    """The files of a commit, in a worktree that goes when this ends."""
    _git("worktree", "add", "--quiet", "--detach", str(folder), ref)
    try:
        yield folder
    finally:
        _git("worktree", "remove", "--force", str(folder))


def _git(*arguments: str) -> str:
    done = subprocess.run(("git", *arguments), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        # Git has said why; 1 would say that numbers differ.
        raise SystemExit(2)
    return done.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    machine = "{device} {cpu_flags}, torch {torch}".format(**machine_facts("cpu"))
    options, recorded = _options(arguments)
    if recorded and recorded["machine"] != machine:
        print(f"recorded on {recorded['machine']}; this is {machine}", file=sys.stderr)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = {"new": ROOT}
        if not (options.record or options.compare):
            ref = options.against or _git("merge-base", "HEAD", "main")
            sides["old"] = stack.enter_context(_checkout(ref, work / "checkout"))
        numbers, errors = _run_all(sides, options.only, work, options.jobs)
    for run, error in errors.items():
        print(f"{run} failed: {error}", file=sys.stderr)
    if options.record and not errors:
        commit = _git("describe", "--always", "--dirty")
        content = {"commit": commit, "machine": machine, "runs": numbers["new"]}
        options.record.write_text(json.dumps(content, indent=1))
    old, new = numbers["old"] if "old" in numbers else recorded.get("runs", {}), numbers["new"]
    runs = {name: comparison(old[name], new[name]) for name in new if name in old}
    table = Table("run", "steps", "numbers", "changed", "first change", "missing", "added")
    for name, row in runs.items():
        cells = (", ".join(cell) if isinstance(cell, dict) else str(cell) for cell in row.values())
        table.add_row(name, *cells)
    Console(width=120).print(table if runs else "nothing compared")
    kinds = ("changed", "missing", "added")
    status = 2 if errors else int(any(row[kind] for row in runs.values() for kind in kinds))
    print(json.dumps({"status": status, "failed": list(errors), "runs": runs}))
    return status


def _options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The arguments, and what the file of --compare holds."""
    parser = argparse.ArgumentParser(prog="python -m bench.gate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    old = parser.add_mutually_exclusive_group()
    old.add_argument("--against", metavar="REF", help="default: the merge base with main")
    old.add_argument("--compare", type=Path, metavar="FILE", help="against what is recorded there")
    old.add_argument("--record", type=Path, metavar="FILE", help="write there, compare nothing")
    parser.add_argument("--only", default=",".join(RUNS), metavar="RUN,RUN", help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; they share the cores")
    options = parser.parse_args(arguments)
    recorded = json.loads(options.compare.read_text()) if options.compare else {}
    known = [name for name in RUNS if name in recorded.get("runs", RUNS)]
    options.only = options.only.split(",")
    if unknown := [name for name in options.only if name not in known]:
        parser.error(f"--only: got {unknown[0]!r}, wanted some of {','.join(known)}")
    return options, recorded


if __name__ == "__main__":
    sys.exit(main())
