"""Where the time of one call goes, kernel by kernel, and what a call costs before it does work."""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch.autograd import DeviceType

from bench.gpu.measuring import attempt, rounded, sizes_of, synchronize
from bench.gpu.section import Bench
from bench.peers import Problem, log_probs_alone, make_problem, ours, ours_log_probs

_ROWS_SHOWN = 16


def run(bench: Bench) -> None:
    """The loss, log-probs with a loss on top, and log-probs alone, at the larger head."""
    sizes = sizes_of(bench.dry)
    width, vocab = sizes.heads["7b"]
    problem = make_problem(sizes.profile_rows, width, vocab, bench.device)
    calls: dict[str, Callable[[], object]] = {
        "linear_policy_loss": partial(ours, problem, backend="triton"),
        "linear_log_probs + loss": partial(ours_log_probs, problem, backend="triton"),
        "linear_log_probs, no gradients": partial(log_probs_alone, problem),
    }
    for name, call in calls.items():
        attempt(bench, name, lambda name=name, call=call: _profile(bench, name, call, problem))
    attempt(bench, "overhead", lambda: _overhead(bench))


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
        ours(problem, backend="triton")
    synchronize(bench)
    repeats = 1 if bench.dry else 100
    start = time.perf_counter()
    for _ in range(repeats):
        ours(problem, backend="triton")
    synchronize(bench)
    microseconds = 1e6 * (time.perf_counter() - start) / repeats
    bench.record.put("overhead_us", round(microseconds))
    print(f"\nforward and backward of a problem too small to matter: {microseconds:.0f} us")
