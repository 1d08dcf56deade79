"""All ways to the same loss on one shape: time in turns, share of the floor, memory, errors.

The floor is three bare matrix products of the loss's shapes (logits, dX, dW). What compiles or
tunes itself gets a bounded time for that; what returns a wrong gradient gets no time.
"""

import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bench.accuracy import Truth, true_outcome
from bench.gpu.measuring import (
    at_most,
    attempt,
    errors_against,
    peak_mib,
    release,
    rounded,
    sizes_of,
    time_in_turns,
)
from bench.gpu.section import Bench
from bench.measure import Spread, numbers_table
from bench.peers import (
    CONTENDERS,
    Outcome,
    Problem,
    gemms,
    installed_version,
    log_probs_alone,
    make_problem,
    ours,
    ours_log_probs,
)
from care_kernels import linear_log_probs, linear_policy_loss

FLOOR = "three bare GEMMs"
OURS = "linear_policy_loss"
OURS_START = "linear_"
_WRONG = 0.05
_WARM_UP_SECONDS = 50.0
# What timing all entrants takes at most, kept free of warming up.
_RESERVED_SECONDS = 25.0
# They compile C++ on a CPU, where a dry run only wants to know that the code works.
_COMPILERS = ("torch_compiled", "cut_cross_entropy")
_PEERS = ("torch_compiled", "liger_grpo", "liger_scaled_ce", "trl_chunked", "cut_cross_entropy")


@dataclass(frozen=True)
class Entrant:
    """One row of a table."""

    run: Callable[[Problem], object]
    gemms: float
    """Bare GEMMs of the loss's size that it stands for: what its TFLOP/s counts."""
    is_whole: bool = True
    """It returns an `Outcome` of the whole problem, which is checked."""


_ours = partial(ours, backend="triton")


def _of_active(fraction: float) -> Callable[[Problem], Outcome]:
    return lambda problem: _ours(problem.with_active(fraction))


def _loss_alone(problem: Problem) -> object:
    inputs = (problem.hidden, problem.head_weight, problem.target_ids, problem.advantages)
    with torch.no_grad():
        return linear_policy_loss(*inputs, backend="triton").loss


def _torch_log_probs_alone(problem: Problem) -> object:
    with torch.no_grad():
        logits = (problem.hidden @ problem.head_weight.T).float()
        return logits.log_softmax(-1).gather(1, problem.target_ids[:, None])


@lru_cache(maxsize=1)
def _log_normalizer(problem: Problem) -> Tensor:
    """What the old policy's forward leaves behind, made once."""
    inputs = (problem.hidden, problem.head_weight, problem.target_ids)
    with torch.no_grad():
        return linear_log_probs(*inputs, return_log_normalizer=True, backend="triton")[1]


def _anchored(problem: Problem) -> Outcome:
    return _ours(problem, old_log_normalizer=_log_normalizer(problem))


CORE = {
    FLOOR: Entrant(gemms, 3, is_whole=False),
    OURS: Entrant(_ours, 3),
    "linear_policy_loss, anchored": Entrant(_anchored, 3),
    "linear_policy_loss, 60 % active": Entrant(_of_active(0.6), 1.8, is_whole=False),
    "linear_policy_loss, 25 % active": Entrant(_of_active(0.25), 0.75, is_whole=False),
    "linear_policy_loss, no gradients": Entrant(_loss_alone, 1, is_whole=False),
    "linear_log_probs, no gradients": Entrant(log_probs_alone, 1, is_whole=False),
    "linear_log_probs + loss": Entrant(partial(ours_log_probs, backend="triton"), 3),
    "torch, fp32 softmax": Entrant(CONTENDERS["torch"].run, 3),
    "torch log-probs, no gradients": Entrant(_torch_log_probs_alone, 1, is_whole=False),
}


def peers(bench: Bench) -> dict[str, Entrant]:
    """Those that are installed or lie as wheels; who is missing is recorded with the reason."""
    found: dict[str, Entrant] = {}
    missing: dict[str, str] = {}
    for name in _PEERS:
        contender = CONTENDERS[name]
        if installed_version(contender.package) is None:
            missing[contender.label] = f"{contender.package} is not installed, nor in .wheels/"
        elif bench.dry and name in _COMPILERS:
            missing[contender.label] = "compiles for long; not in a dry run"
        else:
            found[contender.label] = Entrant(contender.run, 3)
    if missing:
        bench.record.put("missing", missing)
        print(f"  not here: {missing}")
    _let_trl_load()
    return found


def _failure_key(name: str) -> str:
    """A peer that fails, or runs out of memory, is no failure of ours."""
    return "failed" if name == FLOOR or name.startswith(OURS_START) else "peers_failed"


def _let_trl_load() -> None:
    """Load TRL's chunked log-probs without its trainer, which imports `datasets` and much else.

    Their backward takes one name from there: a context that gathers a head partitioned by ZeRO-3,
    and does nothing to any other head.
    """
    stand_in: Any = ModuleType("trl.trainer.utils")
    stand_in.maybe_gather_lm_head_ctx = lambda *parameters: nullcontext()
    sys.modules["trl.trainer"] = ModuleType("trl.trainer")
    sys.modules["trl.trainer.utils"] = stand_in


class Contest:
    """One shape's table: `measure` may be called with more entrants; all are timed together."""

    def __init__(self, bench: Bench, head: str, rows: int, width: int, vocab: int, *, check: bool):
        self.key = f"{head} N={rows}"
        self._bench, self._width, self._vocab, self._rows = bench, width, vocab, rows
        self._check = check
        self._entrants: dict[str, Entrant] = {}
        self._table: dict[str, dict[str, Any]] = {}

    def measure(self, entrants: dict[str, Entrant], *, rounds: int) -> None:
        """Warm up and check the new entrants, then time all of them in turns."""
        bench = self._bench
        problem = make_problem(self._rows, self._width, self._vocab, bench.device)
        truth = None
        if self._check:
            truth = attempt(bench, f"{self.key}: the truth", partial(true_outcome, problem))
        for name, entrant in entrants.items():
            warm_up = partial(self._warm_up, name, entrant, problem, truth)
            if attempt(bench, f"{self.key}: {name}", warm_up, key=_failure_key(name)):
                self._entrants[name] = entrant
            release(bench)
        del truth
        calls = {name: partial(e.run, problem) for name, e in self._entrants.items()}
        for name, times in time_in_turns(bench, calls, rounds).items():
            self._table.setdefault(name, {})["ms"] = times
        for name in entrants:
            if name in self._entrants:
                peak = attempt(bench, f"memory of {name}", partial(peak_mib, bench, calls[name]))
                self._table[name]["peak_mib"] = None if peak is None else round(peak)
        bench.record.put(self.key, self.figures())
        del calls, problem
        release(bench)

    def _warm_up(self, name: str, entrant: Entrant, problem: Problem, truth: Truth | None) -> bool:
        """Compile, tune, check; False where the gradients are wrong."""
        with at_most(min(_WARM_UP_SECONDS, max(self._bench.seconds_left() - _RESERVED_SECONDS, 1))):
            outcome = entrant.run(problem)
        errors: dict[str, float] = {}
        if truth is not None and entrant.is_whole and isinstance(outcome, Outcome):
            errors = errors_against(outcome, truth)
        is_wrong = any(not errors.get(key, 0) <= _WRONG for key in ("d_hidden", "d_weight"))
        self._table[name] = errors | ({"note": "wrong gradient"} if is_wrong else {})
        return not is_wrong

    def figures(self) -> dict[str, dict[str, Any]]:
        """Each entrant's median, 20th and 80th percentile, share of the floor, TFLOP/s, memory."""
        floor = self._median(FLOOR)
        gemm = 2.0 * self._rows * self._width * self._vocab
        rows: dict[str, dict[str, Any]] = {}
        for name, found in self._table.items():
            row = {key: value for key, value in found.items() if key != "ms"}
            median = self._median(name)
            if median is not None:
                spread = Spread.of(found["ms"])
                row |= {"ms": rounded(median, 4), "p20": rounded(spread.p20, 4)}
                row |= {"p80": rounded(spread.p80, 4), "rounds": len(found["ms"])}
                row["tflop_s"] = rounded(self._entrants[name].gemms * gemm / median / 1e9)
                row["of_floor"] = None if floor is None else rounded(median / floor)
            rows[name] = row
        return rows

    def _median(self, name: str) -> float | None:
        times = self._table.get(name, {}).get("ms")
        return statistics.median(times) if times else None

    def print(self) -> None:
        """The table for people."""
        title = f"{self.key} D={self._width} V={self._vocab}, bfloat16"
        if self._bench.dry:
            title += " (dry run on a CPU)"
        headings = ("ms", "x floor", "TFLOP/s", "peak MiB", "log-prob RMS", "dX", "dW")
        table = numbers_table(title, headings)
        keys = ("ms", "of_floor", "tflop_s", "peak_mib", "log_prob_rms", "d_hidden", "d_weight")
        for name, row in self.figures().items():
            cells = ["-" if row.get(key) is None else f"{row[key]:,.4g}" for key in keys]
            table.add_row(name, *cells, style="bold" if name == OURS else None)
        Console(width=118).print(table)


def headline(bench: Bench) -> None:
    """First the floor, our own functions and plain torch on all shapes, then the peers beside."""
    sizes = sizes_of(bench.dry)
    contests = [
        Contest(bench, head, rows, width, vocab, check=True)
        for rows in sizes.headline_rows
        for head, (width, vocab) in sizes.heads.items()
    ]
    rounds = 2 if bench.dry else 9
    for contest in contests:
        contest.measure(CORE, rounds=rounds)
        contest.print()
    entrants = peers(bench)
    for contest in contests:
        if bench.seconds_left() > _RESERVED_SECONDS + 5:
            contest.measure(entrants, rounds=rounds)
            contest.print()


def shapes(bench: Bench) -> None:
    """From few rows, where the head's weights dominate the traffic, to many."""
    sizes = sizes_of(bench.dry)
    for rows in sizes.more_rows:
        for head, (width, vocab) in sizes.heads.items():
            contest = Contest(bench, head, rows, width, vocab, check=False)
            contest.measure(CORE, rounds=2 if bench.dry else 5)
            contest.print()
