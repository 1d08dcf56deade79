"""Every public function on the device against the float64 oracle.

The loss runs with every option, in three dtypes, on shapes that divide by everything and by
nothing; each case twice, for the same bits. A figure is an error over what is allowed, by the rule
and the table of the kernel tests (`tests/kernels/tolerances.py`): twice the error of torch in the
same dtype plus a floor. 1 and less passes.

The last part runs the repository's own kernel tests, which use the device where there is one.
"""

import itertools
import math
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from bench.gpu.checks import (
    BFLOAT16,
    BROKEN,
    DTYPES,
    Check,
    Figures,
    allowed_error,
    dtype_name,
    on_device,
)
from bench.gpu.measuring import is_context_lost, rounded
from bench.gpu.promises import promises
from bench.gpu.section import Bench
from care_kernels import Cispo, Clip, Sapo
from tests.kernels.cases import (
    PER_ROW,
    Case,
    policy_case,
    row_vector,
    run_ours,
    run_reference,
    with_kl,
)

_OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")


def run(bench: Bench) -> None:
    """This part's share of the checks; the last part runs the kernel tests."""
    if bench.part == bench.parts - 1:
        _run_kernel_tests(bench)
        return
    checks = [*_loss_checks(bench.dry), *promises(bench.dry)]
    kinds = list(dict.fromkeys(check.kernels for check in checks))
    checkers = max(bench.parts - 1, 1)
    done: dict[str, Any] = {}
    for check in checks:
        if kinds.index(check.kernels) % checkers != bench.part:
            continue
        figures, lost = _figures_of(check, bench)
        done[check.name] = figures
        bench.record.put("cases", done)
        if lost:
            sys.exit(f"{check.name}: the CUDA context is lost")
    _print_worst(done)


def _figures_of(check: Check, bench: Bench) -> tuple[dict[str, Any], bool]:
    """A check's figures, and whether it took the CUDA context with it."""
    start = time.time()
    try:
        figures = check.run(bench)
    except Exception as problem:
        reason = f"{type(problem).__name__}: {problem}"[:300]
        print(f"!! {check.name}: {reason}", flush=True)
        return {"worst": BROKEN, "error": reason}, is_context_lost(problem)
    finite = {key: value if math.isfinite(value) else BROKEN for key, value in figures.items()}
    worst = max(finite.values(), default=0.0)
    kept = {key: rounded(value) for key, value in finite.items()}
    return {"worst": rounded(worst), "seconds": round(time.time() - start, 1)} | kept, False


def _print_worst(done: dict[str, Any]) -> None:
    failed = [name for name, figures in done.items() if figures["worst"] > 1]
    print(f"{len(done) - len(failed)} of {len(done)} checks pass; error over what is allowed:")
    for name, figures in sorted(done.items(), key=lambda item: -item[1]["worst"])[:6]:
        print(f"  {'FAILED' if figures['worst'] > 1 else 'ok':6s} {figures['worst']:9.3g}  {name}")


def loss_figures(case: Case) -> Figures:
    """`linear_policy_loss` twice against the oracle: values, gradients, flags, bits."""
    ours, our_grads = run_ours(case | {"report_all_rows": True})
    again, again_grads = run_ours(case | {"report_all_rows": True})
    oracle, oracle_grads = run_reference(case)
    eager, eager_grads = run_reference(case, torch.float32)
    # Terms of both signs: their sum may be far smaller than its rounding errors' scale.
    terms = max(1.0, float(case["advantages"].abs().sum()))
    losses = ours.loss, oracle.loss, eager.loss
    figures = {"loss": allowed_error(*losses, is_gradient=False, least_scale=terms)}
    for name in PER_ROW:
        got = getattr(ours, name)
        if got is not None:
            wanted = getattr(oracle, name), getattr(eager, name)
            figures[name] = allowed_error(got, *wanted, is_gradient=False)
    for name, grad in our_grads.items():
        wanted = oracle_grads[name], eager_grads[name]
        figures[f"d {name}"] = allowed_error(grad, *wanted, is_gradient=True)
    # A ratio on a clip's very edge may fall on either side: one row in fifty.
    for name in ("clipped_low", "clipped_high"):
        differs = getattr(ours, name) != getattr(oracle, name)
        figures[name] = float(differs.float().mean()) / 0.02 if differs.numel() else 0.0
    same = torch.equal(ours.loss, again.loss) and torch.equal(ours.log_probs, again.log_probs)
    same &= all(torch.equal(our_grads[name], again_grads[name]) for name in our_grads)
    figures["repeats bit for bit"] = 0.0 if same else BROKEN
    return figures


def _sequences(case: Case) -> Case:
    num_rows = case["hidden"].shape[0]
    return case | {"ratio_level": "sequence", "sequence_ids": torch.arange(num_rows) * 5 % 7 // 2}


def _bias(case: Case) -> Case:
    vocab_size, dtype = case["head_weight"].shape[0], case["head_weight"].dtype
    generator = torch.Generator().manual_seed(4)
    return case | {"bias": (0.5 * torch.randn(vocab_size, generator=generator)).to(dtype)}


def _entropy(case: Case) -> Case:
    return case | {"entropy_weights": row_vector(case, -0.1, 0.1, seed=3)}


def _dual(case: Case) -> Case:
    return case | {"surrogate": Clip(dual=1.4), "importance_weights": row_vector(case, 0.0, 2.0)}


def _transform(case: Case) -> Case:
    return case | {"temperature": 1.3, "logit_softcap": 5.0, "logit_scale": 2.0}


OPTIONS: dict[str, Callable[[Case], Case]] = {
    "old is current": lambda case: {k: v for k, v in case.items() if k != "old_log_probs"},
    "clip": lambda case: case,
    "dual clip, importance weights": _dual,
    "k1": lambda case: with_kl(case, "k1", from_hidden=False),
    "k2": lambda case: with_kl(case, "k2", from_hidden=False),
    "k3": lambda case: with_kl(case, "k3", from_hidden=False),
    "unbiased k3": lambda case: with_kl(case, "k3_unbiased", from_hidden=False),
    "CISPO": lambda case: case | {"surrogate": Cispo(1.2)},
    "SAPO": lambda case: case | {"surrogate": Sapo()},
    "k3 of hidden states": lambda case: with_kl(case, "k3"),
    "exact KL": lambda case: with_kl(case, "exact"),
    "entropy": _entropy,
    "softcap, temperature, scale": _transform,
    "bias": _bias,
    "sequence ratio": _sequences,
    "k3, entropy, softcap, bias, sequence ratio": lambda case: _sequences(
        _bias(_transform(_entropy(with_kl(case, "k3"))))
    ),
    "exact KL, entropy, softcap, bias, dual clip": lambda case: _dual(
        _bias(_transform(_entropy(with_kl(case, "exact"))))
    ),
}


def _loss_checks(dry: bool) -> list[Check]:
    """N, D, V: all divisible by 16; by nothing; a vocabulary with a tail; one of 32,000 words."""
    checks: list[Check] = []

    def add(shape: tuple[int, int, int], dtype: torch.dtype, option: str, rows: int | None) -> None:
        def check(bench: Bench) -> Figures:
            case = OPTIONS[option](policy_case(*shape, dtype)) | {"chunk_rows": rows}
            return loss_figures(on_device(case, bench))

        name = f"{option}, {dtype_name(dtype)}, N={shape[0]} D={shape[1]} V={shape[2]}"
        checks.append(Check(name, f"{option} {dtype_name(dtype)}", check))

    if dry:
        for index, option in enumerate(OPTIONS):
            add((9, 20, 67), DTYPES[index % 3], option, 4)
        return checks
    for dtype, option in itertools.product(DTYPES, OPTIONS):
        add((64, 64, 512), dtype, option, 17)
        add((37, 100, 1003), dtype, option, None)
        if dtype == BFLOAT16:
            add((130, 128, 4099), dtype, option, 48)
    for dtype, option in itertools.product(DTYPES, _OPTIONS_AT_SIZE):
        add((384, 1024, 32_000), dtype, option, 200)
    for dtype, shape in itertools.product(DTYPES, _EDGES):
        add(shape, dtype, "clip", None)
    return checks


_OPTIONS_AT_SIZE = (
    "clip",
    "exact KL",
    "entropy",
    "k3, entropy, softcap, bias, sequence ratio",
    "exact KL, entropy, softcap, bias, dual clip",
)
_EDGES = (
    (1, 64, 512),
    (5, 1, 17),
    (3, 16, 1),
    (1, 1, 1),
    (2, 8, 15),
    (257, 2048, 130),
    (129, 48, 256),
)


def _run_kernel_tests(bench: Bench) -> None:
    """`pytest tests/kernels`: the compiled kernels first, every outcome counted."""
    if find_spec("pytest") is None or find_spec("hypothesis") is None:
        bench.record.put("kernel_tests", {"left_out": "pytest or hypothesis is not installed"})
        return
    paths = ["tests/kernels/triton", "tests/kernels"]
    if bench.dry:
        paths = ["tests/kernels/triton/test_spans.py"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *paths,
        "-vv",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
    if find_spec("xdist") is not None and not bench.dry:
        command += ["-n", "6"]
    counts: Counter[str] = Counter()
    failed: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as tests:
        assert tests.stdout is not None
        in_summary = False
        for line in tests.stdout:
            in_summary |= "=====" in line and ("FAILURES" in line or "summary" in line)
            outcome = _OUTCOME.search(line) if "::" in line and not in_summary else None
            if outcome is None:
                print(line, end="")
                continue
            counts[outcome[1].lower()] += 1
            if outcome[1] in ("FAILED", "ERROR"):
                failed.append(line.strip())
            if sum(counts.values()) % 50 == 0:
                _record_tests(bench, counts, failed, None)
    _record_tests(bench, counts, failed, tests.returncode)
    print(f"kernel tests: {dict(counts)}")


def _record_tests(
    bench: Bench, counts: Counter[str], failed: list[str], exit_code: int | None
) -> None:
    figures = {"counts": dict(counts), "failed": failed[:20], "exit_code": exit_code}
    bench.record.put("kernel_tests", figures)
