"""Where the time of one call goes, kernel by kernel, and what a call costs before it does work."""

import time
from collections.abc import Callable

import torch
from torch.autograd import DeviceType

from bench.gpu.measuring import attempt, rounded, synchronize
from bench.gpu.record import Bench
from bench.gpu.sizes import sizes_of
from bench.peers import Problem, clipped_surrogate, make_problem
from care_kernels import linear_log_probs, linear_policy_loss

_ROWS_SHOWN = 16


def run(bench: Bench) -> None:
    """The loss, log-probs with a loss on top, and log-probs alone, at the larger head."""
    sizes = sizes_of(bench.dry)
    width, vocab = sizes.heads["7b"]
    problem = make_problem(sizes.profile_rows, width, vocab, bench.device)
    calls: dict[str, Callable[[], object]] = {
        "linear_policy_loss": lambda: _loss(problem),
        "linear_log_probs + loss": lambda: _log_probs_and_loss(problem),
        "linear_log_probs, no gradients": lambda: _log_probs(problem.hidden.detach(), problem),
    }
    for name, call in calls.items():
        attempt(bench, name, lambda name=name, call=call: _profile(bench, name, call, problem))
    attempt(bench, "overhead", lambda: _overhead(bench))


def _loss(problem: Problem) -> object:
    out = linear_policy_loss(
        problem.hidden,
        problem.head_weight,
        problem.target_ids,
        problem.advantages,
        backend="triton",
    )
    return torch.autograd.grad(out.loss, (problem.hidden, problem.head_weight))


def _log_probs(hidden: torch.Tensor, problem: Problem) -> torch.Tensor:
    weight = problem.head_weight if hidden.requires_grad else problem.head_weight.detach()
    return linear_log_probs(hidden, weight, problem.target_ids, backend="triton")


def _log_probs_and_loss(problem: Problem) -> object:
    loss = clipped_surrogate(_log_probs(problem.hidden, problem), problem.advantages)
    return torch.autograd.grad(loss, (problem.hidden, problem.head_weight))


def _profile(bench: Bench, name: str, call: Callable[[], object], problem: Problem) -> None:
    for _ in range(2):
        call()
    synchronize(bench)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not bench.dry:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        call()
        synchronize(bench)
    # An operator's line repeats the time of the kernels it launched: kernels alone are counted.
    wanted = DeviceType.CPU if bench.dry else DeviceType.CUDA
    rows = [
        (_milliseconds(event, bench.dry), event.count, event.key)
        for event in profile.key_averages()
        if event.device_type == wanted
    ]
    rows = sorted((row for row in rows if row[0] > 0), reverse=True)
    total = sum(row[0] for row in rows)
    kernels = [
        {"kernel": key[:140], "ms": rounded(ms), "launches": count, "share": rounded(ms / total)}
        for ms, count, key in rows[:_ROWS_SHOWN]
    ]
    bench.record.put(name, {"ms": rounded(total, 4), "kernels": kernels})
    (vocab, width), num = problem.head_weight.shape, len(problem.target_ids)
    print(f"\n{name}, N={num} D={width} V={vocab}: {total:.2f} ms")
    for row in kernels:
        share = f"{100 * row['share']:5.1f} %"
        print(f"  {row['ms']:9.3f} ms {share} x{row['launches']:<4d} {row['kernel'][:80]}")


def _milliseconds(event: object, dry: bool) -> float:
    name = "self_cpu_time_total" if dry else "self_device_time_total"
    return getattr(event, name) / 1e3


def _overhead(bench: Bench) -> None:
    """A call whose work is nothing: checks, launches and the one wait for the number of rows."""
    problem = make_problem(64, 256, 64 if bench.dry else 1024, bench.device)
    for _ in range(3):
        _loss(problem)
    synchronize(bench)
    repeats = 1 if bench.dry else 100
    start = time.perf_counter()
    for _ in range(repeats):
        _loss(problem)
    synchronize(bench)
    microseconds = 1e6 * (time.perf_counter() - start) / repeats
    bench.record.put("overhead_us", round(microseconds))
    print(f"\nforward and backward of a problem too small to matter: {microseconds:.0f} us")
