"""Whether the kernels are right on the device: the repository's tests, offsets and real heads.

The tests run Triton's kernels where there is a GPU: each loss, KL, option, dtype and shape against
the float64 oracle (`tests/kernels`), and what only a GPU has (`test_on_a_gpu.py`). Outcomes are
counted as they come, so that a section that is ended keeps them.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from bench.accuracy import Truth, true_log_probs, true_outcome
from bench.gpu.measuring import attempt, errors_against, release, rounded, sizes_of
from bench.gpu.section import Bench
from bench.peers import Outcome, log_probs_alone, make_problem, ours

_OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
# A file that cannot be imported costs no other its outcomes.
_OPTIONS = ("-vv", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors")
_MOST_WORKERS = 12
_TESTS = Path("tests/kernels")
# Relative errors of the gradients and the largest log-prob error in nats that pass.
_GRADIENT = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
_LOG_PROB = {torch.bfloat16: 1e-4, torch.float32: 1e-3}


def kernel_tests(bench: Bench) -> None:
    """`pytest tests/kernels`, every outcome counted; a dry run takes one file."""
    if find_spec("pytest") is None or find_spec("hypothesis") is None:
        bench.record.put("missing", {"kernel tests": "pytest or hypothesis is not installed"})
        sys.exit("the kernel tests need pytest and hypothesis, installed or as wheels in .wheels")
    # What only a GPU has comes first: compiling takes long, and the section may be ended.
    files = sorted(_TESTS.glob("test_*.py"), key=lambda path: (path.stem != "test_on_a_gpu", path))
    tests = [_TESTS / "test_objective.py"] if bench.dry else files
    command = [sys.executable, "-m", "pytest", *map(str, tests), *_OPTIONS]
    if find_spec("xdist") is not None and not bench.dry:
        command += ["-n", str(min(_MOST_WORKERS, len(os.sched_getaffinity(0))))]
    counts: Counter[str] = Counter()
    failed: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        in_summary = False
        for line in process.stdout:
            in_summary |= line.startswith("=====") and ("FAILURES" in line or "summary" in line)
            outcome = _OUTCOME.search(line) if "::" in line and not in_summary else None
            if outcome is None:
                print(line, end="")
                continue
            counts[outcome[1].lower()] += 1
            if outcome[1] in ("FAILED", "ERROR"):
                failed.append(line.strip())
            if sum(counts.values()) % 50 == 0:
                _record(bench, counts, failed)
    if process.returncode and not failed:
        failed.append(f"pytest ended with {process.returncode}")
    _record(bench, counts, failed)
    print(f"kernel tests: {dict(counts)}")


def _record(bench: Bench, counts: Counter[str], failed: list[str]) -> None:
    bench.record.put("kernel_tests", {"counts": dict(counts), "failed": failed[:20]})


def deep(bench: Bench) -> None:
    """In bfloat16 through the fused projection, in float32 through the kernels of rows."""
    for dtype in (torch.bfloat16, torch.float32):
        name = f"more than 2^31 logits, {str(dtype).removeprefix('torch.')}"
        attempt(bench, name, lambda dtype=dtype, name=name: _deep(bench, name, dtype))
        release(bench)
    for head in sizes_of(bench.dry).heads:
        attempt(bench, f"real head {head}", lambda head=head: _real(bench, head))
        release(bench)


def _deep(bench: Bench, name: str, dtype: torch.dtype) -> None:
    """All log-probs, and dX and dW at the first, the last and some rows between."""
    num, width, vocab = sizes_of(bench.dry).deep
    problem = make_problem(num, width, vocab, bench.device, dtype)
    log_probs, grad_hidden, grad_weight = ours(problem, backend="triton", chunk_rows=num)
    assert log_probs is not None
    truth, normaliser = true_log_probs(problem)
    hidden, weight = problem.hidden.detach().double(), problem.head_weight.detach().double()
    targets, advantages = problem.target_ids, problem.advantages.double()[:, None]
    rows, words = _sample(num, bench.device), _sample(vocab, bench.device)
    of_rows = (hidden[rows] @ weight.T - normaliser[rows, None]).exp()
    of_rows[torch.arange(len(rows), device=rows.device), targets[rows]] -= 1
    of_words = (hidden @ weight[words].T - normaliser[:, None]).exp()
    of_words -= (targets[:, None] == words[None]).double()
    some = Outcome(log_probs, grad_hidden[rows], grad_weight[words])
    true = Truth(truth, (of_rows * advantages[rows]) @ weight, (of_words * advantages).T @ hidden)
    _put(bench, name, dtype, errors_against(some, true), {"logits": num * vocab})


def _sample(length: int, device: torch.device | str) -> Tensor:
    """The first and the last indices, and an even spread."""
    ends = min(8, length)
    between = torch.linspace(0, length - 1, 48).long()
    indices = torch.cat([torch.arange(ends), between, torch.arange(length - ends, length)])
    return indices.unique().to(device)


def _real(bench: Bench, head: str) -> None:
    """A real head in the chunks that the package chooses, every gradient against float64."""
    sizes = sizes_of(bench.dry)
    problem = make_problem(sizes.real_rows, *sizes.heads[head], bench.device)
    outcome = ours(problem, backend="triton")
    assert outcome.log_probs is not None
    errors = errors_against(outcome, true_outcome(problem))
    differ = rounded(float((log_probs_alone(problem) - outcome.log_probs).abs().max()))
    name = f"real head {head}, N={sizes.real_rows}"
    _put(bench, name, torch.bfloat16, errors, {"log_probs_alone_differ": differ})


def _put(
    bench: Bench, name: str, dtype: torch.dtype, errors: dict[str, float], more: dict[str, float]
) -> None:
    """Record the errors, and whether they pass."""
    allowed = {"log_prob_max": _LOG_PROB[dtype]} | dict.fromkeys(
        ("d_hidden", "d_weight"), _GRADIENT[dtype]
    )
    passes = all(errors[key] <= most for key, most in allowed.items())
    figures = errors | more | {"ok": passes}
    bench.record.put(name, figures)
    print(f"  {'ok' if passes else 'FAILED'}  {name}: {figures}")
