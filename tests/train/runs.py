"""Start, kill and compare whole runs of `care-train`."""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from care_train.distributed import own_environment
from care_train.reporting import read_archive
from care_train.reporting.archive import archive_files

ROOT = Path(__file__).parents[2]

SMALL = (
    "prompt.system=null",
    "rollout.group_size=4",
    "rollout.max_new_tokens=24",
    "train.prompts_per_step=4",
    "train.micro_batch_size=8",
    "train.learning_rate=2e-4",
    "train.warmup_steps=0",
    "train.schedule=cosine",
    "eval.also=[]",
    "logging.report_to=[]",
    "logging.samples_every=2",
    # Most tests are about other things than what a tiny model learns.
    "limits.empty_steps=null",
)
COLD_START = ("sft.steps=30", "sft.batch_size=8", "sft.learning_rate=3e-3")


class FastRun:
    """The ranks of one run, forked from a process that has imported what they need.

    An import of torch and its libraries takes longer than a small run. No launcher starts them, so
    that a test may kill any of them.
    """

    def __init__(self, *arguments: str, ranks: int = 1, before: str = "", module: str = "") -> None:
        """Start.

        Args:
            arguments: of `care-train`, or of `module`.
            ranks: how many processes.
            before: code that each of them runs first, to break something.
            module: a module of the tests that is the program in place of `care-train`.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.train.warm"])
        self._folder = tempfile.TemporaryDirectory()
        places = _places(ranks)
        self._logs = [Path(self._folder.name) / str(rank) for rank in range(ranks)]
        self._processes = [
            context.Process(target=_rank, args=(arguments, place, before, module, log))
            for place, log in zip(places, self._logs, strict=True)
        ]
        for process in self._processes:
            process.start()

    def wait_for(
        self, condition: Callable[[], bool], seconds: float = 300, every: float = 0.001
    ) -> bool:
        """Whether `condition` came true before the run ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                return True
            if not self.is_alive:
                return False
            time.sleep(every)
        raise TimeoutError("the run neither ended nor got there")

    @property
    def is_alive(self) -> bool:
        """Whether the first rank is."""
        return self._processes[0].is_alive()

    def errors(self) -> str:
        """What the first rank has written so far."""
        return self._logs[0].read_text() if self._logs[0].is_file() else ""

    def pid(self, rank: int) -> int:
        """Of one rank's process."""
        pid = self._processes[rank].pid
        assert pid is not None
        return pid

    def send(self, number: int, rank: int | None = None) -> None:
        """Signal one rank, or all."""
        for place in range(len(self._processes)) if rank is None else [rank]:
            with suppress(ProcessLookupError):
                os.kill(self.pid(place), number)

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL to one rank; or to all, waiting until they are gone."""
        self.send(signal.SIGKILL, rank)
        if rank is None:
            self.end()

    def end(self, seconds: float = 600) -> list[tuple[int | None, str]]:
        """Wait; exit status and standard error of every rank, None for one that did not end."""
        end = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(end - time.monotonic(), 0))
        statuses = [process.exitcode for process in self._processes]
        for process in self._processes:
            process.kill()
            process.join()
        return [(s, log.read_text()) for s, log in zip(statuses, self._logs, strict=True)]


def _rank(
    arguments: Sequence[str], place: dict[str, str], before: str, module: str, log: Path
) -> None:
    # The process they are forked from may have inherited a group's variables.
    own = own_environment() | place
    os.environ.clear()
    os.environ.update(own)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import torch

    from care_train.cli import main

    torch.set_num_threads(1)
    exec(before, {})
    if not module:
        sys.exit(main(list(arguments)))
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__")


def _places(ranks: int) -> list[dict[str, str]]:
    """What a launcher tells each rank."""
    if ranks == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def errors_of(
    *arguments: str, status: int = 0, ranks: int = 1, seconds: float = 600, **more: str
) -> list[str]:
    """What each rank writes of a run that must end with `status`, in time and without a traceback;
    arguments are those of `FastRun`."""
    outputs = FastRun(*arguments, ranks=ranks, **more).end(seconds)
    assert [found for found, _ in outputs] == [status] * ranks, outputs
    assert not any("Traceback" in errors for _, errors in outputs), outputs
    return [errors for _, errors in outputs]


def run(*arguments: str, ranks: int = 1) -> str:
    """A run that must succeed; its standard error."""
    return errors_of(*arguments, ranks=ranks)[0]


def python(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python WORDS`, started anew without a launcher's variables: it must succeed."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=own_environment() | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def run_code(code: str) -> None:
    """In a process of its own, which has imported what runs need: it must succeed."""
    errors_of(before=f"{code}\nraise SystemExit")


def data_arguments(rows: Path) -> list[str]:
    return [f"{key}={rows}" for key in ("data.path", "sft.data.path", "eval.data")]


def cold_start(out: Path, rows: Path, *more: str) -> list[str]:
    """Arguments of `train` from the model of a run `cold`: it has seen the format, and earns
    rewards."""
    common = [*SMALL, *data_arguments(rows), f"output_dir={out}"]
    run("sft", *common, *COLD_START, *more, "name=cold")
    return ["train", *common, f"model.path={out / 'cold' / 'final'}"]


def model_of(arguments: Sequence[str]) -> Path:
    """The folder of the model that they name."""
    (path,) = (word.partition("=")[2] for word in arguments if word.startswith("model.path="))
    return Path(path)


def text_rows(folder: Path) -> Path:
    """A file of eight rows of text."""
    rows = folder / "rows.jsonl"
    lines = [
        {"prompt": f"what is {i} and one?", "answer": f"{i + 1}", "rationale": "so"}
        for i in range(8)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return rows


def text_run_arguments(folder: Path, rows: Path | None = None) -> list[str]:
    """`train` on `text_rows` with a tiny language model: the run `run` in `folder`."""
    data = data_arguments(rows or text_rows(folder))
    return [
        *("train", *SMALL, *data, f"output_dir={folder}", "name=run"),
        *("model.path=tiny-qwen2", "rollout.max_new_tokens=8"),
    ]


@contextmanager
def mounted_disk(folder: Path, size: str) -> Iterator[Path]:
    """A small disk of its own at `folder`; the test is skipped where only root may mount one."""
    folder.mkdir()
    options = ("-t", "tmpfs", "-o", size, "none", str(folder))
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def records(run_dir: Path, phase: str | None = "train") -> list[dict]:
    """The metrics of one phase; None: of all."""
    found = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record for record in found if phase in (None, record["phase"])]


def summary(run_dir: Path) -> dict:
    """What summary.json says."""
    return json.loads((run_dir / "summary.json").read_text())


def steps_logged(run_dir: Path) -> int:
    """How many training steps are in the metrics so far."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"phase": "train"') if path.is_file() else 0


def timeless(run_dir: Path) -> list[dict]:
    """The metrics without what the clock says."""
    clock = ("time", "seconds", "tokens_per_second")
    return [
        {k: v for k, v in record.items() if not k.startswith(clock)}
        for record in records(run_dir, None)
    ]


def assert_same_runs(one: Path, other: Path) -> None:
    """Same weights bit for bit, same metrics and archive, nothing missing or twice."""
    assert timeless(one) == timeless(other)
    files = [[file.path.name for file in archive_files(path)] for path in (one, other)]
    assert files[0] == files[1] and files[0]
    for evaluations in (False, True):
        tables = [read_archive(path, evaluations=evaluations) for path in (one, other)]
        assert tables[0].equals(tables[1])
    weights = [(path / "final" / "model.safetensors").read_bytes() for path in (one, other)]
    assert weights[0] == weights[1]


def run_ranks(module: str, *arguments: object, ranks: int, seconds: float = 300) -> None:
    """`python -m MODULE ARGUMENTS` on each rank: all must succeed in time; none stays behind."""
    errors_of(*map(str, arguments), ranks=ranks, module=module, seconds=seconds)
