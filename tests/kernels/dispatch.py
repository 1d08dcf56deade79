"""Watch what really runs: which code, how many GEMMs, and how large a tensor ever gets."""

import os
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from care_kernels.backends import ChunkSpec, LogitChunk, chunk_kind
from care_kernels.softmax import LogitTransform
from tests.kernels.cases import Case, check_against_oracle, policy_case

GEMMS = tuple(
    getattr(getattr(torch.ops.aten, name), overload)
    for name, overload in (
        ("mm", "default"),
        ("mm", "out"),
        ("addmm", "default"),
        ("addmm", "out"),
        ("addmm_", "default"),
    )
)


class DefinedPadding(TorchDispatchMode):
    """Fails a 16-bit GEMM whose operand has anything but zeros behind a row's end.

    torch 2.14's bfloat16 GEMM reads them on CPUs with AMX, so there NaN or stale bits behind a row
    reach every sum; this mode finds such an operand on any machine.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in GEMMS:
            for operand in args[-2:]:
                self._check(operand)
        return func(*args, **(kwargs or {}))

    def _check(self, operand: Tensor) -> None:
        rows = operand if operand.stride(-1) == 1 else operand.T
        is_padded = rows.stride(1) == 1 and rows.stride(0) > rows.shape[1] > 0
        # The interpreter's tensors live on the CPU; a GPU's GEMM does not read past a row.
        if operand.element_size() != 2 or operand.is_cuda or not is_padded or rows.shape[0] < 2:
            return
        shape = (rows.shape[0] - 1, rows.stride(0) - rows.shape[1])
        padding = rows.as_strided(shape, (rows.stride(0), 1), rows.storage_offset() + rows.shape[1])
        assert not padding.any(), "a 16-bit GEMM gets rows with something behind their end"


class Watch(TorchDispatchMode):
    """Counts GEMM multiply-adds and remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0
        self.largest = 0
        self.largest_allocated = 0
        """Of those in memory of their own."""
        self.gemm_dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in GEMMS:
            left, right = args[-2:]
            self.multiply_adds += left.shape[0] * left.shape[1] * right.shape[1]
            self.gemm_dtypes.add(left.dtype)
        if str(func) == "care_kernels.project.default":
            inputs, weight = args[:2]
            self.multiply_adds += inputs.shape[0] * weight.shape[0] * weight.shape[1]
        if str(func) == "care_kernels.add_weight_gradient.default":
            grad_logits, inputs = args[:2]
            self.multiply_adds += grad_logits.shape[1] * inputs.shape[0] * inputs.shape[1]
        given = {storage_of(leaf) for leaf in tensors_of((args, kwargs))}
        for leaf in tensors_of(result):
            self.largest = max(self.largest, leaf.numel())
            if storage_of(leaf) not in given:
                self.largest_allocated = max(self.largest_allocated, leaf.numel())
        return result


def tensors_of(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def kind_of(case: Case) -> type[LogitChunk]:
    """What multiplies by the head of a case on a CPU."""
    weight = case["head_weight"]
    return chunk_kind("torch", ChunkSpec(weight.dtype, weight, None, LogitTransform()))[0]


def use_twice(environment: dict[str, str]) -> tuple[type[LogitChunk], list[str]]:
    """Check the loss twice, the first time in this process: what multiplied, and our warnings."""
    os.environ.update(environment)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        case = policy_case(dtype=torch.bfloat16)
        for _ in range(2):
            check_against_oracle(case)
        kind = kind_of(case)
    said = (str(warning.message) for warning in caught)
    return kind, [text for text in said if "care_kernels" in text]
