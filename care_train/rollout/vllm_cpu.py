"""What vLLM's CPU backend needs changed before a trainer can rely on it."""

from typing import Any

import torch


def patch_cpu_backend() -> None:
    """Weights that can be read back, seeds that survive split prompts, no C++ compiler, no binding
    of memory."""
    import vllm.model_executor.layers.utils as layers  # pyright: ignore[reportMissingImports]
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    layers.dispatch_cpu_unquantized_gemm = _keep_weight
    # Compiling would take seconds, and a compiler, for one comparison of log-probs.
    type(current_platform).simple_compile_backend = "eager"
    # It would bind all memory of this process, the trainer's too, to one NUMA node.
    torch.ops._C.init_cpu_memory_env = _bind_nothing  # pyright: ignore[reportAttributeAccessIssue]
    _rewind_without_offset()


def _keep_weight(layer: Any, remove_weight: bool) -> None:
    """Leave a linear layer as it is.

    vLLM packs its weight into an opaque buffer and deletes it: nothing could be loaded into the
    live model, nor read back to check it. torch's own matmul computes as the trainer does.
    """
    layer.cpu_linear = torch.nn.functional.linear


def _bind_nothing(nodes: list[int]) -> None:
    """In place of vLLM's binding."""


def _rewind_without_offset() -> None:
    """Take back the draw of a request whose prompt is not complete yet.

    vLLM samples for it all the same, throws the token away, and moves its generator back by an
    offset, which CPU generators do not have: it would stop with an error.
    """
    from vllm.v1.worker.cpu_model_runner import (  # pyright: ignore[reportMissingImports]
        CPUModelRunner,
    )

    original = CPUModelRunner._bookkeeping_sync
    if original.__module__ == __name__:
        return

    def bookkeeping(self: Any, *arguments: Any, **named: Any) -> Any:
        batch, hidden = self.input_batch, {}
        for place in self.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist():
            generator = batch.generators.pop(place, None)
            if generator is not None:
                hidden[place] = generator
                request = self.requests[batch.req_ids[place]]
                _set_back(generator, len(request.output_token_ids))
        try:
            return original(self, *arguments, **named)
        finally:
            batch.generators.update(hidden)

    CPUModelRunner._bookkeeping_sync = bookkeeping


def _set_back(generator: torch.Generator, num_drawn: int) -> None:
    """To where it was after `num_drawn` tokens."""
    generator.manual_seed(generator.initial_seed())
    for _ in range(num_drawn):
        torch.randint(0, 2**31, (1,), generator=generator)
