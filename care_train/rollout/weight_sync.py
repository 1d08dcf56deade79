"""Weights from the trainer into vLLM's model: what is sent, and the proof that vLLM holds it.

Each tensor is loaded into the live model by vLLM's own loaders, which know its names and fused
parameters (qkv_proj, gate_up_proj). What they say they filled tells where each tensor has to be: on
which rows of which parameter, and under tensor parallelism on which rank. After every sync the
checksums of those slices must add up to those taken before the tensors left, and no parameter may
have been left out. `vllm_worker.py` is the receiving side.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from care_train.rollout.errors import RolloutError

BUCKET_BYTES = 512 << 20
"""Weights gathered and sent at once; a larger parameter goes alone."""

ADAPTER_ID = 1
"""The number by which vLLM knows the policy's adapter."""

_CHUNK = 1 << 22
_MIX = -7046029254386353131  # 2^64 / golden ratio, as a signed integer
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ADAPTER_ENDS = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class SentTensor:
    """What the receiver must know of a tensor; the bounds hold where it comes in a message."""

    name: Annotated[str, Field(min_length=1, max_length=500)]
    dtype: Literal["float32", "bfloat16", "float16"]
    shape: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 40)], ...], Field(max_length=8)]
    checksum: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize

    @property
    def is_adapter(self) -> bool:
        """Whether it is half of a LoRA adapter rather than a weight of the model."""
        return self.name.endswith(_ADAPTER_ENDS)


def described(
    weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> Iterator[tuple[SentTensor, torch.Tensor]]:
    """Each tensor in the precision vLLM holds, with its description.

    `weights` are Hugging Face names and whole tensors, each valid until the next is asked for.
    """
    kind: Any = str(dtype).removeprefix("torch.")
    for name, tensor in weights:
        whole = tensor.detach().to(dtype).contiguous()
        yield SentTensor(name, kind, tuple(whole.shape), checksum(whole)), whole


def buckets(
    weights: Iterable[tuple[SentTensor, torch.Tensor]], bucket_bytes: int
) -> Iterator[tuple[list[SentTensor], torch.Tensor]]:
    """Descriptions and bytes (uint8 [size]) of tensors from `described`, packed without alignment.

    A bucket is no larger than `bucket_bytes`, unless one tensor alone is.
    """
    sent: list[SentTensor] = []
    parts: list[torch.Tensor] = []
    for description, tensor in weights:
        size = sum(part.numel() for part in parts)
        if parts and size + description.num_bytes > bucket_bytes:
            yield sent, torch.cat(parts)
            sent, parts = [], []
        sent.append(description)
        # A copy: the tensor is not valid any longer when the next one is asked for.
        parts.append(tensor.reshape(-1).view(torch.uint8).clone())
    if parts:
        yield sent, torch.cat(parts)


def send_weights(llm: Any, weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> int:
    """Fill and check the model of a vLLM in this process, which holds `dtype`; the bytes sent.

    Raises:
        RolloutError: a tensor vLLM does not take, a parameter that none filled, or one that holds
            other numbers than were sent; named in the message.
    """
    num_bytes = 0
    llm.collective_rpc("care_begin")
    for description, tensor in described(weights, dtype):
        check_sync(llm.collective_rpc("care_load", args=(description, tensor)))
        num_bytes += description.num_bytes
    finish_sync(llm)
    return num_bytes


def check_sync(problems: Iterable[str | None]) -> None:
    """Raise the first of the workers' problems, if there is one, as a `RolloutError`."""
    for problem in problems:
        if problem is not None:
            raise RolloutError(f"weight sync: {problem}")


def finish_sync(llm: Any) -> None:
    """After the last tensor: check what the workers hold, and drop all that was computed with the
    old weights.

    Raises:
        RolloutError: see `send_weights`.
    """
    check_sync(llm.collective_rpc("care_failure"))
    # All three caches belong together: vLLM skips the encoder for an image that its image cache
    # knows, although the encoder's output may be gone.
    if not llm.reset_prefix_cache():
        raise RolloutError("weight sync: vLLM could not reset its prefix cache: requests still run")
    llm.llm_engine.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()


def checksum(
    tensor: torch.Tensor, *, first_row: int = 0, first_column: int = 0, columns: int | None = None
) -> int:
    """Sum over elements of bits x (a pseudo-random odd number of the position), modulo 2^64 and
    signed.

    It is exact and does not depend on the order of summation or the device. One changed element
    always changes it. The checksums of a tensor's pieces add up to the tensor's.

    Args:
        tensor: [rows, ...]: a tensor, or a piece of one.
        first_row: where the piece starts.
        first_column: where the piece's rows start, in elements.
        columns: elements per row of the whole tensor. None: the piece has whole rows.
    """
    rows = tensor.shape[0] if tensor.ndim else 1
    if not tensor.numel():
        return 0
    flat = tensor.detach().reshape(rows, -1)
    words = flat.contiguous().view(_WORDS[tensor.element_size()])
    width = words.shape[1]
    columns = width if columns is None else columns
    step = max(1, _CHUNK // width)
    column = torch.arange(width, device=tensor.device) + first_column
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, rows, step):
        part = words[start : start + step].long()
        row = torch.arange(start, start + len(part), device=tensor.device) + first_row
        factor = (row[:, None] * columns + column).mul_(_MIX)
        factor.bitwise_xor_(factor >> 29).mul_(_MIX).bitwise_or_(1)
        total += factor.mul_(part).sum()
    return int(total)


def find_failures(model: Any, filled: Mapping[str, Sequence[SentTensor]]) -> list[str]:
    """What is wrong with a model after a sync, for people; due on all workers.

    Args:
        model: vLLM's, without wrappers for adapters.
        filled: names of the model's parameters, and what its loaders filled each with.
    """
    from vllm.distributed import get_tp_group  # pyright: ignore[reportMissingImports]

    group = get_tp_group()
    parameters = dict(model.named_parameters())
    failures = [
        f"no tensor was sent for vLLM's {name!r}"
        for name in [*parameters, *_saved_buffers(model)]
        if name not in filled
    ]
    for name, sent in filled.items():
        parameter = parameters[name].detach()
        pieces = _pieces(parameter, _segments(model, name, sent), group)
        # vLLM pads a vocabulary with zeros.
        if sent[0].shape and parameter[sum(piece.rows for piece in pieces) :].any():
            names = ", ".join(tensor.name for tensor in sent)
            failures.append(f"vLLM's {name!r} was sent in part only: {names}")
        for tensor in sent:
            own = [piece for piece in pieces if piece.sent is tensor]
            held = _held_checksum(parameter, own, group)
            if held != tensor.checksum:
                failures.append(
                    f"{tensor.name!r}: vLLM's {name!r} holds other numbers than were sent "
                    f"(checksum {held % 2**64:016x}, sent {tensor.checksum % 2**64:016x})"
                )
    return failures


def _saved_buffers(model: Any) -> list[str]:
    """Buffers that belong to a checkpoint, and would be random here: vLLM started without one.

    Not the scales of an attention without quantisation, which vLLM sets to 1 after loading.
    """
    saved = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return [n for n, b in buffers.items() if not (n.endswith("_scale") and bool((b == 1).all()))]


_Segment = tuple[SentTensor, int, int]
"""Rows of a sent tensor that tensor parallelism splits on their own: the first, how many."""


def _segments(model: Any, parameter: str, sent: Sequence[SentTensor]) -> list[_Segment]:
    """The parts of a parameter as they lie in it: q, k, v; gate, up.

    Of a tensor that is fused in the checkpoint already (a vision tower's qkv), its own parts.
    """
    module, _, _ = parameter.rpartition(".")
    if len(sent) > 1:
        order = getattr(model, "packed_modules_mapping", {}).get(module.rpartition(".")[2])
        if order:
            sent = sorted(sent, key=lambda tensor: order.index(tensor.name.split(".")[-2]))
        return [(tensor, 0, tensor.shape[0]) for tensor in sent]
    rows = sent[0].shape[0] if sent[0].shape else 1
    inner = getattr(model.get_submodule(module), "output_sizes", None) or [rows]
    if sum(inner) != rows:
        inner = [rows]
    return [(sent[0], sum(inner[:index]), count) for index, count in enumerate(inner)]


@dataclass(frozen=True)
class _Piece:
    """Where in this rank's parameter a segment, or this rank's share of it, lies."""

    sent: SentTensor
    start: int
    """First row in the parameter."""
    rows: int
    first_row: int
    """First row in the sent tensor."""
    first_column: int
    copies: int
    """Number of ranks that hold the same piece."""


def _pieces(parameter: torch.Tensor, segments: list[_Segment], group: Any) -> list[_Piece]:
    """Which rows of the parameter hold which segment; vLLM may pad below the last."""
    size, rank = group.world_size, group.rank_in_group
    rows = [count for _, _, count in segments]
    held, columns = rows, prod(parameter.shape[1:])
    splits_columns = size > 1 and columns != prod(segments[0][0].shape[1:])
    splits_rows = bool(parameter.shape) and parameter.shape[0] < sum(rows)
    if size > 1 and splits_rows and not splits_columns:
        held = _split_rows(parameter.shape[0], rows, size)
    pieces: list[_Piece] = []
    start = 0
    for (sent, first, whole), count in zip(segments, held, strict=True):
        # Whole on every rank, unless rows or columns are split.
        copies, first_row = size, 0
        if count != whole:
            copies = max(1, size * count // whole)
            first_row = rank // copies * count
        count = max(0, min(count, whole - first_row))
        first_column = rank * columns if splits_columns else 0
        copies = 1 if splits_columns else copies
        pieces.append(_Piece(sent, start, count, first_row + first, first_column, copies))
        start += count
    return pieces


def _split_rows(held: int, rows: list[int], size: int) -> list[int]:
    """Rows of each segment on one rank, of the `held` ones.

    Key and value heads are held several times where they are fewer than ranks. A vocabulary is
    padded before it is split, so the last rank may have fewer rows than it holds.
    """
    if len(rows) == 1:
        return [held]
    even = [count // size for count in rows]
    if sum(even) == held:
        return even
    return [even[0]] + [(held - even[0]) // (len(rows) - 1)] * (len(rows) - 1)


def _held_checksum(parameter: torch.Tensor, pieces: Sequence[_Piece], group: Any) -> int:
    """Of what all workers together hold of one sent tensor."""
    own = [
        checksum(
            parameter[piece.start : piece.start + piece.rows] if piece.sent.shape else parameter,
            first_row=piece.first_row,
            first_column=piece.first_column,
            columns=prod(piece.sent.shape[1:]),
        )
        for piece in pieces
        # Of several ranks with the same piece, one counts it.
        if group.rank_in_group % piece.copies == 0
    ]
    # int64 wraps around, as checksums do.
    total = torch.tensor(own, dtype=torch.int64).sum()
    if group.world_size > 1:
        torch.distributed.all_reduce(total, group=group.cpu_group)
    return int(total)


def find_adapter_failures(manager: Any, sent: Mapping[str, Sequence[torch.Tensor]]) -> list[str]:
    """What is wrong with the adapter in the first slot of vLLM's `LoRAModelManager`, for people.

    `sent` has names of layers, and A [rank, in] and B [out, rank] of each.
    """
    slot = manager.lora_index_to_id.index(ADAPTER_ID)
    failures, known = [], set[str]()
    for name, module in manager.modules.items():
        parts = manager.packed_modules.get(name, [name])
        known |= sent.keys() & set(parts)
        halves = [sent.get(part, (None, None)) for part in parts]
        stacks = (module.lora_a_stacked, module.lora_b_stacked)
        shares = (module.slice_lora_a, module.slice_lora_b)
        for which, (stack, share) in enumerate(zip(stacks, shares, strict=True)):
            # An embedding and the head have one tensor, not one for each of several parts.
            held = [part[slot] for part in (stack if isinstance(stack, tuple) else (stack,))]
            wanted: list[Any] = [half[which] for half in halves]
            if getattr(module, "tp_size", 1) > 1 and any(half is not None for half in wanted):
                wanted = share(wanted) if len(wanted) > 1 else [share(wanted[0])]
            failures += [
                f"adapter of {part!r}: vLLM holds other numbers than were sent"
                for part, own, whole in zip(parts, held, wanted, strict=True)
                if not _is_held(own, whole)
            ]
    unknown = [f"adapter of {name!r}: vLLM adapts no such layer" for name in sent.keys() - known]
    return sorted(unknown) + failures


def _is_held(held: torch.Tensor, wanted: torch.Tensor | None) -> bool:
    """Whether a slot has these numbers, and zeros beside them: vLLM pads the rank."""
    held = held.reshape(-1, held.shape[-1])
    if wanted is None:
        return not held.any()
    rows, columns = wanted.shape
    is_same = torch.equal(held[:rows, :columns].cpu(), wanted.to(held.dtype).cpu())
    return is_same and not held[rows:].any() and not held[:rows, columns:].any()
