"""How a call runs: which backend, how many rows of logits at a time, in which precision."""

import torch

# Each chunk reads and writes the whole head gradient, so chunks should be large.
MAX_CHUNK_ROWS = 4096
CHUNK_BYTES = 256 * 2**20


def resolve_backend(backend: str | None) -> str:
    """The backend that will run: `"torch"`, the only one in this version.

    Raises:
        ValueError: `backend` is `"triton"` or unknown.
    """
    if backend == "triton":
        raise ValueError(
            "backend: got 'triton', which is not in this version yet; wanted None or 'torch'"
        )
    if backend not in (None, "torch"):
        raise ValueError(f"backend: got {backend!r}; wanted None, 'triton' or 'torch'")
    return "torch"


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64 (gradient checks need it), else float32."""
    is_double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if is_double else torch.float32


def chunk_size(
    chunk_rows: int | None, head_weight: torch.Tensor, dtype: torch.dtype, with_ref: bool = False
) -> int:
    """`chunk_rows`, or as many rows, from 1 to 4096, as keep the logits within 256 MiB.

    Args:
        chunk_rows: the caller's choice.
        head_weight: [V, D].
        dtype: of the logits buffer.
        with_ref: the reference's logits are held beside the policy's.
    """
    if chunk_rows is not None:
        return chunk_rows
    row_bytes = head_weight.shape[0] * dtype.itemsize * (2 if with_ref else 1)
    return max(1, min(MAX_CHUNK_ROWS, CHUNK_BYTES // row_bytes))
