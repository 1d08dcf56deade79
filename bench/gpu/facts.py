"""What the figures depend on: the device, the versions, and two ceilings measured here."""

import importlib
import platform
import time

import torch

from bench.accuracy import true_log_probs
from bench.gpu.measuring import attempt, rounded, time_in_turns
from bench.gpu.section import Bench
from bench.measure import machine_facts
from bench.peers import installed_version, make_problem, ours

# Liger's own kernels for Hopper need nvidia-cutlass-dsl; without it its torch code runs.
_PACKAGES = (
    "triton",
    "numpy",
    "transformers",
    "pytest",
    "hypothesis",
    "deepspeed",
    "nvidia-cutlass-dsl",
)
_PEERS = ("liger-kernel", "cut-cross-entropy", "trl")


def run(bench: Bench) -> None:
    """Versions, a first call of the loss, and the rates of a copy and of a matrix product."""
    record = bench.record
    versions = {name: installed_version(name) for name in (*_PACKAGES, *_PEERS)}
    facts = {
        "device": machine_facts(bench.device)["device"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "versions": versions,
        "peers": {name: _importable(name) for name in _PEERS},
    }
    if not bench.dry:
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        }
    record.put("machine", facts)
    for name, value in facts.items():
        print(f"  {name:16s} {value}")
    attempt(bench, "first call", lambda: _first_call(bench))
    if not bench.dry:
        attempt(bench, "ceilings", lambda: _ceilings(bench))


def _importable(package: str) -> str:
    """ "yes", or what its import raises."""
    try:
        importlib.import_module(package.replace("-", "_"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return "yes"


def _first_call(bench: Bench) -> None:
    problem = make_problem(64, 64, 64 if bench.dry else 512, bench.device)
    start = time.time()
    log_probs = ours(problem, backend="triton").log_probs
    assert log_probs is not None
    off = rounded(float((log_probs - true_log_probs(problem)[0]).abs().max()))
    bench.record.put(
        "first_call", {"log_prob_error": off, "seconds": round(time.time() - start, 1)}
    )
    print(f"  the first call, compiling: {time.time() - start:.1f} s, log-probs off by {off:.1e}")


def _ceilings(bench: Bench) -> None:
    """Bytes read and written by a copy, and the rate of one large bfloat16 product."""
    source = torch.randn(2**28, device="cuda")
    copy, size = torch.empty_like(source), 8192
    left, right = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    times = time_in_turns(
        bench, {"copy": lambda: copy.copy_(source), "product": lambda: left @ right}, 9
    )
    medians = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    ceilings = {
        "copy_tb_s": rounded(2 * source.nbytes / medians["copy"] / 1e9),
        "product_tflop_s": rounded(2 * size**3 / medians["product"] / 1e9),
    }
    bench.record.put("ceilings", ceilings)
    print(f"  a copy moves {ceilings['copy_tb_s']} TB/s, 8,192^3 runs at", end=" ")
    print(f"{ceilings['product_tflop_s']} TFLOP/s")
