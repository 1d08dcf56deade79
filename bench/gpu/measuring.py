"""What every section measures with: timing in turns, peak memory, calls that may fail or hang.

Times are milliseconds between CUDA events. In a dry run the same calls run on the CPU in Triton's
interpreter and are timed by the clock: such figures say that the code works, and nothing else.

Shape letters: N rows, D hidden, V vocabulary.
"""

import gc
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from bench.accuracy import Truth, errors_of
from bench.gpu.section import Bench
from bench.measure import interleave, peak_of
from bench.peers import Outcome

T = TypeVar("T")
MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """Heads and numbers of rows."""

    heads: dict[str, tuple[int, int]]
    """D and V by name."""
    headline_rows: tuple[int, ...]
    more_rows: tuple[int, ...]
    profile_rows: int
    deep: tuple[int, int, int]
    """N, D and V with more than 2^31 logits."""
    real_rows: int
    """N of the real heads that are compared with float64."""


_QWEN_HEADS = {"7b": (3584, 152_064), "3b": (2048, 151_936)}
_FULL = Sizes(
    heads=_QWEN_HEADS,
    headline_rows=(8192, 4096),
    more_rows=(1024, 2048, 16_384),
    profile_rows=8192,
    deep=(16_384, 64, 152_064),
    real_rows=2048,
)
_DRY = Sizes(
    heads={"7b": (64, 304), "3b": (32, 300)},
    headline_rows=(24,),
    more_rows=(8, 40),
    profile_rows=24,
    deep=(20, 16, 50),
    real_rows=12,
)


def sizes_of(dry: bool) -> Sizes:
    """Qwen2.5-VL's heads, or tiny ones."""
    return _DRY if dry else _FULL


def synchronize(bench: Bench) -> None:
    """Wait until the device has done all its work."""
    if not bench.dry:
        torch.cuda.synchronize()


def release(bench: Bench) -> None:
    """Give unused memory back to the device."""
    gc.collect()
    if not bench.dry:
        torch.cuda.empty_cache()


def time_in_turns(
    bench: Bench, calls: Mapping[str, Callable[[], object]], rounds: int, *, budget: float = 3.0
) -> dict[str, list[float]]:
    """Milliseconds of each call, all taken in turns after a round that does not count.

    A call that has used its budget of seconds leaves the rounds.
    """
    for call in calls.values():
        call()
    times = interleave(calls, rounds if calls else 0, budget, bench.device)
    return {name: [1e3 * seconds for seconds in found] for name, found in times.items()}


def peak_mib(bench: Bench, call: Callable[[], object]) -> float | None:
    """MiB of device memory that a call adds at its peak, its results included; None when dry."""
    if bench.dry:
        call()
        return None
    return peak_of(call, "cuda") / MIB


def is_context_lost(error: BaseException) -> bool:
    """Whether no CUDA call of this process can succeed any more."""
    text = str(error).lower()
    return any(sign in text for sign in ("illegal memory", "device-side assert", "unspecified"))


def attempt(bench: Bench, what: str, call: Callable[[], T], *, key: str = "failed") -> T | None:
    """The call's result; None, with the reason printed and recorded under `key`, where it fails.

    Raises:
        Exception: the failure itself, where it has taken the CUDA context with it.
    """
    try:
        return call()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:400]
        print(f"!! {what}: {reason}", flush=True)
        if not isinstance(error, torch.cuda.OutOfMemoryError | ImportError | TimeoutError):
            traceback.print_exc(limit=-6)
        bench.record.put(key, bench.record.figures.get(key, {}) | {what: reason})
        if is_context_lost(error):
            raise
        release(bench)
        return None


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Bound what runs inside: compilers and autotuners of other packages may take minutes.

    Raises:
        TimeoutError: it took longer.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def errors_against(outcome: Outcome, truth: Truth) -> dict[str, float]:
    """`errors_of`, rounded, as the tables name them; none of log-probs that a peer keeps."""
    names = {"grad_hidden": "d_hidden", "grad_weight": "d_weight"}
    found = errors_of(outcome, truth).items()
    return {names.get(key, key): rounded(x) for key, x in found if x is not None}


def rounded(value: float, digits: int = 3) -> float:
    """A figure with so many significant digits, as JSON keeps it."""
    return float(f"{value:.{digits}g}")
